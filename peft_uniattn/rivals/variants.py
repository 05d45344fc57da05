"""The Half and Full variants of the rivals (https://arxiv.org/abs/2502.00439, Tables 5 and 6)."""

from __future__ import annotations

from dataclasses import replace

from ..plan import Plan


def half_of(plan: Plan) -> Plan:
    """
    The upper half of the Superblocks of `plan`, rounded up: where CLA-Half works.

    CLA takes keys and values from its followers, UniAttn keys only, so with half of the followers CLA saves as much of
    the cache (with an even number of Superblocks of one size). CLA-Full works on all of `plan`.

    Raises:
        ValueError: if `plan` has no Superblocks.
    """
    if not plan.superblocks:
        raise ValueError(f"a plan without Superblocks ({plan}) has no half; give it the plan of UniAttn or CLA")
    kept = len(plan.superblocks) // 2
    return replace(plan, superblocks=plan.superblocks[kept:])


def num_layers_to_drop(plan: Plan, *, half: bool) -> int:
    """
    How many layers LLMDrop bypasses beside UniAttn with `plan`.

    Args:
        plan: the plan of UniAttn.
        half: half of the number of followers, rounded up, which saves as much of the cache as UniAttn does
            (LLMDrop-Half), rather than all of it, which concerns as many layers (LLMDrop-Full).
    """
    followers = len(plan.followers)
    return -(-followers // 2) if half else followers
