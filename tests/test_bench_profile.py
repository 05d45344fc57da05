"""`peft-uniattn bench … --profile`: the time of every kind of kernel, and between kernels."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from peft_uniattn.bench.profile import Span, exclusive, group_of, grouped, where_it_goes
from peft_uniattn.cli import app

KERNELS = Path(__file__).parents[1] / "peft_uniattn" / "kernels"
OURS = [
    name
    for file in sorted(KERNELS.glob("*_triton.py"))
    for name in re.findall(r"@triton\.jit.*\ndef ([a-z]\w*)\(", file.read_text())
]


def test_kernels_that_overlap_count_once():
    spans = [Span("b", 12.0, 20.0), Span("a", 0.0, 10.0), Span("a", 9.0, 11.0), Span("c", 13.0, 15.0)]
    kernels, whole = exclusive(spans)
    assert {name: (time, launches) for name, time, launches in kernels} == {
        "a": (11.0, 2),
        "b": (8.0, 1),
        "c": (0.0, 1),
    }
    assert whole == 20.0
    assert exclusive([]) == ([], 0.0)


def test_groups_and_what_is_between_add_up_to_one_run():
    kernels = [("nvjet_tst_1", 3000.0, 6), ("leader_split", 1500.0, 3), ("leader_combine", 300.0, 3)]
    found = grouped(kernels, whole_us=6000.0, repeats=3)
    assert found["groups_ms"] == pytest.approx({"products": 1.0, "leader": 0.6})
    assert found["between_ms"] == pytest.approx(0.4)
    assert found["kernels"][0] == {"kernel": "nvjet_tst_1", "group": "products", "launches": 2.0, "ms": 1.0}


# Names as profiles of an H100 have them.
@pytest.mark.parametrize(
    "kernel, group",
    [
        ("nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_TNT", "products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "fused attention"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits>", "fused attention"),
        ("triton_poi_fused__scaled_dot_product_cudnn_attention_add_cat_mm_3", "norms, RoPE, cache"),
        ("void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast", "norms, RoPE, cache"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("aten::addmm", "products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "fused attention"),
    ],
)
def test_kernels_are_known_by_their_names(kernel, group):
    assert group_of(kernel) == group


@pytest.mark.parametrize("kernel", OURS)
def test_every_kernel_of_this_package_is_in_a_group_of_its_own_kind(kernel):
    assert group_of(kernel) in ("leader", "follower", "selection")


def test_kernels_of_this_package_were_found():
    assert {"leader_split", "follower_combine", "lead", "recompute", "select"} <= set(OURS)


def test_products_of_a_run_are_found_on_a_cpu():
    matrix = torch.randn(64, 64)
    found = where_it_goes(lambda: (matrix @ matrix).relu(), torch.device("cpu"), repeats=2)
    assert found["groups_ms"]["products"] > 0
    (product,) = (kernel for kernel in found["kernels"] if kernel["kernel"] == "aten::mm")
    assert product["launches"] == 1
    assert found["between_ms"] > 0


@pytest.mark.gpu
def test_products_of_a_run_are_found_on_a_gpu():
    matrix = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    (matrix @ matrix).relu()
    with torch.cuda.graph(graph):
        (matrix @ matrix).relu()
    found = where_it_goes(graph.replay, matrix.device)
    assert found["groups_ms"]["products"] > found["groups_ms"]["norms, RoPE, cache"] > 0


@pytest.mark.parametrize("command, rows", [("decode", "shapes"), ("ttft", "lengths")])
def test_the_option_profiles_every_contender_that_has_a_time(command, rows):
    options = ["--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--length", "64", "--rounds", "1"]
    options += ["--batch-size", "1", "--back-end", "sdpa", "--profile"]
    result = CliRunner().invoke(app, ["bench", command, *options], catch_exceptions=False)
    assert "where the time goes" in result.stdout
    (row,) = json.loads(result.stdout.splitlines()[-1])[rows]
    assert list(row["contenders"]) == ["base sdpa", "unified sdpa"]
    for contender in row["contenders"].values():
        assert {"products", "fused attention", "norms, RoPE, cache"} <= contender["profile"]["groups_ms"].keys()
