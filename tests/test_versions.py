"""Which release wrote a file, on which base; and what a file of a later release is told."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import peft
import pytest
import torch
import transformers
from conftest import changed, logits, tiny_adapter, tiny_model, transformers_adapters, weights
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import peft_uniattn
from peft_uniattn import CLAConfig, LLMDropConfig, UniAttnConfig, UniAttnLayer, to_standalone

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PLAN = {"superblocks": [[1, 2, 3]]}
LATER = ["0.2.0", "1.0", "99.0.0", "0.2.0.dev1"]
AS_OLD = [None, "0.0.1", "0.1.0", "0.1.99", "0.1.0+local"]
NO_VERSION = ["", "newest", 3, [1], {}, True]


def adapter_file(folder: Path, **fields) -> Path:
    tiny_adapter(**PLAN).save_pretrained(folder)
    return edited(folder / "adapter_config.json", **fields)


def edited(file: Path, **fields) -> Path:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return file.parent


def test_the_version_is_that_of_the_project():
    project = Path(__file__).parents[1] / "pyproject.toml"
    assert f'\nversion = "{peft_uniattn.__version__}"\n' in project.read_text()


def test_an_adapter_s_configuration_file_names_the_releases_that_wrote_it(tmp_path):
    content = json.loads((adapter_file(tmp_path) / "adapter_config.json").read_text())
    assert content["uniattn_version"] == peft_uniattn.__version__
    assert content["transformers_version"] == transformers.__version__
    assert content["peft_version"] == peft.__version__


@pytest.mark.parametrize("config", [CLAConfig(**PLAN), LLMDropConfig(layers=[4])], ids=["cla", "llmdrop"])
def test_so_do_those_of_the_other_methods(config, tmp_path):
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["uniattn_version"] == peft_uniattn.__version__


def test_a_file_that_is_saved_again_names_the_release_that_did(tmp_path):
    adapter_file(tmp_path, uniattn_version="0.0.1")
    PeftModel.from_pretrained(tiny_model(), tmp_path).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["uniattn_version"] == (
        peft_uniattn.__version__
    )


@pytest.mark.parametrize("release", LATER)
def test_an_adapter_of_a_later_release_is_refused_and_the_base_left_as_it_was(release, tmp_path):
    adapter_file(tmp_path, uniattn_version=release, a_field_of_tomorrow=1)
    base = tiny_model()
    before = weights(base)
    with pytest.raises(ValueError, match=rf"{release}.*later release than the installed.*pip install -U"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not changed(before, weights(base))
    assert not any(isinstance(module, UniAttnLayer) for module in base.modules())
    assert not hasattr(base, "peft_config")


def test_a_second_adapter_of_a_later_release_is_refused_and_the_first_kept(tmp_path):
    adapter_file(tmp_path, uniattn_version="99.0.0")
    model = tiny_adapter(**PLAN)
    expected = logits(model)
    with pytest.raises(ValueError, match="later release"):
        model.load_adapter(tmp_path, "other")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)


@transformers_adapters
def test_the_adapter_calls_of_transformers_refuse_it_too(tmp_path):
    adapter_file(tmp_path, uniattn_version="99.0.0")
    with pytest.raises(ValueError, match="later release"):
        tiny_model().load_adapter(str(tmp_path))


@pytest.mark.parametrize("release", AS_OLD)
def test_files_of_this_release_and_of_earlier_ones_load(release, tmp_path):
    adapter_file(tmp_path, uniattn_version=release)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(tiny_adapter(**PLAN)), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("release", NO_VERSION)
def test_what_is_no_version_is_refused_by_name(release, tmp_path):
    adapter_file(tmp_path, uniattn_version=release)
    with pytest.raises(ValueError, match="uniattn_version"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


def test_a_standalone_model_names_the_release_that_wrote_it(tmp_path):
    to_standalone(tiny_adapter(**PLAN)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["uniattn_version"] == peft_uniattn.__version__


@pytest.mark.parametrize("release", LATER)
def test_a_standalone_model_of_a_later_release_is_refused(release, tmp_path):
    to_standalone(tiny_adapter(**PLAN)).save_pretrained(tmp_path)
    edited(tmp_path / "config.json", uniattn_version=release)
    with pytest.raises(ValueError, match="later release than the installed"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.fixture
def cached_base(tmp_path, monkeypatch):
    """A model of a repository that is in the Hub's cache, its main branch at COMMIT and its tag "old" before."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    folder = cache / "models--someone--base"
    for revision, commit in {"main": COMMIT, "old": COMMIT[::-1]}.items():
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        tiny_model().save_pretrained(folder / "snapshots" / commit)
    return lambda revision: AutoModelForCausalLM.from_pretrained("someone/base", revision=revision)


@pytest.mark.parametrize(("revision", "commit"), [("main", COMMIT), ("old", COMMIT[::-1])])
def test_the_commit_of_a_base_from_the_hub_is_noted(revision, commit, cached_base, tmp_path):
    model = get_peft_model(cached_base(revision), UniAttnConfig(**PLAN), revision=revision)
    model.save_pretrained(tmp_path / "adapter")
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (content["base_model_name_or_path"], content["revision"]) == ("someone/base", revision)
    assert content["base_commit"] == commit


def test_a_loaded_adapter_keeps_the_commit_that_it_was_made_on(cached_base, tmp_path):
    get_peft_model(cached_base("old"), UniAttnConfig(**PLAN), revision="old").save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(cached_base("main"), tmp_path / "adapter")
    assert model.peft_config["default"].base_commit == COMMIT[::-1]


def test_the_refusal_of_another_base_names_the_commit(cached_base, tmp_path):
    get_peft_model(cached_base("main"), UniAttnConfig(**PLAN)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"load the base it names: 'someone/base' at commit {COMMIT}"):
        PeftModel.from_pretrained(tiny_model(num_hidden_layers=8), tmp_path / "adapter")


@pytest.mark.parametrize("name", ["", "/a/folder/that/is/gone", "someone/else", "not a repository"])
def test_a_base_from_elsewhere_has_no_commit(name):
    model = tiny_model()
    model.config.name_or_path = name
    assert get_peft_model(model, UniAttnConfig(**PLAN)).peft_config["default"].base_commit is None
