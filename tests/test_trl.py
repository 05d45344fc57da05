"""TRL's SFTTrainer on both stages: the adapter (stage 1, W_c only) and the standalone model (stage 2, everything)."""

from __future__ import annotations

import conftest
import pytest
import torch
from conftest import aligned, changed, prompt, tiny_adapter, tiny_model, weights
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from peft_uniattn import CLAConfig, LLMDropConfig, UniAttnConfig, to_standalone

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(29))]


@pytest.fixture(scope="module")
def tokenizer():
    """A word is a token."""
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>")
    plain = tokenizers.Tokenizer(model)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def counting():
    """Texts that count upward, of unequal lengths, so that batches are padded."""
    texts = [" ".join(f"w{(start + step) % 29}" for step in range(6 + start % 3)) for start in range(16)]
    return datasets.Dataset.from_dict({"text": texts})


@pytest.fixture
def train(tokenizer, counting, tmp_path):
    """Train a model for some steps; returns the trainer. Everything that is random is seeded."""

    def run(model, *, steps=6, resume=None, peft_config=None, **arguments):
        settings = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": steps,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "seed": 3,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            **arguments,
        }
        trainer = trl.SFTTrainer(
            model,
            args=trl.SFTConfig(**settings),
            train_dataset=counting,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def base():
    return tiny_model(vocab_size=len(WORDS), dtype=torch.float32, eos_token_id=2)


def adapter(**config):
    return tiny_adapter(base(), init_weights=True, **config)


def standalone():
    return to_standalone(tiny_adapter(base()))


STAGES = {"stage_1": adapter, "stage_2": standalone}
both_stages = pytest.mark.parametrize("make", STAGES.values(), ids=STAGES)


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logits(model):
    return conftest.logits(model.eval(), prompt(vocab_size=len(WORDS)))


@pytest.mark.parametrize("r", [None, 4])
def test_stage_1_changes_only_the_compensation(r, train):
    model = adapter(r=r)
    before = weights(model)
    train(model)
    assert changed(before, weights(model)) == {name for name in before if ".uniattn_" in name}


def test_stage_2_changes_everything(train):
    model = standalone()
    before = weights(model)
    train(model)
    assert changed(before, weights(model)) == set(before)


@both_stages
def test_training_lowers_the_loss(make, train):
    trainer = train(make(), steps=16)
    assert sum(losses(trainer)[-4:]) < sum(losses(trainer)[:4]) - 0.4


def test_the_trainer_applies_the_configuration_itself(train):
    config = UniAttnConfig(superblock_size=3, start_layer=0, task_type="CAUSAL_LM")
    given = train(base(), peft_config=config).model
    assert isinstance(given, PeftModel)
    assert not changed(weights(given), weights(train(adapter()).model))


@both_stages
def test_gradient_checkpointing_is_on_by_default_and_exact(make, train):
    with_checkpointing, without = train(make()), train(make(), gradient_checkpointing=False)
    assert with_checkpointing.args.gradient_checkpointing and not without.args.gradient_checkpointing
    assert losses(with_checkpointing) == losses(without)
    assert not changed(weights(with_checkpointing.model), weights(without.model))


def test_stage_1_recomputes_nothing_below_its_lowest_follower(train):
    model, runs = adapter(superblocks=[[3, 4, 5]]), []
    for index, layer in enumerate(model.get_base_model().model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: runs.append(index))
    trainer = train(model, steps=2)
    assert trainer.args.gradient_checkpointing
    assert [runs.count(index) for index in range(6)] == [2, 2, 2, 2, 4, 4]


@both_stages
def test_reentrant_gradient_checkpointing_is_refused(make, train):
    with pytest.raises(RuntimeError, match=r'reentrant.*gradient_checkpointing_kwargs=\{"use_reentrant": False\}'):
        train(make(), gradient_checkpointing_kwargs={"use_reentrant": True})


@both_stages
def test_resuming_from_a_checkpoint_ends_where_an_uninterrupted_run_ends(make, train, tmp_path):
    uninterrupted = train(make(), save_strategy="steps", save_steps=3)
    resumed = train(make(), resume=str(tmp_path / "run" / "checkpoint-3"), output_dir=str(tmp_path / "resumed"))
    assert resumed.state.global_step == 6
    assert losses(resumed) == losses(uninterrupted)
    assert not changed(weights(resumed.model), weights(uninterrupted.model))


def test_a_saved_stage_1_loads_bit_equal(train, tmp_path):
    trainer = train(adapter())
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(logits(aligned(PeftModel.from_pretrained(base(), tmp_path / "saved"))), logits(trainer.model))


def test_a_saved_stage_2_loads_bit_equal(train, tmp_path):
    trainer = train(standalone())
    trainer.save_model(str(tmp_path / "saved"))
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(other) is type(trainer.model)
    assert torch.equal(logits(aligned(other)), logits(trainer.model))


def test_a_stage_2_checkpoint_is_a_model_that_loads(train, tmp_path):
    trainer = train(standalone(), steps=3, save_strategy="steps", save_steps=3)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-3")
    assert torch.equal(logits(aligned(other)), logits(trainer.model))


def test_stage_2_starts_where_stage_1_ended(train):
    model = train(adapter()).model
    assert torch.equal(logits(to_standalone(model)), logits(model))


def test_the_base_is_as_before_after_stage_1(train):
    unloaded = train(adapter()).model.unload()
    assert torch.equal(logits(unloaded), logits(base()))


@pytest.mark.parametrize("peft_config", [None, LoraConfig(target_modules="all-linear")], ids=["full", "lora"])
@pytest.mark.parametrize(
    "config", [CLAConfig(superblocks=[[1, 2, 3], [4, 5]]), LLMDropConfig(layers=[2, 4])], ids=["cla", "llmdrop"]
)
def test_a_rival_s_standalone_model_trains(config, peft_config, train):
    trainer = train(to_standalone(get_peft_model(base(), config)), steps=12, peft_config=peft_config)
    first, *_, last = losses(trainer)
    assert last < first - 0.1
