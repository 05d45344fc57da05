"""Per architecture: where the parts of attention live that softmax sharing touches, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

BACK_ENDS = ("eager", "sdpa", "flex_attention", "flash_attention_2")

# What an attention module needs for its queries and keys only; a follower has no use for it.
_KEY_NORMS = ("k_norm", "k_layernorm", "key_layernorm")
_QUERY_AND_KEY = (
    *("q_proj", "k_proj"),
    *("q_norm", "q_layernorm", "query_layernorm", *_KEY_NORMS, "qk_norm"),
)


@dataclass(frozen=True)
class Family:
    """
    A decoder architecture whose attention can follow.

    Attributes:
        layers: name of the list of decoder layers inside the backbone.
        attention: name of the attention module inside a decoder layer.
        value: name of the value projection inside the attention module, or of the projection it is fused into.
        key: likewise of the key projection, where it is one of its own.
        output: name of the output projection inside the attention module.
        fused: how the rows of V lie in a fused projection: "blocks" (all of Q, all of K, all of V) or "heads" (Q, K
            and V of each head in turn); None where `value` is a projection of its own.
    """

    layers: str = "layers"
    attention: str = "self_attn"
    value: str = "v_proj"
    key: str = "k_proj"
    output: str = "o_proj"
    fused: str | None = None

    def head_dim(self, attention: nn.Module) -> int:
        return getattr(attention, "head_dim", None) or attention.head_size

    def value_rows(self, attention: nn.Module) -> slice | torch.Tensor:
        """Which output rows of the `value` projection are V."""
        if self.fused is None:
            return slice(None)
        projection, head_dim = getattr(attention, self.value), self.head_dim(attention)
        width = projection.out_features
        if self.fused == "blocks":
            return slice(width - attention.num_key_value_heads * head_dim, width)
        # On the weight's device: this runs in every forward, and indices from elsewhere would be copied each time.
        return torch.arange(width, device=projection.weight.device).view(-1, 3, head_dim)[:, 2].flatten()

    def value_width(self, attention: nn.Module) -> int:
        """How many coordinates the value states of a token have, all heads together."""
        projection = getattr(attention, self.value)
        if self.fused == "blocks":
            return attention.num_key_value_heads * self.head_dim(attention)
        return projection.out_features if self.fused is None else projection.out_features // 3

    def query_rows(self, attention: nn.Module) -> torch.Tensor:
        """Which output rows of a fused projection are Q."""
        projection, head_dim = getattr(attention, self.value), self.head_dim(attention)
        rows = torch.arange(projection.out_features, device=projection.weight.device)
        if self.fused == "blocks":
            return rows[: getattr(attention, self.output).in_features]
        return rows.view(-1, 3, head_dim)[:, 0].flatten()

    def value_states(self, attention: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        """V of shape (batch, key/value heads, length, head_dim) from hidden states (batch, length, hidden size)."""
        projection = getattr(attention, self.value)
        if self.fused is None:
            value = projection(hidden_states)
        else:
            rows = self.value_rows(attention)
            is_whole = not hasattr(projection.weight, "placements")  # as opposed to a rank's share of it
            if projection.weight.is_floating_point() and is_whole:
                bias = None if projection.bias is None else projection.bias[rows]
                value = nn.functional.linear(hidden_states, projection.weight[rows], bias)
            else:  # quantized or distributed weights cannot be sliced
                value = projection(hidden_states)[..., rows]
        if (limit := vars(attention.config).get("clip_qkv")) is not None:  # a failing getattr of a config is slow
            value = value.clamp(-limit, limit)
        return value.view(*value.shape[:-1], -1, self.head_dim(attention)).transpose(1, 2)

    def project_output(self, attention: nn.Module, heads: torch.Tensor) -> torch.Tensor:
        """W_o on the heads' outputs (batch, length, query heads, head_dim): (batch, length, hidden size)."""
        output = getattr(attention, self.output)(heads.flatten(2))
        if not attention.training:
            return output
        dropout = getattr(getattr(attention, "out_drop", None), "p", getattr(attention, "residual_dropout", 0.0))
        return nn.functional.dropout(output, dropout)

    def output_matrix(self, attention: nn.Module) -> torch.Tensor:
        """W_o of shape (coordinates of all heads, hidden size), as in heads · W_o, in float64."""
        projection = getattr(attention, self.output)
        if projection.weight.is_floating_point():
            return projection.weight.T.double()
        # Quantized weights show themselves only by what they do.
        identity = torch.eye(projection.in_features, device=projection.weight.device)
        return (projection(identity) - projection(torch.zeros_like(identity[:1]))).double()

    def separate(self) -> Family:
        """The same family once a follower's V has a projection of its own, `v_proj`."""
        return self if self.fused is None else replace(self, value="v_proj", fused=None)

    def unused_by_borrower(self, attention: nn.Module) -> tuple[str, ...]:
        """The submodules of `attention` that a follower has no use for if it takes keys and values from its leader."""
        projections = (self.key, self.value) if self.fused is None else (self.value,)
        return (*projections, *self.key_norms(attention))

    def key_norms(self, attention: nn.Module) -> tuple[str, ...]:
        """The submodules of `attention` that only its keys pass."""
        return tuple(name for name in _KEY_NORMS if isinstance(getattr(attention, name, None), nn.Module))

    def unused(self, attention: nn.Module) -> tuple[str, ...]:
        """The submodules of `attention` that a follower has no use for."""
        names = _QUERY_AND_KEY if self.fused is None else (*_QUERY_AND_KEY, self.value)
        return tuple(name for name in names if isinstance(getattr(attention, name, None), nn.Module))


