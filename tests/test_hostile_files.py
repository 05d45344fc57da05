"""
Damaged and forged files, hundreds by seed: each is refused in words, or loads as what it holds, and nothing else.

Whatever happens, the base model is bit for bit what it was. safetensors has no checksum, so flipped bits in values
cannot be noticed; they must come out as the file has them.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import aligned, logits, moved, tiny_adapter, tiny_model
from file_mutations import fields, mutate_json, mutate_weights
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_uniattn import UniAttnLayer, to_standalone

SECONDS = 20
CLEAR = (ValueError, OSError, SafetensorError)
CONFIGS = {
    "full": {},
    "low_rank": {"r": 3},
    "explicit": {"superblocks": [[1, 2, 3], [4, 5]]},
    "lm_head": {"modules_to_save": ["lm_head"]},
}
SIZES = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 97}


def base_model():
    return tiny_model(**SIZES)


@contextmanager
def time_limit(seconds: int):
    def stop(*_):
        raise AssertionError(f"still loading after {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Bit-equal, where one NaN is like another."""
    return torch.equal(first.isnan(), second.isnan()) and torch.equal(first.nan_to_num(), second.nan_to_num())


class Adapters:
    """Saved adapters, a base model that outlives all attempts to load one, and what a loaded one has to return."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = aligned(base_model())
        self.expected = logits(self.base)
        for name, config in CONFIGS.items():
            moved(tiny_adapter(base_model(), **config)).save_pretrained(folder / name)

    def of_file(self, config: str, file: Path) -> torch.Tensor:
        """Logits of an adapter that was never saved, with the tensors that `file` holds."""
        model = tiny_adapter(base_model(), **CONFIGS[config])
        for name, tensor in load_file(file).items():
            target = name.replace("lm_head.", "lm_head.modules_to_save.default.").replace("W.w", "W.default.w")
            target = target.replace("A.w", "A.default.w").replace("B.w", "B.default.w")
            if target in dict(model.named_parameters()) and "default" in target:
                model.get_parameter(target).data.copy_(tensor)
        return logits(model)

    def attempt(self, config: str, folder: Path) -> Exception | None:
        """Load what is in `folder`; what it was refused with, if it was. The base must have survived."""
        try:
            with time_limit(SECONDS), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = PeftModel.from_pretrained(self.base, folder)
        except Exception as error:
            self.check_base()
            return error
        found = logits(aligned(model))
        assert same(found, self.of_file(config, folder / "adapter_model.safetensors")), "loaded, but something else"
        model.unload()
        if "modules_to_save" in CONFIGS[config]:
            self.base = aligned(base_model())  # PEFT's unload() keeps the trained module
        self.check_base()
        return None

    def check_base(self) -> None:
        assert not any(isinstance(module, UniAttnLayer) for module in self.base.modules()), "left partly wrapped"
        assert not hasattr(self.base, "peft_config")
        assert torch.equal(logits(self.base), self.expected), "another base than before"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return Adapters(tmp_path_factory.mktemp("adapters"))


def clear(error: Exception, file: Path) -> bool:
    """Whether it is an error to expect; without a usable peft_type, PEFT cannot know what to call."""
    content = fields(file)
    if content is None or content.get("peft_type") != "UNIATTN":
        return isinstance(error, (*CLEAR, KeyError, TypeError))
    return isinstance(error, CLEAR) and 10 < len(str(error)) < 4000


def fuzz_adapters(adapters: Adapters, folder: Path, seeds: range) -> dict[str, int]:
    outcomes = {"refused": 0, "loaded": 0}
    for seed in seeds:
        rng = random.Random(seed)
        config = rng.choice(sorted(CONFIGS))
        shutil.copytree(adapters.folder / config, folder, dirs_exist_ok=True)
        if rng.random() < 0.5:
            how = mutate_weights(folder / "adapter_model.safetensors", rng)
        else:
            # Another design is another function of the same weights, and as good as the first.
            how = mutate_json(folder / "adapter_config.json", rng, keep=("compensation",))
        try:
            error = adapters.attempt(config, folder)
            assert error is None or clear(error, folder / "adapter_config.json"), repr(error)[:2000]
        except AssertionError as failure:
            raise AssertionError(f"seed {seed}, {config}: {how}: {failure}") from failure
        outcomes["loaded" if error is None else "refused"] += 1
    return outcomes


def record(outcomes: dict[str, int], record_property) -> None:
    for name, count in {"files fuzzed": sum(outcomes.values()), **outcomes}.items():
        record_property(name, count)


def test_damaged_adapters_are_refused_or_load_what_they_hold(adapters, tmp_path, record_property):
    outcomes = fuzz_adapters(adapters, tmp_path / "adapter", range(200))
    record(outcomes, record_property)
    assert min(outcomes.values()) > 20


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 3000, 500))
def test_two_thousand_damaged_adapters_are_refused_or_load_what_they_hold(adapters, tmp_path, first, record_property):
    record(fuzz_adapters(adapters, tmp_path / "adapter", range(first, first + 500)), record_property)


OWN_FIELDS = {
    *("superblocks", "follower_mask", "compensation_rank", "shared", "dropped_layers", "kernels", "skip_mass"),
    "uniattn_version",
}


class Standalone:
    """A saved standalone model, its configuration file, and what a loaded one has to return."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = aligned(to_standalone(moved(tiny_adapter(base_model()))))
        self.model.save_pretrained(folder)
        self.fields = fields(folder / "config.json")

    def of_file(self, file: Path) -> torch.Tensor:
        """Logits of the model with the tensors that `file` holds."""
        model = to_standalone(moved(tiny_adapter(base_model())))
        for name, parameter in model.named_parameters():
            tensor = load_file(file).get(name)
            parameter.data = torch.zeros_like(parameter) if tensor is None else tensor.to(parameter.dtype)
        return logits(aligned(model))

    def of_another_model(self, file: Path) -> bool:
        """Whether fields that are transformers' own have changed: what they mean is not for this package to say."""
        content = fields(file)
        if content is None:
            return True
        return any(
            content.get(name) != value for name, value in self.fields.items() if name not in OWN_FIELDS
        ) or bool(content.keys() - self.fields.keys())

    def attempt(self, folder: Path) -> Exception | None:
        """Load what is in `folder`; what it was refused with, if it was."""
        try:
            with time_limit(SECONDS), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, trust_remote_code=False)
        except Exception as error:
            return error
        if not self.of_another_model(folder / "config.json"):
            found = logits(aligned(model))
            assert same(found, self.of_file(folder / "model.safetensors")), "loaded, but something else"
        return None


