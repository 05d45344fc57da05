"""Every promise in docs/promises.md names tests, and all of them exist."""

import ast
import json
import re
import runpy
from pathlib import Path

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"
PAGE = DOCS / "promises.md"
FIGURES = runpy.run_path(str(DOCS / "make_reliability.py"))


def promises() -> list[list[str]]:
    """The tests named by each row of the page's tables, as `file::name`."""
    page = PAGE.read_text().partition(FIGURES["END"])[2]
    rows = [line for line in page.splitlines() if line.startswith("| ") and line != "| promise | test |"]
    return [re.findall(r"`(test_\w+\.py::test_\w+)`", row) for row in rows]


def test_every_promise_names_a_test():
    assert len(promises()) > 20
    assert all(promises())


def test_every_named_test_exists():
    named = {name for row in promises() for name in row}
    existing = {
        f"{file.name}::{node.name}"
        for file in {TESTS / name.partition("::")[0] for name in named}
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert named <= existing, named - existing


def test_the_figures_are_those_of_the_results():
    results = json.loads((DOCS / "results" / "reliability.json").read_text())
    assert FIGURES["with_figures"](PAGE.read_text(), results) == PAGE.read_text()


def test_the_suites_tried_as_much_as_the_page_says_elsewhere():
    counts = json.loads((DOCS / "results" / "reliability.json").read_text())["counts"]
    assert counts["examples of models"] + counts["examples of verbs"] >= 2_000
    assert counts["files fuzzed"] >= 3_000
    assert counts["kills survived"] >= 100
    assert counts["decoded tokens"] >= 100_000
