"""Rows of a table with one seed: train by the recipe, evaluate what came out, keep the figures."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils.memory import clear_device_cache

from ..evaluation import evaluate, load_for_evaluation
from ..training.arguments import Arguments, parse_arguments
from ..training.journal import write_atomically
from ..training.receipt import environment
from ..training.two_stage import TwoStageRun
from .curves import Curves, read_curves
from .held import measure_kv_bytes
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

    @property
    def asked(self) -> dict[str, Any]:
        """What decides about accuracy, as JSON types."""
        return {
            "tasks": list(self.tasks),
            "num_fewshot": self.num_fewshot,
            "prompt": self.prompt,
            "limit": self.limit,
        }


@dataclass(frozen=True)
class CellResult:
    """
    Attributes:
        cell: name of the row.
        seed: of data order and everything random.
        accuracy: of each task, in per cent; by length-normalised likelihood for cloze tasks that have it.
        kv_bytes: bytes of KV cache per token, measured after `kv_tokens` of them. H2O's scores and positions, up to 8
            bytes a slot, are not among them.
        losses: held-out loss in nats per completion token, by step; empty for an untrained row.
        steps: optimizer steps by stage; calibration counts as the steps that read as many examples.
        seconds: of training and evaluation together.
        flags: what the recipe was told.
        config: what the file behind `--config` among them said; empty without one, and in files of earlier releases.
        environment: versions and hardware.
        kv_tokens: how many tokens the cache had seen.
        h2o_budget: share of them that H2O kept; None: there was no H2O.
        curves: losses on the way, by series, see `read_curves`; empty where there are none.
        ttft_ms: milliseconds from a prompt to the logits of its first new token, median; None: not measured.
        ttft_base_ms: the unmodified base's, measured in turns with it.
        ttft_conditions: prompts, their tokens, data type and timed rounds.
        evaluation: `Evaluation.asked`; empty in files of earlier releases.
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
    kv_tokens: int = 64
    h2o_budget: float | None = None
    curves: Curves = field(default_factory=dict)
    ttft_ms: float | None = None
    ttft_base_ms: float | None = None
    ttft_conditions: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def mean_accuracy(self) -> float:
        return sum(self.accuracy.values()) / len(self.accuracy)

    @classmethod
    def read(cls, path: Path) -> CellResult:
        """A result from its file, also from one of an earlier release, which says less."""
        return cls(**json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(self)) + "\n")


def run_cells(
    cells: Sequence[Cell],
    seed: int,
    directory: Path,
    *,
    argv: Sequence[str],
    evaluation: Evaluation,
    stage1_share: float,
    keep_models: bool = False,
) -> list[CellResult]:
    """
    Train rows that are trained alike once, with one seed, and evaluate each, or read the results that are there.

    Every row gets the same number of optimizer steps, `max_steps` of `argv`: what calibration and stage 1 take of
    them, stage 2 goes without.

    Args:
        cells: rows of equal [`training_of`].
        seed: of data order and everything random.
        directory: where the folder of the first row is; an interrupted run continues there.
        argv: arguments of the recipe that all rows share.
        evaluation: what is asked.
        stage1_share: share of the steps for stage 1, in rows that have one; 0 leaves it out.
        keep_models: leave adapter and model in the folder.

    Raises:
        ValueError: if `max_steps` is not among `argv`, or leaves stage 2 nothing to do.
    """
    files = [result_file(directory, cell.name, seed) for cell in cells]
    folder = directory / f"{cells[0].name}-{seed}"
    if not is_done(directory, cells, seed):
        trained = _train(cells[0], seed, folder, argv=argv, stage1_share=stage1_share)
        clear_device_cache(garbage_collection=True)  # the optimizer's memory, for rows beside this one
        for cell, file in zip(cells, files, strict=True):
            if not file.exists():
                _evaluate(cell, seed, trained, evaluation).write(file)
    if not keep_models:  # also those of a call that was killed before it removed them
        shutil.rmtree(folder, ignore_errors=True)
    return [CellResult.read(file) for file in files]


def result_file(directory: Path, name: str, seed: int) -> Path:
    """Where the result of a row with one seed is kept."""
    return directory / f"{name}-{seed}.json"


def is_done(directory: Path, cells: Sequence[Cell], seed: int) -> bool:
    """Whether the results of rows with one seed are there."""
    return all(result_file(directory, cell.name, seed).exists() for cell in cells)


