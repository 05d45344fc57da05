"""The example that tries levers of the recipe, on a tiny model and without a GPU."""

from __future__ import annotations

import json
import math
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from transformers import AutoModelForCausalLM
from word_tokenizer import WORDS, word_tokenizer

pytest.importorskip("lm_eval")
EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # as `python examples/explore_recipe.py` has it

LEVERS = {"explore_levers.json": {0, 6, 12}, "explore_levers_qwen.json": {0, 5, 10}}  # by numbers of followers
EXAMPLE = runpy.run_path(str(EXAMPLES / "explore_recipe.py"))
BLOCKS = [[2, 3], [4, 5]]
ROWS = [
    {"name": "plain"},
    {"name": "late", "superblocks": BLOCKS, "calibration_examples": 8, "plain_steps": 1, "distillation": 0.5},
    {"name": "frozen", "superblocks": BLOCKS, "calibration_examples": 4, "compensation_learning_rate": 0},
    {"name": "dropped", "dropped_layers": [3], "prompt_kl": 1.0},
    {
        "name": "two stages",
        "superblocks": BLOCKS,
        "rank": 2,
        "calibration_examples": 4,
        "ridge": 1.0,
        "head_scales": 10.0,
        "stage1_steps": 1,
        "stage1_parts": "followers",
        "stage1_loss": "streams",
    },
    {"name": "inside", "superblocks": BLOCKS, "compensation": "none", "leader_from": 1},
]
QUESTION = {"context": "w1 w2 .", "question": "w3 ?", "answerA": "w4", "answerB": "w5 w6", "answerC": "w7"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny model with its tokenizer, forty examples, and one question."""
    folder = tmp_path_factory.mktemp("explore")
    model = tiny_model(vocab_size=len(WORDS), dtype=torch.float32, eos_token_id=2)
    model.save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    examples = [
        {
            "instruction": f"w{7 * n % 90} w{n}",
            "input": "",
            "output": " ".join(f"w{(n + i) % 90}" for i in range(n % 5 + 1)),
        }
        for n in range(40)
    ]
    (folder / "train.json").write_text(json.dumps(examples))
    (folder / "socialIQa_v1.4_dev.jsonl").write_text(json.dumps({**QUESTION, "correct": "B"}) + "\n")
    return folder


def explore(folder, rows, output, seed=0, **options):
    (folder / "rows.json").write_text(json.dumps(rows))
    EXAMPLE["main"](
        str(folder / "base"),
        folder / "rows.json",
        folder,
        [str(folder / "train.json")],
        steps=4,
        batch_size=4,
        held_out_examples=8,
        task=["social_iqa_cloze"],
        seed=seed,
        output=output,
        **options,
    )
    return json.loads(output.read_text())["rows"]


def examples(folder):
    return EXAMPLE["training_examples"]([str(folder / "train.json")], word_tokenizer(), 8, 0)


def plain_losses(model, rows, batch_size, peak, steps):
    """Training as one would write it down: one example at a time, nothing filled up."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    losses = []
    for step in range(steps):
        batch = rows[step * batch_size : (step + 1) * batch_size]
        answers = [len(ids) - start for ids, start in batch]
        loss = 0.0
        for ids, start in batch:
            logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
            loss = loss - logits.log_softmax(-1)[range(len(ids) - start), ids[start:]].sum() / sum(answers)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = peak * (step + 1) / 12  # all of it is warm-up, before the cosine begins
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_no_questions_are_asked_where_only_the_loss_is_wanted(inputs, tmp_path):
    (row,) = explore(inputs, ROWS[:1], tmp_path / "out.json", with_accuracy=False)
    assert row["accuracy"] == {} and row["held_out_loss"] > 0


@pytest.mark.filterwarnings("ignore:.*tokens are few")
def test_rows_are_trained_and_finished_ones_kept(inputs, tmp_path):
    output = tmp_path / "out.json"
    first = explore(inputs, ROWS[:2], output)
    rows = explore(inputs, ROWS, output)
    assert rows[:2] == first
    assert [row["name"] for row in rows] == [row["name"] for row in ROWS]
    assert [row["options"] for row in rows] == [
        {"steps": 4, "batch_size": 4, **{name: value for name, value in row.items() if name != "name"}} for row in ROWS
    ]
    assert [row.keys() & {"plain_losses", "converted_held_out_loss"} for row in rows] == [
        set(),
        {"plain_losses", "converted_held_out_loss"},
        *[{"converted_held_out_loss"}] * 4,
    ]
    assert [row["name"] for row in rows if "stage1_losses" in row] == ["two stages"]
    assert all(math.isfinite(row["held_out_loss"]) and len(row["losses"]) == 1 for row in rows)
    assert {row["accuracy"]["social_iqa_cloze"] for row in rows} <= {0.0, 100.0}
    with pytest.raises(ValueError, match="other results for seed"):
        explore(inputs, ROWS, output, seed=1)
    with pytest.raises(ValueError, match="other results for plain"):
        explore(inputs, [{"name": "plain", "learning_rate": 1.0}], output)


def test_losses_are_those_of_a_plain_loop(inputs, monkeypatch):
    data, _ = examples(inputs)
    row = EXAMPLE["Row"]("plain", steps=12, batch_size=2, learning_rate=0.05)
    monkeypatch.setitem(EXAMPLE["train"].__globals__, "LOG_EVERY", 1)
    model, base = (AutoModelForCausalLM.from_pretrained(inputs / "base") for _ in range(2))

    def loss(model, batch):
        return EXAMPLE["loss_of"](model, batch, row, base, None, data.prompt_positions())

    found = EXAMPLE["train"](model, data, row, range(12), loss)
    rows = [(ids[: max(at) + 2].tolist(), int(at[0]) + 1) for ids, at in zip(data.ids, data.positions, strict=True)]
    expected = plain_losses(base, rows, 2, 0.05, 12)
    assert expected[0] - expected[-1] > 0.1
    assert found == pytest.approx(expected, abs=2e-4)


def test_what_comes_after_the_answer_does_not_matter(inputs):
    data, _ = examples(inputs)
    model = AutoModelForCausalLM.from_pretrained(inputs / "base")
    other = data._replace(ids=data.ids.clone())
    after = torch.arange(data.ids.shape[1]) > data.positions.amax(1, keepdim=True) + 1
    other.ids[after] = 17
    assert not torch.equal(other.ids, data.ids)
    assert torch.equal(EXAMPLE["token_losses"](model, other), EXAMPLE["token_losses"](model, data))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"superblocks": BLOCKS, "dropped_layers": [3]}, "exclude each other"),
        ({"plain_steps": 9}, "steps=4"),
        ({"stage1_steps": 9}, "stage1_steps=9"),
        ({"stage1_steps": 1}, "stage1_steps=1 need followers"),
        ({"leader_from": 1}, "leader_from=1 goes with"),
        ({"stage1_loss": "mse"}, "stage1_loss='mse'"),
    ],
)
def test_rows_that_cannot_be_run_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        EXAMPLE["Row"]("wrong", steps=4, batch_size=2, **options)


