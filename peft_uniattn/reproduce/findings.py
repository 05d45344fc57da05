"""What the rows of the tables depend on, found on the base model once and kept on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import PreTrainedModel

from ..evaluation import check_contamination, task_questions
from ..grouping.choose import choose
from ..inspection import find_adapter
from ..plan import Plan
from ..rivals import half_of, measure_attention_similarity
from ..training.arguments import Arguments
from ..training.data import LoadedData, batches, load_data
from ..training.journal import write_atomically
from ..training.loading import check_model, load_model, load_tokenizer
from .cell import Evaluation
from .matrix import Findings

GROUPINGS = ("fixed", "error", "loss")


def find(
    arguments: Arguments,
    path: Path,
    *,
    tables: Sequence[str],
    evaluation: Evaluation,
    grouping: str = "fixed",
    grouping_model: str | None = None,
) -> Findings:
    """
    Measure what `tables` depend on, or read it if it was measured before.

    On the way it makes sure that no evaluation question is among the training data.

    Args:
        arguments: what all rows share.
        path: file to keep the findings in.
        tables: which tables are wanted.
        evaluation: what the rows will be asked.
        grouping: "fixed" takes the Superblocks that the arguments mean; "error" and "loss" those of least calibration
            error or loss with as many followers, see [`~peft_uniattn.choose_superblocks`].
        grouping_model: what "error" and "loss" are measured on, by default the base. The base, post-trained on the
            same data, knows the task, of which the base may know nothing.

    Raises:
        ValueError: if training data hold evaluation questions, or the plan does not fit the model.
    """
    if path.exists():
        return _read(path)
    check_model(arguments.model)
    tokenizer = load_tokenizer(arguments.model, arguments.training)
    data = load_data(arguments.data, tokenizer, max_length=arguments.training.max_length, seed=arguments.training.seed)
    texts = [tokenizer.decode(row["input_ids"]) for row in data.train]
    for name, questions in task_questions(evaluation.tasks, data_dir=evaluation.data_dir).items():
        check_contamination(texts, questions, name=name)

    model = load_model(arguments.model, arguments.training).to(arguments.training.device)
    adapted = get_peft_model(model, arguments.plan.peft_config())
    plan = find_adapter(adapted).plan
    model = adapted.unload()

    def loader() -> Iterator[dict[str, torch.Tensor]]:
        return _batches(data, arguments, tokenizer.pad_token_id)

    similarity = measure_attention_similarity(model, loader())
    given, half = None, half_of(plan)
    if grouping != "fixed":
        given, numbers = plan, (len(plan.followers), -(-len(plan.followers) // 2))
        measured = model if grouping_model is None else _load(arguments, grouping_model)
        chosen = _chosen(measured, loader(), numbers, grouping)
        plan, half = (replace(given, superblocks=as_blocks(chosen[followers])) for followers in numbers)
        del measured
    found = Findings(plan, half, similarity, given=given)
    if "grouping" in tables:
        numbers = _numbers_of_followers(found.fixed)
        found.by_error.update(_chosen(model, loader(), numbers, "error"))
        found.by_similarity.update(_chosen(model, loader(), numbers, "similarity"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(asdict(found), indent=2) + "\n")
    return found


def _chosen(
    model: PreTrainedModel, batches: Iterator[dict[str, torch.Tensor]], numbers: Sequence[int], method: str
) -> dict[int, list[list[int]]]:
    """For each number of followers, the Superblocks that `method` chooses; measured once for all."""
    choice = choose(model, batches, followers=max(numbers), method=method)
    return {followers: choice.with_followers(followers) for followers in numbers}


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


def _read(path: Path) -> Findings:
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
    return Findings(similarity=content["similarity"], **plans, **numbered)


def as_blocks(superblocks: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(block) for block in superblocks)
