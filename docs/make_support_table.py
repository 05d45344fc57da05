"""
Write the table of supported families from the results of their test suite.

    python -m pytest tests/test_families.py --junitxml=families.xml
    python docs/make_support_table.py families.xml > docs/support.md
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict

COLUMNS = [f"{back_end}, {cache} cache" for back_end in ("eager", "sdpa") for cache in ("dynamic", "static")]
COLUMNS += ["training", "adapter saved", "standalone"]
HEAD = """# Supported families

Written by `docs/make_support_table.py` from the results of `tests/test_families.py` (its docstring says how to write
it again). "yes": all tests of that column passed, on tiny random models in float64 on CPU. "–": not tested, because
transformers has no such back end for the family. A name with a mask stands for a family whose layers mix full and
sliding or chunked attention: `own_mask` shares between layers of one kind, `leader_mask` lets followers take the mask
of a leader with full attention (`follower_mask`).
"""


def columns(test: str, back_end: str | None, cache: str | None) -> list[str]:
    """The columns that a test speaks for."""
    if "checkpointing" in test or "gradients" in test:
        return ["training"]
    if "saved_adapter" in test:
        return ["adapter saved"]
    if "standalone" in test:
        return ["standalone"]
    return [name for name in COLUMNS[:4] if (back_end or "") in name and (cache or "") in name]


def read(path: str) -> dict[str, dict[str, bool]]:
    """Family -> column -> whether all its tests passed."""
    results: dict[str, dict[str, bool]] = defaultdict(dict)
    tested = set()
    for case in ElementTree.parse(path).iter("testcase"):
        match = re.fullmatch(r"(test_\w+)\[(?:(dynamic|static)-)?(.+?)(?:-(eager|sdpa))?\]", case.get("name", ""))
        if match is None:
            raise SystemExit(
                f"{case.get('name')!r} is no test of a family; pass the results of test_families.py alone"
            )
        test, cache, family, back_end = match.groups()
        if back_end:
            tested.add((family, back_end))
        passed = case.find("failure") is None and case.find("error") is None and case.find("skipped") is None
        for column in columns(test, back_end, cache):
            results[family][column] = results[family].get(column, True) and passed
    for family, row in results.items():
        for column in COLUMNS[:4]:
            if (family, column.split(",")[0]) not in tested:
                row.pop(column, None)
    return results


def main() -> None:
    results = read(sys.argv[1])
    words = {True: "yes", False: "**no**", None: "–"}
    print(HEAD)
    print("| family |", " | ".join(COLUMNS), "|")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for family in sorted(results):
        print(
            f"| {family.replace('-', ', ')} |", " | ".join(words[results[family].get(name)] for name in COLUMNS), "|"
        )


if __name__ == "__main__":
    main()
