"""Bottom-up calibration of all followers in about two forward passes over the data."""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from ..compensation import DESIGNS, FFN_OUTPUT, HEADS, NONE
from ..families import find_decoder
from ..handover import Handover
from ..inspection import Adapter, find_adapter
from ..modes import evaluation_mode
from .batches import model_inputs, token_mask, token_positions
from .report import CalibrationReport, FollowerError
from .solve import (
    PositionMeans,
    TokenStatistics,
    factorise,
    regularised,
    right_inverse,
    solve_pseudoinverse,
    solve_ridge,
)
from .streams import LayerRunner, Spill, original_model, pack_leader, unified_model, unpack_leader

METHODS = ("ridge", "pseudoinverse")
# Measured (docs/results/LOG.md): at 3 tokens per dimension calibration made two models worse.
_TOKENS_PER_DIMENSION = 10


def calibrate(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, torch.Tensor]],
    method: Literal["ridge", "pseudoinverse"] = "ridge",
    *,
    ridge: float = 1e-2,
    adapter_name: str | None = None,
    max_batches: int | None = None,
    spill_directory: str | Path | None = None,
    progress: bool = True,
) -> CalibrationReport:
    """
    Compute the compensation W_c of every follower from data, bottom-up.

    The hidden states of the original and of the unified model are carried side by side, layer by layer, so the model
    is loaded once and the data passes it about twice in all. They are kept on disk in between (two hidden states and
    a leader's queries and keys per token), so memory use does not depend on the number of samples. Works for full and
    low-rank compensation; for low rank it finds the factors that lose least of x·W_c on this data. Every design of
    compensation is fitted to what it can mend: the error of the residual stream after attention, through W_o where it
    adds before W_o, or the error after the whole layer where it adds there. If anything fails, the compensation stays
    what it was.

    Args:
        model: a `PeftModel` with a UniAttn adapter, or a transformers model that one was added to.
        dataloader: batches with `input_ids` (batch, length) and optionally `attention_mask` (1: token, 0: padding,
            which is left out) and `position_ids`. Read once, in order. Other entries are ignored.
        method: "pseudoinverse" is the paper's Theorem 3.7 on per-position means over all samples; "ridge" is least
            squares over all tokens, usually much better.
        ridge: strength of the ridge, relative to the mean square of the inputs' coordinates.
        adapter_name: default the active adapter.
        max_batches: use only the first batches.
        spill_directory: where to keep hidden states meanwhile. Default: the system's temporary directory.
        progress: show a progress bar and print the report.

    Returns:
        the relative error of each follower before and after.

    Raises:
        ValueError: for an unknown method, a ridge that is not positive, no data, batches without `input_ids`, no
            tokens, or activations that are not finite.
    """
    check_method(method)
    if not (isinstance(ridge, (int, float)) and math.isfinite(ridge) and ridge > 0):
        raise ValueError(f"ridge={ridge!r} must be a positive number, such as 0.01")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches={max_batches} leaves no data; use 1 or more, or None for all")
    adapter = find_adapter(model, adapter_name)
    if adapter.compensation == NONE:
        raise ValueError(
            f"the {adapter.method} adapter {adapter.name!r} has no compensation to calibrate; train the model that "
            "to_standalone() returns, or use a UniAttnConfig whose compensation is not 'none'"
        )
    if any(parameter.is_meta for parameter in adapter.base.parameters()):
        raise ValueError("the model has weights on the meta device; load its weights before calibrating")

    started = time.perf_counter()
    followers = adapter.plan.followers
    before = {layer: _weights(adapter, layer) for layer in followers}
    try:
        for layer in followers:
            _zero(adapter, layer)
        with (
            tempfile.TemporaryDirectory(dir=spill_directory, prefix="uniattn-") as directory,
            unified_model(adapter),
            evaluation_mode(adapter.base),
            torch.no_grad(),
        ):
            sweep = _Calibration(adapter, Spill(directory), method, ridge, progress)
            errors = sweep.run(dataloader, max_batches)
    except BaseException:
        for layer in followers:
            _restore(adapter, layer, before[layer])
        raise
    report = CalibrationReport(
        method=method,
        ridge=float(ridge) if method == "ridge" else None,
        rank=adapter.rank,
        batches=sweep.batches,
        tokens=sweep.tokens,
        seconds=time.perf_counter() - started,
        followers=errors,
    )
    if progress:
        tqdm.write(str(report))
    return report


