"""The figures of each analysis as a table, from its result alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .record import Record

Rows = Iterator[tuple[str, ...]]


def rows(record: Record) -> list[tuple[str, ...]]:
    """The lines of a result's table as text, its head first."""
    return list(_ROWS[record.analysis](record.results))


def markdown(record: Record) -> str:
    """A result's table in Markdown."""
    head, *lines = rows(record)
    separator = tuple("---" for _ in head)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, separator, *lines))


def as_ranges(superblocks: list[list[int]]) -> str:
    """Superblocks as first-last layers, such as 16-19,20-23."""
    return ",".join(f"{block[0]}-{block[-1]}" for block in superblocks)


def _similarity(results: dict[str, Any]) -> Rows:
    yield "layer", "to the layer below, head against head", "averages over heads"
    pairs = zip(results["per_head"]["neighbours"], results["head_mean"]["neighbours"], strict=True)
    for layer, pair in enumerate(pairs, start=1):
        yield str(layer), *(f"{value:.3f}" for value in pair)


def _plan(results: dict[str, Any]) -> Rows:
    yield "plan", "Superblocks", "followers", "KV left", "loss before calibration", "loss", "accuracy"
    if not results["scores"]:
        yield "chosen", as_ranges(results["superblocks"]), str(results["followers"]), _kv(results), "", "", ""
        return
    yield "base", "", "0", "100.0 %", "", *_scores(results["base"])
    for name, entry in results["scores"].items():
        blocks, before = as_ranges(entry["superblocks"]), f"{entry['loss_uncompensated']:.3f}"
        yield name, blocks, str(entry["followers"]), _kv(entry), before, *_scores(entry)


def _sweep(results: dict[str, Any]) -> Rows:
    yield (
        *("Superblocks", "layers each", "followers", "KV left", "loss before calibration", "loss", "accuracy"),
        "first token, % of base (ms)",
    )
    yield "0", "", "0", "100.0 %", "", *_scores(results["base"]), ""
    for entry in [*results.get("number", []), *results.get("size", [])]:
        ttft, base = (entry[name]["median"] for name in ("ttft", "ttft_base"))
        yield (
            *(str(len(entry["superblocks"])), str(entry["size"]), str(entry["followers"]), _kv(entry)),
            *(f"{entry['loss_uncompensated']:.3f}", *_scores(entry)),
            f"{ttft / base:.0%} ({1000 * ttft:.0f})",
        )


def _depth(results: dict[str, Any]) -> Rows:
    yield "followers without attention", "last one dropped", "its similarity", "loss", "accuracy", "first token, ms"
    yield "base", "", "", *_scores(results["base"]), ""
    for entry in results["dropped"]:
        last = str(entry["layers"][-1]) if entry["layers"] else ""
        similarity = f"{results['similarity'][last]:.4f}" if last else ""
        yield str(len(entry["layers"])), last, similarity, *_scores(entry), f"{1000 * entry['ttft']['median']:.0f}"


def _compensation(results: dict[str, Any]) -> Rows:
    yield (
        *("compensation", "follower", "means, fitted: ‖ε‖ → left", "tokens, fitted: left"),
        *("means, held out: left", "tokens, held out: left"),
    )
    for variant in results["variants"]:
        name = f"{variant['method']}, {'full' if variant['rank'] is None else 'rank ' + str(variant['rank'])}"
        for follower in variant["followers"]:
            fit, held_out = follower["fit"], follower["held_out"]
            means = fit["means"]
            left = (norms["left_percent"] for norms in (fit["tokens"], held_out["means"], held_out["tokens"]))
            yield (
                *(name, str(follower["layer"])),
                f"{means['before']:.1f} → {means['after']:.2f} ({means['left_percent']:.1f} %)",
                *(f"{percent:.1f} %" for percent in left),
            )


def _kv(entry: dict[str, Any]) -> str:
    return f"{100 * entry['kv_retain_rate']:.1f} %"


def _scores(entry: dict[str, Any]) -> tuple[str, str]:
    return f"{entry['loss']:.3f}", f"{100 * entry['accuracy']:.1f} %"


_ROWS: dict[str, Callable[[dict[str, Any]], Rows]] = {
    "similarity": _similarity,
    "plan": _plan,
    "sweep": _sweep,
    "depth": _depth,
    "compensation": _compensation,
}
