"""Stops a run whose gradients are no numbers any more, before a checkpoint of it takes the place of a good one."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopsAtDivergence(TrainerCallback):
    """
    Raises ValueError at the first log with a gradient norm that is NaN or infinite.

    The trainer itself leaves such losses out of its log and goes on. Under float16 it scales losses, and an infinite
    gradient only means that the step is skipped; then this lets it pass.
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        norm = (logs or {}).get("grad_norm")
        if norm is not None and not args.fp16 and not math.isfinite(norm):
            raise ValueError(
                f"training has diverged: the gradient's norm at step {state.global_step} is {norm}; use a smaller "
                "learning_rate or a longer warm-up, in another output_dir"
            )
