"""cuDNN's attention takes part in training only where its gradients are numbers."""

from __future__ import annotations

import pytest
import recipe_runs
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from trl import SFTTrainer

from peft_uniattn.training import sound_attention as module
from peft_uniattn.training.main import main
from peft_uniattn.training.sound_attention import has_sound_gradient, sound_attention

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cudnn_as_before():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.fixture
def unsound(monkeypatch):
    monkeypatch.setattr(module, "has_sound_gradient", lambda device: False)


def test_cudnn_is_left_out_and_comes_back(unsound):
    with sound_attention(CPU):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_cudnn_comes_back_after_an_error(unsound):
    with pytest.raises(KeyboardInterrupt), sound_attention(CPU):
        raise KeyboardInterrupt
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_user_is_told_why(unsound, caplog):
    with sound_attention(CPU):
        pass
    assert "cuDNN's attention has gradients of NaN" in caplog.text


def test_a_sound_back_end_stays(monkeypatch):
    monkeypatch.setattr(module, "has_sound_gradient", lambda device: True)
    with sound_attention(CPU):
        assert torch.backends.cuda.cudnn_sdp_enabled()


def test_what_a_user_has_left_out_stays_out(unsound):
    torch.backends.cuda.enable_cudnn_sdp(False)
    with sound_attention(CPU):
        pass
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_cpu_has_no_cudnn_to_ask():
    assert has_sound_gradient(CPU)


def test_the_recipe_trains_without_an_unsound_back_end(unsound, tmp_path, monkeypatch):
    training_step, seen = SFTTrainer.training_step, []

    def watched(self, *args, **kwargs):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "training_step", watched)
    main(recipe_runs.flags(recipe_runs.write_inputs(tmp_path), tmp_path / "run"))
    assert seen and not any(seen)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [64, 192, 256, 704])
def test_gradients_are_those_of_the_formula_where_scores_are_far_below_zero(length):
    device = torch.device("cuda")
    generator = torch.Generator().manual_seed(0)
    query, key, value, upstream = torch.randn(4, 1, 2, length, 64, generator=generator)
    query, key = 0.1 * query, 0.1 * key
    query[..., 0], key[..., 0] = 1.0, -960.0
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    states = [state.to(torch.bfloat16) for state in (query, key, value, upstream)]

    def gradients(*states, mask):
        *inputs, upstream = states
        inputs = [state.detach().requires_grad_() for state in inputs]
        return torch.autograd.grad(scaled_dot_product_attention(*inputs, attn_mask=mask), inputs, upstream)

    with sdpa_kernel(SDPBackend.MATH):
        expected = gradients(*(state.double() for state in states), mask=mask)
    with sound_attention(device):
        found = gradients(*(state.to(device) for state in states), mask=mask.to(device))
    for mine, formula in zip(found, expected, strict=True):
        assert mine.isfinite().all()
        # The first coordinate of q's gradient is 960 times a sum that is zero, of which rounding leaves anything.
        mine, formula = mine.double().cpu()[..., 1:], formula[..., 1:]
        assert (mine - formula).norm() < 0.02 * formula.norm()
