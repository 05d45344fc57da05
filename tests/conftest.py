"""Fixtures that more than one test file needs: tiny random models, prompts and aligned copies."""

from __future__ import annotations

import os
import re
from functools import reduce

# Before transformers is imported: nothing here may reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from oracle import Float64Throughout
from peft import get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.integrations.peft import MIN_PEFT_VERSION, check_peft_version

from peft_uniattn import UniAttnConfig

torch.set_num_threads(1)


def _takes_adapters() -> bool:
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError:
        return False
    return True


transformers_adapters = pytest.mark.skipif(
    not _takes_adapters(), reason="this transformers refuses the installed PEFT in add_adapter() and load_adapter()"
)

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


def tiny_model(family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float64, **changes):
    """A random model of 6 layers, 4 query heads and 2 key/value heads, in eval mode."""
    settings = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "attn_implementation": "sdpa",
        **changes,
    }
    config_class, model_class = CLASSES[family]
    torch.manual_seed(seed)
    return model_class(config_class(**settings)).to(dtype).eval()


def tiny_adapter(model=None, *, seed: int = 1, **config):
    """`model` (default: a tiny Llama) with a random, nonzero compensation; Superblocks [0-2] and [3-5] by default."""
    settings = {"superblock_size": 3, "start_layer": 0, "init_weights": False, "task_type": "CAUSAL_LM", **config}
    model = tiny_model() if model is None else model
    torch.manual_seed(seed)
    return get_peft_model(model, UniAttnConfig(**settings)).eval()


def prompt(batch: int = 2, length: int = 9, *, seed: int = 2, vocab_size: int = 97) -> torch.Tensor:
    """Random token ids (batch, length), none of them the padding token 0."""
    return torch.randint(2, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def aligned(model):
    """
    The same model with freshly allocated weights.

    Tensors loaded from a file are not aligned in memory as freshly made ones are, and BLAS may then round differently
    in the last bit. Bit-equality of two models can only be tested on weights that are aligned alike.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model


def loud(model, *, seed: int = 3):
    """The same model with random weights large enough to matter: sharp attention, biases, norms that are not 1."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.25)
    return model


def specification(model, superblocks) -> dict:
    """
    What the oracle needs to know of an adapted or standalone `model`: weights, config, superblocks, compensation.

    The tensors are the model's own parameters, so gradients can be taken of both with respect to the same ones.
    """
    weights, factors = {}, {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if match := re.search(r"layers\.(\d+)\.self_attn\.(uniattn_|compensation)", name):
            factors.setdefault(int(match[1]), []).append(parameter.T)
        else:
            weights[name] = parameter
    compensation = {layer: reduce(torch.matmul, parts) for layer, parts in factors.items()}
    return {"weights": weights, "config": model.config, "superblocks": superblocks, "compensation": compensation}


def close(actual, expected) -> None:
    """Tensors, or collections of tensors, are equal up to rounding in float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.fixture
def float64():
    """transformers in float64 throughout, as the oracle is; models have to be made inside too."""
    with Float64Throughout():
        yield


def weights(model) -> dict[str, torch.Tensor]:
    """Copies of all weights and saved buffers by name, to compare with later ones."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names whose tensors are not bit-equal, or that only one side has."""
    both = before.keys() & after.keys()
    return (before.keys() ^ after.keys()) | {name for name in both if not torch.equal(before[name], after[name])}


def logits(model, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of `ids` (default: the prompt), computed without autograd."""
    with torch.no_grad():
        return model(prompt() if ids is None else ids).logits


def moved(model, *, seed: int = 7):
    """The same model with other values in everything that is trainable, as after training."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return prompt()


@pytest.fixture
def fresh_dynamo():
    """torch.compile without what other tests have left in it, and its counters at zero."""
    from torch._dynamo.utils import counters  # takes a while, and few tests compile

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
