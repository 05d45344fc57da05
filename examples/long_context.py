"""
Continue a long text, and see what the cache takes: the base, UniAttn, and UniAttn with H2O on top.

    python examples/long_context.py ADAPTER --text moby_dick.txt.gz --context 8000 --budget 0.4

The prompt is read in chunks, so that no step needs memory for all of it at once.
"""

import gzip
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, DynamicCache

from peft_uniattn import H2OCache, h2o
from peft_uniattn.cache import kv_bytes


def main(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub name of a UniAttn adapter.")],
    text: Annotated[Path, typer.Option(help="Text, plain or .gz.")],
    context: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 4096,
    new_tokens: int = 64,
    budget: Annotated[float, typer.Option(help="Share of the tokens that H2O keeps.")] = 0.4,
    chunk: Annotated[int, typer.Option(help="Tokens of the prompt read at a time.")] = 512,
) -> None:
    """Generate three times from the same prompt."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoPeftModelForCausalLM.from_pretrained(adapter).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.active_peft_config.base_model_name_or_path)
    content = gzip.decompress(text.read_bytes()) if text.suffix == ".gz" else text.read_bytes()
    ids = tokenizer(content.decode(), return_tensors="pt", verbose=False).input_ids[:, :context]
    if ids.shape[1] < context:
        raise typer.BadParameter(f"{text.name} has {ids.shape[1]} tokens, fewer than context={context}")

    def generate(name: str, cache: DynamicCache, **options) -> None:
        started = time.perf_counter()
        output = model.generate(
            input_ids=ids.to(model.device),
            max_new_tokens=new_tokens,
            do_sample=False,
            past_key_values=cache,
            **options,
        )
        seconds = time.perf_counter() - started
        print(f"{name}: {kv_bytes(cache) / 2**20:.1f} MiB of cache, {seconds:.1f} s")
        print(f"  {tokenizer.decode(output[0, context:])!r}")

    config = model.get_base_model().config
    with torch.no_grad():
        with model.disable_adapter():
            generate("base", DynamicCache(config=config), prefill_chunk_size=chunk)
        generate("UniAttn", DynamicCache(config=config), prefill_chunk_size=chunk)
        with h2o(model):
            generate(f"UniAttn, H2O keeping {budget:.0%}", H2OCache(budget=budget), prefill_chunk_size=chunk)


if __name__ == "__main__":
    typer.run(main)
