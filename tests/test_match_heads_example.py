"""The example that matches followers' heads with their leader's, on tiny models and without a GPU."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import loud, prompt, tiny_model
from peft import get_peft_model
from word_tokenizer import WORDS, word_tokenizer

from peft_uniattn import UniAttnConfig, to_standalone
from peft_uniattn.grouping.choose import choose

pytest.importorskip("lm_eval")
pytest.importorskip("scipy")
EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # as `python examples/match_heads.py` has it

import match_heads  # noqa: E402
from explore_data import Examples  # noqa: E402
from head_matching import aligned, costs, free, grouped, heads_of, matched  # noqa: E402

PERMUTED = [3, 2, 0, 1]  # of 4 heads in 2 groups: the groups change places, and the heads of one of them
QUESTION = {"context": "w1 w2 .", "question": "w3 ?", "answerA": "w4", "answerB": "w5 w6", "answerC": "w7"}


def examples(count=5, length=9):
    """Random tokens of several lengths, two of them an answer."""
    ids = prompt(count, length).tolist()
    return Examples.pack([(row[: length - n], length - n - 2) for n, row in enumerate(ids)], length, 2)


def permutations(groups, group):
    """All that take groups to groups, written down one by one."""
    for order in itertools.permutations(range(groups)):
        for inner in itertools.product(itertools.permutations(range(group)), repeat=groups):
            yield [a * group + head for a, heads in zip(order, inner, strict=True) for head in heads]


def choices(groups, group):
    """Any group for each group, and any of its heads for each head."""
    for order in itertools.product(range(groups), repeat=groups):
        for inner in itertools.product(itertools.product(range(group), repeat=group), repeat=groups):
            yield [a * group + head for a, heads in zip(order, inner, strict=True) for head in heads]


@pytest.mark.parametrize(("groups", "group"), [(3, 2), (2, 3), (4, 1), (1, 4)])
@pytest.mark.parametrize(("match", "allowed"), [(aligned, permutations), (grouped, choices)])
def test_a_matching_is_the_cheapest_of_all_that_are_allowed(match, allowed, groups, group):
    heads = groups * group
    for seed in range(5):
        cost = torch.rand(heads, heads, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        best = min(allowed(groups, group), key=lambda taken: sum(cost[g, h] for h, g in enumerate(taken)))
        assert match(cost, group).tolist() == best


def test_free_takes_the_cheapest_head():
    assert free(torch.tensor([[1.0, 5.0, 2.0], [3.0, 4.0, 1.0], [2.0, 6.0, 3.0]]), 1).tolist() == [0, 1, 1]


def test_a_cost_is_the_squared_error_of_a_heads_output():
    data, model = examples(), loud(tiny_model())
    found = costs(model.float(), data, 5, reach=3, batch_size=2)
    model = model.double()
    model.set_attn_implementation("eager")
    layers, expected = model.model.layers, {}
    assert set(found) == {(leader, f) for f in range(6) for leader in range(6) if 0 < f - leader < 3}
    for ids, positions in zip(data.ids, data.positions, strict=True):
        out = model(ids[None, : positions.max() + 2], output_attentions=True, output_hidden_states=True)
        for leader, follower in found:
            layer = layers[follower]
            value = layer.self_attn.v_proj(layer.input_layernorm(out.hidden_states[follower]))[0]
            total = expected.setdefault((leader, follower), torch.zeros(4, 4, dtype=torch.float64))
            for g, h in itertools.product(range(4), repeat=2):
                v = value[:, h // 2 * 8 : h // 2 * 8 + 8] @ layer.self_attn.o_proj.weight[:, 8 * h : 8 * h + 8].T
                total[g, h] += ((out.attentions[leader][0, g] - out.attentions[follower][0, h]) @ v).square().sum()
    for pair, cost in found.items():
        torch.testing.assert_close(cost, expected[pair].detach(), rtol=1e-4, atol=1e-4)


@pytest.fixture
def permuted():
    """A model whose layer 3 has the softmax of layer 2 with its heads in another order, head h that of PERMUTED[h]."""
    model = loud(tiny_model(dtype=torch.float32))
    below, above = model.model.layers[2:4]
    with torch.no_grad():
        below.self_attn.o_proj.weight.zero_()  # so that both layers read the same
        below.mlp.down_proj.weight.zero_()
        above.input_layernorm.weight.copy_(below.input_layernorm.weight)
        for name, order in (("q_proj", PERMUTED), ("k_proj", [1, 0])):
            weight = getattr(below.self_attn, name).weight.unflatten(0, (-1, 8))
            getattr(above.self_attn, name).weight.copy_(weight[order].flatten(0, 1))
    return model


def shared(model, superblocks):
    config = UniAttnConfig(superblocks=superblocks, compensation="none")
    return to_standalone(get_peft_model(model, config)).eval()


@torch.no_grad()
def logits(model):
    return model(prompt()).logits


@pytest.mark.parametrize("kind", ["aligned", "grouped", "free"])
def test_heads_in_another_order_are_found_and_sharing_them_changes_nothing(permuted, kind):
    heads = heads_of(costs(permuted, examples(), 5), kind, permuted.config)
    assert heads[2, 3].tolist() == PERMUTED
    expected = logits(permuted)
    with matched(heads):
        choice = choose(permuted, match_heads.labelled(examples(), 5), followers=1, method="loss", progress=False)
        assert abs(choice.measured.pairs[2, 3]) < 1e-5
        model = shared(permuted, [[2, 3]])
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert (logits(model) - expected).abs().max() > 0.1  # each head with the one in its own place


@pytest.mark.parametrize("taken", [PERMUTED, [2, 3, 2, 2], [3, 1, 0, 0]])
def test_a_matched_head_applies_the_leaders_head_to_its_own_values(taken):
    model, seen = shared(loud(tiny_model(dtype=torch.float32)), [[2, 3]]), {}
    follower = model.model.layers[3].self_attn
    follower.v_proj.register_forward_hook(lambda _, args, output: seen.update(value=output))
    follower.o_proj.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0]))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        softmax = model(prompt(), output_attentions=True).attentions[2]
    model.set_attn_implementation("sdpa")
    with matched({(2, 3): torch.tensor(taken)}):
        logits(model)
    expected = [softmax[:, g] @ seen["value"][..., h // 2 * 8 : h // 2 * 8 + 8] for h, g in enumerate(taken)]
    torch.testing.assert_close(seen["heads"], torch.cat(expected, -1), rtol=1e-4, atol=1e-4)


def test_identity_is_the_package_as_it_is():
    model = loud(tiny_model(dtype=torch.float32))
    heads = heads_of(costs(model, examples(), 5), "identity", model.config)
    model = shared(model, [[2, 3]])
    expected = logits(model)
    with matched(heads):
        assert torch.equal(logits(model), expected)


def test_aligned_heads_can_be_put_into_the_weights():
    model = shared(loud(tiny_model(dtype=torch.float32)), [[2, 3]])
    with matched({(2, 3): torch.tensor(PERMUTED)}):
        expected = logits(model)
    value, output = model.model.layers[3].self_attn.v_proj, model.model.layers[3].self_attn.o_proj
    with torch.no_grad():
        at = torch.tensor(PERMUTED).argsort()  # what stood at h has to stand at PERMUTED[h]
        value.weight.copy_(value.weight.unflatten(0, (2, 8))[at[::2] // 2].flatten(0, 1))
        output.weight.copy_(output.weight.unflatten(1, (4, 8))[:, at].flatten(1))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_labels_are_the_answers_and_nothing_else():
    data = examples()
    (batch,) = match_heads.labelled(data, 99)
    for ids, labels, positions in zip(batch["input_ids"], batch["labels"], data.positions, strict=True):
        end = int(positions.max()) + 2
        assert labels.tolist() == [-100] * (end - 2) + ids[end - 2 : end].tolist() + [-100] * (len(ids) - end)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"heads": "best"}, "heads='best' must be"), ({"dropped_layers": [3], "choose": 1}, "leave out")],
)
def test_a_row_that_cannot_be_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        match_heads.MatchedRow("row", 4, 4, **options)


def test_the_rows_for_30_layers_can_be_run():
    rows = [
        match_heads.MatchedRow(**row, steps=400, batch_size=48)
        for row in json.loads((EXAMPLES / "match_heads.json").read_text())
    ]
    assert {row.choose or len(row.followers) for row in rows} == {6, 12}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*tokens are few")
def test_rows_are_trained_and_finished_ones_kept(tmp_path):
    model = tiny_model(vocab_size=len(WORDS), dtype=torch.float32, eos_token_id=2)
    model.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    training = [{"instruction": f"w{7 * n % 90} w{n}", "input": "", "output": f"w{n}"} for n in range(40)]
    (tmp_path / "train.json").write_text(json.dumps(training))
    (tmp_path / "socialIQa_v1.4_dev.jsonl").write_text(json.dumps({**QUESTION, "correct": "B"}) + "\n")
    given = {"name": "given", "superblocks": [[2, 3]], "heads": "free", "calibration_examples": 4}
    chosen = {"name": "chosen", "choose": 2, "heads": "aligned", "calibration_examples": 4}

    def explore(rows):
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        settings = {"steps": 2, "batch_size": 4, "held_out_examples": 8, "matching_examples": 8}
        match_heads.main(
            str(tmp_path / "base"),
            tmp_path / "rows.json",
            tmp_path,
            [str(tmp_path / "train.json")],
            **settings,
            choosing_examples=8,
            task=["social_iqa_cloze"],
            output=tmp_path / "out.json",
        )
        return json.loads((tmp_path / "out.json").read_text())

    first = explore([given])["rows"]
    found = explore([given, chosen])
    assert found["rows"][:2] == first
    assert [row["name"] for row in found["rows"]] == ["post", "given", "chosen"]
    blocks = found["chosen"]["aligned"]["2"]
    assert sum(len(block) - 1 for block in blocks) == 2
    assert found["rows"][2]["superblocks"] == blocks
    assert found["rows"][2]["options"] == {
        "steps": 2,
        "batch_size": 4,
        "calibration_examples": 4,
        "heads": "aligned",
        "choose": 2,
    }
