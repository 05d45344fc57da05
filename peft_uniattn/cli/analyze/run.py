"""What every analysis does around its measurement: load, measure, show, save, draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import reported
from ..output import check_output
from .show import print_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...analysis.data import Sequences


@dataclass(frozen=True, kw_only=True)
class Request:
    """
    What the user asked of any analysis; see `options` for what they mean.

    Attributes:
        settings: the options that are the analysis' own.
    """

    analysis: str
    model: str | None
    dataset: str | None
    length: int
    sequences: int
    held_out: int
    batch_size: int
    dtype: str
    attn: str | None
    device: str | None
    threads: int | None
    seed: int
    output: Path | None
    plot: Path | None
    settings: dict[str, Any]


def run(
    request: Request,
    measure: Callable[[PreTrainedModel, Sequences], dict[str, Any]],
) -> None:
    """
    Load model and data, measure, print a table, and write what was asked for.

    Args:
        request: what the user asked for.
        measure: from model and data to results as JSON types.
    """
    with reported():
        check_output(request.output)
        check_output(request.plot, "plot")
        # Only now: these take seconds that --help should not.
        import datasets
        import transformers

        from ...analysis.data import load_sequences
        from ...analysis.plots import check_format, plot
        from ...analysis.record import Record, environment

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()

        if request.plot is not None:
            check_format(request.plot)
        model, tokenizer, name = load_model(request)
        data = load_sequences(
            request.dataset,
            tokenizer,
            length=request.length,
            sequences=request.sequences,
            held_out=request.held_out,
            seed=request.seed,
        )
        results = measure(model, data)
        common = {key: getattr(request, key) for key in ("length", "batch_size", "seed")}
        record = Record(
            analysis=request.analysis,
            model=name,
            data=data.describe(),
            settings={**common, **request.settings},
            environment=environment(model),
            results=results,
        )
        print_table(record)  # first, so that a full disk takes no measurement away
        if request.output is not None:
            record.save(request.output)
            print(f"written: {request.output}")
        if request.plot is not None:
            plot(record, request.plot)
            print(f"written: {request.plot}")


def load_model(request: Request) -> tuple[PreTrainedModel, Any, str]:
    """
    The model on its device, its tokenizer, and an honest name without folders.

    Raises:
        ValueError: if there is no such model, data type, device or back end.
    """
    import torch

    from ...quickstart.checkpoint import load_checkpoint

    if request.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={request.dtype!r} is not known; use float32, bfloat16 or float16")
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    dtype, device = getattr(torch, request.dtype), request.device or "auto"
    model, tokenizer, name = load_checkpoint(request.model, dtype=dtype, device=device)
    if request.attn is not None:
        model.set_attn_implementation(request.attn)
    local = request.model is not None and Path(request.model).expanduser().exists()
    return model.eval(), tokenizer, Path(name).name if local else name
