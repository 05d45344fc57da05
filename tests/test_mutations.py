"""Deliberate faults: each makes a check of the family suite fail for every family that it concerns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import family_checks as checks
import pytest
from family_models import CASES, MIXED, Case
from torch import nn
from torch.utils.checkpoint import CheckpointError

from peft_uniattn import UniAttnLayer, attention, handover
from peft_uniattn.handover import HANDOVER, Handover

NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm", "qk_norm")
take, cache_values, compensate, forward = (
    Handover.take,
    attention.cache_values,
    UniAttnLayer._compensate,
    UniAttnLayer.forward,
)


def keep_state_across_forwards(patch: pytest.MonkeyPatch) -> None:
    kept = Handover()
    patch.setattr(handover, "_start_handover", lambda module, args, kwargs: (args, {**kwargs, HANDOVER: kept}))


def detach_queries_and_keys_of_the_leader(patch: pytest.MonkeyPatch) -> None:
    def detached(self, layer):
        state = take(self, layer)
        return replace(state, query=state.query.detach(), key=state.key.detach())

    patch.setattr(Handover, "take", detached)


def take_each_value_of_the_cache_from_the_token_before(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attention, "cache_values", lambda *args: cache_values(*args).roll(1, dims=2))


def use_the_mask_of_the_follower(patch: pytest.MonkeyPatch) -> None:
    def own_mask(self, hidden_states, *args, **kwargs):
        with pytest.MonkeyPatch.context() as inner:
            if self.uniattn_leader["default"] != self.layer_idx:
                mask = kwargs["attention_mask"]
                inner.setattr(
                    Handover, "take", lambda this, layer: replace(take(this, layer), mask=mask, probabilities=None)
                )
            return forward(self, hidden_states, *args, **kwargs)

    patch.setattr(UniAttnLayer, "forward", own_mask)


def ignore_the_softcap(patch: pytest.MonkeyPatch) -> None:
    def without(self, layer):
        state = take(self, layer)
        return replace(state, kwargs={**state.kwargs, "softcap": None}, probabilities=None)

    patch.setattr(Handover, "take", without)


def ignore_the_norms_of_queries_and_keys(patch: pytest.MonkeyPatch) -> None:
    def without(self, hidden_states, *args, **kwargs):
        if self.uniattn_leader["default"] != self.layer_idx:
            return forward(self, hidden_states, *args, **kwargs)
        with pytest.MonkeyPatch.context() as inner:
            for name in norms_of(self.base_layer):
                inner.setattr(getattr(self.base_layer, name), "forward", lambda x: x)
            forward(self, hidden_states, *args, **kwargs)  # hands over
        kwargs.pop(HANDOVER)
        return forward(self, hidden_states, *args, **kwargs)

    patch.setattr(UniAttnLayer, "forward", without)


def halve_the_compensation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(UniAttnLayer, "_compensate", lambda *args: compensate(*args) / 2)


def use_the_sinks_of_the_follower(patch: pytest.MonkeyPatch) -> None:
    follow = attention.follow

    def own_sinks(module, family, leader_idx, hidden_states, given, *args):
        class Own:
            def take(self, layer):
                return replace(given.take(layer), attention=module, probabilities=None)

        return follow(module, family, leader_idx, hidden_states, Own(), *args)

    patch.setattr("peft_uniattn.layer.follow", own_sinks)


def norms_of(module: nn.Module) -> list[str]:
    return [name for name in NORMS if isinstance(getattr(module, name, None), nn.Module)]


def leader_of(case: Case) -> nn.Module:
    return checks.attention_modules(case.base())[1]


def check_reconstruction(case: Case) -> None:
    checks.check_reconstruction(case, "eager")


# What is broken, the check that notices, and whom it concerns.
FAULTS: list[tuple[Callable, Callable, Callable]] = [
    (keep_state_across_forwards, lambda case: checks.check_checkpointing(case, "eager"), lambda case: True),
    (detach_queries_and_keys_of_the_leader, lambda case: checks.check_gradient(case, "eager"), lambda case: True),
    (
        take_each_value_of_the_cache_from_the_token_before,
        lambda case: checks.check_cache(case, "eager", "dynamic"),
        lambda case: True,
    ),
    (
        use_the_mask_of_the_follower,
        check_reconstruction,
        lambda case: case.family in MIXED and case.follower_mask == "leader",
    ),
    (
        ignore_the_softcap,
        check_reconstruction,
        lambda case: getattr(case.base().config, "attn_logit_softcapping", None) is not None,
    ),
    (ignore_the_norms_of_queries_and_keys, check_reconstruction, lambda case: bool(norms_of(leader_of(case)))),
    (halve_the_compensation, check_reconstruction, lambda case: True),
    (use_the_sinks_of_the_follower, check_reconstruction, lambda case: hasattr(leader_of(case), "sinks")),
]


@pytest.mark.parametrize(
    ("case", "fault", "check"),
    [
        pytest.param(case, fault, check, id=f"{case}-{fault.__name__}")
        for fault, check, concerns in FAULTS
        for case in CASES
        if concerns(case)
    ],
)
def test_a_deliberate_fault_is_noticed(case, fault, check, monkeypatch):
    fault(monkeypatch)
    # Experts that are chosen otherwise when a layer is computed again are noticed by torch, some faults by the probe.
    with pytest.raises((AssertionError, CheckpointError, ValueError)) as caught:
        check(case)
    if isinstance(caught.value, ValueError):
        assert "softmax sharing does not reproduce decoder layer" in str(caught.value)


def test_every_fault_concerns_a_family():
    assert all(any(concerns(case) for case in CASES) for _, _, concerns in FAULTS)
