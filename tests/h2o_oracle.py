"""
H2O as an executable specification: a full cache in float64, in which evicted tokens are masked, never removed.

Nothing here is shared with the package. Two ways to the same thing: `H2OOracle` is the model itself in plain PyTorch
(Llama, Mistral, Qwen2); `MaskingAttention` takes the place of a modelling file's eager attention, for other families.

Heavy hitters: H2O, https://arxiv.org/abs/2306.14048, algorithm 1. After each chunk of tokens, every key/value head
keeps `recent` newest tokens and, up to `capacity`, those with the largest column sums of s over all queries so far.
"""

import math

import torch
import torch.nn.functional as F
from oracle import (
    feed_forward,
    head_dim,
    leader_of_each_follower,
    linear,
    mix_values,
    rms_norm,
    rotary_angles,
    rotate,
    share_heads,
    split_heads,
)
from torch import Tensor


class Keeper:
    """One decision: which tokens each key/value head of one layer still has. Masks are True for what is left."""

    def __init__(self, capacity, recent) -> None:
        self.capacity = capacity  # of the number of tokens seen
        self.recent = recent  # of the capacity
        self.left: Tensor | None = None  # (batch, key/value heads, tokens)
        self.sums: Tensor | None = None

    def columns(self, tokens: int, batch: int, heads: int) -> Tensor:
        """What is left of `tokens` tokens, the new ones among them."""
        old = 0 if self.left is None else self.left.shape[-1]
        new = torch.ones(batch, heads, tokens - old, dtype=torch.bool)
        self.left = new if self.left is None else torch.cat([self.left, new], -1)
        return self.left

    def decide(self, s: Tensor, real: Tensor) -> None:
        """Take the column sums of s (batch, key/value heads, group, queries, tokens); real: (batch, tokens)."""
        batch, heads, _, queries, tokens = s.shape
        received = torch.zeros(batch, heads, tokens, dtype=s.dtype)
        for b in range(batch):
            for q in range(queries):
                if real[b, tokens - queries + q]:
                    received[b] += s[b, :, :, q].sum(1)
        if self.sums is not None:
            received[..., : self.sums.shape[-1]] += self.sums
        self.sums = received
        capacity = self.capacity(tokens)
        for b in range(batch):
            for h in range(heads):
                left = [t for t in range(tokens) if self.left[b, h, t]]
                if len(left) <= capacity:
                    continue
                tokens_left = [t for t in left if real[b, t]]
                newest = [t for t in left[len(left) - self.recent(capacity) :] if real[b, t]]
                others = sorted(set(tokens_left) - set(newest), key=lambda t: -received[b, h, t].item())
                kept = newest + others[: capacity - len(newest)]
                self.left[b, h] = False
                self.left[b, h, kept] = True


class H2OOracle:
    """
    The unified model with eviction, one chunk of tokens at a time; () as superblocks is the ordinary model.

    weights, config, superblocks, compensation: as for `oracle.unified_logits`.
    capacity: tokens seen -> tokens kept. recent: tokens kept -> how many of them for being newest.
    """

    def __init__(self, weights, config, *, superblocks=(), compensation=None, capacity, recent) -> None:
        self.weights, self.config, self.compensation = weights, config, compensation or {}
        self.leaders = leader_of_each_follower(superblocks, config.num_hidden_layers)
        deciding = set(range(config.num_hidden_layers)) - set(self.leaders)
        self.keepers = {layer: Keeper(capacity, recent) for layer in deciding}
        self.inputs: dict[int, Tensor] = {}  # every layer's normalised input so far: a cache that is never cut
        self.real = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, real: Tensor | None = None) -> Tensor:
        """Logits (batch, new tokens, vocab_size); real: (batch, new tokens), 0 for padding."""
        real = torch.ones_like(input_ids) if real is None else real
        self.real = real.bool() if self.real is None else torch.cat([self.real, real.bool()], 1)
        config, weights = self.config, self.weights
        positions = (self.real.long().cumsum(-1) - 1).clamp(min=0)
        embedding = weights["model.embed_tokens.weight"]
        angles = rotary_angles(config, positions, embedding.dtype)
        x, s = F.embedding(input_ids, embedding), {}
        for i in range(config.num_hidden_layers):
            layer = f"model.layers.{i}"
            normed = rms_norm(weights, f"{layer}.input_layernorm", x, config)
            so_far = [self.inputs[i]] if i in self.inputs else []
            self.inputs[i] = torch.cat([*so_far, normed], 1)
            if i not in self.leaders:
                s[i] = self._activation(i, normed, angles)
            new = normed.shape[1]
            x = x + mix_values(weights, layer, self.inputs[i], s[self.leaders.get(i, i)], config)[:, -new:]
            if i in self.compensation:
                x = x + normed @ self.compensation[i]
            x = x + feed_forward(
                weights, layer, rms_norm(weights, f"{layer}.post_attention_layernorm", x, config), config
            )
        head = embedding if config.tie_word_embeddings else weights.get("lm_head.weight", embedding)
        return F.linear(rms_norm(weights, "model.norm", x, config), head)

    def _activation(self, i: int, normed: Tensor, angles: Tensor) -> Tensor:
        """s of the new queries over everything seen, (batch, query heads, new tokens, tokens), then the decision."""
        layer, config = f"model.layers.{i}.self_attn", self.config
        new, tokens = normed.shape[1], self.inputs[i].shape[1]
        q = rotate(split_heads(linear(self.weights, f"{layer}.q_proj", normed), config), angles[:, :, -new:])
        k = rotate(split_heads(linear(self.weights, f"{layer}.k_proj", self.inputs[i]), config), angles)
        batch, kv_heads = k.shape[:2]
        left = self.keepers[i].columns(tokens, batch, kv_heads)
        index = torch.arange(tokens)
        causal = index <= index[-new:, None]
        mask = causal & self.real[:, None, None] & share_heads(left, config)[:, :, None]
        scores = q @ share_heads(k, config).transpose(-1, -2) / math.sqrt(head_dim(config))
        s = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~mask, 0)
        self.keepers[i].decide(s.unflatten(1, (kv_heads, -1)), self.real)
        return s


class MaskingAttention:
    """
    An eager attention function for any modelling file, on a full cache whose evicted tokens are masked.

    Per forward, a layer's first call is its own (or the leader's), others are the followers', which share its mask.
    deciding: the layers that evict; others attend to all that their mask shows.
    """

    def __init__(self, deciding, capacity, recent) -> None:
        self.keepers = {layer: Keeper(capacity, recent) for layer in deciding}
        self.masks: dict[int, Tensor] = {}
        self.real: Tensor | None = None

    def start_forward(self, real: Tensor) -> None:
        """real: (batch, tokens seen, the new ones included), True for tokens."""
        self.masks, self.real = {}, real

    def __call__(self, module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
        batch, kv_heads, tokens, _ = key.shape
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        grouped = query.unflatten(1, (kv_heads, -1))
        scores = grouped @ key[:, :, None].transpose(-1, -2) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        layer, first = module.layer_idx, module.layer_idx not in self.masks
        if first:
            seen = (attention_mask > -1)[:, :, None]
            keeper = self.keepers.get(layer)
            left = None if keeper is None else keeper.columns(tokens, batch, kv_heads).clone()
            self.masks[layer] = seen if left is None else seen & left[:, :, None, None]
        mask = self.masks[layer]
        s = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~mask, 0)
        if first and layer in self.keepers:
            self.keepers[layer].decide(s.detach(), self.real)
        heads = (s @ value[:, :, None]).flatten(1, 2)
        return heads.transpose(1, 2).contiguous(), None
