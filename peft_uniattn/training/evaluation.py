"""Held-out loss and a sample answer, the same way for every model that is compared."""

from __future__ import annotations

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..modes import evaluation_mode
from .data import IGNORE, batches


@torch.no_grad()
def held_out_loss(
    model: nn.Module, dataset: Dataset, pad_token_id: int, *, batch_size: int = 8, name: str = "held-out loss"
) -> float:
    """
    Mean cross-entropy in nats per completion token.

    Args:
        model: a causal language model, with an adapter or not.
        dataset: `input_ids` and `labels`.
        pad_token_id: for filling up batches.
        batch_size: rows per forward pass; it does not change the result.
        name: shown at the progress bar.
    """
    total, tokens = 0.0, 0
    steps = -(-len(dataset) // batch_size)
    with evaluation_mode(model):
        for batch in tqdm(batches(dataset, batch_size, pad_token_id, model.device), name, steps, leave=False):
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch, use_cache=False).logits[:, :-1]
            losses = nn.functional.cross_entropy(
                logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
            )
            total += losses.item()
            tokens += int((labels != IGNORE).sum())
    return total / tokens


@torch.no_grad()
def sample_answer(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: list[dict[str, str]], *, max_new_tokens: int = 60
) -> str:
    """The model's greedy answer to a conversation."""
    inputs = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    with evaluation_mode(model):
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
