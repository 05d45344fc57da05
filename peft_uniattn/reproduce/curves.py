"""Losses on the way, as a finished run's journal has them."""

from __future__ import annotations

import json
from pathlib import Path

from ..training.summary import STEPS

# By series, pairs of optimizer step and loss in nats per completion token.
Curves = dict[str, list[tuple[int, float]]]

TRAINING, EVALUATIONS, HELD_OUT = "training", "evaluations", "held-out"


def read_curves(journal: Path, steps: dict[str, int]) -> Curves:
    """
    The learning curves of a run: `training` loss, `evaluations` on held-out data during training (if `eval_strategy`
    asks for them; the trainer's mean over batches), and `held-out` loss at the start and after every stage.

    Optimizer steps are counted from the start of the first stage.

    Args:
        journal: file of a finished run.
        steps: of each stage, in order.
    """
    results = json.loads(journal.read_text())["results"]
    curves: Curves = {TRAINING: [], EVALUATIONS: [], HELD_OUT: [(0, results["base"]["loss"])]}
    before = 0
    for stage, number in steps.items():
        result = results[STEPS[stage]]
        for entry in result.get("log", []):
            for name, series in (("loss", TRAINING), ("eval_loss", EVALUATIONS)):
                if name in entry:
                    curves[series].append((before + entry["step"], round(entry[name], 4)))
        before += number
        curves[HELD_OUT].append((before, result["loss"]))
    # Without held-out examples a loss is None.
    kept = {name: [(step, loss) for step, loss in series if loss is not None] for name, series in curves.items()}
    return {name: series for name, series in kept.items() if series}
