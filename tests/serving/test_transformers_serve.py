"""`transformers serve` on a standalone checkpoint."""

import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("vllm")  # of this environment, as are fastapi and uvicorn

import httpx
import torch
from engine import standalone_model
from word_tokenizer import word_tokenizer

CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.fixture
def folder(tmp_path):
    standalone_model().save_pretrained(tmp_path)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_it_answers_as_generate_does(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "peft_uniattn.serving.transformers_command", "serve", "--device", "cpu"]
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        answer = ask(port, process, str(folder), "w1 w2 w3")
    finally:
        process.terminate()
        process.wait(60)
    tokenizer = word_tokenizer()
    ids = tokenizer("w1 w2 w3", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = standalone_model().generate(ids, max_new_tokens=8, do_sample=False)[0, 3:]
    assert answer == tokenizer.decode(expected, skip_special_tokens=True)


def ask(port: int, process: subprocess.Popen, model: str, text: str) -> str:
    """The answer to one message, as soon as the server is up."""
    body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8}
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            response = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=120)
        except httpx.ConnectError:
            time.sleep(0.5)
            continue
        return response.raise_for_status().json()["choices"][0]["message"]["content"]
    raise AssertionError("no server")
