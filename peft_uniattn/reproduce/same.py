"""Whether rows that are there already were trained and asked as they would be now."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..training.arguments import parse_arguments
from .cell import CellResult, Evaluation
from .record import without_folders


def check_same(path: Path, flags: Sequence[str], evaluation: Evaluation) -> None:
    """
    Make sure that a finished row belongs to the table that is asked for.

    Folders may be others than they were, names of files and models may not.

    Args:
        path: file of the row.
        flags: what the recipe would be told now, but for `output_dir`.
        evaluation: what the row would be asked now.

    Raises:
        ValueError: naming what differs. What a row of an earlier release was asked is not known and not compared.
    """
    result = CellResult.read(path)
    then, now = _settings(result.flags, result.config), _settings(flags)
    if result.evaluation:
        then, now = {**then, **result.evaluation}, {**now, **evaluation.asked}
    refuse_other_settings(path, then, now)


def refuse_other_settings(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError, naming what differs, unless a file was made with the settings of now."""
    differing = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    if differing:
        details = ", ".join(f"{name}={now.get(name)!r} (was {then.get(name)!r})" for name in differing)
        raise ValueError(f"{path} was made with other settings: {details}; use another output_dir, or delete the file")


def _settings(flags: Sequence[str], config: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `flags` mean, with `config` in place of what the file behind `--config` says by now."""
    # A row's flags end with the name of `output_dir`, which is not compared.
    told = list(flags[:-1] if flags[-1] == "--output_dir" else flags)
    with tempfile.TemporaryDirectory() as folder:
        if config:
            path = Path(folder) / "config.yaml"
            path.write_text(yaml.safe_dump(config))
            told[told.index("--config") + 1] = str(path)
        settings = parse_arguments([*told, "--output_dir", "unused"]).settings()
    return {name: without_folders(value) for name, value in settings.items()}
