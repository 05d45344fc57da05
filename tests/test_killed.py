"""Nothing is lost: a run that is killed at any moment and started again ends as one that was left alone."""

import json
import random

import killed_run
import pytest
import recipe_runs
from conftest import changed
from recipe_runs import losses
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return recipe_runs.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The directory of a run that was left alone, and how many moments it had."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    return directory, killed_run.run(recipe_runs.flags(inputs, directory), directory)


def check_same(directory, whole):
    for step in ("stage 1", "stage 2"):
        assert losses(directory, step) == losses(whole, step)
    for file in ("calibrated/adapter_model", "adapter/adapter_model", "model/model"):
        assert not changed(load_file(directory / f"{file}.safetensors"), load_file(whole / f"{file}.safetensors"))
    receipts = [json.loads((path / "receipt.json").read_text()) for path in (directory, whole)]
    for receipt in receipts:
        del receipt["seconds"]
    assert receipts[0] == receipts[1]
    assert files(directory) == files(whole)


def files(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


MOMENTS = {
    "while the first result is written": ("journal.json.tmp", 2),
    "in calibration": ("calibration.tmp", 9),
    "between the files of calibration's adapter": ("calibrated.tmp", 2),
    "in a checkpoint of stage 1": ("checkpoints/stage1/checkpoint-2", 4),
    "in a step of stage 1": (killed_run.STEPS, 3),
    "in the adapter's files, when stage 1 has ended": ("adapter.tmp", 2),
    "in a step of stage 2": (killed_run.STEPS, 3),
    "while a checkpoint is declared whole": ("checkpoints/stage2/checkpoint-4/complete", 1),
    "in the standalone model's files, when stage 2 has ended": ("model.tmp", 2),
    "while the journal is written": ("journal.json.tmp", 1),
    "when checkpoints go": ("checkpoints/stage1", 1),
    "while the receipt is written": ("receipt.json.tmp", 1),
}


def test_a_run_killed_again_and_again_ends_as_one_left_alone(inputs, whole, tmp_path, record_property):
    directory = tmp_path / "run"
    argv = recipe_runs.flags(inputs, directory)
    for where, (inside, last) in MOMENTS.items():
        assert killed_run.run(argv, directory, inside=inside, last=last) is None, f"not killed {where}"
    killed_run.run(argv, directory)
    check_same(directory, whole[0])
    record_property("kills survived", len(MOMENTS))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_run_killed_at_random_moments_ends_as_one_left_alone(inputs, whole, tmp_path, seed, record_property):
    reference, count = whole
    directory = tmp_path / "run"
    argv = recipe_runs.flags(inputs, directory)
    draw = random.Random(seed)
    kills = 0
    # Mostly soon, at times late enough for the longest step, which calibration is: it starts anew when it was killed.
    while killed_run.run(argv, directory, last=draw.randint(1, draw.choice([count // 10] * 3 + [count]))) is None:
        kills += 1
        assert kills < 100, "the run never ended"
    assert kills
    check_same(directory, reference)
    record_property("kills survived", kills)
