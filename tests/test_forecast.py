"""`peft-uniattn plan`: its figures are those of `bench` and of hand-written sums, and nothing is loaded for them."""

import json
from pathlib import Path

import pytest
import torch
from test_bench import document
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    MixtralConfig,
    MixtralForCausalLM,
)
from typer.testing import CliRunner

from peft_uniattn import UniAttnConfig
from peft_uniattn.bench.work import work
from peft_uniattn.cli import app
from peft_uniattn.forecast import Serving, forecast
from peft_uniattn.forecast.verdict import judge, tokens_needed

RESULTS = Path(__file__).parents[1] / "docs" / "results"
LLAMA, SMOLLM2, TINY = "llama-3.1-8b", "smollm2-135m", "tiny"


def plan(*arguments):
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_bytes_of_cache_are_those_of_the_paper():
    found = forecast(LLAMA, UniAttnConfig(), Serving())
    assert (found.kv_bytes_per_token, found.kv_bytes_per_token_unified) == (131_072, 106_496)
    assert found.kv_ratio == 0.8125
    assert str(found.plan) == "[16-19] [20-23] [24-27] [28-31]"


def test_bytes_of_smollm2_are_those_of_the_quickstart():
    found = forecast(SMOLLM2, UniAttnConfig(), Serving(dtype="float32"))
    assert (found.kv_bytes_per_token, found.kv_bytes_per_token_unified) == (46_080, 39_168)
    assert found.unified[0].compensation_parameters == 2_985_984


def test_a_decoded_token_of_llama_reads_what_a_sum_by_hand_gives():
    # 32 layers: q, o of 4096 × 4096, k, v of 4096 × 1024, an MLP of 14336; a head of 128256; 16 × 8192 tokens of cache
    weights = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 128256 * 4096
    removed, full, low = 12 * (4096**2 + 4096 * 1024), 12 * 4096**2, 12 * 2 * 4096 * 64
    found = forecast(LLAMA, UniAttnConfig(), Serving(batch_size=16, context=8192, gb_per_s=3000), rank=64)
    assert found.removed_parameters == removed
    assert [one.compensation_parameters for one in found.unified] == [full, low]
    assert found.base.bytes == 2 * weights + 16 * 8192 * 131_072
    assert found.base.bound_ms == pytest.approx(found.base.bytes / 3e9)
    for one, added in zip(found.unified, (full, low), strict=True):
        assert one.bytes == 2 * (weights - removed + added) + 16 * 8192 * 106_496
        assert one.time_ratio == one.bytes / found.base.bytes
        # one product with 16 × 8192 keys a follower, two elsewhere, 32 heads of 128
        attention = 2 * 16 * 8192 * 4096 * (2 * 32 - 12)
        assert one.flops == 2 * 16 * (weights - removed + added) + attention
        assert one.compensation_flops_share == 2 * 16 * added / one.flops


def test_quantized_weights_and_caches_take_their_bits():
    plain = forecast(LLAMA, UniAttnConfig(), Serving())
    found = forecast(LLAMA, UniAttnConfig(), Serving(weight_bits=4, cache_bits=8))
    assert (found.kv_bytes_per_token, found.kv_bytes_per_token_unified) == (65_536, 53_248)
    for one, other in zip((found.base, *found.unified), (plain.base, *plain.unified), strict=True):
        assert (one.weight_bytes, one.kv_bytes) == (other.weight_bytes / 4, other.kv_bytes / 2)
        assert one.flops == other.flops
    low = found.unified[1]
    assert low.time_ratio == (low.weight_bytes + low.kv_bytes) / found.base.bytes
    advice = " ".join(judge(found).reasons)
    assert "FP8" not in advice
    assert "FP8" in " ".join(judge(plain).reasons)


def test_figures_agree_with_those_of_bench():
    load = {"batch_size": 2, "context": 64}
    found = forecast(TINY, UniAttnConfig(), Serving(**load, dtype="float32"), rank=4)
    common = ["--shape", TINY, "--device", "cpu", "--dtype", "float32"]
    cached = document("memory", *common, "--length", "8")["contenders"]
    assert found.kv_bytes_per_token == cached["base"]["cache_bytes_per_token"]
    assert found.kv_bytes_per_token_unified == cached["unified"]["cache_bytes_per_token"]
    for one in found.unified:
        rank = [] if one.rank is None else ["--rank", str(one.rank)]
        decode = ["decode", *common, *rank, "--batch-size", "2", "--length", "64", "--rounds", "1"]
        (row,) = document(*decode)["shapes"]
        for name, step in (("base", found.base), ("unified", one)):
            assert row["work"][name]["bytes"] == step.bytes
            assert row["work"][name]["flops"] == step.flops


def test_bounds_are_those_of_the_measured_run():
    recorded = json.loads((RESULTS / "decode_h100.json").read_text())
    rate = recorded["conditions"]["measured_rates"]["bytes_per_s"]
    for row in recorded["shapes"]:
        load = Serving(row["batch_size"], row["length"], gb_per_s=rate / 1e9)
        found = forecast(LLAMA, UniAttnConfig(), load, rank=recorded["settings"]["models"]["rank"])
        for name, step in (("base", found.base), ("unified", found.unified[1])):
            assert row["work"][name] == {"flops": step.flops, "bytes": step.bytes}
            assert row["bound_ms"][name] == pytest.approx(step.bound_ms)


