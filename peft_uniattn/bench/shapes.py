"""Models for benchmarks: well-known shapes with random weights, or a checkpoint."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config

from ..named import named_checkpoint

_LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_SMOLLM_2 = {"vocab_size": 49152, "num_key_value_heads": 3, "tie_word_embeddings": True}
_QWEN_25 = {"vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True}

# Configuration class, hidden size, MLP size, layers, query heads, and the rest.
_SHAPES = {
    "tiny": (LlamaConfig, 64, 128, 8, 4, {"vocab_size": 256, "num_key_value_heads": 2}),
    "smollm2-135m": (LlamaConfig, 576, 1536, 30, 9, _SMOLLM_2),
    "qwen2.5-0.5b": (Qwen2Config, 896, 4864, 24, 14, _QWEN_25),
    "qwen2.5-1.5b": (Qwen2Config, 1536, 8960, 28, 12, _QWEN_25),
    "llama-3.2-1b": (LlamaConfig, 2048, 8192, 16, 32, {**_LLAMA_3, "tie_word_embeddings": True}),
    "llama-3.2-3b": (LlamaConfig, 3072, 8192, 28, 24, {**_LLAMA_3, "tie_word_embeddings": True}),
    "llama-3.1-8b": (LlamaConfig, 4096, 14336, 32, 32, _LLAMA_3),
}

SHAPES = tuple(_SHAPES)


def shape_config(name: str) -> PretrainedConfig:
    """
    The configuration of a well-known model, from memory rather than from a hub.

    Raises:
        ValueError: if `name` is not one of `SHAPES`.
    """
    if name not in _SHAPES:
        raise ValueError(f"shape={name!r} is not known; use one of {', '.join(SHAPES)}, or a checkpoint with --model")
    config_class, hidden, intermediate, layers, heads, rest = _SHAPES[name]
    return config_class(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        **rest,
    )


def load_model(
    shape: str, checkpoint: str | None, *, dtype: torch.dtype, device: torch.device, attention: str, seed: int
) -> PreTrainedModel:
    """
    A model to measure: `checkpoint` if given, else random weights of `shape`.

    Args:
        shape: one of `SHAPES`.
        checkpoint: a checkpoint's folder or Hub name, or None.
        dtype: of the weights.
        device: where they live; random ones are made there.
        attention: the attention implementation, such as "sdpa".
        seed: of the random weights.

    Raises:
        ValueError: if there is no such shape or checkpoint.
    """
    options = {"dtype": dtype, "attn_implementation": attention}
    if checkpoint is not None:
        with named_checkpoint("model", checkpoint):
            return AutoModelForCausalLM.from_pretrained(checkpoint, **options).to(device)
    torch.manual_seed(seed)
    with device:
        return AutoModelForCausalLM.from_config(shape_config(shape), **options)
