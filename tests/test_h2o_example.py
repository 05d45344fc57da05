"""examples/h2o.py measures what it says."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from conftest import prompt
from test_h2o import build


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[1] / "examples" / "h2o.py"
    spec = importlib.util.spec_from_file_location("h2o_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["base", "adapter"])
def test_without_compression_the_perplexity_is_that_of_one_forward_over_the_text(example, kind):
    model, ids = build(kind), prompt(2, 25)
    row = example.measure(model, kind, ids, 20, 0.0, 0.5)
    with torch.no_grad():
        logits = model(ids).logits[:, 19:-1]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 20:].flatten()).exp().item()
    assert math.isclose(row["perplexity"], wanted, rel_tol=1e-5)
    assert row["kv_retain_rate"] == (1 if kind == "base" else 1 - 3 / 6 / 2)


def test_compression_is_the_share_of_the_tokens_that_is_gone(example):
    row = example.measure(build("base"), "base", prompt(2, 26), 20, 0.6, 0.5)
    assert row["kv_retain_rate"] == 0.4