@dataclass(frozen=True)
class _Trained:
    """A model on disk, and what its training leaves to say."""

    path: str
    dtype: str
    flags: list[str]
    config: dict[str, Any]
    steps: dict[str, int]
    losses: dict[str, float]
    curves: Curves
    seconds: float


def _train(cell: Cell, seed: int, folder: Path, *, argv: Sequence[str], stage1_share: float) -> _Trained:
    started = time.perf_counter()
    shared = parse_arguments([*argv, "--output_dir", str(folder)])
    steps = steps_of(cell, shared, stage1_share)
    flags = [*argv, *flags_of(cell, steps), "--seed", str(seed), "--output_dir", str(folder)]
    path, losses, curves = str(shared.model.model_name_or_path), {}, {}
    if cell.stages:
        receipt = TwoStageRun(parse_arguments(flags)).run()
        path = str(folder / ("plain" if cell.stages == ("none",) else "model"))
        losses = {name: loss for name, loss in receipt.losses.items() if loss is not None}
        curves = read_curves(folder / "journal.json", steps)
    return _Trained(
        path=path,
        dtype=str(shared.model.dtype),
        flags=[flag for flag in flags if flag != str(folder)],
        config=read_config(argv),
        steps=steps,
        losses=losses,
        curves=curves,
        seconds=time.perf_counter() - started,
    )


def _evaluate(cell: Cell, seed: int, trained: _Trained, evaluation: Evaluation) -> CellResult:
    started = time.perf_counter()
    model, tokenizer = load_for_evaluation(trained.path, dtype=trained.dtype)
    results = evaluate(model, tokenizer, **asdict(evaluation), h2o_budget=cell.h2o_budget)
    kv_bytes, kv_tokens = measure_kv_bytes(model, h2o_budget=cell.h2o_budget)
    del model
    clear_device_cache()
    return CellResult(
        cell=cell.name,
        seed=seed,
        accuracy=accuracies(results),
        kv_bytes=kv_bytes,
        losses=trained.losses,
        steps=trained.steps,
        seconds=trained.seconds + time.perf_counter() - started,
        flags=trained.flags,
        config=trained.config,
        environment=environment(),
        kv_tokens=kv_tokens,
        h2o_budget=cell.h2o_budget,
        curves=trained.curves,
        evaluation=evaluation.asked,
    )


def read_config(argv: Sequence[str]) -> dict[str, Any]:
    """What the file behind `--config` says; empty without one."""
    if "--config" not in argv:
        return {}
    return yaml.safe_load(Path(argv[argv.index("--config") + 1]).read_text()) or {}


def training_of(cell: Cell, shared: Arguments, stage1_share: float) -> tuple[Any, ...]:
    """What decides how a row is trained; rows in which it is equal need training only once."""
    steps = steps_of(cell, shared, stage1_share)
    return cell.flags, tuple(steps.items())


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
    share = stage1_share or cell.stage1_share
    if "stage1" in cell.stages and share:
        steps["stage1"] = max(1, round(share * total))
    steps["stage2"] = total - sum(steps.values())
    if steps["stage2"] < 1:
        raise ValueError(f"max_steps={total} is used up before stage 2 ({steps}); use more, or a shorter stage 1")
    return steps


def accuracies(results: dict[str, Any]) -> dict[str, float]:
    """Accuracy of each task in per cent, from lm-eval's results."""
    found = {}
    groups = results.get("groups", {})  # such as mmlu, whose members are there as well
    for task, metrics in results["results"].items():
        if task in groups:
            continue
        normalised = task.endswith("_cloze") and "acc_norm,none" in metrics
        metric = "acc_norm,none" if normalised else "acc,none"
        if metric in metrics:
            found[task] = 100 * metrics[metric]
    return found


def flags_of(cell: Cell, steps: dict[str, int]) -> list[str]:
    """What `peft-uniattn train` is told of a row, given the steps of its stages."""
    stages = [stage for stage in cell.stages if stage != "stage1" or "stage1" in steps]
    flags = [*cell.flags, "--stages", ",".join(stages)]
    if "stage1" in steps:
        flags += ["--stage1_max_steps", str(steps["stage1"])]
    return [*flags, "--max_steps", str(steps.get("stage2", steps.get("plain")))] if steps else []
