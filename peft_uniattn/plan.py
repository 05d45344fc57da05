"""Which layer leads, which layer follows: Superblocks and the refusal of impossible ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# In place of a leader's layer index: the layer's attention is bypassed.
DROPPED = -1

SOFTMAX = "softmax"
KEYS_AND_VALUES = "keys_and_values"


@dataclass(frozen=True)
class Plan:
    """
    The Superblocks of a model with `num_layers` decoder layers.

    Attributes:
        superblocks: one tuple of consecutive layer indices per Superblock, lowest (the leader) first.
        num_layers: the number of decoder layers of the model.
        shared: what followers take from their leader, "softmax" (UniAttn) or "keys_and_values" (CLA).
        dropped: layers without attention (LLMDrop).
    """

    superblocks: tuple[tuple[int, ...], ...]
    num_layers: int
    shared: str = SOFTMAX
    dropped: tuple[int, ...] = ()

    @property
    def leader_of(self) -> dict[int, int]:
        """Maps every layer of a Superblock to its leader; a leader maps to itself."""
        return {layer: block[0] for block in self.superblocks for layer in block}

    @property
    def leaders(self) -> list[int]:
        return [block[0] for block in self.superblocks]

    @property
    def followers(self) -> list[int]:
        return [layer for block in self.superblocks for layer in block[1:]]

    @property
    def role_of(self) -> dict[int, int]:
        """Maps every layer that the plan concerns to its leader, a dropped layer to `DROPPED`."""
        return {**self.leader_of, **dict.fromkeys(self.dropped, DROPPED)}

    @property
    def kv_retain_rate(self) -> float:
        """
        Share of the KV cache that is left (0 to 1): sharing softmax, a follower stores V, but no K; sharing keys and
        values, neither; a dropped layer stores nothing.
        """
        saved = len(self.followers) / (2 if self.shared == SOFTMAX else 1)
        return 1 - (saved + len(self.dropped)) / self.num_layers

    def __str__(self) -> str:
        dropped = [f"without attention: {', '.join(map(str, self.dropped))}"] if self.dropped else []
        return " ".join([*(f"[{block[0]}-{block[-1]}]" for block in self.superblocks), *dropped])


def make_plan(
    num_layers: int,
    *,
    superblock_size: int = 4,
    start_layer: int | None = None,
    end_layer: int | None = None,
    superblocks: Sequence[Sequence[int]] | None = None,
    masks: Sequence[str] | None = None,
    follower_mask: str = "own",
) -> Plan:
    """
    Lay out the Superblocks of a model.

    Without `superblocks`, Superblocks of `superblock_size` layers fill the range from `start_layer` upward; an
    incomplete rest at the top stays unshared (the paper's plan: size 4, top half of the layers). In a model that mixes
    full and sliding-window attention they stay within runs of one kind of mask; with `follower_mask="leader"` they may
    also start at a layer with full attention, whatever follows (the paper's plan for Gemma-2).

    Args:
        num_layers: the number of decoder layers of the model.
        superblock_size: layers per Superblock, at least 2.
        start_layer: first layer of the lowest Superblock; default `num_layers // 2`.
        end_layer: where to stop, exclusive; default `num_layers`.
        superblocks: explicit lists of consecutive layer indices, which override the three arguments above.
        masks: the kind of mask of every layer, as in `config.layer_types`; None if all are alike.
        follower_mask: "own" keeps followers to leaders whose mask is their own; "leader" lets them take the mask of a
            leader with full attention.

    Raises:
        ValueError: if the plan does not fit the model; names the argument, the value and the way out.
    """
    if superblocks is not None:
        check_superblocks(superblocks)
        highest = max(layer for block in superblocks for layer in block)
        if highest >= num_layers:
            raise ValueError(
                f"superblocks={_short(superblocks)} names layer {highest}, but the model has {num_layers} decoder "
                f"layers (0 to {num_layers - 1}); leave that layer out"
            )
        plan = Plan(tuple(sorted(map(tuple, superblocks))), num_layers)
        check_masks(plan, masks, follower_mask)
        return plan

    check_superblock_size(superblock_size)
    start = num_layers // 2 if start_layer is None else start_layer
    end = num_layers if end_layer is None else end_layer
    for name, value, highest in (("start_layer", start, num_layers - 1), ("end_layer", end, num_layers)):
        if not 0 <= value <= highest:
            raise ValueError(
                f"{name}={value} is outside the model, which has {num_layers} decoder layers; use 0 to {highest}"
            )
    if end - start < superblock_size:
        raise ValueError(
            f"superblock_size={superblock_size} does not fit between start_layer={start} and end_layer={end}, which "
            f"hold {max(end - start, 0)} of the model's {num_layers} layers; use smaller Superblocks or a wider range"
        )
    blocks, first = [], start
    while first + superblock_size <= end:
        block = tuple(range(first, first + superblock_size))
        if may_share(block, masks, follower_mask):
            blocks.append(block)
            first += superblock_size
        else:
            first += 1
    if not blocks:
        raise ValueError(
            f"superblock_size={superblock_size}: no {superblock_size} consecutive layers between {start} and {end} "
            'have one kind of mask; use smaller Superblocks, or follower_mask="leader" to let followers take the mask '
            "of a leader with full attention"
        )
    return Plan(tuple(blocks), num_layers)


def make_dropped_plan(num_layers: int, layers: Sequence[int]) -> Plan:
    """
    The plan that drops the attention of `layers`.

    Raises:
        ValueError: if the model lacks one of them, or would be left without attention.
    """
    check_dropped(layers)
    if max(layers) >= num_layers:
        raise ValueError(
            f"layers={list(layers)} names layer {max(layers)}, but the model has {num_layers} decoder layers (0 to "
            f"{num_layers - 1}); leave that layer out"
        )
    if len(layers) == num_layers:
        raise ValueError(f"layers={list(layers)} drops the attention of every layer; keep one at least")
    return Plan((), num_layers, dropped=tuple(sorted(layers)))


def check_dropped(layers: Sequence[int]) -> None:
    """Raise ValueError unless `layers` holds different layer indices, one at least."""
    if not isinstance(layers, (list, tuple)) or not layers or not all(_is_index(i) and i >= 0 for i in layers):
        raise ValueError(
            f"layers={layers!r} must be a non-empty list of layer indices from 0 up, such as those that "
            "choose_layers_to_drop() returns"
        )
    if len(set(layers)) < len(layers):
        raise ValueError(f"layers={list(layers)} names a layer twice; leave it in once")


def check_masks(plan: Plan, masks: Sequence[str] | None, follower_mask: str) -> None:
    """Raise ValueError if a Superblock of `plan` mixes masks in a way that `follower_mask` does not allow."""
    for block in plan.superblocks:
        if not may_share(block, masks, follower_mask):
            kinds = ", ".join(f"{layer}: {masks[layer]}" for layer in block)
            raise ValueError(
                f"Superblock {list(block)} mixes layers with different masks ({kinds}); choose superblocks of one "
                'kind, or start them at a full_attention layer and set follower_mask="leader"'
            )


def may_share(block: Sequence[int], masks: Sequence[str] | None, follower_mask: str) -> bool:
    """Whether the masks of the layers of `block`, leader first, allow them to share a softmax."""
    if masks is None or len({masks[layer] for layer in block}) == 1:
        return True
    # A leader with a window or chunks has no probabilities for what a wider follower sees.
    return follower_mask == "leader" and masks[block[0]] == "full_attention"


def check_superblock_size(superblock_size: int, name: str = "superblock_size") -> None:
    """Raise ValueError unless `superblock_size`, an argument called `name`, is an integer of 2 or more."""
    if not _is_index(superblock_size) or superblock_size < 2:
        raise ValueError(
            f"{name}={superblock_size!r} must be an integer of 2 or more, a leader and its followers; or "
            "don't apply UniAttn"
        )


def check_superblocks(superblocks: Sequence[Sequence[int]]) -> None:
    """Raise ValueError unless `superblocks` holds disjoint runs of at least two consecutive layer indices."""
    if not isinstance(superblocks, (list, tuple)) or not superblocks:
        raise ValueError(
            f"superblocks={_short(superblocks)} must be a non-empty list of lists of layer indices, such as "
            "[[16, 17, 18]]"
        )
    seen: set[int] = set()
    for block in superblocks:
        if not isinstance(block, (list, tuple)) or not all(_is_index(layer) and layer >= 0 for layer in block):
            raise ValueError(
                f"superblocks contains {_short(block)}; every Superblock is a list of layer indices from 0 up"
            )
        if len(block) < 2:
            raise ValueError(
                f"superblocks contains {_short(block)}, which has no follower; a Superblock needs 2 layers or more"
            )
        if list(block) != list(range(block[0], block[0] + len(block))):
            raise ValueError(
                f"superblocks contains {_short(block)}, whose layers are not consecutive and ascending; list every "
                "layer from the leader up"
            )
        if overlap := seen.intersection(block):
            raise ValueError(
                f"superblocks={_short(superblocks)} uses layer {min(overlap)} twice; leave it in one of them"
            )
        seen.update(block)


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: object) -> str:
    """`value` as the user wrote it, tuples as lists, long runs of layers by their ends."""
    return shortened(_written(value))


def shortened(text: str) -> str:
    """`text`, no longer than a message can be."""
    return text if len(text) <= 400 else f"{text[:300]}… ({len(text)} characters)"


def _written(value: object) -> str:
    if not isinstance(value, (list, tuple)):
        return repr(value)
    items = [_written(item) for item in value]
    if len(items) > 6 and _is_index(value[0]) and list(value) == list(range(value[0], value[0] + len(value))):
        items[2:-1] = ["…"]
    return f"[{', '.join(items)}]"
