"""
Prints the tables of docs/performance.md from the raw results:

    python docs/make_performance_tables.py
"""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def decode(name: str = "decode_h100.json") -> str:
    """Time of a decoded token: fastest base, unified without kernels and with them, and the bound by bytes."""
    lines = [
        "| sequences × cached tokens | base, ms | unified, ms | with kernels, ms | ratio | bound |",
        "|---|---|---|---|---|---|",
    ]
    for row in _load(name)["shapes"]:
        base = row["ratios"]["fastest_base"]
        back_end = base.removeprefix("base ")
        times = [row["contenders"][one]["median_ms"] for one in (base, *_unified(back_end))]
        ratio = row["ratios"][f"unified {back_end}, kernels"]
        bound = row["bound_ms"]["unified"] / row["bound_ms"]["base"]
        cells = [f"{row['batch_size']} × {row['length']:,}", *(f"{time:.2f}" for time in times)]
        lines.append(f"| {' | '.join(cells)} | {ratio:.3f} | {bound:.3f} |")
    return "\n".join(lines)


def first_token(*names: str) -> str:
    """Time to the first token, exact."""
    lines = ["| prompt | base, ms | unified, ms | ratio |", "|---|---|---|---|"]
    names = names or ("ttft_8k_h100.json", "ttft_32k_rank64_h100.json")
    for row in (row for name in names for row in _load(name)["lengths"]):
        base = row["ratios"]["fastest_base"]
        unified = f"unified {base.removeprefix('base ')}"
        times = [row["contenders"][one]["median_ms"] for one in (base, unified)]
        cells = [f"{row['length']:,} tokens", *(f"{time:.1f}" for time in times)]
        lines.append(f"| {' | '.join(cells)} | {row['ratios'][unified]:.3f} |")
    return "\n".join(lines)


def training(name: str = "bench_train_llama-3.2-1b_h100.json") -> str:
    """Time and memory of training steps, and what they are compared with."""
    rows = _load(name)["contenders"]
    pairs = {"stage 1": "LoRA on all linear layers", "stage 2": "full fine-tuning"}
    lines = ["| step | ms | peak GiB | of | time | memory |", "|---|---|---|---|---|---|"]
    for step, reference in pairs.items():
        one, other = rows[step], rows[reference]
        time = one["step_seconds"] / other["step_seconds"]
        memory = one["peak_memory_bytes"] / other["peak_memory_bytes"]
        cells = f"{one['step_seconds'] * 1e3:.1f} | {one['peak_memory_bytes'] / 2**30:.1f}"
        lines.append(f"| {step} | {cells} | {reference} | {time:.2f} | {memory:.2f} |")
    return "\n".join(lines)


def _unified(back_end: str) -> tuple[str, str]:
    return f"unified {back_end}", f"unified {back_end}, kernels"


def _load(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


if __name__ == "__main__":
    print(decode(), decode("decode_compiled_h100.json"), first_token(), training(), sep="\n\n")
