"""
Followers by key/value head: single heads that take over queries and keys of the layer below, against whole layers.

    python examples/share_heads.py MODEL DATA_DIR TRAINING_FILE... --followers 12 --output shared_heads.json

Three rows: plain post-training; as many whole layers as `--followers` says; and as many key/value heads as these have,
with the query heads that read them, wherever they are. Either are those that add least to the loss of the post-trained
model, each of them alone. Nothing is compensated. A head that follows one that follows has the same leader.

Not part of the package. A second call goes on where the first one stopped, after plain post-training again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from explore_data import Examples
from explore_recipe import Row, accuracy, described, finished, held_out_loss, load, run
from tqdm.auto import tqdm
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peft_uniattn.training.journal import write_atomically

NAME = "shared_heads"  # of the attention, for `attn_implementation`

# By layer, which of its key/value heads follow.
Heads = Mapping[int, tuple[int, ...]]

_following: dict[int, tuple[int, ...]] = {}
_below: list[tuple[torch.Tensor, torch.Tensor]] = []  # queries and keys of the layer that ran last


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The attention `sdpa`, of a model without a cache, whose heads follow as `sharing` says."""
    if taken := _following.get(module.layer_idx):
        chosen = torch.zeros(key.shape[1], dtype=torch.bool)
        chosen[list(taken)] = True
        chosen = chosen.to(key.device)[:, None, None]
        of_queries = chosen.repeat_interleave(query.shape[1] // key.shape[1], 0)
        query, key = torch.where(of_queries, _below[0][0], query), torch.where(chosen, _below[0][1], key)
    _below[:] = [(query, key)]
    return sdpa_attention_forward(module, query, key, value, mask, **options)


AttentionInterface.register(NAME, attention)


@contextmanager
def sharing(heads: Heads) -> Iterator[None]:
    """Let these heads use queries and keys of the layer below, in every model with this attention."""
    _following.update(heads)
    try:
        yield
    finally:
        _following.clear()
        _below.clear()


def costs(model: PreTrainedModel, data: Examples) -> tuple[dict[int, float], dict[tuple[int, int], float]]:
    """What following alone adds to the loss: of each layer, and of each (layer, key/value head)."""
    groups, before = range(model.config.num_key_value_heads), held_out_loss(model, data)

    def added(layer: int, *taken: int) -> float:
        with sharing({layer: taken}):
            return held_out_loss(model, data) - before

    of_layers, of_heads = {}, {}
    for layer in tqdm(range(1, model.config.num_hidden_layers), desc="choosing", unit="layer", leave=False):
        of_layers[layer] = added(layer, *groups)
        of_heads |= {(layer, group): added(layer, group) for group in groups}
    return of_layers, of_heads


def cheapest(model: PreTrainedModel, data: Examples, followers: int) -> dict[str, Heads]:
    """By row, the heads that follow in it."""
    of_layers, of_heads = costs(model, data)
    groups = tuple(range(model.config.num_key_value_heads))
    heads: dict[int, tuple[int, ...]] = {}
    for layer, group in sorted(sorted(of_heads, key=of_heads.__getitem__)[: followers * len(groups)]):
        heads[layer] = (*heads.get(layer, ()), group)
    layers = sorted(sorted(of_layers, key=of_layers.__getitem__)[:followers])
    return {"layers": dict.fromkeys(layers, groups), "heads": heads}


def main(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a small Llama-like model.")],
    data_dir: Annotated[Path, typer.Argument(help="Where the published evaluation files are.")],
    training_files: list[str],
    followers: Annotated[int, typer.Option(help="How many layers' worth of heads follow.", min=1)] = 12,
    steps: int = 400,
    batch_size: int = 48,
    held_out_examples: int = 2560,
    choosing_examples: Annotated[int, typer.Option(help="Training examples to choose by.")] = 480,
    task: Annotated[list[str], typer.Option(help="Questions to ask; repeatable.")] = (
        "social_iqa_cloze",
        "commonsense_qa_cloze",
    ),
    with_accuracy: Annotated[
        bool, typer.Option("--accuracy/--no-accuracy", help="Also ask the questions, which takes a CPU long.")
    ] = True,
    seed: int = 0,
    output: Annotated[Path, typer.Option(help="JSON, rewritten after every row.")] = Path("shared_heads.json"),
) -> None:
    """Train every row from the same weights on the same examples in the same order."""
    planned = [Row(name, steps, batch_size) for name in ("post", "layers", "heads")]
    settings = {"model": Path(model).name, "seed": seed, "held_out_examples": held_out_examples, "tasks": list(task)}
    settings |= {"followers": followers, "choosing_examples": choosing_examples}
    done = finished(output, settings, planned)
    if len(done) == len(planned):
        return
    result = described(settings)
    base, data, held_out, questions = load(
        model, data_dir, training_files, task, held_out_examples, seed, with_accuracy=with_accuracy, attention=NAME
    )
    if not 1 <= followers < base.config.num_hidden_layers:
        raise ValueError(f"followers={followers} of {base.config.num_hidden_layers} layers; use fewer")

    chosen: dict[str, Heads] = {}
    for row in tqdm([row for row in planned if row.name == "post" or row.name not in done], unit="row"):
        started = time.perf_counter()
        with sharing(chosen.get(row.name, {})):
            converted = {"converted_held_out_loss": held_out_loss(base, held_out)} if row.name in chosen else {}
            trained, found = run(row, base, data, held_out)
            found["accuracy"] = {name: accuracy(trained, asked) for name, asked in questions.items()}
        found = {**converted, **found, "seconds": round(time.perf_counter() - started, 1)}
        if row.name == "post":
            chosen = cheapest(trained, Examples(*(part[:choosing_examples] for part in data)), followers)
        following = {str(layer): list(heads) for layer, heads in chosen.get(row.name, {}).items()}
        done.setdefault(row.name, {"name": row.name, "options": row.options(), "heads": following, **found})
        write_atomically(output, json.dumps({**result, "rows": list(done.values())}, indent=1) + "\n")
        tqdm.write(f"{row.name}: held-out loss {found['held_out_loss']:.4f}, accuracy {found['accuracy']}")


if __name__ == "__main__":
    typer.run(main)
