"""vLLM's server as a child process on loopback, and what it says about itself."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

VLLM = (sys.executable, "-m", "peft_uniattn.serving.vllm_command")
HOST = "127.0.0.1"


@contextmanager
def serve(
    folder: str | Path,
    arguments: Sequence[str],
    *,
    log: Path,
    environment: dict[str, str] | None = None,
    patience: float = 600,
) -> Iterator[str]:
    """
    Run a server of the checkpoint in `folder` while the context lasts, and give its address.

    Args:
        folder: the checkpoint; its served name is "model".
        arguments: further arguments of `vllm serve`.
        log: the file that gets what the server prints.
        environment: the server's environment; default: this process's.
        patience: seconds that the server may take to start.

    Raises:
        RuntimeError: if the server ends or is not ready in time.
    """
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    command = [*VLLM, "serve", str(folder), "--served-model-name", "model", "--host", HOST, "--port", str(port)]
    with log.open("w") as sink:
        process = subprocess.Popen([*command, *arguments], stdout=sink, stderr=sink, env=environment)
    try:
        address = f"http://{HOST}:{port}"
        _wait_until_ready(address, process, log, patience)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(address: str, process: subprocess.Popen, log: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended; the end of {log}:\n{log.read_text()[-2000:]}")
        try:
            _get(f"{address}/health")
            return
        except urllib.error.URLError:
            time.sleep(0.5)
    raise RuntimeError(f"the server was not ready after {patience} s; the end of {log}:\n{log.read_text()[-2000:]}")


def _get(address: str) -> str:
    with urllib.request.urlopen(address, timeout=30) as response:
        return response.read().decode()


def metrics(address: str) -> dict[str, float]:
    """The server's counters and gauges by name (without "vllm:"), summed over their labels."""
    found: dict[str, float] = {}
    for name, value in re.findall(r"^vllm:(\w+)(?:\{.*\})? (\S+)$", _get(f"{address}/metrics"), flags=re.MULTILINE):
        found[name] = found.get(name, 0.0) + float(value)
    return found
