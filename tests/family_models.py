"""Tiny random models of every supported architecture."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from peft_uniattn.families import FAMILIES

LAYERS = 6
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "moe_layer_start_index": 0,
    "n_group": 1,
    "topk_group": 1,
}
# What a configuration class needs beyond the sizes above, or instead of them.
SPECIAL = {
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None, "rotary_pct": 0.5},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "num_key_value_heads": None, "head_dim": None},
    "biogpt": {"num_key_value_heads": None, "head_dim": None},
    "persimmon": {"num_key_value_heads": None, "head_dim": None},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "vaultgemma": {"sliding_window": 4, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "gpt_oss": {"sliding_window": 4},
    "cohere2": {"sliding_window": 4},
    "olmo3": {"sliding_window": 4},
    "exaone4": {"sliding_window": 4},
    "mistral": {"sliding_window": 4},
    "ministral": {"sliding_window": 4},
    "llama4_text": {"attention_chunk_size": 4, "intermediate_size_mlp": 48},
    "glm4_moe": {"first_k_dense_replace": 1},
    "dots1": {"first_k_dense_replace": 1, "sliding_window": 4, "n_shared_experts": 1},
    "phi3": {"original_max_position_embeddings": 128},
}


def family_model(model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> PreTrainedModel:
    """A random model of 6 layers in eval mode; normalisation weights are random too, so that ignoring one shows."""
    known = AutoConfig.for_model(model_type)
    settings = {key: value for key, value in {**SIZES, **EXPERTS}.items() if hasattr(known, key) or key in SIZES}
    settings = {**settings, **SPECIAL.get(model_type, {}), **changes}
    config = AutoConfig.for_model(model_type, **{key: value for key, value in settings.items() if value is not None})
    config.eos_token_id = None
    torch.manual_seed(seed)
    # The grouped matrix products of mixtures of experts know no float64.
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


ALL_FAMILIES = sorted(FAMILIES)
