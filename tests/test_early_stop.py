"""The early stop of stage 1: on synthetic losses, and in a trainer that is interrupted."""

from __future__ import annotations

import json
import math
import random

import pytest
import recipe_runs
import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from peft_uniattn.training.early_stop import EarlyStop
from peft_uniattn.training.two_stage import TwoStageRun


@pytest.fixture
def arguments(tmp_path):
    return TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", eval_strategy="steps", eval_steps=1
    )


@pytest.fixture
def stop_step(arguments):
    """The step at which a callback stops on losses that are logged every `every` steps; None if it never does."""

    def run(callback, losses, *, every=1):
        state, control = TrainerState(stateful_callbacks=[]), TrainerControl()
        callback.on_train_begin(arguments, state, control)
        for step in range(every, len(losses) + 1, every):
            state.global_step = step
            mean = sum(losses[step - every : step]) / every
            if callback.metric == "train_loss":
                callback.on_log(arguments, state, control, logs={"loss": mean, "learning_rate": 1.0})
            else:
                callback.on_evaluate(arguments, state, control, metrics={"eval_loss": mean})
            if control.should_training_stop:
                return step
        return None

    return run


def descending(count, slope=0.001):
    return [5 - slope * step for step in range(count)]


def falling_then_flat(fall, flat):
    return [3 + 2 * math.exp(-step / (fall / 5)) for step in range(fall)] + [3.0] * flat


def noise(count, size, seed=0):
    generator = random.Random(seed)
    return [generator.gauss(0, size) for _ in range(count)]


def average_by_definition(losses, decay):
    weights = [(1 - decay) * decay ** (len(losses) - 1 - index) for index in range(len(losses))]
    weights[0] = decay ** (len(losses) - 1)
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True))


def test_a_loss_that_descends_never_stops(stop_step):
    assert stop_step(EarlyStop(), descending(3000)) is None


def test_a_plateau_stops_after_patience_and_not_before(stop_step):
    losses = [5.0] * 50
    assert stop_step(EarlyStop(patience=10), losses) == 11
    assert stop_step(EarlyStop(patience=50), losses) is None


def test_a_fall_to_a_plateau_stops_once_the_average_has_come_down(stop_step):
    losses = falling_then_flat(500, 4000)
    stopped = stop_step(EarlyStop(decay=0.9, patience=100, min_delta=1e-4), losses)
    assert 500 < stopped < 800


def test_a_rising_loss_stops(stop_step):
    assert stop_step(EarlyStop(decay=0.9, patience=20), descending(100, slope=-0.01)) == 21


def test_noise_on_a_descent_does_not_stop_where_the_loss_itself_would(stop_step):
    losses = [loss + wobble for loss, wobble in zip(descending(2000), noise(2000, 0.3), strict=True)]
    assert stop_step(EarlyStop(decay=0.99, patience=100), losses) is None
    assert stop_step(EarlyStop(decay=0.0, patience=100), losses) is not None


def test_noise_on_a_plateau_stops(stop_step):
    losses = [3 + wobble for wobble in noise(4000, 0.3)]
    assert stop_step(EarlyStop(decay=0.99, patience=200, min_delta=0.01), losses) is not None


def test_a_spike_on_a_descent_does_not_stop(stop_step):
    losses = descending(1000)
    losses[500] += 10
    assert stop_step(EarlyStop(decay=0.9, patience=100), losses) is None


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_the_average_alone(stop_step, wrong):
    losses = descending(300)
    losses[100] = wrong
    callback = EarlyStop(decay=0.9, patience=50)
    assert stop_step(callback, losses) is None
    assert math.isfinite(callback.average) and callback.best == callback.average


def test_a_run_that_has_diverged_stops(stop_step):
    assert stop_step(EarlyStop(patience=50), descending(100) + [math.nan] * 100) == 150
    assert stop_step(EarlyStop(patience=50), [math.nan] * 100) == 50


def test_the_average_is_the_exponential_one(stop_step):
    losses = [4 + wobble for wobble in noise(40, 1.0)]
    callback = EarlyStop(decay=0.8, patience=1000)
    stop_step(callback, losses)
    assert callback.average == pytest.approx(average_by_definition(losses, 0.8), rel=1e-12)


@pytest.mark.parametrize("every", [2, 5, 10])
def test_how_often_losses_are_logged_hardly_matters(stop_step, every):
    fall = descending(500, slope=0.004)
    losses = fall + fall[::-1]
    expected = stop_step(EarlyStop(decay=0.95, patience=100), losses)
    assert 600 < expected < 620
    assert stop_step(EarlyStop(decay=0.95, patience=100), losses, every=every) == pytest.approx(expected, abs=every)


def test_a_smaller_fall_than_min_delta_counts_as_none(stop_step):
    losses = descending(500, slope=0.0001)
    assert stop_step(EarlyStop(decay=0.0, patience=50), losses) is None
    assert stop_step(EarlyStop(decay=0.0, patience=50, min_delta=0.01), losses) == 51


