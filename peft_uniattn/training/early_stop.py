"""When stage 1 has done what it can: the paper's early stop."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

logger = logging.get_logger(__name__)

METRICS = ("train_loss", "eval_loss")


class EarlyStop(TrainerCallback, ExportableState):
    """
    Stops training when the loss stops decreasing: the exponential moving average of the training loss (the rule of
    Algorithm 1 of arXiv 2502.00439, which gives no figures), or the loss on held-out examples.

    Decay and patience count optimizer steps, so that the rule hardly depends on how often losses are logged. A loss
    that is not finite does not enter the average, but time goes by, so that a run that has diverged stops too. All
    processes decide alike. The state is saved with every checkpoint, and none is written at the stop: a run that is
    continued from its last checkpoint stops where it would have stopped.

    Args:
        metric: "train_loss", or "eval_loss" (as it is, at every evaluation; the trainer needs an `eval_strategy`).
        decay: how much of the average a step of training keeps, 0 (the loss itself) up to 1.
        patience: steps without a new minimum after which training stops.
        min_delta: by how many nats a new minimum must be lower than the last.

    Attributes:
        average: the moving average; None before the first loss.
        best: its minimum so far.
        stopped_at: the step of the stop; None if there was none.

    Raises:
        ValueError: if an argument is out of range, or on starting to train without evaluations to go by.
    """

    def __init__(
        self, metric: str = "train_loss", *, decay: float = 0.99, patience: int = 100, min_delta: float = 0.0
    ) -> None:
        if metric not in METRICS:
            raise ValueError(f"metric={metric!r} must be one of {', '.join(METRICS)}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be from 0 (no averaging) up to 1, such as 0.99")
        if patience < 1:
            raise ValueError(f"patience={patience} must be 1 step or more; leave the early stop out to train on")
        if min_delta < 0:
            raise ValueError(f"min_delta={min_delta} must be 0 or more nats")
        self.metric = metric
        self.decay = decay
        self.patience = patience
        self.min_delta = min_delta
        self._reset()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON types."""
        arguments = {name: getattr(self, name) for name in ("metric", "decay", "patience", "min_delta")}
        return {"args": arguments, "attributes": {name: getattr(self, name) for name in self._fresh()}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.metric == "eval_loss" and args.eval_strategy == "no":
            raise ValueError(
                'metric="eval_loss" needs evaluations; set eval_strategy and eval_steps, or use metric="train_loss"'
            )
        self._reset()
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        # The trainer restores callbacks only on request, and would bring back the arguments of then with it.
        if saved is not None:
            for name, value in saved["attributes"].items():
                setattr(self, name, value)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.metric == "train_loss" and logs and "loss" in logs:
            self._observe(float(logs["loss"]), state.global_step, decay=self.decay)
            self._stop_if_due(state.global_step, control)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.metric == "eval_loss" and metrics and "eval_loss" in metrics:
            self._observe(float(metrics["eval_loss"]), state.global_step, decay=0.0)
            self._stop_if_due(state.global_step, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stopped_at is not None:
            control.should_save = False

    def _observe(self, loss: float, step: int, *, decay: float) -> None:
        """Fold in the mean loss of the steps since the last one."""
        if math.isfinite(loss):
            kept = 0.0 if self.average is None else decay ** max(1, step - self.last_step)
            self.average = loss if self.average is None else kept * self.average + (1 - kept) * loss
            if self.best is None or self.average < self.best - self.min_delta:
                self.best, self.best_step = self.average, step
        self.last_step = step

    def _stop_if_due(self, step: int, control: TrainerControl) -> None:
        if step - self.best_step < self.patience:
            return
        if self.stopped_at is None:
            self.stopped_at = step
            logger.warning(
                f"early stop at step {step}: {self.metric} has not fallen below {self.best} for {self.patience} steps"
            )
        control.should_training_stop = True
        # A run continued from here would take one more step before it stopped; from the checkpoint before, none.
        control.should_save = False

    def _reset(self) -> None:
        for name, value in self._fresh().items():
            setattr(self, name, value)

    @staticmethod
    def _fresh() -> dict[str, Any]:
        return {"average": None, "best": None, "best_step": 0, "last_step": 0, "stopped_at": None}
