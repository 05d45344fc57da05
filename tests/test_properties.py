"""
Properties that hold for whatever hypothesis thinks of: models against the oracle, PEFT's verbs against a plain model.

The default suite tries a few hundred examples, always the same; `-m slow` tries 2,500. PEFT has no verb that renames
an adapter: `rename` is what its users do instead, save it, load it under the new name, and delete the old one.
"""

from __future__ import annotations

import shutil
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, aligned, close, logits, loud, moved, specification, tiny_model
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from oracle import Float64Throughout, positions, unified_generate, unified_logits
from peft import get_peft_model
from transformers import StaticCache

from peft_uniattn import UniAttnConfig, UniAttnLayer, to_standalone

VOCABULARY = 31


def examples(count: int):
    return settings(
        max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=False
    )


@st.composite
def superblocks(draw, layers: int) -> list[list[int]]:
    """Disjoint runs of two layers or more."""
    blocks, first = [], draw(st.integers(0, layers - 2))
    while first + 2 <= layers:
        size = draw(st.integers(2, layers - first))
        blocks.append(list(range(first, first + size)))
        first += size + draw(st.integers(0, 2))
    return blocks


@st.composite
def shapes(draw) -> dict:
    """What `make` needs for a model."""
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    layers, head_dim = draw(st.integers(2, 6)), draw(st.sampled_from([4, 8]))
    family = draw(st.sampled_from(sorted(CLASSES)))
    # With a window of 1 token, transformers' own cached models disagree with themselves.
    window = {"sliding_window": draw(st.sampled_from([None, 2, 3]))} if family == "mistral" else {}
    return {
        "family": family,
        "hidden_size": kv_heads * group * head_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": draw(st.booleans()),
        "attn_implementation": draw(st.sampled_from(["eager", "sdpa"])),
        "seed": draw(st.integers(0, 99)),
        "superblocks": draw(superblocks(layers)),
        "r": draw(st.sampled_from([None, 1, 3])),
        **window,
    }


def make(superblocks, r, **shape):
    """An adapted model with large random weights, and its superblocks."""
    model = tiny_model(vocab_size=VOCABULARY, intermediate_size=12, **shape)
    return loud(get_peft_model(model, UniAttnConfig(superblocks=superblocks, r=r)).eval()), superblocks


@st.composite
def batches(draw):
    """Token ids and a mask that pads each row on the same side, at least one token staying."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 10))
    tokens = st.lists(st.integers(1, VOCABULARY - 1), min_size=length, max_size=length)
    ids = torch.tensor(draw(st.lists(tokens, min_size=rows, max_size=rows)))
    padding, left = torch.tensor([[draw(st.integers(0, length - 1))] for _ in range(rows)]), draw(st.booleans())
    place = torch.arange(length)[None]
    mask = (place >= padding) if left else (place < length - padding)
    return torch.where(mask, ids, 0), mask.long(), left


def oracle(model, blocks, ids, mask) -> torch.Tensor:
    return unified_logits(
        **specification(model, blocks), input_ids=ids, attention_mask=mask, position_ids=positions(mask)
    )


def check_forward(made, batch) -> None:
    """Adapter and standalone model give the oracle's logits for every token that is none of the padding."""
    (model, blocks), (ids, mask, left) = made, batch
    real = mask.bool()
    event(f"{model.config.model_type}, {'left' if left else 'right'} padding" if not real.all() else "no padding")
    with torch.no_grad():
        expected = oracle(model, blocks, ids, mask)[real]
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
        close(model(**inputs).logits[real], expected)
        close(to_standalone(model)(**inputs).logits[real], expected)


