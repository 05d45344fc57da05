"""A real vLLM engine in this process, tiny standalone checkpoints for it, and the transformers models to equal."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# Before vLLM is imported: the engine runs where the test can see into it, and phones nobody.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
)

import torch
from conftest import loud
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from word_tokenizer import WORDS

from peft_uniattn import UniAttnConfig, to_standalone

PAGE = 32  # tokens, the least that CPU_ATTN takes
CACHE_BYTES = 2**27
VOCABULARY = len(WORDS)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# Followers 1, 3, 4 and 6: both pairs that share a page have two leaders.
BLOCKS = [[0, 1], [2, 3, 4], [5, 6]]
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mistral with a window": {"sliding_window": 40},
    "qwen2": {"head_dim": None, "hidden_size": 128},
    "qwen3": {},
    "gemma2": {
        "sliding_window": 40,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 2.0,
        "uniattn": {"superblocks": [[1, 2, 3], [5, 6]], "follower_mask": "leader"},
    },
}


def base_model(family: str = "llama", **changes) -> PreTrainedModel:
    """A random model of `FAMILIES` in float32, its weights large enough to matter."""
    sizes = SIZES | {key: value for key, value in FAMILIES[family].items() if key != "uniattn"} | changes
    if sizes["head_dim"] is None:  # derived
        del sizes["head_dim"]
    config = AutoConfig.for_model(family.partition(" ")[0], **sizes)
    return loud(AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")).eval()


def standalone_model(family: str = "llama", *, changes: dict | None = None, **uniattn) -> PreTrainedModel:
    """The standalone model of a random adapter on `base_model(family, **changes)`."""
    settings = {"superblocks": BLOCKS, "init_weights": False, "task_type": "CAUSAL_LM"}
    settings |= FAMILIES[family].get("uniattn", {}) | uniattn
    torch.manual_seed(1)
    return to_standalone(get_peft_model(base_model(family, **(changes or {})), UniAttnConfig(**settings)).eval())


@contextmanager
def engine(folder: Path | str, **settings) -> Iterator[LLM]:
    """The engine on the checkpoint in `folder`, gone afterwards."""
    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": PAGE,
        "kv_cache_memory_bytes": CACHE_BYTES,
        "max_model_len": SIZES["max_position_embeddings"],
        "max_num_seqs": 16,
        "skip_tokenizer_init": True,
        "distributed_executor_backend": "uni",
        "disable_log_stats": False,
        "max_logprobs": 20,
    }
    llm = LLM(str(folder), **defaults | settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def token_ids(*lengths: int, seed: int = 2) -> list[list[int]]:
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def sampling(max_tokens: int = 8, **settings) -> SamplingParams:
    """Greedy, with the 20 best log-probabilities of every step."""
    return SamplingParams(
        **{"temperature": 0.0, "max_tokens": max_tokens, "logprobs": 20, "detokenize": False} | settings
    )


def generate(llm: LLM, prompts: Sequence[list[int]], parameters: SamplingParams):
    """The engine's outputs, all prompts handed over at once."""
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)


def log_probabilities(model: PreTrainedModel, prompt: Sequence[int], continuation: Sequence[int]) -> torch.Tensor:
    """What transformers gives every token of the vocabulary before each of `continuation`, without a cache."""
    ids = torch.tensor([[*prompt, *continuation]])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


def assert_equals(outputs, model: PreTrainedModel, *, greedy: bool = True, tolerance: float = 1e-3) -> None:
    """Every output has transformers' tokens and its 20 best log-probabilities."""
    for output in outputs:
        for completion in output.outputs:
            expected = log_probabilities(model, output.prompt_token_ids, completion.token_ids)
            if greedy:
                assert list(completion.token_ids) == expected.argmax(-1).tolist()
            for got, row in zip(completion.logprobs, expected, strict=True):
                best = dict(sorted(got.items(), key=lambda item: -item[1].logprob)[:20])
                values = torch.tensor([entry.logprob for entry in best.values()], dtype=torch.float64)
                torch.testing.assert_close(values, row.topk(20).values, rtol=0, atol=tolerance)
                torch.testing.assert_close(values, row[list(best)], rtol=0, atol=tolerance)
