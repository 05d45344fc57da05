"""An automatic plan: from a budget and some data to Superblocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from ..analysis.similarity import SoftmaxSimilarity, softmax_similarity
from ..plan import check_superblock_size
from ..probe import check_sharing
from ..recording import wrappable_decoder
from .costs import SharingCosts, measure_costs
from .losses import LossCosts, measure_losses
from .partition import best_superblocks, most_followers, too_many
from .similar import similar_superblocks

# The first two take about one pass over the data, the last one many.
ONE_PASS = ("error", "similarity")
METHODS = (*ONE_PASS, "loss")


@dataclass(frozen=True)
class Choice:
    """
    Attributes:
        superblocks: the Superblocks, for `UniAttnConfig(superblocks=...)`.
        measured: what they were chosen by.
        rules: what may be a Superblock, as [`best_superblocks`] takes it.
    """

    superblocks: list[list[int]]
    measured: SharingCosts | SoftmaxSimilarity | LossCosts
    rules: dict[str, Any]

    def with_followers(self, followers: int) -> list[list[int]]:
        """
        Superblocks for another budget, by what was measured already.

        Raises:
            ValueError: if so many followers do not fit.
        """
        return _superblocks(self.measured, followers, self.rules)


def choose_superblocks(
    model: PreTrainedModel,
    dataloader: Iterable[Mapping[str, torch.Tensor]],
    *,
    followers: int | None = None,
    kv_target: float | None = None,
    method: Literal["error", "similarity", "loss"] = "error",
    max_size: int = 4,
    start_layer: int = 0,
    end_layer: int | None = None,
    follower_mask: str = "own",
    ridge: float = 1e-2,
    spill_directory: str | Path | None = None,
    progress: bool = True,
) -> list[list[int]]:
    """
    Choose the Superblocks that cost a model least, by measurements on data before any training.

    Args:
        model: the transformers model, without a UniAttn adapter. It is left as it is.
        dataloader: batches with `input_ids` (batch, length) and optionally `attention_mask`, `position_ids` and, for
            "loss", `labels`. Read once; some ten tokens per hidden dimension are enough.
        followers: how many layers shall follow. Either this or `kv_target`.
        kv_target: share of the KV cache that may be left, such as 0.8; the fewest followers that keep to it are used.
        method: "error" takes what linear compensation leaves of the error of every possible pair of leader and
            follower, and finds the cheapest Superblocks by dynamic programming; "similarity" joins the neighbours
            with the most similar softmax activations (the paper's Table 9); "loss" takes what every possible
            Superblock alone adds to the model's loss, in about `max_size / 2` passes over the data per layer. It is
            the only one that knows the task: use it on a model that was trained for the task, with `labels`.
        max_size: most layers per Superblock.
        start_layer: the lowest layer that may be used.
        end_layer: where the layers that may be used stop, exclusive. Default: the number of layers.
        follower_mask: which masks may be mixed, as in [`UniAttnConfig`].
        ridge: strength of the ridge in "error", as in [`calibrate`].
        spill_directory: where "error" keeps hidden states that memory has no room for. Default: the system's temporary
            directory.
        progress: show progress bars.

    Returns:
        lists of consecutive layer indices, for `UniAttnConfig(superblocks=..., follower_mask=...)`.

    Raises:
        ValueError: if the budget is missing, given twice, or does not fit; for an unknown method, a model that is not
            supported, or no data.
    """
    return choose(
        model,
        dataloader,
        followers=followers,
        kv_target=kv_target,
        method=method,
        max_size=max_size,
        start_layer=start_layer,
        end_layer=end_layer,
        follower_mask=follower_mask,
        ridge=ridge,
        spill_directory=spill_directory,
        progress=progress,
    ).superblocks


def choose(
    model: PreTrainedModel,
    dataloader: Iterable[Mapping[str, torch.Tensor]],
    *,
    followers: int | None = None,
    kv_target: float | None = None,
    method: str = "error",
    max_size: int = 4,
    start_layer: int = 0,
    end_layer: int | None = None,
    follower_mask: str = "own",
    ridge: float = 1e-2,
    spill_directory: str | Path | None = None,
    progress: bool = True,
) -> Choice:
    """[`choose_superblocks`], together with what was measured."""
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not a way to choose Superblocks; use one of {', '.join(METHODS)}")
    if not (math.isfinite(ridge) and ridge > 0):
        raise ValueError(f"ridge={ridge!r} must be a positive number, such as 0.01")
    check_superblock_size(max_size, name="max_size")
    decoder = wrappable_decoder(model)
    layers = _layers(len(decoder.layers), start_layer, end_layer)
    wanted = followers_for(len(decoder.layers), followers=followers, kv_target=kv_target)
    masks = getattr(decoder.backbone.config, "layer_types", None)
    rules: dict[str, Any] = {
        "layers": layers,
        "max_size": max_size,
        "masks": masks,
        "follower_mask": follower_mask,
    }
    if wanted > (most := most_followers(layers, max_size, masks, follower_mask)):
        raise too_many(wanted, most, layers, max_size)
    check_sharing(model, decoder, list(layers))

    measured: SharingCosts | SoftmaxSimilarity | LossCosts
    if method == "similarity":
        measured = softmax_similarity(model, dataloader, progress=progress)
    elif method == "loss":
        measured = measure_losses(model, decoder, dataloader, progress=progress, **rules)
    else:
        measured = measure_costs(
            model, decoder, dataloader, ridge=ridge, spill_directory=spill_directory, progress=progress, **rules
        )
    return Choice(_superblocks(measured, wanted, rules), measured, rules)


def _superblocks(
    measured: SharingCosts | SoftmaxSimilarity | LossCosts, followers: int, rules: dict[str, Any]
) -> list[list[int]]:
    if isinstance(measured, SoftmaxSimilarity):
        return similar_superblocks(measured.neighbours(), followers, **rules)
    costs = measured.pairs if isinstance(measured, LossCosts) else measured.after
    return best_superblocks(costs, followers, **rules)


def followers_for(num_layers: int, *, followers: int | None = None, kv_target: float | None = None) -> int:
    """
    The number of followers that a budget means.

    Args:
        num_layers: decoder layers of the model.
        followers: the number itself.
        kv_target: share of the KV cache that may be left; n followers leave 1 - n / num_layers / 2.

    Raises:
        ValueError: unless exactly one of the two is given, and in range.
    """
    if (followers is None) == (kv_target is None):
        raise ValueError(
            f"followers={followers} and kv_target={kv_target}: give one of the two, for example followers=12 or "
            "kv_target=0.8"
        )
    if followers is not None:
        if isinstance(followers, bool) or not isinstance(followers, int) or followers < 1:
            raise ValueError(f"followers={followers!r} must be an integer of 1 or more")
        return followers
    if isinstance(kv_target, bool) or not isinstance(kv_target, Real):
        raise ValueError(f"kv_target={kv_target!r} must be a number, such as 0.8")
    if not 0.5 < kv_target < 1:
        raise ValueError(
            f"kv_target={kv_target!r} must be above 0.5 and below 1: followers keep their values, so sharing softmax "
            "leaves more than half of the KV cache"
        )
    # Rounded first: 0.8 of 30 layers are 12 followers, although 2 * 30 * (1 - 0.8) is a little less or more.
    return math.ceil(round(2 * num_layers * (1 - kv_target), 9))


def _layers(num_layers: int, start_layer: int, end_layer: int | None) -> range:
    end = num_layers if end_layer is None else end_layer
    if not 0 <= start_layer < end <= num_layers:
        raise ValueError(
            f"start_layer={start_layer} and end_layer={end_layer} name no layers of the model, which has "
            f"{num_layers}; use 0 <= start_layer < end_layer <= {num_layers}"
        )
    return range(start_layer, end)
