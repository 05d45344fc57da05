"""The whole way from a base model to a reloaded, cheaper checkpoint; any stage alone, every step resumable."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..compensation import NONE
from ..disk import write_failure
from .arguments import STAGES, Arguments
from .distributed import is_main_process, on_main_process
from .journal import Journal
from .publish import publish
from .receipt import Receipt, environment
from .steps import FOLDERS, LoadBase, LoadExamples, Steps
from .summary import STEPS, make_receipt, write_summary

# Planning takes no time; loading the model, or fetching it the first time, may take minutes.
_SHOWN = {"plan": "model loaded, plan made"}


class TwoStageRun:
    """
    Plan, calibrate, stage 1, stage 2, save both artefacts, reload, generate.

    Leaves in `output_dir`: `calibrated/` (W_c from calibration), `adapter/` (W_c after stage 1), `model/` (the
    standalone model after stage 2), `plain/` (the fine-tuned base, if it was asked for), `logs/`, `receipt.json` and
    `journal.json`. Running it again continues after the last finished step or checkpoint. Every process of a
    distributed run runs it; the main process alone calibrates, measures and writes.

    Args:
        arguments: what to do.
        load_base: returns the base model, its tokenizer and its honest name; called whenever a step needs a fresh
            one. Default: what the arguments name.
        load_examples: returns the data for a tokenizer. Default: what the arguments name.
        data_name: what to call the data in the receipt.
        question: how to show the first held-out question there. Default: the text of its prompt.

    Raises:
        ValueError: if the arguments name no model, or an evaluation that cannot be imported.
    """

    def __init__(
        self,
        arguments: Arguments,
        *,
        load_base: LoadBase | None = None,
        load_examples: LoadExamples | None = None,
        data_name: str | None = None,
        question: str | None = None,
    ) -> None:
        self.arguments = arguments
        self.output_dir = Path(arguments.training.output_dir)
        self.data_name = data_name or ", ".join(arguments.data.dataset_name or [])
        self._question = question
        self._steps = Steps(arguments, load_base=load_base, load_examples=load_examples)

    def run(self) -> Receipt:
        """
        Do what has not been done yet, and return the receipt.

        Raises:
            ValueError: if `output_dir` holds a run with other settings or other data, the plan does not fit the
                model, or training diverges.
            FileNotFoundError: if a data file is not there.
            OSError: if `output_dir` cannot be written, or is full.
        """
        settings = {"data": self.data_name, **self.arguments.settings()}
        journal = on_main_process(lambda: Journal(self.output_dir, settings))
        steps = self._steps
        actions: dict[str, Callable[[], dict[str, Any]]] = {"plan": steps.plan, "base": steps.base}
        for stage, start in self._starts(journal).items():
            actions[STEPS[stage]] = partial(getattr(steps, stage), start)
        if self.arguments.recipe.compare_with_base:
            actions[STEPS["plain"]] = steps.plain

        if "base" in journal.results and actions.keys() - journal.results.keys():
            steps.check_data(journal.results["base"])
        for name, action in actions.items():
            self._do(journal, name, action)
        receipt = make_receipt(journal.results, self.data_name, self._question)
        if is_main_process():
            self._finish(journal, receipt)
        return receipt

    def _starts(self, journal: Journal) -> dict[str, str | None]:
        """What each stage to run starts from: a folder of `output_dir`, the given adapter, or None for W_c = 0."""
        starts: dict[str, str | None] = {}
        current = self.arguments.recipe.adapter
        for stage in STAGES:
            done = journal.results.get(STEPS[stage])
            if self.arguments.recipe.runs(stage):
                self._check_start(stage, current, done)
                starts[stage] = current
            if done or stage in starts:
                current = FOLDERS[stage]
        return starts

    def _check_start(self, stage: str, start: str | None, done: dict[str, Any] | None) -> None:
        plan, recipe = self.arguments.plan, self.arguments.recipe
        compensated = plan.method == "uniattn" and plan.compensation != NONE
        if stage == "stage2" and start is None and compensated and not recipe.zero_init:
            raise ValueError(
                f"stages={recipe.stages!r}: stage 2 needs an adapter, and {self.output_dir} has none; give one by "
                "adapter, run stage1 before it, or say zero_init to start from W_c = 0"
            )
        if done is not None and done["start"] != start:
            raise ValueError(
                f"{self.output_dir} holds a {stage} that started from {done['start'] or 'W_c = 0'}, not from "
                f"{start or 'W_c = 0'}; choose another output_dir"
            )

    def _do(self, journal: Journal, name: str, action: Callable[[], dict[str, Any]]) -> None:
        if name not in journal.results:
            started = time.perf_counter()
            with self._explained():
                result = action()
            # The clocks of processes differ, and all of them are to know the same.
            seconds, machine = on_main_process(lambda: (time.perf_counter() - started, environment()))
            processes = self.arguments.training.world_size
            result = {**result, "seconds": seconds, "environment": machine, "processes": processes}
            # A plan alone is no run yet: data that cannot be read leave nothing behind that refuses other settings.
            journal.record(name, result, write=is_main_process() and name != "plan")
        if is_main_process():
            result = journal.results[name]
            loss = f"held-out loss {result['loss']:.4f}, " if result.get("loss") is not None else ""
            tqdm.write(f"{_SHOWN.get(name, name)}: {loss}{result['seconds']:.0f} s")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say what a failure to write means for this run."""
        try:
            yield
        except Exception as error:
            if (failure := write_failure(error)) is None:
                raise
            raise OSError(
                failure.errno,
                f"output_dir={str(self.output_dir)!r}: {failure.strerror} ({error}). Make room, and give the same "
                "command again: it continues after the last checkpoint",
            ) from error

    def _finish(self, journal: Journal, receipt: Receipt) -> None:
        if not self.arguments.recipe.keep_checkpoints:
            self._discard_checkpoints(journal)
        write_summary(self.output_dir, receipt, self.arguments, journal.results)
        if self.arguments.training.push_to_hub:
            publish(self.output_dir, self.arguments)

    def _discard_checkpoints(self, journal: Journal) -> None:
        """Remove what finished stages no longer need."""
        checkpoints = self.output_dir / "checkpoints"
        for stage, name in STEPS.items():
            if name in journal.results:
                shutil.rmtree(checkpoints / stage, ignore_errors=True)
        if checkpoints.is_dir() and not any(checkpoints.iterdir()):
            checkpoints.rmdir()
