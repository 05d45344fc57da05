"""The README's figures are those of the raw results."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULT = json.loads((ROOT / "docs" / "results" / "quickstart.json").read_text())
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("step", RESULT["receipt"]["losses"])
def test_losses_are_those_of_the_raw_result(step):
    assert f"| {step} | {RESULT['receipt']['losses'][step]:.4f} |" in README


@pytest.mark.parametrize("name", ["kv_bytes_before", "kv_bytes_after", "adapter_parameters"])
def test_sizes_are_those_of_the_raw_result(name):
    assert f"{RESULT['receipt'][name]:,}" in README


def test_the_wall_time_is_that_of_the_raw_result():
    assert f"{RESULT['receipt']['seconds'] / 60:.1f} minutes" in README


def raw(name):
    return json.loads((ROOT / "docs" / "results" / name).read_text())


def test_it_is_short():
    assert len(README.splitlines()) < 200


@pytest.mark.parametrize("row", raw("decode_h100.json")["shapes"], ids=lambda row: str(row["batch_size"]))
def test_ratios_of_a_decoded_token_are_those_of_the_raw_result(row):
    best = min(value for name, value in row["ratios"].items() if name.endswith("kernels"))
    bound = row["bound_ms"]["unified"] / row["bound_ms"]["base"]
    shape = rf"{row['batch_size']} × {row['length']:,} cached tokens"
    assert re.search(rf"{shape}; bound by bytes {bound:.3f} \| {best:.3f} \|", README)


def test_the_ratio_of_the_first_token_is_that_of_the_raw_result():
    (row,) = raw("ttft_8k_h100.json")["lengths"]
    assert re.search(rf"first token of 8,192.*\| {row['ratios']['unified sdpa cudnn']:.3f} \|", README)


def test_ratios_of_training_are_those_of_the_raw_result():
    rows = raw("bench_train_llama-3.2-1b_h100.json")["contenders"]
    pairs = (("stage 1", "LoRA on all linear layers"), ("stage 2", "full fine-tuning"))
    ratios = [rows[one]["step_seconds"] / rows[other]["step_seconds"] for one, other in pairs]
    assert f"| {ratios[0]:.2f}, {ratios[1]:.2f} |" in README


def test_bytes_of_the_cache_are_those_of_the_raw_result():
    rows = raw("memory_h100.json")["contenders"]
    before, after = (rows[name]["cache_bytes_per_token"] for name in ("base", "unified"))
    assert f"{before:,.0f} → {after:,.0f} bytes a token" in README


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("post-train", "plain post-training"),
        ("llmdrop-half", "LLMDrop, 6 of 30 layers without attention"),
        ("u-auto12-iah", r"\*\*UniAttn, 12 of 30 layers follow\*\* \(measured plan, W_o fitted as well\)"),
        ("u-fix12-wc-s1", r"UniAttn, 12 follow \(fixed Superblocks of 4, default W_c, short stage 1\)"),
        ("llmdrop-full", "LLMDrop, 12 of 30 layers without attention"),
    ],
)
def test_accuracies_after_training_are_those_of_the_raw_result(row, words):
    (found,) = (item for item in raw("reproduce_smollm2_levers.json")["rows"] if item["cell"] == row)
    mean = sum(found["accuracy"].values()) / len(found["accuracy"])
    loss = found["losses"].get("after stage 2", found["losses"].get("plain fine-tuned base"))
    assert re.search(rf"\| {words} \| {found['kv_bytes']:,} \| {mean:.1f} \| {loss:.3f} \|", README)
