"""A server under clients that vanish, talk nonsense and are killed: pages come back, and others' tokens stay right."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("vllm")

import httpx
from engine import PAGE, VOCABULARY, log_probabilities, standalone_model, token_ids
from server import completion, gauge, tiny_server
from word_tokenizer import word_tokenizer

LENGTH = 192  # tokens of the longest request
BLOCKS = 40  # so few that concurrent requests wait or are preempted
ENDLESS = completion([5, 6, 7], LENGTH - 8, stream=True)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    model, folder = standalone_model(), tmp_path_factory.mktemp("served")
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    settings = ("--block-size", str(PAGE), "--num-gpu-blocks-override", str(BLOCKS))
    with tiny_server(folder, *settings, "--max-model-len", str(LENGTH)) as address:
        yield model, address


def assert_right(model, prompt: list[int], response: httpx.Response) -> None:
    tokens = response.raise_for_status().json()["choices"][0]["token_ids"]
    assert tokens == log_probabilities(model, prompt, tokens).argmax(-1).tolist()


def assert_all_pages_return(address: str, *, seconds: float = 20) -> None:
    """Nothing runs or waits, and, as of a further request, no page is in use."""
    deadline = time.monotonic() + seconds
    while gauge(address, "num_requests_running") + gauge(address, "num_requests_waiting") > 0:
        assert time.monotonic() < deadline, "requests of clients that are gone still run"
        time.sleep(0.2)
    httpx.post(f"{address}/v1/completions", json=completion([3], 1), timeout=60).raise_for_status()
    while gauge(address, "kv_cache_usage_perc") > 0:
        assert time.monotonic() < deadline, "pages are lost"
        time.sleep(0.2)


async def well_behaved(client: httpx.AsyncClient, model, prompt: list[int], tokens: int) -> None:
    assert_right(model, prompt, await client.post("/v1/completions", json=completion(prompt, tokens)))


async def vanishing(client: httpx.AsyncClient, chunks: int) -> None:
    """Hangs up after some chunks of a stream."""
    async with client.stream("POST", "/v1/completions", json=ENDLESS) as response:
        received = 0
        async for _ in response.aiter_lines():
            received += 1
            if received > chunks:
                return
    raise AssertionError("the stream ended before the client hung up")


def run_all(address: str, *tasks) -> None:
    """Run coroutine functions of one client side by side."""

    async def side_by_side() -> None:
        async with httpx.AsyncClient(base_url=address, timeout=300) as client:
            await asyncio.gather(*(task(client) for task in tasks))

    asyncio.run(side_by_side())


def test_cancelled_requests_leave_nothing_behind(served):
    model, address = served
    prompts = token_ids(*range(20, 100, 10), seed=6)
    run_all(
        address,
        *(lambda client, ids=ids: well_behaved(client, model, ids, 80) for ids in prompts),
        *(lambda client, chunks=chunks: vanishing(client, chunks) for chunks in (1, 2, 5, 20, 40, 60)),
    )
    assert_all_pages_return(address)


MALFORMED = [
    (b"", 400),
    (b"{", 400),
    (b"[1, 2]", 400),
    (b"\xff\xfe\x00", 400),
    (json.dumps(completion([5, VOCABULARY + 1000], 4)).encode(), 400),
    (json.dumps(completion([5], -1)).encode(), 400),
    (json.dumps(completion([5] * (LENGTH + 1), 4)).encode(), 400),
    (json.dumps(completion([], 4)).encode(), 400),
    (json.dumps(completion([5], 4, temperature="hot")).encode(), 400),
    (json.dumps(completion([5], 4, model="other")).encode(), 404),
]


def test_malformed_bodies_are_refused_beside_good_ones(served):
    model, address = served
    statuses = []

    async def malformed(client: httpx.AsyncClient, body: bytes, expected: int) -> None:
        headers = {"Content-Type": "application/json"}
        response = await client.post("/v1/completions", content=body, headers=headers)
        statuses.append((response.status_code, expected))

    run_all(
        address,
        *(lambda client, ids=ids: well_behaved(client, model, ids, 60) for ids in token_ids(10, 60, seed=7)),
        *(lambda client, body=body, status=status: malformed(client, body, status) for body, status in MALFORMED),
    )
    assert len(statuses) == len(MALFORMED)
    assert all(got == expected for got, expected in statuses), statuses
    assert_all_pages_return(address)


def test_half_a_request_and_noise_on_the_socket_harm_nobody(served):
    model, address = served
    host, port = address.removeprefix("http://").split(":")
    for noise in (b"\x00" * 100, b"POST /v1/completions HTTP/1.1\r\nContent-Length: 500\r\n\r\n{"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(noise)
    (prompt,) = token_ids(40, seed=8)
    run_all(address, lambda client: well_behaved(client, model, prompt, 40))
    assert_all_pages_return(address)


CLIENT = """
import sys, httpx
with httpx.stream("POST", sys.argv[1] + "/v1/completions", content=sys.argv[2], timeout=300,
                  headers={"Content-Type": "application/json"}) as response:
    for number, _ in enumerate(response.iter_lines()):
        if number == 3:
            print("streaming", flush=True)
"""


def test_a_killed_client_leaves_nothing_behind(served):
    model, address = served
    command = [sys.executable, "-c", CLIENT, address, json.dumps(ENDLESS)]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert client.stdout.readline() == "streaming\n"
    client.send_signal(signal.SIGKILL)
    client.wait()
    prompts = token_ids(30, 90, seed=9)
    run_all(address, *(lambda c, ids=ids: well_behaved(c, model, ids, 60) for ids in prompts))
    assert_all_pages_return(address)


def test_all_blocks_can_be_used_after_all_that(served):
    model, address = served
    run_all(address, *(lambda client: vanishing(client, 3),) * 4)
    assert_all_pages_return(address)
    before = gauge(address, "num_preemptions_total")
    # One block is the engine's own; the rest is filled to the last token: 6 requests of 6 blocks and one of 3.
    prompts, tokens = token_ids(*[LENGTH - 100] * 6, 3 * PAGE - 40, seed=10), [100] * 6 + [40]
    run_all(
        address,
        *(
            lambda client, ids=ids, count=count: well_behaved(client, model, ids, count)
            for ids, count in zip(prompts, tokens, strict=True)
        ),
    )
    assert gauge(address, "num_preemptions_total") == before
    assert_all_pages_return(address)
