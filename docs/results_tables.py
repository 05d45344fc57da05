"""One table per family of raw results, from the content of a file of `docs/results` to Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from results_goals import goals

from peft_uniattn.analysis.record import Record as Analysis
from peft_uniattn.analysis.tables import markdown
from peft_uniattn.bench.serve import rows as runs_served
from peft_uniattn.reproduce.cell import CellResult
from peft_uniattn.reproduce.table import notes, table

Raw = dict[str, Any]


def rows_of(raw: Raw) -> list[CellResult]:
    """Results of `peft-uniattn reproduce`; its first files called them rows."""
    return [CellResult(**row) for row in raw.get("results") or raw["rows"]]


def reproduce(raw: Raw) -> str:
    results = rows_of(raw)
    parts = [table(results), notes(results)]
    if reached := goals(results):
        head = ("goal", "mean accuracy", "points ± s.e.", "seeds", "verdict")
        parts += ["What the recipe is [meant to reach](../quality.md), seed by seed:", grid(head, reached)]
    return "\n\n".join(parts)


def analysis(raw: Raw) -> str:
    return markdown(Analysis(**raw))


def first_token(raw: Raw) -> str:
    lines = []
    for row in raw["lengths"]:
        for name, contender in _timed(row["contenders"]):
            time = f"{contender['median_ms']:.1f}"
            lines.append((f"{row['length']:,}", name, time, _quartiles(contender), _ratio(row, contender)))
    table = grid(("tokens", "contender", "median ms", "quartiles", "of the fastest base"), lines)
    return table + _profiles(raw["lengths"])


def decode(raw: Raw) -> str:
    lines = []
    for row in raw["shapes"]:
        for name, contender in _timed(row["contenders"]):
            time, rate = f"{contender['median_ms']:.2f}", f"{contender['gb_per_s']:,.0f}"
            cells = (time, _quartiles(contender, 2), _ratio(row, contender), rate)
            lines.append((f"{row['batch_size']} × {row['length']:,}", name, *cells))
    table = grid(("cached tokens", "contender", "median ms", "quartiles", "of the fastest base", "GB/s"), lines)
    return table + _profiles(raw["shapes"])


def _profiles(rows: list[Raw]) -> str:
    """Where the time goes, of contenders that were profiled."""
    profiled = [(row, name, one) for row in rows for name, one in row["contenders"].items() if "profile" in one]
    if not profiled:
        return ""
    groups = list(dict.fromkeys(group for *_, one in profiled for group in one["profile"]["groups_ms"]))
    lines = []
    for row, name, one in profiled:
        times = one["profile"]["groups_ms"]
        cells = [f"{times[group]:.2f}" if group in times else "–" for group in groups]
        between = one["median_ms"] - sum(times.values())
        shape = f"{row['batch_size']} × {row['length']:,}" if "batch_size" in row else f"{row['length']:,}"
        lines.append((shape, name, *cells, f"{between:.2f}"))
    head = ("tokens", "ms of one run", *groups, "the rest of the median")
    return f"\n\n{grid(head, lines)}"


def decode_attention(raw: Raw) -> str:
    lines = []
    for row in raw["shapes"]:
        for name, contender in row["contenders"].items():
            if "median_us" not in contender:
                continue
            cells = (f"{contender['median_us']:.1f}", f"{contender['gb_per_s']:,.0f}")
            cells += (_error(contender["relative_error"]),)
            lines.append((f"{row['batch']} × {row['length']:,}", name, *cells))
    return grid(("cached tokens", "contender", "median µs", "GB/s", "relative error"), lines)


def prefill_attention(raw: Raw) -> str:
    lines = [
        (f"{row['length']:,}", name, f"{one['median_ms']:.2f}", _quartiles(one, 2), _error(one["relative_error"]))
        for row in raw["lengths"]
        for name, one in _timed(row["contenders"])
    ]
    fewest = ", ".join(
        f"{row['followers_to_pay'] or 'no number of'} followers at {row['length']:,} tokens" for row in raw["lengths"]
    )
    shape = f"{raw['query_heads']} query and {raw['kv_heads']} key heads of {raw['head_dim']}"
    said = f"{shape}. With a share of {raw['kept']:g} of the tiles kept, weighing them pays from {fewest} on."
    return f"{grid(('tokens', 'one layer', 'median ms', 'quartiles', 'relative error'), lines)}\n\n{said}"


def memory(raw: Raw) -> str:
    names = ("followers", "counted_bytes_per_token", "allocated_bytes_per_token")
    lines = [(name, *(f"{row[key]:,.0f}" for key in names)) for name, row in raw["contenders"].items()]
    return grid(("", "followers", "bytes per token, counted", "by the allocator"), lines)


def training_steps(raw: Raw) -> str:
    lines = [
        (
            name,
            f"{row['trainable_parameters']:,}",
            f"{1e3 * row['step_seconds']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_memory_bytes'] / 2**30:.1f}",
        )
        for name, row in raw["contenders"].items()
    ]
    return grid(("step", "trained parameters", "median ms", "tokens/s", "peak GiB"), lines)


def serving(raw: Raw) -> str:
    lines = [(*first, preempted) for *first, _, preempted in runs_served(raw)]  # without how many ran at once
    head = ("", "requests/s", "completed", "output tokens/s", "TTFT ms, median / p99", "ms per token, median / p99")
    return grid((*head, "preemptions"), lines)


def losses(raw: Raw) -> str:
    """A run of the recipe: the quick start's receipt, or that of a real checkpoint."""
    raw = {**raw, **raw.get("receipt", {})}
    blocks = " ".join(f"{block[0]}-{block[-1]}" for block in raw["superblocks"])
    lines = [(step, f"{loss:.4f}") for step, loss in raw["losses"].items()]
    before, after = raw["kv_bytes_before"], raw["kv_bytes_after"]
    facts = f"Superblocks {blocks} of {raw['num_layers']} layers; KV bytes per token {before:,} → {after:,}."
    return f"{grid(('', 'held-out loss, nats per completion token'), lines)}\n\n{facts}"


