"""The paper's five evaluation sets from the files that their authors publish, in the columns of the Hub's copies."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

Row = dict[str, Any]


@dataclass(frozen=True)
class LocalSet:
    """
    How to read one evaluation set.

    Attributes:
        test: name of the published file with the evaluation questions.
        splits: reads the set from a directory into lists of rows by split; "train" is left out where no training
            file lies in that directory.
    """

    test: str
    splits: Callable[[Path], dict[str, list[Row]]]

    def load(self, directory: str | Path) -> DatasetDict:
        """
        The set as the official task definitions expect it, with the splits "test", "validation" and, where there is
        a training file, "train".

        Raises:
            FileNotFoundError: if the published file is not in `directory` or below it.
        """
        rows = self.splits(Path(directory))
        rows["validation"] = rows["test"]
        return DatasetDict({split: Dataset.from_list(rows[split]) for split in rows})


def find(directory: Path, name: str) -> Path | None:
    """The file `name`, or `name`.gz, in `directory` or anywhere below it; None if there is none."""
    return next((path for end in ("", ".gz") for path in sorted(directory.rglob(name + end))), None)


def find_or_raise(directory: Path, name: str) -> Path:
    """Like [`find`], but raises FileNotFoundError with the name of the missing file."""
    if (path := find(directory, name)) is None:
        raise FileNotFoundError(
            f"data_dir={str(directory)!r} has no {name} or {name}.gz; put the published file there, or leave out "
            "data_dir to take the set from the Hub"
        )
    return path


def _text(path: Path) -> str:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode()


def _json_lines(path: Path) -> Iterator[Row]:
    return (json.loads(line) for line in _text(path).splitlines() if line.strip())


def _pubmedqa(directory: Path) -> dict[str, list[Row]]:
    articles = json.loads(_text(find_or_raise(directory, "ori_pqal.json")))
    held_out = json.loads(_text(find_or_raise(directory, "test_ground_truth.json")))
    columns = ("QUESTION", "CONTEXTS", "final_decision")
    rows = {key: {name: article[name] for name in columns} for key, article in articles.items()}
    return {
        "test": [row for key, row in rows.items() if key in held_out],
        "train": [row for key, row in rows.items() if key not in held_out],
    }


def _medmcqa(directory: Path) -> dict[str, list[Row]]:
    columns = ("question", "opa", "opb", "opc", "opd")
    # The published files count the options from 1, the Hub's copy from 0.
    return {
        split: [{**{name: row[name] for name in columns}, "cop": int(row["cop"]) - 1} for row in _json_lines(path)]
        for split, name in (("test", "dev.json"), ("train", "medmcqa/train.json"))
        if (path := find_or_raise(directory, name) if split == "test" else find(directory, name))
    }


def _medqa(directory: Path) -> dict[str, list[Row]]:
    def rows(path: Path) -> list[Row]:
        return [
            {
                "sent1": row["question"],
                **{f"ending{index}": row["options"][letter] for index, letter in enumerate("ABCD")},
                "label": "ABCD".index(row["answer_idx"]),
            }
            for row in _json_lines(path)
        ]

    splits = {"test": rows(find_or_raise(directory, "phrases_no_exclude_test.jsonl"))}
    if train := find(directory, "phrases_no_exclude_train.jsonl"):
        splits["train"] = rows(train)
    return splits


def _social_iqa(directory: Path) -> dict[str, list[Row]]:
    columns = ("context", "question", "answerA", "answerB", "answerC")
    splits = {
        "test": [
            {**{name: row[name] for name in columns}, "label": str("ABC".index(row["correct"]) + 1)}
            for row in _json_lines(find_or_raise(directory, "socialIQa_v1.4_dev.jsonl"))
        ]
    }
    if archive := find(directory, "socialiqa-train-dev.zip"):
        with zipfile.ZipFile(archive) as files:
            questions = files.read("socialiqa-train-dev/train.jsonl").decode().splitlines()
            labels = files.read("socialiqa-train-dev/train-labels.lst").decode().split()
        splits["train"] = [
            {**{name: row[name] for name in columns}, "label": label}
            for row, label in zip(map(json.loads, questions), labels, strict=True)
        ]
    return splits


def _commonsense_qa(directory: Path) -> dict[str, list[Row]]:
    def rows(path: Path) -> list[Row]:
        return [
            {
                "question": row["question"]["stem"],
                "choices": {
                    "label": [choice["label"] for choice in row["question"]["choices"]],
                    "text": [choice["text"] for choice in row["question"]["choices"]],
                },
                "answerKey": row["answerKey"],
            }
            for row in _json_lines(path)
        ]

    splits = {"test": rows(find_or_raise(directory, "dev_rand_split.jsonl"))}
    if train := find(directory, "train_rand_split.jsonl"):
        splits["train"] = rows(train)
    return splits


LOCAL_SETS: dict[str, LocalSet] = {
    "pubmedqa": LocalSet("ori_pqal.json", _pubmedqa),
    "medmcqa": LocalSet("dev.json", _medmcqa),
    "medqa_4options": LocalSet("phrases_no_exclude_test.jsonl", _medqa),
    "social_iqa": LocalSet("socialIQa_v1.4_dev.jsonl", _social_iqa),
    "commonsense_qa": LocalSet("dev_rand_split.jsonl", _commonsense_qa),
}
