"""Number and size of Superblocks against quality and time (Figure 4 of https://arxiv.org/abs/2502.00439)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..config import UniAttnConfig
from ..plan import may_share
from ..recording import wrappable_decoder
from ..training.evaluation import held_out_scores
from .data import Sequences
from .timing import times_to_first_token
from .unified import calibrated_scores, unified

VARY = ("number", "size", "both")


@dataclass(frozen=True)
class SweepSettings:
    """
    Attributes:
        superblock_size: layers per Superblock while their number varies.
        followers: how many layers follow while the size varies.
        vary: "number", "size" or "both".
        rank: rank of the compensation; None: full.
        method: calibration method.
        follower_mask: which masks may be mixed.
        batch_size: sequences per forward pass.
        ttft_length: tokens of the prompt whose first token is timed.
        ttft_repetitions: how often.
    """

    superblock_size: int = 4
    followers: int = 12
    vary: str = "both"
    rank: int | None = None
    method: str = "ridge"
    follower_mask: str = "own"
    batch_size: int = 8
    ttft_length: int = 512
    ttft_repetitions: int = 5


def sweep(
    model: PreTrainedModel, data: Sequences, settings: SweepSettings, *, progress: bool = True
) -> dict[str, Any]:
    """
    Calibrate a model under plans of growing number and of growing size of Superblocks, and score each.

    As in the paper, Superblocks are filled in from the top layer downward. Nothing is trained.

    Args:
        model: a transformers model without a UniAttn adapter.
        data: sequences to calibrate on, and held-out ones.
        settings: see [`SweepSettings`].
        progress: show a progress bar.

    Returns:
        "base": scores of the model itself; "number" and "size", as far as they vary: one entry per plan, each with
        `superblocks`, `size`, `followers`, `kv_retain_rate`, `loss_uncompensated`, `loss`, `accuracy`, `ttft` and
        `ttft_base`, the last two taken in turns.

    Raises:
        ValueError: if the model is not supported, or no such plan fits it.
    """
    decoder = wrappable_decoder(model)
    layers = len(decoder.layers)
    masks = getattr(decoder.backbone.config, "layer_types", None)
    if settings.vary not in VARY:
        raise ValueError(f"vary={settings.vary!r} is not known; use one of {', '.join(VARY)}")
    plans = {}
    if settings.vary != "size":
        plans["number"] = number_plans(layers, settings.superblock_size, masks, settings.follower_mask)
    if settings.vary != "number":
        plans["size"] = size_plans(layers, settings.followers, masks, settings.follower_mask)
    # A plan that both have in common is measured once.
    distinct = {str(plan): plan for swept in plans.values() for plan in swept}
    base = held_out_scores(model, data.held_out, data.pad_token_id, batch_size=settings.batch_size)
    measured = {}
    for key, plan in tqdm(distinct.items(), desc="sweep", unit="plan", disable=not progress, leave=False):
        measured[key] = _measure(model, plan, data, settings)
    entries = {name: [measured[str(plan)] for plan in swept] for name, swept in plans.items()}
    return {"base": asdict(base), **entries}


def _measure(
    model: PreTrainedModel, superblocks: list[list[int]], data: Sequences, settings: SweepSettings
) -> dict[str, Any]:
    """Calibrate, score and time one plan; see [`sweep`] for the entries."""
    config = UniAttnConfig(
        task_type="CAUSAL_LM", superblocks=superblocks, r=settings.rank, follower_mask=settings.follower_mask
    )
    with unified(model, config) as adapted:
        scores = calibrated_scores(adapted, data, settings.method, settings.batch_size)
        times = times_to_first_token(
            adapted,
            {"ttft": nullcontext, "ttft_base": adapted.disable_adapter},
            length=settings.ttft_length,
            repetitions=settings.ttft_repetitions,
        )
    return {**scores, **{name: asdict(seconds) for name, seconds in times.items()}}


def number_plans(layers: int, size: int, masks: Sequence[str] | None, follower_mask: str) -> list[list[list[int]]]:
    """Plans of 1, 2, … Superblocks of `size` layers, from the top downward."""
    most = superblocks_from_the_top(layers, size, layers // size, masks, follower_mask)
    if not most:
        raise ValueError(
            f"superblock_size={size}: no {size} consecutive layers of the model's {layers} may share a softmax; use "
            "smaller Superblocks"
        )
    return [most[-count:] for count in range(1, len(most) + 1)]


def size_plans(layers: int, followers: int, masks: Sequence[str] | None, follower_mask: str) -> list[list[list[int]]]:
    """Plans with `followers` followers in Superblocks of every size that divides them evenly and fits."""
    plans = []
    for size in range(2, followers + 2):
        count, rest = divmod(followers, size - 1)
        blocks = [] if rest else superblocks_from_the_top(layers, size, count, masks, follower_mask)
        if not rest and len(blocks) == count:
            plans.append(blocks)
    if not plans:
        raise ValueError(
            f"followers={followers} do not fit into the model's {layers} layers in Superblocks of any one size; use "
            "fewer"
        )
    return plans


def superblocks_from_the_top(
    layers: int, size: int, count: int, masks: Sequence[str] | None, follower_mask: str
) -> list[list[int]]:
    """At most `count` Superblocks, bottom to top."""
    blocks: list[list[int]] = []
    end = layers
    while end >= size and len(blocks) < count:
        block = list(range(end - size, end))
        if may_share(block, masks, follower_mask):
            blocks.append(block)
            end -= size
        else:
            end -= 1
    return blocks[::-1]