def reliability(raw: Raw) -> str:
    modules = raw["mutants"]["modules"].values()
    counts = {**raw["counts"], "mutants": sum(module["mutants"] for module in modules)}
    counts["mutants killed"] = sum(module["killed"] for module in modules)
    counts |= {f"tests {ended}": number for ended, number in raw["tests"].items()}
    return grid(("", "number"), [(name, f"{number:,}") for name, number in counts.items()])


def eviction(raw: Raw) -> str:
    lines = [
        (row["model"], f"{row['compression']:.0%}", f"{row['perplexity']:.1f}", f"{row['kv_retain_rate']:.1%}")
        for row in raw["rows"]
    ]
    return grid(("", "evicted", "perplexity", "of the base's cache"), lines)


def real_text(raw: Raw) -> str:
    lines = []
    for part, rows in raw.items():
        for row in rows if isinstance(rows, list) and rows and isinstance(rows[0], dict) else ():
            kept = "all" if row["kept_share"] is None else f"{row['kept_share']:.0%}"
            settings = (part, row["kernels"], f"{row['skip_mass']:.0%}", kept)
            if "perplexity" in row:
                difference = f"{row['mean_difference_of_losses']:+.4f} / {row['mean_absolute_difference']:.4f}"
                lines.append((*settings, f"perplexity {row['perplexity']:.2f}", difference))
            else:
                margins = [first["margin"] for first in row["first_differences"] if first]
                largest = f"largest logit margin where they part: {max(margins):g}" if margins else "–"
                lines.append((*settings, f"{row['equal_tokens']:.0%} equal tokens", largest))
    head = (
        "part",
        "kernels",
        "mass left out",
        "tiles or blocks kept",
        "",
        "against no kernels, nats (mean / absolute)",
    )
    return grid(head, lines)


