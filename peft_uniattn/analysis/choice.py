"""Chosen Superblocks, and whether they are better than fixed ones (Table 9 of https://arxiv.org/abs/2502.00439)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..config import UniAttnConfig
from ..grouping.choose import ONE_PASS, choose
from ..plan import Plan
from ..recording import wrappable_decoder
from ..training.evaluation import held_out_scores
from .data import Sequences
from .sweep import superblocks_from_the_top
from .unified import calibrated_scores, unified

FIXED_SIZE = 4


def measure_choice(
    model: PreTrainedModel,
    data: Sequences,
    *,
    followers: int | None,
    kv_target: float | None,
    method: str,
    follower_mask: str,
    batch_size: int,
    progress: bool = True,
    **rules: Any,
) -> dict[str, Any]:
    """
    Choose Superblocks; with held-out sequences, calibrate and score them against others with as many followers.

    Args:
        model: a transformers model without a UniAttn adapter.
        data: sequences to choose and to calibrate by; held-out ones only to score.
        followers: see [`~peft_uniattn.choose_superblocks`], as for the arguments that are not named here.
        kv_target: likewise.
        method: likewise.
        follower_mask: likewise.
        batch_size: sequences per forward pass.
        progress: show progress bars.

    Returns:
        "superblocks", "followers", "kv_retain_rate" and "measured", by which they were chosen; "base": scores of the
        model itself; "scores": scores (see `calibrated_scores`) of what was chosen, of the ways to choose in one
        pass, of the paper's fixed plan where it has as many followers, and of fixed Superblocks from the top where
        they can have as many. The last two are empty without held-out sequences.
    """

    def chosen_by(way: str) -> Any:
        return choose(
            model,
            data.batches(batch_size, model.device),
            followers=followers,
            kv_target=kv_target,
            method=way,
            follower_mask=follower_mask,
            progress=progress,
            **rules,
        )

    choice = chosen_by(method)
    plan = Plan(tuple(map(tuple, choice.superblocks)), len(wrappable_decoder(model).layers))
    result = {
        "superblocks": choice.superblocks,
        "followers": len(plan.followers),
        "kv_retain_rate": plan.kv_retain_rate,
        "measured": choice.measured.to_dict(),
        "base": {},
        "scores": {},
    }
    if not len(data.held_out):
        return result
    result["base"] = asdict(held_out_scores(model, data.held_out, data.pad_token_id, batch_size=batch_size))
    plans = {f"by {method}": choice.superblocks}
    plans |= {f"by {other}": chosen_by(other).superblocks for other in ONE_PASS if other != method}
    plans |= _fixed_plans(model, len(plan.followers), follower_mask)
    for name, superblocks in tqdm(plans.items(), desc="scoring", unit="plan", disable=not progress, leave=False):
        config = UniAttnConfig(task_type="CAUSAL_LM", superblocks=superblocks, follower_mask=follower_mask)
        with unified(model, config) as adapted:
            result["scores"][name] = calibrated_scores(adapted, data, "ridge", batch_size)
    return result


def _fixed_plans(model: PreTrainedModel, followers: int, follower_mask: str) -> dict[str, list[list[int]]]:
    decoder = wrappable_decoder(model)
    layers, masks = len(decoder.layers), getattr(decoder.backbone.config, "layer_types", None)
    top = superblocks_from_the_top(layers, FIXED_SIZE, layers // FIXED_SIZE, masks, follower_mask)
    plans = {"fixed, from the top": top[-(followers // (FIXED_SIZE - 1)) :]}
    # The paper's plan fills the top half from its lowest layer upward.
    plans["fixed, from the middle"] = _from_the_middle(layers, masks, follower_mask)
    return {name: plan for name, plan in plans.items() if sum(len(block) - 1 for block in plan) == followers}


def _from_the_middle(layers: int, masks: list[str] | None, follower_mask: str) -> list[list[int]]:
    try:
        plan = UniAttnConfig(superblock_size=FIXED_SIZE, follower_mask=follower_mask).make_plan(layers, masks)
    except ValueError:  # no room
        return []
    return [list(block) for block in plan.superblocks]
