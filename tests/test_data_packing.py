"""Training data in TRL's packed and padding-free batches: the loss is that of every example alone."""

from __future__ import annotations

import json

import datasets
import pytest
import recipe_runs
import torch
from conftest import loud, specification, tiny_adapter, tiny_model
from oracle import unified_logits
from trl import SFTConfig, SFTTrainer

from peft_uniattn import to_standalone
from peft_uniattn.training.data import IGNORE, DataArguments, load_data

MAX_LENGTH = 24
BATCHES = {
    "padded": {},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "packing_strategy": "bfd", "max_length": MAX_LENGTH},
}


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(recipe_runs.example(n)) + "\n" for n in range(12)))
    given = {"dataset_name": str(tmp_path / "data.jsonl"), "prompt_style": "chat", "test_size": 0}

    def run(**arguments):
        return load_data(
            DataArguments(**given, **arguments), recipe_runs.tokenizer(), max_length=MAX_LENGTH, seed=0
        ).train

    return run


@pytest.fixture
def trainer(tmp_path):
    def make(model, data, **settings):
        arguments = SFTConfig(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=3,
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
            **settings,
        )
        return SFTTrainer(model, arguments, train_dataset=data, processing_class=recipe_runs.tokenizer())

    return make


def model(form: str, back_end: str):
    made = loud(tiny_adapter(tiny_model(vocab_size=len(recipe_runs.WORDS), dtype=torch.float32)))
    made.base_model.model.set_attn_implementation(back_end)
    return made if form == "adapter" else to_standalone(made)


def summed_loss_alone(model, examples) -> tuple[float, int]:
    """Cross-entropy of all answers by equation 14, every example alone, and the number of tokens in it."""
    of, total, tokens = specification(model, [[0, 1, 2], [3, 4, 5]]), 0.0, 0
    for example in examples:
        logits = unified_logits(**of, input_ids=torch.tensor([example["input_ids"]]))[0, :-1].double()
        labels = torch.tensor(example["labels"])[1:]
        kept = labels != IGNORE
        total -= logits.log_softmax(-1)[kept].gather(1, labels[kept, None]).sum().item()
        tokens += int(kept.sum())
    return total, tokens


@pytest.mark.parametrize("back_end", ["eager", "sdpa"])
@pytest.mark.parametrize("form", ["adapter", "standalone"])
@pytest.mark.parametrize("kind", BATCHES)
def test_the_trainers_batches_have_the_loss_of_their_examples_alone(load, trainer, kind, form, back_end):
    data, trained = load(), model(form, back_end)
    with torch.no_grad():
        expected, tokens = summed_loss_alone(trained, data)
    made = trainer(trained, data, **BATCHES[kind])
    found, found_tokens = 0.0, 0
    for batch in made.get_train_dataloader():
        count = int((batch["labels"][:, 1:] != IGNORE).sum())
        assert ("position_ids" in batch) == (kind != "padded")
        with torch.no_grad():
            found += made.compute_loss(made.model, batch).item() * count
        found_tokens += count
    assert found_tokens == tokens
    assert found == pytest.approx(expected, rel=1e-5)


def test_packing_puts_several_examples_into_a_row(load, trainer):
    made = trainer(model("standalone", "sdpa"), load(), **BATCHES["packed"])
    assert sum(map(len, made.train_dataset["seq_lengths"])) == 12
    assert len(made.train_dataset) < 8


@pytest.mark.parametrize("kind", BATCHES)
def test_a_stream_trains_too(load, trainer, kind):
    made = trainer(model("standalone", "sdpa"), load(dataset_streaming=True), max_steps=3, **BATCHES[kind])
    made.train()
    assert made.state.global_step == 3
