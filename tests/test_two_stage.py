"""The two-stage run on a tiny model: artefacts, stages alone, resumption after an interruption, and refusals."""

import json
import re
import shutil

import pytest
import recipe_runs
import torch
from conftest import changed, tiny_model, weights
from peft import PeftModel
from recipe_runs import arguments, losses
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_uniattn.training import steps, summary, trainer
from peft_uniattn.training.two_stage import TwoStageRun


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return recipe_runs.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("two_stage") / "run"
    return directory, TwoStageRun(arguments(inputs, directory, compare_with_base=True)).run()


@pytest.fixture
def run(inputs):
    """Runs the recipe with other flags than those of the tiny run; returns the receipt."""

    def run(directory, **changes):
        return TwoStageRun(arguments(inputs, directory, **changes)).run()

    return run


def test_the_receipt_has_a_loss_for_every_step(finished):
    _, receipt = finished
    assert list(receipt.losses) == [
        "base",
        "unified, no compensation",
        "calibrated",
        "after stage 1",
        "after stage 2",
        "plain fine-tuned base",
    ]


def test_the_receipt_states_the_measured_cache(finished):
    _, receipt = finished
    assert (receipt.kv_bytes_before, receipt.kv_bytes_after) == (6 * 2 * 16 * 4, (6 * 2 - 4) * 16 * 4)


def test_the_reloaded_checkpoint_gives_the_same_logits(finished):
    assert finished[1].reload_difference < 1e-6


def test_the_adapter_loads_onto_the_base(finished):
    directory, _ = finished
    model = PeftModel.from_pretrained(tiny_model(vocab_size=94, dtype=torch.float32), directory / "adapter")
    assert model.peft_config["default"].superblock_size == 3


def test_the_standalone_model_loads(finished):
    directory, _ = finished
    assert AutoModelForCausalLM.from_pretrained(directory / "model").config.superblocks == [[0, 1, 2], [3, 4, 5]]


def test_stage_1_trains_the_compensation_and_stage_2_everything(finished, inputs):
    directory, _ = finished
    calibrated, trained = (
        load_file(directory / folder / "adapter_model.safetensors") for folder in ("calibrated", "adapter")
    )
    assert changed(calibrated, trained) == set(calibrated)
    base = weights(AutoModelForCausalLM.from_pretrained(inputs["model_name_or_path"]))
    model = weights(AutoModelForCausalLM.from_pretrained(directory / "model"))
    assert changed(base, model) == base.keys() | model.keys()


@pytest.mark.parametrize("artefact", ["calibrated", "adapter", "model"])
def test_model_cards_carry_the_receipt_and_the_import(finished, artefact):
    directory, receipt = finished
    card = (directory / artefact / "README.md").read_text()
    assert "import peft_uniattn" in card
    assert all(f"{loss:.4f}" in card for loss in receipt.losses.values())
    assert f"{receipt.kv_bytes_before:,} → {receipt.kv_bytes_after:,} bytes" in card


@pytest.mark.parametrize("artefact", ["adapter", "model"])
def test_model_cards_tell_who_follows_whom(finished, artefact):
    card = (finished[0] / artefact / "README.md").read_text()
    assert "| 0 | 1, 2 |\n| 3 | 4, 5 |" in card
    assert "of 6. W_c of every follower is a full matrix" in card


@pytest.mark.parametrize("artefact", ["adapter", "model"])
def test_model_cards_tell_plan_data_hyperparameters_calibration_and_training_losses(finished, artefact):
    directory, _ = finished
    details = json.loads((directory / artefact / "README.md").read_text().split("```json\n")[1].split("```")[0])
    assert details["plan"]["superblock_size"] == 3
    assert details["hyperparameters"]["learning_rate"] == 1e-2
    assert details["hyperparameters"]["per_device_train_batch_size"] == 4
    assert len(details["calibration"]["followers"]) == 4
    assert details["training losses"]["stage 1"] == {
        str(step): loss for step, loss, *_ in losses(directory, "stage 1")
    }
    assert details["data"]


def test_the_receipt_is_written_beside_the_artefacts(finished):
    directory, receipt = finished
    assert json.loads((directory / "receipt.json").read_text()) == receipt.to_dict()


