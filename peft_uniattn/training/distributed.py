"""One process or many: who writes, and how the others learn of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


def is_main_process() -> bool:
    """Whether this process is the one that writes."""
    return PartialState().is_main_process


def on_main_process(action: Callable[[], T]) -> T:
    """
    Run `action` in the main process alone, while the others wait for its result.

    Args:
        action: what it returns must be picklable.

    Returns:
        the result, in every process.

    Raises:
        RuntimeError: in the other processes, if `action` failed; the main process raises the error itself.
    """
    if PartialState().num_processes == 1:
        return action()
    outcome: list = [None, None]
    error = None
    if is_main_process():
        try:
            outcome[0] = action()
        except Exception as raised:
            error = raised
            outcome[1] = f"{type(raised).__name__}: {raised}"
    broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise RuntimeError(f"the main process failed with {outcome[1]}")
    return outcome[0]
