"""How alike the softmax activations of layers are (Figure 2 of https://arxiv.org/abs/2502.00439)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..attention import original_config, share_softmax
from ..calibration.batches import model_inputs, token_mask
from ..handover import HANDOVER, Handover, LeaderState
from ..modes import evaluation_mode
from ..recording import intercepted, wrappable_decoder

# Elements of softmax activations held at once; 2**26 are 256 MiB in float32.
_ELEMENTS = 2**26


@dataclass(frozen=True)
class SoftmaxSimilarity:
    """
    Cosine similarities of softmax activations, averaged over sequences.

    Attributes:
        per_head: (layers, layers). The cosine of s_i and s_j with all heads side by side, head h against head h: what
            sharing a softmax exchanges.
        head_mean: (layers, layers). The cosine of the averages of s_i and of s_j over heads.
        sequences: how many sequences.
        tokens: how many tokens, padding left out.

    Entries that were not asked for are NaN.
    """

    per_head: torch.Tensor
    head_mean: torch.Tensor
    sequences: int
    tokens: int

    def neighbours(self) -> list[float]:
        """Sim(i) = cos(s_i, s_{i-1}) with all heads side by side, for i from 1."""
        return self.per_head.diagonal(-1).tolist()

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types; the matrices only where they are complete."""
        result: dict[str, Any] = {"sequences": self.sequences, "tokens": self.tokens}
        for name, matrix in (("per_head", self.per_head), ("head_mean", self.head_mean)):
            result[name] = {"neighbours": matrix.diagonal(-1).tolist()}
            if not matrix.isnan().any():
                result[name]["matrix"] = matrix.tolist()
        return result


@torch.no_grad()
def softmax_similarity(
    model: PreTrainedModel,
    dataloader: Iterable[Mapping[str, torch.Tensor]],
    *,
    all_pairs: bool = False,
    max_elements: int = _ELEMENTS,
    progress: bool = True,
) -> SoftmaxSimilarity:
    """
    Measure the cosine similarity of the softmax activations of layers.

    One forward pass a sequence hands over every layer's queries and keys; from these the model's own back end gives
    s as its output for the columns of the identity in place of V, so that masks, windows, caps and sinks are those of
    the model. Sums over columns are all that is kept: with eager and sdpa, memory stays within `max_elements` or one
    column of the layers compared, whatever the length; fused back ends take as many columns as V has.

    Args:
        model: a transformers model without a UniAttn adapter.
        dataloader: batches with `input_ids` (batch, length) and optionally `attention_mask`, on either side; every
            row is one sequence.
        all_pairs: compare every layer with every other, not only neighbours.
        max_elements: how many elements of s to hold at once.
        progress: show a progress bar.

    Raises:
        ValueError: if the model is not supported, has an adapter, or if there is no data.
    """
    decoder = wrappable_decoder(model)
    layers = len(decoder.layers)
    device = model.get_input_embeddings().weight.device
    totals = torch.zeros(2, layers, layers, dtype=torch.float64, device=device)
    sequences = tokens = 0
    with intercepted(decoder, range(layers)), evaluation_mode(model):
        bar = tqdm(dataloader, desc="similarity", unit="batch", disable=not progress, leave=False)
        for ids in _sequences(bar):
            handover = _WithoutProbabilities(keep=True)
            decoder.backbone(input_ids=ids.to(device), use_cache=False, **{HANDOVER: handover})
            states = [handover.take(layer) for layer in range(layers)]
            totals += _cosines(_gram(states, all_pairs=all_pairs, max_elements=max_elements))
            sequences += 1
            tokens += ids.shape[1]
    if not sequences:
        raise ValueError("dataloader is empty, or holds only padding; similarity needs at least one sequence")
    per_head, head_mean = (totals / sequences).cpu()
    return SoftmaxSimilarity(per_head, head_mean, sequences, tokens)


class _WithoutProbabilities(Handover):
    """Lets go of s, which the eager back end hands over for every layer at once."""

    def give(self, layer_idx: int, state: LeaderState) -> None:
        super().give(layer_idx, replace(state, probabilities=None))


def _sequences(dataloader: Iterable[Mapping[str, torch.Tensor]]) -> Iterator[torch.Tensor]:
    """Every row without its padding, (1, length)."""
    for index, batch in enumerate(dataloader):
        inputs = model_inputs(batch, index)
        for ids, real in zip(inputs["input_ids"], token_mask(inputs), strict=True):
            if real.any():
                yield ids[real].unsqueeze(0)


def _gram(states: list[LeaderState], *, all_pairs: bool, max_elements: int) -> torch.Tensor:
    """
    Σ s_i · s_j over all heads, queries and keys, and the same of the averages over heads.

    Returns:
        (2, layers, layers) in float64; NaN for pairs that were not asked for.
    """
    layers, length = len(states), states[0].key.shape[2]
    gram = torch.full((2, layers, layers), float("nan"), dtype=torch.float64, device=states[0].query.device)
    held = layers if all_pairs else 2
    width = _column_width(states[0], max_elements // held)
    for first in range(0, length, width):
        columns = range(first, first + width)
        blocks: list[torch.Tensor] = []
        for layer, state in enumerate(states):
            blocks.append(_softmax_columns(state, columns).to(gram.device))
            for other in range(layer + 1) if all_pairs else range(max(layer - 1, 0), layer + 1):
                pair = blocks[layer], blocks[other]
                sums = torch.stack([_inner(*pair), _inner(*(block.mean(2) for block in pair))])
                gram[:, layer, other] = gram[:, layer, other].nan_to_num() + sums
                gram[:, other, layer] = gram[:, layer, other]
            if not all_pairs and layer:
                blocks[layer - 1] = blocks[layer - 1][:0]
    return gram


def _column_width(state: LeaderState, max_elements: int) -> int:
    """How many columns of s to compute at a time: as many as fit, or what a fused back end takes, V of K's width."""
    _, heads, queries, head_dim = state.query.shape
    if original_config(state.attention)._attn_implementation not in ("eager", "sdpa"):
        return head_dim
    return max(1, min(state.key.shape[2], max_elements // (heads * queries)))


def _softmax_columns(state: LeaderState, columns: range) -> torch.Tensor:
    """
    The `columns` of s, in float32 or better; zeros for columns beyond the last key.

    Returns:
        (1, query length, query heads, columns).
    """
    batch, kv_heads, length, _ = state.key.shape
    keys = range(columns.start, min(columns.stop, length))
    identity = torch.zeros(length, len(columns), dtype=state.key.dtype, device=state.key.device)
    identity[list(keys), range(len(keys))] = 1
    output, _ = share_softmax(identity.expand(batch, kv_heads, -1, -1), state)
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _inner(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.dot(first.flatten(), second.flatten()).double()


def _cosines(gram: torch.Tensor) -> torch.Tensor:
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()
    return gram / (norms.unsqueeze(1) * norms.unsqueeze(2))
