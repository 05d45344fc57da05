"""One row of a table with one seed: train it by the recipe, evaluate what came out, keep the figures."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..evaluation import evaluate, load_for_evaluation
from ..training.arguments import Arguments, parse_arguments
from ..training.journal import write_atomically
from ..training.receipt import environment, measured_kv_bytes_per_token
from ..training.two_stage import TwoStageRun
from .matrix import Cell


@dataclass(frozen=True)
class Evaluation:
    """
    What is asked of every row.

    Attributes:
        tasks: names for `peft_uniattn.evaluation.task_specs`.
        data_dir: local copies of the sets; None takes them from the Hub.
        num_fewshot: examples before each question.
        prompt: "official", or for cloze tasks "paper".
        batch_size: requests per forward pass.
        limit: only the first so many questions of each set; None for all.
    """

    tasks: tuple[str, ...]
    data_dir: str | None = None
    num_fewshot: int = 0
    prompt: str = "official"
    batch_size: int = 32
    limit: int | None = None


@dataclass(frozen=True)
class CellResult:
    """
    Attributes:
        cell: name of the row.
        seed: of data order and everything random.
        accuracy: of each task, in per cent; by length-normalised likelihood for cloze tasks.
        kv_bytes: bytes of KV cache per token, measured.
        losses: held-out loss in nats per completion token, by step; empty for an untrained row.
        steps: optimizer steps by stage; calibration counts as the steps that read as many examples.
        seconds: of training and evaluation together.
        flags: what the recipe was told.
        environment: versions and hardware.
    """

    cell: str
    seed: int
    accuracy: dict[str, float]
    kv_bytes: int
    losses: dict[str, float]
    steps: dict[str, int]
    seconds: float
    flags: list[str]
    environment: dict[str, str]

    @property
    def mean_accuracy(self) -> float:
        return sum(self.accuracy.values()) / len(self.accuracy)

    @classmethod
    def read(cls, path: Path) -> CellResult:
        return cls(**json.loads(path.read_text()))


def run_cell(
    cell: Cell,
    seed: int,
    directory: Path,
    *,
    argv: Sequence[str],
    evaluation: Evaluation,
    stage1_share: float,
    keep_models: bool = False,
) -> CellResult:
    """
    Train and evaluate one row with one seed, or read its result if it is there already.

    Every row gets the same number of optimizer steps, `max_steps` of `argv`: what calibration and stage 1 take of
    them, stage 2 goes without.

    Args:
        cell: the row.
        seed: of data order and everything random.
        directory: where the row's folder is; an interrupted run continues there.
        argv: arguments of the recipe that all rows share.
        evaluation: what is asked.
        stage1_share: share of the steps for stage 1, in rows that have one; 0 leaves it out.
        keep_models: leave adapter and model in the row's folder.

    Raises:
        ValueError: if `max_steps` is not among `argv`, or leaves stage 2 nothing to do.
    """
    folder = directory / f"{cell.name}-{seed}"
    result_file = folder.with_suffix(".json")
    if result_file.exists():
        return CellResult.read(result_file)
    started = time.perf_counter()
    shared = parse_arguments([*argv, "--output_dir", str(folder)])
    steps = steps_of(cell, shared, stage1_share)
    flags = [*argv, *_flags(cell, steps), "--seed", str(seed), "--output_dir", str(folder)]
    losses: dict[str, float] = {}
    if cell.stages:
        receipt = TwoStageRun(parse_arguments(flags)).run()
        losses = {name: loss for name, loss in receipt.losses.items() if loss is not None}
    path = folder / ("plain" if cell.stages == ("none",) else "model") if cell.stages else None
    model, tokenizer = load_for_evaluation(str(path or shared.model.model_name_or_path), dtype=str(shared.model.dtype))
    accuracy = accuracies(evaluate(model, tokenizer, **asdict(evaluation)))
    result = CellResult(
        cell=cell.name,
        seed=seed,
        accuracy=accuracy,
        kv_bytes=measured_kv_bytes_per_token(model),
        losses=losses,
        steps=steps,
        seconds=time.perf_counter() - started,
        flags=[flag for flag in flags if flag != str(folder)],
        environment=environment(),
    )
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(result_file, json.dumps(asdict(result), indent=2) + "\n")
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if not keep_models:
        shutil.rmtree(folder, ignore_errors=True)
    return result


def steps_of(cell: Cell, shared: Arguments, stage1_share: float) -> dict[str, int]:
    """
    How many of `max_steps` optimizer steps each stage of a row gets.

    Raises:
        ValueError: if `max_steps` is missing, or leaves stage 2 nothing to do.
    """
    total, training = shared.training.max_steps, shared.training
    if total < 1:
        raise ValueError(f"max_steps={total}: every row of a table gets the same number of steps; say how many")
    if not cell.stages:
        return {}
    if cell.stages == ("none",):
        return {"plain": total}
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    steps = {}
    if "calibrate" in cell.stages:
        steps["calibrate"] = -(-shared.recipe.calibration_examples // per_step)
    if "stage1" in cell.stages and stage1_share > 0:
        steps["stage1"] = max(1, round(stage1_share * total))
    steps["stage2"] = total - sum(steps.values())
    if steps["stage2"] < 1:
        raise ValueError(f"max_steps={total} is used up before stage 2 ({steps}); use more, or a shorter stage 1")
    return steps


def accuracies(results: dict[str, Any]) -> dict[str, float]:
    """Accuracy of each task in per cent, from lm-eval's results."""
    found = {}
    for task, metrics in results["results"].items():
        metric = "acc_norm,none" if task.endswith("_cloze") else "acc,none"
        if metric in metrics:
            found[task] = 100 * metrics[metric]
    return found


def _flags(cell: Cell, steps: dict[str, int]) -> list[str]:
    stages = [stage for stage in cell.stages if stage != "stage1" or "stage1" in steps]
    flags = [*cell.flags, "--stages", ",".join(stages)]
    if "stage1" in steps:
        flags += ["--stage1_max_steps", str(steps["stage1"])]
    return [*flags, "--max_steps", str(steps.get("stage2", steps.get("plain")))] if steps else []
