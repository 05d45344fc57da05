"""What a long run has finished, on disk, so that the same command continues after an interruption."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..disk import in_the_way


class Journal:
    """
    Results of finished steps in `directory/journal.json`.

    Args:
        directory: the run's output directory, created with the first result.
        settings: what the run was asked to do, as JSON types.

    Raises:
        ValueError: if the directory holds a run with other settings, naming the differences, or foreign files.
        OSError: if nothing can be written there.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        check_writable(directory)
        self.directory = directory
        self._path = directory / "journal.json"
        settings = json.loads(json.dumps(settings))
        if self._path.exists():
            content = json.loads(self._path.read_text())
            _check_same(content["settings"], settings, directory)
            self.results: dict[str, Any] = content["results"]
        else:
            # A run that was killed while it wrote its first result has an unfinished journal, and nothing else.
            if directory.exists() and set(directory.iterdir()) - {_unfinished(self._path)}:
                raise ValueError(f"{directory} exists and holds no run to continue; choose another output directory")
            self.results = {}
        self._settings = settings

    def record(self, name: str, result: dict[str, Any], *, write: bool = True) -> None:
        """
        Remember the result of the step `name`.

        Args:
            name: of the step.
            result: as JSON types.
            write: also to disk; for one process of a distributed run.
        """
        self.results[name] = result
        if not write:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        content = {"settings": self._settings, "results": self.results}
        write_atomically(self._path, json.dumps(content, indent=2) + "\n")


def check_writable(directory: Path) -> None:
    """Raise OSError, before a model is loaded, if no file could be written there."""
    if existing := in_the_way(directory):
        what = "cannot be written to" if existing.is_dir() else "is not a directory"
        raise OSError(errno.EACCES, f"output_dir={str(directory)!r}: {existing} {what}; choose another output_dir")


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is either the old one or the new one at any moment."""
    temporary = _unfinished(path)
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_directory_atomically(path: Path, save: Callable[[Path], Any]) -> None:
    """Let `save` fill a temporary directory and put that in the place of `path` once it is complete."""
    temporary = _unfinished(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save(temporary)
    write_through(temporary)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)


def write_through(directory: Path) -> None:
    """Have the system put every file below `directory` on disk, so that it survives a loss of power."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _check_same(old: dict[str, Any], new: dict[str, Any], directory: Path) -> None:
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if differing:
        details = ", ".join(f"{key}={new.get(key)!r} (was {old.get(key)!r})" for key in differing)
        raise ValueError(
            f"{directory} holds a run with other settings: {details}; repeat its settings to continue it, or choose "
            "another output directory"
        )
