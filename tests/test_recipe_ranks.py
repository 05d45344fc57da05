"""The recipe on two CPU processes does what it does on one that sees the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import recipe_ranks
import recipe_runs
import torch
from recipe_runs import losses
from safetensors.torch import load_file

from peft_uniattn.training.main import main

ROOT = Path(__file__).parents[1]
FSDP2 = """
fsdp: true
fsdp_config:
  version: 2
  state_dict_type: SHARDED_STATE_DICT
keep_checkpoints: true
"""


# Adam divides gradients by their size, and where they are almost nothing it would make a difference of rounding.
SGD = {"optim": "sgd", "stage1_learning_rate": 0.1, "learning_rate": 0.1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return recipe_runs.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """The directory of the run in one process."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    main(recipe_runs.flags(inputs, directory, **SGD))
    return directory


def check_same(directory, alone):
    for step in ("stage 1", "stage 2"):
        torch.testing.assert_close(losses(directory, step), losses(alone, step), rtol=1e-5, atol=1e-6)
    assert torch.equal(*(compensation(path / "calibrated") for path in (directory, alone)))
    for file in ("adapter/adapter_model", "model/model"):
        states = [load_file(path / f"{file}.safetensors") for path in (directory, alone)]
        torch.testing.assert_close(*states, rtol=1e-5, atol=1e-6)
    receipts = [json.loads((path / "receipt.json").read_text()) for path in (directory, alone)]
    assert receipts[0]["losses"] == pytest.approx(receipts[1]["losses"], rel=1e-5)
    assert receipts[0]["reload_difference"] < 1e-5


def compensation(folder):
    return torch.cat([weight.flatten() for weight in load_file(folder / "adapter_model.safetensors").values()])


def test_fsdp2_on_two_processes_ends_as_one_process(inputs, alone, tmp_path):
    (tmp_path / "fsdp2.yaml").write_text(FSDP2)
    settings = {"per_device_train_batch_size": 2, "config": tmp_path / "fsdp2.yaml", **SGD}
    recipe_ranks.on_two_ranks(recipe_runs.flags(inputs, tmp_path / "run", **settings), tmp_path / "log")
    check_same(tmp_path / "run", alone)
    for stage in ("stage1", "stage2"):  # the weights were sharded indeed
        shards = tmp_path / "run" / "checkpoints" / stage / "checkpoint-4" / "pytorch_model_fsdp_0"
        assert {path.name for path in shards.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}


@pytest.mark.slow
def test_ddp_on_two_processes_ends_as_one_process(inputs, alone, tmp_path):
    argv = recipe_runs.flags(inputs, tmp_path / "run", per_device_train_batch_size=2, **SGD)
    recipe_ranks.on_two_ranks(argv, tmp_path / "log")
    check_same(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["{}", FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_continue_from_a_checkpoint_as_if_never_interrupted(inputs, tmp_path, wrapper):
    (tmp_path / "wrapper.yaml").write_text(wrapper)
    settings = {"per_device_train_batch_size": 2, "stages": "stage1", "config": tmp_path / "wrapper.yaml"}
    recipe_ranks.on_two_ranks(recipe_runs.flags(inputs, tmp_path / "whole", **settings), tmp_path / "log")
    argv = recipe_runs.flags(inputs, tmp_path / "run", **settings)
    with pytest.raises(AssertionError):
        recipe_ranks.on_two_ranks(argv, tmp_path / "log", dies_after=3)
    recipe_ranks.on_two_ranks(argv, tmp_path / "log")
    assert losses(tmp_path / "run", "stage 1") == losses(tmp_path / "whole", "stage 1")
    assert torch.equal(*(compensation(tmp_path / name / "adapter") for name in ("run", "whole")))


@pytest.mark.slow
def test_what_fails_in_the_main_process_ends_the_others(inputs, tmp_path):
    with pytest.raises(AssertionError, match="names layer 6"):
        recipe_ranks.on_two_ranks(recipe_runs.flags(inputs, tmp_path / "run", superblocks="5-6"), tmp_path / "log")


LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    # On CPUs it starts several processes by MPI only.
    "accelerate launch": [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_example_runs_behind_every_launcher(launcher, inputs, alone, tmp_path):
    rows = 2 if launcher == "torchrun" else 4
    argv = recipe_runs.flags(inputs, tmp_path / "run", per_device_train_batch_size=rows, **SGD)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*LAUNCHERS[launcher], str(ROOT / "examples" / "sft_two_stage.py"), *argv],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-5000:]
    assert run.stdout.count("held-out loss, after stage 2") == 1
    check_same(tmp_path / "run", alone)
