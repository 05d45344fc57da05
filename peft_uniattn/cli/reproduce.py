"""`peft-uniattn reproduce`: the paper's tables on a model and data of one's own."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from .errors import reported

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}


def reproduce(
    context: typer.Context,
    output_dir: Annotated[Path, typer.Option(help="Where results, table and plot go.")],
    tables: Annotated[
        str, typer.Option(help="Of main, ablation, h2o, designs, grouping, number, size; separated by commas.")
    ] = "main",
    rows: Annotated[
        str, typer.Option(help="Only these rows of the tables, by name, separated by commas. Default: all.")
    ] = "",
    seeds: Annotated[str, typer.Option(help="Seeds of every row, separated by commas.")] = "0",
    tasks: Annotated[str, typer.Option(help="What to evaluate on, as in peft-uniattn eval.")] = (
        "social_iqa_cloze,commonsense_qa_cloze"
    ),
    data_dir: Annotated[
        Path | None, typer.Option(help="Directory with the published evaluation files. Default: the Hub.", exists=True)
    ] = None,
    prompt: Annotated[str, typer.Option(help="paper, as the rows are trained, or official.")] = "paper",
    num_fewshot: Annotated[int, typer.Option(help="Examples before each question.", min=0)] = 0,
    limit: Annotated[int | None, typer.Option(help="Only the first so many questions of each set.", min=1)] = None,
    stage1_share: Annotated[
        float, typer.Option(help="Share of the steps for stage 1; 0 leaves it out of all rows but two-stage.")
    ] = 0.05,
    grouping: Annotated[
        str, typer.Option(help="fixed: Superblocks as given; error or loss: those of least, with as many followers.")
    ] = "fixed",
    grouping_model: Annotated[
        str | None,
        typer.Option(help="Model to measure error or loss on, such as a post-trained one. Default: the base."),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Rows at a time; on several GPUs they take turns.", min=1)] = 1,
    keep_models: Annotated[bool, typer.Option(help="Keep every adapter and model.")] = False,
    model_name: Annotated[
        str | None, typer.Option(help="Honest name of the base in results.json. Default: model_name_or_path.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Requests per forward pass of the evaluation.", min=1)] = 32,
    ttft_prompts: Annotated[
        int | None, typer.Option(help="Prompts at a time for the time to the first token. Default: 16; 1 without GPU.")
    ] = None,
    ttft_tokens: Annotated[
        int | None, typer.Option(help="Tokens of each; 0: no times. Default: 2,048; 512 without a GPU.")
    ] = None,
) -> None:
    """
    Train and evaluate every row of the paper's tables: the base, plain post-training, UniAttn and its rivals.

    All rows get the same data and the same number of optimizer steps; what is left over are the arguments of
    `peft-uniattn train`. Ctrl-C is safe: the same command continues, row by row. Example:

        peft-uniattn reproduce --config configs/smollm2-135m/choices.yaml --output-dir out --seeds 0,1,2
    """
    with reported(continue_with=shlex.join(["peft-uniattn", *sys.argv[1:]])):
        from ..evaluation import task_specs
        from ..reproduce import Reproduction
        from ..reproduce.cell import Evaluation
        from ..reproduce.table import table
        from ..reproduce.ttft import Prompts

        names = _names(tasks)
        task_specs(names, data_dir=data_dir, num_fewshot=num_fewshot, prompt=prompt)
        run = Reproduction(
            directory=output_dir,
            argv=tuple(context.args),
            tables=_names(tables),
            rows=_names(rows),
            seeds=_parse_seeds(seeds),
            evaluation=Evaluation(
                names,
                None if data_dir is None else str(data_dir),
                num_fewshot=num_fewshot,
                prompt=prompt,
                batch_size=batch_size,
                limit=limit,
            ),
            stage1_share=stage1_share,
            grouping=grouping,
            grouping_model=grouping_model,
            jobs=jobs,
            keep_models=keep_models,
            prompts=Prompts(ttft_prompts, ttft_tokens),
            command=shlex.join(["peft-uniattn", *sys.argv[1:]]),
            model=model_name,
        )
        typer.echo(table(run.run()))
        typer.echo(f"saved: {output_dir}/results.json, table.md, accuracy.svg, curves.svg")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _parse_seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError:
        raise ValueError(f"seeds={text!r} must be whole numbers separated by commas, such as 0,1,2") from None
