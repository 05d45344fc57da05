"""All results of a directory as one file, which a table or a page can be made from again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..training.journal import write_atomically
from .cell import CellResult
from .matrix import Findings


@dataclass(frozen=True)
class Record:
    """
    Attributes:
        model: honest name of the base.
        command: what was called.
        date: of the last row, "2026-01-31".
        findings: what the rows depend on, see [`Findings`]; as JSON types.
        results: of all rows and seeds.
    """

    model: str
    command: str
    date: str
    findings: dict[str, Any]
    results: list[CellResult]

    @classmethod
    def read(cls, path: Path) -> Record:
        content = json.loads(path.read_text())
        return cls(**{**content, "results": [CellResult(**result) for result in content["results"]]})


def write_record(path: Path, results: Sequence[CellResult], *, model: str, command: str, findings: Findings) -> None:
    """
    Write a [`Record`] with a line per result. Absolute paths are cut to their last part.

    Args:
        path: the file.
        results: of all rows and seeds.
        model: honest name of the base.
        command: what was called.
        findings: what the rows depend on.
    """
    date = datetime.now(timezone.utc).date().isoformat()
    command = " ".join(map(short, command.split()))
    head = {"model": short(model), "command": command, "date": date, "findings": asdict(findings)}
    lines = [
        json.dumps({**asdict(result), **without_folders({"flags": result.flags, "config": result.config})})
        for result in results
    ]
    text = f'{json.dumps(head)[:-1]},\n"results": [\n' + ",\n".join(lines) + "\n]}\n"
    write_atomically(path, text)


def without_folders(value: Any) -> Any:
    """A setting, or a list or dictionary of them, with absolute paths cut to their last part."""
    if isinstance(value, dict):
        return {name: without_folders(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(without_folders, value))
    return short(value) if isinstance(value, str) else value


def short(word: str) -> str:
    """A word of a command, an absolute path by its last part."""
    return Path(word).name if word.startswith("/") else word
