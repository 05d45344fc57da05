"""Run lm-eval on a base model, an adapter or a standalone model."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lm_eval
import torch
from lm_eval.utils import handle_non_serializable
from peft import AutoPeftModelForCausalLM
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from ..eviction.budget import Budget
from ..named import load_named_tokenizer, named_checkpoint
from ..training.journal import write_atomically
from .compressed import H2OLanguageModel
from .language_model import LanguageModel
from .tasks import PAPER_TASKS, task_manager, task_specs


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = PAPER_TASKS,
    *,
    num_fewshot: int = 0,
    prompt: Literal["official", "paper"] = "official",
    data_dir: str | Path | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    h2o_budget: float | None = None,
) -> dict[str, Any]:
    """
    Accuracy of `model` by lm-eval, as lm-eval's own dictionary of results.

    Args:
        model: a base model, a `PeftModel` or a standalone model, on the device where it shall run.
        tokenizer: its tokenizer.
        tasks: see [`task_specs`].
        num_fewshot: examples before each question.
        prompt: see [`task_specs`].
        data_dir: directory with local copies of the sets; None takes them from the Hub.
        batch_size: requests per forward pass.
        max_length: longest input in tokens; default what the model was made for.
        limit: ask only the first so many questions of each set.
        seed: of the choice of examples.
        h2o_budget: decode with an [`H2OCache`] that keeps this share of the tokens; None keeps all.

    Raises:
        ValueError: for unknown tasks, examples that there are no training data for, a budget out of range, or one for
            a model or task that H2O cannot be measured on.
        FileNotFoundError: if a published file is missing in `data_dir`.
    """
    if num_fewshot < 0:
        raise ValueError(f"num_fewshot={num_fewshot} must be 0 or more")
    specs = task_specs(tasks, data_dir=data_dir, num_fewshot=num_fewshot, prompt=prompt)
    options = {"pretrained": model, "tokenizer": tokenizer, "batch_size": batch_size, "max_length": max_length}
    if h2o_budget is None:
        language_model = LanguageModel(**options)
    else:
        language_model = H2OLanguageModel(budget=Budget(h2o_budget).budget, **options)
    training = model.training
    try:
        with _without_advice_for_custom_data():
            results = lm_eval.simple_evaluate(
                model=language_model,
                tasks=specs,
                task_manager=task_manager(),
                num_fewshot=num_fewshot,
                limit=limit,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    finally:
        model.train(training)
    # The rows of a local copy are part of lm-eval's record of a task; a record of results should not hold them.
    for config in results["configs"].values():
        config.pop("custom_dataset", None)
    results["model"] = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return dict(results)


@contextmanager
def _without_advice_for_custom_data() -> Iterator[None]:
    """lm-eval names a flag of its own command line for every set that is read from a local copy."""
    logger = logging.getLogger("lm_eval.api.task")

    def other(record: logging.LogRecord) -> bool:
        return "Custom kwargs can be passed" not in record.getMessage()

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def load_for_evaluation(
    path: str, *, dtype: str = "auto", device: str | None = None, trust_remote_code: bool = False
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """
    A model and its tokenizer from a directory or the Hub: an adapter on its base, a standalone model or a base model.

    Args:
        path: directory or Hub name. One with an `adapter_config.json` is an adapter.
        dtype: data type of the weights; "auto" is what the checkpoint says.
        device: default a GPU if there is one.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ValueError: if there is no such checkpoint, or it has no tokenizer.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    with named_checkpoint("model", path):
        if find_adapter_config_file(path) is not None:
            model = AutoPeftModelForCausalLM.from_pretrained(path, **options)
            try:
                tokenizer = load_named_tokenizer("model", path)
            except ValueError:  # an adapter need not bring one
                base = model.active_peft_config.base_model_name_or_path
                tokenizer = load_named_tokenizer("base_model_name_or_path", base)
        else:
            tokenizer = load_named_tokenizer("model", path, trust_remote_code=trust_remote_code)
            model = AutoModelForCausalLM.from_pretrained(path, **options)
    return model.to(device).eval(), tokenizer


def write_results(results: dict[str, Any], path: Path) -> None:
    """Write what [`evaluate`] returned as JSON, in the form that lm-eval itself writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
    write_atomically(path, text + "\n")
