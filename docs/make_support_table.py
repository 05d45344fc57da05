"""
Write the table of supported families from the results of their tests.

    python -m pytest -m "not gpu" tests/test_families.py tests/test_parallel.py tests/test_wrapped_families.py \\
        --junitxml=families.xml
    python docs/make_support_table.py families.xml > docs/support.md

Takes several files of results, where tests ran apart; of a test that ran more than once, the last result counts.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterator

COLUMNS = [f"{back_end}, {cache} cache" for back_end in ("eager", "sdpa") for cache in ("dynamic", "static")]
COLUMNS += ["offloaded cache", "quantized cache", "training", "adapter saved", "standalone", "compiled"]
# Columns of tests outside of the family suite, by what the test is called and the wrapper that its name ends with.
WRAPPERS = {
    ("test_a_step_on_two_ranks", "ddp"): "DDP",
    ("test_a_step_on_two_ranks", "fsdp1"): "FSDP1",
    ("test_a_step_on_two_ranks", "fsdp2"): "FSDP2",
    ("test_a_step_under_deepspeed", "zero2"): "ZeRO-2",
    ("test_a_step_under_deepspeed", "zero3"): "ZeRO-3",
    ("test_a_standalone_model_can_be_offloaded", None): "device_map",
    ("test_a_model_runs_and_trains_under_tensor_parallelism", None): "tensor parallel",
    ("test_flex_attention", None): "flex",
    ("test_a_quantized_base", "4bit"): "4-bit base",
    ("test_a_quantized_base", "8bit"): "8-bit base",
}
COLUMNS += WRAPPERS.values()
HEAD = """# Supported families

Written by `docs/make_support_table.py` from the results of `tests/test_families.py`, `tests/test_parallel.py` and
`tests/test_wrapped_families.py` (its docstring says how to write it again). "yes": all tests of that column passed, on
tiny random models on CPUs, in float64 where the column allows it. "–": not tested, because transformers has no such
back end or cache for the family, or because the column is run for some families only: "compiled", which is slow, and
those from DDP on. That the others behave alike there is an expectation and no result.

Every back end of a row runs with every cache of the row. "offloaded cache": greedy and beam search, on a model of GPU
streams. "quantized cache": 8-bit floats, which transformers has for full attention only. "training" includes
non-reentrant checkpointing, as do DDP, FSDP and ZeRO, which run on two ranks, once with an adapter and once with a
standalone model. So does "tensor parallel". "device_map": the standalone model, with part of a Superblock fetched from
disk; over two GPUs it is tested with Llama (`tests/test_parallel.py`, marked `gpu`). "flex": inference. Back ends that
need a GPU are in [generation.md](generation.md), other quantizers too.

A name with a mask stands for a family whose layers mix full and sliding or chunked attention: `own_mask` shares among
layers of one kind, `leader_mask` lets followers take the mask of a leader with full attention (`follower_mask`). The
wrappers' tests use one of the two: `leader_mask` for Gemma-2.
"""
# The row that stands for a family in the wrappers' tests, where it has two.
ROWS = {"gemma2": "gemma2-leader_mask", "qwen3": "qwen3-own_mask", "gemma3_text": "gemma3_text-own_mask"}


def family_columns(test: str, back_end: str | None, cache: str | None) -> list[str]:
    """The columns that a test of the family suite speaks for."""
    for words, column in {
        ("offloaded_cache",): "offloaded cache",
        ("quantized_cache",): "quantized cache",
        ("checkpointing", "gradients"): "training",
        ("saved_adapter",): "adapter saved",
        ("standalone",): "standalone",
        ("compiled",): "compiled",
    }.items():
        if any(word in test for word in words):
            return [column]
    return [name for name in COLUMNS[:4] if (back_end or "") in name and (cache or "") in name]


def speaks_for(module: str, name: str) -> Iterator[tuple[str, str]]:
    """The rows and columns that a test speaks for."""
    test, _, parameters = name.rstrip("]").partition("[")
    if module.endswith("test_families"):
        match = re.fullmatch(r"(?:(dynamic|static)-)?(.+?)(?:-(eager|sdpa))?", parameters)
        cache, family, back_end = match.groups()
        yield from ((family, column) for column in family_columns(test, back_end, cache))
        return
    words = parameters.split("-")
    for (start, wrapper), column in WRAPPERS.items():
        if test.startswith(start) and (wrapper is None or wrapper in words):
            family = next(word for word in words if word in ("llama", "phi3", "mixtral", *ROWS))
            yield ROWS.get(family, family), column


def read(paths: list[str]) -> dict[str, dict[str, bool]]:
    """Family -> column -> whether all its tests passed; columns of which every test was skipped are left out."""
    cases = {
        (case.get("classname", ""), case.get("name", "")): case
        for path in paths
        for case in ElementTree.parse(path).iter("testcase")
        if case.find("skipped") is None
    }
    results: dict[str, dict[str, bool]] = defaultdict(dict)
    back_ends = defaultdict(set)
    for (module, name), case in cases.items():
        passed = case.find("failure") is None and case.find("error") is None
        for family, column in speaks_for(module, name):
            results[family][column] = results[family].get(column, True) and passed
            back_ends[family].update(re.findall(r"-(eager|sdpa)\]", name))
    for family, row in results.items():  # tests of no one back end speak for those that the family has
        for column in [name for name in row if name in COLUMNS[:4] and name.split(",")[0] not in back_ends[family]]:
            del row[column]
    return results


def main() -> None:
    results = read(sys.argv[1:])
    words = {True: "yes", False: "**no**", None: "–"}
    print(HEAD)
    print("| family |", " | ".join(COLUMNS), "|")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for family in sorted(results):
        cells = (words[results[family].get(name)] for name in COLUMNS)
        name = family.replace("-own_", ", own_").replace("-leader_", ", leader_")
        print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
