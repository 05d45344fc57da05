"""Losses on the page about the distance to plain post-training are those of the raw results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
SHOWN = sorted(set(re.findall(r"(?<![\d.])2\.\d{3}\b", (DOCS / "quality.md").read_text())))


def losses(part):
    """All numbers of a raw file, whatever they are called."""
    if isinstance(part, dict):
        part = list(part.values())
    if isinstance(part, list):
        return [number for inner in part for number in losses(inner)]
    return [part] if isinstance(part, float) else []


@pytest.fixture(scope="module")
def measured():
    files = [path for pattern in ("explore_*.json", "reproduce_*.json") for path in (DOCS / "results").glob(pattern)]
    return {f"{number:.3f}" for path in files for number in losses(json.loads(path.read_text()))}


@pytest.mark.parametrize("loss", SHOWN)
def test_a_loss_is_that_of_a_raw_result(loss, measured):
    assert loss in measured
