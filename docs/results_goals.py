"""What the recipe is meant to reach, held against the rows of one `reproduce` run."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from peft_uniattn.reproduce.cell import CellResult
from peft_uniattn.reproduce.table import REFERENCE, by_cell, difference

# The recipe is meant to end this close to plain post-training, in points of mean accuracy.
WITHIN = 0.5
LADDER = ("no-compensation", "zero-init", "calibrated", "two-stage")


@dataclass(frozen=True)
class Goal:
    """
    `row` is to be at least `other` less `allowed` points; with `clearly`, above it by more than a standard error. With
    `same_cache` it is only asked where both rows hold as many bytes a token.
    """

    words: str
    row: str
    other: str
    allowed: float = 0.0
    clearly: bool = False
    same_cache: bool = False


RIVALS = ("cla", "llmdrop")
GOALS = (
    Goal(f"within {WITHIN} points of plain post-training", "uniattn", REFERENCE, allowed=WITHIN),
    Goal("half of the followers: at least plain post-training", "uniattn-half", REFERENCE),
    *(
        Goal("above a rival at equal cache", "uniattn", f"{rival}-half", clearly=True, same_cache=True)
        for rival in RIVALS
    ),
    *(Goal("above a rival on as many layers", "uniattn", f"{rival}-full", clearly=True) for rival in RIVALS),
    *(Goal("above a rival on as many layers", "uniattn-half", f"{rival}-half", clearly=True) for rival in RIVALS),
    *(Goal("ladder", upper, lower, clearly=True) for lower, upper in itertools.pairwise(LADDER)),
)


def goals(results: Sequence[CellResult]) -> list[tuple[str, str, str, str, str]]:
    """Goal, the rows, their difference in points of mean accuracy (± standard error), number of seeds, verdict."""
    rows = by_cell(results)
    lines = []
    for goal in GOALS:
        found, others = rows.get(goal.row, []), rows.get(goal.other, [])
        values = paired(found, others)
        if values and not (goal.same_cache and found[0].kv_bytes != others[0].kv_bytes):
            compared = f"{goal.row} − {goal.other}"
            lines.append((goal.words, compared, difference(found, others), str(len(values)), verdict(goal, values)))
    return lines


def paired(found: Sequence[CellResult], others: Sequence[CellResult]) -> list[float]:
    """Differences of the mean accuracies, for every seed that both have."""
    expected = {result.seed: result.mean_accuracy for result in others}
    return [result.mean_accuracy - expected[result.seed] for result in found if result.seed in expected]


def verdict(goal: Goal, values: Sequence[float]) -> str:
    """ "met" or "missed"; "open" where the difference is right but its standard error is larger, or not known."""
    mean = statistics.mean(values)
    if not goal.clearly:
        return "met" if mean >= -goal.allowed else "missed"
    if mean <= 0:
        return "missed"
    if len(values) == 1:
        return "open: one seed"
    return "met" if mean > statistics.stdev(values) / math.sqrt(len(values)) else "open: within a standard error"