_SEPARATE = Family()
_FUSED_BLOCKS = Family(value="qkv_proj", fused="blocks")

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "ministral", "ministral3", "mixtral", "arcee", "apertus", "smollm3", "nanochat"),
            *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "dots1", "jais2"),
            *("gemma", "gemma2", "gemma3_text", "vaultgemma", "gpt_oss", "llama4_text"),
            *("olmo", "olmo2", "olmo3", "olmoe", "flex_olmo", "cohere", "cohere2", "phimoe", "helium"),
            *("granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared", "starcoder2"),
            *("glm", "glm4", "glm4_moe", "exaone4"),
            *("hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "ernie4_5", "ernie4_5_moe", "cohere2_moe", "cwm"),
            *("exaone_moe", "flint", "hyperclovax", "kolibri1", "mellum", "minimax_m2"),
            *("solar_open", "aria_text", "apertus1p5_text"),
            # These run as other architectures' classes.
            *("internlm3", "iquestcoder", "exaone", "sarvam_moe"),
        ),
        _SEPARATE,
    ),
    "phi": Family(output="dense"),
    "phi3": _FUSED_BLOCKS,
    "modernbert-decoder": Family(attention="attn", output="Wo"),
    "opt": Family(output="out_proj"),
    "biogpt": Family(output="out_proj"),
    "gpt_neox": Family(attention="attention", value="query_key_value", output="dense", fused="heads"),
    "persimmon": Family(value="query_key_value", output="dense", fused="heads"),
}

_MLA = "it keeps compressed latents instead of keys and values (multi-head latent attention)"
_HYBRID = "some of its layers are recurrent, convolutions or linear attention, which have no softmax to share"
_SHARES = "its layers already share keys and values"
_INDEX = (
    "every layer chooses by an index of its own which keys a query sees, so a leader's softmax is not a follower's"
)
_DROPS = "its decoder layers drop the keyword arguments by which a leader reaches its followers"
_OLD = "its attention does not go through transformers' attention interface"
_OTHER_VALUE = "its attention treats inputs, values or outputs in a way of its own"
_LOOPS = "it runs its layers several times in one forward pass, so a layer has no one leader"
_ENCODER = "it is an encoder with a causal mask; its layers are not laid out as a decoder's"
_HALF = "it is the decoder of an encoder-decoder, with attention across to an encoder"
_PARTS = "text is one of several things that it reads or writes, with layers for pictures, sounds or bytes beside"