def test_nothing_but_artefacts_is_left(finished):
    assert {path.name for path in finished[0].iterdir()} == {
        *("calibrated", "adapter", "model", "plain", "receipt.json", "journal.json")
    }


def test_checkpoints_stay_if_asked_for(run, tmp_path):
    run(tmp_path / "run", stages="stage1", keep_checkpoints=True)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints" / "stage1").glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-4"]


def test_a_finished_run_is_not_repeated(finished, inputs, monkeypatch):
    directory, receipt = finished
    for name in ("calibrate", "train", "load_model", "load_data"):
        monkeypatch.setattr(steps, name, pytest.fail)
    assert TwoStageRun(arguments(inputs, directory, compare_with_base=True)).run() == receipt


@pytest.fixture
def elsewhere(monkeypatch):
    """Another machine."""
    monkeypatch.setattr(summary, "environment", lambda: {"device": "another"})
    monkeypatch.setattr(trainer.SFTConfig, "world_size", 8)


def test_a_finished_run_called_again_elsewhere_keeps_the_machine_it_was_measured_on(finished, inputs, elsewhere):
    directory, receipt = finished
    assert TwoStageRun(arguments(inputs, directory, compare_with_base=True)).run() == receipt
    assert '"processes": 1' in (directory / "model" / "README.md").read_text()


def test_a_journal_of_an_earlier_version_without_a_machine_still_works(run, tmp_path, elsewhere):
    run(tmp_path / "run", stages="calibrate")
    journal = tmp_path / "run" / "journal.json"
    content = json.loads(journal.read_text())
    for step in content["results"].values():
        del step["environment"], step["processes"]
    journal.write_text(json.dumps(content))
    assert run(tmp_path / "run", stages="calibrate").environment == {"device": "another"}


def test_an_interrupted_run_logs_the_same_means_where_saving_falls_between_logs(tmp_path, monkeypatch, run):
    class Interrupted(trainer.SFTTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    settings = {"stages": "stage1", "logging_steps": 3}
    run(tmp_path / "whole", **settings)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "SFTTrainer", Interrupted)
        run(tmp_path / "run", **settings)
    run(tmp_path / "run", **settings)
    assert losses(tmp_path / "run", "stage 1") == losses(tmp_path / "whole", "stage 1")


def test_stage_1_stops_early_and_stage_2_does_not(run, tmp_path):
    settings = {"stage1_early_stop": "train_loss", "stage1_early_stop_decay": 0, "stage1_early_stop_patience": 1}
    run(tmp_path / "run", stage1_learning_rate=1e-9, stage1_max_steps=8, learning_rate=1e-9, max_steps=8, **settings)
    assert len(losses(tmp_path / "run", "stage 1")) < 8
    assert len(losses(tmp_path / "run", "stage 2")) == 8


def test_calibration_alone_leaves_an_adapter(run, tmp_path, finished):
    receipt = run(tmp_path / "run", stages="calibrate")
    assert list(receipt.losses) == ["base", "unified, no compensation", "calibrated"]
    assert not (tmp_path / "run" / "adapter").exists()
    names = [path / "calibrated" / "adapter_model.safetensors" for path in (tmp_path / "run", finished[0])]
    assert not changed(*map(load_file, names))


def test_stages_one_by_one_end_where_all_at_once_end(run, tmp_path, finished):
    for stage in ("calibrate", "stage1", "stage2"):
        receipt = run(tmp_path / "run", stages=stage)
    assert receipt.losses == {name: loss for name, loss in finished[1].losses.items() if "plain" not in name}


def test_stage_1_alone_starts_without_calibration(run, tmp_path):
    receipt = run(tmp_path / "run", stages="stage1")
    assert list(receipt.losses) == ["base", "after stage 1"]
    assert receipt.reload_difference is None
    assert receipt.kv_bytes_after == 512


def test_stage_2_alone_starts_from_a_given_adapter(run, tmp_path, finished):
    receipt = run(
        tmp_path / "run", stages="stage2", adapter=finished[0] / "adapter", superblock_size=4, start_layer="none"
    )
    assert receipt.superblocks == [[0, 1, 2], [3, 4, 5]]
    assert receipt.losses["after stage 2"] == finished[1].losses["after stage 2"]


