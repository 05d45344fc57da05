"""
Cost of training: both stages against LoRA on all linear layers and full fine-tuning of the unmodified model.

One process, one batch. The contenders take turns: each is built anew, warmed up and timed alone on the device, so that
its peak memory is its own, and the whole series is repeated in alternating order. A contender whose loss is not finite
or does not fall on the batch that it trains on gets no time.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..config import UniAttnConfig
from ..plan import check_superblock_size
from ..standalone import to_standalone
from .conditions import conditions
from .shapes import load_model

FULL, STAGE_2, LORA, STAGE_1 = "full fine-tuning", "stage 2", "LoRA on all linear layers", "stage 1"
# Contender, what it is compared with, the measured figure, and the largest ratio that the project aims at.
GOALS = (
    (STAGE_1, LORA, "step_seconds", 1.0),
    (STAGE_2, FULL, "step_seconds", 1.0),
    (STAGE_2, FULL, "peak_memory_bytes", 1.02),
)
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class TrainBenchmark:
    """
    What to measure.

    Attributes:
        shape: one of `bench.shapes.SHAPES`, with random weights.
        model: a checkpoint's folder or Hub name instead of a shape.
        batch_size: sequences per step.
        length: tokens per sequence.
        superblock_size: layers per Superblock, in the top half of the layers.
        rank: rank of the low-rank compensation that is measured beside the full one.
        lora_rank: rank of LoRA.
        dtype: of the weights and of autocast; adapters keep float32 weights, PEFT's default.
        attention: attention implementation of all contenders.
        gradient_checkpointing: recompute activations in the backward pass, non-reentrant.
        rounds: how often every contender is built and timed.
        warmup: steps before the timed ones, per round.
        steps: timed steps per round.
        learning_rate: of AdamW.
        chunk: positions whose logits exist at a time.
        device: "cuda", "cpu" or None for the best that is there.
        seed: of weights and batch.
    """

    shape: str = "llama-3.2-1b"
    model: str | None = None
    batch_size: int = 8
    length: int = 1024
    superblock_size: int = 4
    rank: int = 64
    lora_rank: int = 16
    dtype: str = "bfloat16"
    attention: str = "sdpa"
    gradient_checkpointing: bool = False
    rounds: int = 3
    warmup: int = 5
    steps: int = 20
    learning_rate: float = 1e-4
    chunk: int = 2048
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not measured; use one of {', '.join(_DTYPES)}")
        check_superblock_size(self.superblock_size)
        for name in ("batch_size", "rank", "lora_rank", "rounds", "warmup", "steps", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.length < 2:
            raise ValueError(f"length={self.length} has no next token to predict; use 2 or more")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda', but PyTorch finds no GPU here; use device='cpu' and a small shape")

    def run(self) -> dict[str, Any]:
        """Measure everything; returns plain JSON types."""
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        contenders = self._contenders()
        turns = {name: [] for name in contenders}
        with tqdm(total=self.rounds * len(contenders), desc="measuring", unit="turn") as bar:
            for round_ in range(self.rounds):
                for name in list(contenders)[:: 1 if round_ % 2 == 0 else -1]:
                    bar.set_postfix_str(name)
                    turns[name].append(self._turn(contenders[name], device))
                    bar.update()
        rows = {name: self._summary(turns[name]) for name in contenders}
        return {
            "benchmark": "train",
            "conditions": conditions(device),
            "settings": asdict(self),
            "contenders": rows,
            "goals": [_goal(rows, *goal) for goal in GOALS],
        }

    def _contenders(self) -> dict[str, Callable[[PreTrainedModel], nn.Module]]:
        """How each contender is made of the unmodified model; nothing starts at zero, which GPUs multiply faster."""

        def uniattn(model: PreTrainedModel, r: int | None = None) -> PeftModel:
            config = {"superblock_size": self.superblock_size, "init_weights": False, "task_type": "CAUSAL_LM"}
            return get_peft_model(model, UniAttnConfig(r=r, **config))

        def lora(model: PreTrainedModel) -> PeftModel:
            config = {"target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
            return get_peft_model(model, LoraConfig(r=self.lora_rank, **config))

        return {
            FULL: lambda model: model,
            STAGE_2: lambda model: to_standalone(uniattn(model), share_weights=True),
            LORA: lora,
            STAGE_1: uniattn,
            f"{STAGE_1}, rank {self.rank}": lambda model: uniattn(model, self.rank),
        }

    def _turn(self, build: Callable[[PreTrainedModel], nn.Module], device: torch.device) -> dict[str, Any]:
        """Build a contender, train it for some steps, and take it away again."""
        model = build(self._base(device))
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trainable, lr=self.learning_rate, weight_decay=0.0, fused=True if device.type == "cuda" else None
        )
        generator = torch.Generator().manual_seed(self.seed)
        vocabulary = _base_of(model).config.vocab_size
        ids = torch.randint(vocabulary, (self.batch_size, self.length), generator=generator).to(device)
        warmup = [self._step(model, optimizer, ids) for _ in range(self.warmup)]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        timed = [self._step(model, optimizer, ids) for _ in range(self.steps)]
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        result = {
            "seconds": [seconds for seconds, _ in timed],
            "peak_memory_bytes": peak,
            "losses": [warmup[0][1], timed[-1][1]],
            "trainable_parameters": sum(parameter.numel() for parameter in trainable),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        del model, optimizer, trainable
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return result

    def _base(self, device: torch.device) -> PreTrainedModel:
        dtype = _DTYPES[self.dtype]
        return load_model(self.shape, self.model, dtype=dtype, device=device, attention=self.attention, seed=self.seed)

    def _step(self, model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> tuple[float, float]:
        """Seconds and loss of one optimizer step."""
        dtype = _DTYPES[self.dtype]
        _synchronize(ids.device)
        started = time.perf_counter()
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = next_token_loss(model, ids, self.chunk)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _synchronize(ids.device)
        return time.perf_counter() - started, loss.item()

    def _summary(self, turns: list[dict[str, Any]]) -> dict[str, Any]:
        """One contender's row; without times if its training did not work."""
        losses = [turn["losses"] for turn in turns]
        works = all(math.isfinite(first) and last < first for first, last in losses)
        seconds = statistics.median(second for turn in turns for second in turn["seconds"]) if works else None
        peaks = [turn["peak_memory_bytes"] for turn in turns if turn["peak_memory_bytes"] is not None]
        return {
            "parameters": turns[0]["parameters"],
            "trainable_parameters": turns[0]["trainable_parameters"],
            "step_seconds": seconds,
            "step_seconds_by_round": [statistics.median(turn["seconds"]) for turn in turns] if works else None,
            "tokens_per_second": self.batch_size * self.length / seconds if works else None,
            "peak_memory_bytes": max(peaks) if works and peaks else None,
            "losses_by_round": losses,
        }


def next_token_loss(model: nn.Module, ids: torch.Tensor, chunk: int) -> torch.Tensor:
    """
    Mean next-token cross-entropy with the logits of `chunk` positions at a time.

    As TRL's trainers compute it: logits of all positions at once would be most of the memory and hide the rest.

    Args:
        model: a causal language model, with a PEFT adapter or not.
        ids: (batch, length).
        chunk: positions.
    """
    base = _base_of(model)
    hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()
    head = base.get_output_embeddings()

    def summed(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")

    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return sum(checkpoint(summed, *part, use_reentrant=False) for part in parts) / targets.numel()


def _base_of(model: nn.Module) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _goal(rows: dict[str, dict], contender: str, reference: str, figure: str, limit: float) -> dict[str, Any]:
    value, against = rows[contender][figure], rows[reference][figure]
    ratio = value / against if value is not None and against is not None else None
    met = None if ratio is None else ratio <= limit
    return {
        "contender": contender,
        "reference": reference,
        "figure": figure,
        "ratio": ratio,
        "limit": limit,
        "met": met,
    }
