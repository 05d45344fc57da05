"""A server for tests, and the body of requests to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine import CACHE_BYTES

from peft_uniattn.serving.server import metrics, serve


@contextmanager
def tiny_server(folder: Path, *arguments: str) -> Iterator[str]:
    """The address of a server of the checkpoint in `folder`."""
    # A server's engine has a process of its own, unlike that of the other tests.
    environment = {key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    settings = ("--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(CACHE_BYTES), *arguments)
    with serve(folder, settings, log=folder / "server.log", environment=environment, patience=300) as address:
        yield address


def completion(prompt: list[int], max_tokens: int, **settings) -> dict:
    """The body of a greedy request for token ids."""
    body = {"model": "model", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return body | {"return_token_ids": True} | settings


def gauge(address: str, name: str) -> float:
    """One of the server's metrics, which it must have."""
    return metrics(address)[name]
