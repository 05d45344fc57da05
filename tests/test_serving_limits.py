"""What serving refuses, in one sentence, before an engine starts."""

import sys
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
from conftest import tiny_adapter

from peft_uniattn import to_standalone
from peft_uniattn.serving import register
from peft_uniattn.serving.limits import check_checkpoint, check_version


def test_vllm_finds_the_models_through_an_entry_point():
    (found,) = entry_points(group="vllm.general_plugins", name="uniattn")
    assert found.value == "peft_uniattn.serving:register"


def test_under_another_vllm_registering_touches_no_internals(monkeypatch):
    registered = {}
    stand_in = SimpleNamespace(
        __version__="0.99.0", ModelRegistry=SimpleNamespace(register_model=registered.__setitem__)
    )
    monkeypatch.setitem(sys.modules, "vllm", stand_in)  # no package: importing anything below it fails
    register()
    assert registered["UniAttnLlamaForCausalLM"] == "peft_uniattn.serving.models:UniAttnLlamaForCausalLM"


def test_nothing_of_vllm_is_imported_before_vllm_asks():
    assert "vllm" not in sys.modules


@pytest.mark.parametrize("version", ["0.32.0", "0.32.7", "0.32.1rc1", "0.32.0+cpu"])
def test_tested_versions_are_taken(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0", "dev"])
def test_other_versions_are_refused_with_the_way_out(version):
    with pytest.raises(ImportError, match=rf"this is vLLM {version}; install vllm==0\.32\.\*$"):
        check_version(version)


def test_plain_checkpoints_are_taken():
    check_checkpoint(to_standalone(tiny_adapter()).config)
    check_checkpoint(to_standalone(tiny_adapter(r=2)).config)


@pytest.mark.parametrize("design", ["ffn_output", "heads", "values_to_heads"])
def test_other_places_of_compensation_are_refused(design):
    config = to_standalone(tiny_adapter(compensation=design)).config
    with pytest.raises(ValueError, match=f"compensation='{design}' is not served"):
        check_checkpoint(config)


@pytest.mark.parametrize("field", [{"shared": "keys_and_values"}, {"dropped_layers": [1]}])
def test_rival_methods_are_refused(field):
    config = to_standalone(tiny_adapter()).config
    config.update(field)
    with pytest.raises(ValueError, match="not those of CLA or LLMDrop"):
        check_checkpoint(config)
