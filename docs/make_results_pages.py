"""
Writes the pages of docs/results from the raw files beside them, and the index:

    python docs/make_results_pages.py

A raw file of a known family (`reproduce_NAME.json`, `ttft_NAME.json` …) needs no more than to lie in docs/results.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import results_tables as tables  # noqa: E402
from results_tables import Raw, grid, rows_of  # noqa: E402

from peft_uniattn.reproduce.plot import plot, plot_curves, plot_sweeps, sweeps  # noqa: E402

RESULTS, PLOTS = DOCS / "results", DOCS / "plots"
MADE = "<!-- made by docs/make_results_pages.py from the raw files; edit those -->"
VERSIONS = ("python", "torch", "cudnn", "triton", "kernels", "transformers", "peft", "trl", "vllm")


@dataclass(frozen=True)
class Family:
    """
    Raw files that share a page.

    Attributes:
        page: its name, without ending.
        title: its heading.
        about: what the files are, and where the words about them stand.
        tables: how a file becomes a table, by pattern of its name; None for files that are only named.
    """

    page: str
    title: str
    about: str
    tables: dict[str, Callable[[Raw], str] | None]

    def table_of(self, name: str) -> Callable[[Raw], str] | None:
        return next(table for pattern, table in self.tables.items() if fnmatch(name, pattern))


FAMILIES = (
    Family(
        "quality",
        "Quality after training",
        "`peft-uniattn reproduce`: the base, plain post-training, UniAttn and its rivals, on the same data for as "
        "many steps ([evaluation](../evaluation.md)); and `explore_recipe.py`, `match_heads.py` and `share_heads.py` "
        "of the examples: short runs, one lever each.",
        {
            "reproduce_smollm2_by_loss.json": tables.reproduce,  # the main table first
            "reproduce_*.json": tables.reproduce,
            "reproduce_*.txt": None,
            "trained_*.json": None,
            "explore_*.json": tables.levers,
        },
    ),
    Family(
        "checkpoints",
        "The recipe on real checkpoints",
        "The [quick start](../quickstart.md) and `examples/real_checkpoints.py`.",
        {"quickstart.json": tables.losses, "real_checkpoint_*.json": tables.losses},
    ),
    Family(
        "first_token",
        "Time to the first token",
        "`peft-uniattn bench ttft`, whole models, and `peft_uniattn.bench.prefill_attention`, one layer "
        "([performance](../performance.md), [kernels](../kernels.md)). A simulated contender keeps tiles at random, "
        "because random weights have no attention to skip by.",
        {
            "ttft_profile_*.json": None,
            "ttft_*.json": tables.first_token,
            "prefill_attention_*.json": tables.prefill_attention,
            "prefill_*.json": None,
        },
    ),
    Family(
        "decoding",
        "Time of decoding",
        "`peft-uniattn bench decode`, whole models, and `peft_uniattn.bench.decode_attention`, one layer "
        "([performance](../performance.md), [kernels](../kernels.md)).",
        {
            "decode_attention_*.json": tables.decode_attention,
            "decode_attention_*.txt": None,
            "decode_profile_*.json": None,
            "decode_tuning_*.json": None,
            "decode_*.json": tables.decode,
        },
    ),
    Family(
        "real_text",
        "Kernels on real text",
        "What kernels and skipping change (`examples/kernels_on_real_text.py`), and how much real attention lets "
        "followers skip (`examples/kept_tiles.py`; [kernels](../kernels.md)).",
        {
            "kernels_real_text_*.json": tables.real_text,
            "kernels_*.txt": None,
            "kept_tiles_*.json": tables.kept_tiles,
            "kept_tiles_*.txt": None,
        },
    ),
    Family(
        "memory_and_training",
        "Memory, and the cost of training",
        "`peft-uniattn bench memory` and `peft-uniattn bench train` ([performance](../performance.md)).",
        {"memory_*.json": tables.memory, "bench_train_*.json": tables.training_steps},
    ),
    Family(
        "served",
        "Serving",
        "`peft-uniattn bench serve` with vLLM ([serving](../serving.md)).",
        {"bench_serve_*.json": tables.serving},
    ),
    Family(
        "analysed",
        "Analyses",
        "`peft-uniattn analyze` ([analyses](../analyses.md)).",
        {"analyze_*.json": tables.analysis},
    ),
    Family(
        "methods",
        "H2O, rivals and distillation",
        "Examples on one small model: [H2O](../h2o.md), [rivals](../rivals.md), [distillation](../distillation.md).",
        {
            "h2o_*.json": tables.eviction,
            "rivals_*.json": tables.rivals,
            "distillation_*.json": tables.distillation,
        },
    ),
    Family(
        "checked",
        "Reliability and parallel training",
        "What was tried to break it ([promises](../promises.md)), gradients of several processes against those of one "
        "([at scale](../parallel.md)), those of cuDNN's attention ([training](../training.md#gradients-of-nan)), and "
        "evaluation questions looked for in training data.",
        {
            "reliability.json": tables.reliability,
            "two_gpus.json": tables.ranks,
            "recipe_two_gpus_*.txt": None,
            "coverage_*.txt": None,
            "cudnn_*.json": None,
            "evaluation_data_*.json": None,
        },
    ),
)

# How a heading of LOG.md begins -> what did not come out as hoped.
MISSED = {
    "Why Qwen's gradients were NaN": "12 followers of SmolLM2-135M end 1.0 ± 0.5 points below plain post-training on "
    "medical questions, with the third seed; Qwen2.5-Coder-0.5B answered PubMedQA with no whatever it was asked.",
    "Answers that a tokenizer joins": "Qwen2.5-Coder-0.5B measured again: 10 followers end 2.2 points below plain "
    "post-training, and LLMDrop is as good or better on as many layers, on medical questions as well.",
    "Skipping that times itself": "timed by short runs, `auto` left skipping out where it gains 0.01 to 0.02; "
    "prompts in chunks take the base twice the time of one piece.",
    "Levers at full length": "on SmolLM2-135M nothing but more steps moves the distance to plain post-training.",
    "Skipping on real checkpoints": "the goal of 0.88 at 32k is missed on real text as well; below 16k skipping "
    "loses.",
    "Three seeds of Qwen2.5": "10 followers end 2.1 points below plain post-training, and LLMDrop is as good on as "
    "many layers.",
    "Matched heads": "nothing at 6 followers, and a gain of one row and one seed at 12.",
    "Superblocks by loss": "12 followers still end 2.0 points below plain post-training, and LLMDrop on half of the "
    "layers is not behind at equal cache; seven levers brought nothing.",
    "Decoding by group of kernels": "what keeps decoding with skipping from its goals is in the products of both "
    "sides; one layer's goals are missed at one shape each; weighing large heads does not pay below 6 followers.",
    "Bounds of the goals that were missed": "what keeps decoding with skipping and long prompts from theirs, counted.",
    "Compiled decoding": "compiling helps the base as much; both goals with skipping were missed again.",
    "Closing the gap": "12 followers ended 2.0 points below plain post-training, the goal was 0.5; stage 1 brought "
    "nothing; LLMDrop was better at equal cache.",
    "First look at the main table": "with a quarter of the steps in stage 1, UniAttn was last of what was trained.",
    "Real checkpoints on very little data": "2 to 4 calibration tokens per dimension are worse than none.",
    "Real checkpoints on instruction data": "stage 1 at 1e-4 hurt Qwen2.5-Coder-0.5B.",
    "Self-distillation in stage 1": "a gain that cannot be told from noise.",
    "H2O on SmolLM2-135M": "an untrained model, so far from the base that eviction shows nothing.",
    "Kernels inside the model": "the goals with skipping were missed, in prompts and in decode.",
    "Decode attention kernels as they stand": "the leader at 32 × 8k and the follower at 1 × 32k missed their goals.",
    "Decode attention kernels (": "what was tried on the way, and dropped.",
    "Analyses of SmolLM2-135M": "several of the paper's figures look otherwise on a small, untrained model; the "
    "pseudoinverse is worse than none.",
}


def pages() -> dict[str, str]:
    """The text of every page by file name; the index is README.md."""
    made = {f"{family.page}.md": _page(family) for family in FAMILIES}
    return {**made, "README.md": _index()}


def files_of(family: Family) -> list[Path]:
    """The family's raw files: those with a table first, in the order of the family's patterns, then by name."""
    patterns = list(family.tables)

    def place(path: Path) -> tuple[bool, int, str]:
        first = next(index for index, pattern in enumerate(patterns) if fnmatch(path.name, pattern))
        return family.tables[patterns[first]] is None, first, path.name

    found = (path for path in RESULTS.iterdir() if any(fnmatch(path.name, pattern) for pattern in family.tables))
    return sorted(found, key=place)


def plots_of(path: Path) -> dict[str, Path]:
    """Pictures of a raw file by caption."""
    if path.name.startswith("analyze_"):
        drawn = PLOTS / f"{path.stem.removeprefix('analyze_')}.svg"
        return {"Drawn by `peft-uniattn analyze show`": drawn} if drawn.exists() else {}
    if not fnmatch(path.name, "reproduce_*.json"):
        return {}
    results = rows_of(_load(path))
    pictures = {"Accuracy against the cache that is left": PLOTS / f"{path.stem}.svg"}
    if any(result.curves for result in results):
        pictures["Losses on the way"] = PLOTS / f"{path.stem}_curves.svg"
    if sweeps(results):
        pictures["Accuracy against number and size of Superblocks"] = PLOTS / f"{path.stem}_sweeps.svg"
    return pictures


def draw(path: Path) -> None:
    """Draw the pictures of a raw file of `reproduce`."""
    raw = _load(path)
    caption = f"{path.name}, {facts(raw).get('hardware', '')}"
    for picture in plots_of(path).values():
        drawing = {"curves": plot_curves, "sweeps": plot_sweeps}.get(picture.stem.rpartition("_")[2], plot)
        drawing(rows_of(raw), picture, caption=caption)


def facts(raw: Raw) -> dict[str, str]:
    """Model, data, hardware, versions, seeds and date of a raw file, as far as it says."""
    raw = {**raw, **raw.get("receipt", {})}
    rows = raw.get("results") if isinstance(raw.get("results"), list) else raw.get("rows")
    first = rows[0] if rows and "environment" in rows[0] else {}
    where = first.get("environment") or raw.get("environment") or raw.get("conditions") or raw.get("versions") or {}
    settings = raw.get("settings", {})
    models = settings.get("models", settings)
    data = raw.get("data")
    seeds = sorted({row["seed"] for row in rows}) if first else [raw.get("seed", models.get("seed"))]
    threads = f", {where['threads']} threads" if "threads" in where else ""
    hardware = raw.get("hardware") or where.get("hardware") or where.get("device") or where.get("gpu")
    found = {
        "model": raw.get("model")
        or raw.get("base_model")
        or raw.get("base")
        or models.get("model")
        or models.get("base")
        or models.get("shape"),
        "data": data["name"] if isinstance(data, dict) else data,
        "hardware": hardware and f"{hardware}{threads}",
        "versions": ", ".join(f"{name} {where[name]}" for name in VERSIONS if name in where),
        "seeds" if len(seeds) > 1 else "seed": ", ".join(str(seed) for seed in seeds if seed is not None),
        "date": raw.get("date") or _date_served(raw),
    }
    return {name: str(value) for name, value in found.items() if value}


def _date_served(raw: Raw) -> str | None:
    """vLLM's benchmark notes the time of every run, 20260131-120000."""
    runs = [run for checkpoint in raw.get("checkpoints", {}).values() for run in checkpoint["runs"]]
    return f"{runs[0]['date'][:4]}-{runs[0]['date'][4:6]}-{runs[0]['date'][6:8]}" if runs else None


