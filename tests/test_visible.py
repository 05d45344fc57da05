"""What can be watched while the recipe runs, and the precisions that its flags choose."""

import pytest
import recipe_runs
from recipe_runs import losses
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from peft_uniattn.training.main import main


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return recipe_runs.write_inputs(tmp_path_factory.mktemp("inputs"))


def test_bars_show_loss_and_speed_and_tensorboard_has_the_curve(inputs, tmp_path, capfd):
    main(recipe_runs.flags(inputs, tmp_path / "run", stages="stage1", report_to="tensorboard", disable_tqdm=False))
    shown = capfd.readouterr().err
    assert "stage1:" in shown and "loss=" in shown and "tokens/s=" in shown
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "stage1")).Reload()
    logged = losses(tmp_path / "run", "stage 1")
    curve = events.Scalars("train/loss")
    assert [event.step for event in curve] == [step for step, *_ in logged]
    assert [event.value for event in curve] == pytest.approx([loss for _, loss, *_ in logged])


def test_bfloat16_and_gradient_checkpointing_by_flag_end_near_full_precision(inputs, tmp_path):
    main(recipe_runs.flags(inputs, tmp_path / "full"))
    main(recipe_runs.flags(inputs, tmp_path / "mixed", bf16=True, gradient_checkpointing=True))
    for step in ("stage 1", "stage 2"):
        full, mixed = ([loss for _, loss, *_ in losses(tmp_path / name, step)] for name in ("full", "mixed"))
        assert full != mixed
        assert mixed == pytest.approx(full, abs=0.05)


def test_a_four_bit_base_takes_calibration_and_stage_1(tmp_path):
    inputs = recipe_runs.write_inputs(tmp_path, hidden_size=64, intermediate_size=128)  # bitsandbytes' blocks are 64
    receipt = main(recipe_runs.flags(inputs, tmp_path / "run", load_in_4bit=True, stages="calibrate,stage1"))
    assert list(receipt.losses) == ["base", "unified, no compensation", "calibrated", "after stage 1"]