def test_windows_bound_what_is_seen_and_kept():
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=8, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, sliding_window=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
    )  # fmt: skip
    model = Gemma3ForCausalLM(config)
    decoded, kept = work(model, 3, 1, 100), 2 * 16 + 2 * 100
    assert decoded.state_bytes == 4 * 3 * 2 * 4 * kept
    linear = 4 * (8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16)
    assert decoded.flops == 2 * 3 * (linear + 64 * 8) + 2 * 3 * 8 * 2 * kept
    # Of a prompt of 20, the first 16 tokens see 1 to 16 keys, the others 16.
    seen = 2 * (sum(range(1, 17)) + 4 * 16) + 2 * sum(range(1, 21))
    assert work(model, 1, 20, 20).flops == 2 * (20 * linear + 64 * 8) + 2 * 8 * 2 * seen


def test_of_a_mixture_only_the_experts_that_a_batch_can_need_are_read():
    config = MixtralConfig(
        vocab_size=64, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=8, num_experts_per_tok=2, sliding_window=None,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    rest = 2 * (8 * 8 * 2 + 8 * 4 * 2 + 8 * 8) + 64 * 8  # projections, routers, head
    expert = 2 * 3 * 8 * 16  # in both layers
    for batch, experts in ((1, 2), (3, 6), (16, 8)):
        counted = work(model, batch, 1, 10)
        assert counted.bytes - counted.state_bytes == 4 * (rest + experts * expert)
        assert counted.flops == 2 * batch * (rest + 2 * expert) + 2 * batch * 8 * 4 * 10


def test_a_folder_needs_nothing_but_a_configuration(tmp_path):
    config = GemmaConfig(
        vocab_size=64, hidden_size=8, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    result = json.loads(plan(str(tmp_path), "--superblock-size", "2", "--rank", "4", "--json"))
    assert result["plan"]["superblocks"] == [[2, 3]]
    assert (result["kv_bytes_per_token"], result["kv_bytes_per_token_unified"]) == (64, 56)


def test_a_configuration_that_does_not_group_keys_counts_all_heads(tmp_path):
    GPTNeoXConfig(
        vocab_size=64, hidden_size=8, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2
    ).save_pretrained(tmp_path)  # fmt: skip
    found = forecast(str(tmp_path), UniAttnConfig(superblock_size=2), Serving(1, 10, "float32"), rank=4)
    assert (found.kv_bytes_per_token, found.kv_bytes_per_token_unified) == (4 * 8 * 8, 4 * 7 * 8)
    assert found.base.kv_bytes == 10 * 4 * 8 * 8


def test_no_weights_are_made(monkeypatch):
    made = []
    original = torch.nn.Parameter.__new__

    def recorded(cls, data=None, *args, **kwargs):
        made.append(data)
        return original(cls, data, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Parameter, "__new__", recorded)
    forecast(TINY, UniAttnConfig(), Serving(), rank=4)
    assert made
    assert all(data.is_meta for data in made)


def test_a_load_whose_cache_is_small_is_not_worth_it_and_the_needed_one_is():
    small = forecast(LLAMA, UniAttnConfig(), Serving(batch_size=1, context=1024))
    assert not judge(small).worth_it
    assert "quantize them first" in " ".join(judge(small).reasons)
    needed = tokens_needed(small)
    assert f"at least {needed:,} cached tokens" in " ".join(judge(small).reasons)
    for tokens, worth_it in ((needed, True), (needed - 1, False)):
        assert judge(forecast(LLAMA, UniAttnConfig(), Serving(1, tokens))).worth_it is worth_it


def test_the_table_shows_plan_bytes_and_verdict():
    shown = " ".join(plan(LLAMA).split())
    for part in ("[16-19] [20-23] [24-27] [28-31]", "131,072 → 106,496", "Worth trying", "try it first"):
        assert part in shown


def test_a_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    plan(LLAMA, "--plot", str(tmp_path / "plan.svg"))
    drawn = (tmp_path / "plan.svg").read_text()
    assert drawn.count("<path") > 60  # K and V of every layer among them


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "model='nowhere' has no configuration"),
        ([TINY, "--rank", "65"], "rank=65 must be from 1 to the model's hidden size of 64"),
        ([TINY, "--superblock-size", "5"], "superblock_size=5 does not fit"),
        ([TINY, "--dtype", "int4"], "dtype='int4' is not counted; use one of"),
        ([TINY, "--gb-per-s", "0"], "gb_per_s=0.0 must be above 0"),
        ([TINY, "--weight-bits", "-4"], "weight_bits=-4.0 must be above 0"),
        ([TINY, "--gb-per-s", "nan"], "gb_per_s=nan must be above 0 and finite"),
        ([TINY, "--cache-bits", "nan"], "cache_bits=nan must be above 0 and finite"),
        ([TINY, "--weight-bits", "inf"], "weight_bits=inf must be above 0 and finite"),
        ([TINY, "--plot", "plan.doc"], "ends in no known format"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, message):
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_an_architecture_that_cannot_share_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    result = CliRunner().invoke(app, ["plan", str(tmp_path)])
    assert result.exit_code == 1
    assert "model_type='gpt2' is not supported" in result.stderr
