"""The steps of the two-stage run. Each starts from files, so that it can run in another process than the last."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..calibration import calibrate
from ..inspection import find_adapter
from ..standalone import to_standalone
from .arguments import Arguments
from .data import LoadedData, batches, check_files, load_data
from .distributed import is_main_process, on_main_process
from .evaluation import find_evaluation
from .journal import save_directory_atomically
from .loading import check_model, load_model, load_tokenizer
from .measure import Measurements, fingerprint
from .trainer import check_data, full_state, train

LoadBase = Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase, str]]
LoadExamples = Callable[[PreTrainedTokenizerBase], LoadedData]
FOLDERS = {"calibrate": "calibrated", "stage1": "adapter", "stage2": "model"}


class Steps:
    """
    What [`TwoStageRun`] does, step by step; every method returns its results as JSON types, in every process.

    Args:
        arguments: what to do.
        load_base: see [`TwoStageRun`].
        load_examples: see [`TwoStageRun`].

    Raises:
        ValueError: if the arguments name no model, or an evaluation that cannot be imported.
    """

    def __init__(
        self, arguments: Arguments, *, load_base: LoadBase | None = None, load_examples: LoadExamples | None = None
    ) -> None:
        if load_base is None:
            check_model(arguments.model)
        self.arguments = arguments
        self.output_dir = Path(arguments.training.output_dir)
        self._load_base = load_base or self._named_base
        self._has_named_base = load_base is None
        self._load_examples = load_examples or self._named_examples
        self._has_named_data = load_examples is None
        name = arguments.recipe.evaluation
        self._evaluation = None if name is None else find_evaluation(name)

    def plan(self) -> dict[str, Any]:
        """Wrap once, so that files that are missing and a plan that does not fit are refused before data are read."""
        if self._has_named_data:
            check_files(self.arguments.data)

        def planned() -> dict[str, Any]:
            model, _, name = self._load_base()
            model = self._adapted(model, self.arguments.recipe.adapter)
            plan = find_adapter(model).plan
            weights = [weight for key, weight in model.named_parameters() if ".uniattn_" in key]
            return {
                "name": name,
                "superblocks": [list(block) for block in plan.superblocks],
                "num_layers": plan.num_layers,
                "adapter_parameters": sum(weight.numel() for weight in weights),
            }

        return on_main_process(planned)

    def base(self) -> dict[str, Any]:
        """Measure the unmodified model."""
        data, measure = self.data, self._measurements
        report = data.report if isinstance(data.report, dict) else data.report.to_dict()

        def measured() -> dict[str, Any]:
            found = measure.of(self._placed(self._load_base()[0]), "base")
            return {"data": report, "fingerprint": fingerprint(data), "prompt": measure.prompt, **found}

        return on_main_process(measured)

    def calibrate(self, start: str | None) -> dict[str, Any]:
        """Compute W_c from data, into `calibrated/`."""
        data, measure, tokenizer = self.data, self._measurements, self._tokenizer
        recipe, training = self.arguments.recipe, self.arguments.training

        def calibrated() -> dict[str, Any]:
            set_seed(training.seed)
            model = self._placed(self._adapted(self._load_base()[0], start))
            loss_before = measure.loss(model, "no compensation")
            examples = Dataset.from_list(list(data.train.take(recipe.calibration_examples)))
            # A list has a length, by which the progress bar knows the time left.
            size, pad = training.per_device_eval_batch_size, tokenizer.pad_token_id
            loader = list(batches(examples, size, pad, model.device))
            spill = self._emptied("calibration.tmp")
            report = calibrate(
                model, loader, recipe.calibration_method, ridge=recipe.calibration_ridge, spill_directory=spill
            )
            shutil.rmtree(spill)
            save_directory_atomically(self.output_dir / "calibrated", model.save_pretrained)
            measured = measure.of(model, "calibrated", answer=False)
            return {"loss_before": loss_before, "report": report.to_dict(), **self._size("calibrated"), **measured}

        return {"start": start, **on_main_process(calibrated)}

    def stage1(self, start: str | None) -> dict[str, Any]:
        """Train W_c alone, into `adapter/`."""
        measure, answer = self._measurements, not self.arguments.recipe.runs("stage2")
        set_seed(self.arguments.training.seed)
        log, _ = self._train(self._adapted(self._load_base()[0], start), "stage1", "adapter")

        def measured() -> dict[str, Any]:
            model = self._placed(PeftModel.from_pretrained(self._load_base()[0], self.output_dir / "adapter"))
            return {**self._size("adapter"), **measure.of(model, "after stage 1", answer=answer)}

        return {"start": start, "log": log, **on_main_process(measured)}

    def stage2(self, start: str | None) -> dict[str, Any]:
        """Train everything, into `model/`, and reload it."""
        measure = self._measurements
        set_seed(self.arguments.training.seed)
        unified = to_standalone(self._adapted(self._load_base()[0], start), share_weights=True)
        log, logits = self._train(unified, "stage2", "model")

        def measured() -> dict[str, Any]:
            model = self._placed(AutoModelForCausalLM.from_pretrained(self.output_dir / "model", dtype="auto"))
            found = measure.of(model, "after stage 2")
            difference = None if logits is None else (self._logits(model) - logits).abs().max().item()
            return {"reload_difference": difference, **found}

        return {"start": start, "log": log, **on_main_process(measured)}

    def plain(self) -> dict[str, Any]:
        """Fine-tune the unmodified model with stage 2's settings, into `plain/`."""
        measure = self._measurements
        set_seed(self.arguments.training.seed)
        log, _ = self._train(self._load_base()[0], "plain", "plain")

        def measured() -> dict[str, Any]:
            model = self._placed(AutoModelForCausalLM.from_pretrained(self.output_dir / "plain", dtype="auto"))
            return measure.of(model, "fine-tuned base", answer=False)

        return {"log": log, **on_main_process(measured)}

    def check_data(self, base: dict[str, Any]) -> None:
        """
        Refuse to continue on other data than the run began with, by the results of the step `base`.

        Raises:
            ValueError: if the training tokens or their order have changed.
        """
        data = self.data
        if on_main_process(lambda: fingerprint(data)) != base["fingerprint"]:
            raise ValueError(
                f"the training data of {self.output_dir} have changed since the run began; bring the old ones back to "
                "continue, or choose another output_dir"
            )

    # What they share.

    @cached_property
    def data(self) -> LoadedData:
        """Training and held-out examples; to be read in every process, because one may wait for another."""
        data = self._load_examples(self._tokenizer)
        check_data(self.arguments, data)
        return data

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self._has_named_base:
            return load_tokenizer(self.arguments.model, self.arguments.training)
        return self._load_base()[1]

    @cached_property
    def _measurements(self) -> Measurements:
        return Measurements(
            self.data,
            self._tokenizer,
            examples=self.arguments.recipe.held_out_examples,
            batch_size=self.arguments.training.per_device_eval_batch_size,
            evaluation=self._evaluation,
        )

    def _named_base(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
        model, training = self.arguments.model, self.arguments.training
        tokenizer = load_tokenizer(model, training)  # before weights are read for nothing
        return load_model(model, training), tokenizer, str(model.model_name_or_path)

    def _named_examples(self, tokenizer: PreTrainedTokenizerBase) -> LoadedData:
        training = self.arguments.training
        return load_data(
            self.arguments.data,
            tokenizer,
            max_length=training.max_length or sys.maxsize,
            seed=training.seed,
            num_proc=training.dataset_num_proc,
        )

    def _adapted(self, model: PreTrainedModel, start: str | None) -> PeftModel:
        """`model` with the adapter that a stage starts from: of `output_dir`, the given one, or with W_c = 0."""
        if start is None:
            revision = self.arguments.model.model_revision
            return get_peft_model(model, self.arguments.plan.peft_config(), revision=revision)
        own = start in FOLDERS.values()
        return PeftModel.from_pretrained(model, self.output_dir / start if own else start, is_trainable=True)

    def _placed(self, model: nn.Module) -> nn.Module:
        """`model` on this process's device, unless it was loaded onto devices."""
        return model if getattr(model, "hf_device_map", None) else model.to(self.arguments.training.device)

    def _train(self, model: nn.Module, stage: str, folder: str) -> tuple[list[dict[str, Any]], torch.Tensor | None]:
        """Train and save; returns the log, and logits of the trained model for the comparison with the saved one."""
        trainer = train(
            model,
            self.arguments,
            stage,
            tokenizer=self._tokenizer,
            train_dataset=self.data.train,
            eval_dataset=self.data.test,
        )
        logits = self._logits(trainer.model_wrapped)
        state = full_state(trainer)

        def save(directory: Path) -> None:
            model.save_pretrained(directory, state_dict=state)
            self._tokenizer.save_pretrained(directory)

        if is_main_process():
            save_directory_atomically(self.output_dir / folder, save)
        trainer.accelerator.free_memory()
        return trainer.state.log_history, logits

    def _logits(self, model: nn.Module) -> torch.Tensor | None:
        training = self.arguments.training
        with torch.autocast(training.device.type, torch.bfloat16, enabled=bool(training.bf16)):
            return self._measurements.logits(model, training.device)

    def _size(self, folder: str) -> dict[str, int]:
        return {"adapter_bytes": (self.output_dir / folder / "adapter_model.safetensors").stat().st_size}

    def _emptied(self, folder: str) -> Path:
        path = self.output_dir / folder
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path
