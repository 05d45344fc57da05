"""This release, and what it says to files of others."""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

__version__ = "0.1.0"


def check_release(written_by: str | None) -> None:
    """
    Refuse what a later release wrote: the same fields may mean something else there, and PEFT drops unknown ones.

    Releases that differ in their last number only read each other's files.

    Args:
        written_by: the release that is named in a file; None in files from before it was noted.

    Raises:
        ValueError: if it is later than this one, or no version.
    """
    if written_by is None:
        return
    try:
        later = Version(written_by).release[:2] > Version(__version__).release[:2]
    except (InvalidVersion, TypeError) as error:
        raise ValueError(
            f"uniattn_version={str(written_by)[:100]!r} is no version; leave it out, or use the file as it was written"
        ) from error
    if later:
        raise ValueError(
            f"uniattn_version={written_by!r}: this was written by a later release than the installed {__version__}, "
            f"which may misread it; pip install -U 'peft-uniattn>={written_by}'"
        )
