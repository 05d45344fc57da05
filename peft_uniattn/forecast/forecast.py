"""Figures of a plan: bytes of cache, the bound on a decoded token, what compensation costs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..bench.contenders import DTYPES
from ..bench.work import Work, work
from ..cache import kv_bytes_per_token
from ..config import UniAttnConfig
from ..plan import Plan
from .shapes import base_on_meta, read_config, unified_on_meta


@dataclass(frozen=True)
class Serving:
    """
    How the model is going to be served.

    Attributes:
        batch_size: sequences decoded at a time.
        context: cached tokens of each.
        dtype: of weights and cache, "bfloat16", "float16" or "float32".
        gb_per_s: memory bandwidth, in 10⁹ bytes a second; 3,000 is what a large copy reaches on an H100.
        weight_bits: of quantized weights, scales included; None if they are of `dtype`.
        cache_bits: likewise of a quantized cache.
    """

    batch_size: int = 16
    context: int = 8192
    dtype: str = "bfloat16"
    gb_per_s: float = 3000.0
    weight_bits: float | None = None
    cache_bits: float | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "context", "gb_per_s", "weight_bits", "cache_bits"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:  # which NaN is not either
                raise ValueError(f"{name}={value} must be above 0 and finite")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not counted; use one of {', '.join(DTYPES)}")

    @property
    def bits(self) -> int:
        """Of a number of `dtype`."""
        return 8 * DTYPES[self.dtype].itemsize

    def stored_weights(self, size: int) -> int:
        """Bytes of weights that take `size` in `dtype`."""
        return round(size * (self.weight_bits or self.bits) / self.bits)

    def stored_states(self, size: int) -> int:
        """Bytes of cached states that take `size` in `dtype`."""
        return round(size * (self.cache_bits or self.bits) / self.bits)


@dataclass(frozen=True)
class Step:
    """
    One decoded token of a model, all sequences together.

    Attributes:
        parameters: of the whole model.
        weight_bytes: what it has to read of them; of a mixture's experts those that the batch can need.
        kv_bytes: cached states that it reads.
        flops: of its matrix products.
        bound_ms: the least time at the given bandwidth.
    """

    parameters: int
    weight_bytes: int
    kv_bytes: int
    flops: int
    bound_ms: float

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes


@dataclass(frozen=True)
class Unified(Step):
    """
    The same of a unified model.

    Attributes:
        rank: of the compensation; None if it is full.
        compensation_parameters: its parameters.
        compensation_flops_share: its share of the FLOPs of a decoded token.
        time_ratio: bound on the time of a decoded token, relative to the base.
    """

    rank: int | None
    compensation_parameters: int
    compensation_flops_share: float
    time_ratio: float


@dataclass(frozen=True)
class Forecast:
    """
    Attributes:
        model: as the user named it.
        plan: the Superblocks.
        serving: how the model is going to be served.
        kv_bytes_per_token: of the base, as long as no window lets go of tokens.
        kv_bytes_per_token_unified: of the unified model.
        removed_parameters: of the followers' query and key projections.
        base: a decoded token of the base.
        unified: with full compensation, and with low rank.
    """

    model: str
    plan: Plan
    serving: Serving
    kv_bytes_per_token: int
    kv_bytes_per_token_unified: int
    removed_parameters: int
    base: Step
    unified: tuple[Unified, Unified]

    @property
    def kv_ratio(self) -> float:
        """Cached bytes at the context that was asked for, relative to the base."""
        return self.unified[0].kv_bytes / self.base.kv_bytes

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return asdict(self) | {"kv_ratio": self.kv_ratio}


def forecast(model: str, config: UniAttnConfig, serving: Serving, *, rank: int = 64) -> Forecast:
    """
    Count what `config` would make of a model; no weights are loaded.

    Args:
        model: a folder with a `config.json`, a name on the Hub, or one of `bench.shapes.SHAPES`.
        config: the plan; its own rank is not looked at.
        serving: how the model is going to be served.
        rank: of the low-rank compensation that is compared with the full one.

    Raises:
        ValueError: if the model is not supported, the plan does not fit it, or the rank is too large.
    """
    text_config = read_config(model)
    plan = config.make_plan(text_config.num_hidden_layers, getattr(text_config, "layer_types", None))
    if not 1 <= rank <= text_config.hidden_size:
        raise ValueError(f"rank={rank} must be from 1 to the model's hidden size of {text_config.hidden_size}")
    dtype = DTYPES[serving.dtype]
    base = base_on_meta(text_config, dtype)
    step = Step(**_step(base, _work(base, serving), serving))
    bare = _unified(text_config, plan, config, None, dtype)
    removed = _parameters(base) - (_parameters(bare) - _compensation(bare))
    low = _unified(text_config, plan, config, rank, dtype)
    return Forecast(
        model=model,
        plan=plan,
        serving=serving,
        kv_bytes_per_token=serving.stored_states(kv_bytes_per_token(text_config, 0, dtype)),
        kv_bytes_per_token_unified=serving.stored_states(kv_bytes_per_token(text_config, len(plan.followers), dtype)),
        removed_parameters=removed,
        base=step,
        unified=tuple(_unified_step(one, one_rank, step, serving) for one, one_rank in ((bare, None), (low, rank))),
    )


def _unified(
    text_config: PretrainedConfig, plan: Plan, config: UniAttnConfig, rank: int | None, dtype: torch.dtype
) -> PreTrainedModel:
    return unified_on_meta(text_config, plan, follower_mask=config.follower_mask, rank=rank, dtype=dtype)


def _work(model: PreTrainedModel, serving: Serving) -> Work:
    return work(model, serving.batch_size, 1, serving.context)


def _step(model: PreTrainedModel, one: Work, serving: Serving) -> dict[str, Any]:
    weights = serving.stored_weights(one.bytes - one.state_bytes)
    states = serving.stored_states(one.state_bytes)
    return {
        "parameters": _parameters(model),
        "weight_bytes": weights,
        "kv_bytes": states,
        "flops": one.flops,
        "bound_ms": (weights + states) / serving.gb_per_s / 1e6,
    }


def _unified_step(model: PreTrainedModel, rank: int | None, base: Step, serving: Serving) -> Unified:
    one, compensation = _work(model, serving), _compensation(model)
    step = _step(model, one, serving)
    return Unified(
        **step,
        rank=rank,
        compensation_parameters=compensation,
        compensation_flops_share=2 * compensation * serving.batch_size / one.flops,
        time_ratio=(step["weight_bytes"] + step["kv_bytes"]) / base.bytes,
    )


def _parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _compensation(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".compensation" in name)
