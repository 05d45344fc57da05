"""
UniAttn in plain PyTorch for families that differ from Llama in more than numbers, after `oracle.py`.

Each is a `Style`, read off the papers: Gemma-2 (arXiv:2408.00118), Granite-3 (µP multipliers), OLMo-2
(arXiv:2501.00656), Phi-3 (arXiv:2404.14219), Qwen3 (arXiv:2505.09388). Nothing here is shared with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from oracle import (
    head_dim,
    leader_of_each_follower,
    linear,
    rms_norm,
    rotary_angles,
    rotate,
    share_heads,
    split_heads,
    visible,
)
from torch import Tensor


@dataclass(frozen=True)
class Style:
    """
    What a family adds to Llama.

    Attributes:
        norms_before, norms_after: names of the norms before attention and FFN, and after them; None: there is none.
        qk_norm: "heads" or "all": whether queries and keys are normalised a head at a time or all heads together.
        gain: what a norm multiplies by, as a function of its weight.
        activation: of the FFN.
    """

    norms_before: tuple[str | None, str | None] = ("input_layernorm", "post_attention_layernorm")
    norms_after: tuple[str | None, str | None] = (None, None)
    qk_norm: str | None = None
    gain: Callable[[Tensor], Tensor] = lambda weight: weight
    activation: Callable[[Tensor], Tensor] = F.silu


GEMMA2 = Style(
    norms_before=("input_layernorm", "pre_feedforward_layernorm"),
    norms_after=("post_attention_layernorm", "post_feedforward_layernorm"),
    gain=lambda weight: 1 + weight,
    activation=lambda x: F.gelu(x, approximate="tanh"),
)
OLMO2 = Style((None, None), ("post_attention_layernorm", "post_feedforward_layernorm"), qk_norm="all")
STYLES = {
    "gemma2": GEMMA2,
    "granite": Style(),
    "llama": Style(),
    "mistral": Style(),
    "olmo2": OLMO2,
    "phi3": Style(),
    "qwen2": Style(),
    "qwen3": Style(qk_norm="heads"),
}


def family_logits(
    weights: dict[str, Tensor],
    config,
    input_ids: Tensor,
    *,
    superblocks=(),
    compensation: dict[int, Tensor] | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Logits of the unified model, as `oracle.unified_logits` has them; positions are 0, 1, 2, …"""
    style = STYLES[config.model_type.removeprefix("uniattn_")]
    compensation = compensation or {}
    leaders = leader_of_each_follower(superblocks, config.num_hidden_layers)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    embedding = weights["model.embed_tokens.weight"]
    angles = rotary_angles(config, torch.arange(input_ids.shape[1])[None], embedding.dtype)
    residual = getattr(config, "residual_multiplier", 1.0)

    def norm(name: str | None, x: Tensor) -> Tensor:
        return (
            x if name is None else rms_norm({f"{name}.weight": style.gain(weights[f"{name}.weight"])}, name, x, config)
        )

    x = F.embedding(input_ids, embedding) * embedding_scale(config)
    s = {}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        before, before_ffn = (name and f"{layer}.{name}" for name in style.norms_before)
        after, after_ffn = (name and f"{layer}.{name}" for name in style.norms_after)
        normed = norm(before, x)
        if i not in leaders:
            s[i] = probabilities(weights, layer, normed, angles, visible(config, i, mask), config, style)
        values = share_heads(split_heads(projected(weights, layer, "v", normed, config), config), config)
        mixed = (s[leaders.get(i, i)] @ values).transpose(1, 2).flatten(2)
        attended = linear(weights, f"{layer}.self_attn.o_proj", mixed)
        if i in compensation:
            attended = attended + normed @ compensation[i]
        x = x + norm(after, attended) * residual
        x = x + norm(after_ffn, feed_forward(weights, layer, norm(before_ffn, x), style)) * residual

    head = embedding if config.tie_word_embeddings else weights["lm_head.weight"]
    logits = F.linear(norm("model.norm", x), head) / getattr(config, "logits_scaling", 1.0)
    return softcapped(logits, getattr(config, "final_logit_softcapping", None))


def embedding_scale(config) -> float:
    """Gemma-2 scales by √(hidden size), Granite by a number of its own."""
    if "gemma2" in config.model_type:
        return math.sqrt(config.hidden_size)
    return getattr(config, "embedding_multiplier", 1.0)


def score_scale(config) -> float:
    if "gemma2" in config.model_type:
        return config.query_pre_attn_scalar**-0.5
    return getattr(config, "attention_multiplier", head_dim(config) ** -0.5)


def softcapped(scores: Tensor, cap: float | None) -> Tensor:
    return scores if cap is None else cap * torch.tanh(scores / cap)


def projected(weights, layer: str, which: str, x: Tensor, config) -> Tensor:
    """x through the projection to queries, keys or values ("q", "k", "v"), fused with the others or not."""
    name = f"{layer}.self_attn.{which}_proj"
    if f"{name}.weight" in weights:
        return linear(weights, name, x)
    queries, others = (count * head_dim(config) for count in (config.num_attention_heads, config.num_key_value_heads))
    parts = weights[f"{layer}.self_attn.qkv_proj.weight"].split([queries, others, others])
    return F.linear(x, parts["qkv".index(which)])


def probabilities(weights, layer: str, normed: Tensor, angles: Tensor, mask: Tensor, config, style: Style) -> Tensor:
    """s, (batch, query heads, query length, key length)."""
    sides = []
    for which in "qk":
        name, states = f"{layer}.self_attn.{which}_norm", projected(weights, layer, which, normed, config)
        if style.qk_norm == "all":
            states = rms_norm(weights, name, states, config)
        heads = split_heads(states, config)
        if style.qk_norm == "heads":
            heads = rms_norm(weights, name, heads, config)
        sides.append(rotate(heads, angles))
    scores = sides[0] @ share_heads(sides[1], config).transpose(-1, -2) * score_scale(config)
    scores = softcapped(scores, getattr(config, "attn_logit_softcapping", None))
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~mask, 0)


def feed_forward(weights, layer: str, x: Tensor, style: Style) -> Tensor:
    if f"{layer}.mlp.gate_up_proj.weight" in weights:
        gate, up = linear(weights, f"{layer}.mlp.gate_up_proj", x).chunk(2, dim=-1)
    else:
        gate, up = (linear(weights, f"{layer}.mlp.{part}_proj", x) for part in ("gate", "up"))
    return linear(weights, f"{layer}.mlp.down_proj", style.activation(gate) * up)
