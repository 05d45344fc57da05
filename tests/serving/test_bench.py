"""`peft-uniattn bench serve` from end to end, on tiny models."""

import json

import pytest

pytest.importorskip("vllm")

from engine import base_model, standalone_model
from typer.testing import CliRunner
from word_tokenizer import word_tokenizer

from peft_uniattn.cli import app


def test_it_measures_both_checkpoints_at_every_rate(tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)  # servers have it as users do
    for name, model in (("base", base_model()), ("unified", standalone_model())):
        model.save_pretrained(tmp_path / name)
        word_tokenizer().save_pretrained(tmp_path / name)
    flags = "--request-rate 20 --requests 4 --input-length 40 --output-length 8 --cache-gib 0.05 --no-compiled"
    folders = [str(tmp_path / "base"), str(tmp_path / "unified")]
    output = tmp_path / "result.json"
    command = ["bench", "serve", *folders, *flags.split(), "--dtype", "float32", "--output", str(output)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    measured = json.loads(output.read_text())
    for checkpoint in measured["checkpoints"].values():
        (run,) = checkpoint["runs"]
        assert run["completed"] == 4
        assert run["total_output_tokens"] == 32
        assert "KV cache size" in checkpoint["cache"]
