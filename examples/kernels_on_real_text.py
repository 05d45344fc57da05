"""
Kernels on a real checkpoint and real text: perplexity, generated tokens and kept tiles, with kernels and without.

    python examples/kernels_on_real_text.py FOLDER TEXT CALIBRATION_TEXT --output result.json

The followers are calibrated, not trained: what counts here is the difference that kernels make, not the perplexity.
The most important parts come first and the result is written after every row; parts that would start after `--seconds`
are left out and named. Without a GPU there are no kernels and all rows of a part are equal.
"""

from __future__ import annotations

import gzip
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import get_peft_model
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from peft_uniattn import UniAttnConfig, calibrate, to_standalone
from peft_uniattn.bench.conditions import conditions
from peft_uniattn.training.journal import write_atomically

try:
    from peft_uniattn.kernels import decode_launch
except ImportError:  # no Triton
    decode_launch = None

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Every length, also those at which PyTorch would be chosen.
FORCED = "triton" if DEVICE.type == "cuda" else "auto"
# Kernels and skip_mass.
SETTINGS = [("off", 0.0), (FORCED, 0.0), (FORCED, 0.01), (FORCED, 0.05)]


def read(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


class Kept:
    """Counts the tiles or blocks that are kept, of those that are visible."""

    def __init__(self) -> None:
        self._counts: list[torch.Tensor] = []
        self._visible = 0.0
        self._select = getattr(decode_launch, "select", None)

    def __enter__(self) -> Kept:
        def select(sums: torch.Tensor, factors: torch.Tensor | None, bound: float):
            result = self._select(sums, factors, bound)
            blocks, queries = sums.shape[-2], result[1].shape[-1]
            # Of a prompt, tiles above the diagonal are not visible; of a decoded token everything is.
            seen = blocks if factors is not None else blocks / queries * (queries + 1) / 2
            self._visible += result[1].numel() * seen
            self._counts.append(result[1].sum())  # read at the end: nothing waits for the device here
            return result

        if decode_launch is not None:
            decode_launch.select = select
        return self

    def __exit__(self, *exception: object) -> None:
        if decode_launch is not None:
            decode_launch.select = self._select

    @property
    def share(self) -> float | None:
        return sum(self._counts).item() / self._visible if self._counts else None


def losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")


def prompts(model: PreTrainedModel, windows: torch.Tensor, new: int) -> torch.Tensor:
    """Losses of all positions of windows (count, length)."""
    found = []
    for window in windows:
        logits = model(window[None], use_cache=False).logits
        found.append(losses(logits[:, :-1], window[None, 1:]))
    return torch.cat(found)


def decoded(model: PreTrainedModel, windows: torch.Tensor, new: int) -> torch.Tensor:
    """Losses of the last `new` tokens of windows, fed one at a time after the rest, in which nothing is skipped."""
    skip_mass, model.config.skip_mass = model.config.skip_mass, 0.0
    out = model(windows[:, : -new - 1], use_cache=True, logits_to_keep=1)
    model.config.skip_mass = skip_mass
    found, cache = [], out.past_key_values
    for position in range(windows.shape[1] - new - 1, windows.shape[1] - 1):
        logits = model(windows[:, position : position + 1], past_key_values=cache, use_cache=True).logits
        found.append(losses(logits, windows[:, position + 1]))
    return torch.cat(found)


def settings(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    for kernels, skip_mass in SETTINGS:
        model.config.kernels, model.config.skip_mass = kernels, skip_mass
        yield {"kernels": kernels, "skip_mass": skip_mass}


def perplexity(phase: str, model: PreTrainedModel, windows: torch.Tensor, new: int) -> Iterator[dict[str, Any]]:
    """Perplexity under every setting, and how far single tokens' losses move from those without kernels."""
    reference = None
    for setting in settings(model):
        with Kept() as kept:
            nll = {"prompts": prompts, "decoded": decoded}[phase](model, windows, new)
        reference = nll if reference is None else reference
        yield setting | {
            "length": windows.shape[1],
            "windows": len(windows),
            "tokens": nll.numel(),
            "perplexity": nll.mean().exp().item(),
            "mean_difference_of_losses": (nll - reference).mean().item(),
            "mean_absolute_difference": (nll - reference).abs().mean().item(),
            "kept_share": kept.share,
        }


def generated(model: PreTrainedModel, windows: torch.Tensor, new: int) -> Iterator[dict[str, Any]]:
    """Greedy continuations under every setting: where they leave the one without kernels, and how close that was."""
    reference = None
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    for setting in settings(model):
        with Kept() as kept:
            answer = model.generate(windows, attention_mask=torch.ones_like(windows), **options)
        tokens = answer.sequences[:, windows.shape[1] :]
        if reference is None:
            reference, logits = tokens, torch.stack(answer.logits, 1).float()
        yield setting | {
            "length": windows.shape[1],
            "new": new,
            "equal_tokens": (tokens == reference).float().mean().item(),
            "first_differences": [first_difference(*row) for row in zip(tokens, reference, logits, strict=True)],
            "kept_share": kept.share,
        }


def first_difference(tokens: torch.Tensor, reference: torch.Tensor, logits: torch.Tensor) -> dict[str, Any] | None:
    """
    The first position at which two continuations differ, and by how much the reference preferred its own token.

    Args:
        tokens, reference: (new,).
        logits: (new, vocabulary) of the reference.
    """
    if torch.equal(tokens, reference):
        return None
    position = (tokens != reference).nonzero()[0].item()
    margin = logits[position, reference[position]] - logits[position, tokens[position]]
    return {"position": position, "margin": margin.item()}


def unified_model(folder: Path, gguf_file: str | None, ids: torch.Tensor, superblock_size: int) -> PreTrainedModel:
    """The checkpoint with its followers calibrated on `ids` (tokens,)."""
    quantized = {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)} if gguf_file else {}
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **quantized).to(DEVICE).eval()
    adapted = get_peft_model(model, UniAttnConfig(task_type="CAUSAL_LM", superblock_size=superblock_size))
    calibrate(adapted, [{"input_ids": part[None].to(DEVICE)} for part in ids.split(1024)])
    return to_standalone(adapted, share_weights=True).eval()


