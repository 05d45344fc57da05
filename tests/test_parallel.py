"""Parallel wrappers: two processes do what one process with the whole batch does; models spread over devices."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import logits, prompt, tiny_adapter, tiny_model
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from two_ranks import FAMILIES, over_two_devices

from peft_uniattn import UniAttnConfig

ROOT = Path(__file__).parents[1]
FORMS = ("adapter", "standalone")
CHECKPOINTING = ("not checkpointed", "checkpointed")

# The docs' table has a column for every wrapper, filled from these tests (docs/make_support_table.py).
families = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "llama" else pytest.mark.slow) for name in FAMILIES]
)
both_forms = pytest.mark.parametrize("form", FORMS)
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
with_and_without_checkpointing = pytest.mark.parametrize("checkpointing", CHECKPOINTING)


def on_two_ranks(directory: Path, *options: str) -> dict[str, dict]:
    """What two_ranks.py finds, by case."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(ROOT / "tests/two_ranks.py"), "--scratch", str(directory), "--out", str(directory / "out.json")]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [*launcher, *script, *options], env=environment, capture_output=True, text=True, timeout=300, cwd=directory
    )
    assert run.returncode == 0, run.stderr[-5000:]
    return json.loads((directory / "out.json").read_text())["results"]


Results = Callable[[str], dict[str, dict]]


@pytest.fixture(scope="module")
def on_cpus(tmp_path_factory) -> Results:
    """What two CPU ranks find for a family, by case."""
    wrappers = ("--wrappers", "alone", "ddp", "fsdp1", "fsdp2", "--tensor-parallel")
    return cache(lambda family: on_two_ranks(tmp_path_factory.mktemp(family), "--family", family, *wrappers))


@pytest.fixture(scope="module")
def under_deepspeed(tmp_path_factory) -> Results:
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    # DeepSpeed knows no float64.
    options = ("--wrappers", "zero2", "zero3", "--dtypes", "float32")
    return cache(lambda family: on_two_ranks(tmp_path_factory.mktemp(family), "--family", family, *options))


# transformers computes attention's softmax (Gemma-2) and the routers of experts in float32.
EXACTNESS = {"gemma2": 1e-6, "mixtral": 1e-6}


def check(result: dict, family: str, form: str, tolerance: float) -> None:
    assert "error" not in result, result.get("error")
    if family == "llama":
        assert result["tensors"] == {"adapter": 3, "standalone": 54}[form]
    assert result["loss"] < 1e-6, "transformers computes losses in float32"
    assert result["gradients"] < tolerance
    assert result["weights"] < tolerance


@families
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp1", "fsdp2"])
@both_forms
@with_and_without_checkpointing
def test_a_step_on_two_ranks_is_that_of_one_process(on_cpus, family, wrapper, form, checkpointing):
    result = on_cpus(family)[f"{wrapper}, {form}, {checkpointing}, float64"]
    check(result, family, form, EXACTNESS.get(family, 1e-12))


@both_forms
@with_and_without_checkpointing
def test_the_comparison_notices_gradients_that_are_not_exchanged(on_cpus, form, checkpointing):
    result = on_cpus("llama")[f"alone, {form}, {checkpointing}, float64"]
    assert result["gradients"] > 0.1
    assert result["weights"] > 0.1


@families
@both_forms
def test_a_model_runs_and_trains_under_tensor_parallelism(on_cpus, family, form):
    result = on_cpus(family)[f"tensor parallel, {form}, float64"]
    assert "error" not in result, result.get("error")
    # A standalone Phi-3's V has left the fused projection, for which the plan has a style, and is there on every rank.
    assert result["share_of_value_rows"] == (1 if (family, form) == ("phi3", "standalone") else 0.5)
    assert result["logits"] < EXACTNESS.get(family, 1e-12)
    assert result["gradients"] < EXACTNESS.get(family, 1e-12)
    assert result["same_tokens"]


