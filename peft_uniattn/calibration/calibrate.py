"""Bottom-up calibration of all followers in about two forward passes over the data."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from tqdm.auto import tqdm

from ..compensation import DESIGNS, FFN_OUTPUT, HEADS, NONE
from ..families import find_decoder
from ..handover import Handover
from ..inspection import Adapter, find_adapter
from ..modes import evaluation_mode
from .batches import model_inputs, model_rows, token_mask, token_positions
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
from .streams import LayerRunner, Spill, original_model, pack_leader, spill_below, unified_model, unpack_leader

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
    is loaded once and the data passes it about twice in all. In between they (two hidden states and a leader's queries
    and keys per token) stay on the device as long as they are small, up to 2 GiB or a quarter of the free memory of a
    GPU, 256 MiB elsewhere; the rest is kept on disk, so memory use does not grow with the samples. Works for full and
    low-rank compensation; for low rank it finds the factors that lose least of x·W_c on this data. Every design of
    compensation is fitted to what it can mend: the error of the residual stream after attention, through W_o where it
    adds before W_o, or the error after the whole layer where it adds there. Where a batch is too large for the memory
    of the device, calibration says so and starts again with halves. If anything fails, the compensation stays what it
    was.

    Args:
        model: a `PeftModel` with a UniAttn adapter, or a transformers model that one was added to.
        dataloader: batches with `input_ids` (batch, length) and optionally `attention_mask` (1: token, 0: padding,
            which is left out) and `position_ids`. Read once, in order. Other entries are ignored.
        method: "pseudoinverse" is the paper's Theorem 3.7 on per-position means over all samples; "ridge" is least
            squares over all tokens, usually much better.
        ridge: strength of the ridge, relative to the mean square of the inputs' coordinates.
        adapter_name: default the active adapter.
        max_batches: use only the first batches.
        spill_directory: where to keep hidden states that memory has no room for. Default: the system's temporary
            directory.
        progress: show a progress bar and print the report.

    Returns:
        the relative error of each follower before and after.

    Raises:
        ValueError: for an unknown method, a ridge that is not positive, no data, batches without `input_ids`, no
            tokens, or activations that are not finite.
        OSError: if `spill_directory` cannot be written, or is full.
        torch.OutOfMemoryError: if the device's memory does not suffice for one sequence.
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
        with (
            spill_below(spill_directory, adapter.base.get_input_embeddings().weight.device) as spill,
            unified_model(adapter),
            evaluation_mode(adapter.base),
            torch.no_grad(),
        ):
            sweep = _Calibration(adapter, spill, method, ridge, progress)
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


class _Part(NamedTuple):
    """Rows of a batch that are computed together: all of them, unless memory is short."""

    batch: int
    first_row: int

    def __str__(self) -> str:
        return f"{self.batch}-{self.first_row}"


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
        self.parts: list[_Part] = []
        self.tokens = 0
        self.batches = 0

    def run(self, dataloader: Iterable[Mapping[str, torch.Tensor]], max_batches: int | None) -> list[FollowerError]:
        self._read(dataloader, max_batches)
        while True:
            try:
                return self._sweep()
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
            # Not in the handler, where the exception holds on to the tensors of the frames that it came through.
            self.spill.leave_memory()
            clear_device_cache(garbage_collection=True)
            self._halve_parts()

    def _read(self, dataloader: Iterable, max_batches: int | None) -> None:
        """Store the inputs."""
        device = self.adapter.base.get_input_embeddings().weight.device
        bar = tqdm(dataloader, desc="reading", unit="batch", disable=not self.progress, leave=False, total=max_batches)
        with bar:
            for batch in bar:
                inputs = {key: value.to(device) for key, value in model_inputs(batch, self.batches).items()}
                self.tokens += int(token_mask(inputs).sum())
                self.parts.append(_Part(self.batches, 0))
                self.spill.put(self.parts[-1], "inputs", inputs)
                self.batches += 1
                if self.batches == max_batches:
                    break
        if not self.batches:
            raise ValueError("dataloader is empty; calibration needs at least one batch")
        if not self.tokens:
            raise ValueError("dataloader holds only padding (attention_mask is 0 everywhere); give it some text")
        self._warn_of_few_tokens()

    def _halve_parts(self) -> None:
        """
        Split what is computed together into halves.

        Raises:
            torch.OutOfMemoryError: if that was one sequence.
        """
        largest = max(len(self.spill.get(part, "inputs")["input_ids"]) for part in self.parts)
        if largest == 1:
            raise torch.OutOfMemoryError(
                "the device's memory does not suffice to calibrate on one sequence at a time; use shorter sequences"
            )
        rows = (largest + 1) // 2
        warnings.warn(
            f"out of memory with batches of {largest} sequences; calibration starts again with {rows} at a time. A "
            "dataloader of smaller batches saves the attempt",
            stacklevel=4,
        )
        parts = []
        for part in self.parts:
            inputs = self.spill.get(part, "inputs")
            for first in range(0, len(inputs["input_ids"]), rows):
                parts.append(_Part(part.batch, part.first_row + first))
                self.spill.put(parts[-1], "inputs", model_rows(inputs, first, first + rows))
        self.parts = parts

    def _sweep(self) -> list[FollowerError]:
        """All followers, bottom to top."""
        plan = self.adapter.plan
        first, last = min(plan.leaders), max(plan.followers)
        for layer in plan.followers:
            _zero(self.adapter, layer)
        errors = []
        # A follower takes two sweeps over the data, one to fit and one to go on; the topmost need not go on.
        sweeps = 1 + last - first + len(plan.followers)
        with tqdm(
            total=sweeps * len(self.parts), desc="calibrating", unit="batch", disable=not self.progress, leave=False
        ) as bar:
            self._enter(first, bar)
            for layer in range(first, last + 1):
                bar.set_postfix_str(f"layer {layer}")
                if layer in plan.followers:
                    errors.append(self._fit(layer, bar))
                if layer < last:
                    self._advance(layer, bar)
        return errors

    def _enter(self, first: int, bar: tqdm) -> None:
        """Store the hidden states that enter the lowest leader, where both streams still agree."""
        for part in self.parts:
            hidden_states = self.runner.run_below(self.spill.get(part, "inputs"), first)
            self.spill.put(part, "original", hidden_states)
            self.spill.put(part, "unified", hidden_states)
            bar.update()

    def _warn_of_few_tokens(self) -> None:
        size = next(iter(self.adapter.layers.values())).hidden_size
        if self.tokens < _TOKENS_PER_DIMENSION * size:
            warnings.warn(
                f"{self.tokens} tokens are few to fit a compensation to {size} dimensions, and held-out loss may get "
                f"worse instead of better; calibrate on {_TOKENS_PER_DIMENSION * size} tokens or more",
                stacklevel=5,
            )

    def _fit(self, layer: int, bar: tqdm) -> FollowerError:
        """Sweep once to compute W_c of the follower `layer`, moving on the original stream on the way."""
        follower = self.adapter.layers[layer]
        parts = self.design.parts(follower.base_layer, follower.family, follower.hidden_size)
        tokens, means = None, None
        for part in self.parts:
            x, error, original_attention, positions = self._compare(layer, part)
            if tokens is None:
                tokens = TokenStatistics(sum(parts), x.device, follower.hidden_size)
                means = PositionMeans(sum(parts), x.device, follower.hidden_size)
            tokens.add(x, error, original_attention)
            if not math.isfinite(tokens.ee + tokens.scale):
                raise ValueError(
                    f"activations are not finite in decoder layer {layer}, batch {part.batch}; check that batch and "
                    "the base model's weights, or calibrate in bfloat16 or float32 instead of float16"
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

    def _compare(self, layer: int, part: _Part) -> tuple[torch.Tensor, ...]:
        """
        What W_c reads, ε, original attention output, each in float64, a token a row, and positions (tokens,).

        Where a norm follows the attention output, what is added to it cannot make up for the residual stream, so ε is
        the difference of the outputs alone, and each token counts relative to the size by which that norm divides it.
        """
        inputs = self.spill.get(part, "inputs")
        original, unified = self.spill.get(part, "original"), self.spill.get(part, "unified")
        with original_model(self.adapter):
            output, _, original_attention = self.runner.run(inputs, layer, original)
        self.spill.put(part, "next_original", output)
        follower, seen = self.adapter.layers[layer], []
        projection = getattr(follower.base_layer, follower.family.output)
        hook = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            result = self.runner.run(inputs, layer, unified, self._leader(part, layer))
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
        for part in self.parts:
            self._advance_part(layer, part)
            bar.update()

    def _advance_part(self, layer: int, part: _Part) -> None:
        plan = self.adapter.plan
        inputs, unified = self.spill.get(part, "inputs"), self.spill.get(part, "unified")
        if layer in plan.followers:
            self.spill.put(part, "original", self.spill.get(part, "next_original"))
            handover = self._leader(part, layer)
        else:
            with original_model(self.adapter):
                output, _, _ = self.runner.run(inputs, layer, self.spill.get(part, "original"))
            self.spill.put(part, "original", output)
            handover = Handover()
        output, _, _ = self.runner.run(inputs, layer, unified, handover)
        self.spill.put(part, "unified", output)
        if layer in plan.leaders:
            self.spill.put(part, "leader", pack_leader(handover.take(layer)))

    def _leader(self, part: _Part, layer: int) -> Handover:
        leader = self.adapter.layers[self.adapter.plan.leader_of[layer]].base_layer
        return unpack_leader(leader, self.spill.get(part, "leader"))


def _weights(adapter: Adapter, layer: int) -> list[torch.Tensor]:
    return [linear.weight.detach().clone() for linear in adapter.layers[layer]._compensation(adapter.name)]


def _restore(adapter: Adapter, layer: int, weights: list[torch.Tensor]) -> None:
    adapter.layers[layer].set_compensation(adapter.name, *(weight.T for weight in weights))


def _zero(adapter: Adapter, layer: int) -> None:
    _restore(adapter, layer, [torch.zeros_like(weight) for weight in _weights(adapter, layer)])
