"""
32 steps of training end where a slow reference in float64 ends: losses, log-probabilities and all parameters.

The reference is the formula in plain PyTorch (`families_oracle.py`) under the same optimizer, from the same weights
and on the same batches. Stage 1 trains the compensation alone, stage 2 everything in the standalone model.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import specification
from families_oracle import STYLES, family_logits
from family_models import BLOCKS, Case, family_model
from peft import get_peft_model
from transformers import DynamicCache

from peft_uniattn import UniAttnConfig, kernels, to_standalone

STEPS = 32
BATCH, LENGTH, VOCABULARY = 4, 16, 97
LEARNING_RATE = {"stage 1": 1e-2, "stage 2": 3e-3}
TOP = 5
# What the families have besides sizes; Granite's factors are 1 unless they are set.
CHANGES = {
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.0,
    }
}
# Largest differences from the reference in float32: of losses, of log-probabilities, and of parameters relative to how
# far training moved them. In bfloat16, what the formula itself loses there, run the same way, times a margin.
LIMITS = (1e-4, 5e-4, 3e-4)
MARGIN = 2.5

every_stage = pytest.mark.parametrize("stage", LEARNING_RATE)
every_precision = pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16"])


def build(family: str, stage: str, sizes: dict | None = None, **config):
    """A model in float32 that is to be trained: the adapter, or the standalone model it makes."""
    case = Case(family, "leader" if family == "gemma2" else "own")
    changes = {**case.masks, **CHANGES.get(family, {}), **(sizes or {})}
    base = family_model(family, back_end=case.back_ends[-1], dtype=torch.float32, **changes)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(std=0.1) if parameter.ndim > 1 else parameter.add_(
                torch.randn_like(parameter), alpha=0.1
            )
    settings = {"superblocks": BLOCKS, "follower_mask": case.follower_mask, "init_weights": False, **config}
    model = get_peft_model(base, UniAttnConfig(task_type="CAUSAL_LM", **settings))
    return model if stage == "stage 1" else to_standalone(model)


def batch(step: int) -> dict[str, torch.Tensor]:
    """Rows that count up in steps of a row's own, some shorter than others: something that can be learnt."""
    draw = torch.Generator().manual_seed(step)
    start = torch.randint(0, VOCABULARY, (BATCH, 1), generator=draw)
    stride = torch.randint(1, 4, (BATCH, 1), generator=draw)
    # None is 0, the padding, whose embedding transformers does not train.
    ids = (start + stride * torch.arange(LENGTH)) % (VOCABULARY - 1) + 1
    mask = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 3], [LENGTH], [LENGTH // 2]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


def optimizer(parameters, stage: str) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE[stage], eps=1e-6, weight_decay=0.01)


class Formula(torch.nn.Module):
    """The formula as a model: the parameters of `model` in float64, or in float32 to compute in mixed precision."""

    def __init__(self, model, dtype: torch.dtype = torch.float64, blocks=BLOCKS) -> None:
        super().__init__()
        self.config, self.blocks = model.config, blocks
        self.weights = {
            name: parameter.detach().cpu().to(dtype, copy=True).requires_grad_(parameter.requires_grad)
            for name, parameter in model.named_parameters()
        }

    def named_parameters(self):
        return self.weights.items()

    def parameters(self):
        return self.weights.values()

    def forward(self, input_ids, attention_mask, labels=None, **_):
        of = specification(self, self.blocks)
        logits = family_logits(**of, input_ids=input_ids, attention_mask=attention_mask)
        predicted = logits[:, :-1].flatten(0, 1)
        loss = None if labels is None else F.cross_entropy(predicted, labels[:, 1:].flatten(), ignore_index=-100)
        return SimpleNamespace(loss=loss, logits=logits)


@dataclass
class Run:
    """What came of training: losses, the last log-probabilities (tokens, vocabulary), and parameters by name."""

    losses: list[float]
    log_probabilities: torch.Tensor
    parameters: dict[str, torch.Tensor]


def train(model, stage: str, mixed: bool = False) -> Run:
    """32 steps; mixed precision as trainers have it, bfloat16 over weights in float32."""
    device = next(iter(model.parameters())).device
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=mixed)
    steps = optimizer([parameter for parameter in model.parameters() if parameter.requires_grad], stage)
    losses = []
    model.train()
    for step in range(STEPS):
        inputs = {name: tensor.to(device) for name, tensor in batch(step).items()}
        with autocast():
            loss = model(**inputs, use_cache=False).loss
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    unseen = {name: tensor.to(device) for name, tensor in batch(STEPS).items()}
    with torch.no_grad(), autocast():
        logits = model.eval()(input_ids=unseen["input_ids"], attention_mask=unseen["attention_mask"]).logits
    found = logits.double().log_softmax(-1)[unseen["attention_mask"].bool()].cpu()
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    return Run(losses, found, {name: tensor.detach().double().cpu() for name, tensor in trained.items()})


