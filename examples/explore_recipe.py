"""
Levers of the recipe, tried in seconds each: many short training runs of one small model, one row of a table each.

    python examples/explore_recipe.py MODEL ROWS DATA_DIR TRAINING_FILE... --steps 400 --output levers.json

ROWS is a JSON list such as `[{"name": "plain"}, {"name": "late", "superblocks": [[4, 5], [8, 9]], "plain_steps": 9}]`
with the options of `Row`; `explore_levers.json` is one for models of 30 layers. DATA_DIR holds the published
evaluation files. On a GPU an optimizer step is one CUDA graph over batches of one shape. No attention mask is needed:
what fills an example up comes after its answer, where no token that counts can see it. The output is rewritten after
every row, and a second call goes on where the first one stopped.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import itertools
import json
import math
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from explore_data import DEVICE, Examples, Questions, load_questions, training_examples
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from peft_uniattn import LLMDropConfig, UniAttnConfig, calibrate, to_standalone
from peft_uniattn.bench.conditions import conditions
from peft_uniattn.evaluation import task_questions
from peft_uniattn.training.data import IGNORE
from peft_uniattn.training.journal import write_atomically

WARMUP, REWARMUP, LOG_EVERY = 12, 8, 20  # steps; the second where training goes on after a conversion or stage 1
STAGE1_PARTS, STAGE1_LOSSES = ("compensation", "followers"), ("task", "streams")


@dataclass(frozen=True)
class Row:
    """
    One run. Without `superblocks` and `dropped_layers` the model itself is trained.

    Attributes:
        compensation: its design, or "none".
        rank: of the compensation; None: full.
        calibration_examples: the first ones of training; they count as steps. 0 leaves the compensation at zero.
        ridge: strength of the ridge in calibration.
        leader_from: of every Superblock, the layer, counted from 0 within it, whose W_q and W_k its leader takes over.
            Only without compensation, which would be calibrated to the leader's own softmax.
        steps, batch_size: default as in the command.
        plain_steps: so many of the steps before the conversion.
        compensation_learning_rate: factor on `learning_rate`; 0 freezes the compensation.
        head_scales: factor on the learning rate of a scale, from 1 on, for every query head of the followers; 0: none.
        stage1_steps: so many of the steps after the conversion train a part of the model only.
        stage1_parts: "compensation" (W_c), or "followers" (W_c, and the followers' W_v and W_o).
        stage1_loss: "task", or "streams": the error of the hidden states behind every layer, relative to the base's.
        stage1_learning_rate: in place of `learning_rate`.
        prompt_kl: weight of the KL divergence from the base on the tokens of the prompt.
        distillation: share of the loss that is the KL divergence from the model just before conversion, 0 to 1.
    """

    name: str
    steps: int
    batch_size: int
    superblocks: list[list[int]] | None = None
    dropped_layers: list[int] | None = None
    compensation: str = "input_and_heads"
    rank: int | None = None
    calibration_examples: int = 480
    ridge: float = 1e-2
    leader_from: int = 0
    learning_rate: float = 1e-4
    plain_steps: int = 0
    compensation_learning_rate: float = 1.0
    head_scales: float = 0.0
    stage1_steps: int = 0
    stage1_parts: str = "compensation"
    stage1_loss: str = "task"
    stage1_learning_rate: float = 5e-4
    prompt_kl: float = 0.0
    distillation: float = 0.0

    def __post_init__(self) -> None:
        if self.superblocks and self.dropped_layers:
            raise ValueError(f"{self.name}: superblocks and dropped_layers exclude each other; leave one out")
        if self.first + self.stage1_steps > self.steps:
            raise ValueError(
                f"{self.name}: {self.first} steps before conversion and stage1_steps={self.stage1_steps} of "
                f"steps={self.steps}; use more"
            )
        if self.leader_from and self.compensation != "none":
            raise ValueError(f"{self.name}: leader_from={self.leader_from} goes with compensation='none' only")
        has_part = self.followers and (self.compensation != "none" or self.stage1_parts == "followers")
        if self.stage1_steps and not has_part:
            raise ValueError(
                f"{self.name}: stage1_steps={self.stage1_steps} need followers with a compensation to train, or "
                "stage1_parts='followers'"
            )
        if self.stage1_parts not in STAGE1_PARTS or self.stage1_loss not in STAGE1_LOSSES:
            raise ValueError(
                f"{self.name}: stage1_parts={self.stage1_parts!r} must be one of {', '.join(STAGE1_PARTS)}, and "
                f"stage1_loss={self.stage1_loss!r} one of {', '.join(STAGE1_LOSSES)}"
            )

    @property
    def followers(self) -> list[int]:
        return [layer for block in self.superblocks or () for layer in block[1:]]

    def in_stage1(self, name: str) -> bool:
        """Whether stage 1 trains the parameter `name`."""
        projections = (f"layers.{layer}.self_attn.{part}" for layer in self.followers for part in ("v_proj", "o_proj"))
        return "compensation" in name or (
            self.stage1_parts == "followers" and any(part in name for part in projections)
        )

    @property
    def calibrated(self) -> int:
        """With how many examples."""
        return self.calibration_examples if self.superblocks and self.compensation != "none" else 0

    def options(self) -> dict[str, object]:
        """Steps, batch size and what differs from the defaults."""
        given = {field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)[1:]}
        return {name: value for name, (value, default) in given.items() if value != default}

    @property
    def first(self) -> int:
        """The first step after the conversion."""
        return self.plain_steps + math.ceil(self.calibrated / self.batch_size)


def precision() -> torch.autocast:
    """bfloat16 on a GPU; a cache of casted weights would outlive the capture of a graph."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda", cache_enabled=False)