def test_stage_2_without_an_adapter_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="stage 2 needs an adapter"):
        run(tmp_path / "run", stages="stage2")


def test_another_start_of_a_finished_stage_is_refused(run, tmp_path):
    run(tmp_path / "run", stages="stage1")
    with pytest.raises(ValueError, match="holds a stage1 that started from W_c = 0, not from calibrated"):
        run(tmp_path / "run", stages="calibrate,stage1")


def test_other_settings_in_the_same_directory_are_refused_by_name(finished, run):
    with pytest.raises(ValueError, match=r"max_steps=5 \(was 4\)"):
        run(finished[0], compare_with_base=True, max_steps=5)


def test_other_data_under_the_same_name_are_refused(inputs, run, tmp_path):
    data = tmp_path / "data.jsonl"
    shutil.copy(inputs["dataset_name"], data)
    run(tmp_path / "run", dataset_name=data, stages="calibrate")
    data.write_text(data.read_text().replace("w7 ", "w8 "))
    with pytest.raises(ValueError, match=r"training data of .* have changed"):
        run(tmp_path / "run", dataset_name=data, stages="stage1")


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_written(run, tmp_path):
    with pytest.raises(ValueError, match="names layer 6"):
        run(tmp_path / "run", superblocks="5-6")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("argument", ["dataset_name", "exclude_ids"])
def test_a_file_that_is_missing_is_named_before_the_model_is_loaded(argument, run, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "load_model", lambda *args: pytest.fail("loaded"))
    with pytest.raises(FileNotFoundError, match=rf"{argument}='.*gone.json': there is no such file"):
        run(tmp_path / "run", **{argument: tmp_path / "gone.json"})
    assert not (tmp_path / "run").exists()


def test_as_many_processes_tokenize_as_dataset_num_proc_says(run, tmp_path, monkeypatch):
    asked, load_data = [], steps.load_data

    def watched(*args, **options):
        asked.append(options.get("num_proc"))
        return load_data(*args, **options)

    monkeypatch.setattr(steps, "load_data", watched)
    receipt = run(tmp_path / "two", stages="calibrate", dataset_num_proc=2)
    assert receipt.losses == run(tmp_path / "one", stages="calibrate").losses
    assert asked == [2, None]


def test_data_that_cannot_be_read_leave_nothing_that_refuses_other_settings(run, tmp_path):
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        run(tmp_path / "run", dataset_name=tmp_path / "broken.jsonl", stages="calibrate")
    run(tmp_path / "run", stages="calibrate")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"test_size": 0, "eval_strategy": "steps"}, "eval_strategy='steps' needs held-out examples"),
        ({"dataset_streaming": True, "test_size": 4, "max_steps": -1}, "max_steps=-1 does not say where stage2 stops"),
    ],
)
def test_data_that_a_stage_cannot_train_on_are_refused_before_anything_is_measured(
    changes, words, run, tmp_path, monkeypatch
):
    monkeypatch.setattr(steps.Measurements, "of", lambda *args: pytest.fail("measured"))
    with pytest.raises(ValueError, match=words):
        run(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_the_first_line_says_that_it_timed_the_loading(run, tmp_path, capsys):
    run(tmp_path, stages="calibrate")
    assert re.match(r"model loaded, plan made: \d+ s\nbase: held-out loss ", capsys.readouterr().out)


def test_a_foreign_directory_is_refused(run, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds no run to continue"):
        run(tmp_path)


def test_the_journal_is_plain_json(finished):
    assert set(json.loads((finished[0] / "journal.json").read_text())) == {"settings", "results"}


def test_the_users_evaluation_is_asked_after_every_step(run, tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(
        "def layers(model, tokenizer):\n    return {'vocabulary': len(tokenizer), 'training': float(model.training)}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    receipt = run(tmp_path / "run", evaluation="my_tasks:layers")
    assert list(receipt.evaluations) == ["base", "calibrated", "after stage 1", "after stage 2"]
    assert receipt.evaluations["base"]["vocabulary"] == 94
    assert ("vocabulary, after stage 2", "94.0000") in receipt.rows()


def test_nothing_is_held_out_if_not_wanted(run, tmp_path):
    receipt = run(tmp_path / "run", held_out_examples=0)
    assert receipt.losses == {} and receipt.prompt == "" and receipt.reload_difference is None
