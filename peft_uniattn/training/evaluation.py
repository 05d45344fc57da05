"""Held-out loss and a sample answer, the same way for every model that is compared."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..modes import evaluation_mode
from .data import IGNORE, batches

Evaluation = Callable[[PreTrainedModel, PreTrainedTokenizerBase], dict[str, float]]


@dataclass(frozen=True)
class Scores:
    """
    Attributes:
        loss: mean cross-entropy in nats per completion token.
        accuracy: share of completion tokens that the model holds to be the most probable, 0 to 1.
    """

    loss: float
    accuracy: float


def held_out_loss(
    model: nn.Module, dataset: Dataset, pad_token_id: int, *, batch_size: int = 8, name: str = "held-out loss"
) -> float:
    """Mean cross-entropy in nats per completion token; arguments as in [`held_out_scores`]."""
    return held_out_scores(model, dataset, pad_token_id, batch_size=batch_size, name=name).loss


@torch.no_grad()
def held_out_scores(
    model: nn.Module, dataset: Dataset, pad_token_id: int, *, batch_size: int = 8, name: str = "held-out loss"
) -> Scores:
    """
    How well a model predicts completions.

    Args:
        model: a causal language model, with an adapter or not.
        dataset: `input_ids` and `labels`.
        pad_token_id: for filling up batches.
        batch_size: rows per forward pass; it does not change the result.
        name: shown at the progress bar.
    """
    total, right, tokens = 0.0, 0, 0
    steps = -(-len(dataset) // batch_size)
    with evaluation_mode(model):
        for batch in tqdm(batches(dataset, batch_size, pad_token_id, model.device), name, steps, leave=False):
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch, use_cache=False).logits[:, :-1]
            losses = nn.functional.cross_entropy(
                logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
            )
            total += losses.item()
            right += int((logits.argmax(-1) == labels).sum())
            tokens += int((labels != IGNORE).sum())
    return Scores(total / tokens, right / tokens)


@torch.no_grad()
def sample_answer(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: list[int], *, max_new_tokens: int = 60
) -> str:
    """The model's greedy answer to a prompt of token ids."""
    ids = torch.tensor([prompt], device=model.device)
    with evaluation_mode(model):
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
        )
    return tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip()


def find_evaluation(name: str) -> Evaluation:
    """
    The function that `name`, as "module:function", stands for.

    Raises:
        ValueError: if there is no such function.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"evaluation={name!r} cannot be imported ({error}); put its file into this folder or into PYTHONPATH"
        ) from error
