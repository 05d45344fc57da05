"""UniAttn as an executable specification: the paper's formula, in plain PyTorch, for Llama, Mistral and Qwen2.

Nothing here is shared with the package; nothing is cached, fused or skipped. Shapes: hidden states are
(batch, length, hidden_size), heads (batch, heads, length, head_dim), s (batch, query heads, query length, key length).

Paper: UniAttn, https://arxiv.org/abs/2502.00439. With s_i the softmax activation of leader i (eq. 1), an ordinary
layer is x' = s_i·V_i·W_o + x_i (eq. 2), and a follower at i+b is

    x' = s_i·V_{i+b}·W_o + x_{i+b}                              (eq. 12)
    x' = s_i·V_{i+b}·W_o + x_{i+b} + Norm(x_{i+b})·W_c          (eq. 14; Norm(x) as in the authors' code)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def unified_logits(
    weights: dict[str, Tensor],
    config,
    input_ids: Tensor,
    *,
    superblocks=(),
    compensation: dict[int, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Logits of the unified model, (batch, length, vocab_size), in the dtype of the weights.

    weights: the state dict's names and tensors; the result is differentiable with respect to every one that it uses.
        The q_proj and k_proj of followers are never read and may be missing.
    config: a Llama, Mistral or Qwen2 configuration; only its attributes are read.
    input_ids: (batch, length).
    superblocks: lists of consecutive layer indices, the leader first; () is the ordinary model.
    compensation: follower's layer index -> W_c (hidden_size, hidden_size), applied from the right; missing means zero.
    attention_mask: (batch, length), 1 for real tokens, 0 for padding on either side.
    position_ids: (1 or batch, length), for RoPE only; 0, 1, 2, … by default, whatever the mask. RoPE being relative,
        `positions(attention_mask)` gives the real tokens the same logits up to rounding.
    """
    compensation = compensation or {}
    leaders = leader_of_each_follower(superblocks, config.num_hidden_layers)
    if strangers := set(compensation) - set(leaders):
        raise ValueError(f"compensation for layers {sorted(strangers)}, which follow no leader; use {sorted(leaders)}")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]

    embedding = weights["model.embed_tokens.weight"]
    angles = rotary_angles(config, position_ids, embedding.dtype)
    x = F.embedding(input_ids, embedding)
    s = {}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        normed = rms_norm(weights, f"{layer}.input_layernorm", x, config)
        if i not in leaders:
            s[i] = softmax_activation(weights, layer, normed, angles, visible(config, i, attention_mask), config)
        x = x + mix_values(weights, layer, normed, s[leaders.get(i, i)], config)
        if i in compensation:
            x = x + normed @ compensation[i]
        x = x + feed_forward(weights, layer, rms_norm(weights, f"{layer}.post_attention_layernorm", x, config), config)

    head = embedding if config.tie_word_embeddings else weights.get("lm_head.weight", embedding)
    return F.linear(rms_norm(weights, "model.norm", x, config), head)


@torch.no_grad()
def unified_generate(weights, config, input_ids, new_tokens: int, *, attention_mask=None, **kwargs) -> Tensor:
    """Greedy continuation, (batch, length + new_tokens): everything recomputed at each step, no stop at any token.

    kwargs: superblocks and compensation. The prompt may be padded on the left, positions then count real tokens.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    for _ in range(new_tokens):
        kwargs |= {"attention_mask": mask, "position_ids": positions(mask)}
        logits = unified_logits(weights, config, input_ids, **kwargs)
        input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return input_ids


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids that count real tokens only, as `generate()` counts them; 0 at padding. (batch, length)."""
    return (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)


def leader_of_each_follower(superblocks, layers: int) -> dict[int, int]:
    """follower's layer index -> leader's; refuses blocks that are not runs of layers, or that overlap."""
    members = [i for block in superblocks for i in block]
    runs = all(list(block) == list(range(block[0], block[0] + len(block))) for block in superblocks)
    if not runs or len(set(members)) < len(members) or not set(members) <= set(range(layers)):
        raise ValueError(f"superblocks={superblocks}: give disjoint runs of consecutive layers below {layers}")
    return {follower: block[0] for block in superblocks for follower in block[1:]}


