"""
Which of its leader's heads a follower's head uses: the one in its own place, as UniAttn has it, or a matched one.

    python examples/match_heads.py MODEL ROWS DATA_DIR TRAINING_FILE... --output heads.json

The order of heads in a layer is arbitrary. ROWS is a list as for `explore_recipe.py` (`match_heads.json` is one for
models of 30 layers) with two more options: `heads`, a key of `KINDS`, and `choose`, a number of followers whose
Superblocks are chosen by loss given the matching. Heads are matched, and Superblocks chosen, on the model after plain
post-training, which is the first row. A second call goes on where the first one stopped, after training it again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from explore_data import Examples
from explore_recipe import Row, accuracy, described, finished, load, run
from head_matching import KINDS, costs, heads_of, matched
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from peft_uniattn.grouping.choose import choose
from peft_uniattn.training.data import IGNORE
from peft_uniattn.training.journal import write_atomically

BATCH = 48  # examples at a time, where Superblocks are chosen


@dataclass(frozen=True)
class MatchedRow(Row):
    """
    A row of `explore_recipe.py`, and

    Attributes:
        heads: how they are matched, a key of `KINDS`.
        choose: how many followers; their Superblocks are then chosen, instead of given.
    """

    heads: str = "identity"
    choose: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads not in KINDS:
            raise ValueError(f"{self.name}: heads={self.heads!r} must be one of {', '.join(KINDS)}")
        if self.choose and (self.superblocks or self.dropped_layers):
            raise ValueError(f"{self.name}: choose={self.choose} finds Superblocks; leave out those that are given")


def labelled(data: Examples, count: int) -> Iterator[dict[str, torch.Tensor]]:
    """The first examples, with the labels of their answers."""
    every = torch.arange(min(count, len(data.ids))).split(BATCH)
    for batch, rows in zip(data.for_calibration(count, BATCH), every, strict=True):
        labels = torch.full(batch["input_ids"].shape, IGNORE)
        row, column = (data.targets[rows] != IGNORE).nonzero(as_tuple=True)
        labels[row, data.positions[rows][row, column] + 1] = data.targets[rows][row, column]
        yield {**batch, "labels": labels}


def main(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a small Llama-like model.")],
    rows: Annotated[Path, typer.Argument(help="JSON list of what to run besides plain post-training.")],
    data_dir: Annotated[Path, typer.Argument(help="Where the published evaluation files are.")],
    training_files: list[str],
    steps: Annotated[int, typer.Option(help="Optimizer steps of a row that does not say.")] = 400,
    batch_size: int = 48,
    held_out_examples: int = 2560,
    matching_examples: Annotated[int, typer.Option(help="Training examples to match heads by.")] = 192,
    choosing_examples: Annotated[int, typer.Option(help="Training examples to choose Superblocks by.")] = 480,
    task: Annotated[list[str], typer.Option(help="Questions to ask; repeatable.")] = (
        "social_iqa_cloze",
        "commonsense_qa_cloze",
    ),
    seed: int = 0,
    output: Annotated[Path, typer.Option(help="JSON, rewritten after every row.")] = Path("heads.json"),
) -> None:
    """Train every row from the same weights on the same examples in the same order."""
    defaults = {"steps": steps, "batch_size": batch_size}
    planned = [MatchedRow(**{**defaults, **options}) for options in ({"name": "post"}, *json.loads(rows.read_text()))]
    settings = {"model": Path(model).name, "seed": seed, "held_out_examples": held_out_examples, "tasks": list(task)}
    settings |= {"matching_examples": matching_examples, "choosing_examples": choosing_examples}
    done = finished(output, settings, planned)
    if all(row.name in done for row in planned):
        return
    chosen: dict[str, dict[str, list[list[int]]]] = json.loads(output.read_text())["chosen"] if done else {}
    result = described(settings)
    base, data, held_out, questions = load(model, data_dir, training_files, task, held_out_examples, seed)

    def trained(row: MatchedRow) -> PreTrainedModel:
        started = time.perf_counter()
        blocks = chosen[row.heads][str(row.choose)] if row.choose else row.superblocks
        trained, found = run(replace(row, superblocks=blocks, choose=0), base, data, held_out)
        found["accuracy"] = {name: accuracy(trained, asked) for name, asked in questions.items()}
        found["seconds"] = round(time.perf_counter() - started, 1)
        done.setdefault(row.name, {"name": row.name, "options": row.options(), "superblocks": blocks, **found})
        written = {**result, "chosen": chosen, "rows": list(done.values())}
        write_atomically(output, json.dumps(written, indent=1) + "\n")
        tqdm.write(f"{row.name}: held-out loss {found['held_out_loss']:.4f}, accuracy {found['accuracy']}")
        return trained

    post = trained(planned[0])
    cost, choices = costs(post, data, matching_examples), {}
    for row in tqdm([row for row in planned if row.name not in done], unit="row"):
        with matched(heads_of(cost, row.heads, base.config)):
            if row.choose and str(row.choose) not in chosen.setdefault(row.heads, {}):
                if row.heads not in choices:
                    examples = labelled(data, choosing_examples)
                    choices[row.heads] = choose(post, examples, followers=row.choose, method="loss")
                chosen[row.heads][str(row.choose)] = choices[row.heads].with_followers(row.choose)
            trained(row)


if __name__ == "__main__":
    typer.run(main)
