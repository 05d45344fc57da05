"""Run a model in another mode for a moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
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


@contextmanager
def replaced_forwards(forwards: Iterable[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Let modules run another forward; each pair is a module and what takes its place."""
    forwards = list(forwards)
    # Accelerate keeps forwards of its own on instances; those have to come back, others have to go.
    before = [module.__dict__.get("forward") for module, _ in forwards]
    try:
        for module, forward in forwards:
            module.forward = forward
        yield
    finally:
        for (module, _), forward in zip(forwards, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """
    Run `model` as it was before adapters came: trained copies of whole modules and of tokens rest as well.

    By flags rather than by PEFT's `disable_adapter()`, which also takes away and gives back what is trainable; DDP,
    FSDP and compiled graphs do not expect that between two forward passes.
    """
    switched = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    before = [module._disable_adapters for module in switched]
    try:
        for module in switched:
            module._disable_adapters = True
        yield
    finally:
        for module, disabled in zip(switched, before, strict=True):
            module._disable_adapters = disabled
