"""What the analyses compute, against formulas in float64 that are written apart from the package."""

from __future__ import annotations

import gzip
import json
import math
from contextlib import contextmanager

import pytest
import torch
from conftest import close, loud, prompt, specification, tiny_adapter, tiny_model
from datasets import Dataset
from family_models import family_model
from oracle import feed_forward, mix_values, rms_norm, rotary_angles, softmax_activation, unified_logits, visible
from word_tokenizer import word_tokenizer

from peft_uniattn import UniAttnConfig, calibrate
from peft_uniattn.analysis.bypass import bypassed
from peft_uniattn.analysis.compensation import Variant, compensation, follower_errors
from peft_uniattn.analysis.data import Sequences, load_sequences
from peft_uniattn.analysis.sweep import SweepSettings, number_plans, size_plans, sweep
from peft_uniattn.analysis.timing import times_to_first_token
from peft_uniattn.families import find_decoder, find_family
from peft_uniattn.inspection import find_adapter
from peft_uniattn.recording import watched_attention
from peft_uniattn.training.evaluation import held_out_scores


def rows(count: int, length: int = 12, *, seed: int = 2) -> Dataset:
    ids = prompt(batch=count, length=length, seed=seed).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def sequences(fit: int = 8, held_out: int = 4) -> Sequences:
    return Sequences(rows(fit), rows(held_out, seed=3), "random", 0)


def streams(weights, config, ids, superblocks=(), compensation=None) -> tuple[list, list]:
    """Per layer: the normalised input of attention and the residual stream after it, by the paper's formulas."""
    leaders = {follower: block[0] for block in superblocks for follower in block[1:]}
    angles = rotary_angles(config, torch.arange(ids.shape[1])[None], torch.float64)
    x = weights["model.embed_tokens.weight"][ids]
    s, inputs, after = {}, [], []
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        normed = rms_norm(weights, f"{layer}.input_layernorm", x, config)
        mask = visible(config, i, torch.ones_like(ids))
        s[i] = softmax_activation(weights, layer, normed, angles, mask, config)
        x = x + mix_values(weights, layer, normed, s[leaders.get(i, i)], config)
        if compensation and i in compensation:
            x = x + normed @ compensation[i]
        inputs.append(normed)
        after.append(x)
        x = x + feed_forward(weights, layer, rms_norm(weights, f"{layer}.post_attention_layernorm", x, config), config)
    return inputs, after


def test_follower_errors_are_those_of_equation_13(float64):
    model = tiny_adapter(loud(tiny_model()))
    ids = prompt(batch=4, length=10)
    adapter = find_adapter(model)
    batches = [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}]
    found = follower_errors(adapter, batches, progress=False)

    known = specification(model, [[0, 1, 2], [3, 4, 5]])
    with torch.no_grad():
        _, original = streams(known["weights"], known["config"], ids)
        inputs, unified = streams(known["weights"], known["config"], ids, known["superblocks"], known["compensation"])
        assert sorted(found) == [1, 2, 4, 5]
        for layer, error in found.items():
            after = original[layer] - unified[layer]
            before = after + inputs[layer] @ known["compensation"][layer]
            norms = error.to_dict()
            for kind, reduced in (("tokens", (before, after)), ("means", (before.mean(0), after.mean(0)))):
                expected = [tensor.norm().item() for tensor in reduced]
                assert norms[kind]["before"] == pytest.approx(expected[0], rel=1e-9)
                assert norms[kind]["after"] == pytest.approx(expected[1], rel=1e-9)
                assert norms[kind]["left_percent"] == pytest.approx(100 * expected[1] / expected[0], rel=1e-9)


def test_follower_errors_do_not_depend_on_padding(float64):
    model = tiny_adapter(loud(tiny_model()))
    ids = prompt(batch=3, length=8)
    padding = torch.zeros(3, 4, dtype=torch.long)
    padded = torch.cat([padding, ids], dim=1)
    adapter = find_adapter(model)
    plain = follower_errors(adapter, [{"input_ids": ids}], progress=False)
    masked = follower_errors(adapter, [{"input_ids": padded, "attention_mask": (padded != 0).long()}], progress=False)
    for layer, error in plain.items():
        for kind, norms in error.to_dict().items():
            assert masked[layer].to_dict()[kind] == pytest.approx(norms, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "olmo2", "granite"])
