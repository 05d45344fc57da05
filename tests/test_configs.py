"""The configurations in `configs/` mean the Superblocks of the paper's Table 4, which counts layers from 1."""

from pathlib import Path

import pytest
from peft import PeftConfig

CONFIGS = Path(__file__).parent.parent / "configs"
TOP_HALF = [(17, 20), (21, 24), (25, 28), (29, 32)]
TABLE_4 = {
    "llama-2-7b": (32, TOP_HALF),
    "llama-3.1-8b": (32, TOP_HALF),
    "mistral-7b": (32, TOP_HALF),
    "gemma-2-9b": (42, [(22, 25), (26, 29), (30, 33), (34, 37), (38, 41)]),
}


@pytest.mark.parametrize("name", TABLE_4)
def test_superblocks_are_those_of_table_4(name):
    layers, groups = TABLE_4[name]
    # Gemma-2 alternates, and its second layer is the first with full attention.
    masks = ["sliding_attention", "full_attention"] * (layers // 2) if name == "gemma-2-9b" else None
    plan = PeftConfig.from_pretrained(CONFIGS / name).make_plan(layers, masks)
    assert [(block[0] + 1, block[-1] + 1) for block in plan.superblocks] == groups


def test_every_configuration_is_in_the_table():
    assert {path.name for path in CONFIGS.iterdir() if path.is_dir()} == set(TABLE_4)
