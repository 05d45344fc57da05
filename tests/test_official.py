"""Weights that the paper's own code has computed act here as they do there: x · W, added to attention's output."""

import numpy as np
import pytest
import torch
from conftest import changed, close, loud, prompt, specification, tiny_adapter, tiny_model, weights
from oracle import unified_logits
from peft import get_peft_model

from peft_uniattn import UniAttnConfig
from peft_uniattn.official import load_official_weights, official_config

STACKED = "init_weights_sequential_new_plan.npy"
BLOCKS, FOLLOWERS = [[0, 1, 2], [3, 4, 5]], [1, 2, 4, 5]


@pytest.fixture
def matrices():
    return np.random.default_rng(0).normal(scale=0.2, size=(4, 32, 32))


@pytest.mark.parametrize("layout", ["stacked file", "folder with it", "one file a follower"])
def test_imported_weights_give_the_logits_of_equation_14(layout, matrices, tmp_path, float64):
    model = get_peft_model(loud(tiny_model()), official_config(3, 0, 7, 6, task_type="CAUSAL_LM")).eval()
    if layout == "one file a follower":
        for index, matrix in enumerate(matrices, start=1):
            np.save(tmp_path / f"init_weights_sequential_index_{index}.npy", matrix[None])
    else:
        np.save(tmp_path / STACKED, matrices)
    path = tmp_path / STACKED if layout == "stacked file" else tmp_path
    assert load_official_weights(model, path) == FOLLOWERS
    expected = specification(model, BLOCKS)
    expected["compensation"] = {
        layer: torch.from_numpy(matrix) for layer, matrix in zip(FOLLOWERS, matrices, strict=True)
    }
    close(model(prompt()).logits, unified_logits(input_ids=prompt(), **expected))


@pytest.mark.parametrize(
    ("arguments", "layers", "superblocks"),
    [
        ((4, 16, 33), 32, "[16-19] [20-23] [24-27] [28-31]"),
        ((4, 21, 43), 42, "[21-24] [25-28] [29-32] [33-36] [37-40]"),
        ((3, 6, 12), 16, "[6-8] [9-11]"),
    ],
)
def test_script_arguments_mean_the_same_plan(arguments, layers, superblocks):
    assert str(official_config(*arguments, layers).make_plan(layers)) == superblocks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda matrices: matrices[:3], r"shape \(3, 32, 32\), but 4 followers of hidden size 32 need \(4, 32, 32\)"),
        (lambda matrices: matrices[0], r"shape \(32, 32\)"),
        (lambda matrices: matrices[:, :, :16], r"shape \(4, 32, 16\)"),
        (lambda matrices: matrices * np.nan, "NaN or infinite"),
        (lambda matrices: matrices.astype(int), "holds int64, not floating-point"),
        (lambda matrices: np.array([print], dtype=object), "is no array that NumPy can read"),
        (lambda matrices: None, "does not exist"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(change, message, matrices, tmp_path):
    model = tiny_adapter()
    before = weights(model)
    if (saved := change(matrices)) is not None:
        np.save(tmp_path / STACKED, saved)
    with pytest.raises(ValueError, match=message):
        load_official_weights(model, tmp_path / STACKED)
    assert not changed(before, weights(model))


@pytest.mark.parametrize("settings", [{"r": 4}, {"compensation": "heads"}, {"compensation": "none"}])
def test_other_compensations_are_refused(settings, tmp_path):
    config = UniAttnConfig(superblock_size=3, start_layer=0, task_type="CAUSAL_LM", **settings)
    with pytest.raises(ValueError, match=r"use UniAttnConfig\(r=None\)"):
        load_official_weights(get_peft_model(tiny_model(), config), tmp_path)
