"""push_to_hub sends adapter and standalone model, each to a repository of its own, to a Hub on this machine."""

import huggingface_hub
import pytest
import recipe_runs
from hub_stand_in import running_hub

from peft_uniattn.training.two_stage import TwoStageRun


@pytest.fixture
def hub(monkeypatch):
    with running_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield hub


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return recipe_runs.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """The directory of a whole run that was kept to itself."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    TwoStageRun(recipe_runs.arguments(inputs, directory)).run()
    return directory


@pytest.fixture
def push(inputs):
    def push(directory, **changes):
        arguments = recipe_runs.arguments(inputs, directory, push_to_hub=True, hub_token="hf_secret", **changes)
        TwoStageRun(arguments).run()

    return push


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_both_artefacts_arrive_as_they_are(hub, push, finished):
    push(finished, hub_model_id="lab/small", hub_private_repo=True)
    assert hub.files == {
        "lab/small": contents(finished / "model"),
        "lab/small-adapter": contents(finished / "adapter"),
    }
    assert hub.private == {"lab/small": True, "lab/small-adapter": True}
    assert hub.tokens == {"Bearer hf_secret"}
    assert b"import peft_uniattn" in hub.files["lab/small-adapter"]["README.md"]


def test_names_default_to_the_output_directorys(hub, push, finished):
    push(finished, hub_adapter_id="lab/compensation")
    assert set(hub.files) == {"me/run", "lab/compensation"}
    assert not any(hub.private.values())


def test_stage_1_alone_uploads_its_adapter_and_writes_the_token_nowhere(hub, push, tmp_path):
    push(tmp_path / "run", stages="stage1", keep_checkpoints=True)
    assert set(hub.files) == {"me/run-adapter"}
    assert not any(b"hf_secret" in content for content in contents(tmp_path / "run").values())
