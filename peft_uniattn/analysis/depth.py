"""A unified model that loses its followers' attention (Figure 5 of https://arxiv.org/abs/2502.00439)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..calibration import calibrate
from ..config import UniAttnConfig
from ..families import find_decoder
from ..inspection import find_adapter
from ..rivals import measure_attention_similarity
from ..training.evaluation import held_out_scores
from .bypass import bypassed
from .data import Sequences
from .timing import times_to_first_token
from .unified import unified


@dataclass(frozen=True)
class DepthSettings:
    """
    Attributes:
        method: calibration method.
        max_dropped: most followers to bypass; None: all.
        batch_size: sequences per forward pass.
        ttft_length: tokens of the prompt whose first token is timed.
        ttft_repetitions: how often.
    """

    method: str = "ridge"
    max_dropped: int | None = None
    batch_size: int = 8
    ttft_length: int = 512
    ttft_repetitions: int = 5


def depth(
    model: PreTrainedModel,
    config: UniAttnConfig,
    data: Sequences,
    settings: DepthSettings,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Calibrate a model, then bypass the attention of the followers whose input and output are most alike, one after
    the other, and score what is left. Nothing is trained.

    Args:
        model: a transformers model without a UniAttn adapter.
        config: the plan.
        data: sequences to calibrate and to measure similarity on, and held-out ones.
        settings: see [`DepthSettings`].
        progress: show progress bars and the calibration's report.

    Returns:
        "base": scores of the model itself; "superblocks"; "similarity": follower -> cosine similarity of the residual
        stream before and after its attention in the calibrated model; "dropped": one entry for each number of
        bypassed followers from 0 up, with `layers`, `loss`, `accuracy` and `ttft`.
    """
    base = held_out_scores(model, data.held_out, data.pad_token_id, batch_size=settings.batch_size)
    with unified(model, config) as adapted:
        return {"base": asdict(base), **_drop(adapted, data, settings, progress)}


def _drop(adapted: PeftModel, data: Sequences, settings: DepthSettings, progress: bool) -> dict[str, Any]:
    adapter = find_adapter(adapted)
    decoder = find_decoder(adapter.base, next(iter(adapter.layers.values())).family)
    followers = adapter.plan.followers
    most = len(followers) if settings.max_dropped is None else settings.max_dropped
    if not 0 <= most <= len(followers):
        raise ValueError(f"max_dropped={most} is outside 0 to {len(followers)}, the number of followers")
    calibrate(adapted, data.batches(settings.batch_size, adapted.device), settings.method, progress=progress)
    measured = measure_attention_similarity(
        adapted, data.batches(settings.batch_size, adapted.device), progress=progress
    )
    similarity = {layer: measured[layer] for layer in followers}
    order = sorted(followers, key=similarity.__getitem__, reverse=True)

    entries = []
    for count in tqdm(range(most + 1), desc="dropping", unit="layer", disable=not progress, leave=False):
        with bypassed(decoder, order[:count]):
            scores = held_out_scores(adapted, data.held_out, data.pad_token_id, batch_size=settings.batch_size)
        entries.append({"layers": order[:count], **asdict(scores)})
    times = times_to_first_token(
        adapted,
        {str(count): partial(bypassed, decoder, order[:count]) for count in range(most + 1)},
        length=settings.ttft_length,
        repetitions=settings.ttft_repetitions,
    )
    for entry, seconds in zip(entries, times.values(), strict=True):
        entry["ttft"] = asdict(seconds)
    return {
        "superblocks": [list(block) for block in adapter.plan.superblocks],
        "similarity": {str(layer): value for layer, value in similarity.items()},
        "dropped": entries,
    }
