"""Keeps cuDNN's attention out of training where its gradients are no numbers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

logger = logging.getLogger(__name__)

_LENGTH, _HEAD_DIM = 192, 64  # a length of 64 more than a multiple of 128
_SCORE = -120.0  # below -88.7, the logarithm of the largest float32


@contextmanager
def sound_attention(device: torch.device) -> Iterator[None]:
    """
    Inside, PyTorch's `scaled_dot_product_attention` goes without cuDNN if cuDNN's backward pass gives NaN on `device`.

    It does in some versions on Hopper GPUs where a mask is given, the length is 64 more than a multiple of 128, and
    all scores of a query are below -88.7, as in a head of Qwen2.5 (https://github.com/pytorch/pytorch/issues/196678).
    A probe tells, so that a sound version stays in use; values and gradients of the other back ends are the same up
    to rounding.
    """
    back_ends = torch.backends.cuda
    if not back_ends.cudnn_sdp_enabled() or has_sound_gradient(device):
        yield
        return
    logger.warning(
        "cuDNN's attention has gradients of NaN on this GPU (https://github.com/pytorch/pytorch/issues/196678); "
        "training uses PyTorch's other back ends"
    )
    back_ends.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        back_ends.enable_cudnn_sdp(True)


@cache
def has_sound_gradient(device: torch.device) -> bool:
    """
    Whether cuDNN's gradient of masked attention is finite where every score is -120; True as well where cuDNN does
    not compute it.
    """
    if device.type != "cuda":
        return True
    query, key = torch.zeros(2, 1, 1, _LENGTH, _HEAD_DIM, dtype=torch.bfloat16, device=device)
    query[..., 0], key[..., 0] = 1.0, _SCORE * _HEAD_DIM**0.5
    mask = torch.ones(_LENGTH, _LENGTH, dtype=torch.bool, device=device).tril()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what keeps cuDNN from it
        query.requires_grad_()
        try:
            output = scaled_dot_product_attention(query, key, torch.ones_like(key), attn_mask=mask)
            (gradient,) = torch.autograd.grad(output.sum(), query)
        except RuntimeError:
            return True
    return bool(gradient.isfinite().all())
