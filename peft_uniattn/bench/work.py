"""What a forward pass has to compute and to move, counted from a model's configuration: the bounds on its time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Work:
    """
    Attributes:
        flops: floating-point operations of matrix products.
        bytes: weights and cached states, each moved once.
        state_bytes: the cached states alone.
    """

    flops: int
    bytes: int
    state_bytes: int

    def bounds_ms(self, flops_per_s: float, bytes_per_s: float) -> dict[str, float]:
        """The least time in milliseconds at these rates, by `flops` and by `bytes`."""
        return {"flops": 1e3 * self.flops / flops_per_s, "bytes": 1e3 * self.bytes / bytes_per_s}

    def bound_ms(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The larger of [`bounds_ms`]."""
        return max(self.bounds_ms(flops_per_s, bytes_per_s).values())


def followers_of(model: PreTrainedModel) -> int:
    """Layers that store values only; 0 for a base model."""
    return sum(len(block) - 1 for block in getattr(model.config, "superblocks", None) or ())


def dimensions(config: PretrainedConfig) -> dict[str, int]:
    """What of a model's shape its speed depends on."""
    return {
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "query_heads": config.num_attention_heads,
        "key_value_heads": _key_value_heads(config),
        "head_dim": head_dim(config),
        "vocab_size": config.vocab_size,
    }


def head_dim(config: PretrainedConfig) -> int:
    """Coordinates of an attention head, which not every configuration names."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _key_value_heads(config: PretrainedConfig) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def work(model: PreTrainedModel, batch: int, queries: int, keys: int) -> Work:
    """
    Of a forward of `queries` new tokens a sequence whose last one sees `keys` positions, logits for one of them.

    A follower recomputes s in prefill (2 products of length² a head) and reads it in decode (1). Layers with a window
    see and keep no more than it. Of a mixture's experts each token needs its few, and a batch no more than all.
    """
    config = model.config
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    rest = [p for p in model.parameters() if p is not embedding and p is not head]
    linear = sum(p.numel() for p in rest if p.dim() == 2)
    experts = sum(p.numel() for p in rest if p.dim() == 3)
    active = _active_experts(config, rest)

    roles = _roles(model)
    products = states = 0
    for layer, leader in enumerate(roles):
        follows = leader != layer
        window = _window(config, leader)
        seen = _mean_seen(keys, queries, window)
        products += (1 if follows and queries == 1 else 2) * seen
        states += (1 if follows else 2) * min(keys, window or keys)
    flops = 2 * batch * (queries * (linear + active * experts) + head.numel())
    flops += 2 * batch * queries * config.num_attention_heads * head_dim(config) * products
    size = embedding.dtype.itemsize
    state_bytes = size * states * _key_value_heads(config) * head_dim(config) * batch
    moved = linear + head.numel() + min(1, active * batch * queries) * experts
    return Work(int(flops), size * int(moved) + state_bytes, state_bytes)


def _roles(model: PreTrainedModel) -> list[int]:
    """The leader of every layer; its own index if it follows none."""
    roles = list(range(model.config.num_hidden_layers))
    for block in getattr(model.config, "superblocks", None) or ():
        for layer in block:
            roles[layer] = block[0]
    return roles


def _window(config: PretrainedConfig, layer: int) -> int | None:
    """How many positions a layer sees and keeps; None for all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return getattr(config, "sliding_window", None)
    if kinds[layer] == "chunked_attention":
        return config.attention_chunk_size
    return config.sliding_window if kinds[layer] == "sliding_attention" else None


@cache
def _mean_seen(keys: int, queries: int, window: int | None) -> float:
    """The mean number of keys that one of the queries sees; the last one sees `keys`, or its window."""
    first = keys - queries + 1
    if window is None:
        return (first + keys) / 2
    return sum(min(seen, window) for seen in range(first, keys + 1)) / queries


def _active_experts(config: PretrainedConfig, parameters: list[torch.Tensor]) -> float:
    """Share of a mixture's experts that one token needs; they are stacked in parameters of three dimensions."""
    stacked = next((p for p in parameters if p.dim() == 3), None)
    if stacked is None:
        return 0.0
    chosen = getattr(config, "num_experts_per_tok", None) or config.moe_topk
    return (max(chosen) if isinstance(chosen, list) else chosen) / stacked.shape[0]


@torch.no_grad()
def measured_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a large matrix product and bytes/s of a large copy (read and written together), medians of ten."""
    from .contenders import medians

    size, elements = (8192, 2**30) if device.type == "cuda" else (512, 2**22)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(elements, device=device, dtype=dtype)
    target = torch.empty_like(source)
    runs = {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}
    medians(runs, device, 3)
    times = medians(runs, device, 10)
    return {
        "flops_per_s": 2 * size**3 / times["product"]["median_ms"] * 1e3,
        "bytes_per_s": 2 * source.nbytes / times["copy"]["median_ms"] * 1e3,
    }
