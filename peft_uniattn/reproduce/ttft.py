"""Time to the first token of rows, measured alone on the device: each row in turns with the base."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..bench.contenders import medians
from ..compensation import NONE
from ..config import UniAttnConfig
from ..eviction import H2OCache, h2o
from ..standalone import to_standalone
from ..training.arguments import Arguments, parse_arguments
from ..training.loading import load_model
from ..training.receipt import environment
from .cell import flags_of, steps_of
from .matrix import Cell


@dataclass(frozen=True)
class Prompts:
    """
    What rows are timed on.

    Attributes:
        number: prompts at a time; default 16 on a GPU, since with fewer a small model's time is the CPU's; else 1.
        tokens: of each prompt; default 2,048 on a GPU, else 512. 0 times nothing.
        rounds: timed forwards of each row, and of the base beside it.

    Raises:
        ValueError: if there is nothing to time.
    """

    number: int | None = None
    tokens: int | None = None
    rounds: int = 15

    def __post_init__(self) -> None:
        if (self.number is not None and self.number < 1) or (self.tokens is not None and self.tokens < 0):
            raise ValueError(f"number={self.number} must be 1 or more, tokens={self.tokens} 0 (none) or more")
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds} must be 1 or more")

    def conditions(self, arguments: Arguments) -> dict[str, Any]:
        """What the times hold for, as `CellResult.ttft_conditions`."""
        gpu = arguments.training.device.type == "cuda"
        return {
            "prompts": self.number or (16 if gpu else 1),
            "tokens": (2048 if gpu else 512) if self.tokens is None else self.tokens,
            "dtype": _served_dtype(arguments),
            "rounds": self.rounds,
            "device": environment()["device"],
        }


def measure_ttft(
    cells: Sequence[Cell], argv: Sequence[str], shared: Arguments, stage1_share: float, conditions: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """
    What `CellResult` says of times, by the names of `cells`.

    Times do not depend on what weights have been trained to, so they are those of the base's own with the change of
    the row and, if it has one, a random compensation. Rows of one architecture are timed once.

    Args:
        cells: rows.
        argv: arguments of the recipe that all rows share.
        shared: the same, parsed.
        stage1_share: as the rows were trained with.
        conditions: of [`Prompts`].
    """
    device, dtype = shared.training.device, getattr(torch, conditions["dtype"])
    base = load_model(shared.model, shared.training).to(device, dtype).eval()
    generator = torch.Generator().manual_seed(0)
    size = (conditions["prompts"], conditions["tokens"])
    ids = torch.randint(base.config.vocab_size, size, generator=generator).to(device)
    by_architecture: dict[str, dict[str, Any]] = {}
    times = {}
    for cell in tqdm(cells, desc="time to first token", unit="row", leave=False):
        config = _config_of(cell, argv, shared, stage1_share)
        key = f"{config} {cell.h2o_budget}"
        if key not in by_architecture:
            by_architecture[key] = _in_turns(base, config, ids, cell.h2o_budget, conditions["rounds"])
        times[cell.name] = {**by_architecture[key], "ttft_conditions": conditions}
    return times


def _config_of(cell: Cell, argv: Sequence[str], shared: Arguments, stage1_share: float) -> Any:
    """The row's PEFT configuration; None where the model is the unmodified base."""
    if cell.stages in ((), ("none",)):
        return None
    flags = flags_of(cell, steps_of(cell, shared, stage1_share))
    arguments = parse_arguments([*argv, *flags, "--output_dir", str(shared.training.output_dir)])
    config = arguments.plan.peft_config()
    if isinstance(config, UniAttnConfig) and config.compensation != NONE:
        # Zeros would be faster: they take less power, and so leave a GPU at a higher clock.
        config = dataclasses.replace(config, init_weights=False)
    return config


def _in_turns(
    base: PreTrainedModel, config: Any, ids: torch.Tensor, h2o_budget: float | None, rounds: int
) -> dict[str, float]:
    model = base
    if config is not None:
        adapted = get_peft_model(base, config)
        model = to_standalone(adapted, share_weights=True).eval()
        adapted.unload()
    runs = {"base": _forward(base, ids, None), "row": _forward(model, ids, h2o_budget)}
    with torch.inference_mode():
        for run in (*runs.values(), *runs.values()):
            run()
        found = medians(runs, ids.device, rounds)
    return {"ttft_ms": found["row"]["median_ms"], "ttft_base_ms": found["base"]["median_ms"]}


def _forward(model: PreTrainedModel, ids: torch.Tensor, h2o_budget: float | None) -> Callable[[], Any]:
    if h2o_budget is None:
        return lambda: model(ids, use_cache=True, logits_to_keep=1)

    def compressed() -> Any:
        with h2o(model):
            return model(ids, past_key_values=H2OCache(h2o_budget), use_cache=True, logits_to_keep=1)

    return compressed


def _served_dtype(arguments: Arguments) -> str:
    """The data type that a model trained like this is served in."""
    if arguments.training.bf16:
        return "bfloat16"
    if arguments.training.fp16:
        return "float16"
    return arguments.model.dtype if arguments.model.dtype in ("bfloat16", "float16") else "float32"
