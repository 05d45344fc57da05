"""What docs/architecture.md lists imports nothing that stands above it there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_uniattn"
PAGE = (ROOT / "docs" / "architecture.md").read_text().partition("| facts |")
ROWS = [line for line in (PAGE[0] + PAGE[1] + PAGE[2].partition("\n")[0]).splitlines() if line.startswith("| ")]
LEVEL = {
    name.removesuffix("/").removesuffix(".py"): level
    for level, row in enumerate(ROWS)
    for name in re.findall(r"`(\w+(?:/|\.py))`", row)
}


def test_what_the_table_names_exists():
    assert len(LEVEL) > 30
    assert all((PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file() for name in LEVEL)


@pytest.mark.parametrize("name", sorted(LEVEL))
def test_imports_point_downwards(name):
    path = PACKAGE / name
    files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    for file in files:
        depth = len(file.relative_to(PACKAGE).parts)
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.level == depth:
                imported = [node.module.partition(".")[0]] if node.module else [alias.name for alias in node.names]
                above = [one for one in imported if LEVEL.get(one, LEVEL[name]) < LEVEL[name]]
                assert not above, f"{file.relative_to(ROOT)} imports {above}"
