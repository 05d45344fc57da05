"""`peft-uniattn bench serve`: base and unified checkpoint served by vLLM, under load."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ..errors import reported
from ..output import check_output
from .options import Dtype, Output, Seed


def serve(
    base: Annotated[Path, typer.Argument(help="Folder of the base checkpoint, with its tokenizer.")],
    unified: Annotated[Path, typer.Argument(help="Folder of the standalone checkpoint, with its tokenizer.")],
    request_rate: Annotated[
        list[float] | None, typer.Option(help="Requests a second; repeatable. Default: 1, 2 and 4.", min=0.001)
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests of every run.", min=1)] = 64,
    input_length: Annotated[int, typer.Option(help="Tokens of every prompt.", min=1)] = 512,
    output_length: Annotated[int, typer.Option(help="Tokens of every answer.", min=1)] = 128,
    cache_gib: Annotated[float, typer.Option(help="GiB of either server's KV cache.", min=0.001)] = 1.0,
    max_running: Annotated[int, typer.Option(help="Requests that a server may run at once.", min=1)] = 256,
    compiled: Annotated[bool, typer.Option(help="Let vLLM compile the models.")] = True,
    dtype: Dtype = "bfloat16",
    seed: Seed = 0,
    output: Output = None,
) -> None:
    """
    Throughput and latency of base and unified checkpoint in vLLM, by vLLM's own benchmark.

    Both servers have the same settings and the same memory for the cache; requests arrive at a given rate, however
    slow the answers. Needs vLLM. The last line printed is one JSON document. Example:

        peft-uniattn bench serve smollm2 smollm2-unified --request-rate 2 --request-rate 8 --cache-gib 0.25
    """
    with reported():
        if find_spec("vllm") is None:
            raise ValueError("bench serve measures vLLM, which is not installed here; see docs/serving.md")
        for name, folder in (("BASE", base), ("UNIFIED", unified)):
            if not (folder / "config.json").is_file():
                raise ValueError(f"{name}={str(folder)!r} has no config.json; give the folder of a checkpoint")
        check_output(output)
        # Only now: torch and transformers take seconds that --help should not.
        from rich.console import Console
        from rich.table import Table

        from ...bench.serve import ServeBenchmark, rows
        from .report import finish

        result = ServeBenchmark(
            base=str(base),
            unified=str(unified),
            request_rates=tuple(request_rate or (1.0, 2.0, 4.0)),
            requests=requests,
            input_length=input_length,
            output_length=output_length,
            cache_bytes=int(cache_gib * 2**30),
            max_running=max_running,
            dtype=dtype,
            seed=seed,
            compiled=compiled,
        ).run()
        columns = ("", "requests/s", "completed", "output tokens/s", "TTFT ms, median / p99")
        table = Table(*columns, "ms per token, median / p99", "running at most", "preemptions", title="Served by vLLM")
        for row in rows(result):
            table.add_row(*row)
        for name, checkpoint in result["checkpoints"].items():
            Console().print(f"{name}: {checkpoint['cache']}")
        Console().print(table)
        finish(result, output)
