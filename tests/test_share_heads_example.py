"""The example in which single heads follow, on tiny models and without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import loud, prompt, tiny_model
from peft import get_peft_model
from word_tokenizer import WORDS, word_tokenizer

from peft_uniattn import UniAttnConfig

pytest.importorskip("lm_eval")
EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # as `python examples/share_heads.py` has it

import share_heads  # noqa: E402
from explore_data import Examples  # noqa: E402
from share_heads import cheapest, costs, sharing  # noqa: E402

QUESTION = {"context": "w1 w2 .", "question": "w3 ?", "answerA": "w4", "answerB": "w5 w6", "answerC": "w7"}


@pytest.fixture
def model():
    """6 layers, 4 query heads of 8 that read 2 key/value heads."""
    found = loud(tiny_model(dtype=torch.float32)).eval()
    found.set_attn_implementation(share_heads.NAME)
    return found


@torch.no_grad()
def logits(model):
    return model(prompt(), use_cache=False).logits


def test_all_heads_of_layers_are_followers_of_the_package(model):
    with sharing({2: (0, 1), 3: (0, 1)}):
        found = logits(model)
    assert (found - logits(model)).abs().max() > 0.1
    model.set_attn_implementation("sdpa")
    adapted = get_peft_model(model, UniAttnConfig(superblocks=[[1, 2, 3]], compensation="none"))
    torch.testing.assert_close(found, logits(adapted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("heads", "leader"), [({3: (1,)}, 2), ({2: (1,), 3: (1,)}, 1)])
def test_a_head_applies_its_leaders_softmax_to_its_own_values(model, heads, leader):
    seen, follower = {}, model.model.layers[3].self_attn
    follower.v_proj.register_forward_hook(lambda _, args, output: seen.update(value=output))
    follower.o_proj.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0]))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        softmax = model(prompt(), output_attentions=True, use_cache=False).attentions
    own = seen["heads"]
    model.set_attn_implementation(share_heads.NAME)
    with sharing(heads):
        logits(model)
    expected = torch.cat([softmax[leader][:, head] @ seen["value"][..., 8:] for head in (2, 3)], -1)
    torch.testing.assert_close(seen["heads"][..., 16:], expected, rtol=1e-4, atol=1e-4)
    if len(heads) == 1:  # else layer 3 reads something else already
        torch.testing.assert_close(seen["heads"][..., :16], own[..., :16], rtol=1e-4, atol=1e-4)


def test_what_changes_nothing_costs_nothing(model):
    below, above = model.model.layers[2:4]
    with torch.no_grad():
        below.self_attn.o_proj.weight.zero_()  # so that both layers read the same
        below.mlp.down_proj.weight.zero_()
        above.input_layernorm.weight.copy_(below.input_layernorm.weight)
        above.self_attn.q_proj.weight.copy_(below.self_attn.q_proj.weight)
        above.self_attn.k_proj.weight[:8].copy_(below.self_attn.k_proj.weight[:8])
    rows = [(row, 6) for row in prompt(5, 9).tolist()]
    of_layers, of_heads = costs(model, Examples.pack(rows, 9, 3))
    assert {layer for layer, cost in of_layers.items() if abs(cost) < 1e-6} == {2}
    assert {head for head, cost in of_heads.items() if abs(cost) < 1e-6} == {(2, 0), (2, 1), (3, 0)}


def test_the_cheapest_layers_and_as_many_heads_are_chosen(model, monkeypatch):
    found = {1: 3.0, 2: 1.0, 3: 2.0}, {(1, 0): 0.1, (1, 1): 9.0, (2, 0): 0.2, (2, 1): 0.3, (3, 0): 1.0, (3, 1): 0.4}
    monkeypatch.setattr(share_heads, "costs", lambda *_: found)
    assert cheapest(model, None, 2) == {"layers": {2: (0, 1), 3: (0, 1)}, "heads": {1: (0,), 2: (0, 1), 3: (1,)}}


@pytest.mark.slow
def test_rows_are_trained_and_finished_ones_kept(tmp_path):
    tiny_model(vocab_size=len(WORDS), dtype=torch.float32, eos_token_id=2).save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    training = [{"instruction": f"w{7 * n % 90} w{n}", "input": "", "output": f"w{n}"} for n in range(40)]
    (tmp_path / "train.json").write_text(json.dumps(training))
    (tmp_path / "socialIQa_v1.4_dev.jsonl").write_text(json.dumps({**QUESTION, "correct": "B"}) + "\n")

    def explore():
        share_heads.main(
            str(tmp_path / "base"),
            tmp_path,
            [str(tmp_path / "train.json")],
            followers=2,
            steps=2,
            batch_size=4,
            held_out_examples=8,
            choosing_examples=8,
            task=["social_iqa_cloze"],
            output=tmp_path / "out.json",
        )
        return json.loads((tmp_path / "out.json").read_text())

    found = explore()
    assert [row["name"] for row in found["rows"]] == ["post", "layers", "heads"]
    assert [sum(map(len, row["heads"].values())) for row in found["rows"]] == [0, 4, 4]
    found["rows"].pop()
    (tmp_path / "out.json").write_text(json.dumps(found))
    again = explore()["rows"]
    assert again[:2] == found["rows"]
    assert again[2]["name"] == "heads"
