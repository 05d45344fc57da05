"""
UniAttn together with H2O: perplexity and bytes of KV cache at several compression rates.

    python examples/h2o.py --text wiki.test.raw.gz --calibration-text other_text.gz --result result.json

The text is cut into windows; of each, the first tokens are the prompt, and the others are decoded one at a time with
the right token given (teacher forcing). All but the first of them are predicted from a cache that has been compressed.
"""

import gzip
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Annotated

import peft
import torch
import transformers
import typer
from peft import get_peft_model
from tqdm.auto import tqdm

from peft_uniattn import H2OCache, UniAttnConfig, calibrate, h2o
from peft_uniattn.cache import kv_bytes, kv_bytes_per_token
from peft_uniattn.quickstart.checkpoint import load_checkpoint


def main(
    text: Annotated[Path, typer.Option(help="Text to measure on, plain or .gz.")],
    calibration_text: Annotated[Path, typer.Option(help="Another text, for the compensation W_c.")],
    checkpoint: Annotated[str | None, typer.Option(help="Folder or Hub name. Default: SmolLM2-135M-Instruct.")] = None,
    compression: Annotated[list[float], typer.Option(help="Share of the tokens to evict.")] = (0.0, 0.2, 0.4, 0.6),
    recent: Annotated[list[float], typer.Option(help="Share of the kept tokens that are the newest.")] = (0.5,),
    windows: int = 4,
    prompt_tokens: int = 512,
    decoded_tokens: int = 89,
    calibration_windows: int = 96,
    superblock_size: int = 4,
    result: Annotated[Path | None, typer.Option(help="Where to put the results as JSON.")] = None,
) -> None:
    """Measure base and calibrated UniAttn model on the same text."""
    model, tokenizer, name = load_checkpoint(checkpoint, device="auto")
    length = prompt_tokens + decoded_tokens
    held_out = cut(tokenizer, text, windows, length)
    for_calibration = cut(tokenizer, calibration_text, calibration_windows, 512)
    settings = [(rate, share) for rate in compression for share in (recent if rate else recent[:1])]

    rows = [measure(model, "base", held_out, prompt_tokens, *setting) for setting in settings]
    model = get_peft_model(model, UniAttnConfig(task_type="CAUSAL_LM", superblock_size=superblock_size)).eval()
    calibrate(model, [{"input_ids": batch} for batch in for_calibration.split(8)])
    rows += [measure(model, "UniAttn", held_out, prompt_tokens, *setting) for setting in settings]

    if result:
        report = {
            "command": "python examples/h2o.py " + " ".join(Path(a).name if "/" in a else a for a in sys.argv[1:]),
            "model": name,
            "text": text.name,
            "calibration_text": calibration_text.name,
            "windows": windows,
            "prompt_tokens": prompt_tokens,
            "decoded_tokens": decoded_tokens,
            "calibration_tokens": for_calibration.numel(),
            "superblocks": str(model.peft_config["default"].make_plan(model.config.num_hidden_layers)),
            "environment": environment(),
            "rows": rows,
        }
        result.write_text(json.dumps(report, indent=2) + "\n")


def cut(tokenizer, path: Path, windows: int, length: int) -> torch.Tensor:
    """Windows of `length` tokens, evenly spread over the text, (windows, length)."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    ids = tokenizer(content.decode(), return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < windows * length:
        raise typer.BadParameter(f"{path.name} has {len(ids)} tokens, fewer than {windows} windows of {length}")
    step = len(ids) // windows
    return torch.stack([ids[first : first + length] for first in range(0, step * windows, step)])


@torch.no_grad()
def measure(model, name: str, ids: torch.Tensor, prompt_tokens: int, compression: float, recent: float) -> dict:
    """Perplexity of what follows the prompts, with a cache that holds 1 - `compression` of the tokens."""
    cache, loss, start = H2OCache(budget=1 - compression, recent=recent), 0.0, time.perf_counter()
    ids = ids.to(model.device)
    steps = [ids[:, :prompt_tokens], *ids[:, prompt_tokens:-1].split(1, dim=1)]
    with h2o(model):
        for index, tokens in enumerate(
            tqdm(steps, desc=f"{name}, {compression:.0%} evicted, {recent:.0%} recent", mininterval=10)
        ):
            logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            loss += torch.nn.functional.cross_entropy(logits.float(), ids[:, prompt_tokens + index]).item()
    seen = len(ids) * cache.get_seq_length()
    row = {
        "model": name,
        "compression": compression,
        "recent": recent,
        "perplexity": math.exp(loss / len(steps)),
        "kv_bytes": kv_bytes(cache),
        "bookkeeping_bytes": cache.bookkeeping_bytes,
        "kv_retain_rate": kv_bytes(cache) / (kv_bytes_per_token(model.config, 0, cache.layers[0].keys.dtype) * seen),
        "seconds": time.perf_counter() - start,
    }
    tqdm.write(
        "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items())
    )
    return row


def environment() -> dict[str, str]:
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {"python": platform.python_version(), **versions, "device": device}


if __name__ == "__main__":
    typer.run(main)
