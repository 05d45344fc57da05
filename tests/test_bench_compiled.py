"""`peft-uniattn bench decode --compile`: few graphs, the same logits, and no trace left on the models."""

from __future__ import annotations

import json

import pytest
import torch
from torch._dynamo.utils import counters
from typer.testing import CliRunner

from peft_uniattn.bench import decode as bench
from peft_uniattn.bench.compiled import CompiledLayers
from peft_uniattn.bench.contenders import Models
from peft_uniattn.bench.decode import DecodeBenchmark, random_cache, shared_cache, without_masks
from peft_uniattn.cli import app

# Eight layers; Superblocks [2-3], [4-5] and [6-7].
TINY = Models(shape="tiny", dtype="float32", device="cpu", rank=4, superblock_size=2, start_layer=2)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def models():
    base, unified = TINY.build()
    cache = random_cache(base, 2, 32, seed=0)
    return {"base": (base, cache), "unified": (unified, shared_cache(unified, cache))}


@torch.no_grad()
def logits(model, cache):
    for layer in cache.layers:
        layer.cumulative_length.fill_(0)
    with without_masks():
        return model(torch.tensor([[3], [4]]), past_key_values=cache).logits


@pytest.mark.parametrize("name, graphs", [("base", 1), ("unified", 4)])
def test_layers_of_one_kind_share_a_graph(models, name, graphs):
    """Plain layers, the first leader, followers, and leaders that find an earlier one's state in the hand-over."""
    model, cache = models[name]
    expected = logits(model, cache)
    with CompiledLayers(model, cache, "eager").running():
        torch.testing.assert_close(logits(model, cache), expected)
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(logits(model, cache), expected)
    assert counters["stats"]["unique_graphs"] == graphs


def test_two_of_one_model_do_not_share_their_code(models):
    """What torch.compile keeps does not say which attention back end was allowed when it was made."""
    for _ in range(2):
        with CompiledLayers(*models["base"], "eager").running():
            logits(*models["base"])
    assert counters["stats"]["unique_graphs"] == 2


def test_models_are_as_they_were_afterwards(models):
    model, cache = models["unified"]
    with CompiledLayers(model, cache, "eager").running():
        logits(model, cache)
    attentions = [layer.self_attn for layer in model.model.layers]
    assert [attention.layer_idx for attention in attentions] == list(range(8))
    assert [attention.uniattn_leader for attention in attentions[3::2]] == [2, 4, 6]
    assert not any("forward" in vars(layer) for layer in model.model.layers)
    assert len(cache.layers) == 8


def test_compiled_contenders_are_timed_and_compared_with_what_is_not_compiled(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "CompiledLayers", lambda *arguments: (seen.append(1), CompiledLayers(*arguments))[1])
    result = DecodeBenchmark(TINY, ((1, 64),), rounds=1, compiler="eager").run()
    (row,) = result["shapes"]
    assert len(seen) == 2
    assert result["settings"]["compiler"] == "eager"
    for contender in row["contenders"].values():
        assert contender["median_ms"] > 0
        assert contender["relative_error"] < 1e-5


def test_what_the_compiler_gets_wrong_has_no_time():
    def wrong(graph, inputs):
        return lambda *arguments: tuple(part + 1 if part.is_floating_point() else part for part in graph(*arguments))

    torch._dynamo.register_backend(wrong, name="wrong_on_purpose")
    (row,) = DecodeBenchmark(TINY, ((1, 64),), rounds=1, compiler="wrong_on_purpose").run()["shapes"]
    assert all("median_ms" not in contender for contender in row["contenders"].values())
    assert row["ratios"] == {}


def test_the_result_so_far_is_saved_after_every_shape():
    saved = []
    benchmark = DecodeBenchmark(TINY, ((1, 64), (2, 64)), rounds=1)
    result = benchmark.run(save=lambda result: saved.append(json.loads(json.dumps(result))))
    assert [len(one["shapes"]) for one in saved] == [1, 2]
    assert saved[-1]["shapes"] == result["shapes"]


def test_an_unknown_compiler_is_refused():
    with pytest.raises(ValueError, match="compiler='gcc' is no back end"):
        DecodeBenchmark(TINY, compiler="gcc")


OPTIONS = [
    "--shape",
    "tiny",
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--batch-size",
    "1",
    "--length",
    "64",
    "--rounds",
    "2",
]


def test_the_option_asks_for_inductor(monkeypatch):
    seen = []

    def run(self, save):
        seen.append(self.compiler)
        raise ValueError("nothing is measured here")

    monkeypatch.setattr(DecodeBenchmark, "run", run)
    for option in ([], ["--compile"]):
        CliRunner().invoke(app, ["bench", "decode", *OPTIONS, *option])
    assert seen == [None, "inductor"]


@pytest.mark.slow
def test_inductor_gives_the_same_logits():
    result = CliRunner().invoke(app, ["bench", "decode", *OPTIONS, "--compile"])
    (row,) = json.loads(result.stdout.splitlines()[-1])["shapes"]
    for contender in row["contenders"].values():
        assert contender["median_ms"] > 0
        assert contender["relative_error"] < 1e-4


@pytest.mark.gpu
def test_every_contender_is_compiled_captured_and_timed_on_a_gpu():
    models = Models(
        shape="tiny",
        dtype="bfloat16",
        device="cuda",
        rank=4,
        superblock_size=2,
        start_layer=2,
        back_ends=("sdpa flash",),
    )
    benchmark = DecodeBenchmark(models, ((2, 1024),), skip_mass=0.01, kept=0.5, rounds=2, compiler="inductor")
    (row,) = benchmark.run()["shapes"]
    names = ["base sdpa flash"] + [f"unified sdpa flash{kind}" for kind in ("", ", kernels", ", simulated kept 0.5")]
    assert [name for name, contender in row["contenders"].items() if "median_ms" in contender] == names
