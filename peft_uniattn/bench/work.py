"""What a forward pass has to compute and to move, counted from a model's configuration: the bounds on its time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Work:
    """
    Attributes:
        flops: floating-point operations of matrix products.
        bytes: weights and cached states, each moved once.
    """

    flops: int
    bytes: int

    def bound_ms(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The least time in milliseconds at these rates."""
        return 1e3 * max(self.flops / flops_per_s, self.bytes / bytes_per_s)


def followers_of(model: PreTrainedModel) -> int:
    """Layers that store values only; 0 for a base model."""
    return sum(len(block) - 1 for block in getattr(model.config, "superblocks", None) or ())


def work(model: PreTrainedModel, batch: int, queries: int, keys: int) -> Work:
    """
    Of a forward of `queries` new tokens a sequence whose last one sees `keys` positions, logits for one of them.

    A follower recomputes s in prefill (2 products of length² a head) and reads it in decode (1).
    """
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    embedding = model.get_input_embeddings().weight
    weights = [p for p in model.parameters() if p.dim() == 2 and p is not embedding]
    head = model.get_output_embeddings().weight
    linear = sum(p.numel() for p in weights if p is not head)
    followers, layers = followers_of(model), config.num_hidden_layers
    # The mean number of keys that one of the queries sees.
    seen = keys - (queries - 1) / 2
    product = 2 * batch * queries * seen * config.num_attention_heads * head_dim
    products = 2 * layers - (followers if queries == 1 else 0)
    flops = 2 * batch * (queries * linear + head.numel()) + products * product
    size = embedding.dtype.itemsize
    states = (2 * layers - followers) * config.num_key_value_heads * head_dim * keys * batch
    return Work(int(flops), size * int(linear + head.numel() + states))


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
