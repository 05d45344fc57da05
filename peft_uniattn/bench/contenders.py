"""The base model and the unified one, on every attention back end there is, as contenders of one process."""

from __future__ import annotations

import random
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from peft import get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from ..config import UniAttnConfig
from ..kernels import tiles_kept
from ..standalone import to_standalone
from .shapes import load_model

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_FUSED = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# PyTorch's reasons where the fused kernel that a contender is to use cannot run, up to six warnings a call; what
# counts is the error that follows them.
_REFUSALS = (
    r"(memory efficient|flash attention|cudnn attention) kernel not used because",
    r"(memory efficient|flash|cudnn) attention has been runtime disabled",
    r"for dense input, both fused kernels require query, key and value to have the same num_heads",
)


@dataclass(frozen=True)
class Models:
    """
    What to compare.

    Attributes:
        shape: one of `bench.shapes.SHAPES`, with random weights.
        model: a checkpoint's folder or Hub name instead of a shape.
        superblock_size: layers per Superblock.
        start_layer: first leader; half of the layers by default.
        rank: of the compensation; the full matrix by default.
        dtype: "bfloat16", "float16" or "float32".
        device: "cuda", "cpu" or None for the best that is there.
        seed: of weights and inputs.
        back_ends: names of [`back_ends`] to measure; all by default.
    """

    shape: str = "llama-3.1-8b"
    model: str | None = None
    superblock_size: int = 4
    start_layer: int | None = None
    rank: int | None = None
    dtype: str = "bfloat16"
    device: str | None = None
    seed: int = 0
    back_ends: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        there = tuple(back_ends(self.torch_device))
        if unknown := [name for name in self.back_ends if name not in there]:
            raise ValueError(f"back_ends={unknown} are not on this machine; choose from {', '.join(there)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not measured; use one of {', '.join(DTYPES)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda', but PyTorch finds no GPU here; use device='cpu' and a small shape")

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def measured_back_ends(self) -> tuple[str, ...]:
        """Eager last, since it may need more memory than there is, and the first is the reference."""
        return tuple(sorted(self.back_ends or back_ends(self.torch_device), key=lambda name: name == "eager"))

    @torch.no_grad()
    def build(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """
        The base and the unified model, sharing the weights that both have. The compensation is random beside random
        weights, and zero beside a checkpoint's, whose attention it would otherwise disturb.
        """
        base = load_model(
            self.shape,
            self.model,
            dtype=DTYPES[self.dtype],
            device=self.torch_device,
            attention="sdpa",
            seed=self.seed,
        ).eval()
        config = UniAttnConfig(
            superblock_size=self.superblock_size,
            start_layer=self.start_layer,
            r=self.rank,
            init_weights=self.model is not None,
        )
        adapted = get_peft_model(base, config)
        unified = to_standalone(adapted, share_weights=True).eval()
        return adapted.unload(), unified


def back_ends(device: torch.device) -> dict[str, AbstractContextManager]:
    """Attention back ends by name; those of sdpa as contexts that allow this one only."""
    if device.type != "cuda":
        return {"eager": nullcontext(), "sdpa": nullcontext()}
    return {"eager": nullcontext(), **{name: sdpa_kernel(kind) for name, kind in _FUSED.items()}}


@contextmanager
def running(
    model: PreTrainedModel, back_end: str, kernels: str = "off", skip_mass: float = 0.0, tiles_gib: float = 0.0
) -> Iterator[None]:
    """Let `model` run on one back end of [`back_ends`], a unified one with kernels and stored tiles or without."""
    model.set_attn_implementation(back_end.split()[0])
    if hasattr(model.config, "superblocks"):
        model.config.kernels, model.config.skip_mass = kernels, skip_mass
    with back_ends(model.device)[back_end], tiles_kept(tiles_gib):
        yield


@dataclass
class Contender:
    """
    Attributes:
        name: of model and back end.
        run: one forward, on the device.
        error: its relative error against the reference, or why it does not run.
        peak: bytes of memory at the highest point of one run, on a GPU.
    """

    name: str
    run: Callable[[], torch.Tensor]
    error: float | str | None = None
    peak: int | None = None

    def check(self, references: dict[str, torch.Tensor], gate: float) -> bool:
        """
        Run once, note error and peak memory; False where the result is wrong or there is none.

        Args:
            references: results by model, the first word of the name; the first one that there is becomes it.
            gate: the error that is too large.
        """
        try:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            with _without_refusals():
                result = self.run().double()
            if torch.cuda.is_available():
                self.peak = torch.cuda.max_memory_allocated()
        except (RuntimeError, ValueError, NotImplementedError) as failure:
            self.error = f"{type(failure).__name__}: {str(failure).splitlines()[0][:160]}"
            return False
        expected = references.setdefault(self.name.split()[0], result)
        self.error = ((result - expected).norm() / expected.norm()).item()
        return self.error < gate


@contextmanager
def _without_refusals() -> Iterator[None]:
    with warnings.catch_warnings():
        for refusal in _REFUSALS:
            warnings.filterwarnings("ignore", refusal, UserWarning)
        yield


def medians(
    runs: dict[str, Callable[[], Any]], device: torch.device, rounds: int, load: float = 0.0
) -> dict[str, dict[str, float]]:
    """
    Median and quartiles of the milliseconds of each run; each has run before.

    All take turns, in another order every round: what ran just before heats or cools a GPU, and a contender that
    always followed a slow one was seen to be 5 % faster. Before its turn each runs for `load` seconds: a kernel that a
    GPU has to lower its clock for takes longer inside a model than alone.
    """
    times = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            until = perf_counter() + load
            while perf_counter() < until:
                milliseconds(runs[name], device)
            times[name].append(milliseconds(runs[name], device))
    return {name: _spread(values) for name, values in times.items()}


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values) if len(values) > 1 else values * 3
    return {"median_ms": middle, "lower_quartile_ms": low, "upper_quartile_ms": high}


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """Time of one run, by events of the device where it has them."""
    if device.type != "cuda":
        started = perf_counter()
        run()
        return (perf_counter() - started) * 1e3
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)