@pytest.mark.slow
@families
@pytest.mark.parametrize("wrapper", ["zero2", "zero3"])
@both_forms
@with_and_without_checkpointing
def test_a_step_under_deepspeed_is_that_of_one_process(under_deepspeed, family, wrapper, form, checkpointing):
    check(under_deepspeed(family)[f"{wrapper}, {form}, {checkpointing}, float32"], family, form, 1e-5)


@families
@pytest.mark.parametrize("cut", [2, 3, 5])
def test_a_standalone_model_can_be_offloaded_from_inside_a_superblock(cut, family, tmp_path):
    result = over_two_devices("standalone", cut, ("cpu", "disk"), "float64", "small", tmp_path, family)
    # Gemma-2's factor on embeddings is a buffer of float32 where the model was built, of float64 where it was loaded.
    assert result.pop("logits") <= (1e-6 if family == "gemma2" else 0)
    assert result == {"same_tokens": True, "devices": ["cpu", "meta"]}


def test_an_adapter_on_offloaded_layers_is_refused_with_the_way_out(tmp_path):
    device_map = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    device_map.update({f"model.layers.{layer}": "disk" if layer == 4 else "cpu" for layer in range(6)})
    tiny_model().save_pretrained(tmp_path / "base")
    options = {"device_map": device_map, "offload_folder": tmp_path / "offload", "dtype": torch.float64}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    with pytest.raises(ValueError, match=r"decoder layer 4 is offloaded .* offload the model that to_standalone"):
        get_peft_model(base, UniAttnConfig(superblock_size=3, start_layer=0))
    get_peft_model(base, UniAttnConfig(superblocks=[[0, 1, 2, 3]]))


def test_hooks_on_a_follower_run_in_pairs():
    model = tiny_adapter()
    follower = model.base_model.model.model.layers[1].self_attn.base_layer
    seen = []
    follower.register_forward_pre_hook(lambda module, args: seen.append("before"))
    follower.register_forward_pre_hook(lambda module, args, kwargs: seen.append("before"), with_kwargs=True)
    follower.register_forward_hook(lambda module, args, output: seen.append("after"))
    logits(model)
    assert seen == ["before", "before", "after"]


def test_what_a_hook_before_a_follower_changes_counts():
    model = tiny_adapter()
    expected = logits(model)
    follower = model.base_model.model.model.layers[1].self_attn.base_layer
    hook = follower.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    assert not torch.equal(logits(model), expected)
    hook.remove()
    assert torch.equal(logits(model), expected)


@pytest.mark.gpu
@two_gpus
def test_two_gpus_do_what_one_does(tmp_path):
    results = on_two_ranks(
        tmp_path, "--device", "cuda", "--size", "medium", "--dtypes", "float32", "--tensor-parallel"
    )
    for case, result in results.items():
        assert "error" not in result, f"{case}: {result.get('error')}"
        if "logits" in result:
            assert result["logits"] < 1e-4 and result["same_tokens"], case
        if "gradients" in result:
            assert result["gradients"] < 1e-4, case


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_an_adapter_loads_onto_a_base_spread_over_gpus(cut, tmp_path):
    """Each cut goes through a Superblock, which are [0-2] and [3-5]."""
    model = tiny_adapter(tiny_model(dtype=torch.float32))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    device_map = {f"model.layers.{layer}": int(layer >= cut) for layer in range(6)}
    device_map |= {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=device_map)
    spread = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    layers = spread.base_model.model.model.layers
    assert [layer.self_attn.base_layer.v_proj.weight.device.index for layer in layers] == [*device_map.values()][:6]
    compensations = {layer.self_attn.uniattn_W["default"].weight.device.index for layer in (layers[1], layers[5])}
    assert compensations == {device_map["model.layers.1"], 1}
    with torch.no_grad():
        actual = spread(prompt().to(0)).logits.cpu()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