def test_what_is_left_on_the_fitted_tokens_is_what_calibration_reports(family):
    """Also where a norm or a multiplier follows attention (OLMo-2, Granite)."""
    changes = {"residual_multiplier": 0.5} if family == "granite" else {}
    data = sequences()
    config = UniAttnConfig(task_type="CAUSAL_LM", superblock_size=3, start_layer=3)
    found = compensation(loud(family_model(family, **changes)), config, data, [Variant("ridge", None)], progress=False)
    adapted = tiny_adapter(loud(family_model(family, **changes)), start_layer=3)
    report = calibrate(adapted, data.batches(1, adapted.device), progress=False)
    for follower, error in zip(found["variants"][0]["followers"], report.followers, strict=True):
        assert (follower["layer"], follower["leader"]) == (error.layer, error.leader)
        left = follower["fit"]["tokens"]["left_percent"] / 100
        assert left == pytest.approx(error.after / error.before, rel=1e-4)


def test_other_designs_of_compensation_are_refused():
    config = UniAttnConfig(task_type="CAUSAL_LM", superblock_size=3, start_layer=3, compensation="ffn_output")
    with pytest.raises(ValueError, match="compensation='ffn_output' is not measured here"):
        compensation(loud(tiny_model()), config, sequences(), [Variant("ridge", None)], progress=False)


def test_the_share_that_random_means_would_leave_is_that_of_random_means():
    """The ratio of Theorem G.1's expectation to the norm of B, and a simulation of it."""
    found = compensation(
        loud(tiny_model()),
        UniAttnConfig(task_type="CAUSAL_LM", superblock_size=3, start_layer=3),
        Sequences(rows(2, length=40), rows(1, length=40), "random", 0),
        [Variant("pseudoinverse", None)],
        progress=False,
    )
    length, size = found["length"], found["hidden_size"]
    assert (length, size) == (40, 32)
    expected = math.sqrt(size * (length - size)) / math.sqrt(size * length)
    assert found["random_left_percent"] == pytest.approx(100 * expected)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(40 * 10, 32 * 10, generator=generator, dtype=torch.float64) for _ in range(2))
    left = (a @ torch.linalg.lstsq(a, b).solution - b).norm() / b.norm()
    assert left.item() == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_what_attention_adds_to_the_residual_stream_is_seen(family):
    """Also behind Gemma-2's norm and Granite's multiplier: stream and added make up what the next norm reads."""
    model = family_model(family, **({"residual_multiplier": 0.5} if family == "granite" else {}))
    decoder = find_decoder(model, find_family(model.config))
    layer = decoder.layers[1]
    name = "pre_feedforward_layernorm" if family == "gemma2" else "post_attention_layernorm"
    read = []
    getattr(layer, name).register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with watched_attention(decoder, [1]) as flows, torch.no_grad():
        model(prompt())
    flow = flows[1]
    close(flow.stream + flow.added, read[0])
    assert torch.equal(flow.added, flow.output) == (family == "llama")


def test_a_bypassed_follower_adds_nothing_to_the_residual_stream(float64):
    model = tiny_adapter(loud(tiny_model()))
    adapter = find_adapter(model)
    decoder = find_decoder(adapter.base, adapter.layers[1].family)
    ids = prompt()
    with bypassed(decoder, [1, 4]), torch.no_grad():
        found = model(ids).logits
    known = specification(model, [[0, 1, 2], [3, 4, 5]])
    # What adds nothing has a W_o and a W_c of zero.
    nothing = {f"model.layers.{i}.self_attn.o_proj.weight": torch.zeros(32, 32, dtype=torch.float64) for i in (1, 4)}
    known["weights"] |= nothing
    known["compensation"] = {i: weight for i, weight in known["compensation"].items() if i not in (1, 4)}
    with torch.no_grad():
        close(found, unified_logits(input_ids=ids, **known))


def test_after_bypassing_the_model_is_as_before():
    model = tiny_adapter()
    before = model(prompt()).logits
    adapter = find_adapter(model)
    with bypassed(find_decoder(adapter.base, adapter.layers[1].family), [1, 2]):
        assert not torch.equal(model(prompt()).logits, before)
    assert torch.equal(model(prompt()).logits, before)


def test_numbers_of_superblocks_grow_from_the_top_downward():
    plans = number_plans(32, 4, None, "own")
    assert plans[1] == [[24, 25, 26, 27], [28, 29, 30, 31]]
    assert [len(plan) for plan in plans] == list(range(1, 9))


def test_sizes_of_superblocks_are_those_of_the_paper():
    """Section 4.3: sizes 2, 3, 4, 5, 7 and 13, in numbers 12, 6, 4, 3, 2 and 1."""
    plans = size_plans(32, 12, None, "own")
    assert [len(plan[0]) for plan in plans] == [2, 3, 4, 5, 7, 13]
    assert [len(plan) for plan in plans] == [12, 6, 4, 3, 2, 1]
    assert all(plan[-1][-1] == 31 for plan in plans)


