"""Run a model in another mode for a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .quantized import is_four_bit


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """
    Put all of `model` in evaluation mode, and every module back into the mode it was in.

    Except 4-bit linear maps: they compute the same in training mode, and evaluation mode may leave them untrainable.
    """
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = is_four_bit(module)
        yield
    finally:
        for module, training in before:
            module.training = training
