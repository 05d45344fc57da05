"""What linear compensation leaves of the error of softmax sharing (Appendix G of https://arxiv.org/abs/2502.00439)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..calibration import calibrate
from ..calibration.batches import model_inputs, token_mask, token_positions
from ..calibration.solve import PositionMeans
from ..calibration.streams import original_model, unified_model
from ..config import UniAttnConfig
from ..families import Decoder, find_decoder
from ..inspection import Adapter, find_adapter
from ..modes import evaluation_mode
from ..recording import AttentionFlow, watched_attention
from .data import Sequences
from .unified import unified

# Of the designs of the paper's Table 8, the one whose error is that of equation 13.
MEASURED_DESIGN = "attention_output"


@dataclass(frozen=True)
class Variant:
    """
    One way to compensate.

    Attributes:
        method: calibration method.
        rank: rank of the compensation; None: full.
    """

    method: str
    rank: int | None

    def __str__(self) -> str:
        return f"{self.method}, {'full' if self.rank is None else f'rank {self.rank}'}"


class FollowerError:
    """
    ‖ε‖ of one follower before and after its compensation, streamed over tokens in float64.

    In both, the followers below are compensated. "tokens" is the norm over all tokens; "means" the norm of the
    averages over samples at every position, on which the paper's Theorem 3.7 and Appendix G are.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._before = self._after = 0.0
        self._means = PositionMeans(size, device)

    def add(self, before: torch.Tensor, after: torch.Tensor, position: torch.Tensor) -> None:
        """Add tokens: ε before and after (tokens, hidden size), and their positions (tokens,)."""
        self._before += before.square().sum().item()
        self._after += after.square().sum().item()
        self._means.add(before, after, position)

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Norms, and the percentage that is left."""
        means = (mean.norm().item() for mean in self._means.means())
        return {
            "tokens": _norms(math.sqrt(self._before), math.sqrt(self._after)),
            "means": _norms(*means),
        }


def _norms(before: float, after: float) -> dict[str, float]:
    return {"before": before, "after": after, "left_percent": 100 * after / before if before else 0.0}


def compensation(
    model: PreTrainedModel,
    config: UniAttnConfig,
    data: Sequences,
    variants: Sequence[Variant],
    *,
    batch_size: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Calibrate a model in several ways, and measure what is left of every follower's error, on the sequences to which
    the compensation was fitted and on others.

    ε is the paper's equation 13: the difference of the residual streams after attention between the original and the
    unified model, with the followers below compensated. (Where a norm follows attention, as in Gemma-2: the difference
    of its outputs, every token relative to the original's, as in [`~peft_uniattn.calibrate`].)

    Args:
        model: a transformers model without a UniAttn adapter.
        config: the plan; its rank is that of each variant.
        data: sequences to fit, and held-out ones.
        variants: ways to compensate.
        batch_size: sequences per forward pass.
        progress: show progress bars and the reports of calibration.

    Returns:
        "superblocks"; "length": m, the most tokens of a sequence; "hidden_size": n; "random_left_percent": what the
        best W_c would leave of Gaussian random means, √(1 - n/m), the ratio of the paper's √(n(m-n)) to the norm √(nm)
        of what it approximates; "variants": each with `method`, `rank` and `followers`, which hold `layer`, `leader`,
        and for "fit" and "held_out" what [`FollowerError.to_dict`] says.
    """
    _check_design(config.compensation)
    length, size = max(map(len, data.fit["input_ids"])), model.config.get_text_config(decoder=True).hidden_size
    results = []
    for variant in tqdm(variants, desc="compensation", unit="variant", disable=not progress, leave=False):
        settings = {**config.to_dict(), "r": variant.rank}
        with unified(model, UniAttnConfig(**settings)) as adapted:
            calibrate(adapted, data.batches(batch_size, model.device), variant.method, progress=progress)
            adapter = find_adapter(adapted)
            errors = {
                part: follower_errors(adapter, data.batches(batch_size, model.device, part), progress=progress)
                for part in ("fit", "held_out")
            }
        followers = [
            {
                "layer": layer,
                "leader": adapter.plan.leader_of[layer],
                **{part: found[layer].to_dict() for part, found in errors.items()},
            }
            for layer in adapter.plan.followers
        ]
        results.append({"method": variant.method, "rank": variant.rank, "followers": followers})
    return {
        "superblocks": [list(block) for block in adapter.plan.superblocks],
        "length": length,
        "hidden_size": size,
        "random_left_percent": 100 * math.sqrt(max(0.0, 1 - size / length)),
        "variants": results,
    }


@torch.no_grad()
def follower_errors(
    adapter: Adapter, dataloader: Iterable[Mapping[str, torch.Tensor]], *, progress: bool = True
) -> dict[int, FollowerError]:
    """
    The error of every follower before and after its own compensation, from one forward of either model a batch.

    Args:
        adapter: of a calibrated or trained model.
        dataloader: batches as for [`~peft_uniattn.calibrate`].
        progress: show a progress bar.

    Raises:
        ValueError: if the compensation is not one that reads the input of attention and adds to its output.
    """
    _check_design(adapter.compensation)
    followers = adapter.plan.followers
    decoder = find_decoder(adapter.base, adapter.layers[followers[0]].family)
    size = adapter.layers[followers[0]].hidden_size
    errors: dict[int, FollowerError] = {}
    with evaluation_mode(adapter.base):
        for index, batch in enumerate(tqdm(dataloader, "errors", unit="batch", disable=not progress, leave=False)):
            inputs = {key: value.to(adapter.base.device) for key, value in model_inputs(batch, index).items()}
            with original_model(adapter), watched_attention(decoder, followers) as original:
                decoder.backbone(**inputs, use_cache=False)
            with unified_model(adapter), watched_attention(decoder, followers) as shared:
                decoder.backbone(**inputs, use_cache=False)
            real, position = token_mask(inputs), token_positions(inputs)
            for layer in followers:
                flow = shared[layer]
                mask = real.to(flow.x.device)
                compensated = adapter.layers[layer]._compensate(flow.x, adapter.name)
                before, after = _errors(decoder, layer, original[layer], flow, compensated)
                if layer not in errors:
                    errors[layer] = FollowerError(size, mask.device)
                errors[layer].add(before[mask], after[mask], position.to(mask.device)[mask])
    return errors


def _check_design(design: str) -> None:
    if design != MEASURED_DESIGN:
        raise ValueError(f"compensation={design!r} is not measured here; use compensation={MEASURED_DESIGN!r}")


def _errors(
    decoder: Decoder, layer: int, original: AttentionFlow, unified: AttentionFlow, compensated: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """ε before and after compensation in float64, in the units in which `calibrate` fits it."""
    after, compensated = original.output.double() - unified.output.double(), compensated.double()
    if decoder.normalises_attention(layer):
        size = original.output.double().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
        after, compensated = after / size, compensated / size
    else:
        after += (original.stream.double() - unified.stream.double()) / decoder.residual_multiplier(layer)
    return after + compensated, after
