"""Files that earlier releases wrote load in this one, with the logits that they had then."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import make_artefacts
import pytest
import torch
from conftest import aligned, logits
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_uniattn import to_standalone

RELEASES = sorted(file.parent for file in make_artefacts.ARTEFACTS.glob("*/manifest.json"))
every_release = pytest.mark.parametrize("release", RELEASES, ids=lambda folder: folder.name)
# Other CPUs round otherwise; transformers computes norms and softmax in float32.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-5}


def base_of(release: Path):
    return AutoModelForCausalLM.from_pretrained(release / "base", dtype=torch.float64)


@pytest.fixture
def expected(release):
    return load_file(release / "expected.safetensors")


def test_there_is_a_release():
    assert RELEASES


@every_release
def test_stored_files_are_those_of_the_manifest_and_small(release):
    manifest = json.loads((release / "manifest.json").read_text())
    assert make_artefacts.hashes(release) == manifest["sha256"]
    assert manifest["version"] == release.name
    assert sum(file.stat().st_size for file in release.rglob("*") if file.is_file()) < 100_000


@every_release
@pytest.mark.parametrize("name", make_artefacts.ADAPTERS)
def test_a_stored_adapter_loads_with_the_logits_it_had(name, release, expected):
    model = PeftModel.from_pretrained(base_of(release), release / name)
    ids = expected["input_ids"]
    torch.testing.assert_close(logits(model, ids), expected[name], **TOLERANCE)
    torch.testing.assert_close(logits(to_standalone(model), ids), expected[name], **TOLERANCE)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, ids), expected["base"], **TOLERANCE)


@every_release
def test_a_stored_standalone_model_loads_with_the_logits_it_had(release, expected):
    model = AutoModelForCausalLM.from_pretrained(release / "standalone", dtype=torch.float64)
    torch.testing.assert_close(logits(model, expected["input_ids"]), expected["standalone"], **TOLERANCE)


@every_release
@pytest.mark.parametrize("name", make_artefacts.ADAPTERS)
def test_weights_come_out_of_a_stored_adapter_bit_for_bit(name, release):
    model = PeftModel.from_pretrained(base_of(release), release / name)
    stored = load_file(release / name / "adapter_model.safetensors")
    found = {key.replace(".default.", "."): tensor for key, tensor in model.named_parameters() if ".default." in key}
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[key], stored[key].to(found[key].dtype)) for key in stored)


@every_release
def test_logits_are_bit_equal_where_those_of_the_base_are(release, expected):
    # Processors of one capability round otherwise too; the base, in which nothing is ours, tells.
    if not torch.equal(logits(base_of(release), expected["input_ids"]), expected["base"]):
        pytest.skip("this torch, transformers or CPU rounds otherwise than those of the manifest")
    for name in make_artefacts.ADAPTERS:
        model = aligned(PeftModel.from_pretrained(base_of(release), release / name))
        assert torch.equal(logits(model, expected["input_ids"]), expected[name])
    model = aligned(AutoModelForCausalLM.from_pretrained(release / "standalone", dtype=torch.float64))
    assert torch.equal(logits(model, expected["input_ids"]), expected["standalone"])


@every_release
def test_stored_logits_tell_the_models_apart(release, expected):
    names = ["base", *make_artefacts.ADAPTERS]
    assert all((expected[a] - expected[b]).abs().max() > 1e-2 for a in names for b in names if a < b)


def test_artefacts_are_only_written_from_a_clean_tree(tmp_path):
    for arguments in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x", "--allow-empty"],
    ):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    assert len(make_artefacts.check_clean(tmp_path)) == 40
    (tmp_path / "new").touch()
    with pytest.raises(ValueError, match=r"not clean \(\?\? new\)"):
        make_artefacts.check_clean(tmp_path)
