"""The oracle against transformers where nothing is shared, and against explicit loops where a softmax is."""

import math

import pytest
import torch
from oracle import Float64Throughout, positions, unified_generate, unified_logits
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SIZES = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}
MODELS = {
    "llama-gqa": (LlamaForCausalLM, LlamaConfig, {}),
    "llama-mha": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4}),
    "llama-mqa-wide-heads": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 1, "head_dim": 10}),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama-all-biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3-rope": (
        LlamaForCausalLM,
        LlamaConfig,
        {"head_dim": 8, "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}},
    ),
    "llama-linear-rope": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LINEAR}),
    "mistral-full": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "mistral-sliding": (MistralForCausalLM, MistralConfig, {"sliding_window": 3}),
    "qwen2-full": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2-half-sliding": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
    ),
}
PADDINGS = {
    "none": None,
    "left": torch.tensor([[1] * 11, [0] * 4 + [1] * 7]),
    "right": torch.tensor([[1] * 11, [1] * 7 + [0] * 4]),
}


def build(name):
    """A tiny model with loud random weights (biases and norms too), its configuration and its state dict."""
    model_class, config_class, changes = MODELS[name]
    torch.manual_seed(0)
    config = config_class(**{**SIZES, **changes})
    with Float64Throughout():
        model = model_class(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.4)
    return model, config, model.state_dict()


def tokens(length=11):
    return torch.randint(1, SIZES["vocab_size"], (2, length), generator=torch.Generator().manual_seed(1))


def without_queries_and_keys(weights, layers):
    """What a converted checkpoint keeps: everything but q_proj and k_proj of these layers."""
    dropped = tuple(f"model.layers.{i}.self_attn.{p}_proj" for i in layers for p in "qk")
    return {name: tensor for name, tensor in weights.items() if not name.startswith(dropped)}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_without_superblocks_it_is_the_transformers_model(name, padding):
    model, config, weights = build(name)
    mask = PADDINGS[padding]
    with Float64Throughout():
        expected = model(tokens(), attention_mask=mask).logits
    actual = unified_logits(weights, config, tokens(), attention_mask=mask)
    real = torch.ones_like(tokens(), dtype=torch.bool) if mask is None else mask.bool()
    assert expected.std() > 0.1
    close(actual[real], expected[real])


@pytest.mark.parametrize("name", ["llama-tied", "mistral-sliding", "qwen2-half-sliding"])
def test_without_superblocks_its_gradients_are_those_of_transformers(name):
    model, config, _ = build(name)
    weights = dict(model.named_parameters())
    with Float64Throughout():
        expected = torch.autograd.grad(model(tokens()).logits.square().mean(), weights.values())
    actual = torch.autograd.grad(unified_logits(weights, config, tokens()).square().mean(), weights.values())
    for ours, theirs in zip(actual, expected, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["llama-gqa", "qwen2-half-sliding"])
@torch.no_grad()
def test_generation_is_the_greedy_one_of_transformers(name, padding):
    model, config, weights = build(name)
    mask = torch.ones_like(tokens()) if PADDINGS[padding] is None else PADDINGS[padding]
    with Float64Throughout():
        expected = model.generate(tokens(), attention_mask=mask, max_new_tokens=6, do_sample=False)
    actual = unified_generate(weights, config, tokens(), 6, attention_mask=mask)
    assert torch.equal(actual, expected)


def loop_logits(weights, config, ids, superblock, compensation):
    """One head, one sequence, lists and Python floats only: eqs. 1, 2, 12 and 14 position by position."""
    w = {name: tensor.tolist() for name, tensor in weights.items()}
    half = config.hidden_size // 2
    leader, *followers = superblock

    def apply(name, x):
        return [sum(a * b for a, b in zip(row, x, strict=True)) for row in w[f"{name}.weight"]]

    def norm(name, x):
        scale = math.sqrt(sum(a * a for a in x) / len(x) + config.rms_norm_eps)
        return [g * a / scale for g, a in zip(w[f"{name}.weight"], x, strict=True)]

    def rope(x, position):
        out = list(x)
        for j in range(half):
            angle = position * config.rope_parameters["rope_theta"] ** (-j / half)
            out[j] = x[j] * math.cos(angle) - x[j + half] * math.sin(angle)
            out[j + half] = x[j + half] * math.cos(angle) + x[j] * math.sin(angle)
        return out

    x = [list(w["model.embed_tokens.weight"][token]) for token in ids]
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        normed = [norm(f"{layer}.input_layernorm", token) for token in x]
        values = [apply(f"{layer}.self_attn.v_proj", token) for token in normed]
        if i not in followers:
            queries = [rope(apply(f"{layer}.self_attn.q_proj", token), t) for t, token in enumerate(normed)]
            keys = [rope(apply(f"{layer}.self_attn.k_proj", token), t) for t, token in enumerate(normed)]
            s = []
            for t, query in enumerate(queries):
                dots = [sum(a * b for a, b in zip(query, key, strict=True)) for key in keys[: t + 1]]
                powers = [math.exp(dot / math.sqrt(2 * half)) for dot in dots]
                s.append([power / sum(powers) for power in powers])
            if i == leader:
                s_leader = s
        else:
            s = s_leader
        for t in range(len(ids)):
            mixed = [sum(s[t][u] * values[u][j] for u in range(t + 1)) for j in range(2 * half)]
            attended = apply(f"{layer}.self_attn.o_proj", mixed)
            for j in range(2 * half):
                x[t][j] += attended[j]
                if i in followers:
                    x[t][j] += sum(normed[t][k] * compensation[i][k][j].item() for k in range(2 * half))
            inner = norm(f"{layer}.post_attention_layernorm", x[t])
            gate, up = apply(f"{layer}.mlp.gate_proj", inner), apply(f"{layer}.mlp.up_proj", inner)
            fed = apply(f"{layer}.mlp.down_proj", [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)])
            x[t] = [a + b for a, b in zip(x[t], fed, strict=True)]
    return torch.tensor([apply("lm_head", norm("model.norm", token)) for token in x], dtype=torch.float64)


