"""The prompt of the paper, and the tokens of an example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from .formats import Example

# Appendix A of arXiv 2502.00439. An empty instruction or input leaves its place empty.
PAPER_PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


class Encoded(NamedTuple):
    """
    Attributes:
        ids: tokens of the prompt and the answer, end of sequence included.
        start: where the answer begins in them.
    """

    ids: list[int]
    start: int


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, prompt_style: str) -> None:
    """Raise ValueError if the tokenizer lacks what `prompt_style` needs."""
    if prompt_style == "chat" and tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; use an instruction-tuned model's, set "
            'tokenizer.chat_template, or choose prompt_style="paper"'
        )
    if prompt_style == "paper" and tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, with which every answer ends; "
            "set tokenizer.eos_token"
        )


def encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, prompt_style: str) -> list[Encoded]:
    """Tokens of examples, uncut: by the paper's prompt with an end of sequence, or by the chat template."""
    if not examples:
        return []
    encoder = _encode_paper if prompt_style == "paper" else _encode_chat
    prompts, wholes = encoder(examples, tokenizer)
    return [Encoded(list(whole), common_prefix(prompt, whole)) for prompt, whole in zip(prompts, wholes, strict=True)]


def _encode_paper(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[list[int]]]:
    prompts = [PAPER_PROMPT.format(instruction=example.instruction, input=example.input) for example in examples]
    wholes = [prompt + example.output for prompt, example in zip(prompts, examples, strict=True)]
    eos = tokenizer.eos_token_id
    whole_ids = [
        ids if ids[-1] == eos else [*ids, eos]  # some tokenizers append it themselves
        for ids in tokenizer(wholes)["input_ids"]
    ]
    return tokenizer(prompts)["input_ids"], whole_ids


def _encode_chat(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[list[int]]]:
    prompts = [example.prompt_messages for example in examples]
    wholes = [[*example.prompt_messages, *example.completion_messages] for example in examples]
    settings = {"tokenize": True, "return_dict": True}
    return (
        tokenizer.apply_chat_template(prompts, add_generation_prompt=True, **settings)["input_ids"],
        tokenizer.apply_chat_template(wholes, **settings)["input_ids"],
    )


def common_prefix(first: list[int], second: list[int]) -> int:
    """How long both are alike. Tokens may merge across the boundary, so an answer starts where the two differ."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))
