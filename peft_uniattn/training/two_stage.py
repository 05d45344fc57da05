"""The whole way from a base model to a reloaded, cheaper checkpoint; every step resumable."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from datasets import Dataset, DatasetDict
from peft import PeftModel, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from ..calibration import calibrate, check_method
from ..config import UniAttnConfig
from ..inspection import find_adapter
from ..standalone import to_standalone
from .data import TokenizedData, batches, tokenize
from .evaluation import held_out_loss, sample_answer
from .journal import Journal, save_directory_atomically, write_atomically
from .model_card import adapter_card, standalone_card
from .receipt import Receipt, measured_kv_bytes_per_token


@dataclass(frozen=True)
class TwoStageSettings:
    """
    How to train.

    Attributes:
        max_length: tokens per example; longer ones are cut.
        calibration_examples: how many training examples calibration reads.
        held_out_examples: how many held-out examples losses are measured on.
        calibration_method: "ridge" or "pseudoinverse".
        batch_size: examples per optimizer step.
        stage1_steps: optimizer steps of stage 1, which trains W_c alone.
        stage2_steps: optimizer steps of stage 2, which trains everything.
        stage1_learning_rate: peak of the cosine schedule of stage 1.
        stage2_learning_rate: likewise of stage 2, and of the fine-tuned base beside it.
        save_steps: optimizer steps between checkpoints from which an interrupted run continues.
        compare_with_base: also fine-tune the unmodified base, with the settings of stage 2.
        seed: of everything random.
    """

    max_length: int = 160
    calibration_examples: int = 64
    held_out_examples: int = 24
    calibration_method: str = "ridge"
    batch_size: int = 4
    stage1_steps: int = 16
    stage2_steps: int = 16
    stage1_learning_rate: float = 5e-4
    stage2_learning_rate: float = 1e-4
    save_steps: int = 8
    compare_with_base: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_method(self.calibration_method)


@dataclass
class TwoStageRun:
    """
    Plan, calibrate, stage 1, stage 2, save both artefacts, reload, generate.

    Leaves in `output_dir`: `adapter/` (W_c after stage 1), `model/` (the standalone model after stage 2),
    `receipt.json` and `journal.json`. Running it again continues after the last finished step or checkpoint.

    Args:
        output_dir: where everything goes.
        load_base: returns the base model, its tokenizer and its honest name; called whenever a step needs a fresh one.
        data: splits "train" and "test" with `prompt` and `completion` messages.
        data_name: what to call the data in the receipt.
        config: the plan and the rank of the compensation.
        settings: how to train.
    """

    output_dir: Path
    load_base: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase, str]]
    data: DatasetDict
    data_name: str
    config: UniAttnConfig = field(default_factory=lambda: UniAttnConfig(task_type="CAUSAL_LM"))
    settings: TwoStageSettings = field(default_factory=TwoStageSettings)

    def run(self) -> Receipt:
        """
        Do what has not been done yet, and return the receipt.

        Raises:
            ValueError: if `output_dir` holds a run with other settings, or the plan does not fit the model.
        """
        plan = {name: getattr(self.config, name) for name in ("superblock_size", "start_layer", "end_layer", "r")}
        plan["superblocks"] = self.config.superblocks
        journal = Journal(self.output_dir, {"data": self.data_name, **plan, **asdict(self.settings)})
        base = self._step(journal, "base", self._base)
        calibrated = self._step(journal, "calibration", self._calibrate)
        stage1 = self._step(journal, "stage 1", self._stage1)
        stage2 = self._step(journal, "stage 2", self._stage2)
        losses = {
            "base": base["loss"],
            "unified, no compensation": calibrated["loss_before"],
            "calibrated": calibrated["loss"],
            "after stage 1": stage1["loss"],
            "after stage 2": stage2["loss"],
        }
        steps = [base, calibrated, stage1, stage2]
        if self.settings.compare_with_base:
            plain = self._step(journal, "fine-tuned base", self._plain)
            losses["plain fine-tuned base"] = plain["loss"]
            steps.append(plain)
        receipt = Receipt(
            base_model=base["name"],
            data=self.data_name,
            superblocks=calibrated["superblocks"],
            num_layers=calibrated["num_layers"],
            kv_bytes_before=base["kv_bytes"],
            kv_bytes_after=stage2["kv_bytes"],
            adapter_parameters=calibrated["adapter_parameters"],
            adapter_bytes=stage1["adapter_bytes"],
            losses=losses,
            prompt=self._question[-1]["content"],
            answers={"base": base["answer"], "after stage 2": stage2["answer"]},
            reload_difference=stage2["reload_difference"],
            seconds=sum(step["seconds"] for step in steps),
            environment=_environment(),
        )
        details = {"plan": plan, "settings": asdict(self.settings), "calibration": calibrated["report"]}
        shutil.rmtree(self.output_dir / "checkpoints", ignore_errors=True)
        adapter_card(receipt, details).save(self.output_dir / "adapter" / "README.md")
        standalone_card(receipt, details).save(self.output_dir / "model" / "README.md")
        write_atomically(self.output_dir / "receipt.json", json.dumps(receipt.to_dict(), indent=2) + "\n")
        return receipt

    # The steps. Each starts from files, so that it can run in another process than the one before.

    def _base(self) -> dict[str, Any]:
        model, tokenizer, name = self.load_base()
        # Wrap and unwrap once, so that a plan that does not fit is refused before anything takes time.
        model = get_peft_model(model, self.config).unload()
        return {
            "name": name,
            "loss": self._loss(model, "base"),
            "kv_bytes": measured_kv_bytes_per_token(model),
            "answer": sample_answer(model, tokenizer, self._question),
        }

    def _calibrate(self) -> dict[str, Any]:
        model, tokenizer, _ = self.load_base()
        set_seed(self.settings.seed)
        peft_model = get_peft_model(model, self.config)
        loss_before = self._loss(peft_model, "no compensation")
        examples = self._train.dataset
        examples = examples.select(range(min(self.settings.calibration_examples, len(examples))))
        loader = batches(examples, 8, tokenizer.pad_token_id, model.device)
        report = calibrate(peft_model, loader, self.settings.calibration_method)
        save_directory_atomically(self.output_dir / "calibrated", peft_model.save_pretrained)
        plan = find_adapter(peft_model).plan
        return {
            "loss_before": loss_before,
            "loss": self._loss(peft_model, "calibrated"),
            "report": report.to_dict(),
            "superblocks": [list(block) for block in plan.superblocks],
            "num_layers": plan.num_layers,
            "adapter_parameters": sum(p.numel() for p in peft_model.parameters() if p.requires_grad),
        }

    def _stage1(self) -> dict[str, Any]:
        model, _, _ = self.load_base()
        peft_model = PeftModel.from_pretrained(model, self.output_dir / "calibrated", is_trainable=True)
        settings = self.settings
        log = self._train_model(peft_model, "stage 1", settings.stage1_learning_rate, settings.stage1_steps)
        adapter = self.output_dir / "adapter"
        save_directory_atomically(adapter, peft_model.save_pretrained)
        loss = self._loss(peft_model, "after stage 1")
        return {"loss": loss, "adapter_bytes": (adapter / "adapter_model.safetensors").stat().st_size, "log": log}

    def _stage2(self) -> dict[str, Any]:
        base, tokenizer, _ = self.load_base()
        peft_model = PeftModel.from_pretrained(base, self.output_dir / "adapter")
        model = to_standalone(peft_model, share_weights=True)
        settings = self.settings
        log = self._train_model(model, "stage 2", settings.stage2_learning_rate, settings.stage2_steps)

        def save(directory: Path) -> None:
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)

        save_directory_atomically(self.output_dir / "model", save)
        loss = self._loss(model, "after stage 2")
        reloaded = AutoModelForCausalLM.from_pretrained(self.output_dir / "model", dtype=model.dtype).to(model.device)
        return {
            "loss": loss,
            "kv_bytes": measured_kv_bytes_per_token(reloaded),
            "answer": sample_answer(reloaded, tokenizer, self._question),
            "reload_difference": self._largest_difference(model, reloaded),
            "log": log,
        }

    def _plain(self) -> dict[str, Any]:
        model, _, _ = self.load_base()
        settings = self.settings
        log = self._train_model(model, "fine-tuned base", settings.stage2_learning_rate, settings.stage2_steps)
        return {"loss": self._loss(model, "fine-tuned base"), "log": log}

    # What they share.

    @staticmethod
    def _step(journal: Journal, name: str, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        def timed() -> dict[str, Any]:
            started = time.perf_counter()
            result = action()
            return {**result, "seconds": time.perf_counter() - started}

        result = journal.step(name, timed)
        tqdm.write(f"{name}: held-out loss {result['loss']:.4f}, {result['seconds']:.0f} s")
        return result

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return self.load_base()[1]

    @cached_property
    def _train(self) -> TokenizedData:
        return tokenize(self.data["train"].shuffle(seed=self.settings.seed), self._tokenizer, self.settings.max_length)

    @cached_property
    def _test(self) -> Dataset:
        rows = self.data["test"].select(range(min(self.settings.held_out_examples, len(self.data["test"]))))
        return tokenize(rows, self._tokenizer, self.settings.max_length).dataset

    @cached_property
    def _question(self) -> list[dict[str, str]]:
        return self.data["test"][0]["prompt"]

    def _train_model(self, model: nn.Module, name: str, learning_rate: float, steps: int) -> list[dict[str, Any]]:
        on_gpu = torch.cuda.is_available()
        directory = self.output_dir / "checkpoints" / name.replace(" ", "-")
        arguments = SFTConfig(
            output_dir=str(directory),
            max_steps=steps,
            per_device_train_batch_size=self.settings.batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, round(0.03 * steps)),
            weight_decay=0.0,
            max_length=None,
            bf16=on_gpu and torch.cuda.is_bf16_supported(),
            gradient_checkpointing=False,
            logging_steps=5,
            save_steps=self.settings.save_steps,
            save_total_limit=1,
            report_to="none",
            dataloader_pin_memory=on_gpu,
            seed=self.settings.seed,
        )
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=self._train.dataset, processing_class=self._tokenizer
        )
        checkpoint = get_last_checkpoint(str(directory)) if directory.exists() else None
        trainer.train(resume_from_checkpoint=checkpoint)
        shutil.rmtree(directory, ignore_errors=True)
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    def _loss(self, model: nn.Module, name: str) -> float:
        return held_out_loss(model, self._test, self._tokenizer.pad_token_id, name=f"held-out loss, {name}")

    @torch.no_grad()
    def _largest_difference(self, first: PreTrainedModel, second: PreTrainedModel) -> float:
        batch = next(batches(self._test, 2, self._tokenizer.pad_token_id, first.device))
        del batch["labels"]
        return (first.eval()(**batch).logits - second.eval()(**batch).logits).abs().max().item()


def _environment() -> dict[str, str]:
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft, trl)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {"python": platform.python_version(), **versions, "device": device}
