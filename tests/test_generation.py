"""Generation with the value-only cache: every way to the same tokens, and decode steps that read no leader's keys."""

import sys
from collections import Counter

import pytest
import torch
from conftest import close, loud, prompt, specification, tiny_adapter, tiny_model
from oracle import positions, unified_generate, unified_logits
from torch import nn
from transformers import DynamicCache, StaticCache

from peft_uniattn import UniAttnConfig
from peft_uniattn.handover import Handover

pytestmark = pytest.mark.usefixtures("float64")

BLOCKS = [[1, 2, 3], [4, 5]]
NEW = 7
# Both leaders of BLOCKS see everything, all their followers and layer 0 have a window.
LEADERS_FULL = {
    "use_sliding_window": True,
    "sliding_window": 4,
    "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full", "sliding")],
}
CASES = [
    ("llama", {}, "sdpa", None),
    ("llama", {}, "eager", 3),
    ("llama", {"num_key_value_heads": 4}, "sdpa", 3),
    ("llama", {"num_key_value_heads": 1, "head_dim": 10}, "eager", None),
    ("mistral", {"sliding_window": None}, "eager", None),
    ("mistral", {"sliding_window": 4}, "sdpa", None),
    ("mistral", {"sliding_window": 4}, "eager", 3),
    ("qwen2", {}, "sdpa", None),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 4}, "sdpa", 3),
    ("qwen2", LEADERS_FULL, "sdpa", None),
    ("qwen2", LEADERS_FULL, "eager", 3),
]
LEFT = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])


def case_id(case):
    family, changes, back_end, rank = case
    return "-".join([family, *changes, back_end, "full" if rank is None else "low-rank"])


every_case = pytest.mark.parametrize("case", CASES, ids=case_id)
few_cases = pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[5], CASES[9]], ids=case_id)
both_back_ends = pytest.mark.parametrize("back_end", ["eager", "sdpa"])
kinds = pytest.mark.parametrize("kind", ["dynamic", "static"])


def build(case=CASES[0], blocks=BLOCKS):
    family, changes, back_end, rank = case
    model = tiny_model(family, attn_implementation=back_end, **changes)
    follower_mask = "leader" if "layer_types" in changes else "own"
    return loud(tiny_adapter(model, superblocks=blocks, r=rank, follower_mask=follower_mask))


def new_cache(kind, model, length=24):
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=length)


def generate(model, ids, **options):
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, **options})


@torch.no_grad()
def in_chunks(model, ids, sizes, cache, mask=None):
    """Logits of `ids`, given to the model a few tokens at a time."""
    logits, start = [], 0
    for size in sizes:
        chunk = slice(start, start + size)
        options = {}
        if mask is not None:
            options = {"attention_mask": mask[:, : chunk.stop], "position_ids": positions(mask)[:, chunk]}
        logits.append(model(ids[:, chunk], past_key_values=cache, **options).logits)
        start += size
    return torch.cat(logits, dim=1)


@every_case
@kinds
@pytest.mark.parametrize(
    "sizes",
    [[12], [1] * 12, [9, 1, 1, 1], [5, 3, 4], [2, 7, 1, 2], [1, 11]],
    ids=lambda sizes: "+".join(map(str, sizes)),
)
def test_chunks_of_any_size_give_the_logits_of_equation_14(case, kind, sizes):
    model = build(case)
    ids = prompt(length=12)
    logits = in_chunks(model, ids, sizes, new_cache(kind, model))
    close(logits, unified_logits(**specification(model, BLOCKS), input_ids=ids))


@every_case
@kinds
@pytest.mark.parametrize("sizes", [[9], [9 - 2, 1, 1], [1] * 9, [3, 6]], ids=lambda sizes: "+".join(map(str, sizes)))
def test_chunks_of_a_left_padded_batch_give_the_logits_of_equation_14(case, kind, sizes):
    model = build(case)
    logits = in_chunks(model, prompt(), sizes, new_cache(kind, model), LEFT)
    expected = unified_logits(**specification(model, BLOCKS), input_ids=prompt(), attention_mask=LEFT)
    close(logits[LEFT.bool()], expected[LEFT.bool()])


