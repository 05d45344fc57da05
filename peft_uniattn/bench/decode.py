"""
Time of one decoded token, whole model: base and unified on every fused back end of this machine, in turns.

On a GPU every contender is replayed from a CUDA graph of its own, with compiled layers on request. The cache is as
long as its content, so that nobody needs a mask, and filled at random; base and unified model share its memory. A
contender whose logits are wrong gets no time. The reference is the same model on the first back end that runs, without
kernels and not compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from tqdm.auto import tqdm
from transformers import PreTrainedModel, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .compiled import CompiledLayers
from .conditions import conditions
from .contenders import Contender, Models, medians, running
from .profile import where_it_goes
from .simulated import kept_share
from .ttft import GATE, ratios
from .work import dimensions, followers_of, measured_rates, work

_MOST_CONTENDERS = 16


@dataclass(frozen=True)
class DecodeBenchmark:
    """
    What to measure.

    Attributes:
        models: base and unified model.
        shapes: (sequences, cached tokens) of each measurement.
        skip_mass: mass that followers may leave out; 0 measures exact contenders only.
        kept: share of blocks to keep, in place of what `skip_mass` keeps, which on random weights is all of them.
        rounds: timed steps of every contender.
        compiler: back end of torch.compile for the layers of every contender, such as "inductor"; None: as they are.
        profile: also find out where the time of every contender goes ([`where_it_goes`]).
    """

    models: Models = field(default_factory=Models)
    shapes: tuple[tuple[int, int], ...] = ((16, 8192),)
    skip_mass: float = 0.0
    kept: float | None = None
    rounds: int = 20
    compiler: str | None = None
    profile: bool = False

    def __post_init__(self) -> None:
        least = _MOST_CONTENDERS * (self.rounds + 2)
        if not self.shapes or any(batch < 1 or length < least for batch, length in self.shapes):
            raise ValueError(
                f"shapes={self.shapes} must be of 1 sequence and {least} tokens or more: every timed step writes one"
            )
        if self.kept is not None and not 0 < self.kept <= 1:
            raise ValueError(f"kept={self.kept} must be a share of the blocks, above 0 and up to 1")
        if self.compiler is not None and self.compiler not in (known := torch.compiler.list_backends(())):
            raise ValueError(f"compiler={self.compiler!r} is no back end of torch.compile; use one of {known}")

    @torch.no_grad()
    def run(self, save: Callable[[dict[str, Any]], None] = lambda result: None) -> dict[str, Any]:
        """
        Measure everything; returns plain JSON types.

        Args:
            save: called with the result so far after every shape.
        """
        device = self.models.torch_device
        base, unified = self.models.build()
        rates = measured_rates(device, base.dtype)
        result = {
            "benchmark": "decode",
            "conditions": conditions(device) | {"measured_rates": rates},
            "settings": asdict(self),
            "dimensions": dimensions(base.config),
            "superblocks": unified.config.superblocks,
            "shapes": [],
        }
        for batch, length in tqdm(self.shapes, desc="shapes", unit="shape", leave=False):
            result["shapes"].append(self._measure(base, unified, batch, length, rates))
            save(result)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        return result

    def _measure(
        self, base: PreTrainedModel, unified: PreTrainedModel, batch: int, length: int, rates: dict[str, float]
    ) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.models.seed)
        token = torch.randint(base.config.vocab_size, (batch, 1), generator=generator).to(base.device)
        cache = random_cache(base, batch, length, self.models.seed)
        caches = {"base": cache, "unified": shared_cache(unified, cache)}
        models = {"base": base, "unified": unified}
        contenders = self._contenders(models, caches, token)
        references = self._references(models, caches, token)
        green, first_seconds = {}, {}
        for contender in tqdm(contenders, desc="checked", unit="contender", leave=False):
            _rewind(caches[contender.name.split()[0]])
            started = perf_counter()
            works = contender.check(references, GATE[self.models.dtype])
            first_seconds[contender.name] = perf_counter() - started
            if works and self.compiler is not None:
                # Again, for a peak of memory without that of compiling.
                _rewind(caches[contender.name.split()[0]])
                contender.check(references, GATE[self.models.dtype])
            if works or ("simulated" in contender.name and isinstance(contender.error, float)):
                green[contender.name] = contender.run
        if token.is_cuda:
            # Not before all have been checked: it writes to the cache.
            green = self._captured([contender for contender in contenders if contender.name in green])
        for one in caches.values():
            _rewind(one)
        times = medians(green, base.device, self.rounds)
        bounds = {"base": work(base, batch, 1, length), "unified": work(unified, batch, 1, length)}
        rows = {}
        for contender in contenders:
            model = bounds[contender.name.split()[0]]
            rows[contender.name] = {"relative_error": contender.error, "peak_memory_bytes": contender.peak}
            rows[contender.name]["first_run_s"] = first_seconds[contender.name]
            if contender.name in times:
                seconds = times[contender.name]["median_ms"] / 1e3
                rows[contender.name] |= times[contender.name] | {
                    "gb_per_s": model.bytes / seconds / 1e9,
                    "tflop_per_s": model.flops / seconds / 1e12,
                    "tokens_per_s": batch / seconds,
                }
                if self.profile:
                    _rewind(caches[contender.name.split()[0]])
                    rows[contender.name]["profile"] = where_it_goes(green[contender.name], base.device)
        return {
            "batch_size": batch,
            "length": length,
            "work": {name: asdict(work) for name, work in bounds.items()},
            "bounds_ms": {name: work.bounds_ms(**rates) for name, work in bounds.items()},
            "bound_ms": {name: work.bound_ms(**rates) for name, work in bounds.items()},
            "contenders": rows,
            "ratios": ratios(rows),
        }

    @staticmethod
    def _captured(contenders: list[Contender]) -> dict[str, Callable[[], None]]:
        """A CUDA graph of each; those that cannot be captured say why and get no time."""
        graphs = {}
        for contender in tqdm(contenders, desc="captured", unit="contender", leave=False):
            try:
                graphs[contender.name] = _captured(contender.run)
            except RuntimeError as failure:
                contender.error = f"not captured: {str(failure).splitlines()[0][:160]}"
        return graphs

    def _references(self, models: dict, caches: dict, token: torch.Tensor) -> dict[str, torch.Tensor]:
        """What compiled contenders are compared with: logits of the same models as they are."""
        references: dict[str, torch.Tensor] = {}
        if self.compiler is not None:
            plain = replace(self, compiler=None, skip_mass=0.0)
            for contender in plain._contenders(models, caches, token):
                if (model := contender.name.split()[0]) not in references:
                    _rewind(caches[model])
                    contender.check(references, GATE[self.models.dtype])
        return references

    def _contenders(self, models: dict, caches: dict, token: torch.Tensor) -> list[Contender]:
        def step(model: str, name: str, kept: float | None = None, **kernels: Any) -> Callable[[], torch.Tensor]:
            layers = nullcontext
            if self.compiler is not None:
                layers = CompiledLayers(models[model], caches[model], self.compiler).running

            def run() -> torch.Tensor:
                with ExitStack() as stack:
                    stack.enter_context(running(models[model], name, **kernels))
                    stack.enter_context(without_masks())
                    stack.enter_context(layers())
                    if kept is not None:
                        stack.enter_context(kept_share(kept, self.models.seed))
                    return models[model](token, past_key_values=caches[model], use_cache=True).logits

            return run

        names = [name for name in self.models.measured_back_ends if name != "eager"]
        contenders = [Contender(f"{model} {name}", step(model, name)) for model in models for name in names]
        if not token.is_cuda:
            return contenders
        for name in names:
            contenders.append(Contender(f"unified {name}, kernels", step("unified", name, kernels="triton")))
        if self.skip_mass:
            options = {"kernels": "triton", "skip_mass": self.skip_mass}
            for name in names:
                what = f"skip_mass {self.skip_mass}" if self.kept is None else f"simulated kept {self.kept}"
                contenders.append(Contender(f"unified {name}, {what}", step("unified", name, self.kept, **options)))
        return contenders


def random_cache(model: PreTrainedModel, batch: int, length: int, seed: int) -> StaticCache:
    """A full cache of a base model with random content; no forward is run to fill it."""
    cache = StaticCache(config=model.config, max_cache_len=length)
    generator = torch.Generator(model.device).manual_seed(seed)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    like = torch.empty(batch, config.num_key_value_heads, 1, head_dim, dtype=model.dtype, device=model.device)
    for layer in cache.layers:
        layer.lazy_initialization(like, like)
        layer.keys.normal_(generator=generator)
        layer.values.normal_(generator=generator)
    return cache


def shared_cache(model: PreTrainedModel, cache: StaticCache) -> StaticCache:
    """The same content in the same memory for a unified model: its followers' layers hold values only."""
    followers = {layer for block in model.config.superblocks for layer in block[1:]}
    shared = StaticCache(config=model.config, max_cache_len=cache.layers[0].max_cache_len)
    for index, (layer, original) in enumerate(zip(shared.layers, cache.layers, strict=True)):
        like = original.values[:, :, :1]
        layer.lazy_initialization(like[..., :0], like[..., :0])
        layer.keys = original.values if index in followers else original.keys
        layer.values = original.values[..., :0].contiguous() if index in followers else original.values
    assert followers_of(model) == len(followers)
    return shared


def _rewind(cache: StaticCache) -> None:
    """Let the next token be written to the first position; it sees all of the cache at any."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(0)


@contextmanager
def without_masks() -> Iterator[None]:
    """
    Attention over all of a static cache without a mask, as the best serving engines do it.

    transformers masks static caches, and with a mask PyTorch neither has FlashAttention nor reads grouped keys in
    place: no baseline to beat.
    """

    functions = ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS
    before = [function["sdpa"] for function in functions]
    for function, replacement in zip(functions, (_attention, _no_mask), strict=True):
        function["sdpa"] = replacement
    try:
        yield
    finally:
        for function, original in zip(functions, before, strict=True):
            function["sdpa"] = original


# Not inside of the above: torch.compile would take another function of the same code for another one.
def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    output = scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _captured(run: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """`run` as a CUDA graph; it has run before, so that everything is compiled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
