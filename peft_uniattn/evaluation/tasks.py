"""Which questions are asked: lm-eval's own task definitions, on the Hub's data or on local copies of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import yaml
from datasets import DatasetDict
from lm_eval.tasks import TaskManager

from ..training.data.files import reading
from ..training.data.prompt import PAPER_PROMPT
from .local_data import LOCAL_SETS

PROMPTS = ("official", "paper")
# The sets of the paper's Table 1, by lm-eval's names.
PAPER_TASKS = ("pubmedqa", "medmcqa", "medqa_4options", "social_iqa", "commonsense_qa")

# The same questions without letters: the answer's own text is scored, by its log-likelihood per character. Models too
# small to name a letter are near chance on the official definitions. PubMedQA's answers are words already and scored
# as in the official definition; its cloze task is there for the paper's prompt.
CLOZE_TASKS: dict[str, dict[str, Any]] = {
    "pubmedqa_cloze": {
        "doc_to_text": "Abstract: {{CONTEXTS|join('\n')}}\nQuestion: {{QUESTION}}\nAnswer:",
        "doc_to_choice": ["yes", "no", "maybe"],
        "doc_to_target": "final_decision",
        "test_split": "test",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "social_iqa_cloze": {
        "doc_to_text": "Q: {{context}} {{question}}\nA:",
        "doc_to_choice": "{{[answerA, answerB, answerC]}}",
        "doc_to_target": "{{ (label|int) - 1 }}",
    },
    "commonsense_qa_cloze": {
        "doc_to_text": "Question: {{question.strip()}}\nAnswer:",
        "doc_to_choice": "{{choices['text']}}",
        "doc_to_target": "{{choices['label'].index(answerKey)}}",
    },
    "medmcqa_cloze": {
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{[opa, opb, opc, opd]}}",
        "doc_to_target": "cop",
    },
    "medqa_4options_cloze": {
        "doc_to_text": "Question: {{sent1}}\nAnswer:",
        "doc_to_choice": "{{[ending0, ending1, ending2, ending3]}}",
        "doc_to_target": "label",
    },
}

# The columns that make an example recognisable.
_QUESTION = {
    "pubmedqa": ("QUESTION",),
    "medmcqa": ("question",),
    "medqa_4options": ("sent1",),
    "social_iqa": ("context", "question"),
    "commonsense_qa": ("question",),
}
_HUB = {
    "pubmedqa": {"dataset_path": "bigbio/pubmed_qa", "dataset_name": "pubmed_qa_labeled_fold0_source"},
    "social_iqa": {"dataset_path": "lighteval/siqa"},
    "commonsense_qa": {"dataset_path": "tau/commonsense_qa"},
    "medmcqa": {"dataset_path": "openlifescienceai/medmcqa"},
    "medqa_4options": {"dataset_path": "GBaker/MedQA-USMLE-4-options-hf"},
}


def task_specs(
    names: Sequence[str],
    *,
    data_dir: str | Path | None = None,
    num_fewshot: int = 0,
    prompt: Literal["official", "paper"] = "official",
) -> list[Any]:
    """
    What to hand to lm-eval as `tasks`.

    With `data_dir` the definitions stay lm-eval's own; only where they get their rows from is replaced.

    Args:
        names: of `PAPER_TASKS`, of `CLOZE_TASKS`, or, without `data_dir`, of any task that lm-eval knows, or
            files of tasks (.yaml).
        data_dir: directory with the published files, anywhere below it; None takes them from the Hub.
        num_fewshot: examples before each question; they come from the training split.
        prompt: "official", or for cloze tasks "paper": the prompt that the paper trains with (Appendix A).

    Raises:
        ValueError: for an unknown prompt, "paper" for a task with letters, a name that is not known, or examples from
            a set whose training file is not in `data_dir`; or a file that cannot be read.
        FileNotFoundError: if a published file, or a task's own, is missing.
    """
    if not names:
        raise ValueError(f"tasks={list(names)} is empty; name one or more of {', '.join(PAPER_TASKS)}")
    if prompt not in PROMPTS:
        raise ValueError(f"prompt={prompt!r} must be one of {', '.join(PROMPTS)}")
    specs = [_spec(name, data_dir, num_fewshot) for name in names]
    return (
        [_with_paper_prompt(spec, name) for spec, name in zip(specs, names, strict=True)]
        if prompt == "paper"
        else specs
    )


def task_questions(names: Sequence[str], *, data_dir: str | Path | None = None) -> dict[str, list[str]]:
    """
    The questions of each task without options and answers, by which its examples can be recognised in other data.

    Args:
        names: see [`task_specs`].
        data_dir: see [`task_specs`].
    """
    tasks = task_manager().load(task_specs(names, data_dir=data_dir))["tasks"]
    return {name: [_question(name, task, doc) for doc in task.eval_docs] for name, task in tasks.items()}


def check_has_accuracy(names: Sequence[str], *, data_dir: str | Path | None = None) -> None:
    """
    Make sure that what tasks measure is a share of right answers.

    Args:
        names: see [`task_specs`].
        data_dir: see [`task_specs`].

    Raises:
        ValueError: naming a task that measures something else.
    """
    for name, task in task_manager().load(task_specs(names, data_dir=data_dir))["tasks"].items():
        if "acc" not in (measures := task.aggregation()):
            raise ValueError(
                f"tasks: {name!r} measures {', '.join(measures)}, and tables show accuracy; use tasks that measure acc"
            )


@cache
def task_manager() -> TaskManager:
    """lm-eval's index of its own tasks, which takes seconds to make."""
    return TaskManager()


