"""The kernels' specification and their dispatch; neither needs Triton or a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import prompt, tiny_adapter, tiny_model

from peft_uniattn import UniAttnConfig, kernels, to_standalone
from peft_uniattn.attention import apply_probabilities, decode_probabilities, leader_attention
from peft_uniattn.handover import Handover, LeaderState
from peft_uniattn.kernels import naive


def inputs(batch=2, query_heads=4, kv_heads=2, length=11, head_dim=8):
    generator = torch.Generator().manual_seed(0)

    def random(heads, length):
        return torch.randn(batch, heads, length, head_dim, dtype=torch.float64, generator=generator)

    return random(query_heads, 1), random(kv_heads, length), random(kv_heads, length)


@pytest.fixture
def kernel_mode():
    before = kernels._mode
    yield
    kernels.use(before)


@pytest.mark.parametrize("query_heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_specification_is_scaled_dot_product_attention(query_heads, kv_heads):
    query, key, value = inputs(query_heads=query_heads, kv_heads=kv_heads)
    mask = torch.rand(2, 1, 1, 11, generator=torch.Generator().manual_seed(1)) > 0.3
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.4, enable_gqa=True)
    output, probabilities = naive.leader_decode(query, key, value, mask, scaling=0.4)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(naive.follower_decode(probabilities, value), expected)


def test_specification_is_what_attention_computes_without_kernels():
    query, key, value = inputs()
    mask = torch.zeros(2, 1, 1, 11, dtype=torch.float64)
    mask[0, ..., :4] = torch.finfo(mask.dtype).min
    output, probabilities = naive.leader_decode(query, key, value, mask)
    torch.testing.assert_close(probabilities, decode_probabilities(query, key, mask, None))
    torch.testing.assert_close(output.transpose(1, 2), apply_probabilities(probabilities, value))


def test_a_span_is_the_mask_of_its_positions():
    query, key, value = inputs()
    span = torch.tensor([[0, 7], [3, 11]])
    mask = torch.zeros(2, 1, 1, 11, dtype=torch.bool)
    mask[0, ..., :7] = mask[1, ..., 3:] = True
    with_span = naive.leader_decode(query, key, value, span=span)
    for actual, expected in zip(with_span, naive.leader_decode(query, key, value, mask), strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_row_that_sees_nothing_is_zero():
    query, key, value = inputs()
    mask = torch.ones(2, 1, 1, 11, dtype=torch.bool)
    mask[1] = False
    output, probabilities = naive.leader_decode(query, key, value, mask)
    assert probabilities[1].abs().max() == output[1].abs().max() == 0
    assert torch.isfinite(output).all()


def test_softcap_bounds_the_scores():
    query, key, value = inputs()
    _, probabilities = naive.leader_decode(query * 1e3, key, value, softcap=0.5)
    # scores in [-0.5, 0.5]: no probability can exceed another by more than e
    assert (probabilities.amax(-1) / probabilities.amin(-1)).max() <= torch.e + 1e-9


def test_off_means_pytorch(kernel_mode):
    kernels.use("off")
    assert kernels.decode_kernels(*inputs()) is None


def skips(length, mode="auto"):
    states = torch.empty(1, 1, length, 128, device="meta")
    return kernels.prefill_kernels(states, states, states, None, 0.01, mode) is not None


@pytest.mark.parametrize("length, worth", [(512, False), (8192, False), (16383, False), (16384, True), (131072, True)])
def test_long_prompts_are_tried(length, worth, monkeypatch):
    prefill = pytest.importorskip("peft_uniattn.kernels.prefill")
    monkeypatch.setattr(prefill, "supports", lambda *states: True)
    assert skips(length) == worth
    assert skips(length, "triton")
    assert not skips(length, "off")


@pytest.fixture
def told(monkeypatch):
    """Numbers of followers that leaders ask kernels for, in order; no kernel runs."""
    seen = []
    monkeypatch.setattr("peft_uniattn.attention.lead", lambda *states, followers, **rest: seen.append(followers))
    return seen


@torch.no_grad()
def asked(model, told):
    told.clear()  # a model is tried out while it is built
    model(prompt())
    return list(told)


@pytest.mark.parametrize("convert", [lambda model: model, to_standalone], ids=["adapter", "standalone"])
def test_a_leader_knows_how_many_followers_it_has(convert, told):
    model = convert(tiny_adapter(tiny_model(num_hidden_layers=8), superblocks=[[1, 2], [4, 5, 6, 7]]))
    assert asked(model, told) == [1, 3]


def test_followers_are_counted_by_the_plan_of_the_active_adapter(told):
    model = tiny_adapter(tiny_model(num_hidden_layers=8), superblocks=[[1, 2]])
    model.add_adapter("other", UniAttnConfig(superblocks=[[1, 2, 3]]))
    assert asked(model, told) == [1]
    model.set_adapter("other")
    assert asked(model, told) == [2]
    model.set_adapter("default")
    model.delete_adapter("other")
    assert asked(model, told) == [1]


def test_unknown_mode_names_the_choices():
    with pytest.raises(ValueError, match="UNIATTN_KERNELS='fast' is unknown; use one of auto, off, triton"):
        kernels.use("fast")


def test_float64_is_left_to_pytorch():
    assert kernels.decode_kernels(*inputs()) is None


def test_importing_needs_no_triton_and_insisting_on_it_says_so():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from peft_uniattn import kernels\n"
        "query = torch.zeros(1, 1, 1, 16)\n"
        "assert kernels.decode_kernels(query, query, query) is None\n"
        "kernels.use('triton')\n"
        "try: kernels.decode_kernels(query, query, query)\n"
        "except ValueError as error: assert 'install it' in str(error)\n"
        "else: raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"UNIATTN_KERNELS": "auto"})


@pytest.mark.parametrize("name", ["test_kernels_decode.py", "test_kernels_prefill.py", "test_kernels_model.py"])
def test_kernels_in_the_interpreter(name):
    """Triton has to be told before its first import that it shall interpret, so this is a process of its own."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the same tests run on the GPU here")
    tests = str(Path(__file__).with_name(name))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", tests]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed" in run.stdout


