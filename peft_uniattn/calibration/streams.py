"""Two streams of hidden states, original and unified, carried through the decoder one layer at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..disk import write_failure
from ..families import Decoder
from ..handover import HANDOVER, Handover, LeaderState
from ..inspection import Adapter
from ..modes import replaced_forwards


class Spill:
    """Tensors on disk, by batch and name: memory use does not grow with the number of samples."""

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)

    def put(self, batch: Hashable, name: str, value: Any) -> None:
        try:
            with open(self._path(batch, name), "wb") as file:
                torch.save(value, file)
        except (OSError, RuntimeError) as error:
            if (failure := write_failure(error)) is None:
                raise
            raise OSError(
                failure.errno,
                f"spill_directory={str(self._directory.parent)!r}: {failure.strerror}. The hidden states of all data "
                "are kept there meanwhile; give a directory with more room, or less data",
            ) from error

    def get(self, batch: Hashable, name: str, device: torch.device | None = None) -> Any:
        return torch.load(self._path(batch, name), map_location=device, weights_only=True)

    def _path(self, batch: Hashable, name: str) -> Path:
        return self._directory / f"{batch}.{name}.pt"


@contextmanager
def spill_below(directory: str | Path | None) -> Iterator[Spill]:
    """
    A spill in a temporary directory below `directory` (None: the system's own place for them).

    Raises:
        OSError: if nothing can be written there.
    """
    try:
        temporary = tempfile.TemporaryDirectory(dir=directory, prefix="uniattn-")
    except OSError as error:
        raise OSError(
            error.errno, f"spill_directory={str(directory)!r}: {error.strerror}; give a directory that can be written"
        ) from error
    with temporary as path:
        yield Spill(path)


class LayerRunner:
    """
    Runs single decoder layers through the model's own forward.

    The backbone prepares masks and positions as always and calls its layers in order; all layers but the wanted one
    let the hidden states pass. So nothing about an architecture has to be repeated here.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def run_below(self, inputs: dict[str, torch.Tensor], layer_idx: int) -> torch.Tensor:
        """Hidden states that enter the layer `layer_idx`, from token ids."""
        seen: list[torch.Tensor] = []

        def stop(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(hidden_states)
            return hidden_states

        above = dict.fromkeys(range(layer_idx + 1, len(self._decoder.layers)), _pass)
        with self._replaced({**above, layer_idx: stop}):
            self._decoder.backbone(**inputs, use_cache=False)
        return seen[0]

    def run(
        self,
        inputs: dict[str, torch.Tensor],
        layer_idx: int,
        hidden_states: torch.Tensor,
        handover: Handover | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Run the layer `layer_idx` on `hidden_states` (batch, length, hidden size).

        Returns:
            the layer's output, and what went into and came out of its attention, all of that shape.
        """
        layer = self._decoder.layers[layer_idx]
        forward = layer.forward
        seen: dict[str, torch.Tensor] = {}

        def only(_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return forward(hidden_states, *args, **kwargs)

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            seen["output"] = output[0] if isinstance(output, tuple) else output

        def watch(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            seen["attention_input"] = args[0] if args else kwargs["hidden_states"]
            seen["attention_output"] = output[0]

        others = {index: _pass for index in range(len(self._decoder.layers)) if index != layer_idx}
        hooks = [
            self._decoder.attention(layer_idx).register_forward_hook(watch, with_kwargs=True),
            layer.register_forward_hook(keep),  # after the hook by which a compensation may be added
        ]
        try:
            with self._replaced({**others, layer_idx: only}):
                self._decoder.backbone(**inputs, use_cache=False, **{HANDOVER: handover or Handover()})
        finally:
            for hook in hooks:
                hook.remove()
        return seen["output"], seen["attention_input"], seen["attention_output"]

    def _replaced(self, forwards: dict[int, Callable]) -> AbstractContextManager[None]:
        return replaced_forwards((self._decoder.layers[index], forward) for index, forward in forwards.items())


def _pass(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


def original_model(adapter: Adapter) -> AbstractContextManager[None]:
    """Run the model without UniAttn."""
    return _switched(adapter, disabled=True)


def unified_model(adapter: Adapter) -> AbstractContextManager[None]:
    """Run the model with `adapter`, whichever is active, and whether adapters are disabled or not."""
    return _switched(adapter, disabled=False)


@contextmanager
def _switched(adapter: Adapter, disabled: bool) -> Iterator[None]:
    # Not by PEFT's own calls, which also decide what is trainable.
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in adapter.layers.values()]
    try:
        for layer in adapter.layers.values():
            layer._active_adapter, layer._disable_adapters = [adapter.name], disabled
        yield
    finally:
        for layer, active_adapter, disable_adapters in before:
            layer._active_adapter, layer._disable_adapters = active_adapter, disable_adapters


def pack_leader(state: LeaderState) -> dict[str, Any]:
    """A leader's state as a plain dictionary for [`Spill`]; followers recompute the probabilities."""
    fields = vars(replace(state, probabilities=None, shared=None))
    del fields["attention"]
    return {**fields, "kwargs": {key: value for key, value in state.kwargs.items() if value is not None}}


def unpack_leader(attention: nn.Module, fields: dict[str, Any]) -> Handover:
    """A hand-over in which the leader with this attention module has already run."""
    handover = Handover()
    handover.give(attention.layer_idx, LeaderState(attention=attention, **fields))
    return handover
