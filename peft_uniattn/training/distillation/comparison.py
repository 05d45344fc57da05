"""A student's forward pass against its teacher's, while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...families import FAMILIES, find_decoder
from ...standalone_modeling import MODEL_TYPE_PREFIX
from ..data import IGNORE
from .losses import divergence, residual_error

# Under this key go the backbone's outputs; residual streams go under their layer's index.
LAST = "last hidden states"


def predicting(labels: torch.Tensor) -> torch.Tensor:
    """Positions (batch, length) whose next token carries loss, True or False."""
    positions = torch.zeros_like(labels, dtype=torch.bool)
    positions[:, :-1] = labels[:, 1:] != IGNORE
    return positions


class Comparison:
    """
    What a teacher's forward pass left, and how far the student's is from it.

    The student's is compared on the way, because wrappers such as FSDP and ZeRO hold the output head together only
    inside its forward.

    Args:
        original: what [`watch`] saw of the teacher, at `positions`; used up.
        positions: where student and teacher are compared, (batch, length).
        temperature: of the predictions.

    Attributes:
        divergence: sum over positions of T²·KL, or 0 if the teacher left no last hidden states.
        error: sum over positions of the mean error of the residual streams, or 0 if the teacher left none.
    """

    def __init__(self, original: dict[int | str, torch.Tensor], positions: torch.Tensor, temperature: float) -> None:
        self.divergence: torch.Tensor | int = 0
        self.error: torch.Tensor | int = 0
        self._original = original
        self._layers = [key for key in original if key != LAST]
        self._positions = positions
        self._temperature = temperature

    @contextmanager
    def of(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Iterator[None]:
        """Compare the first forward pass of `student` that autograd records; `teacher` lends its output head."""

        def compare(key: int | str, value: torch.Tensor) -> None:
            if not torch.is_grad_enabled() or key not in self._original:
                return
            original = self._original.pop(key).to(value.device)
            value = value[self._positions.to(value.device)]
            if key == LAST:
                distance = divergence(student, value, teacher, original, self._temperature)
                self.divergence = distance.to(self._positions.device)
            else:
                distance = residual_error(value, original) / len(self._layers)
                self.error = self.error + distance.to(self._positions.device)

        with watch(student, self._layers, compare):
            yield


@contextmanager
def watch(model: PreTrainedModel, layers: list[int], see: Callable[[int | str, torch.Tensor], None]) -> Iterator[None]:
    """
    Call `see` at the end of the backbone's forward passes with tensors of (batch, length, hidden size).

    First, for each of `layers`, with its index and the residual stream behind its attention: what entered the layer
    plus what its attention returned, as in calibration. Then with [`LAST`] and the backbone's output. Not earlier,
    because gradient checkpointing counts what is kept for the backward pass inside a layer.
    """
    model_type = model.config.get_text_config(decoder=True).model_type
    decoder = find_decoder(model, FAMILIES[model_type.removeprefix(MODEL_TYPE_PREFIX)])
    streams: dict[int, torch.Tensor] = {}

    def before_layer(index: int, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        streams[index] = args[0] if args else kwargs["hidden_states"]

    def after_attention(index: int, _: nn.Module, args: tuple, output: tuple) -> None:
        streams[index] = streams[index] + output[0]

    def after_backbone(_: nn.Module, args: tuple, output: Any) -> None:
        for index in layers:
            see(index, streams.pop(index))
        see(LAST, output.last_hidden_state)

    hooks = [decoder.backbone.register_forward_hook(after_backbone)]
    for index in layers:
        layer, attention = decoder.layers[index], decoder.attention(index)
        hooks.append(layer.register_forward_pre_hook(partial(before_layer, index), with_kwargs=True))
        hooks.append(attention.register_forward_hook(partial(after_attention, index)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
