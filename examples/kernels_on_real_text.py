"""
Kernels on a real checkpoint and real text: perplexity, generated tokens and kept tiles, with kernels and without.

    python examples/kernels_on_real_text.py FOLDER TEXT CALIBRATION_TEXT [--gguf-file NAME] [--output FILE]

The followers are calibrated, not trained: what counts here is the difference that kernels make, not the perplexity.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from peft_uniattn import UniAttnConfig, calibrate, to_standalone
from peft_uniattn.bench.conditions import conditions
from peft_uniattn.kernels import decode_launch

# Kernels and skip_mass.
SETTINGS = [("off", 0.0), ("triton", 0.0), ("triton", 0.01), ("triton", 0.05)]


def read(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


class Kept:
    """Counts the tiles or blocks that are kept, of those that are visible."""

    def __init__(self, batch: int) -> None:
        self.kept = self.visible = 0
        self._batch, self._select = batch, decode_launch.select

    def __enter__(self) -> Kept:
        def select(sums: torch.Tensor, factors: torch.Tensor | None, bound: float):
            result = self._select(sums, factors, bound)
            self.kept += result[1].sum().item()
            self.visible += (sums > 0).sum().item() if factors is None else result[1].numel() * sums.shape[-2]
            return result

        decode_launch.select = select
        return self

    def __exit__(self, *exception: object) -> None:
        decode_launch.select = self._select

    @property
    def share(self) -> float | None:
        return self.kept / self.visible if self.visible else None


def losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")


def prefill(model: PreTrainedModel, windows: torch.Tensor) -> tuple[torch.Tensor, float | None]:
    """Losses of all positions of windows (count, length), and the share of kept tiles."""
    found = []
    with Kept(1) as kept:
        for window in windows:
            logits = model(window[None], use_cache=False).logits
            found.append(losses(logits[:, :-1], window[None, 1:]))
    return torch.cat(found), kept.share


def decode(model: PreTrainedModel, windows: torch.Tensor, new: int) -> tuple[torch.Tensor, float | None]:
    """Losses of the last `new` tokens of windows, fed one at a time after the rest, which no kernel computes."""
    kernels, model.config.kernels = model.config.kernels, "off"
    out = model(windows[:, : -new - 1], use_cache=True, logits_to_keep=1)
    model.config.kernels = kernels
    found, cache = [], out.past_key_values
    with Kept(len(windows)) as kept:
        for position in range(windows.shape[1] - new - 1, windows.shape[1] - 1):
            logits = model(windows[:, position : position + 1], past_key_values=cache, use_cache=True).logits
            found.append(losses(logits, windows[:, position + 1]))
    return torch.cat(found), kept.share


def write(result: dict, output: Path | None) -> None:
    """After every measurement, so that an interrupted run leaves what it has."""
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main(
    folder: Path,
    text: Path,
    calibration_text: Path,
    gguf_file: Annotated[str | None, typer.Option()] = None,
    length: Annotated[list[int], typer.Option()] = (2048, 8192),
    windows: Annotated[int, typer.Option(help="At most so many windows of each length.")] = 24,
    new: Annotated[int, typer.Option(help="Decoded tokens of each window.")] = 64,
    superblock_size: Annotated[int, typer.Option()] = 4,
    output: Annotated[Path | None, typer.Option()] = None,
) -> None:
    quantized = {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)} if gguf_file else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **quantized).cuda().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **({"gguf_file": gguf_file} if gguf_file else {}))
    adapted = get_peft_model(model, UniAttnConfig(task_type="CAUSAL_LM", superblock_size=superblock_size))
    ids = tokenizer(read(calibration_text)[:400_000], return_tensors="pt").input_ids[0]
    calibrate(adapted, [{"input_ids": part[None].cuda()} for part in ids[: 64 * 1024].split(1024)])
    unified = to_standalone(adapted, share_weights=True).eval()
    tokens = tokenizer(read(text), return_tensors="pt").input_ids[0].cuda()
    result = {"conditions": conditions(torch.device("cuda")), "checkpoint": gguf_file or folder.name}
    result |= {"text": text.name, "superblocks": unified.config.superblocks, "prefill": [], "decode": []}
    with torch.no_grad():
        for size in length:
            count = min(windows, len(tokens) // size)
            parts = tokens[: count * size].view(count, size)
            exact = {}
            for kernels, skip_mass in SETTINGS:
                unified.config.kernels, unified.config.skip_mass = kernels, skip_mass
                for phase, (nll, share) in {
                    "prefill": prefill(unified, parts),
                    "decode": decode(unified, parts[:4], new),
                }.items():
                    exact.setdefault(phase, nll)
                    row = {"length": size, "windows": count if phase == "prefill" else len(parts[:4])}
                    row |= {"kernels": kernels, "skip_mass": skip_mass, "perplexity": nll.mean().exp().item()}
                    row["mean_difference_of_losses"] = (nll - exact[phase]).mean().item()
                    row["mean_absolute_difference"] = (nll - exact[phase]).abs().mean().item()
                    row["kept_share"] = share
                    result[phase].append(row)
                    print(phase, row, flush=True)
                    write(result, output)
        prompts = tokens[: 4 * 1024].view(4, 1024)
        answers = {}
        for kernels, skip_mass in SETTINGS:
            unified.config.kernels, unified.config.skip_mass = kernels, skip_mass
            answers[f"{kernels} {skip_mass}"] = unified.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=64, do_sample=False
            )[:, 1024:]
        reference = answers["off 0.0"]
        result["generated"] = {
            name: {
                "equal_tokens": (answer == reference).float().mean().item(),
                "first_difference": [
                    (row != other).nonzero()[0].item() if (row != other).any() else None
                    for row, other in zip(answer, reference, strict=True)
                ],
            }
            for name, answer in answers.items()
        }
    print(json.dumps(result["generated"]))
    write(result, output)


if __name__ == "__main__":
    typer.run(main)
