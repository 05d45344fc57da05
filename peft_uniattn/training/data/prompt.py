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
    """
    Tokens of examples, uncut: by the paper's prompt with an end of sequence, or by the chat template.

    Those of the prompt are as they are without the answer, so that training asks what generation asks. Where a
    tokenizer would join the end of the prompt and the beginning of the answer in one token (Qwen2.5's has ":no" for
    "### Response:" and "no"), the answer is tokenized by itself.
    """
    if not examples:
        return []
    return (_encode_paper if prompt_style == "paper" else _encode_chat)(examples, tokenizer)


def encode_pairs(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str]) -> list[Encoded]:
    """Tokens of prompts and their answers, see [`encode`]; an end of sequence follows if the tokenizer appends it."""
    wholes = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    eos = tokenizer.eos_token_id
    prompt_ids = [
        ids[:-1] if ids[-1:] == [eos] else ids  # some tokenizers append it themselves
        for ids in tokenizer(list(prompts))["input_ids"]
    ]
    return [
        Encoded(list(whole), len(prompt)) if whole[: len(prompt)] == prompt else _apart(tokenizer, prompt, answer)
        for prompt, whole, answer in zip(prompt_ids, tokenizer(wholes)["input_ids"], answers, strict=True)
    ]


def _apart(tokenizer: PreTrainedTokenizerBase, prompt: list[int], answer: str) -> Encoded:
    return Encoded([*prompt, *tokenizer(answer, add_special_tokens=False)["input_ids"]], len(prompt))


def _encode_paper(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    prompts = [PAPER_PROMPT.format(instruction=example.instruction, input=example.input) for example in examples]
    pairs = encode_pairs(tokenizer, prompts, [example.output for example in examples])
    eos = tokenizer.eos_token_id
    return [Encoded(ids if ids[-1] == eos else [*ids, eos], start) for ids, start in pairs]


def _encode_chat(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    prompts = [example.prompt_messages for example in examples]
    wholes = [[*example.prompt_messages, *example.completion_messages] for example in examples]
    settings = {"tokenize": True, "return_dict": True}
    prompt_ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, **settings)["input_ids"]
    whole_ids = tokenizer.apply_chat_template(wholes, **settings)["input_ids"]
    encoded = []
    for messages, conversation, prompt, whole in zip(prompts, wholes, prompt_ids, whole_ids, strict=True):
        # Shorter than the prompt if a token is joined, or if the template ends an answered prompt in another way.
        start = _common_prefix(prompt, whole)
        if start < len(prompt):
            before = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            after = tokenizer.apply_chat_template(conversation, tokenize=False)
            if after.startswith(before):
                encoded.append(_apart(tokenizer, prompt, after.removeprefix(before)))
                continue
        encoded.append(Encoded(list(whole), start))
    return encoded


def _common_prefix(first: list[int], second: list[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))
