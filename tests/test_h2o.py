"""H2O against a full cache in float64 in which evicted tokens are masked; see `h2o_oracle.py`."""

import sys

import pytest
import torch
from conftest import close, loud, prompt, specification, tiny_adapter, tiny_model
from family_models import BLOCKS, Case
from h2o_oracle import H2OOracle, MaskingAttention
from transformers import DynamicCache

from peft_uniattn import H2OCache, h2o, to_standalone
from peft_uniattn.eviction.cache import H2OFollowerLayer, H2OLayer

SUPERBLOCKS = [[1, 2, 3], [4, 5]]  # layer 0 is outside
KINDS = ("base", "adapter", "standalone")
FAMILIES = {
    "llama": {},
    "llama-mha": {"num_key_value_heads": 4},
    "mistral": {"sliding_window": None},
    "qwen2": {"num_key_value_heads": 1},
}
# Prefill, decode, several tokens at once after eviction, decode.
CHUNKS = (12, 1, 1, 3, 1, 1)


def build(kind: str, family: str = "llama", **changes):
    model = loud(tiny_model(family.split("-")[0], **FAMILIES[family], **changes))
    if kind == "base":
        return model
    model = loud_adapter(model)
    return model if kind == "adapter" else to_standalone(model)


def loud_adapter(model):
    model = tiny_adapter(model, superblocks=SUPERBLOCKS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "uniattn_" in name:
                parameter.normal_(std=0.25)
    return model


def oracle_of(model, kind: str, capacity, recent) -> H2OOracle:
    spec = specification(model, () if kind == "base" else SUPERBLOCKS)
    return H2OOracle(**spec, capacity=capacity, recent=recent)


@torch.no_grad()
def run(model, cache, ids, mask=None, chunks=CHUNKS) -> torch.Tensor:
    """Logits of all tokens, a chunk at a time on one cache."""
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    parts, first = [], 0
    with h2o(model):
        for size in chunks:
            last = first + size
            now = {"attention_mask": mask[:, :last], "position_ids": positions[:, first:last]}
            parts.append(model(ids[:, first:last], past_key_values=cache, use_cache=True, **now).logits)
            first = last
    return torch.cat(parts, 1)


def expected(oracle, ids, mask=None, chunks=CHUNKS) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    return torch.cat([oracle(*part) for part in zip(ids.split(chunks, 1), mask.split(chunks, 1), strict=True)], 1)


def left_padded(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The second row begins with 7 tokens of padding: more than the 5 or 6 tokens that the budgets here evict."""
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    return ids.masked_fill(mask == 0, 0), mask


BUDGETS = {
    "tokens": ({"budget": 7, "recent": 3}, lambda seen: min(7, seen), lambda capacity: 3),
    "share": ({"budget": 0.5}, lambda seen: round(0.5 * seen), lambda capacity: round(0.5 * capacity)),
    "share of the prompt": ({"budget": 0.5, "grows": False}, lambda seen: 6, lambda capacity: 3),
    "recent only": ({"budget": 6, "recent": 1.0}, lambda seen: min(6, seen), lambda capacity: capacity),
    "heavy hitters only": ({"budget": 6, "recent": 0}, lambda seen: min(6, seen), lambda capacity: 1),
}


@pytest.mark.parametrize("padded", [False, True], ids=["", "left-padded"])
@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_eviction_equals_masking_in_a_full_cache(float64, family, kind, back_end, padded):
    model = build(kind, family, attn_implementation=back_end)
    ids, mask = prompt(2, sum(CHUNKS)), None
    if padded:
        ids, mask = left_padded(ids)
    settings, *rules = BUDGETS["tokens"]
    actual = run(model, H2OCache(**settings), ids, mask)
    wanted = expected(oracle_of(model, kind, *rules), ids, mask)
    real = slice(None) if mask is None else mask.bool()
    close(actual[real], wanted[real])


@pytest.mark.parametrize("kind", ["base", "adapter"])
@pytest.mark.parametrize("name", BUDGETS)
def test_a_budget_is_a_number_of_tokens_or_a_share_and_recent_tokens_are_part_of_it(float64, name, kind):
    model, ids = build(kind), prompt(2, sum(CHUNKS))
    settings, *rules = BUDGETS[name]
    close(run(model, H2OCache(**settings), ids), expected(oracle_of(model, kind, *rules), ids))


@pytest.mark.parametrize("kind", KINDS)
def test_heads_keep_different_tokens_and_followers_those_of_their_leader(float64, kind):
    model, cache = build(kind), H2OCache(budget=7, recent=3)
    _, *rules = BUDGETS["tokens"]
    oracle, ids = oracle_of(model, kind, *rules), prompt(2, sum(CHUNKS))
    run(model, cache, ids)
    expected(oracle, ids)
    for layer, keeper in oracle.keepers.items():
        kept = cache.layers[layer].positions
        assert [[row.nonzero().flatten().tolist() for row in heads] for heads in keeper.left] == kept.tolist()
        assert not torch.equal(kept[:, 0], kept[:, 1])
        close(cache.layers[layer].scores, keeper.sums.gather(-1, kept.long()))
    followers = [] if kind == "base" else [2, 3, 5]
    assert [i for i, layer in enumerate(cache.layers) if isinstance(layer, H2OFollowerLayer)] == followers
    assert all(cache.layers[i].keys.shape == (2, 2, 7, 8) and cache.layers[i].values.numel() == 0 for i in followers)


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize(
    "case", [Case("gemma2"), Case("gemma2", "leader"), Case("gemma3_text"), Case("qwen3")], ids=str
)
def test_layers_with_a_window_keep_it_and_full_attention_evicts(float64, monkeypatch, case, adapted):
    base = case.base("eager")
    model = case.adapt(base) if adapted else base
    types = base.config.layer_types
    leaders = {layer: block[0] for block in BLOCKS for layer in block} if adapted else {}
    full = [
        layer for layer, kind in enumerate(types) if kind == "full_attention" and leaders.get(layer, layer) == layer
    ]
    settings, *rules = BUDGETS["tokens"]
    ids, mask = left_padded(prompt(2, sum(CHUNKS)))
    cache = H2OCache(**settings)
    actual = run(model, cache, ids, mask)
    assert {i for i, layer in enumerate(cache.layers) if isinstance(layer, H2OLayer)} >= set(full)

    attention = MaskingAttention(full, *rules)
    file = sys.modules[type(base).__module__]
    monkeypatch.setattr(file, "eager_attention_forward", attention)
    close(actual[mask.bool()], masked(model, attention, ids, mask)[mask.bool()])


def masked(model, attention, ids, mask) -> torch.Tensor:
    """Logits with a full cache of transformers' own. With autograd, in which leaders always call their back end."""
    cache, positions, parts, first = DynamicCache(), (mask.cumsum(-1) - 1).clamp(min=0), [], 0
    for size in CHUNKS:
        last = first + size
        attention.start_forward(mask[:, :last].bool())
        now = {"attention_mask": mask[:, :last], "position_ids": positions[:, first:last]}
        parts.append(model(ids[:, first:last], past_key_values=cache, use_cache=True, **now).logits.detach())
        first = last
    return torch.cat(parts, 1)
