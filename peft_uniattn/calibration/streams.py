"""Two streams of hidden states, original and unified, carried through the decoder one layer at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn

from ..disk import write_failure
from ..families import Decoder
from ..handover import HANDOVER, Handover, LeaderState
from ..inspection import Adapter
from ..modes import replaced_forwards

# What stays in memory in all. On a GPU the way to disk takes longer than the layers; host memory is what it protects.
_ROOM_ON_GPU = 2 * 2**30
_ROOM_ON_HOST = 2**28


class Spill:
    """
    Tensors by batch and name, in memory while there is room and else on disk: memory use does not grow with the data.

    What comes back is always a copy, of what was put at the time, as a layer or a data loader may work in place.

    Args:
        directory: for what finds no room.
        room: bytes that may stay in memory, on whichever device they are.
    """

    def __init__(self, directory: str | Path, room: int) -> None:
        self._directory = Path(directory)
        self._room = room
        self._kept: dict[tuple[Hashable, str], tuple[Any, int]] = {}

    def put(self, batch: Hashable, name: str, value: Any) -> None:
        self._room += self._kept.pop((batch, name), (None, 0))[1]
        size = sum(tensor.nbytes for tensor in _tensors(value))
        if size > self._room:
            return self._write(batch, name, value)
        self._room -= size
        self._kept[batch, name] = _copy(value), size

    def get(self, batch: Hashable, name: str) -> Any:
        if (batch, name) in self._kept:
            return _copy(self._kept[batch, name][0])
        return torch.load(self._path(batch, name), weights_only=True)

    def leave_memory(self) -> None:
        """Move everything to disk, now and from now on."""
        kept, self._kept, self._room = self._kept, {}, 0
        for (batch, name), (value, _) in kept.items():
            self._write(batch, name, value)

    def _write(self, batch: Hashable, name: str, value: Any) -> None:
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

    def _path(self, batch: Hashable, name: str) -> Path:
        return self._directory / f"{batch}.{name}.pt"


def _copy(value: Any) -> Any:
    return recursively_apply(torch.clone, value)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _room_on(device: torch.device) -> int:
    """Bytes that a spill may keep in memory; other processes may use the same GPU."""
    if device.type != "cuda":
        return _ROOM_ON_HOST
    free, _ = torch.cuda.mem_get_info(device)
    return min(_ROOM_ON_GPU, free // 4)


@contextmanager
def spill_below(directory: str | Path | None, device: torch.device) -> Iterator[Spill]:
    """
    A spill in memory and, beyond that, in a temporary directory.

    Args:
        directory: where that directory is made. None: the system's own place for them.
        device: where the tensors will be. Up to 2 GiB stay on a GPU, but no more than a quarter of what is free there
            now; elsewhere up to 256 MiB stay in memory.

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
        yield Spill(path, _room_on(device))


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

    def starting_at(self, layer_idx: int, hidden_states: torch.Tensor) -> AbstractContextManager[None]:
        """Let the model begin with `hidden_states`, which enter the layer `layer_idx`, whatever token ids it gets."""
        forward = self._decoder.layers[layer_idx].forward

        def first(_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return forward(hidden_states, *args, **kwargs)

        return self._replaced({**dict.fromkeys(range(layer_idx), _pass), layer_idx: first})

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
