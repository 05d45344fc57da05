"""
What the reliability suites tried, from their reports: `make_reliability.py --mutants M.json REPORT.xml ...`

The reports are pytest's (`--junitxml`), of the commands below; a later report of a test takes the place of an earlier
one. Writes `docs/results/reliability.json`, and its figures into `docs/promises.md`.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

DOCS = Path(__file__).parent
RESULTS, PAGE = DOCS / "results" / "reliability.json", DOCS / "promises.md"
BEGIN, END = "<!-- figures: results/reliability.json -->\n", "<!-- end of figures -->\n"
LIBRARIES = ("torch", "transformers", "peft", "trl", "safetensors", "hypothesis")
COMMANDS = (
    'pytest -m "not gpu" tests/test_hostile_files.py -o junit_family=xunit1 --junitxml=REPORT.xml',
    'pytest -m "not gpu" tests/test_properties.py -o junit_family=xunit1 --junitxml=REPORT.xml',
    'pytest -m "not gpu" tests/test_killed.py -o junit_family=xunit1 --junitxml=REPORT.xml',
    "pytest -m slow tests/test_long_runs.py -o junit_family=xunit1 --junitxml=REPORT.xml",
    "python tests/mutants.py --seconds 840 --out M.json",
    "python tests/mutants.py --again --out M.json",
)
# Tests whose names end with how often they did what.
LONG = {
    "test_decoding_with": "decoded tokens",
    "test_adapters_that_come_and_go": "adapters added and deleted",
    "test_a_base_that_is_wrapped": "bases wrapped and unwrapped",
}


def read(reports: list[Path]) -> dict[str, dict]:
    """By name of a test, how it ended and what it counted; of a test in several reports the last."""
    tests = {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            name = case.get("name")
            ended = next((e.tag for e in case if e.tag in ("failure", "error", "skipped")), "passed")
            counts = {p.get("name"): int(p.get("value")) for p in case.iter("property")}
            for start, what in LONG.items():
                if name.startswith(start):
                    counts[what] = int(re.search(r"\[(\d+)\]$", name)[1])
            tests[f"{case.get('classname')}::{name}"] = {"ended": ended, "counts": counts}
    return tests


def collect(reports: list[Path], mutants: dict) -> dict:
    """The content of `reliability.json`."""
    tests = read(reports)
    counts = Counter()
    for test in tests.values():
        if test["ended"] == "passed":
            counts.update(test["counts"])
    return {
        "date": date.today().isoformat(),
        "hardware": f"{platform.machine()}, no GPU",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "commands": COMMANDS,
        "tests": dict(Counter(test["ended"] for test in tests.values())),
        "counts": dict(sorted(counts.items())),
        "mutants": mutants,
    }


def rows(results: dict) -> str:
    """The figures as a table for the page."""
    counts = results["counts"]
    modules = results["mutants"]["modules"].values()
    killed, survived = sum(m["killed"] for m in modules), sum(len(m["survivors"]) for m in modules)
    figures = {
        "damaged files, adapters and standalone models": f"{counts['files fuzzed']:,} "
        f"({counts['refused']:,} refused in words, {counts['loaded']:,} loaded as what they held)",
        "random models against the oracle": f"{counts['examples of models']:,}",
        "random sequences of PEFT's verbs": f"{counts['examples of verbs']:,}",
        "runs killed and continued": f"{counts['kills survived']:,}",
        "tokens decoded with a bounded cache": f"{counts['decoded tokens']:,}",
        "adapters added and deleted": f"{counts['adapters added and deleted']:,}",
        "mutants of the core files that tests noticed": f"{killed} of {killed + survived}, a sample of "
        f"{sum(m['mutants'] for m in modules)}",
    }
    lines = [
        "| tried | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in figures.items()),
    ]
    return "\n".join(lines) + "\n"


def with_figures(page: str, results: dict) -> str:
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + "\n" + rows(results) + "\n" + END + rest.partition(END)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--mutants", type=Path, required=True, help="what tests/mutants.py wrote")
    arguments = parser.parse_args()
    results = collect(arguments.reports, json.loads(arguments.mutants.read_text()))
    if results["tests"].keys() - {"passed", "skipped"}:
        sys.exit(f"nothing written: not all tests have passed, {results['tests']}")
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    PAGE.write_text(with_figures(PAGE.read_text(), results))


if __name__ == "__main__":
    main()
