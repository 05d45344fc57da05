"""`peft-uniattn bench train`: what is measured, what is printed, what is refused."""

import json
import math
import shutil
import weakref

import pytest
import torch
from conftest import close, prompt, tiny_adapter, tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from peft_uniattn.bench import train
from peft_uniattn.bench.shapes import load_model, shape_config
from peft_uniattn.bench.train import FULL, LORA, STAGE_1, STAGE_2, TrainBenchmark, next_token_loss
from peft_uniattn.cli import app

TINY = {"shape": "tiny", "batch_size": 2, "length": 16, "rank": 4, "rounds": 2, "warmup": 1, "steps": 3, "chunk": 7}
ARGUMENTS = ["--shape", "tiny", "--batch-size", "2", "--length", "16", "--rank", "4", "--rounds", "2", "--warmup", "1"]


@pytest.fixture(scope="module")
def result():
    return TrainBenchmark(**TINY, device="cpu").run()


def test_every_contender_is_timed(result):
    names = [FULL, STAGE_2, LORA, STAGE_1, f"{STAGE_1}, rank 4"]
    assert list(result["contenders"]) == names
    for row in result["contenders"].values():
        assert row["step_seconds"] > 0
        assert len(row["step_seconds_by_round"]) == 2
        assert row["tokens_per_second"] == pytest.approx(32 / row["step_seconds"])


def test_contenders_train_what_they_are_named_for(result):
    rows = result["contenders"]
    size, followers = 64, 3  # 8 layers: one Superblock [4-7]
    assert rows[FULL]["trainable_parameters"] == rows[FULL]["parameters"]
    assert rows[STAGE_2]["trainable_parameters"] == rows[STAGE_2]["parameters"]
    # Followers lose q (64 x 64) and k (64 x 32), and get W_c (64 x 64).
    assert rows[STAGE_2]["parameters"] == rows[FULL]["parameters"] - followers * size * size // 2
    assert rows[STAGE_1]["trainable_parameters"] == followers * size * size
    assert rows[f"{STAGE_1}, rank 4"]["trainable_parameters"] == followers * 2 * 4 * size
    # A (in x 16) and B (16 x out) at q, k, v, o, gate, up and down of 8 layers.
    widths = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    assert rows[LORA]["trainable_parameters"] == 8 * 16 * sum(map(sum, widths))


def test_goals_are_ratios_of_the_measured_figures(result):
    rows = result["contenders"]
    by_contender = {(goal["contender"], goal["figure"]): goal for goal in result["goals"]}
    stage_1 = by_contender[STAGE_1, "step_seconds"]
    assert stage_1["ratio"] == rows[STAGE_1]["step_seconds"] / rows[LORA]["step_seconds"]
    assert stage_1["met"] == (stage_1["ratio"] <= 1.0)
    stage_2 = by_contender[STAGE_2, "step_seconds"]
    assert stage_2["ratio"] == rows[STAGE_2]["step_seconds"] / rows[FULL]["step_seconds"]
    memory = by_contender[STAGE_2, "peak_memory_bytes"]
    assert memory["limit"] == 1.02
    assert memory["ratio"] is None and memory["met"] is None, "without a GPU no peak is measured"


def test_training_that_does_not_work_gets_no_time():
    result = TrainBenchmark(**{**TINY, "rounds": 1, "steps": 1}, learning_rate=0.0, device="cpu").run()
    assert all(row["step_seconds"] is None for row in result["contenders"].values())
    assert all(goal["met"] is None for goal in result["goals"])


def test_a_contender_is_gone_before_the_next_one_is_built(monkeypatch):
    built = []

    def load(*args, **kwargs):
        gone = [reference() is None for reference in built]
        assert all(gone), f"{gone.count(False)} models would count in the next one's peak memory"
        model = load_model(*args, **kwargs)
        built.append(weakref.ref(model.get_input_embeddings().weight))
        return model

    monkeypatch.setattr(train, "load_model", load)
    TrainBenchmark(**TINY, device="cpu").run()
    assert len(built) == 10


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_the_loss_in_chunks_is_that_of_all_logits(chunk):
    ids = prompt()
    for model in (tiny_model(), tiny_adapter()):
        logits = model(ids).logits[:, :-1]
        picked = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
        expected = -picked.sum() / picked.numel()
        # As in transformers, cross-entropy is computed in float32.
        loss = next_token_loss(model, ids, chunk)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, weights, retain_graph=True)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, weights), rtol=1e-4, atol=1e-7)


def test_gradient_checkpointing_changes_no_loss():
    settings = {**TINY, "rounds": 1, "dtype": "float32", "device": "cpu"}
    plain, checkpointed = (TrainBenchmark(**settings, gradient_checkpointing=on).run() for on in (False, True))
    for name, row in plain["contenders"].items():
        close(torch.tensor(checkpointed["contenders"][name]["losses_by_round"]), torch.tensor(row["losses_by_round"]))


def test_the_last_line_is_the_document_that_is_written(tmp_path):
    path = tmp_path / "train.json"
    run = CliRunner().invoke(app, ["bench", "train", *ARGUMENTS, "--steps", "2", "--output", str(path)])
    assert run.exit_code == 0, run.output
    document = json.loads(run.stdout.splitlines()[-1])
    assert document == json.loads(path.read_text())
    assert document["settings"]["seed"] == 0
    assert {"device", "torch", "transformers", "peft"} <= document["conditions"].keys()
    assert all(math.isfinite(row["step_seconds"]) for row in document["contenders"].values())


def test_the_document_is_printed_though_it_cannot_be_written(tmp_path, monkeypatch):
    def measured_until_the_folder_is_gone(self):
        shutil.move(folder, tmp_path / "elsewhere")
        folder.touch()
        return {"settings": vars(self), "conditions": {}, "contenders": {}, "goals": []}

    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setattr(TrainBenchmark, "run", measured_until_the_folder_is_gone)
    run = CliRunner().invoke(app, ["bench", "train", *ARGUMENTS, "--output", str(folder / "train.json")])
    assert run.exit_code == 1
    assert json.loads(run.stdout.splitlines()[-1])["contenders"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "llama-9000"], "shape='llama-9000'"),
        (["--dtype", "int3"], "dtype='int3'"),
        (["--superblock-size", "1"], "superblock_size=1"),
        (["--superblock-size", "5"], "superblock_size=5"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, message):
    run = CliRunner().invoke(app, ["bench", "train", *ARGUMENTS, *arguments])
    assert run.exit_code == 1
    assert message in run.stderr
    assert "Traceback" not in run.output


def test_a_superblock_without_followers_is_refused_before_anything_is_timed(monkeypatch):
    monkeypatch.setattr(TrainBenchmark, "run", lambda self: pytest.fail("measured"))
    run = CliRunner().invoke(app, ["bench", "train", *ARGUMENTS, "--superblock-size", "1"])
    assert run.exit_code == 1
    assert "superblock_size=1" in run.stderr


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [  # as published with each model
        ("smollm2-135m", 134_515_008),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-3.1-8b", 8_030_261_248),
    ],
)
def test_shapes_have_the_size_of_their_models(shape, parameters):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(shape))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