def check_cached_steps(made, batch, cuts, static) -> None:
    """A prompt in pieces through a cache gives what it gives in one go."""
    (model, blocks), (ids, _, _) = made, batch
    ids = ids.clamp(min=1)
    mask, length = torch.ones_like(ids), ids.shape[1]
    edges = sorted({0, length, *(cut % length for cut in cuts)})
    with torch.no_grad():
        expected = oracle(model, blocks, ids, mask)
        cache = StaticCache(config=model.config, max_cache_len=length + 2) if static else None
        found = []
        for first, last in pairwise(edges):
            out = model(ids[:, first:last], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    close(torch.cat(found, dim=1), expected)


def check_generation(made, batch, new_tokens: int) -> None:
    """Greedy generation from a prompt padded on the left gives the oracle's tokens."""
    (model, blocks), (ids, mask, left) = made, batch
    if not left:
        ids, mask = ids.flip(1), mask.flip(1)
    spec = specification(model, blocks)
    expected = unified_generate(spec.pop("weights"), spec.pop("config"), ids, new_tokens, attention_mask=mask, **spec)
    found = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    assert torch.equal(found, expected)


def check_gradients(made, batch) -> None:
    """So are the gradients of a loss over the tokens that count."""
    (model, blocks), (ids, mask, _) = made, batch
    model.requires_grad_(True)
    weights = dict(model.named_parameters())
    real = mask.bool()
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
    found = model(**inputs, use_cache=False).logits[real].log_softmax(-1)[:, 0].sum()
    expected = oracle(model, blocks, ids, mask)[real].log_softmax(-1)[:, 0].sum()
    names = list(weights)
    for name, mine, theirs in zip(
        names,
        torch.autograd.grad(found, list(weights.values()), allow_unused=True),
        torch.autograd.grad(expected, list(weights.values()), allow_unused=True),
        strict=True,
    ):
        zero = torch.zeros_like(weights[name])
        torch.testing.assert_close(
            zero if mine is None else mine, zero if theirs is None else theirs, rtol=1e-7, atol=1e-8, msg=name
        )


CHECKS = {
    "forward": (check_forward, {}),
    "cached_steps": (check_cached_steps, {"cuts": st.lists(st.integers(0, 9), max_size=4), "static": st.booleans()}),
    "generation": (check_generation, {"new_tokens": st.integers(1, 6)}),
    "gradients": (check_gradients, {}),
}


@pytest.mark.parametrize(
    ("name", "count"),
    [(name, 50) for name in CHECKS] + [pytest.param(name, 500, marks=pytest.mark.slow) for name in CHECKS],
)
def test_random_models_agree_with_the_oracle(name, count, record_property):
    check, extra = CHECKS[name]
    tried = []

    @examples(count)
    @given(st.data())
    def run(data):
        tried.append(1)
        with Float64Throughout():
            made, batch = make(**data.draw(shapes())), data.draw(batches())
            check(made, batch, **{key: data.draw(strategy) for key, strategy in extra.items()})

    run()
    record_property("examples of models", len(tried))


NAMES = ["default", "b", "c"]
PLANS = [
    {"superblocks": [[0, 1, 2]]},
    {"superblocks": [[1, 2], [3, 4]], "r": 2},
    {"superblocks": [[2, 3, 4, 5]], "compensation": "heads"},
    {"superblocks": [[4, 5]], "compensation": "none"},
]


class Expected:
    """What PEFT's verbs should have made of a model: by adapter the plan and the weights, and which one is active."""

    def __init__(self, base) -> None:
        self.base = base
        self.adapters: dict[str, tuple[dict, torch.Tensor]] = {}
        self.active: str | None = None

    def logits(self) -> torch.Tensor:
        return self.base if self.active is None else self.adapters[self.active][1]


class Machine:
    """A `PeftModel`, or its base when there is no adapter, driven by verbs; and what should come of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = aligned(tiny_model(hidden_size=16, intermediate_size=16))
        self.expected = Expected(logits(self.model))
        self.saved: dict[str, tuple[dict, torch.Tensor]] = {}

    def reference(self, plan: dict, seed: int) -> torch.Tensor:
        """Logits of a model that never had another adapter."""
        model = tiny_model(hidden_size=16, intermediate_size=16)
        torch.manual_seed(seed)  # A of a low-rank compensation starts at random
        return logits(aligned(moved(get_peft_model(model, UniAttnConfig(**plan)).eval(), seed=seed)))

    def add(self, name: str, plan: dict, seed: int) -> None:
        if name in self.expected.adapters:
            return
        torch.manual_seed(seed)
        if not self.expected.adapters:
            self.model = get_peft_model(self.model, UniAttnConfig(**plan), adapter_name=name).eval()
            self.expected.active = name
        else:
            self.model.add_adapter(name, UniAttnConfig(**plan))
        before = self.expected.active
        self.model.set_adapter(name)
        moved(self.model, seed=seed)
        self.model.set_adapter(before)
        self.expected.adapters[name] = plan, self.reference(plan, seed)

    def present(self, pick: int) -> str | None:
        """One of the adapters, if there are any."""
        there = sorted(self.expected.adapters)
        return there[pick % len(there)] if there else None

    def set(self, pick: int) -> None:
        if name := self.present(pick):
            self.model.set_adapter(name)
            self.expected.active = name

    def disable(self) -> None:
        if self.expected.adapters:
            with self.model.disable_adapter():
                assert torch.equal(logits(self.model), self.expected.base)

    def delete(self, pick: int) -> None:
        # PEFT picks the next active adapter by itself; the verb says which.
        name = self.present(pick)
        others = [other for other in self.expected.adapters if other != name]
        if not others:
            return
        self.model.set_adapter(others[0])
        self.model.delete_adapter(name)
        del self.expected.adapters[name]
        self.expected.active = others[0]

    def save(self) -> None:
        if self.expected.adapters:
            self.model.save_pretrained(self.folder)
            self.saved.update(self.expected.adapters)

    def load(self, name: str, pick: int) -> None:
        if self.expected.adapters and name not in self.expected.adapters and self.saved:
            source = sorted(self.saved)[pick % len(self.saved)]
            self.model.load_adapter(self.folder / ("" if source == "default" else source), name)
            self.expected.adapters[name] = self.saved[source]

    def rename(self, pick: int, new: str) -> None:
        name = self.present(pick)
        if name is None or new in self.expected.adapters:
            return
        was_active = self.expected.active == name
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, selected_adapters=[name])
            self.model.load_adapter(Path(folder, "" if name == "default" else name), new)
        if was_active:
            self.model.set_adapter(new)
        self.model.delete_adapter(name)
        self.expected.adapters[new] = self.expected.adapters.pop(name)
        if was_active:
            self.expected.active = new

    def unload(self) -> None:
        if self.expected.adapters:
            self.model = self.model.unload()
            self.expected.adapters, self.expected.active = {}, None
            assert not any(isinstance(module, UniAttnLayer) for module in self.model.modules())

    def standalone(self) -> None:
        if self.expected.adapters:
            torch.testing.assert_close(
                logits(to_standalone(self.model)), self.expected.logits(), rtol=1e-9, atol=1e-10
            )

    def check(self) -> None:
        # Weights are read from files unaligned, which may round otherwise.
        torch.testing.assert_close(logits(self.model), self.expected.logits(), rtol=1e-12, atol=1e-12)
        assert set(getattr(self.model, "peft_config", {})) == set(self.expected.adapters)


names, picks = st.sampled_from(NAMES), st.integers(0, len(NAMES) - 1)
ADD = st.tuples(st.just("add"), names, st.sampled_from(PLANS), st.integers(0, 3))
STEPS = st.one_of(
    ADD,
    st.tuples(st.just("set"), picks),
    st.tuples(st.just("disable")),
    st.tuples(st.just("delete"), picks),
    st.tuples(st.just("save")),
    st.tuples(st.just("load"), names, picks),
    st.tuples(st.just("rename"), picks, names),
    st.tuples(st.just("unload")),
    st.tuples(st.just("standalone")),
)


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_random_sequences_of_verbs_leave_the_expected_adapters(count, record_property):
    tried = []

    @examples(count)
    @given(ADD, st.lists(STEPS, min_size=3, max_size=12))
    def run(first, others):
        tried.append(1)
        folder = Path(tempfile.mkdtemp())
        try:
            machine = Machine(folder)
            for verb, *arguments in (first, *others):
                getattr(machine, verb)(*arguments)
                machine.check()
        finally:
            shutil.rmtree(folder)

    run()
    record_property("examples of verbs", len(tried))
