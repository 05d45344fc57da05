"""Weights sharded over two workers generate what transformers generates."""

import pytest

pytest.importorskip("vllm")

from engine import assert_equals, engine, generate, sampling, standalone_model, token_ids


@pytest.fixture(autouse=True)
def _two_workers_on_any_cores(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


# A full compensation; biases and a low-rank one; windows, a softcap and one block table for both.
@pytest.mark.parametrize(("family", "uniattn"), [("llama", {}), ("qwen2", {"r": 4}), ("gemma2", {})], ids=str)
def test_two_workers_generate_what_transformers_generates(family, uniattn, tmp_path):
    model = standalone_model(family, **uniattn)
    model.save_pretrained(tmp_path)
    workers = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine(tmp_path, num_gpu_blocks_override=64, **workers) as llm:
        assert_equals(generate(llm, token_ids(3, 40, 110), sampling(40)), model)
