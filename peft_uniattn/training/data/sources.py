"""Reading rows through `datasets`, by Hub name or from a local file."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetNotFoundError

from .files import reading

FILE_KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".json.gz": "json",
    ".jsonl.gz": "json",
    ".csv.gz": "csv",
    ".parquet": "parquet",
    ".zip": "siqa",
}


def read(name: str, *, config: str | None = None, streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    """
    The splits of a data set; a local file is one split, "train".

    Args:
        name: a file of one of the kinds in `FILE_KINDS`, or a name on the Hub.
        config: the configuration of a data set of the Hub.
        streaming: read rows as they are needed.

    Raises:
        FileNotFoundError: `name` is named like a file, but there is none.
        ValueError: the file is of an unknown kind or cannot be read, or the Hub has no such data set.
    """
    path = Path(name).expanduser()
    kind = _kind(path)
    check_file(name)
    if path.is_file():
        if kind is None:
            raise ValueError(f"dataset_name={name!r} is none of these kinds of file: {', '.join(FILE_KINDS)}")
        with reading(f"dataset_name={name!r}"):
            return _read_file(path, kind, streaming)
    try:
        return load_dataset(name, config, streaming=streaming)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"dataset_name={name!r} is no local file, and the Hub does not give it ({error}); check the name, or give "
            "a downloaded file"
        ) from error


def check_file(name: str) -> None:
    """
    Refuse a data set that is named like a file where there is none; costs nothing, so it can be asked at once.

    Raises:
        FileNotFoundError: naming it.
    """
    if _kind(Path(name)) is not None and not Path(name).expanduser().is_file():
        raise FileNotFoundError(f"dataset_name={name!r}: there is no such file; check its path")


def _kind(path: Path) -> str | None:
    return next((kind for ending, kind in FILE_KINDS.items() if path.name.endswith(ending)), None)


def _read_file(path: Path, kind: str, streaming: bool) -> DatasetDict | IterableDatasetDict:
    rows = _social_iqa(path) if kind == "siqa" else _rows_by_id(path) if kind == "json" else None
    if rows is not None:
        train = Dataset.from_list(rows)
        return IterableDatasetDict(train=train.to_iterable_dataset()) if streaming else DatasetDict(train=train)
    return load_dataset(kind, data_files=str(path), streaming=streaming)


def _rows_by_id(path: Path) -> list[dict] | None:
    """Rows of a .json file that is one object from ids to rows (PubMedQA's); None for any other file."""
    if not path.name.endswith((".json", ".json.gz")):
        return None
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
        if not file.readline().lstrip().startswith("{"):
            return None
        file.seek(0)
        try:
            content = json.load(file)
        except json.JSONDecodeError:  # JSON lines, or broken: `datasets` will say
            return None
    if not all(isinstance(row, dict) for row in content.values()):
        return None
    return [{"id": key, **row} for key, row in content.items()]


def _social_iqa(path: Path) -> list[dict]:
    """Rows of SIQA's own archive, which holds its answers in a file beside the questions; the dev part is left out."""
    with zipfile.ZipFile(path) as archive:
        names = {Path(name).name: name for name in archive.namelist() if not name.startswith("__MACOSX")}
        if not {"train.jsonl", "train-labels.lst"} <= names.keys():
            raise ValueError(
                "it has no train.jsonl with train-labels.lst, as SIQA's archive has; unpack another archive and name "
                "the file"
            )
        rows = [json.loads(line) for line in archive.read(names["train.jsonl"]).splitlines()]
        labels = archive.read(names["train-labels.lst"]).decode().split()
    return [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]
