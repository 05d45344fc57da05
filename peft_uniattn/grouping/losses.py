"""What it costs in loss that layers share softmax, one Superblock at a time, measured on data before any training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby, repeat
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..attention import follow, past_key_values
from ..calibration.batches import model_inputs, token_mask
from ..calibration.streams import LayerRunner
from ..families import Decoder, Family
from ..handover import HANDOVER, install_handover, remove_handover
from ..modes import evaluation_mode, replaced_forwards
from ..plan import may_share
from ..recording import intercepted

IGNORE = -100

# What the model takes, and labels.
Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LossCosts:
    """
    Attributes:
        base: loss of the model as it is, in nats per token.
        losses: (leader, topmost follower) -> loss of the model with this one Superblock, without compensation.
        tokens: how many tokens were predicted.
    """

    base: float
    losses: dict[tuple[int, int], float]
    tokens: int

    @property
    def pairs(self) -> dict[tuple[int, int], float]:
        """(leader, follower) -> what the follower adds to the loss when those between the two follow already."""
        below = self.losses | {(leader, leader): self.base for leader, _ in self.losses}
        return {(leader, layer): loss - below[leader, layer - 1] for (leader, layer), loss in self.losses.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        blocks = [{"leader": leader, "last": last, "loss": loss} for (leader, last), loss in self.losses.items()]
        return {"tokens": self.tokens, "base": self.base, "superblocks": blocks}


@torch.no_grad()
def measure_losses(
    model: PreTrainedModel,
    decoder: Decoder,
    dataloader: Iterable[Mapping[str, torch.Tensor]],
    *,
    layers: range,
    max_size: int,
    masks: Sequence[str] | None = None,
    follower_mask: str = "own",
    progress: bool = True,
) -> LossCosts:
    """
    Measure the model's loss with every Superblock that could be, each of them alone and without compensation.

    About `max_size / 2` forward passes a layer over all data, so a few thousand predicted tokens have to be enough.

    Args:
        model: the transformers model, without adapters.
        decoder: its decoder.
        dataloader: batches as for [`~peft_uniattn.calibrate`], kept in memory. Where they have `labels`, only the
            tokens with a label count (-100: none), as in training; else all but padding.
        layers: the layers that may be used.
        max_size: most layers per Superblock.
        masks: the kind of mask of every layer; None if all are alike.
        follower_mask: which masks may be mixed, as in [`~peft_uniattn.UniAttnConfig`].
        progress: show a progress bar.

    Raises:
        ValueError: if no token is predicted, or a loss of the unmodified model is not finite.
    """
    batches = _read(dataloader, model.get_input_embeddings().weight.device)
    tokens = sum(int((labels[:, 1:] != IGNORE).sum()) for _, labels in batches)
    if not tokens:
        raise ValueError(
            "dataloader is empty, or has no token to predict; choosing Superblocks by loss needs some text"
        )
    blocks = [
        range(leader, last + 1)
        for leader in layers
        for last in range(leader + 1, min(leader + max_size, layers.stop))
        if may_share(range(leader, last + 1), masks, follower_mask)
    ]
    runner = LayerRunner(decoder)
    with evaluation_mode(model):
        base = _loss(model, batches) / tokens
        if not torch.isfinite(torch.tensor(base)):
            raise ValueError("the model's loss is not finite; check the data, or use bfloat16 or float32")
        losses = {}
        with tqdm(total=len(blocks), desc="measuring", unit="Superblock", disable=not progress, leave=False) as bar:
            for leader, of_leader in groupby(blocks, key=lambda block: block[0]):
                # What is below a leader does not change: it runs once for all Superblocks of that leader.
                entering = [runner.run_below(inputs, leader) for inputs, _ in batches]
                starts = [partial(runner.starting_at, leader, hidden_states) for hidden_states in entering]
                for block in of_leader:
                    with _sharing(decoder, block):
                        losses[leader, block[-1]] = _loss(model, batches, starts) / tokens
                    bar.update()
    return LossCosts(base, losses, tokens)


def _read(dataloader: Iterable, device: torch.device) -> list[Batch]:
    batches = []
    for index, batch in enumerate(dataloader):
        inputs = {key: value.to(device) for key, value in model_inputs(batch, index).items()}
        labels = batch.get("labels")
        labels = inputs["input_ids"] if labels is None else labels.to(device)
        batches.append((inputs, labels.masked_fill(~token_mask(inputs), IGNORE)))
    return batches


def _loss(
    model: PreTrainedModel, batches: list[Batch], starts: Sequence[Callable[[], AbstractContextManager]] | None = None
) -> float:
    """Summed over all tokens; each batch begins as `starts` says, by default with its token ids."""
    total = 0.0
    for (inputs, labels), start in zip(batches, starts or repeat(nullcontext), strict=False):
        # On the CPU, from where a model that is spread over GPUs can take it to the last one.
        columns = (labels[:, 1:] != IGNORE).any(0).nonzero().squeeze(1).cpu()
        with start():
            logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits.float()
        targets = labels[:, 1:][:, columns].to(logits.device)
        total += nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
        ).item()
    return total


@contextmanager
def _sharing(decoder: Decoder, block: Sequence[int]) -> Iterator[None]:
    """Let the layers of `block` above its lowest use that one's softmax."""
    followers = [decoder.attention(layer) for layer in block[1:]]
    forwards = ((attention, partial(_follow, attention, decoder.family, block[0])) for attention in followers)
    with intercepted(decoder, range(len(decoder.layers))), replaced_forwards(forwards):
        install_handover(decoder.backbone)
        try:
            yield
        finally:
            remove_handover(decoder.backbone)


def _follow(
    attention: nn.Module, family: Family, leader: int, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return follow(attention, family, leader, hidden_states, kwargs.get(HANDOVER), past_key_values(kwargs))
