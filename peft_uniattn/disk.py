"""Why something cannot or could not be written to disk, whichever library tries."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

_REASONS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def in_the_way(directory: Path) -> Path | None:
    """What keeps files from being written to a folder that is there or can be made; None if nothing does."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    may_write = os.access(existing, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)
    return None if existing.is_dir() and may_write else existing


def write_failure(error: BaseException) -> OSError | None:
    """
    The system's error behind one that arose in writing a file; None if `error` is about something else.

    torch and safetensors report a full disk by errors of their own, of which torch's do not even say so.
    """
    link: BaseException | None = error
    while link is not None:
        number = link.errno if isinstance(link, OSError) else _number_in(str(link))
        if number in _REASONS:
            return OSError(number, os.strerror(number))
        link = link.__cause__ or link.__context__
    if isinstance(error, RuntimeError) and (
        "inline_container.cc" in str(error) or "PytorchStreamWriter" in str(error)
    ):
        return OSError(errno.EIO, "torch could not write a file, as on a full disk")
    return None


def _number_in(text: str) -> int | None:
    """Of a message from Rust, such as safetensors'."""
    found = re.search(r"\(os error (\d+)\)", text)
    return int(found[1]) if found else None
