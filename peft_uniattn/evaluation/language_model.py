"""lm-eval's Hugging Face model, with answers that begin where those of training begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM

# Context and answer as text, and the tokens of both.
Request = tuple[tuple[str, str], list[int], list[int]]


class LanguageModel(HFLM):
    """
    lm-eval's Hugging Face model.

    A tokenizer may join the end of a prompt and the beginning of an answer in one token: Qwen2.5-Coder's has ":no" for
    "### Response:" and "no". lm-eval then scores what comes after as many tokens as the prompt alone has, which can be
    nothing, and stops. Here, as in training and generation, the prompt keeps its own tokens, and such an answer has
    those that it has by itself.
    """

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both; differ from lm-eval's only where some would belong to both."""
        before, after = super()._encode_pair(context, continuation)
        whole = context + continuation
        if self.backend != "causal" or self.tok_encode(whole)[: len(before)] == before:
            return before, after
        answer = whole[len(context.rstrip()) :]  # lm-eval counts blanks at a prompt's end as the answer's
        return before, self.tok_encode(answer, add_special_tokens=False)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], *args: Any, **options: Any
    ) -> list[tuple[float, bool]]:
        self._check_room(requests)
        return super()._loglikelihood_tokens(requests, *args, **options)

    def _check_room(self, requests: Sequence[Request]) -> None:
        """Raise ValueError, where lm-eval fails without a word, if an answer has no room. Contexts are cut."""
        longest = max((len(answer) for *_, answer in requests), default=0)
        if longest > self.max_length:
            raise ValueError(f"max_length={self.max_length} has no room for an answer of {longest} tokens; use more")
