"""Distillation: losses and gradients as the formula has them; the teacher is the original model; off is off."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import datasets
import pytest
import recipe_ranks
import recipe_runs
import torch
import torch.nn.functional as F
from conftest import changed, prompt, specification, tiny_adapter, tiny_model, weights
from oracle import (
    feed_forward,
    leader_of_each_follower,
    linear,
    mix_values,
    positions,
    rms_norm,
    rotary_angles,
    softmax_activation,
    visible,
)
from recipe_runs import WORDS
from safetensors.torch import load_file
from test_recipe_ranks import FSDP2
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig
from trl import SFTConfig, SFTTrainer

from peft_uniattn import to_standalone
from peft_uniattn.modes import without_adapters
from peft_uniattn.training.distillation import DistillationArguments, DistillationTrainer
from peft_uniattn.training.distillation.comparison import LAST, predicting, watch
from peft_uniattn.training.distillation.losses import divergence, residual_error
from peft_uniattn.training.two_stage import TwoStageRun

BLOCKS = [[0, 1, 2], [3, 4, 5]]
BOTH = {"distillation_alpha": 0.7, "distillation_temperature": 2.0, "distillation_attention_weight": 3.0}
ARGUMENTS = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "seed": 3,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def tokenizer():
    return recipe_runs.tokenizer()


@pytest.fixture
def make(tokenizer, tmp_path):
    """A trainer on texts that count upward; `distillation` is what DistillationArguments takes, None: SFTTrainer."""

    def build(model, distillation=None, *, teacher=None, steps=4, **arguments):
        settings = {**ARGUMENTS, "output_dir": str(tmp_path / "run"), "max_steps": steps, **arguments}
        options = {
            "model": model,
            "args": SFTConfig(**settings),
            "train_dataset": counting(),
            "eval_dataset": counting(),
            "processing_class": tokenizer,
        }
        if distillation is None:
            return SFTTrainer(**options)
        return DistillationTrainer(distillation=DistillationArguments(**distillation), teacher=teacher, **options)

    return build


def base():
    return tiny_model(vocab_size=len(WORDS), dtype=torch.float32, eos_token_id=2)


def standalone():
    return to_standalone(tiny_adapter(base()))


def counting() -> datasets.Dataset:
    """Prompts and completions of unequal lengths that count upward."""
    texts = [[f"w{(start + step) % 29}" for step in range(6 + start % 3)] for start in range(16)]
    halves = [
        (" ".join(words[: 2 + index % 2]), " ".join(words[2 + index % 2 :])) for index, words in enumerate(texts)
    ]
    return datasets.Dataset.from_dict(
        {"prompt": [first for first, _ in halves], "completion": [f" {last}" for _, last in halves]}
    )


def adapter(**config):
    return tiny_adapter(base(), **config).train()


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# The losses by themselves.

TRANSFORMS = {
    "plain": (LlamaConfig(), lambda logits: logits),
    "soft cap": (Gemma2Config(final_logit_softcapping=3.0), lambda logits: 3 * (logits / 3).tanh()),
    "factor": (CohereConfig(logit_scale=0.3), lambda logits: 0.3 * logits),
    "divisor": (GraniteConfig(logits_scaling=4.0), lambda logits: logits / 4),
}


class Headed(torch.nn.Module):
    """As much of a model as the divergence needs."""

    def __init__(self, config, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.config, self.head = config, torch.nn.Linear(16, 50, bias=seed % 2 == 0)

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_and_its_gradients_are_those_of_the_formula(transform, temperature):
    config, applied = TRANSFORMS[transform]
    student, teacher = Headed(config, 1), Headed(config, 2)
    hidden = [torch.randn(7, 16, requires_grad=True) for _ in range(2)]
    loss = divergence(student, hidden[0], teacher, hidden[1], temperature)
    loss.backward()

    exact = copy.deepcopy((student, teacher)), [tensor.detach().double().requires_grad_() for tensor in hidden]
    logits = [
        applied(F.linear(h, model.head.weight.double(), None if model.head.bias is None else model.head.bias.double()))
        for model, h in zip(*exact, strict=True)
    ]
    p, q = ((each / temperature).softmax(-1) for each in reversed(logits))
    expected = temperature**2 * (p.detach() * (p.detach().log() - q.log())).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    gradients = torch.autograd.grad(expected, (exact[1][0], exact[0][0].head.weight))
    torch.testing.assert_close(hidden[0].grad.double(), gradients[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(student.head.weight.grad, gradients[1], rtol=1e-3, atol=1e-5)
    assert hidden[1].grad is None and all(p.grad is None for p in teacher.parameters())


def test_no_logits_are_kept_for_the_backward_pass():
    student, teacher, kept = Headed(LlamaConfig(), 1), Headed(LlamaConfig(), 2), []
    hidden = [torch.randn(64, 16, requires_grad=True) for _ in range(2)]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        divergence(student, hidden[0], teacher, hidden[1], 1.0).backward()
    assert max(kept) == 64 * 16, "hidden states, of which there are more than weights, and fewer than 64 x 50 logits"


def test_the_residual_error_is_a_relative_square_and_its_gradient_is_exact():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 8, dtype=torch.float64, requires_grad=True), torch.randn(5, 8).double()
    expected = sum(((s - t) @ (s - t)) / (t @ t) for s, t in zip(student, teacher, strict=True))
    torch.testing.assert_close(residual_error(student, teacher), expected)
    assert torch.autograd.gradcheck(lambda s: residual_error(s, teacher), (student,))


def test_a_student_that_equals_its_teacher_has_neither_error_nor_gradient():
    same = torch.randn(3, 8, requires_grad=True)
    residual_error(same, same.detach().clone()).backward()
    assert not same.grad.any()


def test_only_positions_whose_next_token_carries_loss_count():
    labels = torch.tensor([[-100, -100, 5, 6], [4, 7, -100, -100]])
    assert predicting(labels).tolist() == [[False, True, True, False], [True, False, False, False]]


# The trainer against the oracle.


def forward(model, ids, superblocks):
    """Logits and the residual stream behind attention of every layer, by the oracle's parts, in float64."""
    spec = specification(model, superblocks)
    weights = {name: tensor.double() for name, tensor in spec["weights"].items()}
    config, compensation = spec["config"], spec["compensation"]
    leaders = leader_of_each_follower(superblocks, config.num_hidden_layers)
    mask = torch.ones_like(ids)
    angles = rotary_angles(config, positions(mask), torch.float64)
    x, s, streams = F.embedding(ids, weights["model.embed_tokens.weight"]), {}, {}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        normed = rms_norm(weights, f"{layer}.input_layernorm", x, config)
        if i not in leaders:
            s[i] = softmax_activation(weights, layer, normed, angles, visible(config, i, mask), config)
        x = x + mix_values(weights, layer, normed, s[leaders.get(i, i)], config)
        if i in leaders:
            x = x + normed @ compensation[i].double()
        streams[i] = x
        x = x + feed_forward(weights, layer, rms_norm(weights, f"{layer}.post_attention_layernorm", x, config), config)
    return linear(weights, "lm_head", rms_norm(weights, "model.norm", x, config)), streams


