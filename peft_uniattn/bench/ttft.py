"""
Time to the first token: base and unified model on every attention back end of this machine, one process, in turns.

A contender whose logits are wrong gets no time. The reference is the same model on the first fused back end, without
kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

from ..analysis.data import load_sequences
from ..named import load_named_tokenizer
from .conditions import conditions
from .contenders import Contender, Models, medians, running
from .profile import where_it_goes
from .simulated import kept_share
from .work import Work, dimensions, head_dim, measured_rates, work

# Relative error in the Euclidean norm of the last position's logits, between two ways to the same sums. Through layers
# of random weights roundings grow: on an H100, FlashAttention and cuDNN were 0.05 apart, both right within 0.003 a
# layer, and eager attention, whose probabilities are rounded, 0.1. What is wrong is at 1.
GATE = {"bfloat16": 0.2, "float16": 0.05, "float32": 1e-3}
# Eager attention holds all scores at once, as many as those of a prompt of this length; more is left to the others.
_LONGEST_EAGER = 8192


@dataclass(frozen=True)
class TtftBenchmark:
    """
    What to measure.

    Attributes:
        models: base and unified model.
        lengths: tokens of the prompts.
        batch_size: prompts.
        skip_mass: mass that followers may leave out; 0 measures exact contenders only.
        kept: share of tiles to keep, in place of what `skip_mass` keeps, which on random weights is all of them.
        rounds: timed forwards of every contender.
        chunk: tokens that a forward gets at once, with a growing cache; None for the whole prompt. Chunks after the
            first have a mask, which FlashAttention does not take.
        text: a file of text to take the prompts from, for a checkpoint, so that what followers skip is real; None for
            random tokens.
        tiles_gib: memory that leaders of a prompt in one piece may take for tiles of s; 0 measures none that do.
        profile: also find out where the time of every contender goes ([`where_it_goes`]).
    """

    models: Models = field(default_factory=Models)
    lengths: tuple[int, ...] = (8192,)
    batch_size: int = 1
    skip_mass: float = 0.0
    kept: float | None = None
    rounds: int = 7
    chunk: int | None = None
    text: str | None = None
    profile: bool = False
    tiles_gib: float = 0.0

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(f"lengths={self.lengths} must name prompts of 2 tokens or more")
        if self.rounds < 1 or self.batch_size < 1:
            raise ValueError(f"rounds={self.rounds} and batch_size={self.batch_size} must be 1 or more")
        if self.chunk is not None and self.chunk < 2:
            raise ValueError(f"chunk={self.chunk} must be 2 tokens or more, or None for prompts in one piece")
        if self.kept is not None and not 0 < self.kept <= 1:
            raise ValueError(f"kept={self.kept} must be a share of the tiles, above 0 and up to 1")
        if not self.tiles_gib >= 0:
            raise ValueError(f"tiles_gib={self.tiles_gib} must be a number of GiB, or 0 to store no tiles")
        if self.text is not None and (self.models.model is None or self.kept is not None):
            raise ValueError(
                f"text={self.text!r} shows how much a checkpoint's followers skip; give its folder or name as model, "
                "and leave out kept"
            )

    @torch.no_grad()
    def run(self, save: Callable[[dict[str, Any]], None] = lambda result: None) -> dict[str, Any]:
        """
        Measure everything; returns plain JSON types.

        Args:
            save: called with the result so far after every length.
        """
        device = self.models.torch_device
        prompts = {length: self._from_text(length) for length in self.lengths} if self.text else {}
        base, unified = self.models.build()
        rates = measured_rates(device, base.dtype)
        result = {
            "benchmark": "ttft",
            "conditions": conditions(device) | {"measured_rates": rates},
            "settings": asdict(self),
            "dimensions": dimensions(base.config),
            "superblocks": unified.config.superblocks,
            "lengths": [],
        }
        for length in tqdm(self.lengths, desc="lengths", unit="length", leave=False):
            ids = prompts[length] if prompts else self._random(length, base.config.vocab_size)
            result["lengths"].append(self._measure(base, unified, ids.to(base.device), rates))
            save(result)
        return result

    def _random(self, length: int, vocab_size: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.models.seed)
        return torch.randint(vocab_size, (self.batch_size, length), generator=generator)

    def _from_text(self, length: int) -> torch.Tensor:
        tokenizer = load_named_tokenizer("model", self.models.model)
        options = {"length": length, "sequences": self.batch_size, "seed": self.models.seed}
        pieces = load_sequences(self.text, tokenizer, **options).fit["input_ids"]
        if len(pieces) < self.batch_size:
            raise ValueError(
                f"text={self.text!r} holds {len(pieces)} prompts of {length} tokens, and {self.batch_size} are "
                "needed; use a longer text, a smaller length or fewer prompts"
            )
        return torch.tensor(pieces[:])

    def _measure(
        self, base: PreTrainedModel, unified: PreTrainedModel, ids: torch.Tensor, rates: dict[str, float]
    ) -> dict[str, Any]:
        length = ids.shape[1]
        contenders = self._contenders(base, unified, ids)
        references: dict[str, torch.Tensor] = {}
        green = []
        for contender in tqdm(contenders, desc="checked", unit="contender", leave=False):
            works = contender.check(references, GATE[self.models.dtype])
            if works or ("simulated" in contender.name and isinstance(contender.error, float)):
                green.append(contender)
        times = medians({contender.name: contender.run for contender in green}, base.device, self.rounds)
        bounds = {name: self._work(model, length) for name, model in (("base", base), ("unified", unified))}
        rows = {}
        for contender in contenders:
            model = bounds[contender.name.split()[0]]
            rows[contender.name] = {"relative_error": contender.error, "peak_memory_bytes": contender.peak}
            if contender.name in times:
                seconds = times[contender.name]["median_ms"] / 1e3
                achieved = {"tflop_per_s": model.flops / seconds / 1e12, "gb_per_s": model.bytes / seconds / 1e9}
                rows[contender.name] |= times[contender.name] | achieved
                if self.profile:
                    rows[contender.name]["profile"] = where_it_goes(contender.run, base.device)
        return {
            "length": length,
            "work": {name: asdict(work) for name, work in bounds.items()},
            "bounds_ms": {name: work.bounds_ms(**rates) for name, work in bounds.items()},
            "bound_ms": {name: work.bound_ms(**rates) for name, work in bounds.items()},
            "contenders": rows,
            "ratios": ratios(rows),
        }

    def _contenders(self, base: PreTrainedModel, unified: PreTrainedModel, ids: torch.Tensor) -> list[Contender]:
        length = ids.shape[1]
        short = min(length, self.chunk or length) * length <= _LONGEST_EAGER**2
        names = [name for name in self.models.measured_back_ends if short or name != "eager"]
        contenders = [Contender(f"base {name}", self._forward(base, ids, name)) for name in names]
        contenders += [Contender(f"unified {name}", self._forward(unified, ids, name)) for name in names]
        if ids.device.type != "cuda":
            return contenders
        if self.tiles_gib and "sdpa cudnn" in names:
            options = {"kernels": "triton", "tiles_gib": self.tiles_gib}
            contenders.append(
                Contender("unified sdpa cudnn, stored tiles", self._forward(unified, ids, "sdpa cudnn", **options))
            )
        if not self.skip_mass:
            return contenders
        fast = ("sdpa cudnn", "sdpa flash") if self.chunk is None else ("sdpa cudnn", "sdpa efficient")
        for name in names:
            if name not in fast:
                continue
            what = f"skip_mass {self.skip_mass}" if self.kept is None else f"simulated kept {self.kept}"
            for kernels, suffix in (("triton", ""), ("auto", ", auto")):
                options = {"kernels": kernels, "skip_mass": self.skip_mass, "kept": self.kept}
                forward = self._forward(unified, ids, name, **options)
                contenders.append(Contender(f"unified {name}, {what}{suffix}", forward))
        return contenders

    def _forward(
        self, model: PreTrainedModel, ids: torch.Tensor, back_end: str, *, kept: float | None = None, **kernels: Any
    ) -> Callable[[], torch.Tensor]:
        def forward() -> torch.Tensor:
            with ExitStack() as stack:
                stack.enter_context(running(model, back_end, **kernels))
                if kept is not None:
                    stack.enter_context(kept_share(kept, self.models.seed, head_dim(model.config)))
                cache = DynamicCache(config=model.config)
                for part in ids.split(self.chunk or ids.shape[1], dim=1):
                    logits = model(part, past_key_values=cache, logits_to_keep=1).logits
                return logits

        return forward

    def _work(self, model: PreTrainedModel, length: int) -> Work:
        """Of all chunks together; each moves the weights and the states before it again."""
        ends = [*range(chunk, length, chunk), length] if (chunk := self.chunk) else [length]
        parts = [work(model, self.batch_size, end - start, end) for start, end in pairwise([0, *ends])]
        return Work(sum(p.flops for p in parts), sum(p.bytes for p in parts), parts[-1].state_bytes)


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every unified contender against the fastest base, and eager against eager as the paper compares."""
    times = {name: row["median_ms"] for name, row in rows.items() if "median_ms" in row}
    bases = {name: time for name, time in times.items() if name.startswith("base")}
    if not bases:
        return {}
    best = min(bases, key=bases.get)
    found: dict[str, Any] = {"fastest_base": best}
    found |= {name: time / bases[best] for name, time in times.items() if not name.startswith("base")}
    if "base eager" in times and "unified eager" in times:
        found["unified eager / base eager"] = times["unified eager"] / times["base eager"]
    return found
