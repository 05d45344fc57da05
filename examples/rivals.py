"""
UniAttn's compensation designs and its rivals on one model, before any training: held-out loss and bytes of cache.

    python examples/rivals.py PATH_OR_HUB_NAME --calibration-text a.txt --held-out-text b.txt --result result.json

Writes losses, chosen layers and the environment to the result file.
"""

import gzip
import json
import platform
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from peft import get_peft_model
from transformers import DynamicCache

from peft_uniattn import (
    CLAConfig,
    LLMDropConfig,
    UniAttnConfig,
    calibrate,
    choose_layers_to_drop,
    half_of,
    measure_attention_similarity,
    num_layers_to_drop,
)
from peft_uniattn.cache import kv_bytes
from peft_uniattn.compensation import DESIGNS
from peft_uniattn.inspection import find_adapter
from peft_uniattn.quickstart.checkpoint import load_checkpoint

PREFIX, CONTINUATION = 24, 8


def sequences(path: Path, tokenizer, count: int, length: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """The first `count` runs of `length` tokens of a text file, 8 to a batch."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    ids = tokenizer(text[: 12 * count * length], return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // length * length].view(-1, length)[:count]
    return [{"input_ids": part.to(device)} for part in rows.split(8)]


@torch.no_grad()
def loss(model, batches) -> float:
    """Mean cross-entropy in nats per token."""
    total = sum(
        len(batch["input_ids"]) * model(**batch, labels=batch["input_ids"], use_cache=False).loss.item()
        for batch in batches
    )
    return total / sum(len(batch["input_ids"]) for batch in batches)


@torch.no_grad()
def cached(model, ids) -> dict[str, float | bool]:
    """Bytes of cache a token, and how cached logits and tokens compare with uncached ones."""
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([PREFIX] + [1] * CONTINUATION, dim=1)]
    difference = (torch.cat(parts, dim=1) - model(ids, use_cache=False).logits).abs().max().item()
    arguments = {"max_new_tokens": CONTINUATION, "do_sample": False}
    tokens = [model.generate(input_ids=ids[:, :PREFIX], use_cache=use, **arguments) for use in (True, False)]
    return {
        "kv_bytes_per_token": kv_bytes(cache) // ids.numel(),
        "largest_difference_of_cached_logits": difference,
        "cached_generation_equals_uncached": torch.equal(*tokens),
    }


def main(
    checkpoint: str,
    calibration_text: Annotated[Path, typer.Option(help="Text, plain or gzip, to calibrate and measure on.")],
    held_out_text: Annotated[Path, typer.Option(help="Text for the losses.")],
    result: Annotated[Path | None, typer.Option(help="Where to put everything as JSON.")] = None,
    calibration_sequences: int = 64,
    held_out_sequences: int = 32,
    length: int = 256,
    designs: Annotated[bool, typer.Option(help="Also calibrate every design of compensation.")] = True,
) -> None:
    """Compare all methods on texts, without training."""
    model, tokenizer, _ = load_checkpoint(checkpoint, device="auto")
    model.eval()
    train = sequences(calibration_text, tokenizer, calibration_sequences, length, model.device)
    test = sequences(held_out_text, tokenizer, held_out_sequences, length, model.device)
    ids = test[0]["input_ids"][:2, : PREFIX + CONTINUATION]

    started = time.perf_counter()
    rows = {"base": {"held_out_loss": loss(model, test), **cached(model, ids)}}
    similarity = measure_attention_similarity(model, train)
    layers = len(similarity)
    plan = UniAttnConfig().make_plan(layers)
    cla = CLAConfig().make_plan(layers)
    methods = {
        f"UniAttn, {design}": UniAttnConfig(compensation=design) for design in ["none", *(DESIGNS if designs else ())]
    }
    for variant, half in (("Full", False), ("Half", True)):
        blocks = (half_of(cla) if half else cla).superblocks
        methods[f"CLA-{variant}"] = CLAConfig(superblocks=[list(block) for block in blocks])
        chosen = choose_layers_to_drop(similarity, num_layers_to_drop(plan, half=half))
        methods[f"LLMDrop-{variant}"] = LLMDropConfig(layers=chosen)
    for method, config in methods.items():
        peft_model = get_peft_model(model, config).eval()
        if isinstance(config, UniAttnConfig) and config.compensation != "none":
            calibrate(peft_model, train)
        rows[method] = {
            "held_out_loss": loss(peft_model, test),
            **cached(peft_model, ids),
            "plan": str(find_adapter(peft_model).plan),
        }
        print(
            f"{method:32s} {rows[method]['held_out_loss']:.4f}  {rows[method]['kv_bytes_per_token']:,} bytes a token"
        )
        model = peft_model.unload()
    on_gpu = torch.cuda.is_available()
    report = {
        # Names only: whose machine it was does not matter.
        "command": " ".join(["python", "examples/rivals.py", *(part.rsplit("/", 1)[-1] for part in sys.argv[1:])]),
        "base": Path(checkpoint).name,
        "similarity": similarity,
        "methods": rows,
        "seconds": time.perf_counter() - started,
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        },
    }
    if result:
        result.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