def test_specification_of_a_prompt_is_causal_attention():
    _, key, value = inputs()
    query = torch.randn(2, 4, 11, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    output, denominators = naive.leader_prefill(query, key, value, scaling=0.4)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.4, enable_gqa=True
    )
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(naive.follower_prefill(query, key, value, scaling=0.4), expected.transpose(1, 2))
    scores = 0.4 * query @ key.repeat_interleave(2, 1).transpose(2, 3)
    hidden = torch.ones(11, 11, dtype=torch.bool).triu(1)
    by_hand = scores.masked_fill(hidden, -torch.inf).exp().sum(-1).log()
    torch.testing.assert_close(denominators, by_hand)


def test_what_a_follower_leaves_out_is_not_made_up_for():
    query, key, value = inputs()
    query = query.expand(-1, -1, 11, -1)
    visible = torch.ones(11, 11, dtype=torch.bool)
    visible[:, 3:5] = False
    zeroed = value.clone()
    zeroed[:, :, 3:5] = 0
    actual = naive.follower_prefill(query, key, value, visible=visible)
    torch.testing.assert_close(actual, naive.follower_prefill(query, key, zeroed))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kernels": "cuda"}, "kernels='cuda' is unknown; use one of auto, off, triton"),
        ({"skip_mass": 1.0}, "skip_mass=1.0 must be a share of the probability mass, from 0 up to below 1"),
        ({"skip_mass": -0.1}, "skip_mass=-0.1 must be a share"),
        ({"skip_mass": True}, "skip_mass=True must be a share"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        UniAttnConfig(**settings)


def test_the_standalone_model_keeps_what_the_configuration_says():
    model = to_standalone(tiny_adapter(kernels="off", skip_mass=0.02))
    assert (model.config.kernels, model.config.skip_mass) == ("off", 0.02)


def test_the_process_overrides_the_configuration(kernel_mode):
    kernels.use("triton")
    assert kernels.describe("off").startswith("triton")
    kernels.use(None)
    assert kernels.describe("off") == "off"
    assert kernels.describe().startswith("auto, ")


def test_a_leader_without_autograd_takes_the_place_of_earlier_ones():
    def give(handover, layer, grad_enabled):
        handover.give(layer, LeaderState(None, None, None, None, {}, None, grad_enabled))

    handover = Handover()
    for layer in (0, 4):
        give(handover, layer, False)
    assert [handover.has(layer) for layer in (0, 4)] == [False, True]
    kept = Handover(keep=True)
    in_training = Handover()
    for layer in (0, 4):
        give(kept, layer, False)
        give(in_training, layer, True)
    assert kept.has(0) and in_training.has(0)


def test_what_a_mask_says_is_found_out_once_per_forward_pass():
    handover, seen = Handover(), []

    def count(tensor):
        seen.append(tensor)
        return len(seen)

    mask, same_values = torch.ones(2), torch.ones(2)
    assert [handover.once(count, mask) for _ in range(3)] == [1, 1, 1]
    assert handover.once(count, same_values) == 2
    assert Handover().once(count, same_values) == 3


@pytest.mark.parametrize("is_causal", [True, False])
def test_kernels_are_told_whether_a_prompt_without_a_mask_is_causal(is_causal, monkeypatch):
    model, told = tiny_adapter(), []

    def lead(query, *states, causal, **options):
        told.append((query.shape[2], causal))

    monkeypatch.setattr("peft_uniattn.attention.lead", lead)
    model.base_model.model.model.layers[0].self_attn.base_layer.is_causal = is_causal
    with torch.no_grad():
        model(prompt())
    assert told == [(9, is_causal), (9, True)]


@pytest.mark.parametrize(
    "extra, asked",
    [
        ({}, True),
        ({"dropout": 0.0, "softcap": None, "sliding_window": 5}, True),
        ({"softcap": 30.0}, False),
        ({"s_aux": torch.zeros(4)}, False),
        ({"position_bias": torch.zeros(1, 4, 1, 5)}, False),
        ({"cu_seq_lens_k": torch.tensor([0, 5])}, False),
        ({"sliding_window": 4}, False),
        ({"dropout": 0.1}, False),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("queries", [1, 5])
def test_what_changes_s_beside_a_mask_never_reaches_a_kernel(extra, asked, queries, monkeypatch):
    attention = tiny_adapter().base_model.model.model.layers[0].self_attn.base_layer
    seen = []
    monkeypatch.setattr("peft_uniattn.attention.lead", lambda *states, **options: seen.append(options))
    monkeypatch.setattr("peft_uniattn.attention.call_back_end", lambda *states, **options: (None, None))
    query, key, value = (torch.randn(1, heads, length, 4) for heads, length in ((4, queries), (2, 5), (2, 5)))
    with torch.no_grad():
        leader_attention(attention, query, key, value, None, uniattn_handover=Handover(), **extra)
    assert bool(seen) == asked


def test_specification_of_a_chunk_is_the_end_of_the_prompt():
    _, key, value = inputs()
    query = torch.randn(2, 4, 11, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    whole, part = (naive.leader_prefill(queries, key, value) for queries in (query, query[:, :, 7:]))
    for actual, expected in zip(part, whole, strict=True):
        torch.testing.assert_close(actual, expected[:, :, 7:])
    part = naive.follower_prefill(query[:, :, 7:], key, value)
    torch.testing.assert_close(part, naive.follower_prefill(query, key, value)[:, 7:])


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [None, 8])
def test_a_compensation_inside_the_matrix_product_is_the_sum(rank):
    model = to_standalone(tiny_adapter(tiny_model(dtype=torch.float32), r=rank)).cuda()
    with torch.no_grad():
        fused = model(prompt().cuda()).logits
    torch.testing.assert_close(fused, model(prompt().cuda()).logits, rtol=1e-4, atol=1e-5)
