"""Time to first token."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from ..modes import evaluation_mode


@dataclass(frozen=True)
class FirstToken:
    """
    Attributes:
        median: of all repetitions, in seconds.
        fastest: in seconds; on a machine with other work the steadier of the two.
    """

    median: float
    fastest: float


@torch.no_grad()
def times_to_first_token(
    model: nn.Module,
    contenders: Mapping[str, Callable[[], AbstractContextManager]],
    *,
    length: int,
    repetitions: int,
) -> dict[str, FirstToken]:
    """
    Time from a prompt to its first new token: a prefill with a fresh cache at batch 1, and the choice of the token.

    Contenders take turns, so that a machine which slows down does so for all of them.

    Args:
        model: a causal language model, with an adapter or not.
        contenders: name -> what makes a context in which `model` is that contender.
        length: tokens of the prompt.
        repetitions: how often to measure each, after one warm-up.
    """
    prompt = torch.arange(length, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with evaluation_mode(model):
        for repetition in range(repetitions + 1):
            for name, context in contenders.items():
                with context():
                    started = time.perf_counter()
                    logits = model(input_ids=prompt, use_cache=True, logits_to_keep=1).logits
                    logits[0, -1].argmax().item()  # waits for the device
                    if repetition:
                        seconds[name].append(time.perf_counter() - started)
    return {name: FirstToken(statistics.median(values), min(values)) for name, values in seconds.items()}