def differences(run: Run, reference: Run, start: dict[str, torch.Tensor]) -> tuple[float, float, float]:
    """
    Of losses, of the reference's `TOP` log-probabilities of every token, and of parameters relative to how far the
    reference moved them from `start`.
    """
    losses = max(abs(mine - theirs) for mine, theirs in zip(run.losses, reference.losses, strict=True))
    top = reference.log_probabilities.topk(TOP)
    likely = (run.log_probabilities.gather(-1, top.indices) - top.values).square().mean().sqrt().item()
    ends = reference.parameters
    assert run.parameters.keys() == ends.keys()
    apart = torch.cat([(run.parameters[name] - ends[name]).flatten() for name in ends])
    moved = torch.cat([(start[name] - ends[name]).flatten() for name in ends])
    return losses, likely, (apart.norm() / moved.norm()).item()


def compare(model, stage: str, mixed: bool, blocks=BLOCKS) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """How far the model ends from the formula in float64, and how far it may."""
    formulas = [Formula(model, dtype, blocks) for dtype in (torch.float64, torch.float32)]
    start = {name: tensor.detach().clone() for name, tensor in formulas[0].named_parameters()}
    reference = train(formulas[0], stage)
    assert sum(reference.losses[-8:]) < sum(reference.losses[:8]), "nothing is learnt"
    limits = LIMITS
    if mixed:
        limits = tuple(MARGIN * own for own in differences(train(formulas[1], stage, mixed), reference, start))
    return differences(train(model, stage, mixed), reference, start), limits


def check(model, stage: str, mixed: bool) -> None:
    found, limits = compare(model, stage, mixed)
    assert all(mine <= limit for mine, limit in zip(found, limits, strict=True)), (found, limits)


def checkpointed(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model


@every_stage
@every_precision
def test_training_ends_where_the_formula_ends(stage, mixed):
    model = build("llama", stage)
    check(checkpointed(model) if mixed else model, stage, mixed)


@every_precision
def test_the_comparison_notices_one_more_follower(mixed):
    found, limits = compare(build("llama", "stage 1"), "stage 1", mixed, blocks=[[0, 1, 2, 3], [4, 5]])
    assert all(mine > 2 * limit for mine, limit in zip(found, limits, strict=True)), (found, limits)


@pytest.mark.slow
@pytest.mark.parametrize("family", STYLES)
@every_stage
@every_precision
@pytest.mark.parametrize("prepare", [lambda model: model, checkpointed], ids=["not_checkpointed", "checkpointed"])
@pytest.mark.parametrize("r", [None, 4], ids=["full", "low_rank"])
def test_training_of_every_family_ends_where_the_formula_ends(family, stage, mixed, prepare, r):
    check(prepare(build(family, stage, r=r)), stage, mixed)


@torch.no_grad()
def decoded(model, mode: str) -> torch.Tensor:
    """Log-probabilities of the first unseen row, (tokens, vocabulary), token by token with these kernels."""
    kernels.use(mode)
    cache, found = DynamicCache(config=model.config), []
    for token in batch(STEPS)["input_ids"][0]:
        found.append(model(token.view(1, 1).to(model.device), past_key_values=cache, use_cache=True).logits[0])
    return torch.cat(found).cpu().double().log_softmax(-1)


@pytest.mark.gpu
@every_stage
def test_kernels_decode_what_training_led_to(stage, monkeypatch):
    """On a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter, which has no bfloat16."""
    pytest.importorskip("triton")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    device, dtype = ("cpu", torch.float16) if interpreted else ("cuda", torch.bfloat16)
    from peft_uniattn.kernels import decode

    called, lead = [], decode.leader_decode
    monkeypatch.setattr(decode, "leader_decode", lambda *a, **k: (called.append(1), lead(*a, **k))[1])
    monkeypatch.setattr(kernels, "_mode", None)
    model = build("llama", stage, sizes={"hidden_size": 64, "head_dim": 16}).to(device)
    reference = train(Formula(model), stage)
    train(model, stage)
    model = model.to(dtype)
    expected = reference.log_probabilities[:LENGTH]
    without, kernel = (decoded(model, mode) for mode in ("off", "triton"))
    assert len(called) == LENGTH * len(BLOCKS)
    assert (kernel - expected).norm() < MARGIN * (without - expected).norm() < 0.1 * expected.norm()
