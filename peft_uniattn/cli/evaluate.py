"""`peft-uniattn eval`: accuracy by lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import reported
from .output import check_output


def evaluate(
    model: Annotated[str, typer.Argument(help="Path or Hub name: a base model, an adapter or a standalone model.")],
    tasks: Annotated[
        str, typer.Option(help="Tasks, separated by commas. Default: the five sets of the paper.")
    ] = "pubmedqa,medmcqa,medqa_4options,social_iqa,commonsense_qa",
    num_fewshot: Annotated[int, typer.Option(help="Examples before each question.", min=0)] = 0,
    prompt: Annotated[str, typer.Option(help="official, or for cloze tasks paper: as the paper trains.")] = "official",
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Directory with the published files of the sets. Default: the Hub.", exists=True),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Requests per forward pass.", min=1)] = 8,
    max_length: Annotated[
        int | None, typer.Option(help="Longest input in tokens. Default: the model's.", min=1)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many questions of each set.", min=1)] = None,
    dtype: Annotated[str, typer.Option(help="Data type of the weights.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the checkpoint.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the choice of examples.")] = 0,
    h2o_budget: Annotated[
        float | None, typer.Option(help="Share of the tokens that H2O keeps in the cache while answers are scored.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write lm-eval's results here, as JSON.")] = None,
) -> None:
    """
    Measure accuracy with lm-eval: the paper's five sets, or any task that lm-eval knows.

    Example:

        peft-uniattn eval quickstart-output/model --tasks social_iqa,commonsense_qa --limit 200
    """
    with reported():
        import torch
        import transformers
        from lm_eval.utils import make_table

        from ..evaluation import evaluate as run
        from ..evaluation import load_for_evaluation, task_specs, write_results
        from ..eviction.budget import Budget

        transformers.logging.set_verbosity_error()
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        # Before the model, whose loading takes much longer.
        if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype={dtype!r} is not known; use auto, float32, bfloat16 or float16")
        check_output(output)
        if h2o_budget is not None:
            Budget(h2o_budget)
        task_specs(names, data_dir=data_dir, num_fewshot=num_fewshot, prompt=prompt)
        loaded, tokenizer = load_for_evaluation(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        try:
            results = run(
                loaded,
                tokenizer,
                names,
                num_fewshot=num_fewshot,
                prompt=prompt,
                data_dir=data_dir,
                batch_size=batch_size,
                max_length=max_length,
                limit=limit,
                seed=seed,
                h2o_budget=h2o_budget,
            )
        except ConnectionError as error:
            raise ValueError(
                f"{error}; where the Hub is out of reach, give the folder with the published files of the paper's "
                "sets as --data-dir"
            ) from error
        typer.echo(make_table(results))
        if output is not None:
            write_results(results, output)
            typer.echo(f"saved: {output}")