@both_back_ends
def test_steps_with_autograd_give_the_logits_of_equation_14(back_end):
    model = build(("llama", {}, back_end, None))
    ids, cache = prompt(), DynamicCache()
    logits = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(9)]
    assert all(step.requires_grad for step in logits)
    close(torch.cat(logits, dim=1), unified_logits(**specification(model, BLOCKS), input_ids=ids))


@every_case
@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 4}],
    ids=["dynamic", "static", "no cache", "chunked prefill"],
)
def test_greedy_tokens_and_logits_are_those_of_equation_14(case, options):
    model = build(case)
    output = generate(model, prompt(), output_logits=True, return_dict_in_generate=True, **options)
    of = specification(model, BLOCKS)
    expected = unified_generate(input_ids=prompt(), new_tokens=NEW, **of)
    assert torch.equal(output.sequences, expected)
    logits = unified_logits(**of, input_ids=expected[:, :-1])
    close(torch.stack(output.logits, dim=1), logits[:, -NEW:])


@few_cases
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_a_left_padded_batch_continues_as_its_prompts_do_alone(case, options):
    model = build(case)
    batch = generate(model, prompt(), attention_mask=LEFT, **options)
    for sequence, ids, mask in zip(batch, prompt(), LEFT.bool(), strict=True):
        alone = unified_generate(input_ids=ids[mask][None], new_tokens=NEW, **specification(model, BLOCKS))
        assert torch.equal(sequence[-NEW:], alone[0, -NEW:])


@few_cases
@kinds
def test_sampling_draws_the_same_tokens_with_and_without_a_cache(case, kind):
    model = build(case)

    def sample(**options):
        torch.manual_seed(11)
        return generate(model, prompt(batch=4), do_sample=True, temperature=1.5, top_k=0, max_new_tokens=12, **options)

    cached = sample(cache_implementation=kind)
    assert torch.equal(cached, sample(use_cache=False))
    assert not torch.equal(cached, generate(model, prompt(batch=4), max_new_tokens=12))


@few_cases
@kinds
def test_beam_search_finds_the_same_sequences_with_and_without_a_cache(case, kind):
    model = build(case)
    options = {"num_beams": 4, "num_return_sequences": 4, "attention_mask": LEFT}
    cached = generate(model, prompt(), cache_implementation=kind, **options)
    assert torch.equal(cached, generate(model, prompt(), use_cache=False, **options))


@few_cases
@kinds
def test_beam_scores_are_the_log_likelihoods_of_equation_14(case, kind):
    model = build(case)
    options = {"num_beams": 4, "num_return_sequences": 4, "return_dict_in_generate": True, "output_scores": True}
    output = generate(model, prompt(), cache_implementation=kind, **options)
    logits = unified_logits(**specification(model, BLOCKS), input_ids=output.sequences[:, :-1])
    chosen = logits.log_softmax(-1).gather(2, output.sequences[:, 1:, None])[:, -NEW:, 0]
    close(output.sequences_scores, chosen.mean(dim=1))


@few_cases
def test_drafts_that_are_rolled_back_leave_no_trace(case):
    model = build(case)
    ids = prompt(batch=1, length=4).repeat(1, 4)
    expected = unified_generate(input_ids=ids, new_tokens=NEW, **specification(model, BLOCKS))
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3), expected)


@every_case
def test_a_chunked_prefill_of_a_static_cache_gives_the_tokens_of_equation_14(case):
    model = build(case)
    tokens = generate(model, prompt(), cache_implementation="static", prefill_chunk_size=4)
    assert torch.equal(tokens, unified_generate(input_ids=prompt(), new_tokens=NEW, **specification(model, BLOCKS)))


