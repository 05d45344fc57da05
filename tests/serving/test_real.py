"""On a real model, SmolLM2-135M-Instruct, of whose 30 layers 12 follow."""

import pytest

pytest.importorskip("vllm")

import torch
from engine import assert_equals, engine, generate, sampling
from peft import get_peft_model

from peft_uniattn import UniAttnConfig, to_standalone
from peft_uniattn.quickstart.checkpoint import load_checkpoint
from peft_uniattn.serving.pages import num_tokens

GIB = 2**30
BLOCK = 128
PAGE_BYTES = 2 * 3 * 64 * 4 * BLOCK
PROMPTS = [
    "Paris",
    "The capital of France is",
    "A train leaves at noon and arrives at three o'clock. " * 20 + "How long does the journey take?",
    "List the planets of the solar system in order of their distance from the sun, and describe each of them.",
]


@pytest.fixture(scope="module")
def unified(tmp_path_factory):
    model, tokenizer, _ = load_checkpoint()
    adapted = get_peft_model(model, UniAttnConfig(start_layer=14, task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "uniattn_" in name:
                parameter.normal_(std=0.01)
    standalone, folder = to_standalone(adapted).eval(), tmp_path_factory.mktemp("smollm2")
    standalone.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return standalone, tokenizer, folder


def test_it_generates_what_transformers_generates_in_80_percent_of_the_pages(unified):
    model, tokenizer, folder = unified
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    settings = {"block_size": BLOCK, "kv_cache_memory_bytes": GIB, "max_model_len": 1024}
    with engine(folder, **settings) as llm:
        blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
        outputs = generate(llm, prompts, sampling(150, ignore_eos=True))
    assert blocks * BLOCK == num_tokens(GIB, PAGE_BYTES, BLOCK, 24) == 29_056
    assert_equals(outputs, model)