@pytest.mark.parametrize("name", LEVERS)
def test_the_levers_that_come_with_it_can_be_run(name):
    given = json.loads((EXAMPLES / name).read_text())
    rows = [EXAMPLE["Row"](**{"steps": 400, "batch_size": 48, **row}) for row in given]
    assert len({row.name for row in rows}) == len(rows)
    assert {len(row.followers) for row in rows} == LEVERS[name]


def test_the_divergence_is_torchs_own_where_the_mask_is_true():
    torch.manual_seed(0)
    reference, logits = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    expected = torch.nn.functional.kl_div(
        logits[mask].log_softmax(-1), reference[mask].log_softmax(-1), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(EXAMPLE["divergence"](reference, logits, mask), expected)


def converted(folder, data, **options):
    """The model of a row right after its conversion, and its base."""
    row = EXAMPLE["Row"]("row", steps=4, batch_size=4, superblocks=BLOCKS, **options)
    base, model = (AutoModelForCausalLM.from_pretrained(folder / "base") for _ in range(2))
    return EXAMPLE["convert"](model, row, data), base, row


@pytest.mark.filterwarnings("ignore:.*tokens are few")
def test_stage_1_moves_what_it_is_told_and_nothing_else(inputs):
    data, _ = examples(inputs)
    model, base, row = converted(
        inputs, data, calibration_examples=4, stage1_steps=2, stage1_parts="followers", stage1_loss="streams"
    )
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    EXAMPLE["train"](model, data, row, range(1, 3), partial(EXAMPLE["stream_error"], base=base), stage1=True)
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    parts = ("compensation.", "v_proj.weight", "o_proj.weight")
    assert moved == {
        name for name in before if any(f"s.{n}.self_attn.{part}" in name for n in (3, 5) for part in parts)
    }
    assert len(moved) == 6


def test_the_error_of_streams_is_relative_to_each_tokens_length(inputs):
    data, _ = examples(inputs)
    model, base, _ = converted(inputs, data, compensation="none")
    batch = data.batch(torch.arange(3))
    assert EXAMPLE["stream_error"](base, batch, base=base) == 0
    expected = []
    for ids, at in zip(batch[0], batch[1], strict=True):
        streams = [m(ids[None, : max(at) + 2], output_hidden_states=True).hidden_states[1:] for m in (model, base)]
        expected += [((h - b).norm(dim=-1) / b.norm(dim=-1)).square()[0] for h, b in zip(*streams, strict=True)]
    found = EXAMPLE["stream_error"](model, batch, base=base)
    torch.testing.assert_close(found, torch.cat(expected).mean(), atol=1e-5, rtol=1e-4)


def test_a_scale_is_a_factor_of_its_heads_output():
    torch.manual_seed(0)
    weight, heads = torch.randn(8, 12), torch.randn(5, 3, 4)
    scales = EXAMPLE["HeadScales"](3)
    scales.scale.data = torch.tensor([2.0, 0.5, -1.0])
    expected = (heads * torch.tensor([2.0, 0.5, -1.0])[:, None]).flatten(1) @ weight.T
    torch.testing.assert_close(heads.flatten(1) @ scales(weight).T, expected)


def test_a_leader_takes_over_queries_and_keys_from_inside(inputs):
    data, _ = examples(inputs)
    model, base, _ = converted(inputs, data, compensation="none", leader_from=1)
    for name in ("q_proj", "k_proj"):
        taken, own = (getattr(m.model.layers[layer].self_attn, name).weight for m, layer in ((model, 2), (base, 3)))
        assert torch.equal(taken, own)


def test_evaluation_questions_in_training_data_are_refused(inputs, tmp_path):
    words = " ".join(f"w{number}" for number in range(9))
    file = tmp_path / "train.json"
    rows = json.loads((inputs / "train.json").read_text())
    file.write_text(json.dumps([*rows, {"instruction": words, "input": "", "output": "w1"}]))
    with pytest.raises(ValueError, match="hold questions of the evaluation set some_set"):
        EXAMPLE["training_examples"]([str(file)], word_tokenizer(), 8, 0, {"some_set": [words]})