def test_by_evaluation_loss_it_is_the_loss_itself_that_counts(stop_step):
    losses = [5.0, 4.0, 3.0, 3.5, 3.4, 3.3, 3.2, 2.9]
    assert stop_step(EarlyStop("eval_loss", patience=3), losses) == 6
    assert stop_step(EarlyStop("eval_loss", patience=5), losses) is None


def test_by_evaluation_loss_training_losses_do_not_count_and_the_other_way_round(arguments):
    state, control = TrainerState(stateful_callbacks=[]), TrainerControl()
    for callback in (EarlyStop("eval_loss", patience=1), EarlyStop("train_loss", patience=1)):
        for step in range(1, 5):
            state.global_step = step
            if callback.metric == "eval_loss":
                callback.on_log(arguments, state, control, logs={"loss": 1.0})
            else:
                callback.on_evaluate(arguments, state, control, metrics={"eval_loss": 1.0})
        assert not control.should_training_stop and callback.average is None


def test_by_evaluation_loss_without_evaluations_is_refused(arguments):
    arguments.eval_strategy = "no"
    with pytest.raises(ValueError, match="eval_strategy"):
        EarlyStop("eval_loss").on_train_begin(arguments, TrainerState(stateful_callbacks=[]), TrainerControl())


@pytest.mark.parametrize(
    "wrong", [{"decay": 1.0}, {"decay": -0.1}, {"patience": 0}, {"min_delta": -1}, {"metric": "loss"}]
)
def test_arguments_out_of_range_are_refused_by_name(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        EarlyStop(**wrong)


def test_its_state_is_plain_json_and_makes_the_same_callback(stop_step):
    callback = EarlyStop(decay=0.5, patience=7)
    stop_step(callback, [3.0, 2.0, 2.5])
    other = EarlyStop.from_state(json.loads(json.dumps(callback.state())))
    assert other.state() == callback.state()


class Prescribed(torch.nn.Module):
    """A model whose loss at every step is given."""

    def __init__(self, losses):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.losses = losses

    def forward(self, step):
        return {"loss": torch.tensor(self.losses)[step].mean() + 0 * self.weight}


LOSSES = [5.0, 4.0, 3.0, 2.0, 2.5, 2.6, 2.7, 2.8, 2.9, 3.0, 3.0, 3.0]


@pytest.fixture
def train(tmp_path):
    """Train on prescribed losses and return the trainer; step i sees loss i."""

    def run(callback, *, resume=None, **settings):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            num_train_epochs=1,
            per_device_train_batch_size=1,
            logging_steps=1,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
            **{"save_strategy": "steps", "save_steps": 3, **settings},
        )
        trainer = Trainer(
            Prescribed(LOSSES),
            arguments,
            train_dataset=[{"step": index} for index in range(len(LOSSES))],
            eval_dataset=[{"step": 0}],
            callbacks=[callback],
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def test_in_a_trainer_it_stops_and_writes_no_checkpoint_there(train, tmp_path):
    callback = EarlyStop(decay=0.0, patience=5)
    assert train(callback).state.global_step == callback.stopped_at == 9
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}


@pytest.mark.parametrize("save", [{"save_steps": 1}, {"save_steps": 6}])
def test_a_continued_run_stops_where_the_uninterrupted_one_did(train, tmp_path, save):
    whole = EarlyStop(decay=0.3, patience=5)
    train(whole, **save)
    assert whole.stopped_at == 9
    again = EarlyStop(decay=0.3, patience=5)
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert int(checkpoints[-1].name.split("-")[1]) < whole.stopped_at
    assert train(again, resume=str(checkpoints[-1]), **save).state.global_step == whole.stopped_at
    assert again.state() == whole.state()


def test_a_callback_that_has_been_used_starts_afresh(train):
    callback = EarlyStop(decay=0.0, patience=5)
    first, second = train(callback).state.global_step, train(callback).state.global_step
    assert first == second == 9


@pytest.mark.parametrize(
    "by", [{"stage1_early_stop": "train_loss"}, {"stage1_early_stop": "eval_loss", "eval_strategy": "steps"}]
)
def test_the_recipe_stops_stage_1_and_only_stage_1(tmp_path, by):
    inputs = recipe_runs.write_inputs(tmp_path)
    # No loss falls by 100 nats, so the first two steps without a new minimum are the last.
    never = {"stage1_early_stop_patience": 2, "stage1_early_stop_min_delta": 100.0, "eval_steps": 1}
    arguments = recipe_runs.arguments(inputs, tmp_path / "out", stage1_max_steps=9, **by, **never)
    TwoStageRun(arguments).run()
    steps = {stage: recipe_runs.losses(tmp_path / "out", stage)[-1][0] for stage in ("stage 1", "stage 2")}
    assert steps == {"stage 1": 3, "stage 2": 4}


def test_the_recipe_refuses_evaluation_loss_without_evaluations_before_anything_runs(tmp_path):
    named = {"model_name_or_path": "never-loaded", "dataset_name": "never-read.jsonl"}
    with pytest.raises(ValueError, match="stage1_early_stop='eval_loss' needs evaluations"):
        recipe_runs.arguments(named, tmp_path, stage1_early_stop="eval_loss")
