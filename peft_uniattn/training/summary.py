"""What a run leaves behind beside its models: the receipt and the model cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .arguments import STAGES, Arguments
from .journal import write_atomically
from .model_card import adapter_card, find_base, standalone_card
from .receipt import Receipt, environment

# Settings that every reader of a card asks for, whether they are the defaults or not.
_HYPERPARAMETERS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "processes",
    "max_steps",
    "num_train_epochs",
    "stage1_learning_rate",
    "stage1_max_steps",
    "stage1_num_train_epochs",
    "stage1_early_stop",
    "max_length",
    "packing",
    "dtype",
    "bf16",
    "seed",
)
_PLAN = (
    "method",
    "superblock_size",
    "start_layer",
    "end_layer",
    "superblocks",
    "follower_mask",
    "rank",
    "dropped_layers",
)
_LOSSES = 10
# What the steps are called in the journal and where they are shown.
STEPS = {"calibrate": "calibration", "stage1": "stage 1", "stage2": "stage 2", "plain": "fine-tuned base"}
_SHOWN = {
    "base": "base",
    "calibration": "calibrated",
    "stage 1": "after stage 1",
    "stage 2": "after stage 2",
    "fine-tuned base": "plain fine-tuned base",
}


def make_receipt(results: dict[str, Any], data_name: str, question: str | None = None) -> Receipt:
    """
    The receipt of what has been done so far.

    Args:
        results: of the steps, as the journal has them.
        data_name: what to call the data.
        question: how to show the held-out question. Default: the text of its prompt.
    """
    plan, base = results["plan"], results["base"]
    measured = {name: results[step] for step, name in _SHOWN.items() if step in results}
    losses = {"base": base["loss"]}
    if "calibration" in results:
        losses["unified, no compensation"] = results["calibration"]["loss_before"]
    losses |= {name: step["loss"] for name, step in measured.items()}
    unified = [results[STEPS[stage]] for stage in STAGES if STEPS[stage] in results]
    sizes = [step["adapter_bytes"] for step in unified if "adapter_bytes" in step]
    return Receipt(
        base_model=plan["name"],
        data=data_name,
        superblocks=plan["superblocks"],
        num_layers=plan["num_layers"],
        kv_bytes_before=base["kv_bytes"],
        kv_bytes_after=[base, *unified][-1]["kv_bytes"],
        adapter_parameters=plan["adapter_parameters"],
        adapter_bytes=sizes[-1] if sizes else None,
        losses={name: loss for name, loss in losses.items() if loss is not None},
        prompt=question or base["prompt"],
        answers={name: step["answer"] for name, step in measured.items() if step["answer"] is not None},
        evaluations={name: step["evaluation"] for name, step in measured.items() if step["evaluation"]},
        reload_difference=results.get("stage 2", {}).get("reload_difference"),
        seconds=sum(step["seconds"] for step in results.values()),
        environment=_latest(results, "environment", environment()),
    )


def write_summary(output_dir: Path, receipt: Receipt, arguments: Arguments, results: dict[str, Any]) -> None:
    """Write `receipt.json`, and a model card beside every artefact that there is."""
    processes = _latest(results, "processes", arguments.training.world_size)
    settings = {**arguments.settings(), "processes": processes}
    details = {
        "data": results["base"]["data"],
        "plan": {name: settings[name] for name in _PLAN},
        "hyperparameters": {name: settings[name] for name in _HYPERPARAMETERS},
        "calibration": results.get("calibration", {}).get("report"),
        "training losses": {
            step: _thinned(results[step]["log"]) for step in ("stage 1", "stage 2") if step in results
        },
    }
    base = find_base(arguments.model.model_name_or_path or receipt.base_model)
    for folder, card in (("calibrated", adapter_card), ("adapter", adapter_card), ("model", standalone_card)):
        if (output_dir / folder).is_dir():
            write_atomically(output_dir / folder / "README.md", str(card(receipt, details, base)))
    write_atomically(output_dir / "receipt.json", json.dumps(receipt.to_dict(), indent=2) + "\n")


def _latest(results: dict[str, Any], name: str, default: Any) -> Any:
    """
    What the last step to record `name` recorded: a finished run may be called again elsewhere, to publish it. For
    steps of earlier versions, which recorded no machine, `default`.
    """
    return next((step[name] for step in reversed(results.values()) if name in step), default)


def _thinned(log: list[dict[str, Any]]) -> dict[str, float]:
    """Step → training loss, of at most ten logs evenly over the stage, the first and the last among them."""
    entries = [entry for entry in log if "loss" in entry]
    count = min(_LOSSES, len(entries))
    chosen = {round(index * (len(entries) - 1) / max(count - 1, 1)) for index in range(count)}
    return {str(entries[index]["step"]): entries[index]["loss"] for index in sorted(chosen)}