def test_followers_obey_equation_14_computed_by_hand():
    torch.manual_seed(2)
    tiny = {"hidden_size": 4, "intermediate_size": 3, "num_hidden_layers": 5}
    config = LlamaConfig(**{**SIZES, **tiny, "num_attention_heads": 1, "num_key_value_heads": 1})
    weights = {k: torch.randn(v.shape, dtype=torch.float64) for k, v in LlamaForCausalLM(config).state_dict().items()}
    compensation = {i: torch.randn(4, 4, dtype=torch.float64) for i in (2, 3)}
    ids = [3, 1, 4, 1, 0, 2]
    expected = loop_logits(weights, config, ids, [1, 2, 3], compensation)
    actual = unified_logits(weights, config, torch.tensor([ids]), superblocks=[[1, 2, 3]], compensation=compensation)
    close(actual[0], expected)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-sliding", "qwen2-full"])
@torch.no_grad()
def test_a_follower_that_would_compute_the_same_softmax_changes_nothing(name):
    """Where layer 1 adds nothing, layer 2 with layer 1's norm, q and k has layer 1's softmax anyway."""
    _, config, weights = build(name)
    for part in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        weights[f"model.layers.1.{part}"].zero_()
    for key in list(weights):
        if key.startswith(("model.layers.1.self_attn.q", "model.layers.1.self_attn.k", "model.layers.1.input")):
            weights[key.replace("layers.1", "layers.2")] = weights[key]
    ordinary = unified_logits(weights, config, tokens())
    close(unified_logits(weights, config, tokens(), superblocks=[[1, 2]]), ordinary)
    assert not torch.allclose(unified_logits(weights, config, tokens(), superblocks=[[0, 1, 2]]), ordinary)


def test_followers_never_read_queries_or_keys():
    _, config, weights = build("qwen2-full")
    kept = without_queries_and_keys(weights, [1, 3])
    assert len(kept) == len(weights) - 8
    blocks = [[0, 1], [2, 3]]
    expected = unified_logits(weights, config, tokens(), superblocks=blocks)
    assert torch.equal(unified_logits(kept, config, tokens(), superblocks=blocks), expected)


def test_gradients_reach_every_tensor_including_the_compensation():
    _, config, weights = build("llama-gqa")
    weights = {name: w.requires_grad_() for name, w in without_queries_and_keys(weights, [3]).items()}
    w_c = torch.zeros(16, 16, dtype=torch.float64, requires_grad=True)
    logits = unified_logits(weights, config, tokens(), superblocks=[[2, 3]], compensation={3: w_c})
    for gradient in torch.autograd.grad(logits.square().mean(), [*weights.values(), w_c]):
        assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_missing_compensation_is_zero_compensation():
    _, config, weights = build("llama-gqa")
    zero = {2: torch.zeros(16, 16, dtype=torch.float64)}
    without = unified_logits(weights, config, tokens(), superblocks=[[1, 2, 3]])
    assert torch.equal(unified_logits(weights, config, tokens(), superblocks=[[1, 2, 3]], compensation=zero), without)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ["llama-gqa", "mistral-sliding"])
def test_padding_leaves_real_tokens_alone_under_superblocks(name, padding):
    _, config, weights = build(name)
    mask = PADDINGS[padding]
    options = {"superblocks": [[1, 2, 3]], "compensation": {2: torch.eye(16, dtype=torch.float64)}}
    alone = unified_logits(weights, config, tokens()[1:, mask[1].bool()], **options)[0]
    for position_ids in (None, positions(mask)):
        padded = unified_logits(weights, config, tokens(), attention_mask=mask, position_ids=position_ids, **options)
        close(padded[1, mask[1].bool()], alone)


def test_positions_count_real_tokens_from_zero():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 0, 0]]


def test_a_tied_head_is_the_embedding_whatever_else_the_weights_hold():
    _, config, weights = build("llama-tied")
    expected = unified_logits(weights, config, tokens())
    stale = {**weights, "lm_head.weight": torch.zeros_like(weights["lm_head.weight"])}
    assert torch.equal(unified_logits(stale, config, tokens()), expected)


def test_rows_without_any_visible_key_give_no_nan():
    _, config, weights = build("llama-gqa")
    weights = {name: tensor.requires_grad_() for name, tensor in weights.items()}
    mask = torch.stack([torch.zeros(11, dtype=torch.long), PADDINGS["left"][1]])
    logits = unified_logits(weights, config, tokens(), superblocks=[[0, 1]], attention_mask=mask)
    assert logits.isfinite().all()
    for gradient in torch.autograd.grad(logits.sum(), weights.values(), allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize("blocks", [[[0, 2]], [[2, 1]], [[0, 1], [1, 2]], [[3, 4]]])
def test_impossible_superblocks_are_refused(blocks):
    _, config, weights = build("llama-gqa")
    with pytest.raises(ValueError, match="superblocks"):
        unified_logits(weights, config, tokens(), superblocks=blocks)


def test_compensation_of_a_layer_that_is_no_follower_is_refused():
    _, config, weights = build("llama-gqa")
    with pytest.raises(ValueError, match="follow no leader"):
        unified_logits(weights, config, tokens(), superblocks=[[2, 3]], compensation={2: torch.eye(16)})
