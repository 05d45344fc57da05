"""Losses and goals on the page about the distance to plain post-training are those of the raw results."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from peft_uniattn.reproduce.cell import CellResult

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


RUNS = ("smollm2_by_loss", "qwen_by_loss", "smollm2_medical", "qwen_medical")
COMPARED = (
    "uniattn − post-train",
    "uniattn-half − post-train",
    "uniattn − cla-full",
    "uniattn − llmdrop-full",
    "uniattn-half − cla-half",
    "uniattn-half − llmdrop-half",
    "uniattn − cla-half",
    "uniattn − llmdrop-half",
    "zero-init − no-compensation",
    "calibrated − zero-init",
    "two-stage − calibrated",
)


@pytest.mark.parametrize(("column", "run"), enumerate(RUNS, start=1), ids=RUNS)
def test_goals_are_those_that_the_rows_of_a_run_reach(column, run):
    goals = runpy.run_path(str(DOCS / "results_goals.py"))["goals"]
    rows = json.loads((DOCS / "results" / f"reproduce_{run}.json").read_text())["results"]
    expected = {
        compared: f"{points}, {verdict}"
        for _, compared, points, _, verdict in goals([CellResult(**row) for row in rows])
    }
    lines = re.search(r"\| goal \|.*\n\|-.*\n((?:\|.*\n)+)", (DOCS / "quality.md").read_text())[1].splitlines()
    shown = [line.split("|")[column + 1].strip() for line in lines]
    assert shown == [expected.get(compared, "–") for compared in COMPARED]


def test_what_one_answer_for_all_scores_is_that_of_the_raw_result():
    right = json.loads((DOCS / "results" / "evaluation_data_cpu.json").read_text())["right answers"]
    medmcqa, first, pubmedqa = (
        f"{100 * right[name][answer] / sum(right[name].values()):.1f}"
        for name, answer in (("MedMCQA", "A"), ("the first 1,000 of MedMCQA", "A"), ("PubMedQA", "yes"))
    )
    text = " ".join((DOCS / "quality.md").read_text().split())
    assert f"a model that always says yes has {pubmedqa}." in text
    assert f"[{medmcqa}](results/evaluation_data_cpu.json); {first} of the 1,000 that Qwen was asked" in text
