"""KV cache: bytes per token of base and unified model as the allocator sees them, against the count from the shape."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from ..cache import kv_bytes, kv_bytes_per_token
from ..config import UniAttnConfig
from ..standalone import to_standalone
from .conditions import conditions
from .contenders import DTYPES, Models
from .shapes import shape_config
from .work import followers_of


@dataclass(frozen=True)
class MemoryBenchmark:
    """
    What to measure.

    A shape is measured with its layers, key/value heads and head dimension, but narrow elsewhere: the cache does not
    depend on the rest, and so that of a large model can be measured anywhere.

    Attributes:
        models: base and unified model.
        length: tokens of the prompt.
    """

    models: Models = field(default_factory=Models)
    length: int = 1024

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length={self.length} must be 1 or more")

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """Measure; returns plain JSON types."""
        base, unified = self.models.build() if self.models.model else self._narrow()
        rows = {name: self._measure(model) for name, model in (("base", base), ("unified", unified))}
        return {
            "benchmark": "memory",
            "conditions": conditions(self.models.torch_device),
            "settings": asdict(self),
            "superblocks": unified.config.superblocks,
            "contenders": rows,
            "ratio": rows["unified"]["cache_bytes_per_token"] / rows["base"]["cache_bytes_per_token"],
        }

    def _narrow(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        config = shape_config(self.models.shape)
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        config.hidden_size, config.intermediate_size, config.vocab_size = 64, 64, 256
        config.num_attention_heads = config.num_key_value_heads
        dtype = DTYPES[self.models.dtype]
        with self.models.torch_device:
            base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
        plan = {"superblock_size": self.models.superblock_size, "start_layer": self.models.start_layer}
        adapted = get_peft_model(base, UniAttnConfig(**plan))
        unified = to_standalone(adapted, share_weights=True).eval()
        return adapted.unload(), unified

    def _measure(self, model: PreTrainedModel) -> dict[str, Any]:
        ids = torch.arange(self.length, device=model.device).unsqueeze(0) % model.config.vocab_size
        cache = DynamicCache(config=model.config)
        on_gpu = model.device.type == "cuda"
        model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)  # what first use allocates
        before = torch.cuda.memory_allocated() if on_gpu else 0
        model(ids, past_key_values=cache, logits_to_keep=1)
        row = {
            "followers": followers_of(model),
            "cache_bytes_per_token": kv_bytes(cache) / self.length,
            "counted_bytes_per_token": kv_bytes_per_token(model.config, followers_of(model), model.dtype),
        }
        if on_gpu:
            row["allocated_bytes_per_token"] = (torch.cuda.memory_allocated() - before) / self.length
        return row
