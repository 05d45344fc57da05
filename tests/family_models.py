"""Tiny random models of every supported architecture, and the ways in which their layers can share softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from conftest import loud
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from peft_uniattn import UniAttnConfig
from peft_uniattn.families import FAMILIES

# Layer 0 is ordinary, 1 and 4 lead.
BLOCKS = [[1, 2, 3], [4, 5]]
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
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
# As many key/value heads as query heads, and no setting for them.
MHA = {"num_key_value_heads": None, "head_dim": None}
SLIDING = {"sliding_window": 4}
SOFTCAP = {**SLIDING, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}
# What a configuration class needs beyond the sizes above, or instead of them.
SPECIAL = {
    "gpt_neox": {**MHA, "rotary_pct": 0.5},
    "opt": {**MHA, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "biogpt": MHA,
    "persimmon": MHA,
    "modernbert-decoder": {**MHA, "local_attention": 8},
    "gemma2": SOFTCAP,
    "vaultgemma": SOFTCAP,
    "gemma3_text": {**SLIDING, "query_pre_attn_scalar": 8},
    **dict.fromkeys(("cohere2_moe", "cwm", "exaone_moe", "flint", "kolibri1"), SLIDING),
    **dict.fromkeys(("granite_swa", "granitemoe_swa"), SLIDING),
    **dict.fromkeys(("gpt_oss", "cohere2", "olmo3", "exaone4", "mistral", "ministral", "starcoder2", "phi3"), SLIDING),
    "qwen2": {**SLIDING, "use_sliding_window": True},
    "qwen3": {**SLIDING, "use_sliding_window": True},
    "olmo": {"clip_qkv": 0.5},
    "olmoe": {"clip_qkv": 0.5},
    "qwen2_moe": {"use_sliding_window": False},
    "llama4_text": {"attention_chunk_size": 4, "intermediate_size_mlp": 48},
    "glm4_moe": {"first_k_dense_replace": 1},
    "dots1": {"first_k_dense_replace": 1, "sliding_window": 4, "n_shared_experts": 1},
}
SPECIAL["phi3"] = {**SLIDING, "original_max_position_embeddings": 128}
# The narrower of the two masks that the layers of a family may have, one kind of layer next to the other.
MIXED = {
    **dict.fromkeys(("gemma2", "gemma3_text", "vaultgemma", "gpt_oss", "cohere2", "olmo3", "exaone4"), "sliding"),
    **dict.fromkeys(("qwen2", "qwen3", "dots1", "ministral"), "sliding"),
    **dict.fromkeys(("cohere2_moe", "cwm", "exaone_moe", "flint", "kolibri1"), "sliding"),
    **dict.fromkeys(("granite_swa", "granitemoe_swa", "modernbert-decoder"), "sliding"),
    "llama4_text": "chunked",
}
# transformers has no sdpa for softcapping and attention sinks.
EAGER_ONLY = ("gemma2", "vaultgemma", "gpt_oss", "flint", "granite_swa", "granitemoe_swa")

# What these return as attention weights is not all that V is multiplied by: sinks scale the outputs.
SINKS_APART = ("granite_swa", "granitemoe_swa")


@dataclass(frozen=True)
class Case:
    """A family, and whose mask its followers have where its layers mix masks."""

    family: str
    follower_mask: str = "own"

    def __str__(self) -> str:
        return f"{self.family}-{self.follower_mask}_mask" if self.family in MIXED else self.family

    @property
    def back_ends(self) -> tuple[str, ...]:
        return ("eager",) if self.family in EAGER_ONLY else ("eager", "sdpa")

    @property
    def masks(self) -> dict[str, list[str]]:
        """The setting for the kind of mask of every layer: leaders see everything and followers do not, or equal."""
        if self.family not in MIXED:
            return {}
        narrow, full = f"{MIXED[self.family]}_attention", "full_attention"
        own, leader = [full, narrow, narrow, narrow, full, full], [narrow, full, narrow, narrow, full, narrow]
        return {"layer_types": own if self.follower_mask == "own" else leader}

    def base(self, back_end: str | None = None) -> PreTrainedModel:
        """A loud random model whose layers the Superblocks of `BLOCKS` suit."""
        return loud(family_model(self.family, back_end=back_end or self.back_ends[-1], **self.masks))

    def adapter(self, back_end: str | None = None) -> PeftModel:
        """The same model with followers, all of whose compensations are random."""
        return self.adapt(self.base(back_end))

    def adapt(self, base: PreTrainedModel) -> PeftModel:
        config = {"superblocks": BLOCKS, "follower_mask": self.follower_mask, "init_weights": False}
        torch.manual_seed(1)
        model = get_peft_model(base, UniAttnConfig(task_type="CAUSAL_LM", **config)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "uniattn_" in name:
                    parameter.normal_(std=0.25)
        return model


def family_model(model_type: str, *, back_end: str = "eager", dtype=torch.float64, **changes) -> PreTrainedModel:
    """A random model of 6 layers in eval mode."""
    known = AutoConfig.for_model(model_type)
    settings = {key: value for key, value in {**SIZES, **EXPERTS}.items() if hasattr(known, key) or key in SIZES}
    settings = {**settings, **SPECIAL.get(model_type, {}), **changes}
    config = AutoConfig.for_model(model_type, **{key: value for key, value in settings.items() if value is not None})
    config.eos_token_id = None
    for name in vars(config):
        if "drop" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    # The grouped matrix products of mixtures of experts know no float64.
    options = {"attn_implementation": back_end, "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_config(config, **options).to(dtype).eval()


# An older transformers may lack some.
ALL_FAMILIES = sorted(FAMILIES.keys() & MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys())
CASES = [
    Case(family, mask) for family in ALL_FAMILIES for mask in (("own", "leader") if family in MIXED else ("own",))
]