def test_loss_and_gradients_are_those_of_the_formula(make):
    model = adapter()
    trainer = make(model, BOTH, gradient_checkpointing=False)
    ids = prompt(3, 8, vocab_size=len(WORDS))
    labels = ids.clone()
    labels[0, :4] = labels[1, :2] = labels[2, 6:] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    trainer.compute_loss(model, inputs).backward()
    loss = trainer.compute_loss(model, inputs)

    with torch.no_grad():
        target, original = forward(model, ids, ())
    predicted, streams = forward(model, ids, BLOCKS)
    keep = predicting(labels)
    task = F.cross_entropy(predicted[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    q, p = ((each[keep] / 2.0).log_softmax(-1) for each in (predicted, target))
    kl = 4.0 * (p.exp() * (p - q)).sum(-1).mean()
    errors = [(streams[i] - original[i])[keep].square().sum(-1) / original[i][keep].square().sum(-1) for i in original]
    error = torch.stack([errors[i].mean() for i in (1, 2, 4, 5)]).mean()
    expected = 0.3 * task + 0.7 * kl + 3.0 * error
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter, gradient in zip(trained, torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-2, atol=1e-5)
    assert kl > 1e-3 and error > 1e-3


# The teacher.


def test_the_teacher_is_the_model_without_its_adapter(make):
    model = adapter(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.mul_(2)
    ids = prompt(vocab_size=len(WORDS))
    with torch.no_grad(), without_adapters(model):
        logits = model(ids).logits
    with torch.no_grad():
        assert torch.equal(logits, base()(ids).logits)
        assert not torch.equal(logits, model(ids).logits)


def test_the_teacher_gets_no_gradient_and_is_not_changed(make):
    model = adapter()
    before = weights(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainer = make(model, BOTH)
    trainer.train()
    assert changed(before, weights(model)) == {name for name in before if ".uniattn_" in name}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    assert not any(layer._disable_adapters for layer in model.modules() if hasattr(layer, "_disable_adapters"))


def test_a_trained_head_is_compared_with_the_original_one(make):
    model = adapter(modules_to_save=["lm_head"])
    trainer = make(model, {"distillation_alpha": 1.0}, gradient_checkpointing=False)
    ids = prompt(vocab_size=len(WORDS))
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.mul_(2)
        p, q = (each.logits[:, :-1].log_softmax(-1) for each in (base()(ids), model(ids)))
    loss = trainer.compute_loss(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    torch.testing.assert_close(loss.detach(), (p.exp() * (p - q)).sum(-1).mean(), rtol=1e-3, atol=1e-6)


def test_a_frozen_teacher_stays_as_it_is_while_stage_2_changes_everything(make):
    model, teacher = standalone(), base()
    before, before_teacher = weights(model), weights(teacher)
    make(model, BOTH, teacher=teacher).train()
    assert changed(before, weights(model)) == set(before)
    assert not changed(before_teacher, weights(teacher))
    assert all(parameter.grad is None for parameter in teacher.parameters())


# Training.


@pytest.mark.parametrize("stage", ["stage 1", "stage 2"])
def test_training_brings_the_predictions_nearer_to_the_teacher_s(stage, make):
    model, teacher = (adapter(init_weights=True), None) if stage == "stage 1" else (standalone(), base())
    trainer = make(model, {"distillation_alpha": 1.0}, teacher=teacher, steps=30)
    trainer.train()
    kl = logged(trainer, "distillation_kl")
    assert sum(kl[-5:]) < 0.5 * sum(kl[:5])


def test_training_brings_the_residual_stream_nearer_to_the_teacher_s(make):
    trainer = make(adapter(init_weights=True), {"distillation_attention_weight": 100.0}, steps=30)
    trainer.train()
    errors = logged(trainer, "attention_error")
    assert sum(errors[-5:]) < 0.8 * sum(errors[:5])


@pytest.mark.parametrize("stage", ["stage 1", "stage 2"])
def test_without_weights_it_is_the_plain_trainer_bit_for_bit(stage, make):
    build = adapter if stage == "stage 1" else standalone
    plain, distilled = make(build()), make(build(), {})
    plain.train()
    distilled.train()
    assert logged(plain, "loss") == logged(distilled, "loss")
    assert not changed(weights(plain.model), weights(distilled.model))


def equal_training(first, second) -> None:
    for trainer in (first, second):
        trainer.train()
    torch.testing.assert_close(logged(second, "loss"), logged(first, "loss"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(second.model), weights(first.model), rtol=1e-3, atol=1e-5)


def test_accumulated_micro_batches_are_one_batch(make):
    two = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    equal_training(make(adapter(), BOTH), make(adapter(), BOTH, **two))


def test_gradient_checkpointing_changes_nothing(make):
    equal_training(make(adapter(), BOTH, gradient_checkpointing=False), make(adapter(), BOTH))


def test_padding_free_batches_are_compared_as_padded_ones(make):
    equal_training(make(adapter(), BOTH), make(adapter(), BOTH, padding_free=True, max_length=None))


def test_evaluation_reports_the_plain_task_loss(make):
    model = adapter()
    assert make(model, BOTH).evaluate()["eval_loss"] == make(model).evaluate()["eval_loss"]


def test_what_is_watched_is_what_calibration_compares():
    model, ids, seen = base(), prompt(vocab_size=len(WORDS)), {}
    hooks = [module._forward_hooks for module in model.modules()]
    with torch.no_grad():
        model(ids, output_hidden_states=True)  # transformers installs hooks of its own
    before = [len(each) for each in hooks]
    with torch.no_grad(), watch(model, [0, 4], seen.__setitem__):
        output = model(ids, output_hidden_states=True)
    layer = model.model.layers[4]
    with torch.no_grad():
        behind = output.hidden_states[5] - layer.mlp(layer.post_attention_layernorm(seen[4]))
    torch.testing.assert_close(seen[4], behind, rtol=1e-5, atol=1e-6)
    assert torch.equal(seen[LAST], output.hidden_states[-1])
    assert [len(each) for each in hooks] == before


# The recipe.


def test_the_recipe_distils_the_stages_that_it_is_told_to(tmp_path):
    inputs = recipe_runs.write_inputs(tmp_path)
    flags = {"distillation_alpha": 0.5, "distillation_attention_weight": 1.0, "distillation_stages": "stage2"}
    TwoStageRun(recipe_runs.arguments(inputs, tmp_path / "out", **flags)).run()
    results = json.loads((tmp_path / "out" / "journal.json").read_text())["results"]
    for stage, distilled in (("stage 1", False), ("stage 2", True)):
        steps = [entry for entry in results[stage]["log"] if "loss" in entry]
        assert len(steps) == 4
        for entry in steps:
            assert ({"distillation_kl", "attention_error"} <= entry.keys()) == distilled
    with pytest.raises(ValueError, match=r"distillation_alpha=0\.9 \(was 0\.5\)"):
        TwoStageRun(recipe_runs.arguments(inputs, tmp_path / "out", **{**flags, "distillation_alpha": 0.9})).run()


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["{}", FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_end_where_one_ends(wrapper, tmp_path):
    inputs = recipe_runs.write_inputs(tmp_path)
    settings = {**BOTH, "distillation_stages": "stage1,stage2", "gradient_checkpointing": True}
    TwoStageRun(recipe_runs.arguments(inputs, tmp_path / "one", **settings)).run()
    (tmp_path / "wrapper.yaml").write_text(wrapper)
    settings |= {"per_device_train_batch_size": 2, "config": tmp_path / "wrapper.yaml"}
    recipe_ranks.on_two_ranks(recipe_runs.flags(inputs, tmp_path / "two", **settings), tmp_path / "log")
    for stage in ("stage 1", "stage 2"):
        one, two = (distances(tmp_path / name, stage) for name in ("one", "two"))
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
    for file in ("adapter/adapter_model", "model/model"):
        states = [load_file(tmp_path / name / f"{file}.safetensors") for name in ("two", "one")]
        torch.testing.assert_close(*states, rtol=1e-3, atol=1e-4)


def distances(output_dir: Path, stage: str) -> list[list[float]]:
    log = json.loads((output_dir / "journal.json").read_text())["results"][stage]["log"]
    names = ("loss", "grad_norm", "distillation_kl", "attention_error")
    return [[entry[name] for name in names] for entry in log if "loss" in entry]


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distillation_alpha": 1.5}, "distillation_alpha=1.5"),
        ({"distillation_temperature": 0.0}, "distillation_temperature=0.0"),
        ({"distillation_attention_weight": -1.0}, "distillation_attention_weight=-1.0"),
        ({"distillation_stages": "stage3"}, "distillation_stages='stage3'"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DistillationArguments(**arguments)


def test_stages_without_a_weight_have_no_teacher():
    assert not DistillationArguments(distillation_stages="stage1,stage2").applies_to("stage1")
    both = DistillationArguments(distillation_alpha=0.5, distillation_stages="stage2")
    assert both.applies_to("stage2") and not both.applies_to("stage1")


def test_a_standalone_student_needs_a_teacher(make):
    with pytest.raises(ValueError, match="pass the original model as teacher"):
        make(standalone(), BOTH)


def test_a_model_that_is_not_unified_is_refused(make):
    with pytest.raises(ValueError, match="no UniAttn adapter"):
        make(base(), BOTH, teacher=base())


def test_a_teacher_that_would_move_is_refused(make):
    with pytest.raises(ValueError, match="would be a teacher that moves"):
        make(adapter().requires_grad_(True), BOTH)


def test_a_teacher_of_another_shape_is_refused(make):
    teacher = tiny_model(vocab_size=len(WORDS) + 1)
    with pytest.raises(ValueError, match=f"teacher has vocab_size={len(WORDS) + 1}"):
        make(standalone(), BOTH, teacher=teacher)


def test_compiled_training_is_refused(make):
    with pytest.raises(ValueError, match="torch_compile=True"):
        make(adapter(), BOTH, torch_compile=True)
