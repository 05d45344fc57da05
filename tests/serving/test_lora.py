"""LoRA on a unified base, through vLLM's own LoRA support."""

import pytest

pytest.importorskip("vllm")

import copy

import torch
from engine import assert_equals, engine, sampling, standalone_model, token_ids
from peft import LoraConfig, get_peft_model
from vllm.lora.request import LoRARequest

EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "compensation"]


def test_requests_with_and_without_lora_stand_side_by_side(tmp_path):
    model = standalone_model()
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(2)
    config = LoraConfig(r=8, target_modules=EVERYWHERE, init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    adapted.save_pretrained(tmp_path / "lora")
    prompts = [{"prompt_token_ids": ids} for ids in token_ids(5, 40, 70, 5, 40, 70)]
    requests = [LoRARequest("adapter", 1, str(tmp_path / "lora"))] * 3 + [None] * 3
    # On a CPU, vLLM 0.32 gives requests without LoRA the last slot's, for stock models too, so one slot stays empty.
    settings = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    with engine(tmp_path / "base", num_gpu_blocks_override=64, **settings) as llm:
        outputs = llm.generate(prompts, sampling(40), lora_request=requests, use_tqdm=False)
    assert_equals(outputs[:3], adapted)
    assert_equals(outputs[3:], model)
