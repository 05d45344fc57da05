"""The README's figures are those of the raw results."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULT = json.loads((ROOT / "docs" / "results" / "quickstart.json").read_text())
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("step", RESULT["receipt"]["losses"])
def test_losses_are_those_of_the_raw_result(step):
    assert f"| {step} | {RESULT['receipt']['losses'][step]:.4f} |" in README


@pytest.mark.parametrize("name", ["kv_bytes_before", "kv_bytes_after", "adapter_parameters"])
def test_sizes_are_those_of_the_raw_result(name):
    assert f"{RESULT['receipt'][name]:,}" in README


def test_the_wall_time_is_that_of_the_raw_result():
    assert f"{RESULT['receipt']['seconds'] / 60:.1f} minutes" in README