def _page(family: Family) -> str:
    parts = [MADE, f"# {family.title}", family.about]
    for path in files_of(family):
        table = family.table_of(path.name)
        parts.append(f"## {path.stem}")
        parts.append(f"Raw: [{path.name}]({path.name}). {_conditions(path, table)}".strip())
        if table is not None:
            raw = _load(path)
            if commands := _commands(raw):
                parts.append(f"```bash\n{commands}\n```")
            parts.append(table(raw))
            parts += [f"![{caption}](../plots/{picture.name})" for caption, picture in plots_of(path).items()]
    return "\n\n".join(parts) + "\n"


def _conditions(path: Path, table: object) -> str:
    if table is None:
        return "Kept as it came; what it says is in the [log](LOG.md)."
    known = facts(_load(path))
    missing = [name for name in ("hardware", "date") if name not in known]
    said = "; ".join(f"{name}: {value}" for name, value in known.items())
    return f"{said}{'; not in the file: ' + ', '.join(missing) if missing else ''}."


def _commands(raw: Raw) -> str:
    commands = raw.get("commands") or raw.get("command") or ""
    if isinstance(commands, dict):
        commands = list(commands.values())
    return commands if isinstance(commands, str) else "\n".join(commands)


def _index() -> str:
    rows = [
        (
            f"[{family.title}]({family.page}.md)",
            family.about.replace("\n", " "),
            ", ".join(f"[{path.stem}]({path.name})" for path in files_of(family)),
        )
        for family in FAMILIES
    ]
    missed = "\n".join(
        f"- [{heading.split(' (')[0]}](LOG.md#{_anchor(heading)}): {what}" for heading, what in MISSED.items()
    )
    return f"""{MADE}

# Results

Every table here is made from raw output of a command that it names, with hardware, versions and seed as far as the raw
file says. [LOG.md](LOG.md) tells what was expected, what came out, and what did not work.

{grid(("page", "what it is", "raw files"), rows)}

## What did not come out as hoped

{missed}

## Adding results

Put the raw file into this folder under a name of its family, such as `reproduce_MODEL.json` for the `results.json` of
`peft-uniattn reproduce`, and run `python docs/make_results_pages.py`.
"""


def _anchor(start: str) -> str:
    """What the heading of LOG.md that begins so can be linked by."""
    log = (RESULTS / "LOG.md").read_text(encoding="utf-8")
    (heading,) = (line.removeprefix("## ") for line in log.splitlines() if line.startswith(f"## {start}"))
    return re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    """Write pages and pictures."""
    for path in files_of(FAMILIES[0]):
        if path.suffix == ".json":
            draw(path)
    for name, text in pages().items():
        (RESULTS / name).write_text(text, encoding="utf-8")
        print(f"written: docs/results/{name}")


if __name__ == "__main__":
    main()
