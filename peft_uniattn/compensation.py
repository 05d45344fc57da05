"""
Where the compensation W_c reads and where it adds (https://arxiv.org/abs/2502.00439, Table 8).

This file depends on torch only: standalone models carry a copy of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .families import Family

# What W_c reads: the normalised input of attention, the follower's own value states of the same token, or side by side
# the input and s·V. What reads s·V corrects W_o, and a standalone model has it there.
INPUT, VALUES, INPUT_AND_HEADS = "input", "values", "input_and_heads"
# What its output is added to: the output of attention, that of the whole decoder layer, or the heads' outputs.
ATTENTION_OUTPUT, FFN_OUTPUT, HEADS = "attention_output", "ffn_output", "heads"

NONE = "none"


@dataclass(frozen=True)
class Design:
    """
    A place for W_c.

    Attributes:
        reads: `INPUT`, `VALUES` or `INPUT_AND_HEADS`.
        adds: `ATTENTION_OUTPUT`, `FFN_OUTPUT` or `HEADS`.
    """

    reads: str
    adds: str

    def sizes(self, attention: nn.Module, family: Family, hidden_size: int) -> tuple[int, int]:
        """How many coordinates W_c reads, and to how many it adds."""
        outputs = getattr(attention, family.output).in_features if self.adds == HEADS else hidden_size
        return sum(self.parts(attention, family, hidden_size)), outputs

    def parts(self, attention: nn.Module, family: Family, hidden_size: int) -> tuple[int, ...]:
        """How many coordinates each of the tensors has that W_c reads side by side."""
        if self.reads == INPUT:
            return (hidden_size,)
        if self.reads == VALUES:
            return (family.value_width(attention),)
        return hidden_size, getattr(attention, family.output).in_features

    def source(self, hidden_states: torch.Tensor, value: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """
        What W_c reads.

        Args:
            hidden_states: the normalised input of attention, (batch, length, hidden size).
            value: the value states of the same tokens, (batch, key/value heads, length, head_dim).
            heads: s·V, (batch, length, query heads, head_dim).
        """
        if self.reads == INPUT:
            return hidden_states
        if self.reads == VALUES:
            return value.transpose(1, 2).flatten(2)
        return torch.cat([hidden_states, heads.flatten(2)], dim=-1)


DESIGNS: dict[str, Design] = {
    "attention_output": Design(INPUT, ATTENTION_OUTPUT),
    "ffn_output": Design(INPUT, FFN_OUTPUT),
    "heads": Design(INPUT, HEADS),
    "values_to_heads": Design(VALUES, HEADS),
    "input_and_heads": Design(INPUT_AND_HEADS, ATTENTION_OUTPUT),
}


@dataclass(frozen=True)
class Compensation:
    """
    A follower's compensation.

    Attributes:
        design: where it reads and adds.
        linear: what it computes, x · W_c.
        add: the same added to something, x · W_c + y from y and x, where that is faster than one after the other.
    """

    design: Design
    linear: Callable[[torch.Tensor], torch.Tensor]
    add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def added_to(self, output: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """`output` plus the compensation of `source`; `output` itself may be overwritten."""
        return output + self.linear(source) if self.add is None else self.add(output, source)


def check_design(name: str) -> None:
    """Raise ValueError if `name` is no design of compensation."""
    if name not in DESIGNS and name != NONE:
        raise ValueError(f"compensation={name!r} must be one of {', '.join([*DESIGNS, NONE])}")
