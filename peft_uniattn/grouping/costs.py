"""What it costs that one layer takes another's softmax, measured on data before any training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..attention import follow
from ..calibration.batches import model_inputs, token_mask
from ..calibration.solve import solve_ridge
from ..calibration.streams import LayerRunner, Spill, pack_leader, spill_below, unpack_leader
from ..families import Decoder
from ..handover import Handover
from ..modes import evaluation_mode
from ..plan import may_share
from ..recording import AttentionFlow, intercepted, watched_attention


@dataclass(frozen=True)
class SharingCosts:
    """
    Attributes:
        before: (leader, follower) -> ‖ε‖² without compensation, relative to the residual stream after attention.
        after: the same of what the best linear compensation leaves, ‖ε − Norm(x)·W_c‖².
        tokens: how many tokens were seen, padding left out.
    """

    before: dict[tuple[int, int], float]
    after: dict[tuple[int, int], float]
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        pairs = [
            {"leader": leader, "follower": follower, "before": self.before[leader, follower], "after": cost}
            for (leader, follower), cost in self.after.items()
        ]
        return {"tokens": self.tokens, "pairs": pairs}


class _Statistics:
    """
    Normal equations of ε_l ≈ x · W_l for several leaders l at once, which share Σ xᵀx, in float64.

    Every token is divided by the norm of its residual stream. The layers above normalise theirs as well, and a few
    tokens whose stream is hundreds of times longer, such as the first, would decide everything.
    """

    def __init__(self, size: int, leaders: int, device: torch.device) -> None:
        self.xx = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.xe = torch.zeros(size, leaders * size, dtype=torch.float64, device=device)
        self.ee = torch.zeros(leaders, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: torch.Tensor, errors: torch.Tensor, stream: torch.Tensor) -> None:
        """
        Add tokens: x (tokens, size), errors (tokens, leaders, size), the residual stream (tokens, size).

        Products of one batch are formed in the data type given, float32 or better, and summed in float64.
        """
        length = stream.norm(dim=-1, keepdim=True)
        x, errors = x / length, errors / length.unsqueeze(-1)
        self.xx += x.T @ x
        self.xe += x.T @ errors.flatten(1)
        self.ee += errors.square().sum((0, 2))
        self.tokens += len(x)

    def relative(self, ridge: float) -> tuple[list[float], list[float]]:
        """Per leader: ‖ε‖² and ‖ε − x·W‖² of the best W, relative to the residual stream, mean over tokens."""
        weight = solve_ridge(self.xx, self.xe, ridge)
        explained = (weight * (2 * self.xe - self.xx @ weight)).unflatten(1, (len(self.ee), -1)).sum((0, 2))
        return (self.ee / self.tokens).tolist(), ((self.ee - explained).clamp(min=0) / self.tokens).tolist()


@torch.no_grad()
def measure_costs(
    model: PreTrainedModel,
    decoder: Decoder,
    dataloader: Iterable[Mapping[str, torch.Tensor]],
    *,
    layers: range,
    max_size: int,
    masks: list[str] | None = None,
    follower_mask: str = "own",
    ridge: float = 1e-2,
    spill_directory: str | Path | None = None,
    progress: bool = True,
) -> SharingCosts:
    """
    Measure ‖ε‖² of every follower under every leader that could be its own, in one pass over the data.

    ε is the change of a follower's attention output in the otherwise unchanged model, (s_f − s_l)·V_f·W_o, the first
    part of the paper's equation 13. What the best linear compensation leaves of it is the cost of the pair, relative
    to the residual stream after attention, so that the costs of different depths can be added. The data passes layer
    by layer; hidden states and the leaders' queries and keys wait as in [`~peft_uniattn.calibrate`], and memory holds
    `max_size` matrices of hidden size by hidden size in float64.

    Args:
        model: the transformers model, without adapters.
        decoder: its decoder.
        dataloader: batches as for [`~peft_uniattn.calibrate`]; read once.
        layers: the layers that may be used.
        max_size: most layers per Superblock.
        masks: the kind of mask of every layer; None if all are alike.
        follower_mask: which masks may be mixed, as in [`~peft_uniattn.UniAttnConfig`].
        ridge: strength of the ridge, as in calibration.
        spill_directory: for what waits on disk where memory has no room. Default: the system's temporary directory.
        progress: show a progress bar.
    """
    device = model.get_input_embeddings().weight.device
    with ExitStack() as stack:
        spill = stack.enter_context(spill_below(spill_directory, device))
        stack.enter_context(intercepted(decoder, layers))
        stack.enter_context(evaluation_mode(model))
        pass_ = _Pass(decoder, spill, max_size, progress)
        pass_.read(dataloader, layers.start, device)
        before, after = {}, {}
        bar = stack.enter_context(
            tqdm(total=len(layers) * pass_.batches, desc="measuring", unit="batch", disable=not progress, leave=False)
        )
        for layer in layers:
            lowest = max(layers.start, layer - max_size + 1)
            leaders = [leader for leader in range(lowest, layer) if may_share((leader, layer), masks, follower_mask)]
            statistics = pass_.through(layer, leaders, bar)
            if leaders:
                pairs = [(leader, layer) for leader in leaders]
                for found, values in zip((before, after), statistics.relative(ridge), strict=True):
                    found.update(zip(pairs, values, strict=True))
    return SharingCosts(before, after, pass_.tokens)


class _Pass:
    """The data on its way through the original model, one layer at a time."""

    def __init__(self, decoder: Decoder, spill: Spill, max_size: int, progress: bool) -> None:
        self.decoder = decoder
        self.runner = LayerRunner(decoder)
        self.spill = spill
        self.max_size = max_size
        self.progress = progress
        self.batches = 0
        self.tokens = 0

    def read(self, dataloader: Iterable, first: int, device: torch.device) -> None:
        """Store inputs and the hidden states that enter the layer `first`."""
        for batch in tqdm(dataloader, desc="reading", unit="batch", disable=not self.progress, leave=False):
            inputs = {key: value.to(device) for key, value in model_inputs(batch, self.batches).items()}
            self.spill.put(self.batches, "inputs", inputs)
            self.spill.put(self.batches, "hidden", self.runner.run_below(inputs, first))
            self.tokens += int(token_mask(inputs).sum())
            self.batches += 1
        if not self.tokens:
            raise ValueError("dataloader is empty, or holds only padding; choosing Superblocks needs some text")

    def through(self, layer: int, leaders: list[int], bar: tqdm) -> _Statistics | None:
        """Move all batches through `layer`, and compare its attention with what it gives under each of `leaders`."""
        statistics = None
        for batch in range(self.batches):
            inputs, hidden = self.spill.get(batch, "inputs"), self.spill.get(batch, "hidden")
            handover = Handover()
            with watched_attention(self.decoder, [layer]) as flows:
                output, x, _ = self.runner.run(inputs, layer, hidden, handover)
            self.spill.put(batch, "hidden", output)
            self.spill.put(batch, self._slot(layer), pack_leader(handover.take(layer)))
            if leaders:
                statistics = statistics or _Statistics(x.shape[-1], len(leaders), x.device)
                tokens = self._compare(layer, leaders, flows[layer], hidden, batch)
                real = token_mask(inputs).to(x.device)
                statistics.add(*(tensor[real] for tensor in tokens))
                if not statistics.ee.isfinite().all():
                    raise ValueError(
                        f"activations are not finite in decoder layer {layer}, batch {batch}; check that batch and "
                        "the model's weights, or use bfloat16 or float32 instead of float16"
                    )
            bar.update()
        return statistics

    def _compare(
        self, layer: int, leaders: list[int], flow: AttentionFlow, hidden: torch.Tensor, batch: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, ε under each leader and the residual stream, as [`_Statistics.add`] takes them, of (batch, length)."""
        added, own = _widened(flow.added), _widened(flow.output)
        # A norm or multiplier behind attention scales errors as it scales the output.
        scale = added.norm(dim=-1, keepdim=True) / own.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        errors = [(own - _widened(self._under(leader, layer, flow.x, batch))) * scale for leader in leaders]
        return _widened(flow.x) * scale, torch.stack(errors, dim=2), _widened(hidden.to(added.device)) + added

    def _under(self, leader: int, layer: int, x: torch.Tensor, batch: int) -> torch.Tensor:
        handover = unpack_leader(self.decoder.attention(leader), self.spill.get(batch, self._slot(leader)))
        output, _ = follow(self.decoder.attention(layer), self.decoder.family, leader, x, handover)
        return output

    def _slot(self, layer: int) -> str:
        # Leaders too far below to lead are overwritten.
        return f"leader{layer % self.max_size}"


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
