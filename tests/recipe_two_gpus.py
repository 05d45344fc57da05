"""
The recipe on two GPUs against one GPU with the same global batch: `python tests/recipe_two_gpus.py --out result.json`.

Makes its own small model and data, runs both stages for each case behind the launchers that users start, and compares
losses, gradient norms and final weights. Needs no network. Exits with 1 if a case differs by more than its precision.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import recipe_runs
import torch
from safetensors.torch import load_file

from peft_uniattn.training.receipt import environment

ROOT = Path(__file__).parents[1]
MODEL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
SETTINGS = {
    "use_cpu": False,
    "stage1_max_steps": 8,
    "max_steps": 8,
    "stage1_learning_rate": 1e-3,
    "learning_rate": 1e-3,
    "gradient_checkpointing": True,
}
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
FSDP2 = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
LAUNCHERS = {
    "one GPU": [sys.executable],
    "ddp, torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "ddp, accelerate launch": [*ACCELERATE, "--multi_gpu"],
    "fsdp2, accelerate launch": [
        *(*ACCELERATE, *FSDP2, "--fsdp_state_dict_type", "SHARDED_STATE_DICT"),
        *("--fsdp_reshard_after_forward", "true"),
    ],
}
# Relative differences of losses; Adam brings rounding in weights whose gradients are almost nothing up to more.
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}


def run(launcher: str, precision: str, inputs: dict[str, str], output_dir: Path) -> float:
    """Run the example; returns its wall time in seconds."""
    alone = launcher == "one GPU"
    changes = {"per_device_train_batch_size": 4 if alone else 2, "bf16": precision == "bfloat16"}
    command = LAUNCHERS[launcher]
    if "accelerate.commands.launch" in command:
        command = [*command, "--mixed_precision", "bf16" if changes["bf16"] else "no", "--dynamo_backend", "no"]
    argv = recipe_runs.flags(inputs, output_dir, **{**SETTINGS, **changes})
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    if alone:
        environ["CUDA_VISIBLE_DEVICES"] = "0"
    started = time.perf_counter()
    done = subprocess.run(
        [*command, str(ROOT / "examples" / "sft_two_stage.py"), *argv], env=environ, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{launcher}, {precision} failed:\n{done.stderr[-6000:]}")
    return time.perf_counter() - started


def differences(output_dir: Path, reference: Path) -> dict[str, float]:
    """The largest relative differences of losses and gradient norms, and of weights by the norm of their tensor."""
    found = {}
    for step in ("stage 1", "stage 2"):
        pairs = list(zip(recipe_runs.losses(output_dir, step), recipe_runs.losses(reference, step), strict=True))
        found[f"{step}, loss"] = max(abs(mine[1] - other[1]) / other[1] for mine, other in pairs)
        found[f"{step}, gradient norm"] = max(abs(mine[2] - other[2]) / other[2] for mine, other in pairs)
    for name, file in (("adapter", "adapter/adapter_model"), ("model", "model/model")):
        mine, other = (load_file(path / f"{file}.safetensors") for path in (output_dir, reference))
        assert mine.keys() == other.keys()
        found[f"{name}, weights"] = max(
            ((mine[key].float() - other[key].float()).norm() / other[key].float().norm()).item() for key in other
        )
    receipt = json.loads((output_dir / "receipt.json").read_text())
    return {**found, "reloaded, logits": receipt["reload_difference"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if torch.cuda.device_count() < 2:
        parser.error(f"two GPUs are needed, and there are {torch.cuda.device_count()}")
    results, bad = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        inputs = recipe_runs.write_inputs(directory, rows=120, **MODEL)
        for precision, tolerance in TOLERANCES.items():
            for number, launcher in enumerate(LAUNCHERS):
                output_dir = directory / f"{precision}-{number}"
                seconds = run(launcher, precision, inputs, output_dir)
                case = f"{launcher}, {precision}"
                results[case] = {"seconds": seconds, **differences(output_dir, directory / f"{precision}-0")}
                print(case, results[case], flush=True)
                if max(results[case][f"stage {stage}, loss"] for stage in (1, 2)) > tolerance:
                    bad.append(case)
    document = {
        "environment": {**environment(), "gpus": torch.cuda.device_count()},
        "settings": {**recipe_runs.FLAGS, **SETTINGS, "model": MODEL},
        "tolerance of losses": TOLERANCES,
        "results": results,
    }
    options.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))
    if bad:
        sys.exit(f"more than rounding: {', '.join(bad)}")


if __name__ == "__main__":
    main()
