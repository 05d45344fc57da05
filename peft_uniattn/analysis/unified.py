"""A model with some plan for a moment, and how good it is once calibrated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from ..calibration import calibrate
from ..config import UniAttnConfig
from ..inspection import find_adapter
from ..training.evaluation import held_out_scores
from .data import Sequences


@contextmanager
def unified(model: PreTrainedModel, config: UniAttnConfig) -> Iterator[PeftModel]:
    """Share softmax as `config` says, and take it out again at the end; the base stays frozen."""
    adapted = get_peft_model(model, config)
    try:
        yield adapted.eval()
    finally:
        adapted.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config


def calibrated_scores(adapted: PeftModel, data: Sequences, method: str, batch_size: int) -> dict[str, Any]:
    """
    Calibrate a plan and score it.

    Returns:
        `superblocks`, their largest `size`, `followers`, `kv_retain_rate` (0 to 1), `loss_uncompensated` with softmax
        shared and a compensation of zero, and `loss` and `accuracy` once calibrated.
    """
    plan = find_adapter(adapted).plan
    scored = data.held_out, data.pad_token_id
    before = held_out_scores(adapted, *scored, batch_size=batch_size)
    calibrate(adapted, data.batches(batch_size, adapted.device), method, progress=False)
    after = held_out_scores(adapted, *scored, batch_size=batch_size)
    return {
        "superblocks": [list(block) for block in plan.superblocks],
        "size": max(map(len, plan.superblocks)),
        "followers": len(plan.followers),
        "kv_retain_rate": plan.kv_retain_rate,
        "loss_uncompensated": before.loss,
        **asdict(after),
    }
