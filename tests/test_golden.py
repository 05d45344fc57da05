"""
Golden trajectories: losses and gradient norms of a tiny seeded run of both stages, as they were when they were stored.

They are compared up to what another CPU rounds differently. Where a change is meant to move them, look at the
difference, say why in the commit, and store them anew: `python tests/test_golden.py`.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import recipe_runs

from peft_uniattn.training.main import main

GOLDEN = Path(__file__).parent / "golden" / "two_stage.json"
SETTINGS = {"stage1_max_steps": 8, "max_steps": 8, "stage1_learning_rate": 3e-3, "learning_rate": 3e-3}


def trajectories(directory: Path, **changes: object) -> dict[str, list[dict[str, float]]]:
    """Loss and gradient norm of every step of both stages, and the losses on held-out data."""
    main(recipe_runs.flags(recipe_runs.write_inputs(directory), directory / "run", **{**SETTINGS, **changes}))
    found = {
        step: [{"loss": loss, "grad_norm": norm} for _, loss, norm, _ in recipe_runs.losses(directory / "run", step)]
        for step in ("stage 1", "stage 2")
    }
    receipt = json.loads((directory / "run" / "receipt.json").read_text())
    return {**found, "held out": [receipt["losses"]]}


def differences(found: dict, golden: dict) -> dict[str, float]:
    """The largest relative difference by kind of figure."""
    largest: dict[str, float] = {}
    for step, entries in golden.items():
        assert len(found[step]) == len(entries)
        for mine, stored in zip(found[step], entries, strict=True):
            assert mine.keys() == stored.keys()
            for name, value in stored.items():
                kind = name if name == "grad_norm" else "loss"
                largest[kind] = max(largest.get(kind, 0.0), abs(mine[name] - value) / abs(value))
    return largest


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


def test_both_stages_go_the_way_they_went(tmp_path, golden):
    largest = differences(trajectories(tmp_path), golden)
    assert largest["loss"] < 1e-4
    assert largest["grad_norm"] < 2e-3


@pytest.mark.parametrize(
    "change", [{"stage1_learning_rate": 3.1e-3}, {"seed": 1}, {"calibration_ridge": 0.1}, {"superblocks": "0-2"}]
)
@pytest.mark.slow
def test_the_comparison_notices_a_change(tmp_path, golden, change):
    largest = differences(trajectories(tmp_path, **change), golden)
    assert largest["loss"] > 1e-4 or largest["grad_norm"] > 2e-3


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(trajectories(Path(scratch)), indent=2) + "\n")
    sys.exit(0)
