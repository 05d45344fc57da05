"""Chosen Superblocks: the cheapest or most similar, within budget and masks, from costs measured on data."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from conftest import loud, prompt, tiny_adapter, tiny_model
from family_models import Case
from oracle import mix_values, rms_norm, rotary_angles, softmax_activation, unified_logits, visible
from peft import get_peft_model

from peft_uniattn import UniAttnConfig, choose_superblocks
from peft_uniattn.families import find_decoder, find_family
from peft_uniattn.grouping.choose import choose, followers_for
from peft_uniattn.grouping.costs import measure_costs
from peft_uniattn.grouping.losses import LossCosts, measure_losses
from peft_uniattn.grouping.partition import best_superblocks
from peft_uniattn.grouping.similar import similar_superblocks
from peft_uniattn.plan import may_share

MIXED = ["sliding_attention", "full_attention"] * 4
RUNS = ["sliding_attention"] * 3 + ["full_attention"] * 5


def all_plans(layers: int, max_size: int):
    """Every way to cut `layers` consecutive layers into blocks of 1 to `max_size`, as lists of layer indices."""
    for cuts in itertools.product((False, True), repeat=layers - 1):
        edges = [0, *(index + 1 for index, cut in enumerate(cuts) if cut), layers]
        blocks = [list(range(*pair)) for pair in itertools.pairwise(edges)]
        if all(len(block) <= max_size for block in blocks):
            yield [block for block in blocks if len(block) > 1]


def random_costs(layers: int, seed: int) -> dict[tuple[int, int], float]:
    numbers = random.Random(seed)
    return {pair: numbers.random() for pair in itertools.combinations(range(layers), 2)}


def total(costs, blocks) -> float:
    return sum(costs[block[0], follower] for block in blocks for follower in block[1:])


def batch(**kwargs) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": prompt(**kwargs)}, {"input_ids": prompt(**{**kwargs, "seed": 5})}]


@pytest.mark.parametrize(
    ("masks", "follower_mask"), [(None, "own"), (MIXED, "leader"), (RUNS, "own"), (RUNS, "leader")]
)
@pytest.mark.parametrize("followers", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_dynamic_programming_finds_what_brute_force_finds(seed, followers, masks, follower_mask):
    costs = random_costs(8, seed)
    found = best_superblocks(costs, followers, layers=range(8), max_size=4, masks=masks, follower_mask=follower_mask)
    allowed = [
        plan
        for plan in all_plans(8, 4)
        if sum(len(block) - 1 for block in plan) == followers
        and all(may_share(block, masks, follower_mask) for block in plan)
    ]
    assert found in allowed
    assert total(costs, found) == pytest.approx(min(total(costs, plan) for plan in allowed))


def test_superblocks_stay_within_the_layers_that_may_be_used():
    found = best_superblocks(random_costs(8, 0), 3, layers=range(2, 6), max_size=4)
    assert found == [[2, 3, 4, 5]]


@pytest.mark.parametrize("choose", [best_superblocks, similar_superblocks])
def test_too_many_followers_are_refused_with_the_most_that_fit(choose):
    costs = random_costs(6, 0) if choose is best_superblocks else [0.5] * 5
    with pytest.raises(ValueError, match=r"followers=5 do not fit into layers 0 to 5 .* hold 4"):
        choose(costs, 5, layers=range(6), max_size=3)


def test_the_most_similar_neighbours_are_joined():
    similarities = [0.1, 0.9, 0.8, 0.2, 0.7]
    assert similar_superblocks(similarities, 3, layers=range(6), max_size=4) == [[1, 2, 3], [4, 5]]


def test_similar_layers_are_not_joined_beyond_the_largest_size_or_across_masks():
    similarities = [0.9, 0.8, 0.7, 0.6, 0.1]
    assert similar_superblocks(similarities, 2, layers=range(6), max_size=2) == [[0, 1], [2, 3]]
    masks = ["sliding_attention"] * 2 + ["full_attention"] * 4
    assert similar_superblocks(similarities, 3, layers=range(6), max_size=4, masks=masks) == [[0, 1], [2, 3, 4]]


def test_costs_are_those_of_independent_least_squares(float64):
    """‖ε‖² and the residual of ridge regression, every token relative to its residual stream, from the formulas."""
    model = loud(tiny_model())
    weights, config = model.state_dict(), model.config
    data = batch(batch=4, length=12)
    ridge = 1e-2
    decoder = find_decoder(model, find_family(config))
    costs = measure_costs(model, decoder, data, layers=range(6), max_size=3, ridge=ridge, progress=False)

    ids = torch.cat([entry["input_ids"] for entry in data])
    hidden = model(ids, output_hidden_states=True).hidden_states
    angles = rotary_angles(config, torch.arange(12)[None], torch.float64)
    names = [f"model.layers.{layer}" for layer in range(6)]
    x = [rms_norm(weights, f"{name}.input_layernorm", hidden[layer], config) for layer, name in enumerate(names)]
    s = [
        softmax_activation(weights, name, x[layer], angles, visible(config, layer, torch.ones_like(ids)), config)
        for layer, name in enumerate(names)
    ]
    assert set(costs.after) == {(0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (2, 4), (3, 4), (3, 5), (4, 5)}
    for leader, follower in costs.after:
        own = mix_values(weights, names[follower], x[follower], s[follower], config)
        error = own - mix_values(weights, names[follower], x[follower], s[leader], config)
        length = (hidden[follower] + own).norm(dim=-1, keepdim=True)
        inputs, targets = (x[follower] / length).flatten(0, 1), (error / length).flatten(0, 1)
        penalty = ridge * inputs.square().sum() / inputs.shape[1]
        rows = torch.cat([inputs, penalty.sqrt() * torch.eye(inputs.shape[1])])
        solution = torch.linalg.lstsq(
            rows, torch.cat([targets, torch.zeros(inputs.shape[1], inputs.shape[1])])
        ).solution
        assert costs.before[leader, follower] == pytest.approx(targets.square().sum(-1).mean().item(), rel=1e-9)
        residual = targets - inputs @ solution
        assert costs.after[leader, follower] == pytest.approx(residual.square().sum(-1).mean().item(), rel=1e-9)


def test_costs_do_not_depend_on_padding(float64):
    model = loud(tiny_model())
    ids = prompt(batch=3, length=8)
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(3, 4, dtype=torch.long), torch.ones_like(ids)], dim=1)
    decoder = find_decoder(model, find_family(model.config))
    settings = {"layers": range(6), "max_size": 3, "progress": False}
    plain = measure_costs(model, decoder, [{"input_ids": ids}], **settings)
    with_padding = measure_costs(model, decoder, [{"input_ids": padded, "attention_mask": mask}], **settings)
    assert with_padding.tokens == plain.tokens
    assert with_padding.after == pytest.approx(plain.after, rel=1e-6)


def test_losses_are_those_of_models_with_one_superblock(float64):
    """By the independent implementation, over the tokens that have a label and are no padding."""
    model = loud(tiny_model())
    ids, mask = prompt(batch=3, length=10), torch.ones(3, 10, dtype=torch.long)
    mask[1, :4] = 0
    labels = ids.masked_fill(torch.arange(10) < 5, -100)
    data = [{"input_ids": ids, "attention_mask": mask, "labels": labels}]
    decoder = find_decoder(model, find_family(model.config))
    before = model(ids, attention_mask=mask).logits
    found = measure_losses(model, decoder, data, layers=range(1, 6), max_size=3, progress=False)
    assert torch.equal(model(ids, attention_mask=mask).logits, before)

    def loss(*superblocks):
        logits = unified_logits(
            model.state_dict(), model.config, ids, superblocks=superblocks, attention_mask=mask,
            position_ids=torch.arange(10)[None].expand(3, -1),
        )  # fmt: skip
        return torch.nn.functional.cross_entropy(logits[:, 4:-1].flatten(0, 1), ids[:, 5:].flatten()).item()

    assert found.tokens == 15
    assert found.base == pytest.approx(loss(), rel=1e-9)
    assert set(found.losses) == {(1, 2), (1, 3), (2, 3), (2, 4), (3, 4), (3, 5), (4, 5)}
    for (leader, last), value in found.losses.items():
        assert value == pytest.approx(loss(range(leader, last + 1)), rel=1e-9)


@pytest.mark.parametrize("family", ["gemma2", "phi3", "gpt_neox", "llama4_text", "granitemoe"])
def test_losses_of_other_families_are_those_of_adapters_without_compensation(family):
    """Of models that embed, mask, scale or fuse otherwise: what is below a leader is not run again."""
    model = Case(family).base().eval()
    ids = prompt(batch=2, length=9)
    decoder = find_decoder(model, find_family(model.config))
    masks = getattr(decoder.backbone.config, "layer_types", None)
    found = measure_losses(
        model, decoder, [{"input_ids": ids}], layers=range(6), max_size=3, masks=masks, progress=False
    )
    for (leader, last), value in found.losses.items():
        config = UniAttnConfig(superblocks=[list(range(leader, last + 1))], compensation="none")
        adapted = get_peft_model(model, config).eval()
        with torch.no_grad():
            logits = adapted(input_ids=ids, use_cache=False).logits[:, :-1].float()
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        assert value == pytest.approx(expected.item(), rel=1e-6)
        adapted.unload()


def test_without_labels_every_token_but_padding_counts():
    model = tiny_model()
    ids, mask = prompt(batch=2, length=8), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    decoder = find_decoder(model, find_family(model.config))
    data = [{"input_ids": ids, "attention_mask": mask}]
    found = measure_losses(model, decoder, data, layers=range(6), max_size=2, progress=False)
    logits = model(ids, attention_mask=mask).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    assert found.tokens == int(mask[:, 1:].sum())
    assert found.base == pytest.approx(losses[mask[:, 1:].bool()].mean().item(), rel=1e-5)


def test_what_followers_add_to_the_loss_adds_up_to_their_superblocks():
    costs = LossCosts(2.0, {(0, 1): 2.5, (0, 2): 2.25, (1, 2): 3.0}, tokens=1)
    assert costs.pairs == {(0, 1): 0.5, (0, 2): -0.25, (1, 2): 1.0}


@pytest.mark.parametrize("method", ["error", "similarity", "loss"])
def test_the_choice_is_a_plan_with_so_many_followers_and_leaves_the_model_alone(method):
    model = tiny_model()
    before = model(prompt()).logits
    superblocks = choose_superblocks(model, batch(), followers=3, method=method, max_size=3, progress=False)
    assert sum(len(block) - 1 for block in superblocks) == 3
    assert torch.equal(model(prompt()).logits, before)
    UniAttnConfig(superblocks=superblocks).make_plan(6)


@pytest.mark.parametrize("method", ["error", "similarity", "loss"])
def test_another_budget_from_what_was_measured_is_what_a_measurement_of_its_own_gives(method):
    model, settings = tiny_model(), {"method": method, "max_size": 3, "progress": False}
    choice = choose(model, batch(), followers=4, **settings)
    for followers in (1, 2, 3):
        assert choice.with_followers(followers) == choose_superblocks(model, batch(), followers=followers, **settings)
    with pytest.raises(ValueError, match="followers=5 do not fit"):
        choice.with_followers(5)


def test_a_layer_that_repeats_its_neighbours_softmax_is_chosen_to_follow():
    """Layer 3 attends exactly as layer 2: same input to both, because layer 2 adds nothing."""
    model = loud(tiny_model())
    layers = model.model.layers
    torch.nn.init.zeros_(layers[2].self_attn.o_proj.weight)
    torch.nn.init.zeros_(layers[2].mlp.down_proj.weight)
    for name in ("q_proj", "k_proj"):
        getattr(layers[3].self_attn, name).load_state_dict(getattr(layers[2].self_attn, name).state_dict())
    layers[3].input_layernorm.load_state_dict(layers[2].input_layernorm.state_dict())
    for method in ("error", "similarity"):
        # Not from below: layer 2, which adds nothing, follows anyone without an error.
        settings = {"followers": 1, "start_layer": 2, "method": method}
        assert choose_superblocks(model, batch(), **settings, progress=False) == [[2, 3]]


@pytest.mark.parametrize(
    ("layers", "target", "followers"), [(30, 0.8, 12), (32, 0.8125, 12), (32, 0.81, 13), (6, 0.9, 2)]
)
def test_a_cache_target_means_the_fewest_followers_that_keep_to_it(layers, target, followers):
    assert followers_for(layers, kv_target=target) == followers
    assert 1 - followers / layers / 2 <= target < 1 - (followers - 1) / layers / 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "followers=None and kv_target=None: give one"),
        ({"followers": 2, "kv_target": 0.8}, "give one of the two"),
        ({"followers": 0}, "followers=0 must be"),
        ({"kv_target": 0.5}, "kv_target=0.5 must be above 0.5"),
        ({"kv_target": "0.8"}, "kv_target='0.8' must be a number"),
        ({"kv_target": True}, "kv_target=True must be a number"),
        ({"followers": 6}, "followers=6 do not fit"),
        ({"followers": 2, "method": "magic"}, "method='magic'"),
        ({"followers": 2, "max_size": 1}, "max_size=1 must be"),
        ({"followers": 2, "start_layer": 6}, "start_layer=6"),
        ({"followers": 2, "ridge": 0.0}, "ridge=0.0"),
    ],
)
def test_an_impossible_budget_is_refused_before_any_data_are_read(settings, message):
    def never():
        raise AssertionError("read data")
        yield

    with pytest.raises(ValueError, match=message):
        choose_superblocks(tiny_model(), never(), progress=False, **settings)


@pytest.mark.parametrize("method", ["error", "similarity", "loss"])
def test_empty_data_are_refused(method):
    with pytest.raises(ValueError, match="dataloader is empty"):
        choose_superblocks(tiny_model(), [], followers=2, method=method, progress=False)


def test_a_model_with_an_adapter_is_refused():
    adapted = tiny_adapter()
    with pytest.raises(ValueError, match="base model"):
        choose_superblocks(adapted, batch(), followers=2, progress=False)
    with pytest.raises(ValueError, match="has a UniAttn adapter already"):
        choose_superblocks(adapted.get_base_model(), batch(), followers=2, progress=False)


def test_a_chosen_plan_respects_the_masks_of_the_model():
    types = ["sliding_attention"] * 3 + ["full_attention"] * 3
    model = tiny_model("qwen2", layer_types=types, sliding_window=4, use_sliding_window=True, max_window_layers=3)
    superblocks = choose_superblocks(model, batch(), followers=3, progress=False)
    assert all(len({types[layer] for layer in block}) == 1 for block in superblocks)


@pytest.mark.parametrize("method", ["error", "similarity", "loss"])
@pytest.mark.parametrize("follower_mask", ["own", "leader"])
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "olmo2", "granite", "phi3", "gpt_neox"])
def test_a_choice_for_other_architectures_can_be_applied(family, follower_mask, method):
    case = Case(family, follower_mask)
    model = case.base()
    settings = {"followers": 2, "follower_mask": follower_mask, "method": method, "progress": False}
    superblocks = choose_superblocks(model, batch(), **settings)
    assert sum(len(block) - 1 for block in superblocks) == 2
    get_peft_model(model, UniAttnConfig(superblocks=superblocks, follower_mask=follower_mask))(prompt())
