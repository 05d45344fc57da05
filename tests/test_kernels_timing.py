"""When skipping pays, by times given or taken; no kernel runs here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from peft_uniattn.kernels import timing
from peft_uniattn.kernels.timing import Times, Trials, size_of

RESULTS = Path(__file__).parents[1] / "docs" / "results"


class Shared:
    """Stands for a leader's tiles, of which followers need a share."""

    def __init__(self, share):
        self.share = share

    def kept_share(self):
        return self.share


class Leader(nn.Module):
    """Keeps these shares of its tiles, one prompt after the other, and counts how often it is weighed."""

    def __init__(self, *shares):
        super().__init__()
        self.shares, self.weighed = list(shares), 0

    def weigh(self):
        self.weighed += 1
        return torch.zeros(1), Shared(self.shares.pop(0))


@pytest.fixture
def trials(monkeypatch):
    """A follower is faster up to 0.8 of the tiles; weighing costs 6 ms."""
    timed = []
    monkeypatch.setattr(timing, "measure", lambda *contenders: (timed.append(1), Times(16.0, 22.0, 20.0))[1])
    found = Trials()
    found.timed = timed
    return found


def lead(trials, leader, followers=3, size="32k"):
    return trials.lead(leader, size, followers, torch.zeros(1), lambda: None, leader.weigh)


def test_saved_is_what_the_layers_take_less():
    # by hand: 4 layers of 16 ms for one of 22 and three of 0.6 * 20
    assert Times(16.0, 22.0, 20.0).saved(3, 0.6) == pytest.approx(4 * 16.0 - (22.0 + 3 * 12.0))


@pytest.mark.parametrize("file", sorted(path.name for path in RESULTS.glob("prefill_attention_*.json")))
def test_saved_agrees_with_the_measured_number_of_followers_from_which_on_weighing_pays(file):
    result = json.loads((RESULTS / file).read_text())
    for row in result["lengths"]:
        ms = {name: entry["median_ms"] for name, entry in row["contenders"].items() if "median_ms" in entry}
        share, pays = result["kept"], row["followers_to_pay"]
        if pays is None:
            continue
        weighing = ms["leader, weighing"] + ms["selection"]
        times = Times(min(ms["cudnn"], ms["flash"]), weighing, ms[f"recomputing {share}"] / share)
        assert times.saved(pays - 1, share) <= 0 < times.saved(pays, share)
        # What the docstring says of shares.
        within = 0.15 if result["head_dim"] == 64 else 0.1
        assert ms[f"recomputing {share}"] / ms["recomputing"] == pytest.approx(share, abs=within)


def test_what_counts_is_a_run_under_load(monkeypatch):
    now, seconds = [0.0], iter([9.0, 0.02, *[0.02] * 5, *[0.03] * 5])  # compiling, one run, until it is slower, slower

    def run():
        now[0] += next(seconds)

    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])
    assert timing._milliseconds(run, torch.device("cpu")) == pytest.approx(30.0)
    assert next(seconds, None) is None


def test_a_size_is_timed_once(trials):
    for _ in range(2):
        lead(trials, Leader(0.5))
    assert len(trials.timed) == 1
    lead(trials, Leader(0.5), size="64k")
    assert len(trials.timed) == 2


def test_followers_get_s_where_they_are_faster_by_it(trials):
    assert lead(trials, Leader(0.79))[1].share == 0.79
    assert lead(trials, Leader(0.81))[1] is None


def test_a_leader_that_had_to_keep_too_much_is_not_weighed_again(trials):
    leader = Leader(0.5, 0.75, 0.5)  # 3 followers make up for 6 ms up to a share of 0.7
    assert lead(trials, leader) is not None
    assert lead(trials, leader)[1] is not None  # weighed already, they gain
    assert lead(trials, leader) is None
    assert leader.weighed == 2


def test_each_leader_and_size_has_its_own_share(trials):
    leader = Leader(0.9, 0.5)
    lead(trials, leader)
    assert lead(trials, Leader(0.5)) is not None
    assert lead(trials, leader, size="64k") is not None


def test_the_number_of_followers_decides(trials):
    leader = Leader(0.75, 0.5)
    lead(trials, leader, followers=6)
    assert lead(trials, leader, followers=6) is None
    assert lead(trials, leader, followers=7) is not None


def test_followers_that_could_not_save_enough_are_not_tried(monkeypatch):
    monkeypatch.setattr(timing, "measure", lambda *contenders: Times(16.0, 33.0, 20.0))
    leader = Leader()
    assert lead(Trials(), leader, followers=1) is None
    assert leader.weighed == 0


def test_a_leader_that_is_gone_leaves_nothing(trials):
    lead(trials, Leader(0.5))
    assert not trials._shares


def size(batch=1, queries=1024, visible=20000, heads=4, dtype=torch.float16, skip_mass=0.01):
    query = torch.empty(batch, heads, queries, 64, device="meta", dtype=dtype)
    return size_of(query, query[:, :2], visible, skip_mass)


def test_sizes_are_powers_of_two():
    assert size() == size(queries=2000, visible=32767)
    assert len({size(), size(visible=40000), size(queries=2048), size(batch=2)}) == 3


def test_what_else_a_time_depends_on():
    others = [size(heads=8), size(dtype=torch.bfloat16), size(skip_mass=0.02)]
    with sdpa_kernel(SDPBackend.MATH):
        others.append(size())
    assert len({size(), *others}) == 5
