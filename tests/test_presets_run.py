"""Presets run through the recipe: with a tiny model and tiny data in place of theirs, everything else as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import recipe_runs
import torch
from conftest import tiny_model

from peft_uniattn.training.arguments import parse_arguments
from peft_uniattn.training.two_stage import TwoStageRun

CONFIGS = Path(__file__).parents[1] / "configs"
ROW = {
    "pmc": lambda number: {"instruction": "w1", "input": f"w{number} w{number + 1}", "output": f"w{number + 2}"},
    "tulu3": lambda number: {
        "messages": [{"role": "user", "content": f"w{number}"}, {"role": "assistant", "content": f"w{number + 1}"}]
    },
}
# What fits a tiny model on a CPU instead of the preset's.
SMALLER = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "test_size": 4,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "gradient_checkpointing": False,
    "max_steps": 2,
}


@pytest.fixture
def run(tmp_path):
    inputs = recipe_runs.write_inputs(tmp_path)
    # Wide enough for bitsandbytes' blocks of 64.
    shape = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": len(recipe_runs.WORDS)}
    tiny_model(dtype=torch.float32, eos_token_id=2, pad_token_id=0, **shape).save_pretrained(tmp_path / "base")

    def start(preset, *, rows="pmc", name="out", **changes):
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(ROW[rows](number)) + "\n" for number in range(40)))
        plan = {"dropped_layers": "3,5"} if "llmdrop" in preset else {"superblocks": "0-2,3-5"}
        merged = {**inputs, **SMALLER, **plan, "output_dir": tmp_path / name, **changes}
        flags = [part for name, value in merged.items() for part in (f"--{name}", str(value))]
        return TwoStageRun(parse_arguments(["--config", str(CONFIGS / preset), *flags])).run()

    return start


@pytest.mark.parametrize("data", ["pmc", "tulu3"])
def test_the_papers_presets_run_all_stages(run, data):
    receipt = run(f"llama-3.1-8b/{data}.yaml", rows=data)
    assert {"base", "calibrated", "after stage 1", "after stage 2"} <= set(receipt.losses)
    assert receipt.kv_bytes_after < receipt.kv_bytes_before


def test_stage_1_on_a_4_bit_base_and_stage_2_with_8_bit_adamw_run_one_after_the_other(run, tmp_path):
    pytest.importorskip("bitsandbytes")
    first = run("llama-3.1-8b/stage1-4bit.yaml", name="first", learning_rate=1e-2)
    assert first.losses["after stage 1"] < first.losses["calibrated"]
    second = run(
        "llama-3.1-8b/stage2-8bit-adamw.yaml", name="second", adapter=tmp_path / "first/adapter", learning_rate=1e-2
    )
    assert second.losses["after stage 2"] < second.losses["base"]


@pytest.mark.parametrize("rival", ["cla-full", "llmdrop-half"])
def test_rivals_are_trained_in_one_stage(run, rival):
    pytest.importorskip("peft_uniattn.rivals")
    receipt = run(f"llama-3.1-8b/{rival}.yaml")
    assert set(receipt.losses) == {"base", "after stage 2"}
    assert receipt.kv_bytes_after < receipt.kv_bytes_before
