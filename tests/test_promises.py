"""Every promise in docs/promises.md names tests, and all of them exist."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "promises.md"


def promises() -> list[list[str]]:
    """The tests named by each row of the page's tables, as `file::name`."""
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and line != "| promise | test |"]
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
