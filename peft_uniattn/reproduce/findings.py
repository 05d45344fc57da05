"""What the rows of the tables depend on, found on the base model once and kept on disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import PreTrainedModel

from ..evaluation import check_contamination, check_has_accuracy, task_questions
from ..grouping.choose import ONE_PASS, choose
from ..inspection import find_adapter
from ..plan import Plan
from ..rivals import half_of, measure_attention_similarity
from ..training.arguments import Arguments
from ..training.data import LoadedData, batches, load_data
from ..training.journal import write_atomically
from ..training.loading import check_model, load_model, load_tokenizer
from .cell import Evaluation
from .matrix import Findings
from .record import without_folders
from .same import refuse_other_settings

GROUPINGS = ("fixed", "error", "loss")
# Arguments that say which Superblocks are meant.
_PLAN = ("superblocks", "superblock_size", "start_layer", "end_layer", "follower_mask")


def find(
    arguments: Arguments,
    path: Path,
    *,
    tables: Sequence[str],
    evaluation: Evaluation,
    seeds: Sequence[int],
    grouping: str = "fixed",
    grouping_model: str | None = None,
) -> Findings:
    """
    Measure what `tables` depend on, or read what was measured before.

    On the way it makes sure that no evaluation question is among the training data, unless that was found out before
    for the same data and questions.

    Args:
        arguments: what all rows share.
        path: file to keep the findings in.
        tables: which tables are wanted.
        evaluation: what the rows will be asked.
        seeds: that the rows are trained with, which decide what a sample of the data holds.
        grouping: "fixed" takes the Superblocks that the arguments mean; "error" and "loss" those of least calibration
            error or loss with as many followers, see [`~peft_uniattn.choose_superblocks`].
        grouping_model: what "error" and "loss" are measured on, by default the base. The base, post-trained on the
            same data, knows the task, of which the base may know nothing.

    Raises:
        ValueError: if training data hold evaluation questions, a task has no accuracy, the plan does not fit the
            model, or what was measured before was for another model, other data or other Superblocks. On how many
            examples may differ.
    """
    told = _told(arguments, grouping, grouping_model)
    asked = _asked(arguments, evaluation, seeds)
    found, told_before, checked = _read(path) if path.exists() else (None, None, None)
    if told_before is not None:
        refuse_other_settings(path, told_before, told)
    with_groups = "grouping" in tables
    if found and checked == asked and (found.by_error or not with_groups):
        return found
    check_model(arguments.model)
    check_has_accuracy(evaluation.tasks, data_dir=evaluation.data_dir)
    tokenizer = load_tokenizer(arguments.model, arguments.training)
    load = partial(load_data, tokenizer=tokenizer, max_length=arguments.training.max_length or sys.maxsize)
    questions = task_questions(evaluation.tasks, data_dir=evaluation.data_dir)
    # Nothing is left out here, since what is held out with one seed is trained on with another.
    everything = replace(arguments.data, test_size=0)
    for seed in seeds if _is_sampled(arguments) else seeds[:1]:
        texts = [tokenizer.decode(row["input_ids"]) for row in load(everything, seed=seed).train]
        for name, asked_there in questions.items():
            check_contamination(texts, asked_there, name=name)

    if found is None or (with_groups and not found.by_error):
        data = load(arguments.data, seed=arguments.training.seed)
        loader = partial(_batches, data, arguments, tokenizer.pad_token_id)
        model = load_model(arguments.model, arguments.training).to(arguments.training.device)
        found = found or _plans(model, arguments, loader, grouping, grouping_model)
        if with_groups:
            found = replace(found, **_groups(model, loader, found.fixed))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({**asdict(found), "told": told, "checked": asked}, indent=2) + "\n")
    return found


Loader = Callable[[], Iterator[dict[str, torch.Tensor]]]


def _plans(
    model: PreTrainedModel, arguments: Arguments, loader: Loader, grouping: str, grouping_model: str | None
) -> Findings:
    """The Superblocks of the rows and the layers' similarity; `model` is left as it is."""
    adapted = get_peft_model(model, arguments.plan.peft_config())
    plan = find_adapter(adapted).plan
    model = adapted.unload()
    similarity = measure_attention_similarity(model, loader())
    if grouping == "fixed":
        return Findings(plan, half_of(plan), similarity)
    followers = len(plan.followers)
    measured = model if grouping_model is None else _load(arguments, grouping_model)
    choice = choose(measured, loader(), followers=followers, method=grouping)
    chosen, half = (
        replace(plan, superblocks=as_blocks(superblocks))
        for superblocks in (choice.superblocks, choice.with_followers(-(-followers // 2)))
    )
    return Findings(chosen, half, similarity, given=plan)


def _groups(model: PreTrainedModel, loader: Loader, fixed: Plan) -> dict[str, dict[int, list[list[int]]]]:
    """The Superblocks that the fixed ones are compared with, by how and for how many followers they were chosen."""
    numbers = _numbers_of_followers(fixed)
    choices = {method: choose(model, loader(), followers=max(numbers), method=method) for method in ONE_PASS}
    return {
        f"by_{method}": {number: choice.with_followers(number) for number in numbers}
        for method, choice in choices.items()
    }


def _told(arguments: Arguments, grouping: str, grouping_model: str | None) -> dict[str, Any]:
    """What decides about findings, as JSON types."""
    plan = {name: getattr(arguments.plan, name) for name in _PLAN}
    model = arguments.model.model_name_or_path
    told = {"model_name_or_path": model, **asdict(arguments.data), **plan}
    return without_folders({**told, "grouping": grouping, "grouping_model": grouping_model})


def _asked(arguments: Arguments, evaluation: Evaluation, seeds: Sequence[int]) -> dict[str, Any]:
    """Which training data were searched for the questions of which sets, as JSON types."""
    # Earlier releases searched what one seed trains on, and said nothing of rows.
    data = {**asdict(arguments.data), "max_length": arguments.training.max_length, "rows": "all"}
    if _is_sampled(arguments):
        data["seeds"] = sorted(seeds)
    return json.loads(json.dumps({"data": data, "tasks": evaluation.tasks, "data_dir": evaluation.data_dir}))


def _is_sampled(arguments: Arguments) -> bool:
    """Whether seeds decide which rows of the data are read."""
    return arguments.data.max_rows is not None and not arguments.data.dataset_streaming


def _batches(data: LoadedData, arguments: Arguments, pad_token_id: int) -> Iterator[dict[str, Any]]:
    examples = Dataset.from_list(list(data.train.take(arguments.recipe.calibration_examples)))
    size = arguments.training.per_device_eval_batch_size
    return batches(examples, size, pad_token_id, arguments.training.device)


def _load(arguments: Arguments, name: str) -> PreTrainedModel:
    named = replace(arguments.model, model_name_or_path=name)
    return load_model(named, arguments.training).to(arguments.training.device)


def _numbers_of_followers(plan: Plan) -> list[int]:
    """Of the plans that the fixed grouping is compared on: the upper Superblocks, one more each time."""
    blocks = plan.superblocks[::-1]
    return [sum(len(block) - 1 for block in blocks[:count]) for count in range(1, len(blocks) + 1)]


def _read(path: Path) -> tuple[Findings, dict[str, Any] | None, dict[str, Any] | None]:
    """The findings, and what `_told` and `_asked` then said; None in a file of an earlier release."""
    content = json.loads(path.read_text())
    numbered = {
        name: {int(followers): blocks for followers, blocks in content[name].items()}
        for name in ("by_error", "by_similarity")
    }
    # `given` came later than the others, and is often not there.
    plans = {
        name: Plan(as_blocks(content[name]["superblocks"]), content[name]["num_layers"])
        for name in ("plan", "half", "given")
        if content.get(name)
    }
    found = Findings(similarity=content["similarity"], **plans, **numbered)
    return found, content.get("told"), content.get("checked")


def as_blocks(superblocks: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(block) for block in superblocks)
