"""What a run cost and brought, in figures that were measured."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from typing import Any

import peft
import torch
import transformers
import trl
from transformers import PreTrainedModel

from ..cache import kv_bytes
from ..kernels import describe
from ..modes import evaluation_mode


@torch.no_grad()
def measured_kv_bytes_per_token(model: PreTrainedModel, length: int = 64) -> int:
    """Bytes per token of the cache that a real prefill of `length` tokens leaves behind."""
    ids = torch.arange(length, device=model.device).unsqueeze(0) % model.config.vocab_size
    with evaluation_mode(model):
        return kv_bytes(model(input_ids=ids, use_cache=True).past_key_values) // length


def environment() -> dict[str, str]:
    """Versions and hardware."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft, trl)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {"python": platform.python_version(), **versions, "device": device, "kernels": describe()}


@dataclass(frozen=True)
class Receipt:
    """
    Attributes:
        base_model: honest name of the starting point.
        data: what was trained on.
        superblocks: lists of layer indices, the leader first.
        num_layers: decoder layers of the model.
        kv_bytes_before: KV cache bytes per token of the base, measured.
        kv_bytes_after: with the softmax shared, measured; that of the base where nothing was unified.
        adapter_parameters: parameters of the compensation.
        adapter_bytes: size of the adapter's safetensors file; None if no adapter was saved.
        losses: held-out loss in nats per completion token, by step, in the order of the steps.
        prompt: a held-out question; empty if nothing was held out.
        answers: greedy answers to it, by step.
        evaluations: what the evaluation of the user found, by step.
        reload_difference: largest difference of a logit between the trained and the reloaded standalone model; None
            if stage 2 has not been run.
        seconds: wall time of the steps, of each in the session that finished it; what interrupted sessions had done of
            a step does not count.
        environment: versions and hardware of the last step.
    """

    base_model: str
    data: str
    superblocks: list[list[int]]
    num_layers: int
    kv_bytes_before: int
    kv_bytes_after: int
    adapter_parameters: int
    adapter_bytes: int | None
    losses: dict[str, float]
    prompt: str
    answers: dict[str, str]
    evaluations: dict[str, dict[str, float]]
    reload_difference: float | None
    seconds: float
    environment: dict[str, str]

    @property
    def followers(self) -> int:
        return sum(len(block) - 1 for block in self.superblocks)

    def rows(self) -> list[tuple[str, str]]:
        """The receipt as lines of name and value."""
        blocks = " ".join(f"[{block[0]}-{block[-1]}]" for block in self.superblocks)
        retained = self.kv_bytes_after / self.kv_bytes_before
        size = "" if self.adapter_bytes is None else f", {self.adapter_bytes / 2**20:.1f} MiB"
        rows = [
            ("base model", self.base_model),
            ("data", self.data),
            ("Superblocks", f"{blocks}, {self.followers} followers of {self.num_layers} layers"),
            ("KV cache per token", f"{self.kv_bytes_before:,} → {self.kv_bytes_after:,} bytes ({retained:.1%})"),
            ("adapter", f"{self.adapter_parameters:,} parameters{size}"),
            *((f"held-out loss, {name}", f"{loss:.4f}") for name, loss in self.losses.items()),
        ]
        for step, results in self.evaluations.items():
            rows += [(f"{name}, {step}", f"{value:.4f}") for name, value in results.items()]
        if self.prompt:
            rows.append(("question", self.prompt))
            rows += [(f"answer, {name}", answer) for name, answer in self.answers.items()]
        if self.reload_difference is not None:
            rows.append(("reloaded checkpoint", f"largest difference of a logit: {self.reload_difference:.1e}"))
        return [*rows, ("wall time", f"{self.seconds / 60:.1f} min")]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return asdict(self)
