"""What calibration and measurements need of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

INPUTS = ("input_ids", "attention_mask", "position_ids")


def model_inputs(batch: Any, index: int) -> dict[str, torch.Tensor]:
    """
    The entries of a batch that the backbone takes.

    Raises:
        ValueError: if the batch has no `input_ids`, or tensors that are not of (batch, length).
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"batch {index} of dataloader has no input_ids, found {found}; give it tokenized batches")
    inputs = {key: batch[key] for key in INPUTS if batch.get(key) is not None}
    if any(not isinstance(value, torch.Tensor) or value.dim() != 2 for value in inputs.values()):
        shapes = {key: tuple(getattr(value, "shape", ())) for key, value in inputs.items()}
        raise ValueError(f"batch {index} of dataloader has the shapes {shapes}; use tensors of (batch, length)")
    return inputs


def model_rows(inputs: Mapping[str, torch.Tensor], first: int, end: int) -> dict[str, torch.Tensor]:
    """The rows from `first` up to `end`; what all sequences have in common, of a single row, stays."""
    rows = len(inputs["input_ids"])
    return {key: value[first:end].clone() if len(value) == rows else value for key, value in inputs.items()}


def token_mask(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """True for tokens, False for padding, (batch, length)."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def token_positions(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """How many tokens precede each one in its sequence, padding on either side left out, (batch, length)."""
    return token_mask(inputs).long().cumsum(-1) - 1
