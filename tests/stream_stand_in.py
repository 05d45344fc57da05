"""
A model of CUDA streams for offloaded caches on a CPU: what a stream fetches is NaN until somebody waits for it.

With it, code that reads a layer of an offloaded cache too early does so every time, instead of rarely under load.
"""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicLayer


class Stream:
    """Runs its copies when another stream waits for it; the default stream runs them at once, in order."""

    entered: list[Stream] = []

    def __init__(self) -> None:
        self.is_default = False
        self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    def copy(self, source: torch.Tensor) -> torch.Tensor:
        target = source.clone() if self.is_default else torch.full_like(source, torch.nan)
        self.pending.append((target, source))
        return target

    def wait_stream(self, other: Stream) -> None:
        for target, source in other.pending:
            target.copy_(source)
        other.pending.clear()

    def __enter__(self) -> Stream:
        self.entered.append(self)
        return self

    def __exit__(self, *_) -> None:
        self.entered.pop()


def offload(layer: DynamicLayer) -> None:
    layer.is_away = True


def prefetch(layer: DynamicLayer) -> None:
    if getattr(layer, "is_away", False):
        stream = Stream.entered[-1]
        layer.keys, layer.values = stream.copy(layer.keys), stream.copy(layer.values)
        layer.is_away = False


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers' offloaded dynamic caches run on a CPU, on streams as above."""
    default = Stream()
    default.is_default = True
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: default)
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(DynamicLayer, "offload", offload)
    monkeypatch.setattr(DynamicLayer, "prefetch", prefetch)
