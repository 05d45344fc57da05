"""Where results go: asked before anything is loaded, as there are results only at the end."""

from __future__ import annotations

from pathlib import Path

from ..disk import in_the_way


def check_output(path: Path | None, option: str = "output") -> None:
    """
    Refuse what cannot become a file; folders that are missing are made when it is written.

    Args:
        path: where a result is to be written; None if nowhere.
        option: what the user names it by.

    Raises:
        ValueError: if it is a folder, or if nothing can be written to the folder it is to be in.
    """
    if path is None:
        return
    if path.is_dir():
        example = path / f"results{path.suffix or '.json'}"
        raise ValueError(f"{option}={str(path)!r} is a folder; name a file, such as {str(example)!r}")
    if existing := in_the_way(path.absolute().parent):
        raise ValueError(
            f"{option}={str(path)!r}: {existing} is no folder that can be written to; choose another file"
        )
