"""What the leaders of one forward pass hand to their followers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

# The keyword under which the hand-over travels from the backbone to every attention module.
HANDOVER = "uniattn_handover"


@dataclass(eq=False)
class LeaderState:
    """
    A leader's side of softmax(QKᵀ·scale + mask), enough to apply it to any value states.

    Attributes:
        attention: the leader's attention module, from which back ends read extras such as attention sinks.
        query: (batch, query heads, query length, head_dim), after RoPE and norms.
        key: (batch, key/value heads, key length, head_dim), after RoPE, norms and cache.
        mask: what the leader's attention function got as its mask, or None.
        kwargs: the other keyword arguments of the leader's attention function (scaling, dropout, ...).
        probabilities: s, of shape (batch, query heads, query length, key length), where the leader computed it;
            None where the back end never forms it.
        grad_enabled: whether autograd was recording when the leader ran.
        value: (batch, key/value heads, key length, head_dim), after the cache, where followers share it as well.
        shared: s as a fused kernel left it (see `kernels`), where one ran; `probabilities` is None then.
    """

    attention: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    mask: Any
    kwargs: dict[str, Any]
    probabilities: torch.Tensor | None
    grad_enabled: bool
    value: torch.Tensor | None = None
    shared: Any = None


class Handover:
    """
    Carries [`LeaderState`]s from leaders to followers during one forward pass.

    One fresh object per forward: state kept on a module would mix up two forwards before a backward. Deliberately
    not a dict, dataclass or pytree, which wrappers such as FSDP2 and accelerate take apart and rebuild.

    Args:
        keep: hold on to the state of every leader. By default a leader that runs without autograd takes the place of
            the earlier ones, whose Superblocks are over, so that their tensors are freed.

    Attributes:
        kernels: what the active adapter's configuration says about kernels, `kernels` and `skip_mass` of
            [`UniAttnConfig`]; None where the model's own configuration says it.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self._states: dict[int, LeaderState] = {}
        self._keep = keep
        self.kernels: tuple[str, float] | None = None
        self._deferred: dict[int, torch.Tensor] = {}
        self._latest: tuple[Callable | None, torch.Tensor | None, Any] = (None, None, None)

    def give(self, layer_idx: int, state: LeaderState) -> None:
        """Record the state of the leader `layer_idx`."""
        if not self._keep and not state.grad_enabled:
            self._states.clear()
        self._states[layer_idx] = state

    def has(self, layer_idx: int) -> bool:
        """Whether the leader `layer_idx` has run."""
        return layer_idx in self._states

    def take(self, layer_idx: int) -> LeaderState:
        """
        The state of the leader `layer_idx`.

        Raises:
            RuntimeError: if the leader has not run in this forward, or ran without autograd although its follower
                runs with it, which is what reentrant gradient checkpointing does (its gradients would be wrong).
        """
        state = self._states.get(layer_idx)
        if state is None:
            raise RuntimeError(
                f"the leader, decoder layer {layer_idx}, has not run in this forward pass; run the whole model, or at "
                "least the whole Superblock, in order"
            )
        if torch.is_grad_enabled() and not state.grad_enabled:
            raise RuntimeError(
                "reentrant gradient checkpointing cuts the gradient between a leader and its followers; use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        return state

    def once(self, function: Callable[[torch.Tensor], Any], tensor: torch.Tensor) -> Any:
        """`function(tensor)`, remembered until it is asked for another tensor: layers of one kind get one mask."""
        called, of, result = self._latest
        if called is not function or of is not tensor:
            result = function(tensor)
            self._latest = function, tensor, result
        return result

    def defer(self, layer_idx: int, addend: torch.Tensor) -> None:
        """Leave `addend` for the end of the decoder layer `layer_idx`, see [`install_deferral`]."""
        self._deferred[layer_idx] = addend

    def claim(self, layer_idx: int) -> torch.Tensor | None:
        """What was left for the end of the decoder layer `layer_idx`; nothing the second time."""
        return self._deferred.pop(layer_idx, None)

    def to(self, *args: Any, **kwargs: Any) -> Handover:
        """Stay as it is: accelerate moves every argument of a layer, followers move what they need themselves."""
        return self


def _start_handover(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    kwargs.setdefault(HANDOVER, Handover())
    return args, kwargs


def install_handover(backbone: nn.Module) -> None:
    """Let every forward of `backbone`, the module that owns the decoder layers, start with a fresh [`Handover`]."""
    remove_handover(backbone)
    backbone.register_forward_pre_hook(_start_handover, with_kwargs=True)


def remove_handover(backbone: nn.Module) -> None:
    """
    Undo [`install_handover`].

    By function rather than by the handle that torch returns: handles do not survive a deepcopy of the model.
    """
    for hook_id in [key for key, hook in backbone._forward_pre_hooks.items() if hook is _start_handover]:
        del backbone._forward_pre_hooks[hook_id]
        del backbone._forward_pre_hooks_with_kwargs[hook_id]


def _add_deferred(layer_idx: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    handover: Handover | None = kwargs.get(HANDOVER)
    addend = None if handover is None else handover.claim(layer_idx)
    if addend is None:
        return output
    if isinstance(output, tuple):
        return output[0] + addend.to(output[0].device), *output[1:]
    return output + addend.to(output.device)


def install_deferral(layer: nn.Module, layer_idx: int) -> None:
    """Let the decoder layer `layer` add to its output what its attention has deferred, if anything."""
    remove_deferral(layer)
    layer.register_forward_hook(partial(_add_deferred, layer_idx), with_kwargs=True)


def remove_deferral(layer: nn.Module) -> None:
    """Undo [`install_deferral`]; without effect where there is none."""
    for hook_id in [key for key, hook in layer._forward_hooks.items() if _is_deferral(hook)]:
        del layer._forward_hooks[hook_id]
        del layer._forward_hooks_with_kwargs[hook_id]


def _is_deferral(hook: Any) -> bool:
    return isinstance(hook, partial) and hook.func is _add_deferred