def kept_tiles(raw: Raw) -> str:
    shares: dict[tuple[int, float, int], list[tuple[float, float]]] = {}
    for row in raw["rows"]:
        shares.setdefault((row["length"], row["skip_mass"], row["layer"]), []).append((row["prompt"], row["decoded"]))
    lines = [
        (
            f"{length:,}",
            f"{mass:.0%}",
            str(layer),
            *(f"{sum(part) / len(part):.2f}" for part in zip(*found, strict=True)),
        )
        for (length, mass, layer), found in sorted(shares.items())
    ]
    return grid(("tokens", "mass left out", "leader", "tiles kept, prompt", "blocks kept, decoded"), lines)


def rivals(raw: Raw) -> str:
    lines = [
        (name, row.get("plan", "–"), f"{row['held_out_loss']:.3f}", f"{row['kv_bytes_per_token']:,}")
        for name, row in raw["methods"].items()
    ]
    return grid(("method, not trained", "layers changed", "held-out loss", "KV bytes per token"), lines)


def distillation(raw: Raw) -> str:
    lines = [(f"before: {name}", f"{loss:.4f}") for name, loss in raw["losses_before"].items()]
    lines += [(name, f"{run['held_out_loss']['after stage 1']:.4f}") for name, run in raw["runs"].items()]
    return grid(("stage 1 by", "held-out loss after it"), lines)


def levers(raw: Raw) -> str:
    """Rows of `examples/explore_recipe.py`, or of `match_heads.py` or `share_heads.py`, which choose what follows."""
    lines = [
        (
            row["name"],
            ", ".join(f"{name} {_brief(value)}" for name, value in _differing(row).items()) or "–",
            f"{row['converted_held_out_loss']:.3f}" if "converted_held_out_loss" in row else "–",
            f"{row['held_out_loss']:.4f}",
            f"{sum(asked) / len(asked):.1f}" if (asked := row["accuracy"].values()) else "–",
        )
        for row in raw["rows"]
    ]
    head = ("", "what differs", "held-out loss right after conversion", "at the end", "mean accuracy")
    notes = "\n".join(f"- {note}" for note in raw.get("notes", ()))
    return f"{grid(head, lines)}\n\n{notes}".strip()


def ranks(raw: Raw) -> str:
    names = ("loss", "logits", "gradients", "weights")
    lines = [
        (name, *(f"{row[key]:.1e}" if key in row else "–" for key in names)) for name, row in raw["results"].items()
    ]
    said = "\n".join(f"- {note}" for note in raw["notes"])
    return f"{grid(('against one process, difference of', *names), lines)}\n\n{said}"


def grid(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _differing(row: Raw) -> Raw:
    """The options of a row, and what follows where that was chosen."""
    return row["options"] | {name: row[name] for name in ("superblocks", "heads") if row.get(name)}


def _brief(value: Any) -> str:
    """Superblocks by their first and last layers, heads by their layer, everything else as it is."""
    if isinstance(value, dict):
        return " ".join(f"{layer}:{'/'.join(map(str, heads))}" for layer, heads in value.items())
    if isinstance(value, list):
        return " ".join(f"{part[0]}-{part[-1]}" if isinstance(part, list) else str(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _timed(contenders: dict[str, Raw]) -> Iterable[tuple[str, Raw]]:
    return ((name, contender) for name, contender in contenders.items() if "median_ms" in contender)


def _ratio(row: Raw, contender: Raw) -> str:
    """Of the fastest base's time; there is none where no base was right."""
    fastest = row["ratios"].get("fastest_base")
    return f"{contender['median_ms'] / row['contenders'][fastest]['median_ms']:.3f}" if fastest else "–"


def _error(error: float | None) -> str:
    return "–" if error is None else f"{error:.1e}"


def _quartiles(contender: Raw, digits: int = 1) -> str:
    low, high = contender["lower_quartile_ms"], contender["upper_quartile_ms"]
    return f"{low:.{digits}f} to {high:.{digits}f}"