def logits_at(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits (batch, positions, vocabulary) of a model whose head is a projection and nothing else."""
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    chosen = hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
    return model.get_output_embeddings()(chosen).float()


def divergence(reference: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean KL divergence, in nats, from the distributions of `reference`, where `mask` is True."""
    reference = reference.log_softmax(-1)
    kl = (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1)
    return (kl * mask).sum() / mask.sum()


def loss_of(
    model: PreTrainedModel,
    batch: list[torch.Tensor],
    row: Row,
    base: PreTrainedModel,
    teacher: PreTrainedModel | None,
    prompt: torch.Tensor,
) -> torch.Tensor:
    """Mean over the answers' tokens, and what the row adds; `prompt` are positions (1, count)."""
    ids, positions, targets = batch
    prompt = prompt.expand(len(ids), -1)
    logits = logits_at(model, ids, torch.cat([positions, prompt], 1) if row.prompt_kl else positions)
    answer = logits[:, : positions.shape[1]]
    loss = F.cross_entropy(answer.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    if teacher is not None:
        with torch.no_grad():
            reference = logits_at(teacher, ids, positions)
        loss = (1 - row.distillation) * loss + row.distillation * divergence(reference, answer, targets != IGNORE)
    if row.prompt_kl:
        with torch.no_grad():
            reference = logits_at(base, ids, prompt)
        loss = loss + row.prompt_kl * divergence(reference, logits[:, positions.shape[1] :], prompt < positions[:, :1])
    return loss


def stream_error(model: PreTrainedModel, batch: list[torch.Tensor], *, base: PreTrainedModel) -> torch.Tensor:
    """‖h - h_base‖² / ‖h_base‖² of the hidden states h behind every layer, mean over layers and tokens."""
    ids, positions, _ = batch
    with torch.no_grad():
        expected = hidden_states(base, ids)
    error = (hidden_states(model, ids) - expected).square().sum(-1) / expected.square().sum(-1)
    mask = torch.arange(ids.shape[1], device=ids.device) < positions.amax(1, keepdim=True) + 2
    return (error * mask).sum() / mask.sum() / len(error)


def hidden_states(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """(layers, batch, length, hidden size), the last one normalised."""
    return torch.stack(model.base_model(ids, use_cache=False, output_hidden_states=True).hidden_states[1:]).float()


class HeadScales(nn.Module):
    """One factor per query head, on the columns of W_o."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(heads, device=DEVICE))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return (weight.unflatten(1, (len(self.scale), -1)) * self.scale[:, None]).flatten(1)


def captured(step: Callable[[], None], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """`step` as one CUDA graph. It runs a few times for that: learning rates must be 0, other state is reset."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def rate(row: Row, step: int, first: int) -> float:
    """Warm-up and cosine from 1 over the whole row, with a second warm-up where training goes on at step `first`."""
    again = min(1, (step - first + 1) / REWARMUP) if first and (row.plain_steps or row.stage1_steps) else 1
    cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - WARMUP) / max(1, row.steps - WARMUP)))
    return min(1, (step + 1) / WARMUP) * again * cosine


def factor_of(row: Row, name: str, stage1: bool) -> float:
    """By what the learning rate of a parameter differs from the others'."""
    if stage1 and not row.in_stage1(name):
        return 0.0
    if name.endswith(".scale"):
        return row.head_scales
    return row.compensation_learning_rate if "compensation" in name else 1.0


