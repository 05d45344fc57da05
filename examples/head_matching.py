"""
How the heads of two layers are matched, and followers that use matched heads; for `match_heads.py`.

Not part of the package. What `aligned` finds could be: it is a permutation of groups and of the heads in them, so that
W_v's rows and W_o's columns of a follower can be put into that order once, and nothing is left to do at inference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from explore_data import DEVICE, Examples
from scipy.optimize import linear_sum_assignment
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from peft_uniattn import attention, layer, standalone_modeling
from peft_uniattn.grouping import losses
from peft_uniattn.handover import LeaderState

# By (leader, follower): costs (leader's heads, follower's heads), or for each follower's head the leader's it uses.
Pairs = Mapping[tuple[int, int], torch.Tensor]


def cheapest(cost: torch.Tensor) -> torch.Tensor:
    """For every column a row, no row twice, of the least sum; `cost` is square."""
    return torch.as_tensor(linear_sum_assignment(cost.T)[1])


def aligned(cost: torch.Tensor, group: int) -> torch.Tensor:
    """
    The cheapest permutation that takes groups to groups.

    Args:
        cost: (leader's heads, follower's heads).
        group: how many query heads share a key/value head.
    """
    blocks = cost.unflatten(1, (-1, group)).unflatten(0, (-1, group)).transpose(1, 2)  # (group, group, head, head)
    best = [[cheapest(block) for block in row] for row in blocks]
    total = [
        [float(block[heads, range(group)].sum()) for block, heads in zip(*row, strict=True)]
        for row in zip(blocks, best, strict=True)
    ]
    groups = cheapest(torch.tensor(total, dtype=torch.float64))
    return torch.cat([a * group + best[a][b] for b, a in enumerate(groups.tolist())])


def grouped(cost: torch.Tensor, group: int) -> torch.Tensor:
    """Of any of the leader's groups for each group, any head for each head."""
    best = cost.unflatten(1, (-1, group)).unflatten(0, (-1, group)).min(1)  # (leader's group, group, head)
    chosen = best.values.sum(-1).argmin(0)
    return torch.cat([a * group + best.indices[a, b] for b, a in enumerate(chosen)])


def free(cost: torch.Tensor, group: int) -> torch.Tensor:
    """Any head of the leader for each head."""
    return cost.argmin(0)


KINDS: dict[str, Callable[[torch.Tensor, int], torch.Tensor] | None] = {
    "identity": None,
    "aligned": aligned,
    "grouped": grouped,
    "free": free,
}


@torch.no_grad()
def costs(model: PreTrainedModel, data: Examples, count: int, *, reach: int = 4, batch_size: int = 16) -> Pairs:
    """
    The squared error of a follower head's output, ‖(s_g − s_h)·V_h·W_o,h‖² with g of the leader and h its own, summed
    over the real tokens of the first `count` examples, for leaders up to `reach` − 1 layers below.
    """
    model = copy.deepcopy(model).eval()
    model.set_attn_implementation("eager")
    heads, parts = model.config.num_attention_heads, [part.self_attn for part in model.base_model.layers]
    values: dict[int, torch.Tensor] = {}
    for index, part in enumerate(parts):
        part.v_proj.register_forward_hook(lambda _, args, output, index=index: values.update({index: output}))
    pairs = [(leader, f) for f in range(len(parts)) for leader in range(max(0, f - reach + 1), f)]
    total = {pair: torch.zeros(heads, heads, dtype=torch.float64, device=DEVICE) for pair in pairs}
    for batch in data.for_calibration(count, batch_size):
        seen = [part.float() for part in model(**batch, output_attentions=True).attentions]
        real = batch["attention_mask"].bool()[:, None]
        for leader, follower in pairs:
            part = parts[follower]
            weight = part.o_proj.weight.unflatten(1, (heads, -1)).float()
            gram = torch.einsum("ohd,ohe->hde", weight, weight)
            value = values[follower].unflatten(-1, (-1, part.head_dim)).transpose(1, 2).float()
            value = value.repeat_interleave(heads // value.shape[1], 1)
            own = seen[follower] @ value
            for head in range(heads):
                error = seen[leader][:, head, None] @ value - own
                squared = ((error @ gram) * error).sum(-1) * real
                total[leader, follower][head] += squared.sum((0, 2)).double()
    return {pair: cost.cpu() for pair, cost in total.items()}


def heads_of(costs: Pairs, kind: str, config: PretrainedConfig) -> Pairs:
    """How every pair of layers is matched; nothing for "identity"."""
    if KINDS[kind] is None:
        return {}
    group = config.num_attention_heads // config.num_key_value_heads
    return {pair: KINDS[kind](cost, group).to(DEVICE) for pair, cost in costs.items()}


def share_matched(
    value: torch.Tensor, leader: LeaderState, *, heads: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stands in for [`share_softmax`] where whole sequences run without a cache."""
    query, key, mask = leader.query, leader.key, leader.mask
    group = query.shape[1] // key.shape[1]
    query, key, value = query[:, heads], key[:, heads // group], value.repeat_interleave(group, 1)
    causal, scale = mask is None, leader.kwargs.get("scaling")
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)
    return output.transpose(1, 2), None


def follow_matched(heads: Pairs, module: nn.Module, family: Any, leader: int, *rest: Any) -> tuple:
    """Stands in for [`follow`]."""
    if (leader, module.layer_idx) not in heads:
        return attention.follow(module, family, leader, *rest)
    share = partial(share_matched, heads=heads[leader, module.layer_idx])
    with patch.object(attention, "share_softmax", share):
        return attention.follow(module, family, leader, *rest)


@contextmanager
def matched(heads: Pairs) -> Iterator[None]:
    """Let the followers of adapters, standalone models and the search by loss use these heads; others their own."""
    with ExitStack() as stack:
        for user in (layer, standalone_modeling, losses):
            stack.enter_context(patch.object(user, "follow", partial(follow_matched, heads)))
        yield
