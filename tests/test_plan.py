"""The layout of Superblocks, and the refusal of impossible ones."""

import re

import pytest

from peft_uniattn import UniAttnConfig
from peft_uniattn.plan import Plan, make_plan


@pytest.mark.parametrize(
    ("num_layers", "text"),
    [
        (32, "[16-19] [20-23] [24-27] [28-31]"),
        (30, "[15-18] [19-22] [23-26]"),
        (42, "[21-24] [25-28] [29-32] [33-36] [37-40]"),
        (28, "[14-17] [18-21] [22-25]"),
        (8, "[4-7]"),
        (7, "[3-6]"),
    ],
)
def test_by_default_the_top_half_is_filled_with_superblocks_of_four(num_layers, text):
    assert str(UniAttnConfig().make_plan(num_layers)) == text


def test_the_default_plan_of_llama_8b_names_every_layer():
    plan = make_plan(32)
    assert plan.superblocks == (
        (16, 17, 18, 19),
        (20, 21, 22, 23),
        (24, 25, 26, 27),
        (28, 29, 30, 31),
    )
    assert plan.leaders == [16, 20, 24, 28]
    assert plan.followers == [17, 18, 19, 21, 22, 23, 25, 26, 27, 29, 30, 31]
    assert plan.leader_of == {layer: layer // 4 * 4 for layer in range(16, 32)}


def test_every_range_is_filled_from_its_start_and_its_incomplete_rest_left_alone():
    for num_layers in range(2, 11):
        for start in range(num_layers):
            for end in range(start + 2, num_layers + 1):
                for size in range(2, end - start + 1):
                    leader_of = {}
                    for layer in range(start, end):
                        leader = start + (layer - start) // size * size
                        if leader + size <= end:
                            leader_of[layer] = leader
                    plan = make_plan(num_layers, superblock_size=size, start_layer=start, end_layer=end)
                    assert plan.leader_of == leader_of
                    assert plan.num_layers == num_layers


FULL, WINDOW = "full_attention", "sliding_attention"


def test_the_papers_gemma_2_plan_starts_at_layers_with_full_attention():
    """42 layers, every second one full: the leaders are full, their followers of either kind."""
    config = UniAttnConfig(follower_mask="leader")
    plan = config.make_plan(42, [WINDOW, FULL] * 21)
    assert str(plan) == "[21-24] [25-28] [29-32] [33-36] [37-40]"


@pytest.mark.parametrize(
    ("follower_mask", "masks", "text"),
    [
        ("own", [FULL] * 8, "[0-1] [2-3] [4-5] [6-7]"),
        ("own", [FULL] * 3 + [WINDOW] * 5, "[0-1] [3-4] [5-6]"),
        ("own", [FULL, WINDOW, WINDOW, WINDOW, FULL, WINDOW, WINDOW, WINDOW], "[1-2] [5-6]"),
        ("leader", [WINDOW, FULL] * 4, "[1-2] [3-4] [5-6]"),
        ("leader", [WINDOW] * 8, "[0-1] [2-3] [4-5] [6-7]"),
    ],
)
def test_superblocks_keep_to_layers_whose_masks_allow_it(follower_mask, masks, text):
    assert str(make_plan(8, superblock_size=2, start_layer=0, masks=masks, follower_mask=follower_mask)) == text


def test_a_model_without_a_run_of_one_mask_is_refused():
    with pytest.raises(ValueError, match=r'superblock_size=4: .* have one kind of mask; .* follower_mask="leader"'):
        make_plan(42, masks=[WINDOW, FULL] * 21)


@pytest.mark.parametrize(
    ("follower_mask", "block", "kinds"),
    [
        ("own", [0, 1], "0: sliding_attention, 1: full_attention"),
        ("own", [1, 2], "1: full_attention, 2: sliding_attention"),
        ("leader", [0, 1], "0: sliding_attention, 1: full_attention"),
    ],
)
def test_an_explicit_superblock_of_different_masks_is_refused(follower_mask, block, kinds):
    with pytest.raises(
        ValueError, match=re.escape(f"Superblock {block} mixes layers with different masks ({kinds});")
    ):
        make_plan(4, superblocks=[block], masks=[WINDOW, FULL] * 2, follower_mask=follower_mask)


def test_an_explicit_superblock_may_take_the_mask_of_a_leader_with_full_attention():
    plan = make_plan(4, superblocks=[[1, 2, 3]], masks=[WINDOW, FULL] * 2, follower_mask="leader")
    assert plan.superblocks == ((1, 2, 3),)


@pytest.mark.parametrize("value", ["full", "", None, True])
def test_an_unknown_follower_mask_is_refused(value):
    with pytest.raises(ValueError, match=re.escape(f"follower_mask={value!r} must be 'own' or 'leader'")):
        UniAttnConfig(follower_mask=value)


@pytest.mark.parametrize(
    ("num_layers", "superblocks", "percent"),
    [(32, None, 81.25), (32, [[0, 1]], 98.4375), (4, [[0, 1, 2, 3]], 62.5), (32, [[1, 2], [4, 5, 6]], 95.3125)],
)
def test_kv_retain_rate_counts_half_a_layer_per_follower(num_layers, superblocks, percent):
    assert make_plan(num_layers, superblocks=superblocks).kv_retain_rate * 100 == percent


def test_explicit_superblocks_override_the_three_other_arguments():
    config = UniAttnConfig(superblock_size=2, start_layer=0, end_layer=2, superblocks=[[3, 4, 5], [8, 9]])
    assert config.make_plan(10) == Plan(((3, 4, 5), (8, 9)), 10)


def test_explicit_superblocks_are_put_in_order():
    assert make_plan(6, superblocks=[[4, 5], [0, 1]]).superblocks == ((0, 1), (4, 5))


def test_explicit_superblocks_may_mix_lists_and_tuples():
    assert make_plan(6, superblocks=[(4, 5), [0, 1]]).superblocks == ((0, 1), (4, 5))


def test_the_configuration_keeps_superblocks_as_json_lists():
    assert UniAttnConfig(superblocks=((0, 1), (2, 3))).superblocks == [[0, 1], [2, 3]]


def test_the_configuration_keeps_no_hold_on_the_lists_it_was_given():
    blocks = [[0, 1]]
    config = UniAttnConfig(superblocks=blocks)
    blocks[0].append(7)
    assert config.superblocks == [[0, 1]]


@pytest.mark.parametrize("size", [1, 0, -4, 4.0, "4", True, None])
def test_a_superblock_size_that_is_no_integer_of_two_or_more_is_refused(size):
    message = re.escape(f"superblock_size={size!r} ")
    with pytest.raises(ValueError, match=message):
        UniAttnConfig(superblock_size=size)
    with pytest.raises(ValueError, match=message):
        make_plan(8, superblock_size=size)


@pytest.mark.parametrize("value", [-1, 2.0, "2", True, False])
@pytest.mark.parametrize("name", ["start_layer", "end_layer"])
def test_a_bound_that_is_no_layer_index_is_refused(name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} ")):
        UniAttnConfig(**{name: value})


@pytest.mark.parametrize("rank", [0, -1, 2.0, "2", True, False])
def test_a_rank_that_is_no_integer_of_one_or_more_is_refused(rank):
    with pytest.raises(ValueError, match=re.escape(f"r={rank!r} ")):
        UniAttnConfig(r=rank)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"start_layer": 8}, "start_layer=8 .* 8 decoder layers; use 0 to 7"),
        ({"start_layer": -1}, "start_layer=-1 .* 8 decoder layers; use 0 to 7"),
        ({"end_layer": 9}, "end_layer=9 .* 8 decoder layers; use 0 to 8"),
        ({"start_layer": 0, "end_layer": -1}, "end_layer=-1 .* 8 decoder layers; use 0 to 8"),
    ],
)
def test_a_range_outside_the_model_is_refused(bounds, message):
    with pytest.raises(ValueError, match=message):
        make_plan(8, **bounds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"superblock_size": 5}, "superblock_size=5 .* start_layer=4 and end_layer=8, which hold 4 "),
        ({"start_layer": 5}, "superblock_size=4 .* start_layer=5 and end_layer=8, which hold 3 "),
        ({"end_layer": 7}, "superblock_size=4 .* start_layer=4 and end_layer=7, which hold 3 "),
        ({"end_layer": 2}, "superblock_size=4 .* start_layer=4 and end_layer=2, which hold 0 "),
    ],
)
def test_a_superblock_larger_than_its_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_plan(8, **arguments)


