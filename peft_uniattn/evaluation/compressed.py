"""lm-eval on a cache that H2O compresses: every token that is scored is predicted from what the cache has kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from ..eviction import H2OCache, h2o
from .language_model import LanguageModel, Request

# Requests at a time for each that a forward over whole texts would have, whose logits fill its memory.
_MORE = 4


class _Request(NamedTuple):
    """What is asked: the log-likelihood of the tokens `answer` after the tokens `context`."""

    number: int
    context: list[int]
    answer: list[int]


class H2OLanguageModel(LanguageModel):
    """
    lm-eval's Hugging Face model, decoding with an [`H2OCache`].

    lm-eval scores an answer in one forward over context and answer, where no cache is needed and so none can be
    compressed. Here the context but for its last token is prefilled and the cache compressed; that last token and the
    answer's follow one at a time, as in decode, with the cache compressed after each. So every token of the answer,
    the first one too, is predicted from a compressed cache.

    Args:
        budget: share of the tokens that each head keeps, see [`H2OCache`].
        options: what lm-eval's `HFLM` takes.
    """

    def __init__(self, *, budget: float, **options: Any) -> None:
        super().__init__(**options)
        self._budget = budget

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Sum of the log-probabilities of each answer's tokens, and whether each was the most probable one."""
        self._check_room(requests)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        # Too long ones are cut from the left, as lm-eval does.
        asked = [
            _Request(number, context[-(self.max_length + 1 - len(answer)) :], answer)
            for number, (_, context, answer) in enumerate(requests)
        ]
        with h2o(self.model), torch.no_grad(), tqdm(total=len(asked), desc="H2O", disable=disable_tqdm) as bar:
            for batch in _batches(asked, _MORE * (override_bs or self.batch_size)):
                for request, score in zip(batch, self._scores(batch), strict=True):
                    found[request.number] = score
                bar.update(len(batch))
        return found

    def _scores(self, batch: Sequence[_Request]) -> list[tuple[float, bool]]:
        lengths = torch.tensor([len(request.answer) for request in batch], device=self.device)
        longest = int(lengths.max())
        answers = torch.tensor(
            [request.answer + [0] * (longest - len(request.answer)) for request in batch], device=self.device
        )
        ids = torch.cat([torch.tensor([request.context for request in batch], device=self.device), answers], dim=1)
        context = ids.shape[1] - longest
        cache, first = H2OCache(self._budget), max(1, context - 1)
        total = torch.zeros(len(batch), dtype=torch.float64, device=self.device)
        greedy = torch.ones(len(batch), dtype=torch.bool, device=self.device)
        for begin, end in [(0, first), *((last, last + 1) for last in range(first, ids.shape[1] - 1))]:
            output = self.model(ids[:, begin:end], past_key_values=cache, use_cache=True, logits_to_keep=1)
            if (position := end - context) < 0:
                continue
            logs = output.logits[:, -1].float().log_softmax(-1)
            token, counts = answers[:, position], position < lengths
            total += torch.where(counts, logs.gather(-1, token[:, None])[:, 0].double(), 0.0)
            greedy &= ~counts | (logs.argmax(-1) == token)
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise ValueError(
            "h2o_budget is for tasks whose answers are given and scored; use peft_uniattn.h2o and H2OCache with "
            "generate() to measure a task that generates"
        )


def _batches(requests: Sequence[_Request], size: int) -> Iterator[list[_Request]]:
    """Requests whose contexts are equally long, so that no padding takes room in the cache; alike ones together."""
    ordered = sorted(requests, key=lambda request: (len(request.context), len(request.answer)))
    for _, group in groupby(ordered, key=lambda request: len(request.context)):
        alike = list(group)
        yield from (alike[first : first + size] for first in range(0, len(alike), size))
