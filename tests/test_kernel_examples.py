"""The examples that measure kernels on real text, at a tiny size and without a GPU."""

from __future__ import annotations

import itertools
import json
import runpy
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from word_tokenizer import WORDS, word_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny model of 8 layers, half of them one Superblock, with its tokenizer."""
    model = tiny_model(num_hidden_layers=8, vocab_size=len(WORDS), dtype=torch.float32, eos_token_id=2)
    model.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(f"w{(7 * index + index // 5) % 90}" for index in range(800)))
    return tmp_path / "text.txt"


def example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


TINY = {"length": [16], "windows": 3, "decode_windows": 2, "new": 4, "prompt": 8, "calibration_tokens": 256}


@pytest.mark.filterwarnings("ignore:.*tokens are few")
def test_every_part_has_a_row_for_every_setting(checkpoint, text, tmp_path):
    """Without a GPU there are no kernels: all settings are one computation."""
    example("kernels_on_real_text")["main"](checkpoint, text, text, **TINY, seconds=100, output=tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["left_out"] == []
    for part, tokens in (("prompts 16", 3 * 15), ("decoded 16", 2 * 4)):
        assert [row["skip_mass"] for row in result[part]] == [0.0, 0.0, 0.01, 0.05]
        assert {row["tokens"] for row in result[part]} == {tokens}
        assert {row["mean_absolute_difference"] for row in result[part]} == {0.0}
        assert all(row["perplexity"] > 1 for row in result[part])
    assert [row["equal_tokens"] for row in result["generated"]] == [1.0] * 4
    assert result["generated"][3]["first_differences"] == [None] * 8


@pytest.mark.filterwarnings("ignore:.*tokens are few")
def test_what_there_is_no_time_for_is_named(checkpoint, text, tmp_path):
    example("kernels_on_real_text")["main"](checkpoint, text, text, **TINY, seconds=0, output=tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["left_out"] == ["prompts 16", "decoded 16", "generated"]
    assert result["superblocks"] == [[4, 5, 6, 7]]


def test_a_short_text_is_refused_before_a_model_is_loaded(checkpoint, text):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has 800 tokens, fewer than a window of 801"):
        example("kernels_on_real_text")["main"](checkpoint, text, text, **{**TINY, "length": [801]})


def test_the_first_difference_comes_with_its_margin():
    first_difference = example("kernels_on_real_text")["first_difference"]
    logits = torch.tensor([[0.0, 1.0, 9.0], [5.0, 4.75, 0.0], [0.0, 3.0, 0.0]])
    assert first_difference(torch.tensor([2, 1, 0]), torch.tensor([2, 0, 1]), logits) == {
        "position": 1,
        "margin": 0.25,
    }
    assert first_difference(torch.tensor([2, 0, 1]), torch.tensor([2, 0, 1]), logits) is None


def test_kept_tiles_are_counted_against_what_a_prompt_can_see(monkeypatch):
    launch = pytest.importorskip("peft_uniattn.kernels.decode_launch")
    monkeypatch.setattr(launch, "select", lambda sums, factors, bound: (None, torch.tensor([[[1, 2, 3, 2]]]), None))
    with example("kernels_on_real_text")["Kept"]() as kept:
        launch.select(torch.ones(1, 1, 4, 4, 1), None, 0.01)
    assert kept.share == 8 / 10  # 1 + 2 + 3 + 4 tiles on and below the diagonal


def test_the_mass_of_tiles_is_that_of_the_softmax():
    torch.manual_seed(0)
    query, key = torch.randn(4, 300, 8), torch.randn(2, 300, 8)
    scores = query.double() @ key.repeat_interleave(2, 0).double().transpose(1, 2) / 8**0.5
    full = scores.masked_fill(torch.ones(300, 300).triu(1).bool(), float("-inf")).softmax(-1)
    mass = example("kept_tiles")["mass_of_tiles"](query[:, 130:258], key, 130)
    expected = torch.stack([full[:, 130:258, start : start + 128].sum(-1) for start in (0, 128, 256)], -1)
    torch.testing.assert_close(mass, expected.float())


def test_as_few_tiles_are_kept_as_the_bound_allows():
    """Tried against all subsets of six tiles."""
    torch.manual_seed(1)
    mass = torch.rand(5, 6)
    for row, count in zip(mass, example("kept_tiles")["kept"](mass, 0.7), strict=True):
        subsets = itertools.chain(*(itertools.combinations(row.tolist(), size) for size in range(7)))
        assert 6 - count == max(len(left_out) for left_out in subsets if sum(left_out) <= 0.7)


def test_kept_tiles_has_a_row_for_every_leader_and_bound(checkpoint, text, tmp_path):
    options = {"length": [256, 512], "skip_mass": [0.0, 0.6], "windows": 1, "superblock_size": 2}
    example("kept_tiles")["main"](str(checkpoint), text, **options, output=tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["length"], row["layer"], row["skip_mass"]) for row in rows] == list(
        itertools.product((256, 512), (4, 6), (0.0, 0.6))
    )
    for exact, skipping in zip(rows[::2], rows[1::2], strict=True):
        assert exact["prompt"] == exact["decoded"] == 1.0
        assert 0 < skipping["decoded"] < 1
        assert 0 < skipping["prompt"] < 1
