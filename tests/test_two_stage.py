"""The two-stage run on a tiny model: artefacts, resumption after an interruption, and refusals."""

import json

import pytest
import torch
from conftest import tiny_model
from datasets import Dataset, DatasetDict
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from peft_uniattn import UniAttnConfig
from peft_uniattn.training import two_stage
from peft_uniattn.training.two_stage import TwoStageRun, TwoStageSettings

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(90))]
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
)


def tokenizer():
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = TEMPLATE
    return made


def examples(count, first):
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"w{(first + i) % 80} w{(first + 2 * i) % 80}"}],
                "completion": [
                    {"role": "assistant", "content": f"w{(first + i + 1) % 80} w{(first + i + 2) % 80} w5"}
                ],
            }
            for i in range(count)
        ]
    )


def run(directory, **changes):
    settings = {
        "max_length": 16,
        "stage1_steps": 4,
        "stage2_steps": 4,
        "save_steps": 2,
        "stage1_learning_rate": 1e-2,
        "stage2_learning_rate": 1e-2,
        **changes,
    }
    return TwoStageRun(
        output_dir=directory,
        load_base=lambda: (tiny_model(dtype=torch.float32, eos_token_id=2), tokenizer(), "tiny"),
        data=DatasetDict(train=examples(24, 0), test=examples(6, 50)),
        data_name="counting",
        config=UniAttnConfig(task_type="CAUSAL_LM", superblock_size=3, start_layer=0),
        settings=TwoStageSettings(**settings),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two_stage") / "run"
    return directory, run(directory).run()


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
    model = PeftModel.from_pretrained(tiny_model(dtype=torch.float32), directory / "adapter")
    assert model.peft_config["default"].superblock_size == 3


def test_the_standalone_model_loads(finished):
    directory, _ = finished
    assert AutoModelForCausalLM.from_pretrained(directory / "model").config.superblocks == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("artefact", ["adapter", "model"])
def test_model_cards_carry_the_receipt_and_the_import(finished, artefact):
    directory, receipt = finished
    card = (directory / artefact / "README.md").read_text()
    assert "import peft_uniattn" in card
    assert all(f"{loss:.4f}" in card for loss in receipt.losses.values())


def test_the_receipt_is_written_beside_the_artefacts(finished):
    directory, receipt = finished
    assert json.loads((directory / "receipt.json").read_text()) == receipt.to_dict()


def test_no_training_checkpoints_are_left(finished):
    assert not (finished[0] / "checkpoints").exists()


def test_a_finished_run_is_not_repeated(finished, monkeypatch):
    directory, receipt = finished
    monkeypatch.setattr(two_stage, "calibrate", pytest.fail)
    monkeypatch.setattr(two_stage, "SFTTrainer", pytest.fail)
    assert run(directory).run() == receipt


@pytest.mark.parametrize("stage", ["stage-1", "stage-2"])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_ends(finished, tmp_path, monkeypatch, stage):
    class Interrupted(two_stage.SFTTrainer):
        def training_step(self, *args, **kwargs):
            if self.args.output_dir.endswith(stage) and self.state.global_step == 3:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(two_stage, "SFTTrainer", Interrupted)
        run(tmp_path / "run").run()
    continued = run(tmp_path / "run").run()
    assert continued.losses == pytest.approx(finished[1].losses, abs=1e-6)


def test_other_settings_in_the_same_directory_are_refused_by_name(finished):
    with pytest.raises(ValueError, match=r"stage2_steps=5 \(was 4\)"):
        run(finished[0], stage2_steps=5).run()


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    impossible = run(tmp_path / "run")
    impossible.config = UniAttnConfig(task_type="CAUSAL_LM", superblocks=[[5, 6]])
    with pytest.raises(ValueError, match="names layer 6"):
        impossible.run()
    assert not (tmp_path / "run").exists()


def test_a_foreign_directory_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds no run to continue"):
        run(tmp_path).run()


def test_the_journal_is_plain_json(finished):
    assert set(json.loads((finished[0] / "journal.json").read_text())) == {"settings", "results"}
