"""The figures in `docs/analyses.md` are those of the raw results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from peft_uniattn.analysis import plots
from peft_uniattn.analysis.record import ANALYSES, Record
from peft_uniattn.analysis.tables import markdown

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "analyses.md").read_text()
SHOWN = re.findall(r"peft-uniattn analyze show docs/(results/\w+\.json) --plot docs/(plots/\w+\.svg)", PAGE)


def test_every_analysis_is_on_the_page():
    assert {Record.load(DOCS / result).analysis for result, _ in SHOWN} == set(ANALYSES)


def test_every_plot_on_the_page_has_its_command():
    assert set(re.findall(r"\]\((plots/\w+\.svg)\)", PAGE)) == {plot for _, plot in SHOWN}


@pytest.mark.parametrize(("result", "plot"), SHOWN)
def test_a_plot_is_drawn_from_its_result_and_small(result, plot, tmp_path):
    plots.plot(Record.load(DOCS / result), tmp_path / "again.svg")
    again, kept = (tmp_path / "again.svg").read_text(), (DOCS / plot).read_text()
    assert len(kept) < 200_000
    # The curves themselves; matplotlib's versions differ in where they put the letters.
    assert _markers(again) == _markers(kept)


def _markers(svg: str) -> int:
    return svg.count("<use ")


def test_every_row_of_a_table_is_one_of_a_result():
    rows = {line for result, _ in SHOWN for line in markdown(Record.load(DOCS / result)).splitlines()}
    found = [line for line in PAGE.splitlines() if line.startswith("|")]
    assert len(found) > 20
    assert set(found) <= rows
