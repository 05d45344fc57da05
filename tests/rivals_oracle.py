"""The rivals and the compensation designs as executable specifications, on the pieces of oracle.py; float64, uncached.

CLA (https://arxiv.org/abs/2405.12981): a follower i + b of the leader i attends with its own queries over the leader's
keys and values, x' = softmax(Q_{i+b} · K_iᵀ / √d_k) · V_i · W_o + x_{i+b}.
LLMDrop (https://arxiv.org/abs/2406.15786): a dropped layer has no attention, x' = x.
"""

import math

import torch
import torch.nn.functional as F
from oracle import (
    feed_forward,
    head_dim,
    leader_of_each_follower,
    linear,
    rms_norm,
    rotary_angles,
    rotate,
    share_heads,
    softmax_activation,
    split_heads,
    visible,
)
from torch import Tensor


def rival_logits(weights, config, input_ids, *, superblocks=(), dropped=(), attention_mask=None, position_ids=None):
    """
    Logits of a model with CLA in `superblocks` and no attention in the layers `dropped`, (batch, length, vocabulary).

    weights: names and tensors of a Llama, Mistral or Qwen2; the k_proj and v_proj of followers, and all of the
        attention of dropped layers, are never read and may be missing.
    """
    leaders = leader_of_each_follower(superblocks, config.num_hidden_layers)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1])[None]
    embedding = weights["model.embed_tokens.weight"]
    angles = rotary_angles(config, position_ids, embedding.dtype)
    x = F.embedding(input_ids, embedding)
    lent = {}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        normed = rms_norm(weights, f"{layer}.input_layernorm", x, config)
        if i not in dropped:
            if i not in leaders:
                k = rotate(split_heads(linear(weights, f"{layer}.self_attn.k_proj", normed), config), angles)
                v = split_heads(linear(weights, f"{layer}.self_attn.v_proj", normed), config)
                lent[i] = share_heads(k, config), share_heads(v, config)
            k, v = lent[leaders.get(i, i)]
            q = rotate(split_heads(linear(weights, f"{layer}.self_attn.q_proj", normed), config), angles)
            seen = visible(config, i, mask)
            scores = (q @ k.transpose(-1, -2) / math.sqrt(head_dim(config))).masked_fill(~seen, -1e300)
            heads = (scores.softmax(-1).masked_fill(~seen, 0) @ v).transpose(1, 2).flatten(2)
            x = x + linear(weights, f"{layer}.self_attn.o_proj", heads)
        x = x + feed_forward(weights, layer, rms_norm(weights, f"{layer}.post_attention_layernorm", x, config), config)
    head = embedding if config.tie_word_embeddings else weights["lm_head.weight"]
    return F.linear(rms_norm(weights, "model.norm", x, config), head)


def attention_similarity(weights, config, input_ids, attention_mask) -> Tensor:
    """Mean over real tokens of cos(x, x + Attn(Norm(x))), (layers,)."""
    embedding = weights["model.embed_tokens.weight"]
    angles = rotary_angles(config, torch.arange(input_ids.shape[1])[None], embedding.dtype)
    x = F.embedding(input_ids, embedding)
    means = []
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        before = x
        normed = rms_norm(weights, f"{layer}.input_layernorm", x, config)
        s = softmax_activation(weights, layer, normed, angles, visible(config, i, attention_mask), config)
        v = share_heads(split_heads(linear(weights, f"{layer}.self_attn.v_proj", normed), config), config)
        x = x + linear(weights, f"{layer}.self_attn.o_proj", (s @ v).transpose(1, 2).flatten(2))
        cosine = (before * x).sum(-1) / (before.norm(dim=-1) * x.norm(dim=-1))
        means.append(cosine[attention_mask.bool()].mean())
        x = x + feed_forward(weights, layer, rms_norm(weights, f"{layer}.post_attention_layernorm", x, config), config)
    return torch.stack(means)


def designed_logits(weights, config, input_ids, *, superblocks, compensation, design) -> Tensor:
    """
    Logits of UniAttn with any design of W_c.

    compensation: follower's layer index -> W_c, applied from the right.
    design: "attention_output": Norm(x)·W_c is added after W_o; "ffn_output": after the FFN; "heads": to s·V;
        "values_to_heads": V·W_c to s·V; "input_and_heads": Norm(x)·W_x + s·V·W_h after W_o, W_c being W_x over W_h.
    """
    leaders = leader_of_each_follower(superblocks, config.num_hidden_layers)
    mask = torch.ones_like(input_ids)
    embedding = weights["model.embed_tokens.weight"]
    angles = rotary_angles(config, torch.arange(input_ids.shape[1])[None], embedding.dtype)
    x = F.embedding(input_ids, embedding)
    s = {}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        normed = rms_norm(weights, f"{layer}.input_layernorm", x, config)
        if i not in leaders:
            s[i] = softmax_activation(weights, layer, normed, angles, visible(config, i, mask), config)
        v = linear(weights, f"{layer}.self_attn.v_proj", normed)
        heads = s[leaders.get(i, i)] @ share_heads(split_heads(v, config), config)
        heads = heads.transpose(1, 2).flatten(2)
        if i in leaders and design in ("heads", "values_to_heads"):
            heads = heads + (normed if design == "heads" else v) @ compensation[i]
        x = x + linear(weights, f"{layer}.self_attn.o_proj", heads)
        if i in leaders and design == "input_and_heads":
            w_x, w_h = compensation[i].split([normed.shape[-1], heads.shape[-1]])
            x = x + normed @ w_x + heads @ w_h
        if i in leaders and design == "attention_output":
            x = x + normed @ compensation[i]
        x = x + feed_forward(weights, layer, rms_norm(weights, f"{layer}.post_attention_layernorm", x, config), config)
        if i in leaders and design == "ffn_output":
            x = x + normed @ compensation[i]
    head = embedding if config.tie_word_embeddings else weights["lm_head.weight"]
    return F.linear(rms_norm(weights, "model.norm", x, config), head)
