"""Base and unified checkpoints under open-loop load: vLLM's own serving benchmark against vLLM's own server."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..serving.server import VLLM, metrics, serve
from .conditions import conditions

WATCHED = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
PERCENTILES = "50,90,99"


@dataclass(frozen=True)
class ServeBenchmark:
    """
    The same load on a base and a unified checkpoint, each with a server of its own, one after the other.

    Attributes:
        base, unified: folders of the checkpoints, with tokenizers.
        request_rates: requests per second, in Poisson arrivals; one run each.
        requests: requests per run.
        input_length, output_length: tokens of every request.
        cache_bytes: memory of the KV cache of either server.
        max_running: requests that a server may run at once (vLLM's `max_num_seqs`); the cache is the limit if this
            is large enough.
        dtype: of weights, computation and cache.
        seed: of prompts and arrivals.
        compiled: let vLLM compile the models, as it does by default; no: `--enforce-eager`.
    """

    base: str
    unified: str
    request_rates: tuple[float, ...]
    requests: int
    input_length: int
    output_length: int
    cache_bytes: int
    max_running: int
    dtype: str
    seed: int
    compiled: bool

    def run(self) -> dict[str, Any]:
        """
        Measure.

        Returns:
            `settings`, `conditions`, and for "base" and "unified" of `checkpoints` the cache's size in tokens and one
            document per request rate: what vLLM's benchmark saved, and under "server" the preemptions and the highest
            values of the gauges that were looked at twice a second.

        Raises:
            RuntimeError: if a server or the benchmark ends early.
        """
        import vllm

        with tempfile.TemporaryDirectory() as scratch:
            checkpoints = {
                name: self._measure(folder, Path(scratch) / name)
                for name, folder in (("base", self.base), ("unified", self.unified))
            }
        circumstances = conditions(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return {
            "settings": asdict(self),
            "conditions": circumstances | {"vllm": vllm.__version__},
            "checkpoints": checkpoints,
        }

    def _measure(self, folder: str, scratch: Path) -> dict[str, Any]:
        scratch.mkdir()
        arguments = ["--dtype", self.dtype, "--kv-cache-memory-bytes", str(self.cache_bytes)]
        arguments += ["--max-num-seqs", str(self.max_running), "--no-enable-prefix-caching"]
        arguments += ["--max-model-len", str(self.input_length + self.output_length)]
        arguments += [] if self.compiled else ["--enforce-eager"]
        environment = os.environ | {"VLLM_LOGGING_LEVEL": "INFO"}  # at which the engine reports its cache
        with serve(folder, arguments, log=scratch / "server.log", environment=environment) as address:
            self._load(address, folder, scratch / "warm-up.json", rate=float("inf"), requests=2)
            runs = [self._run(address, folder, scratch, rate) for rate in self.request_rates]
            log = (scratch / "server.log").read_text()
        return {"cache": cache_report(log), "runs": runs}

    def _run(self, address: str, folder: str, scratch: Path, rate: float) -> dict[str, Any]:
        before = metrics(address)["num_preemptions_total"]
        result, highest = self._load(address, folder, scratch / f"rate-{rate}.json", rate, self.requests)
        preemptions = metrics(address)["num_preemptions_total"] - before
        return {"request_rate": rate, "server": {"preemptions": preemptions, "highest": highest}, **result}

    def _load(
        self, address: str, folder: str, saved: Path, rate: float, requests: int
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Run vLLM's benchmark and watch the server meanwhile."""
        command = [*VLLM, "bench", "serve", "--base-url", address, "--model", "model", "--tokenizer", folder]
        command += ["--dataset-name", "random", "--random-input-len", str(self.input_length)]
        command += ["--random-output-len", str(self.output_length), "--ignore-eos", "--num-prompts", str(requests)]
        command += [
            "--request-rate",
            str(rate),
            "--seed",
            str(self.seed),
            "--percentile-metrics",
            "ttft,tpot,itl,e2el",
        ]
        command += ["--metric-percentiles", PERCENTILES, "--disable-tqdm", "--temperature", "0"]
        command += ["--save-result", "--result-dir", str(saved.parent), "--result-filename", saved.name]
        log = saved.with_suffix(".log")
        highest = dict.fromkeys(WATCHED, 0.0)
        with log.open("w") as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=sink)
        try:
            while process.poll() is None:
                seen = metrics(address)
                highest = {name: max(highest[name], seen[name]) for name in WATCHED}
                time.sleep(0.5)
        finally:
            process.kill()
        if process.returncode != 0 or not saved.exists():
            raise RuntimeError(f"the benchmark ended early:\n{log.read_text()[-2000:]}")
        return json.loads(saved.read_text()), highest


def cache_report(log: str) -> str:
    """The line in which the engine says how many tokens its cache holds."""
    lines = [line.partition("] ")[2] for line in log.splitlines() if "KV cache size" in line]
    return lines[-1] if lines else ""


def rows(result: dict[str, Any]) -> Sequence[tuple[str, ...]]:
    """What of a result a reader compares, as text: one row per checkpoint and request rate."""
    return [
        (
            name,
            f"{run['request_rate']:g}",
            f"{run['completed']}/{run['num_prompts']}",
            f"{run['output_throughput']:.1f}",
            f"{run['median_ttft_ms']:.0f} / {run['p99_ttft_ms']:.0f}",
            f"{run['median_tpot_ms']:.0f} / {run['p99_tpot_ms']:.0f}",
            f"{run['server']['highest']['num_requests_running']:.0f}",
            f"{run['server']['preemptions']:.0f}",
        )
        for name, checkpoint in result["checkpoints"].items()
        for run in checkpoint["runs"]
    ]
