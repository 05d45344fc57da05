"""The examples do what they say, at a small size and without a network."""

import json
import math
import re
import runpy
import sys
from pathlib import Path

import huggingface_hub
import pytest
import recipe_runs
import torch
from conftest import prompt, tiny_adapter, tiny_model
from hub_stand_in import running_hub
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
from word_tokenizer import WORDS, word_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
README = EXAMPLES.parent / "README.md"
NUMBERS = " ".join(f"w{(7 * index + index // 5) % 90}" for index in range(600))


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny model of 8 layers with its tokenizer, as a folder."""
    model = tiny_model(num_hidden_layers=8, vocab_size=len(WORDS), dtype=torch.float32, eos_token_id=2)
    model.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def adapter(checkpoint, tmp_path):
    """A random adapter on it: Superblocks [0-2] and [3-5]."""
    tiny_adapter(AutoModelForCausalLM.from_pretrained(checkpoint), r=4).save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(NUMBERS)
    return tmp_path / "text.txt"


def main(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def logits(model):
    with torch.no_grad():
        return model(prompt(1, 8, vocab_size=90)).logits


@pytest.mark.filterwarnings("ignore:.*tokens are few", "ignore:.*chat template")
def test_a_first_adapter_takes_twenty_lines(checkpoint, tmp_path, monkeypatch, capsys):
    lines = (EXAMPLES / "first_adapter.py").read_text().split('"""')[2].splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 20
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["first_adapter.py", checkpoint])
    runpy.run_path(str(EXAMPLES / "first_adapter.py"), run_name="__main__")
    assert (tmp_path / "first-adapter" / "adapter_model.safetensors").is_file()
    assert "<unk>" in capsys.readouterr().out  # none of the prompt's words is a number


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*tokens are few", "ignore:.*chat template")
def test_a_first_adapter_stays_on_the_gpu(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["first_adapter.py", checkpoint])
    left = runpy.run_path(str(EXAMPLES / "first_adapter.py"), run_name="__main__")
    assert left["base"].device.type == left["model"].device.type == "cuda"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_that_loads_a_model_itself_takes_a_gpu_where_there_is_one(path):
    source = path.read_text()
    itself = "load_checkpoint(" in source or "CausalLM.from_pretrained(" in source
    # The trainers of TRL place a model themselves, and uploading needs no device.
    if itself and path.stem not in ("continue_adapter", "push_to_hub"):
        placed = ('device="auto"', ".to(DEVICE)", '"cuda" if torch.cuda.is_available() else "cpu"')
        assert any(words in source for words in placed)


@pytest.mark.filterwarnings("ignore:.*tokens are few", "ignore:.*chat template")
def test_calibrate_only_keeps_to_the_target_and_saves(checkpoint, text, tmp_path, capsys):
    settings = {"length": 16, "sequences": 8, "held_out": 2, "rank": 4, "output_dir": tmp_path / "out"}
    main("calibrate_only")(checkpoint, str(text), kv_target=0.9, **settings)
    shown = capsys.readouterr().out
    before, after = (int(number.replace(",", "")) for number in re.findall(r"token: ([\d,]+) -> ([\d,]+)", shown)[0])
    assert before * 0.8 < after <= before * 0.9
    assert all(math.isfinite(float(loss)) for loss in re.findall(r"loss, \w+: (\S+)", shown))
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").active_peft_config.r == 4


def test_evaluate_prints_a_line_for_each_model(checkpoint, adapter, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    row = {"context": "w1.", "question": "w2?", "answerA": "w3", "answerB": "w4", "answerC": "w5", "correct": "B"}
    (tmp_path / "socialIQa_v1.4_dev.jsonl").write_text(json.dumps(row) + "\n")
    main("evaluate")([checkpoint, adapter], tasks="social_iqa_cloze", data_dir=tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "social_iqa_cloze  " in line]
    assert [line.split("  ")[0] for line in lines] == [checkpoint, adapter]
    assert all(line.endswith(("  0.0%", "  100.0%")) for line in lines)


def test_continuing_moves_the_adapter_and_nothing_else(checkpoint, adapter, tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(recipe_runs.example(index)) + "\n" for index in range(16)))
    settings = {"max_steps": 2, "learning_rate": 1e-2, "max_length": 16}
    template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(checkpoint)
    main("continue_adapter")(adapter, tmp_path / "more", dataset=str(tmp_path / "data.jsonl"), **settings)
    first, second = (AutoPeftModelForCausalLM.from_pretrained(path) for path in (adapter, tmp_path / "more"))
    assert not torch.equal(logits(first), logits(second))
    with first.disable_adapter(), second.disable_adapter():
        assert torch.equal(logits(first), logits(second))