REFUSED: dict[str, str] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "minicpm3", "longcat_flash", "glm_moe_dsa"), _MLA),
    **dict.fromkeys(("glm4_moe_lite", "axk1", "axk2", "youtu", "sarvam_mla", "hy_v4", "dots3_note_text"), _MLA),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "jamba", "bamba", "zamba", "zamba2", "falcon_h1", "lfm2"), _HYBRID),
    **dict.fromkeys(("mamba", "mamba2", "rwkv", "recurrent_gemma", "granitemoehybrid", "minimax"), _HYBRID),
    **dict.fromkeys(("nemotron_h", "falcon_mamba", "olmo_hybrid", "kimi_linear", "qwen3_5_moe_text"), _HYBRID),
    **dict.fromkeys(("xlstm", "bailing_hybrid", "lara_mini", "lfm2_moe", "lfm3", "qwen4_exp_text"), _HYBRID),
    **dict.fromkeys(("gemma3n_text", "gemma4_text", "gemma4_unified_text"), _SHARES),
    **dict.fromkeys(("minimax_m3_vl_text",), _INDEX),
    **dict.fromkeys(("stablelm", "nemotron"), _DROPS),
    **dict.fromkeys(("gptj", "gpt_neo", "bloom", "falcon", "mpt", "codegen", "xglm", "gpt_neox_japanese"), _OLD),
    **dict.fromkeys(("cpmant", "openai-gpt"), _OLD),
    **dict.fromkeys(("diffllama", "doge", "bitnet", "afmoe", "laguna", "gpt2", "gpt_bigcode"), _OTHER_VALUE),
    **dict.fromkeys(("beam", "dbrx", "jetmoe", "mimo_v2_flash", "inkling_text", "inkling2_text"), _OTHER_VALUE),
    **dict.fromkeys(("ctrl", "deepseek_v4", "zaya"), _OTHER_VALUE),
    **dict.fromkeys(("dory", "hrm_text", "inkling2_loop_text"), _LOOPS),
    **dict.fromkeys(("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra"), _ENCODER),
    **dict.fromkeys(("ernie", "megatron-bert", "rembert", "roberta"), _ENCODER),
    **dict.fromkeys(
        ("roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl"), _ENCODER
    ),
    **dict.fromkeys(("xlnet", "xmod", "reformer"), _ENCODER),
    **dict.fromkeys(("trocr", "musicgen_decoder", "musicgen_melody_decoder", "mllama_text_model"), _HALF),
    **dict.fromkeys(("blt", "cohere_compass_text", "emu3_text_model", "git", "moshi", "phi4_multimodal"), _PARTS),
}


def find_family(config) -> Family:
    """
    The family of a (text) configuration.

    Raises:
        ValueError: if softmax sharing does not support the architecture; says why where that is known.
    """
    model_type = getattr(config, "model_type", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model_type={model_type!r} is an encoder-decoder; UniAttn needs a decoder-only model")
    family = FAMILIES.get(model_type or "")
    if family is not None:
        return family
    if model_type and model_type.startswith("uniattn_"):
        raise ValueError(f"model_type={model_type!r} shares its softmax already; use a base model that does not")
    reason = REFUSED.get(model_type or "", "nobody has checked how its attention works")
    raise ValueError(
        f"model_type={model_type!r} is not supported: {reason}; UniAttn knows how to share the softmax of "
        f"{', '.join(sorted(FAMILIES))}; use a base model of one of these"
    )


@dataclass(frozen=True)
class Decoder:
    """
    The decoder of a model: its layers and the way there.

    Attributes:
        backbone: the module that owns the list of decoder layers and calls them in order.
        layers: the decoder layers.
        prefix: dotted name of the layer list inside the model, such as `model.layers`.
        family: the architecture.
    """

    backbone: nn.Module
    layers: nn.ModuleList
    prefix: str
    family: Family

    def attention(self, layer_idx: int) -> nn.Module:
        """The attention module of decoder layer `layer_idx`, as it is now: bare or wrapped."""
        return getattr(self.layers[layer_idx], self.family.attention)

    def normalises_attention(self, layer_idx: int) -> bool:
        """Whether a norm stands between the attention output and the residual stream (Gemma-2, OLMo-2, GLM-4)."""
        layer = self.layers[layer_idx]
        after_both = hasattr(layer, "post_attention_layernorm") and hasattr(layer, "post_feedforward_layernorm")
        other = getattr(layer, "post_self_attn_layernorm", None) or getattr(layer, "post_norm1", None)
        return after_both or (other is not None and not isinstance(other, nn.Identity))

    def residual_multiplier(self, layer_idx: int) -> float:
        """By what the attention output is multiplied before it is added to the residual stream (Granite); else 1."""
        return getattr(self.layers[layer_idx], "residual_multiplier", 1.0)

    def attention_name(self, layer_idx: int) -> str:
        return f"{self.prefix}.{layer_idx}.{self.family.attention}"


def find_decoder(model: nn.Module, family: Family) -> Decoder:
    """
    Locate the decoder layers of `model`.

    Raises:
        ValueError: if `model` has no list of decoder layers with this family's attention.
    """
    for name, module in model.named_modules():
        layers = getattr(module, family.layers, None)
        if isinstance(layers, nn.ModuleList) and len(layers) and hasattr(layers[0], family.attention):
            return Decoder(module, layers, f"{name}.{family.layers}" if name else family.layers, family)
    raise ValueError(f"found no list of decoder layers in {type(model).__name__}; pass a decoder-only language model")


def check_back_end(name: str | None) -> None:
    """Raise ValueError if followers cannot share the softmax of the attention implementation `name`."""
    if name not in BACK_ENDS:
        raise ValueError(
            f"attn_implementation={name!r} is not supported with softmax sharing; use one of {', '.join(BACK_ENDS)}, "
            'for example model.set_attn_implementation("sdpa")'
        )
