"""TRL's trainer with a teacher."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from trl import SFTTrainer
from trl.models import prepare_deepspeed, prepare_fsdp

from ...inspection import base_model, find_adapter
from ...modes import evaluation_mode, without_adapters
from ...tuner.model import trainable_base_parameters
from .arguments import DistillationArguments
from .comparison import LAST, Comparison, predicting, watch


class DistillationTrainer(SFTTrainer):
    """
    `SFTTrainer` whose student also learns from the original model. Evaluation reports the plain task loss.

    With all weights at zero it is `SFTTrainer`, bit for bit. Works with padding-free batches, gradient accumulation,
    gradient checkpointing, DDP and FSDP2: the teacher's forward runs through the same wrapper as the student's,
    without autograd, and the losses are computed inside the student's.

    Args:
        distillation: weights, temperature; default off.
        teacher: a frozen model with the student's vocabulary and layers. None: the student without its adapter.
        args, kwargs: those of `SFTTrainer`.

    Raises:
        ValueError: if the student is not unified, has no adapter and no `teacher` is given, trains its base and would
            be its own moving teacher, does not match `teacher`, or is to be compiled or split along the sequence.
    """

    def __init__(
        self,
        *args: Any,
        distillation: DistillationArguments | None = None,
        teacher: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.distillation = DistillationArguments() if distillation is None else distillation
        self.teacher = None
        if not self.distillation.enabled:
            return
        followers = _followers(self.model)
        self._check_supported(teacher)
        self._layers = followers if self.distillation.distillation_attention_weight else []
        if teacher is not None:
            self.teacher = self._placed(teacher.requires_grad_(False).eval())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if return_outputs or not (self.distillation.enabled and self.model.training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        alpha, weight = self.distillation.distillation_alpha, self.distillation.distillation_attention_weight
        positions = predicting(inputs["labels"])
        original = self._run_teacher(model, inputs, positions)
        comparison = Comparison(original, positions, self.distillation.distillation_temperature)
        student = self._transformers_model(self.model)
        teacher = student if self.teacher is None else self._transformers_model(self.teacher)
        with comparison.of(student, teacher):
            task = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self._log_means(comparison, positions)
        # As in SFTTrainer: the count is that of all processes, whose gradients DDP averages, and of all micro-batches.
        count = positions.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            count = count / (self.accelerator.num_processes // self.get_tp_size())
        return (1 - alpha) * task + (alpha * comparison.divergence + weight * comparison.error) / count

    @torch.no_grad()
    def _run_teacher(
        self, model: nn.Module, inputs: dict[str, Any], positions: torch.Tensor
    ) -> dict[int | str, torch.Tensor]:
        """What is compared of the teacher's forward pass, at `positions` only."""
        teacher = model if self.teacher is None else self.teacher
        inner = self._transformers_model(teacher)
        seen: dict[int | str, torch.Tensor] = {}

        def see(key: int | str, value: torch.Tensor) -> None:
            if key != LAST or self.distillation.distillation_alpha:
                seen[key] = value[positions.to(value.device)]

        inputs = {**inputs, "use_cache": False}
        del inputs["labels"]
        if "logits_to_keep" in inspect.signature(type(inner).forward).parameters:
            inputs["logits_to_keep"] = 1  # the head is applied later, and in tiles
        at_rest = without_adapters(inner) if self.teacher is None else nullcontext()
        with at_rest, evaluation_mode(teacher), self.compute_loss_context_manager(), watch(inner, self._layers, see):
            teacher(**inputs)
        return seen

    def _transformers_model(self, model: nn.Module) -> PreTrainedModel:
        return base_model(self.accelerator.unwrap_model(model))

    def _log_means(self, comparison: Comparison, positions: torch.Tensor) -> None:
        """Means over the tokens of all processes, for the trainer's next log."""
        count = self.accelerator.gather_for_metrics(positions.sum()).sum().clamp(min=1)
        for name, total in (("distillation_kl", comparison.divergence), ("attention_error", comparison.error)):
            if isinstance(total, torch.Tensor):
                mean = self.accelerator.gather_for_metrics(total.detach()).sum() / count
                self._metrics["train"][name].append(mean.item())

    def _check_supported(self, teacher: PreTrainedModel | None) -> None:
        if self.args.torch_compile:
            raise ValueError(
                "torch_compile=True does not see what distillation compares; train without one of the two"
            )
        parallel = self.accelerator.parallelism_config
        if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
            raise ValueError("context and sequence parallelism split what distillation compares; train without them")
        if teacher is None:
            _check_can_teach_itself(self.model)
            return
        student, other = base_model(self.model).config, teacher.config
        for name in ("vocab_size", "num_hidden_layers", "hidden_size"):
            if getattr(student, name) != getattr(other, name):
                raise ValueError(
                    f"teacher has {name}={getattr(other, name)}, and the student {getattr(student, name)}; use the "
                    "model that the student was made of"
                )

    def _placed(self, teacher: PreTrainedModel) -> nn.Module:
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(teacher, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(teacher, self.accelerator)
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)


def _followers(model: nn.Module) -> list[int]:
    superblocks = getattr(base_model(model).config, "superblocks", None)
    if superblocks is None:
        return find_adapter(model).plan.followers
    return [layer for block in superblocks for layer in block[1:]]


def _check_can_teach_itself(model: nn.Module) -> None:
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"{type(model).__name__} has no adapter that could be put at rest, and its followers have no queries and "
            "keys left; pass the original model as teacher"
        )
    if trained := trainable_base_parameters(model):
        raise ValueError(
            f"{trained[0]} is trained together with the adapter, so the model without it would be a teacher that "
            "moves; freeze the base, or pass a copy of the original model as teacher"
        )
