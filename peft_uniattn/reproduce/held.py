"""Bytes of KV cache that a row holds, with and without H2O."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..cache import kv_bytes
from ..eviction import H2OCache, h2o
from ..modes import evaluation_mode

# What the cache of a row is measured after.
TOKENS = 1000


@torch.no_grad()
def measure_kv_bytes(model: PreTrainedModel, *, h2o_budget: float | None = None) -> tuple[int, int]:
    """
    Bytes of keys and values per token seen that a real prefill leaves behind, and of how many tokens.

    Args:
        model: of a row.
        h2o_budget: share of the tokens that H2O keeps; None: all are kept.
    """
    length = min(TOKENS, getattr(model.config, "max_position_embeddings", TOKENS))
    ids = torch.arange(length, device=model.device).unsqueeze(0) % model.config.vocab_size
    with evaluation_mode(model):
        if h2o_budget is None:
            cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        else:
            cache = H2OCache(h2o_budget)
            with h2o(model):
                model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return kv_bytes(cache) // length, length