def train(
    model: PreTrainedModel,
    data: Examples,
    row: Row,
    steps: range,
    loss: Callable[..., torch.Tensor],
    *,
    stage1: bool = False,
) -> list[float]:
    """Train all weights, or stage 1's, with AdamW without decay; returns the loss of every `LOG_EVERY`-th step."""
    parameters: dict[float, list[torch.nn.Parameter]] = defaultdict(list)  # by the factor of their learning rate
    peak = row.stage1_learning_rate if stage1 else row.learning_rate
    for name, parameter in model.train().named_parameters():
        factor = factor_of(row, name, stage1)
        if parameter.requires_grad_(factor > 0).requires_grad:
            parameters[factor].append(parameter)
    groups = [
        {"params": part, "factor": factor, "lr": torch.zeros((), device=DEVICE)} for factor, part in parameters.items()
    ]
    on_gpu = {"fused": True, "capturable": True} if DEVICE.type == "cuda" else {}
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, **on_gpu)
    trained = list(itertools.chain(*parameters.values()))

    def rows(step: int) -> torch.Tensor:
        return torch.arange(step * row.batch_size, (step + 1) * row.batch_size) % len(data.ids)

    batch, last = data.batch(rows(steps.start)), torch.zeros((), device=DEVICE)

    def step() -> None:
        with precision():
            value = loss(model, batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # a graph goes on writing to the same place
        last.copy_(value.detach())

    run, losses = captured(step, optimizer) if DEVICE.type == "cuda" else step, []
    for number in steps:
        for buffer, new in zip(batch, data.batch(rows(number)), strict=True):
            buffer.copy_(new)
        for group in optimizer.param_groups:
            group["lr"].fill_(peak * rate(row, number, steps.start) * group["factor"])
        run()
        if (number - steps.start) % LOG_EVERY == 0:
            losses.append(round(last.item(), 4))
    model.zero_grad(set_to_none=True)
    return losses


@torch.no_grad()
def token_losses(model: PreTrainedModel, examples: Examples, batch_size: int = 256) -> torch.Tensor:
    """(count, answer) in nats, 0 where the answer is over."""
    losses = torch.zeros(examples.targets.shape)
    model.eval()
    for rows in examples.positions.amax(1).argsort().split(batch_size):
        ids, positions, targets = examples.batch(rows)
        with precision():
            logits = logits_at(model, ids[:, : positions.max() + 1], positions)
        losses[rows] = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE, reduction="none").cpu()
    return losses


def held_out_loss(model: PreTrainedModel, examples: Examples) -> float:
    return (token_losses(model, examples).double().sum() / (examples.targets != IGNORE).sum()).item()


def accuracy(model: PreTrainedModel, questions: Questions) -> float:
    """Percentage of questions whose right answer has the highest log-likelihood per character."""
    scores = -token_losses(model, questions.examples).sum(1) / questions.characters
    best = [int(part.argmax()) for part in scores.split(questions.choices)]
    return 100 * sum(map(int.__eq__, best, questions.right)) / len(best)


def convert(model: PreTrainedModel, row: Row, data: Examples) -> PreTrainedModel:
    """The model with shared softmax or without some of its attention, as a model of its own."""
    model.eval().requires_grad_(False)
    if row.dropped_layers:
        return to_standalone(get_peft_model(model, LLMDropConfig(layers=row.dropped_layers)))
    # Before the followers lose theirs.
    inside = {block[0]: model.base_model.layers[block[row.leader_from]].self_attn for block in row.superblocks}
    scores = {leader: copy.deepcopy((own.q_proj, own.k_proj)) for leader, own in inside.items()}
    config = UniAttnConfig(superblocks=row.superblocks, compensation=row.compensation, r=row.rank)
    adapted = get_peft_model(model, config)
    if row.calibrated:
        examples = data.for_calibration(row.calibration_examples, row.batch_size)
        calibrate(adapted, examples, ridge=row.ridge, progress=False)
    converted = to_standalone(adapted)
    layers = converted.base_model.layers
    if row.leader_from:
        for leader, (queries, keys) in scores.items():
            layers[leader].self_attn.q_proj, layers[leader].self_attn.k_proj = queries, keys
    if row.head_scales:
        for layer in row.followers:
            heads = HeadScales(converted.config.num_attention_heads)
            parametrize.register_parametrization(layers[layer].self_attn.o_proj, "weight", heads)
    return converted


