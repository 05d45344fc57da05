"""The plot of each analysis, drawn from its result file alone, and readable without colours."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .record import Record

# Curves differ in marker and dash as well as in grey.
_STYLES = [
    {"marker": "o", "linestyle": "-", "color": "0.0"},
    {"marker": "s", "linestyle": "--", "color": "0.35"},
    {"marker": "^", "linestyle": ":", "color": "0.15"},
    {"marker": "D", "linestyle": "-.", "color": "0.5"},
    {"marker": "v", "linestyle": (0, (1, 1)), "color": "0.1"},
    {"marker": "P", "linestyle": (0, (5, 1)), "color": "0.6"},
]
_CHARACTERS_PER_INCH = 15  # of a caption
_LOSS = "held-out loss\n(nats per token)"
_ACCURACY = "held-out next-token\naccuracy (%)"
_TTFT = "time to first token\n(% of the base model)"


def plot(record: Record, path: Path) -> None:
    """
    Draw the figure of a result.

    Args:
        record: the result.
        path: where to write it; the ending decides the format, such as .svg or .png.

    Raises:
        ValueError: if there is no such format.
    """
    check_format(path)
    # Without a date and with a fixed salt, the same result gives the same file.
    with matplotlib.rc_context({"svg.hashsalt": "peft_uniattn", "font.size": 9}):
        figure = _DRAW[record.analysis](record)
        width = int(_CHARACTERS_PER_INCH * figure.get_figwidth())
        figure.supxlabel("\n".join(textwrap.wrap(record.caption, width)), fontsize=7, color="0.3")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


def check_format(path: Path) -> None:
    """Raise ValueError if no plot can be written to a file of this kind."""
    kinds = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix[1:] not in kinds:
        raise ValueError(f"plot={str(path)!r} ends in no known format; use one of {', '.join(kinds)}, such as .svg")


def _similarity(record: Record) -> Figure:
    results = record.results
    matrix = results["per_head"].get("matrix")
    figure, axes = _panels(1, 1 if matrix is None else 2, width=5.0 if matrix is None else 8.5, height=3.2)
    labels = {"per_head": "head against head", "head_mean": "averages over heads"}
    for style, (name, label) in zip(_STYLES, labels.items(), strict=False):
        neighbours = results[name]["neighbours"]
        axes[0].plot(range(1, len(neighbours) + 1), neighbours, label=label, markersize=3, **style)
    _label(axes[0], "layer i", "cosine similarity of softmax\nactivations, layers i and i − 1")
    axes[0].set_ylim(top=1)
    axes[0].legend()
    if matrix is not None:
        image = axes[1].imshow(matrix, cmap="gray", origin="lower", vmin=0, vmax=1)
        _label(axes[1], "layer", "layer")
        figure.colorbar(image, ax=axes[1], label="cosine similarity, head against head")
    return figure


_MEASURED_BY = {
    "error": "error ‖ε‖² relative to the\nresidual stream",
    "similarity": "cosine similarity to the\nlayer below",
    "loss": "what following the layer below\nadds to the loss",
}


def _plan(record: Record) -> Figure:
    results, method = record.results, record.settings["method"]
    figure, (axis,) = _panels(1, 1, width=6.5, height=3.2)
    for style, (label, layers, values) in zip(_STYLES, _measured(results["measured"], method), strict=False):
        axis.plot(layers, values, label=label, markersize=3, **style)
    for block in results["superblocks"]:
        axis.axvspan(block[0] - 0.4, block[-1] + 0.4, color="0.85", zorder=0)
    _label(axis, "layer (chosen Superblocks shaded)", _MEASURED_BY[method])
    # Above, since a peak may be anywhere inside.
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=7, frameon=False)
    return figure


def _measured(measured: dict[str, Any], method: str) -> list[tuple[str, Sequence[int], Sequence[float]]]:
    if method == "similarity":
        values = measured["per_head"]["neighbours"]
        return [("head against head", range(1, len(values) + 1), values)]
    if method == "loss":
        below = [block for block in measured["superblocks"] if block["leader"] == block["last"] - 1]
        layers = [block["last"] for block in below]
        return [("no compensation", layers, [block["loss"] - measured["base"] for block in below])]
    below = [pair for pair in measured["pairs"] if pair["leader"] == pair["follower"] - 1]
    layers = [pair["follower"] for pair in below]
    return [
        ("following the layer below, no compensation", layers, [pair["before"] for pair in below]),
        ("following the layer below, best compensation", layers, [pair["after"] for pair in below]),
    ]


def _sweep(record: Record) -> Figure:
    results, settings = record.results, record.settings
    swept = {name: results[name] for name in ("number", "size") if name in results}
    count = {
        "number": lambda entry: len(entry["superblocks"]),
        "size": lambda entry: entry["size"],
    }
    figure, axes = _panels(3, len(swept), width=3.75 * len(swept), height=6.5)
    titles = {
        "number": f"number of Superblocks\n(of {settings['superblock_size']} layers, from the top)",
        "size": f"layers per Superblock\n({settings['followers']} followers, from the top)",
    }
    for column, (name, entries) in enumerate(swept.items()):
        x = list(map(count[name], entries))
        loss, accuracy, ttft = axes[column :: len(swept)]
        loss.plot(x, [entry["loss_uncompensated"] for entry in entries], label="unified", **_STYLES[1])
        loss.plot(x, [entry["loss"] for entry in entries], label="and calibrated", **_STYLES[0])
        _base(loss, results["base"]["loss"])
        loss.legend(fontsize=7)
        accuracy.plot(x, [100 * entry["accuracy"] for entry in entries], **_STYLES[0])
        _base(accuracy, 100 * results["base"]["accuracy"])
        for statistic, style in (("median", _STYLES[0]), ("fastest", _STYLES[1])):
            relative = [100 * entry["ttft"][statistic] / entry["ttft_base"][statistic] for entry in entries]
            ttft.plot(x, relative, label=statistic, **style)
        ttft.axhline(100, color="0.6", linewidth=0.8)
        ttft.legend(fontsize=7)
        for axis, ylabel in ((loss, _LOSS), (accuracy, _ACCURACY), (ttft, _TTFT)):
            _label(axis, titles[name] if axis is ttft else "", ylabel if column == 0 else "")
    return figure


def _depth(record: Record) -> Figure:
    entries, base = record.results["dropped"], record.results["base"]
    figure, (loss, accuracy, ttft) = _panels(1, 3, width=9, height=3)
    x = [len(entry["layers"]) for entry in entries]
    loss.plot(x, [entry["loss"] for entry in entries], **_STYLES[0])
    _base(loss, base["loss"])
    accuracy.plot(x, [100 * entry["accuracy"] for entry in entries], **_STYLES[0])
    _base(accuracy, 100 * base["accuracy"])
    for statistic, style in (("median", _STYLES[0]), ("fastest", _STYLES[1])):
        ttft.plot(x, [1000 * entry["ttft"][statistic] for entry in entries], label=statistic, **style)
    ttft.legend(fontsize=7)
    for axis, ylabel in ((loss, _LOSS), (accuracy, _ACCURACY), (ttft, "time to first token (ms)")):
        _label(axis, "followers without attention", ylabel)
    return figure


def _compensation(record: Record) -> Figure:
    results = record.results
    figure, axes = _panels(1, 2, width=9, height=4)
    panels = (
        (axes[0], "means", "fit", "per-position means, the sequences\nit was fitted to (Appendix G)"),
        (axes[1], "tokens", "held_out", "all tokens, held-out sequences"),
    )
    for axis, kind, part, title in panels:
        for style, variant in zip(_STYLES, results["variants"], strict=False):
            rank = "full" if variant["rank"] is None else f"rank {variant['rank']}"
            layers = [follower["layer"] for follower in variant["followers"]]
            left = [follower[part][kind]["left_percent"] for follower in variant["followers"]]
            axis.plot(layers, left, label=f"{variant['method']}, {rank}", markersize=4, **style)
        axis.axhline(100, color="0.6", linewidth=0.8)
        axis.set_title(title, fontsize=9)
        axis.set_ylim(bottom=0)
        _label(axis, "follower (layer)", "error left, ‖ε − x·W_c‖ / ‖ε‖ (%)")
    random = results["random_left_percent"]
    axes[0].axhline(random, color="0.4", linestyle=":", label=f"Gaussian random means: {random:.1f} %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=7, frameon=False)
    return figure


_DRAW = {
    "similarity": _similarity,
    "plan": _plan,
    "sweep": _sweep,
    "depth": _depth,
    "compensation": _compensation,
}


def _panels(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _label(axis: Axes, xlabel: str, ylabel: str) -> None:
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.spines[["top", "right"]].set_visible(False)


def _base(axis: Axes, value: float) -> None:
    axis.axhline(value, color="0.6", linewidth=0.8)
    axis.annotate("base", (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7)
