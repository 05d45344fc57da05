"""lm-eval's Hugging Face model, with answers that begin where those of training begin."""

from __future__ import annotations

from lm_eval.models.huggingface import HFLM

from ..training.data import common_prefix


class LanguageModel(HFLM):
    """
    lm-eval's Hugging Face model.

    A tokenizer may join the end of a prompt and the beginning of an answer in one token: Qwen2.5-Coder's has ":right"
    for "### Response:" and "right". lm-eval then scores what comes after as many tokens as the prompt alone has, which
    can be nothing, and stops. Here, as in training, such an answer begins with the joint token.
    """

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both; differ from lm-eval's only where some belong to both."""
        before, after = super()._encode_pair(context, continuation)
        whole = self.tok_encode(context + continuation)
        if self.backend != "causal" or whole[: len(before)] == before:
            return before, after
        start = common_prefix(before, whole)
        return whole[:start], whole[start:]