@pytest.mark.filterwarnings("ignore:.*tokens are few", "ignore:.*chat template")
def test_rivals_compares_every_method(text, tmp_path):
    model = tiny_model(num_hidden_layers=16, vocab_size=len(WORDS), dtype=torch.float32, eos_token_id=2)
    model.save_pretrained(tmp_path / "deep")
    word_tokenizer().save_pretrained(tmp_path / "deep")
    settings = {"calibration_sequences": 4, "held_out_sequences": 2, "length": 32, "designs": False}
    main("rivals")(str(tmp_path / "deep"), text, text, tmp_path / "result.json", **settings)
    methods = json.loads((tmp_path / "result.json").read_text())["methods"]
    assert set(methods) == {"base", "UniAttn, none", "CLA-Full", "CLA-Half", "LLMDrop-Full", "LLMDrop-Half"}
    assert all(row["cached_generation_equals_uncached"] for row in methods.values())
    # 6 followers of 16 layers store values only, or nothing
    assert methods["UniAttn, none"]["kv_bytes_per_token"] * 32 == methods["base"]["kv_bytes_per_token"] * 26
    assert methods["CLA-Full"]["kv_bytes_per_token"] * 32 == methods["base"]["kv_bytes_per_token"] * 20


@pytest.mark.filterwarnings("ignore:.*tokens are few")
def test_sft_two_stage_ends_in_a_receipt(tmp_path, monkeypatch, capsys):
    inputs = recipe_runs.write_inputs(tmp_path)
    argv = recipe_runs.flags(inputs, tmp_path / "out", stage1_max_steps=1, max_steps=1)
    monkeypatch.setattr(sys, "argv", ["sft_two_stage.py", *argv])
    runpy.run_path(str(EXAMPLES / "sft_two_stage.py"), run_name="__main__")
    assert "held-out loss, after stage 2: " in capsys.readouterr().out
    assert (tmp_path / "out" / "receipt.json").is_file()


def test_long_context_shows_what_the_cache_takes(adapter, text, capsys):
    main("long_context")(adapter, text=text, context=64, new_tokens=3, budget=0.5, chunk=16)
    sizes = [float(size) for size in re.findall(r": ([\d.]+) MiB", capsys.readouterr().out)]
    assert len(sizes) == 3
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("standalone", [False, True])
def test_push_to_hub_uploads_what_loads_again(standalone, adapter, tmp_path, monkeypatch):
    with running_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        main("push_to_hub")(adapter, "lab/small", standalone=standalone, private=True)
    assert hub.private == {"lab/small": True}
    for name, content in hub.files["lab/small"].items():
        (tmp_path / "pulled" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(content)
    load = AutoModelForCausalLM if standalone else AutoPeftModelForCausalLM
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(adapter))
    torch.testing.assert_close(logits(load.from_pretrained(tmp_path / "pulled")), expected)


def test_the_index_lists_every_example():
    listed = set(re.findall(r"\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text()))
    assert listed == {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}


@pytest.mark.filterwarnings("ignore:.*tokens are few", "ignore:.*chat template")
def test_the_program_in_the_readme_runs_as_printed(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(recipe_runs.example(index)) + "\n" for index in range(16)))
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    tokenizer.save_pretrained(checkpoint)
    program = README.read_text().split("```python\n")[1].split("```")[0]
    smaller = {
        '"HuggingFaceTB/SmolLM2-135M-Instruct"': repr(checkpoint),
        '"trl-lib/Capybara", split="train[:2000]"': f'"json", data_files="{tmp_path}/data.jsonl", split="train"',
        "max_steps=100": "max_steps=1, bf16=False, report_to='none'",
    }
    for printed, small in smaller.items():
        assert printed in program
        program = program.replace(printed, small)
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert (tmp_path / "stage1" / "adapter_model.safetensors").is_file()
    assert AutoModelForCausalLM.from_pretrained("stage2").config.model_type == "uniattn_llama"
