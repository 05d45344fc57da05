"""
Fused kernels, and the one place that decides whether they run.

`UNIATTN_KERNELS` says which: `auto` (the default: Triton's where they are faster), `off` (PyTorch only) or `triton`
(Triton's for every size; complains where Triton is missing). What a kernel does not support is computed by PyTorch in
every mode. Importing this package needs neither Triton nor a GPU.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch

MODES = ("auto", "off", "triton")

# Launched one by one from Python, a kernel costs the host more than PyTorch's operators (measured: 50 us for a leader,
# 64 us for a follower). Without a compiled graph, that is lost where the values are smaller than this many bytes.
_WORTH_LAUNCHING = 256 * 2**20


def use(mode: str) -> None:
    """Choose the kernels for this process, as `UNIATTN_KERNELS` does when it starts."""
    global _mode
    if mode not in MODES:
        raise ValueError(f"UNIATTN_KERNELS={mode!r} is unknown; use one of {', '.join(MODES)}")
    _mode = mode


def decode_kernels(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> ModuleType | None:
    """
    What computes this leader's decoded token faster than PyTorch: the module `decode`, or None.

    Args: see `naive`, which says what is computed.
    """
    if _mode == "off" or query.shape[2] != 1 or not _importable(_mode):
        return None
    if _mode == "auto" and not torch.compiler.is_compiling() and value.nbytes < _WORTH_LAUNCHING:
        return None
    from . import decode

    return decode if decode.supports(query, key, value, mask) else None


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


use(os.environ.get("UNIATTN_KERNELS", "auto"))