def run(row: Row, base: PreTrainedModel, data: Examples, held_out: Examples) -> tuple[PreTrainedModel, dict]:
    """The trained model, and the losses on the way."""
    model, teacher, found = copy.deepcopy(base), None, {}
    loss = partial(loss_of, row=row, base=base, prompt=data.prompt_positions())
    if row.plain_steps:
        steps = range(row.plain_steps)
        found["plain_losses"] = train(model, data, row, steps, partial(loss, teacher=None))
        found["plain_held_out_loss"] = held_out_loss(model, held_out)
    if row.distillation:
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
    if row.superblocks or row.dropped_layers:
        model = convert(model, row, data)
        found["converted_held_out_loss"] = held_out_loss(model, held_out)
    second = row.first + row.stage1_steps
    if row.stage1_steps:
        alone = partial(loss, teacher=teacher) if row.stage1_loss == "task" else partial(stream_error, base=base)
        found["stage1_losses"] = train(model, data, row, range(row.first, second), alone, stage1=True)
        found["stage1_held_out_loss"] = held_out_loss(model, held_out)
    found["losses"] = train(model, data, row, range(second, row.steps), partial(loss, teacher=teacher))
    return model, {**found, "held_out_loss": held_out_loss(model, held_out)}


def finished(output: Path, settings: dict[str, object], planned: list[Row]) -> dict[str, dict]:
    """Rows by name that an earlier call left; ValueError where it was another experiment."""
    if not output.exists():
        return {}
    before = json.loads(output.read_text())
    done, options = {row["name"]: row for row in before["rows"]}, {row.name: row.options() for row in planned}
    changed = [name for name in settings if before.get(name) != settings[name]]
    changed += [name for name in done.keys() & options.keys() if done[name]["options"] != options[name]]
    if changed:
        raise ValueError(f"output={str(output)!r} has other results for {', '.join(changed)}; use another output")
    return done


def described(settings: dict[str, object]) -> dict[str, object]:
    """The settings of a result, with the command, what it ran on, and the date."""
    where = {"command": shlex.join(["python", *sys.argv]), "conditions": conditions(DEVICE)}
    return {**where, **settings, "date": datetime.date.today().isoformat()}


def load(
    model: str,
    data_dir: Path,
    training_files: list[str],
    tasks: Sequence[str],
    held_out_examples: int,
    seed: int,
    *,
    with_accuracy: bool = True,
    attention: str = "sdpa",
) -> tuple[PreTrainedModel, Examples, Examples, dict[str, Questions]]:
    """The base in float32, examples to train on and held out, and questions by task; everything random is seeded."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = task_questions(list(tasks), data_dir=data_dir)
    data, held_out = training_examples(training_files, tokenizer, held_out_examples, seed, asked)
    questions = load_questions(list(tasks), tokenizer, data_dir) if with_accuracy else {}
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation=attention).to(DEVICE)
    return base.eval().requires_grad_(False), data, held_out, questions


def main(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a small Llama-like model.")],
    rows: Annotated[Path, typer.Argument(help="JSON list of what to run.")],
    data_dir: Annotated[Path, typer.Argument(help="Where the published evaluation files are.")],
    training_files: list[str],
    steps: Annotated[int, typer.Option(help="Optimizer steps of a row that does not say.")] = 400,
    batch_size: int = 48,
    held_out_examples: int = 2560,
    task: Annotated[list[str], typer.Option(help="Questions to ask; repeatable.")] = (
        "social_iqa_cloze",
        "commonsense_qa_cloze",
    ),
    with_accuracy: Annotated[
        bool, typer.Option("--accuracy/--no-accuracy", help="Also ask the questions, which takes a CPU long.")
    ] = True,
    seed: int = 0,
    output: Annotated[Path, typer.Option(help="JSON, rewritten after every row.")] = Path("explored.json"),
) -> None:
    """Train every row from the same weights on the same examples in the same order."""
    defaults = {"steps": steps, "batch_size": batch_size}
    planned = [Row(**{**defaults, **options}) for options in json.loads(rows.read_text())]
    settings = {"model": Path(model).name, "seed": seed, "held_out_examples": held_out_examples, "tasks": list(task)}
    done = finished(output, settings, planned)
    result = described(settings)
    base, data, held_out, questions = load(
        model, data_dir, training_files, task, held_out_examples, seed, with_accuracy=with_accuracy
    )
    for row in tqdm([row for row in planned if row.name not in done], unit="row"):
        started = time.perf_counter()
        trained, found = run(row, base, data, held_out)
        found["accuracy"] = {name: accuracy(trained, asked) for name, asked in questions.items()}
        found["seconds"] = round(time.perf_counter() - started, 1)
        done[row.name] = {"name": row.name, "options": row.options(), **found}
        write_atomically(output, json.dumps({**result, "rows": list(done.values())}, indent=1) + "\n")
        tqdm.write(f"{row.name}: held-out loss {found['held_out_loss']:.4f}, accuracy {found['accuracy']}")


if __name__ == "__main__":
    typer.run(main)
