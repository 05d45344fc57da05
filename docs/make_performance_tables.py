"""
Prints the tables of docs/performance.md from the raw results:

    python docs/make_performance_tables.py
"""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
QWEN = "h200", "load_h200", "h100"
SIMULATED = (
    "ttft_32k_auto_load_superblock_4_h200.json",
    "ttft_32k_auto_load_superblock_13_h200.json",
    "ttft_128k_whole_h200.json",
    "ttft_128k_chunked_h200.json",
)


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


def beyond_bytes(name: str = "decode_compiled_profile_h100.json") -> str:
    """Where the time of a decoded token beyond that of its bytes goes, of contenders whose attention is one group."""
    raw = _load(name)
    shape, followers = raw["dimensions"], sum(len(block) - 1 for block in raw["superblocks"])
    values = 2 * shape["key_value_heads"] * shape["head_dim"] * followers
    rate = raw["conditions"]["measured_rates"]["bytes_per_s"] / 1e3
    lines = [
        "| sequences × cached tokens | | ms | bytes | products | attention | small kernels | rest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in raw["shapes"]:
        for contender, measured in row["contenders"].items():
            groups = dict(measured["profile"]["groups_ms"])
            if contender.startswith("unified") and "leader" not in groups:
                continue
            work, time = row["work"][contender.split()[0]], measured["median_ms"]
            skipped = 1 - raw["settings"]["kept"] if "kept" in contender else 0
            states = (work["state_bytes"] - skipped * values * row["batch_size"] * row["length"]) / rate
            weights = (work["bytes"] - work["state_bytes"]) / rate
            rest = time - sum(groups.values())
            small = groups.pop("norms, RoPE, cache") + groups.pop("copies", 0)
            products = groups.pop("products") - weights
            attention = sum(groups.values()) - states
            beyond = " | ".join(f"{part:+.2f}" for part in (products, attention, small, rest))
            what = f"{row['batch_size']} × {row['length']:,} | {contender.replace(' sdpa cudnn', '')}"
            lines.append(f"| {what} | {time:.2f} | {weights + states:.2f} | {beyond} |")
    return "\n".join(lines)


def stored_tiles(name: str = "ttft_32k_tiles_h100.json") -> str:
    """Time to the first token with a stored s, and what it takes of memory."""
    lines = ["| prompt | | ms | of the base | peak GiB |", "|---|---|---|---|---|"]
    for row in _load(name)["lengths"]:
        base = row["contenders"][row["ratios"]["fastest_base"]]["median_ms"]
        for contender, measured in row["contenders"].items():
            time, peak = measured["median_ms"], measured["peak_memory_bytes"] / 2**30
            what = contender.replace(" sdpa cudnn", "")
            lines.append(f"| {row['length']:,} tokens | {what} | {time:.1f} | {time / base:.3f} | {peak:.1f} |")
    return "\n".join(lines)


def real_text(*names: str) -> str:
    """Time to the first token of real checkpoints on a real text, and what skipping changes in the logits."""
    lines = [
        "| checkpoint | GPU | prompts × tokens | base, ms | exact | skipping | `auto` "
        "| relative error of skipping; of another back end |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = names or ("ttft_real_text_smollm2_h200.json", *(f"ttft_real_text_qwen_{run}.json" for run in QWEN))
    for raw, row in ((loaded, row) for loaded in map(_load, names) for row in loaded["lengths"]):
        skipping, ratios = _skipping(raw, row)
        errors = [row["contenders"][one]["relative_error"] for one in (skipping, "base sdpa flash")]
        cells = (
            raw["settings"]["models"]["model"].replace("-dequantised-", ", de-quantised "),
            raw["conditions"]["device"].split()[1],
            f"{raw['settings']['batch_size']} × {row['length']:,}",
            f"{row['contenders'][row['ratios']['fastest_base']]['median_ms']:.1f}",
            *ratios,
            f"{errors[0]:.3f}; {errors[1]:.3f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def simulated(*names: str) -> str:
    """Time to the first token where followers keep a share of the tiles, chosen at random."""
    lines = [
        "| prompt | at once | Superblocks of | kept | base, ms | exact | skipping | `auto` "
        "| peak GiB, base and skipping |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for raw, row in ((loaded, row) for loaded in map(_load, names or SIMULATED) for row in loaded["lengths"]):
        skipping, ratios = _skipping(raw, row)
        base = row["contenders"][row["ratios"]["fastest_base"]]
        peaks = (one["peak_memory_bytes"] / 2**30 for one in (base, row["contenders"][skipping]))
        cells = (
            f"{row['length']:,} tokens",
            f"{raw['settings']['chunk'] or row['length']:,}",
            str(raw["settings"]["models"]["superblock_size"]),
            str(raw["settings"]["kept"]),
            f"{base['median_ms']:.1f}",
            *ratios,
            ", ".join(f"{peak:.1f}" for peak in peaks),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _skipping(raw: dict, row: dict) -> tuple[str, list[str]]:
    """The contender that always skips, and shares of the fastest base's time: exact, it, and where `auto` chooses."""
    settings, ratios = raw["settings"], row["ratios"]
    exact = f"unified {ratios['fastest_base'].removeprefix('base ')}"
    how = "skip_mass {skip_mass}" if settings["kept"] is None else "simulated kept {kept}"
    skipping = f"{exact}, {how.format(**settings)}"
    shares = (ratios.get(one) for one in (exact, skipping, f"{skipping}, auto"))
    return skipping, ["–" if share is None else f"{share:.3f}" for share in shares]


def one_layer(name: str = "decode_attention_h100.json") -> str:
    """Attention of one layer for one decoded token: leader, follower and the fastest fused attention."""
    raw = _load(name)
    lines = [
        "| sequences × cached tokens | cuDNN, µs | leader / cuDNN | bound | follower, µs | cuDNN / follower | bound "
        "| of copy bandwidth | a copy of as many bytes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in raw["shapes"]:
        ratios, bound, contenders = row["ratios"], row["bound_us"], row["contenders"]
        cudnn = contenders["sdpa cudnn"]["median_us"]
        follower = contenders["follower"]["median_us"]
        copied = contenders["copy of a follower's bytes"]["gb_per_s"] / raw["copy_gb_per_s"]
        cells = (
            f"{row['batch']} × {row['length']:,}",
            f"{cudnn:.1f}",
            f"{ratios['leader_over_fused']:.3f}",
            f"{bound['leader'] / cudnn:.3f}",
            f"{follower:.1f}",
            f"{ratios['fused_over_follower']:.3f}",
            f"{cudnn / bound['follower']:.2f}",
            f"{100 * ratios['follower_share_of_copy_bandwidth']:.0f} %",
            f"{100 * copied:.0f} %",
        )
        lines.append(f"| {' | '.join(cells)} |")
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
    decoding = decode(), decode("decode_compiled_h100.json"), beyond_bytes(), one_layer()
    print(*decoding, first_token(), stored_tiles(), real_text(), simulated(), training(), sep="\n\n")
