"""The README's figures are those of the raw results."""

import json
import re
import runpy
from pathlib import Path

import pytest

from peft_uniattn.reproduce.cell import CellResult

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
    assert re.search(rf"first token of 8,192.*\| {row['ratios']['unified sdpa cudnn']:.3f},", README)


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
        ("uniattn-half", r"\*\*UniAttn, 6 of 30 layers follow\*\*"),
        ("llmdrop-half", "LLMDrop, 6 layers without attention"),
        ("cla-half", "CLA, 6 layers share keys and values"),
        ("uniattn", r"\*\*UniAttn, 12 of 30 layers follow\*\*"),
        ("cla-full", "CLA, 12 layers"),
        ("llmdrop-full", "LLMDrop, 12 layers"),
    ],
)
def test_accuracies_after_training_are_those_of_the_raw_result(row, words):
    found = [item for item in raw("reproduce_smollm2_by_loss.json")["results"] if item["cell"] == row]
    accuracy = sum(sum(item["accuracy"].values()) / len(item["accuracy"]) for item in found) / len(found)
    loss = sum(list(item["losses"].values())[-1] for item in found) / len(found)
    time = found[0]["ttft_ms"] / found[0]["ttft_base_ms"]
    cells = f"{found[0]['kv_bytes']:,} | {time:.2f} | {accuracy:.1f} | {loss:.3f} | {len(found)}"
    assert f"{cells} |" in README and re.search(rf"\| {words} \| {re.escape(cells)} \|", README)


def test_the_distance_of_qwen_is_that_of_the_raw_result():
    means = {
        (item["cell"], item["seed"]): sum(item["accuracy"].values()) / len(item["accuracy"])
        for item in raw("reproduce_qwen_by_loss.json")["results"]
    }
    distances = [means["post-train", seed] - means["uniattn", seed] for seed in range(3)]
    assert f"10 of 24 layers following end {sum(distances) / 3:.1f} points below plain post-training" in README


def test_medical_distances_are_those_of_the_raw_results():
    goals = runpy.run_path(str(ROOT / "docs" / "results_goals.py"))["goals"]

    def below(run, row):
        found = goals([CellResult(**item) for item in raw(f"reproduce_{run}_medical.json")["results"]])
        (points,) = (points for _, compared, points, *_ in found if compared == f"{row} − post-train")
        return points.removeprefix("−")

    assert below("smollm2", "uniattn-half") == "+0.0 ± 0.1"  # "equal"
    text = " ".join(README.split())
    assert f"5 of Qwen's end {below('qwen', 'uniattn-half')} points below it" in text
    assert f"12 and 10 end {below('smollm2', 'uniattn')} and {below('qwen', 'uniattn')} below" in text


def test_the_accuracy_of_fixed_superblocks_is_that_of_the_raw_result():
    (found,) = (row for row in raw("reproduce_smollm2_levers.json")["rows"] if row["cell"] == "u-fix12-wc-s1")
    assert f"reach {sum(found['accuracy'].values()) / 2:.1f} ([log]" in README


def test_ratios_of_compiled_layers_and_of_long_prompts_are_those_of_the_raw_results():
    shapes = raw("decode_compiled_h100.json")["shapes"]
    ratios = ", ".join(f"{row['ratios']['unified sdpa cudnn, kernels']:.3f}" for row in shapes)
    assert f"| the same two, layers compiled on both sides | {ratios} |" in README
    (row,) = raw("ttft_32k_rank64_h100.json")["lengths"]
    assert re.search(rf"of 32,768,.*, {row['ratios']['unified sdpa cudnn']:.3f} \|", README)


def test_the_ratio_and_the_memory_of_stored_tiles_are_those_of_the_raw_result():
    (row,) = raw("ttft_32k_tiles_h100.json")["lengths"]
    name = "unified sdpa cudnn"
    peaks = [row["contenders"][one]["peak_memory_bytes"] / 2**30 for one in (f"{name}, stored tiles", name)]
    ratio = row["ratios"][f"{name}, stored tiles"]
    assert f"{peaks[0]:.1f} GiB at the peak instead of {peaks[1]:.1f} | {ratio:.3f} |" in README