def base_task(name: str) -> str:
    """The official task whose questions the task `name` asks."""
    return name.removesuffix("_cloze")


def _spec(name: str, data_dir: str | Path | None, num_fewshot: int) -> Any:
    official = base_task(name)
    if data_dir is None:
        if name in CLOZE_TASKS:
            return {**_cloze(name), **_HUB[official]}
        if Path(name).suffix in (".yaml", ".yml"):
            _check_definition(name)
        elif name not in PAPER_TASKS and name not in task_manager().all_tasks:
            known = ", ".join((*PAPER_TASKS, *CLOZE_TASKS))
            raise ValueError(f"tasks: {name!r} is not known; use some of {known}, or a name from `lm-eval ls tasks`")
        return name
    if official not in LOCAL_SETS or (name not in PAPER_TASKS and name not in CLOZE_TASKS):
        known = ", ".join((*PAPER_TASKS, *CLOZE_TASKS))
        raise ValueError(f"task {name!r} has no local copy; use one of {known}, or leave out data_dir")
    data = LOCAL_SETS[official].load(data_dir)
    if num_fewshot and "train" not in data:
        raise ValueError(
            f"num_fewshot={num_fewshot}: no training file of {official} is in data_dir={str(data_dir)!r} to take "
            "examples from; add it, or use num_fewshot=0"
        )
    overrides: dict[str, Any] = {"custom_dataset": partial(_data, data)}
    if "train" not in data:
        overrides["training_split"] = None
    if name in CLOZE_TASKS:
        return {**_cloze(name), **overrides}
    # lm-eval applies overrides to a registered task where the task is named inside a group.
    return {"group": f"{name}_local", "task": [{"task": name, **overrides}]}


def _check_definition(name: str) -> None:
    """Refuse a file of a task that is not there, or no YAML; what it says, lm-eval checks."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"tasks: {name!r}: there is no such file; check its path")
    with reading(f"tasks: {name!r}"):
        yaml.compose(path.read_text())


def _question(name: str, task: Any, doc: dict[str, Any]) -> str:
    return _joined(doc, base_task(name)) if base_task(name) in _QUESTION else str(task.doc_to_text(doc))


def _joined(doc: dict[str, Any], task: str) -> str:
    return " ".join(doc[column].strip() for column in _QUESTION[task])


def _with_paper_prompt(spec: Any, name: str) -> Any:
    if name not in CLOZE_TASKS:
        raise ValueError(
            f"prompt='paper' asks for an answer's text, but task {name!r} asks for a letter; use {name}_cloze, or "
            "prompt='official'"
        )
    return {**spec, "doc_to_text": partial(_paper_prompt, task=base_task(name)), "target_delimiter": ""}


def _paper_prompt(doc: dict[str, Any], *, task: str) -> str:
    passages = "\n".join(doc["CONTEXTS"]) + "\n\n" if "CONTEXTS" in doc else ""
    return PAPER_PROMPT.format(instruction="", input=passages + _joined(doc, task))


def _cloze(name: str) -> dict[str, Any]:
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    return {
        "task": name,
        "output_type": "multiple_choice",
        "training_split": "train",
        "validation_split": "validation",
        "metric_list": metrics,
        **CLOZE_TASKS[name],
    }


def _data(data: DatasetDict, **_: Any) -> DatasetDict:
    return data
