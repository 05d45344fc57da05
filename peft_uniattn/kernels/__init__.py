"""
Fused kernels, and the one place that decides whether they run.

`UNIATTN_KERNELS` says which: `auto` (the default: Triton's where they are faster), `off` (PyTorch only) or `triton`
(Triton's for every size; complains where Triton is missing). Unset, the model's configuration says it. What a kernel
does not support is computed by PyTorch in every mode. `UNIATTN_TILES_GIB` says how much memory a leader of a prompt
may take for tiles of s (the default: none). Importing this package needs neither Triton nor a GPU.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch

from .timing import Trials, size_of

MODES = ("auto", "off", "triton")

# Launched one by one from Python, a kernel costs the host more than PyTorch's operators (measured: 50 us for a leader,
# 64 us for a follower). Without a compiled graph, that is lost where the values are smaller than this many bytes.
_WORTH_LAUNCHING = 256 * 2**20

# Of shorter prompts real text has to keep too much: 81 % of the tiles at 8k, for 1 % of the mass, by the one of two
# models that kept more; and at that, no number of followers makes up for the weighing. From here on it is timed.
_WORTH_TRYING = 16384
# Fewer queries do not fill a GPU.
_WORTH_WEIGHING = 1024
# (length, followers): from which length on so many followers gain more by streaming stored tiles of s than it costs to
# store them. At 32k, that is 3.4 ms each for 13.6 ms by the profile of a whole model, which with 12 gained 21 of the
# 27 ms that follow; fewer than 12 were not measured.
_WORTH_STORING = ((32768, 9),)
# Storing the tiles of wider heads has not been timed.
_STORED_HEAD_DIM = 128


def use(mode: str | None) -> None:
    """Choose the kernels for this process, as `UNIATTN_KERNELS` does at its start; None: as models are configured."""
    global _mode
    if mode is not None and mode not in MODES:
        raise ValueError(f"UNIATTN_KERNELS={mode!r} is unknown; use one of {', '.join(MODES)}")
    _mode = mode


def keep_tiles(gib: float | str) -> None:
    """
    Let leaders of prompts store s in this process, as `UNIATTN_TILES_GIB` does at its start: where followers are
    expected to gain by it, and where it takes no more than so many GiB. 0: never.
    """
    global _tiles_bytes
    try:
        many = float(gib)
    except ValueError:
        many = -1.0
    if not many >= 0:
        raise ValueError(f"UNIATTN_TILES_GIB={gib!r} must be a number of GiB, or 0 to store no tiles")
    _tiles_bytes = many * 2**30


@contextmanager
def tiles_kept(gib: float) -> Iterator[None]:
    """[`keep_tiles`] for a while."""
    global _tiles_bytes
    before = _tiles_bytes
    keep_tiles(gib)
    try:
        yield
    finally:
        _tiles_bytes = before


def describe(configured: str | None = None) -> str:
    """Which kernels are chosen, and the Triton that would run them, for receipts and cards."""
    mode = _mode or configured or "auto"
    if mode == "off":
        return mode
    try:
        tiles = f", tiles of s in up to {_tiles_bytes / 2**30:g} GiB" if _tiles_bytes else ""
        return f"{mode}, Triton {version('triton')}{tiles}"
    except PackageNotFoundError:
        return f"{mode}, without Triton"


def check_kernels(kernels: str, skip_mass: float) -> None:
    """Raise ValueError if a configuration's `kernels` or `skip_mass` makes no sense."""
    if kernels not in MODES:
        raise ValueError(f"kernels={kernels!r} is unknown; use one of {', '.join(MODES)}")
    if isinstance(skip_mass, bool) or not isinstance(skip_mass, (int, float)) or not 0 <= skip_mass < 1:
        raise ValueError(f"skip_mass={skip_mass!r} must be a share of the probability mass, from 0 up to below 1")


