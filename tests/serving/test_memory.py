"""Followers' pages hold V only, by the engine's own account."""

import pytest

pytest.importorskip("vllm")

from engine import CACHE_BYTES, PAGE, SIZES, base_model, engine, generate, sampling, standalone_model, token_ids

from peft_uniattn.serving.pages import num_pages, num_tokens

TOKEN_BYTES = 2 * SIZES["num_key_value_heads"] * SIZES["head_dim"] * 4  # K and V of one layer
TWELVE_OF_32 = [list(range(start, start + 4)) for start in (16, 20, 24, 28)]


def reported_tokens(folder) -> int:
    with engine(folder) as llm:
        cache = llm.llm_engine.vllm_config.cache_config
        return cache.num_gpu_blocks * cache.block_size


def counted_tokens(num_pages: int) -> int:
    return num_tokens(CACHE_BYTES, TOKEN_BYTES * PAGE, PAGE, num_pages)


def test_twelve_of_32_layers_hold_1_23_times_the_tokens(tmp_path):
    layers = {"num_hidden_layers": 32}
    base_model(**layers).save_pretrained(tmp_path / "base")
    standalone_model(changes=layers, superblocks=TWELVE_OF_32).save_pretrained(tmp_path / "unified")
    base, unified = reported_tokens(tmp_path / "base"), reported_tokens(tmp_path / "unified")
    assert (base, unified) == (counted_tokens(32), counted_tokens(26))
    assert unified / base == pytest.approx(1.23, abs=0.005)


@pytest.mark.parametrize("superblocks", [[[0, 1]], [[0, 1, 2, 3]], [[0, 1], [2, 3, 4], [5, 6, 7]]], ids=str)
def test_the_engine_counts_the_pages_that_we_count(superblocks, tmp_path):
    standalone_model(superblocks=superblocks).save_pretrained(tmp_path)
    assert reported_tokens(tmp_path) == counted_tokens(num_pages(8, superblocks))


def test_two_followers_write_into_one_page(tmp_path):
    standalone_model(superblocks=[[0, 1, 2]]).save_pretrained(tmp_path)
    with engine(tmp_path, num_gpu_blocks_override=32) as llm:
        generate(llm, token_ids(20), sampling(4))
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        pages = [layers[f"model.layers.{layer}.self_attn.attn"].kv_cache for layer in range(3)]
    assert pages[1].data_ptr() == pages[2].data_ptr() != pages[0].data_ptr()
    halves = pages[1].flatten(2).unflatten(2, (2, -1))
    assert (halves.count_nonzero(dim=(0, 1, 3)) > 0).all()


def test_layers_with_a_window_keep_the_whole_context(tmp_path):
    standalone_model("gemma2").save_pretrained(tmp_path)
    assert reported_tokens(tmp_path) == counted_tokens(num_pages(8, [[1, 2, 3], [5, 6]]))
