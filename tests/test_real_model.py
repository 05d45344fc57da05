"""On a real model: what calibration and the two stages promise (SmolLM2-135M, some minutes of CPU)."""

from functools import partial

import pytest
import torch
from peft import get_peft_model

from peft_uniattn import UniAttnConfig, calibrate
from peft_uniattn.quickstart.checkpoint import load_checkpoint
from peft_uniattn.quickstart.data import load_examples
from peft_uniattn.quickstart.demonstration import demonstration, tokenized
from peft_uniattn.training.arguments import PlanArguments
from peft_uniattn.training.data import batches, tokenize
from peft_uniattn.training.evaluation import held_out_loss
from peft_uniattn.training.two_stage import TwoStageRun

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_ridge_beats_the_pseudoinverse_which_beats_no_compensation():
    model, tokenizer, _ = load_checkpoint()
    data = load_examples()
    train = tokenize(data["train"].shuffle(seed=0).select(range(96)), tokenizer, max_length=128).dataset
    test = tokenize(data["test"].select(range(12)), tokenizer, max_length=128).dataset
    pad = tokenizer.pad_token_id
    losses = {"base": held_out_loss(model, test, pad)}
    model = get_peft_model(model, UniAttnConfig(task_type="CAUSAL_LM"))
    losses["none"] = held_out_loss(model, test, pad)
    for method in ("pseudoinverse", "ridge"):
        calibrate(model, batches(train, 8, pad), method, progress=False)
        losses[method] = held_out_loss(model, test, pad)
    assert losses["base"] < losses["ridge"] < losses["pseudoinverse"] < losses["none"]


def test_each_step_of_the_two_stages_lowers_the_held_out_loss(tmp_path):
    arguments = demonstration(
        tmp_path / "run",
        plan=PlanArguments(),
        max_length=128,
        calibration_examples=32,
        held_out_examples=12,
        stage1_steps=10,
        stage2_steps=10,
        compare_with_base=False,
    )
    run = TwoStageRun(
        arguments, load_base=load_checkpoint, load_examples=partial(tokenized, load_examples(), arguments)
    )
    receipt = run.run()
    losses = receipt.losses
    assert (
        losses["after stage 2"] < losses["after stage 1"] < losses["calibrated"] < losses["unified, no compensation"]
    )
    assert receipt.kv_bytes_after / receipt.kv_bytes_before == 1 - receipt.followers / receipt.num_layers / 2
    assert receipt.reload_difference == 0
