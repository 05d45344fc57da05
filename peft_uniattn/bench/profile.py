"""Where the time of a contender goes: what every kind of kernel takes, and what passes between kernels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# The first pattern that a kernel's name (on a CPU: an operator's) contains says its group.
_GROUPS = {
    "leader": r"^(leader_split|leader_combine|lead|weigh|heaviest|mask_span|normalise)\b",
    "selection": r"^select\b",
    "follower": r"^(follower_split|follower_combine|recompute|stream)\b",
    # torch.compile names its kernels after the operators around them, attention and products included.
    "norms, RoPE, cache": r"^triton_(?!tem_)",
    "fused attention": r"sdpa|flash|fmha|attention",
    "products": r"gemm|gemv|nvjet|cutlass|cublas|splitk|dot_kernel|triton_tem|^aten::(mm|addmm|bmm|linear|matmul)$",
    "copies": r"^mem(cpy|set)",
}
_ELSE = "norms, RoPE, cache"
_LISTED = 40


class Span(NamedTuple):
    """One kernel's time on the device, in microseconds."""

    name: str
    start: float
    end: float


def where_it_goes(run: Callable[[], Any], device: torch.device, repeats: int = 3) -> dict[str, Any]:
    """
    Profile a contender that has run before.

    Profiling takes time of its own, most of it between kernels. What the kernels take holds for the contender as it
    is, and what its measured time exceeds their sum by is spent between them.

    Returns:
        `groups_ms`: what one run spends in each group of kernels; kernels that overlap count once. `between_ms`: the
        rest, on a CPU that of Python. `kernels`: name, group, launches a run and milliseconds of the longest.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        started = perf_counter()
        for _ in range(repeats):
            run()
        if on_gpu:
            torch.cuda.synchronize()
        elapsed_us = 1e6 * (perf_counter() - started)
    if on_gpu:
        on_device = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
        kernels = (event for event in on_device if not event.is_user_annotation)
        spans = [Span(event.name, event.time_range.start, event.time_range.end) for event in kernels]
        return grouped(*exclusive(spans), repeats)
    operators = [(event.key, event.self_cpu_time_total, event.count) for event in profiler.key_averages()]
    return grouped(operators, elapsed_us, repeats)


def exclusive(spans: Iterable[Span]) -> tuple[list[tuple[str, float, int]], float]:
    """
    Microseconds and launches of each kernel, and of everything from the first start to the last end.

    A kernel that starts before those ahead of it have ended counts from then on, so that all add up to no more than
    the whole.
    """
    found: dict[str, tuple[float, int]] = {}
    first = last = None
    for span in sorted(spans, key=lambda span: span.start):
        if first is None:
            first = last = span.start
        time, launches = found.get(span.name, (0.0, 0))
        found[span.name] = time + max(0.0, span.end - max(span.start, last)), launches + 1
        last = max(last, span.end)
    whole = 0.0 if first is None else last - first
    return [(name, time, launches) for name, (time, launches) in found.items()], whole


def grouped(kernels: list[tuple[str, float, int]], whole_us: float, repeats: int) -> dict[str, Any]:
    """What [`where_it_goes`] returns, from (name, microseconds, launches) of all runs together."""
    groups: dict[str, float] = {}
    rows = []
    for name, time, launches in sorted(kernels, key=lambda kernel: -kernel[1]):
        group, milliseconds = group_of(name), time / repeats / 1e3
        groups[group] = groups.get(group, 0.0) + milliseconds
        rows.append({"kernel": name[:120], "group": group, "launches": launches / repeats, "ms": milliseconds})
    return {
        "groups_ms": groups,
        "between_ms": whole_us / repeats / 1e3 - sum(groups.values()),
        "kernels": rows[:_LISTED],
    }


def group_of(kernel: str) -> str:
    """The group that a kernel's or an operator's name belongs to."""
    return next((group for group, pattern in _GROUPS.items() if re.search(pattern, kernel, re.I)), _ELSE)