def lead(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float | None,
    causal: bool,
    configured: tuple[str | None, float] = (None, 0.0),
    once: Callable[[Callable, torch.Tensor], Any] = lambda function, tensor: function(tensor),
    leader: Any = None,
    followers: int = 1,
    back_end: Callable[[], Any] | None = None,
) -> tuple[torch.Tensor, Any] | None:
    """
    A leader's attention without autograd by fused kernels.

    Args:
        query, key, value: see `naive`.
        mask: what each query sees, (1 or batch, 1, query length, key length), or None.
        scaling: default head_dim ** -0.5.
        causal: whether, of several queries without a mask, query i sees the keys 0 ... i, rather than all.
        configured: mode and skip_mass of the model's configuration.
        once: calls a function of the mask, or returns what it gave for the same mask earlier in this forward pass.
        leader: the attention module whose softmax this is.
        followers: how many layers share this leader's softmax.
        back_end: computes the same by the model's own back end, to be timed against; without it, nothing skips unless
            the mode insists.

    Returns:
        output (batch, query length, query heads, head_dim) and the shared softmax, whose `apply(value)` gives a
        follower's output of the same shape, or None where followers are faster by their back end; None for both where
        PyTorch is to compute the leader, too.
    """
    mode = _mode or configured[0] or "auto"
    if query.shape[2] == 1:
        if (decode := decode_kernels(query, key, value, mask, mode)) is None:
            return None
        span = None if mask is None else decode.visible_span(mask)
        options = {"span": span, "scaling": scaling, "skip_mass": configured[1]}
        output, shared = decode.leader_decode(query, key, value, mask, **options)
        return output.transpose(1, 2), shared
    if mask is None and not causal:
        return None
    if not configured[1]:
        storing = storing_kernels(query, key, value, mask, mode, followers)
        return None if storing is None else storing.leader_stored(query, key, value, scaling=scaling)
    if (prefill := prefill_kernels(query, key, value, mask, configured[1], mode)) is None:
        return None
    if (offset := 0 if mask is None else once(prefill.causal_offset, mask)) is None:
        return None

    def weighing() -> tuple[torch.Tensor, Any]:
        return prefill.leader_prefill(query, key, value, offset=offset, scaling=scaling, skip_mass=configured[1])

    if mode == "triton":
        return weighing()
    if (visible := offset + query.shape[2]) < _WORTH_TRYING or back_end is None:
        return None
    size = size_of(query, key, visible, configured[1])
    return _trials.lead(leader, size, followers, value, back_end, weighing)


def decode_kernels(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    mode: str | None = None,
) -> ModuleType | None:
    """
    What computes this leader's decoded token faster than PyTorch: the module `decode`, or None.

    Args: see `naive`, which says what is computed; `mode` defaults to this process's.
    """
    mode = mode or _mode or "auto"
    if mode == "off" or query.shape[2] != 1 or not _importable(mode):
        return None
    if mode == "auto" and not torch.compiler.is_compiling() and value.nbytes < _WORTH_LAUNCHING:
        return None
    from . import decode

    return decode if decode.supports(query, key, value, mask) else None


def prefill_kernels(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    skip_mass: float,
    mode: str | None = None,
) -> ModuleType | None:
    """
    What may let the followers of a prompt, or of a chunk of one, skip tiles: the module `prefill`, or None.

    Without skipping there is none: a follower's recomputation by the model's own fused attention was the fastest at
    every length that was measured. Nor for prompts so short that weighing their tiles takes longer than it saves.

    Args: see `lead`; `mode` defaults to this process's. Judged by shapes and types: of a mask, the values decide.
    """
    mode = mode or _mode or "auto"
    if mode == "off" or not skip_mass or torch.compiler.is_compiling() or not _importable(mode):
        return None
    if mode == "auto" and (
        key.shape[2] < _WORTH_TRYING or query.shape[2] < _WORTH_WEIGHING or _is_capturing(query.device)
    ):
        return None
    from . import prefill

    return prefill if prefill.supports(query, key, value, mask) else None


def storing_kernels(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    mode: str,
    followers: int,
) -> ModuleType | None:
    """
    What lets the followers of a whole prompt stream s as its leader has stored it: the module `prefill`, or None.

    Args: see `lead`.
    """
    length = query.shape[2]
    # Half of length² probabilities, 2 bytes each.
    needed = query.shape[0] * query.shape[1] * length * length
    if mode == "off" or not _tiles_bytes or torch.compiler.is_compiling() or not _importable(mode):
        return None
    if mask is not None or length != key.shape[2] or needed > _tiles_bytes:
        return None
    if mode == "auto" and (
        not any(length >= least and followers >= few for least, few in _WORTH_STORING)
        or query.shape[3] > _STORED_HEAD_DIM
    ):
        return None
    from . import prefill

    return prefill if prefill.supports(query, key, value) else None


def _is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being made, in which nothing can be timed or read."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@torch.compiler.assume_constant_result
def _importable(mode: str) -> bool:
    return _import_decode(mode)


@functools.cache
def _import_decode(mode: str) -> bool:
    try:
        from . import decode  # noqa: F401
    except ImportError as error:
        if mode == "auto":
            return False
        raise ValueError("UNIATTN_KERNELS=triton needs Triton; install it, or use auto") from error
    return True


_trials = Trials()
use(os.environ.get("UNIATTN_KERNELS") or None)
keep_tiles(os.environ.get("UNIATTN_TILES_GIB") or 0)
