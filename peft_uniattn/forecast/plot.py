"""A plan and what it saves, in one picture that is readable without colours."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..analysis.plots import check_format
from .forecast import Forecast

_KEYS, _VALUES, _WEIGHTS = "0.45", "0.75", "0.95"


def plot(forecast: Forecast, path: Path) -> None:
    """
    Draw what every layer caches, and what a decoded token reads.

    Args:
        forecast: what to draw.
        path: where to write it; the ending decides the format, such as .svg or .png.

    Raises:
        ValueError: if there is no such format.
    """
    check_format(path)
    with matplotlib.rc_context({"svg.hashsalt": "peft_uniattn", "font.size": 9}):
        figure = Figure(figsize=(8.5, 4.2), layout="constrained")
        layers, step = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_layers(layers, forecast)
        _draw_step(step, forecast)
        serving = forecast.serving
        caption = (
            f"{forecast.model}, {_stored_as(forecast)}, {serving.batch_size} sequences of {serving.context:,} cached "
            "tokens; counted from the configuration, nothing measured"
        )
        figure.supxlabel("\n".join(textwrap.wrap(caption, 110)), fontsize=7, color="0.3")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


def _stored_as(forecast: Forecast) -> str:
    serving = forecast.serving
    bits = {"weights": serving.weight_bits, "cache": serving.cache_bits}
    return ", ".join([serving.dtype, *(f"{name} of {value:g} bits" for name, value in bits.items() if value)])


def _draw_layers(axis: Axes, forecast: Forecast) -> None:
    plan = forecast.plan
    half = forecast.kv_bytes_per_token / plan.num_layers / 2
    layers, followers = range(plan.num_layers), set(plan.followers)
    style = {"edgecolor": "0.2", "linewidth": 0.4, "width": 0.85}
    axis.bar(layers, half, color=_VALUES, label="V", **style)
    keys = [layer for layer in layers if layer not in followers]
    axis.bar(keys, half, bottom=half, color=_KEYS, label="K", **style)
    for block in plan.superblocks:
        axis.plot((block[0] - 0.4, block[-1] + 0.4), (2.12 * half,) * 2, color="0", linewidth=1.5)
        axis.annotate("leader", (block[0], 2.16 * half), rotation=90, ha="center", va="bottom", fontsize=7)
    axis.set(xlabel="layer (a line over each Superblock)", ylabel="KV cache, bytes per token", ylim=(0, 2.8 * half))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper left", ncols=2, frameon=False)


def _draw_step(axis: Axes, forecast: Forecast) -> None:
    steps = {"base": forecast.base}
    for one in forecast.unified:
        steps["full W_c" if one.rank is None else f"rank {one.rank}"] = one
    weights = [one.weight_bytes / 1e9 for one in steps.values()]
    style = {"edgecolor": "0.2", "linewidth": 0.4, "width": 0.7}
    axis.bar(list(steps), weights, color=_WEIGHTS, label="weights", **style)
    cached = [one.kv_bytes / 1e9 for one in steps.values()]
    axis.bar(list(steps), cached, bottom=weights, color=_VALUES, label="KV cache", **style)
    for index, one in enumerate(steps.values()):
        text = f"{one.bound_ms:.2f} ms"
        axis.annotate(text, (index, one.bytes / 1e9), ha="center", va="bottom", fontsize=8)
    top = forecast.base.bytes / 1e9
    label = f"read for a decoded token, GB\n(times at {forecast.serving.gb_per_s:,.0f} GB/s)"
    axis.set(ylabel=label, ylim=(0, 1.3 * top))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper left", ncols=2, frameon=False)