def softmax_activation(weights, layer: str, normed: Tensor, angles: Tensor, mask: Tensor, config) -> Tensor:
    """s = softmax(Q·Kᵀ/√d_k) over the visible keys (eq. 1); all zeros for a query that sees no key."""
    q = rotate(split_heads(linear(weights, f"{layer}.self_attn.q_proj", normed), config), angles)
    k = rotate(split_heads(linear(weights, f"{layer}.self_attn.k_proj", normed), config), angles)
    scores = q @ share_heads(k, config).transpose(-1, -2) / math.sqrt(head_dim(config))
    # A finite fill keeps empty rows, and their gradients, free of NaN.
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~mask, 0)


def mix_values(weights, layer: str, normed: Tensor, s: Tensor, config) -> Tensor:
    """s·V·W_o with the layer's own V and W_o, whoever computed s: the first term of eqs. 2, 12 and 14."""
    v = split_heads(linear(weights, f"{layer}.self_attn.v_proj", normed), config)
    mixed = s @ share_heads(v, config)
    return linear(weights, f"{layer}.self_attn.o_proj", mixed.transpose(1, 2).flatten(2))


def feed_forward(weights, layer: str, x: Tensor, config) -> Tensor:
    """down(act(gate(x)) * up(x))."""
    gate = getattr(F, config.hidden_act)(linear(weights, f"{layer}.mlp.gate_proj", x))
    return linear(weights, f"{layer}.mlp.down_proj", gate * linear(weights, f"{layer}.mlp.up_proj", x))


def visible(config, layer: int, attention_mask: Tensor) -> Tensor:
    """Which key each query may see, (batch, 1, query length, key length): real, not later, inside the window."""
    index = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    distance = index[:, None] - index
    seen = distance >= 0
    if window := window_of(config, layer):
        seen = seen & (distance < window)
    return seen & (attention_mask[:, None, None, :] != 0)


def window_of(config, layer: int) -> int | None:
    """The layer's sliding window: `layer_types` decides where the family has it (Qwen2), else all layers (Mistral)."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def rotary_angles(config, position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Angle of each position in each rotated plane, (1 or batch, 1, length, head_dim / 2)."""
    rope, size = config.rope_parameters, head_dim(config)
    frequencies = rope["rope_theta"] ** (-torch.arange(0, size, 2, dtype=dtype, device=position_ids.device) / size)
    if rope["rope_type"] == "linear":
        frequencies = frequencies / rope["factor"]
    elif rope["rope_type"] == "llama3":
        # Turns made over the original context: few → slow by factor, many → keep, in between → blend.
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / rope["factor"]
    elif rope["rope_type"] != "default":
        raise ValueError(f"rope_type={rope['rope_type']!r} is not specified here; use default, linear or llama3")
    return position_ids[:, None, :, None] * frequencies


def rotate(heads: Tensor, angles: Tensor) -> Tensor:
    """RoPE: turns each plane (j, j + head_dim / 2) by its angle."""
    first, second = heads.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rms_norm(weights, name: str, x: Tensor, config) -> Tensor:
    """Norm(x) = x / √(mean(x²) + eps) · weight."""
    return weights[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()


def linear(weights, name: str, x: Tensor) -> Tensor:
    """x·Wᵀ + b, with W stored as (out, in) and b only where the model has one."""
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def split_heads(x: Tensor, config) -> Tensor:
    """(batch, length, heads * head_dim) -> (batch, heads, length, head_dim)."""
    return x.unflatten(-1, (-1, head_dim(config))).transpose(1, 2)


def share_heads(heads: Tensor, config) -> Tensor:
    """GQA: each key/value head serves a run of neighbouring query heads."""
    return heads.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, dim=1)


class Float64Throughout(TorchFunctionMode):
    """Inside `with Float64Throughout():` a request for float32 yields float64.

    transformers computes norms, softmax and RoPE in float32 whatever the model's dtype, which limits a comparison to
    about 1e-5. Build the model (RoPE's frequencies are made there) and call it inside, to compare it to 1e-10.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widen(value):
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(widen, args), **{name: widen(value) for name, value in (kwargs or {}).items()})
