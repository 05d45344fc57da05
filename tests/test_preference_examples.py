"""`examples/dpo.py` and `examples/grpo.py`: TRL's trainers on a unified standalone model."""

from __future__ import annotations

import json
import math
import re
import runpy
from pathlib import Path

import pytest
import recipe_runs
import torch
from conftest import changed, tiny_adapter, tiny_model, weights

from peft_uniattn import to_standalone

EXAMPLES = Path(__file__).parents[1] / "examples"
FOLLOWERS = (1, 2, 4, 5)
LEADERS = (0, 3)
COMMON = {
    "max_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "seed": 0,
}


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny standalone model with its tokenizer."""
    base = tiny_model(vocab_size=len(recipe_runs.WORDS), dtype=torch.float32, eos_token_id=2, pad_token_id=0)
    to_standalone(tiny_adapter(base)).save_pretrained(tmp_path / "model")
    recipe_runs.tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def flags(checkpoint, tmp_path, rows, **changes) -> list[str]:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {
        "model_name_or_path": checkpoint,
        "dataset_name": tmp_path / "rows.jsonl",
        "output_dir": tmp_path / "out",
        **COMMON,
        **changes,
    }
    return [part for name, value in named.items() for part in (f"--{name}", str(value))]


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def check_that_training_reached_everything(before, model) -> None:
    moved = changed(before, weights(model))
    assert moved == set(before)
    for layer in FOLLOWERS:
        parts = {match[1] for name in moved if (match := re.search(rf"layers\.{layer}\.self_attn\.(\w+)", name))}
        assert parts == {"v_proj", "o_proj", "compensation"}


@pytest.mark.parametrize("messages", [False, True], ids=["texts", "messages"])
def test_dpo_trains_values_outputs_and_compensation(checkpoint, tmp_path, messages):
    rows = [{"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2} w4", "rejected": f" w{i + 9}"} for i in range(8)]
    if messages:
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        rows = [{name: [{"role": roles[name], "content": text}] for name, text in row.items()} for row in rows]
    make_trainer = runpy.run_path(str(EXAMPLES / "dpo.py"))["make_trainer"]
    trainer = make_trainer(flags(checkpoint, tmp_path, rows, per_device_train_batch_size=4))
    assert trainer.ref_model.config.model_type == trainer.model.config.model_type
    assert trainer.model.config.model_type.startswith("uniattn")
    before = weights(trainer.model)
    trainer.train()
    first, second = losses(trainer)
    # Policy and reference are equal at first, so the loss is that of a coin.
    assert first == pytest.approx(math.log(2), rel=1e-4)
    assert second < first
    check_that_training_reached_everything(before, trainer.model)


def test_grpo_generates_with_the_value_only_cache_and_trains_everything(checkpoint, tmp_path):
    module = runpy.run_path(str(EXAMPLES / "grpo.py"))
    rows = [{"question": f"w{i} w{i + 1}", "answer": f"w{i + 2}"} for i in range(8)]
    generation = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6}
    trainer = module["make_trainer"](flags(checkpoint, tmp_path, rows, prompt_style="chat", **generation))
    # A tiny random model is never right, and a reward that is always 0 gives no gradient.
    trainer.reward_funcs = [lambda completions, **_: [float(len(set(text[-1]["content"]))) for text in completions]]
    cached = []

    def look(module, args, output):
        if (cache := getattr(output, "past_key_values", None) or getattr(output, "cache", None)) is not None:
            cached.append([(layer.keys.shape[-1], layer.values.shape[-1]) for layer in cache.layers])

    trainer.model.register_forward_hook(look)
    before = weights(trainer.model)
    trainer.train()
    # A follower keeps its values where keys are, and nothing where values are.
    assert len(cached) >= 2 * 2
    for widths in cached:
        assert {widths[layer] for layer in FOLLOWERS} == {(8, 0)}
        assert {widths[layer] for layer in LEADERS} == {(8, 8)}
    assert all(math.isfinite(loss) for loss in losses(trainer))
    check_that_training_reached_everything(before, trainer.model)


def test_grpos_reward_compares_the_last_number(checkpoint):
    accuracy = runpy.run_path(str(EXAMPLES / "grpo.py"))["accuracy"]
    answers = ["So 3 + 4 = 7 #### 7", "#### 1,200", "#### 5", "#### 2.5"]
    completions = ["It is 7.", "about 1200", [{"role": "assistant", "content": "5 and then 6"}], "no idea"]
    assert accuracy(completions, answers) == [1.0, 1.0, 0.0, 0.0]
