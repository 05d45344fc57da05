"""What `bench serve` does without an engine: refusals, and reading what servers and benchmarks say."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peft_uniattn.bench.serve import ServeBenchmark, cache_report, rows
from peft_uniattn.cli import app
from peft_uniattn.serving import server

DOCS = Path(__file__).parent.parent / "docs"
METRICS = """
# HELP vllm:num_requests_running Number of requests
vllm:num_requests_running{engine="0",model_name="model"} 3.0
vllm:num_requests_running{engine="1",model_name="model"} 2.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
python_gc_objects_total 7.0
"""


def test_metrics_are_summed_over_engines(monkeypatch):
    monkeypatch.setattr(server, "_get", lambda address: METRICS)
    assert server.metrics("http://somewhere") == {"num_requests_running": 5.0, "kv_cache_usage_perc": 0.25}


def test_the_engine_s_own_report_of_its_cache_is_found():
    log = "(EngineCore pid=7) INFO 11-25 12:10:23 [kv_cache_utils.py:2327] CPU KV cache size: 23,296 tokens, Maximum\n"
    assert cache_report("noise\n" + log + "noise") == "CPU KV cache size: 23,296 tokens, Maximum"
    assert cache_report("noise") == ""


def test_rows_are_what_a_reader_compares():
    run = {"request_rate": 0.5, "completed": 4, "num_prompts": 5, "output_throughput": 12.34}
    run |= {"median_ttft_ms": 10.2, "p99_ttft_ms": 20.7, "median_tpot_ms": 1.4, "p99_tpot_ms": 2.6}
    run |= {"server": {"preemptions": 2.0, "highest": {"num_requests_running": 3.0}}}
    result = {"checkpoints": {"base": {"runs": [run]}, "unified": {"runs": []}}}
    assert rows(result) == [("base", "0.5", "4/5", "12.3", "10 / 21", "1 / 3", "3", "2")]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    return str(tmp_path)


def test_without_vllm_it_says_so(folder, monkeypatch):
    monkeypatch.setattr(sys.modules["peft_uniattn.cli.bench.serve"], "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["bench", "serve", folder, folder])
    assert result.exit_code == 1
    assert "vLLM, which is not installed here" in result.output


def test_a_folder_without_a_checkpoint_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["peft_uniattn.cli.bench.serve"], "find_spec", lambda name: True)
    result = CliRunner().invoke(app, ["bench", "serve", folder, str(tmp_path / "nothing")])
    assert result.exit_code == 1
    assert "has no config.json" in result.output


def test_an_output_that_is_a_folder_is_refused_before_a_server_starts(folder, monkeypatch):
    monkeypatch.setattr(sys.modules["peft_uniattn.cli.bench.serve"], "find_spec", lambda name: True)
    monkeypatch.setattr(ServeBenchmark, "run", lambda self: pytest.fail("measured"))
    result = CliRunner().invoke(app, ["bench", "serve", folder, folder, "--output", folder])
    assert result.exit_code == 1
    assert f"output='{folder}' is a folder" in result.output


@pytest.mark.parametrize(("run", "room"), [("", "10.00x"), ("_second", "10.00x"), ("_quiet", "9.00x")])
def test_the_page_s_figures_are_those_of_the_raw_results(run, room):
    result = json.loads((DOCS / "results" / f"bench_serve_smollm2_cpu{run}.json").read_text())
    page = (DOCS / "serving.md").read_text()
    assert all(f"| {' | '.join(row)} |\n" in page for row in rows(result))
    reports = [result["checkpoints"][name]["cache"] for name in ("base", "unified")]
    assert ["8.00x" in reports[0], room in reports[1]] == [True, True]
