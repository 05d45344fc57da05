"""A dynamic cache that evicts: per key/value head it keeps heavy hitters and recent tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .budget import Budget

_NOT_LISTENING = (
    "an H2OCache learns from the attention probabilities which tokens to keep, and nobody told it of them; call "
    "the model inside `with peft_uniattn.h2o(model):`, or after peft_uniattn.enable_h2o(model)"
)


class EvictingLayer(DynamicLayer):
    """A cache layer that holds fewer tokens than it has seen. Lengths, positions and masks count tokens seen."""

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not: positions go on from here."""
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        raise _rollback_refusal()

    def reset(self) -> None:
        super().reset()
        self.seen = 0


class H2OLayer(EvictingLayer):
    """
    Keys and values of one layer with its own decision, (batch, key/value heads, kept tokens, head_dim), oldest first.

    Attributes:
        scores: attention that each stored token has received so far, (batch, key/value heads, kept tokens).
        positions: which of the tokens seen is in each slot, int32 and of the same shape; None before anything was
            evicted.
        kept: the slots that the last decision kept, same shape; None if it kept all. Followers evict by it.
        undecided: whether tokens were added after the last decision.
    """

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self.budget = budget
        self._forget()

    def _forget(self) -> None:
        self.scores: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None
        self.kept: torch.Tensor | None = None
        self._first_length = 0
        self.undecided = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.undecided:
            raise RuntimeError(_NOT_LISTENING)
        keys, values = super().update(key_states, value_states)
        new = key_states.shape[-2]
        if self.positions is not None:
            added = torch.arange(self.seen, self.seen + new, dtype=torch.int32, device=keys.device)
            self.positions = torch.cat([self.positions, added.expand(*keys.shape[:2], new)], dim=-1)
        self.seen += new
        self._first_length = self._first_length or new
        self.undecided = True
        return keys, values

    def mask_of_stored(self, mask: torch.Tensor | None, query_heads: int) -> torch.Tensor | None:
        """
        The columns of a model's mask that belong to what is stored.

        Args:
            mask: (batch, 1 or query heads, query length, tokens seen), boolean or additive; None: nothing is masked
                that is stored.
            query_heads: how many heads the result needs if heads differ in what they have stored.

        Returns:
            `mask` itself as long as nothing was evicted, else (batch, query heads, query length, stored tokens).
        """
        if mask is None:
            return None
        if mask.shape[-1] != self.seen:
            raise ValueError(
                f"attention_mask covers {mask.shape[-1]} tokens, but the H2OCache has seen {self.seen}; pass a mask "
                "over all tokens seen, evicted ones too"
            )
        if self.positions is None:
            return mask
        batch, kv_heads, stored = self.positions.shape
        queries = mask.shape[2]
        index = self.positions.long().repeat_interleave(query_heads // kv_heads, dim=1)[:, :, None]
        return mask.expand(batch, query_heads, queries, -1).gather(-1, index.expand(-1, -1, queries, stored))

    def observe(self, received: torch.Tensor, visible: torch.Tensor | None) -> None:
        """
        Add to the scores, then evict what exceeds the budget.

        Args:
            received: attention that each stored token has got from the latest queries, (batch, key/value heads,
                stored tokens).
            visible: which of them the newest query sees, (batch, 1 or key/value heads, stored tokens); None: all.
                The others, padding for instance, are the first to go.
        """
        if self.scores is not None:
            new = received.shape[-1] - self.scores.shape[-1]
            received = torch.nn.functional.pad(self.scores, (0, new)) + received
        self.scores = received
        self.undecided = False
        self.kept = self._choose(visible)
        if self.kept is None:
            return
        self.keys, self.values = take(self.keys, self.kept), take(self.values, self.kept)
        self.scores = self.scores.gather(-1, self.kept)
        self.positions = self.kept.int() if self.positions is None else self.positions.gather(-1, self.kept)

    def _choose(self, visible: torch.Tensor | None) -> torch.Tensor | None:
        """The slots to keep, ascending, (batch, key/value heads, kept tokens); None: all."""
        capacity = self.budget.capacity(self.seen if self.budget.grows else self._first_length)
        if self.keys.shape[-2] <= capacity:
            return None
        rank = self.scores.clone()
        rank[..., -self.budget.recent_of(capacity) :] = torch.inf
        if visible is not None:
            rank = rank.masked_fill(~visible, -1)
        return rank.topk(capacity).indices.sort().values

    def _rearrange(self, change) -> None:
        for name in ("scores", "positions"):
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._rearrange(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._rearrange(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._rearrange(lambda state: state[indices, ...])

    def reset(self) -> None:
        super().reset()
        self._forget()


class H2OFollowerLayer(EvictingLayer):
    """
    A follower's values, (batch, key/value heads, kept tokens, head_dim): of the tokens that its leader keeps.

    They are in the slot for keys, next to values of width zero, as in other caches (see `peft_uniattn.cache`).
    """

    def __init__(self, leader: H2OLayer) -> None:
        super().__init__()
        self.leader = leader

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        values, empty = super().update(key_states, value_states)
        self.seen += key_states.shape[-2]
        # The leader has decided earlier in this forward. What this forward attends to is still all of it.
        if (kept := self.leader.kept) is not None:
            self.keys = take(values, kept.to(values.device))
            self.values = self.keys[..., :0]
        return values, empty


class H2OCache(DynamicCache):
    """
    A KV cache for `generate()` that keeps heavy hitters and recent tokens, H2O (https://arxiv.org/abs/2306.14048).

    ```python
    with h2o(model):
        model.generate(**inputs, past_key_values=H2OCache(budget=0.4))
    ```

    After every forward, each key/value head keeps the newest tokens and, of the others, those that have received most
    attention: s summed over all queries so far and over the query heads of the key/value head. In a Superblock the
    leader's s decides for its K and V and for the V of all its followers. Layers with a sliding window keep their
    window, as in a `DynamicCache`; the budget is for those with full attention. Back ends: eager and sdpa.

    Args:
        budget: what each head keeps: a share of the tokens seen (a float above 0, up to 1.0, which keeps all; padding
            counts), or a number of tokens (an int).
        recent: how much of the budget goes to the newest tokens: a share of it (a float), or a number of tokens.
        grows: whether a share is of the prompt and the generated tokens; `False`: of the first forward's tokens, so
            that the cache does not grow in decode (as in the authors' code).

    Raises:
        ValueError: if an argument is out of range; by `crop`, on which assisted decoding depends; if no layer of the
            model has full attention.
        RuntimeError: if a model fills it outside of [`h2o`], that is without telling it of the attention.
    """

    def __init__(self, budget: int | float, *, recent: int | float = 0.5, grows: bool = True) -> None:
        super().__init__()
        self.budget = Budget(budget, recent, grows)
        self._listening = False

    def begin(self, config: PretrainedConfig) -> None:
        """Get ready for a forward of a model with `config`, whose layers will tell of their attention."""
        if not self.layers:
            self.layers = self._empty_layers(config)
            self.layer_class_to_replicate = None
        self._listening = True

    def end(self) -> None:
        """After a forward."""
        self._listening = False
        for layer in self.layers:
            if isinstance(layer, H2OLayer):
                layer.kept = None

    def _empty_layers(self, config: PretrainedConfig) -> list[DynamicLayer]:
        layers = DynamicCache(config=config).layers
        if strange := {type(layer).__name__ for layer in layers} - {"DynamicLayer", "DynamicSlidingWindowLayer"}:
            raise ValueError(f"an H2OCache knows nothing of cache layers of type {', '.join(sorted(strange))}")
        layers = [H2OLayer(self.budget) if type(layer) is DynamicLayer else layer for layer in layers]
        if not any(isinstance(layer, H2OLayer) for layer in layers):
            window = next(layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer))
            raise ValueError(
                f"all layers of this {config.model_type!r} model have a sliding window of {window} tokens, which "
                "their cache does not exceed, so an H2OCache would have nothing to evict; use a DynamicCache"
            )
        return layers

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._listening:
            raise RuntimeError(_NOT_LISTENING)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def update_values(self, value: torch.Tensor, layer_idx: int, leader_idx: int) -> torch.Tensor:
        """[`peft_uniattn.cache.cache_values`] for a follower whose leader evicts, or has a sliding window."""
        leader, layer = self.layers[leader_idx], self.layers[layer_idx]
        if isinstance(leader, H2OLayer) and getattr(layer, "leader", None) is not leader:
            if layer.get_seq_length():
                raise ValueError(
                    "this H2OCache was filled without softmax sharing, or under another plan; start with an empty one"
                )
            self.layers[layer_idx] = H2OFollowerLayer(leader)
        values, _ = self.update(value, value[..., :0], layer_idx)
        return values

    def crop(self, tokens_to_remove: int) -> None:
        raise _rollback_refusal()

    def activate_past_recording(self) -> None:
        raise _rollback_refusal()

    @property
    def bookkeeping_bytes(self) -> int:
        """Bytes of scores and positions, which `kv_bytes` does not count: 8 a slot once something was evicted."""
        states = [getattr(layer, name, None) for layer in self.layers for name in ("scores", "positions")]
        return sum(state.numel() * state.element_size() for state in states if state is not None)


def take(states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """A copy of the slots `kept` (batch, heads, kept tokens) of `states` (batch, heads, tokens, head_dim)."""
    return states.gather(2, kept[..., None].expand(*kept.shape, states.shape[-1]))


def _rollback_refusal() -> ValueError:
    return ValueError(
        "an H2OCache cannot be cropped: what it evicted is gone. Assisted decoding and prompt look-up roll back, so "
        "use a DynamicCache for them"
    )
