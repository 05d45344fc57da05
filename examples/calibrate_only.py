"""
Without any training: choose Superblocks by data, calibrate, and see what that leaves of the held-out loss.

    python examples/calibrate_only.py CHECKPOINT --dataset text.txt.gz --kv-target 0.9 --output-dir calibrated

The data are text (.txt, .raw, .md) or instructions, a file or a Hub name; the default is Python's reference manual.
"""

from pathlib import Path
from typing import Annotated

import typer
from peft import get_peft_model

from peft_uniattn import UniAttnConfig, calibrate, choose_superblocks
from peft_uniattn.analysis.data import load_sequences
from peft_uniattn.quickstart.checkpoint import load_checkpoint
from peft_uniattn.training.evaluation import held_out_loss
from peft_uniattn.training.receipt import measured_kv_bytes_per_token


def main(
    checkpoint: Annotated[str | None, typer.Argument(help="Folder or Hub name. Default: SmolLM2-135M.")] = None,
    dataset: str | None = None,
    kv_target: Annotated[float, typer.Option(help="Share of the KV cache that may be left.")] = 0.9,
    rank: Annotated[int | None, typer.Option(help="Rank of the compensation. Default: full.")] = 64,
    length: int = 256,
    sequences: int = 48,
    held_out: int = 8,
    output_dir: Path = Path("calibrated"),
) -> None:
    """Plan, calibrate, compare and save."""
    model, tokenizer, name = load_checkpoint(checkpoint, device="auto")
    data = load_sequences(dataset, tokenizer, length=length, sequences=sequences, held_out=held_out)
    batches = data.batches(4, model.device)

    def loss(model) -> float:
        return held_out_loss(model, data.held_out, data.pad_token_id)

    losses, kv_bytes = {"base": loss(model)}, {"before": measured_kv_bytes_per_token(model)}
    superblocks = choose_superblocks(model, batches, kv_target=kv_target)
    model = get_peft_model(model, UniAttnConfig(superblocks=superblocks, r=rank, task_type="CAUSAL_LM"))
    losses["unified"] = loss(model)
    calibrate(model, batches)
    losses["calibrated"] = loss(model)
    kv_bytes["after"] = measured_kv_bytes_per_token(model)
    model.save_pretrained(output_dir)

    print(f"{name}, Superblocks {superblocks}")
    for step, value in losses.items():
        print(f"held-out loss, {step}: {value:.4f}")
    print(f"KV cache, bytes per token: {kv_bytes['before']:,} -> {kv_bytes['after']:,}")


if __name__ == "__main__":
    typer.run(main)
