"""`peft-uniattn analyze similarity`."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .run import Request, run


def similarity(
    model: options.Model = None,
    dataset: options.Data = None,
    length: options.Length = 512,
    sequences: options.Count = 16,
    all_pairs: Annotated[bool, typer.Option(help="Compare every layer with every other, not only neighbours.")] = True,
    dtype: options.Dtype = "float32",
    attn: options.Attention = None,
    device: options.Device = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    output: options.Output = None,
    plot: options.Plot = None,
) -> None:
    """
    Cosine similarity of the softmax activations of layers (the paper's Figure 2), averaged over sequences.

    Example:

        peft-uniattn analyze similarity --dataset book.txt --output similarity.json --plot similarity.svg
    """

    def measure(base, data):
        from ...analysis.similarity import softmax_similarity

        return softmax_similarity(base, data.batches(1, base.device), all_pairs=all_pairs).to_dict()

    request = Request(
        analysis="similarity",
        model=model,
        dataset=dataset,
        length=length,
        sequences=sequences,
        held_out=0,
        batch_size=1,
        dtype=dtype,
        attn=attn,
        device=device,
        threads=threads,
        seed=seed,
        output=output,
        plot=plot,
        settings={"all_pairs": all_pairs},
    )
    run(request, measure)