@pytest.fixture(scope="module")
def standalone(tmp_path_factory):
    return Standalone(tmp_path_factory.mktemp("standalone"))


def fuzz_standalone(standalone: Standalone, folder: Path, seeds: range) -> dict[str, int]:
    outcomes = {"refused": 0, "loaded": 0}
    for seed in seeds:
        rng = random.Random(seed)
        shutil.copytree(standalone.folder, folder, dirs_exist_ok=True)
        if rng.random() < 0.5:
            how = mutate_weights(folder / "model.safetensors", rng)
        else:
            foreign = standalone.fields.keys() - OWN_FIELDS
            how = mutate_json(folder / "config.json", rng, keep=tuple(foreign))
        try:
            error = standalone.attempt(folder)
            shapes = isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error)
            foreign = standalone.of_another_model(folder / "config.json")
            clear = isinstance(error, (*CLEAR, StrictDataclassError)) or shapes or foreign
            assert error is None or clear, repr(error)[:2000]
        except AssertionError as failure:
            raise AssertionError(f"seed {seed}: {how}: {failure}") from failure
        outcomes["loaded" if error is None else "refused"] += 1
    return outcomes


def test_damaged_standalone_models_are_refused_or_load_what_they_hold(standalone, tmp_path, record_property):
    outcomes = fuzz_standalone(standalone, tmp_path / "model", range(100))
    record(outcomes, record_property)
    assert min(outcomes.values()) > 10


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 2000, 500))
def test_a_thousand_damaged_standalone_models_are_refused_or_load_what_they_hold(
    standalone, tmp_path, first, record_property
):
    record(fuzz_standalone(standalone, tmp_path / "model", range(first, first + 500)), record_property)


class RunsCode:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple:
        return Path.touch, (self.witness,)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(adapters, tmp_path):
    shutil.copytree(adapters.folder / "full", tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({"x": RunsCode(tmp_path / "witness")}, tmp_path / "adapter" / "adapter_model.bin")
    error = adapters.attempt("full", tmp_path / "adapter")
    assert isinstance(error, ValueError)
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize("layers", [10**6, 10**18])
def test_a_plan_of_a_million_layers_is_refused_at_once(adapters, tmp_path, layers):
    shutil.copytree(adapters.folder / "full", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    content = fields(file)
    for change in (
        {"superblocks": [list(range(min(layers, 10**6)))]},
        {"superblock_size": layers},
        {"end_layer": layers},
        {"r": layers},
        {"base_layout": {**content["base_layout"], "num_hidden_layers": layers}},
    ):
        file.write_text(json.dumps({**content, **change}))
        error = adapters.attempt("full", tmp_path / "adapter")
        assert isinstance(error, ValueError)
        assert len(str(error)) < 2000
