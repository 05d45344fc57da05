"""Several examples in one row: each is computed as if it were alone, where the base model does so too."""

from contextlib import nullcontext

import flash_stand_in
import pytest
import torch
from conftest import close, loud, prompt, specification, tiny_adapter, tiny_model
from oracle import unified_logits
from transformers import DataCollatorWithFlattening

from peft_uniattn import to_standalone

BLOCKS = [[1, 2, 3], [4, 5]]
LENGTHS = [4, 2, 5]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
SLIDING = {"sliding_window": 3}

pytestmark = pytest.mark.usefixtures("float64")
families = pytest.mark.parametrize("family", [("llama", {}), ("mistral", SLIDING)], ids=["llama", "sliding"])
back_ends = pytest.mark.parametrize("back_end", ["eager", "sdpa", "flash_attention_2"])
kinds = pytest.mark.parametrize("convert", [lambda model: model, to_standalone], ids=["adapter", "standalone"])


@pytest.fixture(autouse=True)
def flash(monkeypatch):
    flash_stand_in.install(monkeypatch)


def build(family=("llama", {}), back_end="sdpa", convert=lambda model: model, **more):
    name, changes = family
    adapted = loud(tiny_adapter(tiny_model(name, **changes, **more), superblocks=BLOCKS))
    adapted.base_model.model.set_attn_implementation(back_end)
    return convert(adapted).requires_grad_(True)


def packed(rows=1):
    return prompt(batch=rows, length=sum(LENGTHS))


def separate(model, ids):
    """Logits of equation 14, every example of every row alone."""
    of = specification(model, BLOCKS)
    parts = ids.split(LENGTHS, dim=1)
    return torch.cat([unified_logits(**of, input_ids=part) for part in parts], dim=1)


def gradients(logits, model):
    found = torch.autograd.grad(logits.square().mean(), list(model.parameters()), allow_unused=True)
    return [torch.zeros(()) if gradient is None else gradient for gradient in found]


@kinds
@families
@back_ends
def test_packed_examples_have_the_logits_and_gradients_that_they_have_alone(family, back_end, convert):
    model = build(family, back_end, convert).train()
    logits, expected = model(packed(), position_ids=POSITIONS, use_cache=False).logits, separate(model, packed())
    close(logits, expected)
    close(gradients(logits, model), gradients(expected, model))


@families
@pytest.mark.parametrize("back_end", ["eager", "sdpa"])
def test_every_row_of_a_batch_can_be_packed(family, back_end):
    model = build(family, back_end)
    logits = model(packed(3), position_ids=POSITIONS.expand(3, -1), use_cache=False).logits
    close(logits, separate(model, packed(3)))


@back_ends
def test_nothing_leaks_from_one_example_into_another(back_end):
    model = build(back_end=back_end)
    other = packed().clone()
    other[:, : LENGTHS[0]] += 1
    first, second = (model(ids, position_ids=POSITIONS, use_cache=False).logits for ids in (packed(), other))
    assert not torch.allclose(first[:, : LENGTHS[0]], second[:, : LENGTHS[0]])
    assert torch.equal(first[:, LENGTHS[0] :], second[:, LENGTHS[0] :])


@back_ends
def test_a_padding_free_batch_of_transformers_equals_its_examples_alone(back_end):
    """With `cu_seq_lens_q` and the like, which flash_attention_2 reads instead of the positions."""
    examples = [{"input_ids": part[0].tolist()} for part in packed().split(LENGTHS, dim=1)]
    batch = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)(examples)
    assert "cu_seq_lens_q" in batch
    model = build(back_end=back_end)
    close(model(**batch, use_cache=False).logits, separate(model, packed()))


def test_cumulative_lengths_alone_separate_examples_under_flash_attention():
    model = build(back_end="flash_attention_2")
    ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 5, "max_length_k": 5}
    close(model(packed(), position_ids=POSITIONS, **lengths).logits, separate(model, packed()))


@kinds
@back_ends
def test_a_padding_free_batch_of_trl_has_the_loss_of_its_examples_alone(back_end, convert):
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    examples = [{"input_ids": part[0].tolist()} for part in packed().split(LENGTHS, dim=1)]
    batch = sft.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(examples)
    assert batch["input_ids"].shape == (1, sum(LENGTHS))
    model = build(back_end=back_end, convert=convert)
    loss = model(**batch, use_cache=False).loss
    parts = zip(separate(model, packed()).split(LENGTHS, dim=1), packed().split(LENGTHS, dim=1), strict=True)
    terms = [logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]) for logits, ids in parts]
    close(loss, -torch.cat(terms).mean())


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
@back_ends
def test_with_a_cache_packing_is_recognised_by_flash_attention_only_as_in_the_base_model(back_end, adapted):
    """transformers takes restarting positions for one sequence as soon as there is a cache."""
    model = build(back_end=back_end)
    with torch.no_grad(), nullcontext() if adapted else model.disable_adapter():
        alone = model(packed(), position_ids=POSITIONS, use_cache=False).logits
        cached = model(packed(), position_ids=POSITIONS, use_cache=True).logits
    assert torch.allclose(alone[:, : LENGTHS[0]], cached[:, : LENGTHS[0]])
    assert torch.allclose(alone, cached) == (back_end == "flash_attention_2")