def test_swept_plans_respect_masks():
    masks = ["full_attention", "full_attention", "sliding_attention"] * 2
    assert number_plans(6, 2, masks, "own") == [[[3, 4]], [[0, 1], [3, 4]]]
    assert number_plans(6, 2, masks, "leader")[-1] == [[1, 2], [4, 5]]


def test_sweep_scores_calibrated_models_and_leaves_the_base():
    model = loud(tiny_model())
    data = sequences()
    before = model(prompt()).logits
    settings = SweepSettings(superblock_size=3, followers=2, ttft_length=4, ttft_repetitions=1)
    found = sweep(model, data, settings, progress=False)
    assert torch.equal(model(prompt()).logits, before)
    assert found["base"]["loss"] == held_out_scores(model, data.held_out, 0).loss

    adapted = tiny_adapter(model, superblocks=[[3, 4, 5]], init_weights=True)
    entry = found["number"][0]
    assert entry["superblocks"] == [[3, 4, 5]]
    assert entry["loss_uncompensated"] == pytest.approx(held_out_scores(adapted, data.held_out, 0).loss)
    calibrate(adapted, data.batches(8, adapted.device), progress=False)
    assert entry["loss"] == pytest.approx(held_out_scores(adapted, data.held_out, 0).loss)


def test_scores_are_loss_and_accuracy_over_completion_tokens():
    model = loud(tiny_model())
    data = rows(5)
    labels = torch.tensor(data["labels"])
    labels[:, :4] = -100
    found = held_out_scores(model, Dataset.from_dict({"input_ids": data["input_ids"], "labels": labels.tolist()}), 0)
    with torch.no_grad():
        logits = model(torch.tensor(data["input_ids"])).logits[:, 3:-1].flatten(0, 1).double()
    targets = labels[:, 4:].flatten()
    assert found.loss == pytest.approx(-logits.log_softmax(-1)[range(len(targets)), targets].mean().item(), rel=1e-5)
    assert found.accuracy == pytest.approx((logits.argmax(-1) == targets).double().mean().item())


def test_contenders_are_timed_in_turns():
    turns = []

    @contextmanager
    def contender(name):
        turns.append(name)
        yield

    names = {name: lambda name=name: contender(name) for name in "ab"}
    found = times_to_first_token(tiny_model(), names, length=4, repetitions=3)
    assert turns == list("ab" * 4)
    assert all(0 < seconds.fastest <= seconds.median for seconds in found.values())


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt.gz"
    with gzip.open(path, "wt") as file:
        file.write(" ".join(f"w{i // 8 % 80}" for i in range(800)))
    return str(path)


def test_text_is_cut_into_pieces_of_one_length_that_do_not_overlap(book):
    data = load_sequences(book, word_tokenizer(), length=8, sequences=50, held_out=30)
    assert data.describe() == {
        "name": "book.txt.gz",
        "sequences": 50,
        "tokens": 400,
        "held_out_sequences": 30,
    }
    pieces = [tuple(ids) for ids in [*data.fit["input_ids"], *data.held_out["input_ids"]]]
    assert {len(piece) for piece in pieces} == {8}
    # Every 8 words are one word, so that a piece is known by its first one; 20 words occur twice in the text.
    assert all(len(set(piece)) == 1 for piece in pieces)
    assert len(set(pieces)) >= 60
    assert data.fit["labels"] == data.fit["input_ids"]


@pytest.mark.parametrize(("value", "kind"), [(5, "int"), (None, "NoneType"), (["w1", "w2"], "list")])
def test_a_row_whose_text_is_none_is_named(tmp_path, value, kind):
    path = tmp_path / "bad.json"
    path.write_text("\n".join(json.dumps({"text": text}) for text in (value, value)))
    with pytest.raises(ValueError, match=f"dataset='{path}': 'text' of row 0 .* is no text but {kind}; repair"):
        load_sequences(str(path), word_tokenizer(), length=8, sequences=5)


def test_the_first_row_whose_text_is_none_is_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "w1"}\n{"text": 5}\n{"text": 6}')
    with pytest.raises(ValueError, match=r"bad\.jsonl': 'text' of row 1 .* is no text but"):
        load_sequences(str(path), word_tokenizer(), length=8, sequences=5)


def test_short_text_keeps_the_share_that_is_held_out(book):
    data = load_sequences(book, word_tokenizer(), length=80, sequences=30, held_out=10)
    assert (len(data.fit), len(data.held_out)) == (8, 2)


def test_the_seed_decides_which_pieces_are_used(book):
    first, second, other = (
        load_sequences(book, word_tokenizer(), length=8, sequences=5, seed=seed).fit["input_ids"] for seed in (0, 0, 1)
    )
    assert first == second != other
