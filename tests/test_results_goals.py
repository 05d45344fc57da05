"""The verdicts on what the recipe is meant to reach follow from the rows of a run."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from test_reproduce import result

GOALS = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "results_goals.py"))


def verdicts(*rows):
    """By rows compared, of rows given as (name, seeds' accuracies, KV bytes)."""
    results = [
        result(name, seed, {"a": accuracy}, kv_bytes)
        for name, accuracies, kv_bytes in rows
        for seed, accuracy in enumerate(accuracies)
    ]
    return {compared: (shown, seeds, found) for _, compared, shown, seeds, found in GOALS["goals"](results)}


@pytest.mark.parametrize(("accuracy", "verdict"), [(49.5, "met"), (49.4, "missed"), (51.0, "met")])
def test_half_a_point_below_plain_post_training_is_near_enough(accuracy, verdict):
    found = verdicts(("post-train", [50.0], 8), ("uniattn", [accuracy], 6))
    assert found["uniattn − post-train"][1:] == ("1", verdict)


@pytest.mark.parametrize(
    ("accuracies", "verdict"),
    [
        ([41.0, 42.0, 43.0], "met"),  # 2 ± 0.6
        ([39.0, 42.0, 42.0], "open: within a standard error"),  # 1 ± 1
        ([39.0, 40.0, 40.0], "missed"),
        ([41.0], "open: one seed"),
    ],
)
def test_a_rival_is_beaten_by_more_than_a_standard_error(accuracies, verdict):
    found = verdicts(("cla-full", [40.0, 40.0, 40.0], 4), ("uniattn", accuracies, 6))
    assert found["uniattn − cla-full"][1:] == (str(len(accuracies)), verdict)


def test_seeds_are_compared_with_their_own():
    found = verdicts(("post-train", [50.0, 60.0], 8), ("uniattn", [49.0, 61.0, 10.0], 6))
    assert found["uniattn − post-train"] == ("+0.0 ± 1.0", "2", "met")


def test_at_equal_cache_means_equal_bytes():
    rows = [("uniattn", [50.0], 6), ("cla-half", [40.0], 6), ("llmdrop-half", [40.0], 7)]
    assert list(verdicts(*rows)) == ["uniattn − cla-half"]