@pytest.mark.parametrize(
    ("superblocks", "message"),
    [
        ([], "superblocks=[] must be a non-empty list"),
        ("01", "superblocks='01' must be a non-empty list"),
        ({0: [0, 1]}, "superblocks={0: [0, 1]} must be a non-empty list"),
        ([0, 1], "superblocks contains 0; every Superblock is a list"),
        (["01"], "superblocks contains '01'; every Superblock is a list"),
        ([[0, 1], [2.0, 3.0]], "superblocks contains [2.0, 3.0]; every Superblock is a list"),
        ([[False, True]], "superblocks contains [False, True]; every Superblock is a list"),
        ([[-1, 0]], "superblocks contains [-1, 0]; every Superblock is a list"),
        ([[0, 1], []], "superblocks contains [], which has no follower"),
        ([[3]], "superblocks contains [3], which has no follower"),
        ([[1, 3]], "superblocks contains [1, 3], whose layers are not consecutive"),
        ([[2, 1]], "superblocks contains [2, 1], whose layers are not consecutive"),
        ([[1, 1, 2]], "superblocks contains [1, 1, 2], whose layers are not consecutive"),
        ([[0, 1, 2], [2, 3]], "superblocks=[[0, 1, 2], [2, 3]] uses layer 2 twice"),
        ([[0, 1], [0, 1]], "superblocks=[[0, 1], [0, 1]] uses layer 0 twice"),
    ],
)
def test_impossible_superblocks_are_refused(superblocks, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        UniAttnConfig(superblocks=superblocks)
    with pytest.raises(ValueError, match=re.escape(message)):
        make_plan(8, superblocks=superblocks)


def test_superblocks_above_the_model_are_refused():
    message = "superblocks=[[0, 1], [6, 7, 8]] names layer 8, but the model has 8 decoder layers (0 to 7)"
    with pytest.raises(ValueError, match=re.escape(message)):
        UniAttnConfig(superblocks=[[0, 1], [6, 7, 8]]).make_plan(8)


def test_superblocks_changed_after_creation_are_checked_too():
    config = UniAttnConfig()
    config.superblocks = [[1, 2], [2, 3]]
    with pytest.raises(ValueError, match="uses layer 2 twice"):
        config.make_plan(8)
