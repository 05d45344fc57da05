"""Examples and questions for `explore_recipe.py`, as tensors of one shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from peft_uniattn.evaluation import check_contamination
from peft_uniattn.evaluation.tasks import task_manager, task_specs
from peft_uniattn.training.data import IGNORE, DataArguments, encode_pairs, load_data

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTH, ANSWER = 96, 24  # tokens of an example, and of its answer; the few longer ones are left out


class Examples(NamedTuple):
    """Token ids (count, length), where the answers' tokens are predicted, and what they are (both (count, answer))."""

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def pack(cls, rows: list[tuple[list[int], int]], length: int, answer: int, padding: int = 0) -> Examples:
        """Rows are token ids and where the answer starts in them."""
        ids = torch.full((len(rows), length), padding)
        positions, targets = torch.zeros(len(rows), answer, dtype=torch.long), torch.full((len(rows), answer), IGNORE)
        for row, (tokens, start) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            positions[row, : len(tokens) - start] = torch.arange(start - 1, len(tokens) - 1)
            targets[row, : len(tokens) - start] = torch.tensor(tokens[start:])
        return cls(ids, positions, targets)

    def batch(self, rows: torch.Tensor) -> list[torch.Tensor]:
        return [tensor[rows].to(DEVICE) for tensor in self]

    def for_calibration(self, count: int, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        for rows in torch.arange(min(count, len(self.ids))).split(batch_size):
            ends = self.positions[rows].amax(1, keepdim=True) + 2
            mask = (torch.arange(int(ends.max())) < ends).long()
            yield {"input_ids": self.ids[rows, : mask.shape[1]].to(DEVICE), "attention_mask": mask.to(DEVICE)}

    def prompt_positions(self) -> torch.Tensor:
        """(1, count): from where the prompts are no longer all alike to the end of the longest."""
        alike = int((self.ids == self.ids[0]).all(0).long().cumprod(0).sum())
        return torch.arange(max(alike - 1, 0), int(self.positions[:, 0].max()), device=DEVICE)[None]


class Questions(NamedTuple):
    """One example per choice, `choices` of them per question; `right` is the index of the right one."""

    examples: Examples
    characters: torch.Tensor
    choices: list[int]
    right: list[int]


def training_examples(
    files: list[str],
    tokenizer: PreTrainedTokenizerBase,
    held_out: int,
    seed: int,
    questions: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> tuple[Examples, Examples]:
    """To train on, and held out; ValueError where one of the `questions`, by evaluation set, is among them."""
    arguments = DataArguments(dataset_name=files, test_size=held_out)
    data = load_data(arguments, tokenizer, max_length=LENGTH + 1, seed=seed)  # what was cut is too long, too
    texts = [tokenizer.decode(row["input_ids"]) for row in (*data.train, *data.test)]
    for name, asked in questions.items():
        check_contamination(texts, asked, name=name)

    def pack(rows: list[dict[str, list[int]]]) -> Examples:
        pairs = [(row["input_ids"], row["labels"].count(IGNORE)) for row in rows]
        kept = [(ids, start) for ids, start in pairs if len(ids) <= LENGTH and len(ids) - start <= ANSWER]
        return Examples.pack(kept, LENGTH, ANSWER)

    return pack(data.train.to_list()), pack(data.test.to_list())


def load_questions(names: list[str], tokenizer: PreTrainedTokenizerBase, data_dir: Path) -> dict[str, Questions]:
    """The tasks' questions with the paper's prompt."""
    found = {}
    for name, task in task_manager().load(task_specs(names, data_dir=data_dir, prompt="paper"))["tasks"].items():
        rows, characters, choices, right = [], [], [], []
        for doc in task.eval_docs:
            prompt, answers = task.doc_to_text(doc), task.doc_to_choice(doc)
            rows += encode_pairs(tokenizer, [prompt] * len(answers), answers)
            characters += map(len, answers)
            choices.append(len(answers))
            right.append(int(task.doc_to_target(doc)))
        size = max(len(ids) for ids, _ in rows), max(len(ids) - start for ids, start in rows)
        found[name] = Questions(Examples.pack(rows, *size), torch.tensor(characters), choices, right)
    return found
