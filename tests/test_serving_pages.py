"""The page arithmetic of serving, without an engine."""

from fractions import Fraction

import pytest

from peft_uniattn.plan import make_plan
from peft_uniattn.serving.pages import K_HALF, V_HALF, ValuePage, capacity_ratio, num_pages, num_tokens, value_pages


def blocks(*sizes: int) -> list[list[int]]:
    """Superblocks of these sizes, one after the other from layer 0."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]


def test_two_followers_share_a_page():
    assert value_pages([[4, 5, 6]]) == {5: ValuePage(5, K_HALF), 6: ValuePage(5, V_HALF)}


def test_followers_of_different_superblocks_share_a_page():
    assert value_pages([[0, 1], [4, 5]]) == {1: ValuePage(1, K_HALF), 5: ValuePage(1, V_HALF)}


def test_the_last_of_an_odd_number_has_a_page_to_itself():
    pages = value_pages([[0, 1, 2, 3]])
    assert [page.owner for page in pages.values()] == [1, 1, 3]


@pytest.mark.parametrize("sizes", [(2,), (2, 2), (3, 2), (4, 4, 4), (2, 3, 4, 5), (7,), (8,)], ids=str)
def test_no_half_holds_the_values_of_two_followers(sizes):
    pages = value_pages(blocks(*sizes))
    assert len(set(pages.values())) == len(pages) == sum(sizes) - len(sizes)
    assert all(page.owner <= layer and pages[page.owner].owner == page.owner for layer, page in pages.items())


@pytest.mark.parametrize(
    ("layers", "sizes", "pages"),
    [
        (32, (4, 4, 4, 4), 26),  # 12 followers in 6 pages
        (30, (4, 4, 4), 26),  # 9 followers in 5
        (30, (4, 4, 4, 4), 24),
        (8, (2,), 8),  # one follower saves nothing: half its page is empty
        (8, (2, 2), 7),
        (8, (8,), 5),
        (8, (3, 3, 2), 6),
    ],
)
def test_pages_are_counted_in_whole(layers, sizes, pages):
    assert num_pages(layers, blocks(*sizes)) == pages


def test_twelve_of_32_layers_hold_32_26ths_of_the_tokens():
    assert capacity_ratio(32, make_plan(32).superblocks) == Fraction(32, 26)


def test_memory_holds_whole_blocks_of_tokens_only():
    page = 2 * 3 * 64 * 4 * 128  # K and V of SmolLM2-135M in float32
    assert num_tokens(2**30, page, 128, 30) == 23_296  # what vLLM 0.32.0 reports for 1 GiB
    assert num_tokens(page * 30 - 1, page, 128, 30) == 0
