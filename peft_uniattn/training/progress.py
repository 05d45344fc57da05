"""The bar of a stage: steps, loss and tokens per second."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback


class StageProgress(ProgressCallback):
    """
    transformers' progress bar with the last logged loss and the tokens per second since the log before.

    Args:
        name: of the stage, shown before the bar.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._tokens = 0.0
        self._since = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._tokens, self._since = 0.0, time.perf_counter()
        if self.training_bar is not None:
            self.training_bar.set_description(self._name)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is None or logs is None:
            return
        shown = {name: f"{logs[name]:.4f}" for name in ("loss", "eval_loss") if name in logs}
        # TRL counts the tokens of all processes since this training was started or continued.
        if (tokens := logs.get("num_tokens")) is not None:
            now = time.perf_counter()
            shown["tokens/s"] = f"{(tokens - self._tokens) / (now - self._since):,.0f}"
            self._tokens, self._since = tokens, now
        if shown:
            self.training_bar.set_postfix(shown)