def main(
    folder: Path,
    text: Path,
    calibration_text: Path,
    gguf_file: Annotated[str | None, typer.Option(help="Of a quantized checkpoint in FOLDER.")] = None,
    length: Annotated[list[int], typer.Option(help="Tokens of a window; repeatable, first things first.")] = (
        8192,
        2048,
    ),
    windows: Annotated[int, typer.Option(help="At most so many windows as prompts.")] = 12,
    decode_windows: Annotated[int, typer.Option(help="At most so many windows to decode at the end of.")] = 4,
    new: Annotated[int, typer.Option(help="Decoded tokens of each window.")] = 64,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompts to continue.")] = 1024,
    calibration_tokens: int = 65536,
    superblock_size: int = 4,
    seconds: Annotated[float, typer.Option(help="No part starts later than this after the model was loaded.")] = 60.0,
    output: Annotated[Path | None, typer.Option(help="JSON, rewritten after every row.")] = None,
) -> None:
    """Compare a unified checkpoint with itself: kernels off, exact, and skipping 1 % and 5 % of the mass."""
    tokenizer = AutoTokenizer.from_pretrained(folder, **({"gguf_file": gguf_file} if gguf_file else {}))
    ids = tokenizer(read(calibration_text)[: 8 * calibration_tokens], return_tensors="pt").input_ids[0]
    tokens = tokenizer(read(text), return_tensors="pt").input_ids[0].to(DEVICE)
    if too_long := [size for size in (*length, prompt) if size > len(tokens)]:
        raise ValueError(f"{text} has {len(tokens)} tokens, fewer than a window of {too_long[0]}; use a longer text")
    unified = unified_model(folder, gguf_file, ids[:calibration_tokens], superblock_size)

    result = {"command": shlex.join(["python", *sys.argv]), "conditions": conditions(DEVICE)}
    result |= {"checkpoint": gguf_file or folder.name, "text": text.name, "superblocks": unified.config.superblocks}
    result |= {"dtype": str(unified.dtype), "left_out": []}

    def cut(size: int, most: int) -> torch.Tensor:
        count = min(most, len(tokens) // size)
        return tokens[: count * size].view(count, size)

    parts = []
    for size in length:
        parts.append((f"prompts {size}", perplexity("prompts", unified, cut(size, windows), new)))
        parts.append((f"decoded {size}", perplexity("decoded", unified, cut(size, decode_windows), new)))
    parts.insert(2, ("generated", generated(unified, cut(prompt, 8), new)))
    started = time.perf_counter()
    with torch.no_grad():
        for name, rows in tqdm(parts, unit="part"):
            if time.perf_counter() - started > seconds:
                result["left_out"].append(name)
            else:
                result[name] = []
                for row in rows:
                    result[name].append(row | {"seconds_since_loading": time.perf_counter() - started})
                    tqdm.write(f"{name}: {json.dumps(row)}")
                    save(result, output)
    save(result, output)


def save(result: dict[str, Any], output: Path | None) -> None:
    if output is not None:
        write_atomically(output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
