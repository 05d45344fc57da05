"""Is it worth it? What follows from a forecast's figures, in sentences."""

from __future__ import annotations

from dataclasses import dataclass

from .forecast import Forecast

# Less than this is lost in what no bound counts: norms, launches, sampling, clocks.
WORTH = 0.05


@dataclass(frozen=True)
class Verdict:
    """
    Attributes:
        worth_it: whether decode time or memory falls by `WORTH` or more at the load that was asked for.
        headline: that in one sentence.
        reasons: what it rests on, and what to try instead or as well.
    """

    worth_it: bool
    headline: str
    reasons: tuple[str, ...]


def judge(forecast: Forecast) -> Verdict:
    """Weigh the low-rank unified model against the base."""
    base, (full, low) = forecast.base, forecast.unified
    serving = forecast.serving
    saved_time = 1 - low.time_ratio
    saved_bytes = base.kv_bytes - low.kv_bytes
    saved_memory = saved_bytes / (base.kv_bytes + _stored(forecast))
    worth_it = max(saved_time, saved_memory) >= WORTH
    load = f"{serving.batch_size} × {serving.context:,} tokens"
    cached = base.kv_bytes / base.bytes
    reasons = [
        f"The KV cache is {cached:.0%} of what a decoded token reads at {load}, and {forecast.kv_ratio:.2%} of it "
        f"are left: {saved_bytes / 2**30:.2f} GiB less.",
        f"A decoded token takes at best {low.time_ratio:.3f} of the time with rank {low.rank}, {full.time_ratio:.3f} "
        "with full compensation; prefill hardly gains against fused attention.",
        f"Full compensation takes back {full.compensation_parameters / forecast.removed_parameters:.0%} of the "
        f"parameters that followers no longer need, rank {low.rank} "
        f"{low.compensation_parameters / forecast.removed_parameters:.1%}.",
    ]
    if not worth_it:
        needed = tokens_needed(forecast)
        at_least = "" if needed is None else f" of at least {needed:,} cached tokens in all"
        first = "quantize them first, or " if (serving.weight_bits or serving.bits) > 8 else ""
        reasons.append(f"Weights are {1 - cached:.0%} of what is read: {first}come back with a load{at_least}.")
    if (serving.cache_bits or serving.bits) == 16:
        reasons.append(
            "An FP8 cache leaves 50% of the bytes and changes no weights: try it first. "
            f"The two multiply, to {forecast.kv_ratio / 2:.1%}."
        )
    reasons.append(
        "No count tells what sharing costs in quality: calibrate, train, and measure it with peft-uniattn eval."
    )
    headline = (
        f"Worth trying: up to {saved_time:.1%} less time for a decoded token, {saved_memory:.1%} less memory."
        if worth_it
        else f"Not worth it at {load}: {max(saved_time, 0):.1%} less time at best, {saved_memory:.1%} less memory."
    )
    return Verdict(worth_it, headline, tuple(reasons))


def tokens_needed(forecast: Forecast) -> int | None:
    """
    From how many cached tokens on, all sequences together, a decoded token can take `WORTH` less time.

    None if no number is enough. Layers with a window are counted as at the forecast's context.
    """
    base, low = forecast.base, forecast.unified[-1]
    tokens = forecast.serving.batch_size * forecast.serving.context
    # Saved bytes grow with the tokens; what they have to reach does, too.
    gain = (1 - WORTH) * base.kv_bytes / tokens - low.kv_bytes / tokens
    missing = low.weight_bytes - (1 - WORTH) * base.weight_bytes
    if gain <= 0:
        return None
    return max(1, -int(-missing // gain))


def _stored(forecast: Forecast) -> int:
    """Bytes of the base's weights in memory, all experts included."""
    return forecast.serving.stored_weights(forecast.base.parameters * forecast.serving.bits // 8)
