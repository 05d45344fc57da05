"""Files that a user gives, with errors that say which of them is damaged."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import yaml
from datasets.exceptions import DatasetGenerationError

# What readers raise for contents that are not as they expect; the errors of JSON, Arrow, pandas and Unicode are
# ValueErrors, and an empty file ends in a StopIteration.
_DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    StopIteration,
    zlib.error,
    gzip.BadGzipFile,
    zipfile.BadZipFile,
    yaml.YAMLError,
    DatasetGenerationError,
)


@contextmanager
def reading(file: str) -> Iterator[None]:
    """
    Around the reading of a file: let its damage name the file and the way out.

    Args:
        file: the argument and its value, such as "exclude_ids='test.json'".

    Raises:
        ValueError: in place of the reader's error.
    """
    try:
        yield
    except _DAMAGE as error:
        reason = _reason(error.__cause__ or error)
        raise ValueError(f"{file} cannot be read: {reason}; repair it, or download it again") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyError):
        return f"missing {error}"
    if isinstance(error, TypeError):
        return f"it has another shape than expected ({error})"
    return str(error) or "it is empty"
