"""
How concentrated real attention is: which share of the tiles of s holds all of the mass but ε, layer by layer.

    python examples/kept_tiles.py CHECKPOINT TEXT --length 8192 --length 32768 --skip-mass 0.01 --output result.json

What followers could skip, with the bound of the kernels: a tile counts with the row in which it weighs most, and those
left out may weigh ε together. Plain PyTorch, on a GPU or without; no kernel is needed. The layers are the leaders of
the default plan; the model is the base model, whose lowest leader sees what a unified model's sees, the others nearly.
"""

from __future__ import annotations

import gzip
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_uniattn.bench.conditions import conditions
from peft_uniattn.handover import HANDOVER, Handover, LeaderState
from peft_uniattn.plan import make_plan
from peft_uniattn.recording import intercepted, wrappable_decoder
from peft_uniattn.training.journal import write_atomically

# Query and key positions of a tile, and key positions of a block of a decoded token: those of the kernels.
TILE = 128


def mass_of_tiles(query: torch.Tensor, key: torch.Tensor, first: int) -> torch.Tensor:
    """
    How much each tile of keys holds of the probability of each query, causal attention.

    Args:
        query: (query heads, rows, head_dim), of the positions from `first` on.
        key: (key/value heads, length, head_dim); nothing beyond the last query is visible.
        first: position of the first query.

    Returns:
        (query heads, rows, tiles), float32.
    """
    rows = query.shape[1]
    key = key[:, : first + rows].repeat_interleave(query.shape[0] // key.shape[0], 0)
    scores = (query @ key.transpose(1, 2)).float() * query.shape[2] ** -0.5
    hidden = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
    scores[:, :, first:].masked_fill_(hidden, float("-inf"))
    mass = torch.nn.functional.pad(torch.softmax(scores, -1), (0, -scores.shape[-1] % TILE))
    return mass.unflatten(-1, (-1, TILE)).sum(-1)


def kept(mass: torch.Tensor, bound: float) -> torch.Tensor:
    """How many tiles are needed, (...), of (..., tiles), so that the mass of the others is `bound` at most."""
    lightest_first = mass.double().sort(-1).values.cumsum(-1)
    return mass.shape[-1] - (lightest_first <= bound).sum(-1)


def shares(state: LeaderState, bound: float, every: int) -> dict[str, float]:
    """
    Kept of visible tiles for one layer: of a prompt, and of blocks for its last tokens as if each were decoded.

    Args:
        state: query (1, query heads, length, head_dim) and key (1, key/value heads, length, head_dim).
        bound: the mass that may be left out.
        every: look at so many query tiles of a prompt as are needed for one in `every`, the last one included.
    """
    query, key = state.query[0], state.key[0]
    length = query.shape[1] // TILE * TILE
    needed = visible = 0
    for first in range(length - TILE, -1, -TILE * every):
        mass = mass_of_tiles(query[:, first : first + TILE], key, first)
        tiles = kept(mass.amax(1), bound)
        needed, visible = needed + tiles.sum().item(), visible + tiles.numel() * mass.shape[-1]
        if first == length - TILE:
            # Query heads that share a key/value head read the same blocks.
            groups = mass.unflatten(0, (key.shape[0], -1)).amax(1)
            blocks = kept(groups, bound)
            decoded = blocks.double().mean().item() / groups.shape[-1]
    return {"prompt": needed / visible, "decoded": decoded}


@torch.no_grad()
def measure(
    model: torch.nn.Module, ids: torch.Tensor, layers: list[int], bounds: list[float], every: int
) -> Iterator[dict]:
    """One row for each layer and bound, for the text `ids` (1, length)."""
    handover = Handover(keep=True)
    with intercepted(wrappable_decoder(model), layers):
        model(ids, use_cache=False, logits_to_keep=1, **{HANDOVER: handover})
    for layer in layers:
        state = handover.take(layer)
        for bound in bounds:
            yield {"layer": layer, "length": ids.shape[1], "skip_mass": bound} | shares(state, bound, every)


def main(
    checkpoint: str,
    text: Path,
    length: Annotated[list[int], typer.Option(help="Tokens of the text; repeatable.")] = (8192,),
    skip_mass: Annotated[list[float], typer.Option(help="Mass that may be left out; repeatable.")] = (0.01,),
    windows: Annotated[int, typer.Option(help="Stretches of text of each length.")] = 2,
    every: Annotated[int, typer.Option(help="Look at one query tile in so many.", min=1)] = 1,
    superblock_size: int = 4,
    output: Annotated[Path | None, typer.Option(help="JSON, rewritten after every stretch.")] = None,
) -> None:
    """Shares of tiles (prompts) and blocks (decoded tokens) that hold all of the mass but --skip-mass."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    data = text.read_bytes()
    data = gzip.decompress(data) if text.suffix == ".gz" else data
    tokens = AutoTokenizer.from_pretrained(checkpoint)(data.decode("utf-8"), return_tensors="pt").input_ids
    if not TILE <= min(length) <= max(length) <= tokens.shape[1]:
        raise ValueError(
            f"length={list(length)} must be {TILE} or more, and no more than the text's {tokens.shape[1]}"
        )
    layers = make_plan(model.config.num_hidden_layers, superblock_size=superblock_size).leaders
    result: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "conditions": conditions(device)}
    result |= {"checkpoint": Path(checkpoint).name, "text": text.name, "dtype": str(dtype), "rows": []}
    stretches = [(size, start) for size in length for start in _starts(size, windows, tokens.shape[1])]
    for size, start in tqdm(stretches, unit="stretch"):
        for row in measure(model, tokens[:, start : start + size].to(device), layers, list(skip_mass), every):
            result["rows"].append({"start": start, **row})
            tqdm.write(json.dumps(result["rows"][-1]))
        if output is not None:
            write_atomically(output, json.dumps(result, indent=1) + "\n")


def _starts(size: int, windows: int, tokens: int) -> list[int]:
    """Starts of `windows` stretches spread over the text, fewer where they would overlap."""
    count = max(1, min(windows, tokens // size))
    return [index * (tokens - size) // count for index in range(count)]


if __name__ == "__main__":
    typer.run(main)
