"""Similarity of softmax activations against `output_attentions` in float64."""

from __future__ import annotations

import flash_stand_in
import pytest
import torch
from conftest import loud, prompt, tiny_adapter, tiny_model
from family_models import family_model

from peft_uniattn.analysis.similarity import softmax_similarity


def expected(model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines of the probabilities that eager attention returns, averaged over rows: per head, and of head means."""
    model.set_attn_implementation("eager")
    attentions = torch.stack(model(ids, output_attentions=True).attentions).double()
    similarities = []
    for s in (attentions.flatten(2), attentions.mean(2).flatten(2)):
        normed = s / s.norm(dim=-1, keepdim=True)
        similarities.append(torch.einsum("lbx,mbx->blm", normed, normed).mean(0))
    return tuple(similarities)


def check(found, model, ids) -> None:
    per_head, head_mean = expected(model, ids)
    torch.testing.assert_close(found.per_head, per_head, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.head_mean, head_mean, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("back_end", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_similarity_of_all_pairs_is_that_of_the_probabilities(family, back_end):
    model = loud(tiny_model(family, sliding_window=4) if family == "mistral" else tiny_model(family))
    model.set_attn_implementation(back_end)
    ids = prompt(batch=3, length=12)
    found = softmax_similarity(model, [{"input_ids": ids}], all_pairs=True, progress=False)
    check(found, model, ids)
    assert (found.sequences, found.tokens) == (3, 36)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "phi3", "gpt_neox", "olmo3"])
def test_softcaps_sinks_windows_and_fused_projections_are_the_models_own(family):
    model = loud(family_model(family))
    ids = prompt(batch=2, length=9)
    found = softmax_similarity(model, [{"input_ids": ids}], all_pairs=True, progress=False)
    check(found, model, ids)


@pytest.mark.parametrize("max_elements", [1, 100, 2**26])
def test_the_result_does_not_depend_on_how_much_is_held_at_once(max_elements):
    model = loud(tiny_model())
    ids = prompt(batch=2, length=12)
    found = softmax_similarity(model, [{"input_ids": ids}], all_pairs=True, max_elements=max_elements, progress=False)
    check(found, model, ids)


def test_a_fused_back_end_gives_the_same(monkeypatch):
    """flash_attention_2 takes V of K's width only; 13 columns do not divide into blocks of 8."""
    flash_stand_in.install(monkeypatch)
    model = loud(tiny_model(dtype=torch.float32))
    ids = prompt(batch=2, length=13)
    model.set_attn_implementation("flash_attention_2")
    found = softmax_similarity(model, [{"input_ids": ids}], all_pairs=True, progress=False)
    for similarities, known in zip((found.per_head, found.head_mean), expected(model, ids), strict=True):
        torch.testing.assert_close(similarities, known, rtol=1e-4, atol=1e-5)


def test_neighbours_alone_are_the_band_of_all_pairs():
    model = loud(tiny_model())
    batches = [{"input_ids": prompt()}]
    band = softmax_similarity(model, batches, progress=False)
    full = softmax_similarity(model, batches, all_pairs=True, progress=False)
    assert band.neighbours() == pytest.approx(full.neighbours())
    assert band.per_head[0, 2].isnan()
    assert "matrix" not in band.to_dict()["per_head"]
    assert "matrix" in full.to_dict()["per_head"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(side):
    model = loud(tiny_model())
    ids, padding = prompt(batch=2, length=8), torch.zeros(2, 3, dtype=torch.long)
    parts = [padding, ids] if side == "left" else [ids, padding]
    padded = torch.cat(parts, dim=1)
    found = softmax_similarity(
        model, [{"input_ids": padded, "attention_mask": (padded != 0).long()}], all_pairs=True, progress=False
    )
    check(found, model, ids)


@pytest.mark.parametrize("back_end", ["eager", "sdpa"])
def test_no_more_than_a_pair_of_layers_is_held(back_end, monkeypatch):
    """Counts elements of s that are alive at once, with room for no more than one column of two layers."""
    from peft_uniattn.analysis import similarity

    alive: list[int] = []
    most = 0
    columns_of = similarity._softmax_columns

    def counted(state, columns):
        nonlocal most
        assert state.probabilities is None
        block = columns_of(state, columns)
        alive.append(block.numel())
        most = max(most, sum(alive[-2:]))
        return block

    monkeypatch.setattr(similarity, "_softmax_columns", counted)
    model = tiny_model(attn_implementation=back_end)
    similarity.softmax_similarity(
        model, [{"input_ids": prompt(batch=1, length=12)}], max_elements=4 * 12 * 2 * 3, progress=False
    )
    assert most == 4 * 12 * 2 * 3


def test_the_model_is_left_as_it_was():
    model = tiny_model().train()
    before = model(prompt()).logits
    softmax_similarity(model, [{"input_ids": prompt()}], progress=False)
    assert model.training
    assert torch.equal(model(prompt()).logits, before)
    assert not any(hasattr(layer.self_attn.config, "uniattn_original") for layer in model.model.layers)


def test_empty_data_are_refused():
    with pytest.raises(ValueError, match="dataloader is empty"):
        softmax_similarity(tiny_model(), [], progress=False)


def test_an_adapted_model_is_refused():
    with pytest.raises(ValueError, match="has a UniAttn adapter already"):
        softmax_similarity(tiny_adapter().get_base_model(), [{"input_ids": prompt()}], progress=False)