def test_generation_continues_on_the_cache_of_an_earlier_one():
    model = build()
    first = generate(model, prompt(), return_dict_in_generate=True)
    question = torch.cat([first.sequences, prompt(length=3, seed=8)], dim=1)
    answer = generate(model, question, past_key_values=first.past_key_values)
    assert torch.equal(answer, unified_generate(input_ids=question, new_tokens=NEW, **specification(model, BLOCKS)))


def test_two_adapters_generate_each_by_its_own_plan():
    model = build()
    of = specification(model, BLOCKS)
    model.add_adapter("other", UniAttnConfig(superblocks=[[0, 1], [3, 4]], task_type="CAUSAL_LM"))
    of_other = {**of, "superblocks": [[0, 1], [3, 4]], "compensation": None}
    for name, expected in (("other", of_other), ("default", of), ("other", of_other)):
        model.set_adapter(name)
        assert torch.equal(generate(model, prompt()), unified_generate(input_ids=prompt(), new_tokens=NEW, **expected))


@pytest.fixture
def back_end_calls(monkeypatch):
    """How often the attention functions of transformers run, by name."""
    calls = Counter()

    def count(owner, name):
        original = getattr(owner, name)

        def counting(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count(nn.functional, "scaled_dot_product_attention")
    count(sys.modules["transformers.models.llama.modeling_llama"], "eager_attention_forward")
    return calls


@both_back_ends
@kinds
@torch.no_grad()
def test_followers_call_no_attention_function_at_one_token_steps(back_end, kind, back_end_calls):
    blocks = [[2, 3, 4, 5]]
    model = build(("llama", {}, back_end, None), blocks)
    cache = new_cache(kind, model)
    model(prompt(), past_key_values=cache)
    back_end_calls.clear()
    ids = prompt(length=1, seed=4)
    step = model(ids, past_key_values=cache).logits
    assert sum(back_end_calls.values()) == 2, "one call for each of the ordinary layers 0 and 1"
    history = torch.cat([prompt(), ids], dim=1)
    close(step, unified_logits(**specification(model, blocks), input_ids=history)[:, -1:])


@both_back_ends
@kinds
@torch.no_grad()
def test_followers_read_neither_keys_nor_queries_nor_mask_at_one_token_steps(back_end, kind, monkeypatch):
    model = build(("llama", {}, back_end, None))
    cache = new_cache(kind, model)
    model(prompt(), past_key_values=cache, attention_mask=LEFT)
    give = Handover.give

    def give_probabilities_only(self, layer_idx, state):
        state.query = state.key = state.mask = None
        give(self, layer_idx, state)

    monkeypatch.setattr(Handover, "give", give_probabilities_only)
    ids, mask = prompt(length=1, seed=4), nn.functional.pad(LEFT, (0, 1), value=1)
    step = model(ids, past_key_values=cache, attention_mask=mask, position_ids=torch.tensor([[9], [9]])).logits
    history = torch.cat([prompt(), ids], dim=1)
    expected = unified_logits(**specification(model, BLOCKS), input_ids=history, attention_mask=mask)
    close(step, expected[:, -1:])


@both_back_ends
@torch.no_grad()
def test_followers_project_no_queries_or_keys_at_one_token_steps(back_end):
    model = build(("llama", {}, back_end, None))
    cache = new_cache("dynamic", model)
    model(prompt(), past_key_values=cache)
    called = []
    for layer in (2, 3, 5):
        attention = model.base_model.model.model.layers[layer].self_attn.get_base_layer()
        for part in ("q_proj", "k_proj"):
            getattr(attention, part).register_forward_hook(lambda *_, name=(layer, part): called.append(name))
    model(prompt(length=1), past_key_values=cache)
    assert not called


@torch.no_grad()
def test_eager_prefill_without_autograd_shares_the_probabilities(back_end_calls):
    blocks = [[2, 3, 4, 5]]
    model = build(("llama", {}, "eager", None), blocks)
    back_end_calls.clear()
    logits = model(prompt()).logits
    assert back_end_calls["eager_attention_forward"] == 3, "layers 0 and 1, and the leader"
    close(logits, unified_logits(**specification(model, blocks), input_ids=prompt()))