def check_method(method: str) -> None:
    """Raise ValueError if `method` does not name a way to calibrate."""
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not a calibration method; use one of {', '.join(METHODS)}")


class _Calibration:
    """One run of [`calibrate`]: the sweeps over the data, layer by layer."""

    def __init__(self, adapter: Adapter, spill: Spill, method: str, ridge: float, progress: bool) -> None:
        self.adapter = adapter
        self.decoder = find_decoder(adapter.base, next(iter(adapter.layers.values())).family)
        self.design = DESIGNS[adapter.compensation]
        self.runner = LayerRunner(self.decoder)
        self.spill = spill
        self.method = method
        self.ridge = ridge
        self.progress = progress
        self.batches = 0
        self.tokens = 0

    def run(self, dataloader: Iterable[Mapping[str, torch.Tensor]], max_batches: int | None) -> list[FollowerError]:
        plan = self.adapter.plan
        first, last = min(plan.leaders), max(plan.followers)
        self._read(dataloader, first, max_batches)
        errors = []
        # A follower takes two sweeps over the batches, one to fit and one to go on; the topmost need not go on.
        sweeps = last - first + len(plan.followers)
        with tqdm(
            total=sweeps * self.batches, desc="calibrating", unit="batch", disable=not self.progress, leave=False
        ) as bar:
            for layer in range(first, last + 1):
                bar.set_postfix_str(f"layer {layer}")
                if layer in plan.followers:
                    errors.append(self._fit(layer, bar))
                if layer < last:
                    self._advance(layer, bar)
        return errors

    def _read(self, dataloader: Iterable, first: int, max_batches: int | None) -> None:
        """Store inputs and the hidden states that enter the lowest leader, where both streams still agree."""
        device = self.adapter.base.get_input_embeddings().weight.device
        bar = tqdm(dataloader, desc="reading", unit="batch", disable=not self.progress, leave=False, total=max_batches)
        with bar:
            for batch in bar:
                inputs = {key: value.to(device) for key, value in model_inputs(batch, self.batches).items()}
                hidden_states = self.runner.run_below(inputs, first)
                self.tokens += int(token_mask(inputs).sum())
                self.spill.put(self.batches, "inputs", inputs)
                self.spill.put(self.batches, "original", hidden_states)
                self.spill.put(self.batches, "unified", hidden_states)
                self.batches += 1
                if self.batches == max_batches:
                    break
        if not self.batches:
            raise ValueError("dataloader is empty; calibration needs at least one batch")
        if not self.tokens:
            raise ValueError("dataloader holds only padding (attention_mask is 0 everywhere); give it some text")
        self._warn_of_few_tokens()

    def _warn_of_few_tokens(self) -> None:
        size = next(iter(self.adapter.layers.values())).hidden_size
        if self.tokens < _TOKENS_PER_DIMENSION * size:
            warnings.warn(
                f"{self.tokens} tokens are few to fit a compensation to {size} dimensions, and held-out loss may get "
                f"worse instead of better; calibrate on {_TOKENS_PER_DIMENSION * size} tokens or more",
                stacklevel=4,
            )

    def _fit(self, layer: int, bar: tqdm) -> FollowerError:
        """Sweep once to compute W_c of the follower `layer`, moving on the original stream on the way."""
        follower = self.adapter.layers[layer]
        parts = self.design.parts(follower.base_layer, follower.family, follower.hidden_size)
        tokens, means = None, None
        for batch in range(self.batches):
            x, error, original_attention, positions = self._compare(layer, batch)
            if tokens is None:
                tokens = TokenStatistics(sum(parts), x.device, follower.hidden_size)
                means = PositionMeans(sum(parts), x.device, follower.hidden_size)
            tokens.add(x, error, original_attention)
            if not math.isfinite(tokens.ee + tokens.scale):
                raise ValueError(
                    f"activations are not finite in decoder layer {layer}, batch {batch}; check that batch and the "
                    "base model's weights, or calibrate in bfloat16 or float32 instead of float16"
                )
            if self.method == "pseudoinverse" and len(x):
                means.add(x, error, positions)
            bar.update()

        *others, last = self._solve(tokens, means, parts)
        compensation = reduce(torch.matmul, [*others, last])
        if self.design.adds == HEADS:
            output = follower.family.output_matrix(follower.base_layer)
            last = last @ right_inverse(output, self.ridge if self.method == "ridge" else None)
            compensation = reduce(torch.matmul, [*others, last, output])
        follower.set_compensation(self.adapter.name, *others, last)
        leader = self.adapter.plan.leader_of[layer]
        return FollowerError(layer, leader, tokens.error_before(), tokens.error_after(compensation))

    def _compare(self, layer: int, batch: int) -> tuple[torch.Tensor, ...]:
        """
        What W_c reads, ε, original attention output, each in float64, a token a row, and positions (tokens,).

        Where a norm follows the attention output, what is added to it cannot make up for the residual stream, so ε is
        the difference of the outputs alone, and each token counts relative to the size by which that norm divides it.
        """
        inputs = self.spill.get(batch, "inputs")
        original, unified = self.spill.get(batch, "original"), self.spill.get(batch, "unified")
        with original_model(self.adapter):
            output, _, original_attention = self.runner.run(inputs, layer, original)
        self.spill.put(batch, "next_original", output)
        follower, seen = self.adapter.layers[layer], []
        projection = getattr(follower.base_layer, follower.family.output)
        hook = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            result = self.runner.run(inputs, layer, unified, self._leader(batch, layer))
        finally:
            hook.remove()
        unified_output, hidden_states, attention = result
        x = follower.compensation_source(self.adapter.name, hidden_states, seen[0]).double()
        if self.design.adds == FFN_OUTPUT:
            error = output.double() - unified_output.double()
        elif self.decoder.normalises_attention(layer):
            size = original_attention.double().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
            error = (original_attention.double() - attention.double()) / size
            x, original_attention = x / size, original_attention.double() / size
        else:
            # Added as the model adds them, in its own data type.
            scale = self.decoder.residual_multiplier(layer)
            error = (original + original_attention * scale).double() - (unified + attention * scale).double()
            error /= scale
        real = token_mask(inputs).to(x.device)
        positions = token_positions(inputs).to(x.device)
        return x[real], error[real], original_attention.double()[real], positions[real]

    def _solve(
        self, tokens: TokenStatistics, means: PositionMeans, parts: tuple[int, ...]
    ) -> tuple[torch.Tensor, ...]:
        if self.method == "ridge":
            gram = regularised(tokens.xx, self.ridge, parts)
            compensation = solve_ridge(tokens.xx, tokens.xe, self.ridge, parts)
        else:
            x, error = means.means()
            gram = x.T @ x
            compensation = solve_pseudoinverse(x, error)
        return (compensation,) if self.adapter.rank is None else factorise(compensation, gram, self.adapter.rank)

    def _advance(self, layer: int, bar: tqdm) -> None:
        """Sweep once to move the streams through the layer `layer`."""
        for batch in range(self.batches):
            self._advance_batch(layer, batch)
            bar.update()

    def _advance_batch(self, layer: int, batch: int) -> None:
        plan = self.adapter.plan
        inputs, unified = self.spill.get(batch, "inputs"), self.spill.get(batch, "unified")
        if layer in plan.followers:
            self.spill.put(batch, "original", self.spill.get(batch, "next_original"))
            handover = self._leader(batch, layer)
        else:
            with original_model(self.adapter):
                output, _, _ = self.runner.run(inputs, layer, self.spill.get(batch, "original"))
            self.spill.put(batch, "original", output)
            handover = Handover()
        output, _, _ = self.runner.run(inputs, layer, unified, handover)
        self.spill.put(batch, "unified", output)
        if layer in plan.leaders:
            self.spill.put(batch, "leader", pack_leader(handover.take(layer)))

    def _leader(self, batch: int, layer: int) -> Handover:
        leader = self.adapter.layers[self.adapter.plan.leader_of[layer]].base_layer
        return unpack_leader(leader, self.spill.get(batch, "leader"))


def _weights(adapter: Adapter, layer: int) -> list[torch.Tensor]:
    return [linear.weight.detach().clone() for linear in adapter.layers[layer]._compensation(adapter.name)]


def _restore(adapter: Adapter, layer: int, weights: list[torch.Tensor]) -> None:
    adapter.layers[layer].set_compensation(adapter.name, *(weight.T for weight in weights))


def _zero(adapter: Adapter, layer: int) -> None:
    _restore(adapter, layer, [torch.zeros_like(weight) for weight in _weights(adapter, layer)])
