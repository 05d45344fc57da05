"""Which rows each of the paper's tables has, as arguments of the training recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ..compensation import DESIGNS, NONE
from ..plan import Plan
from ..rivals import choose_layers_to_drop, num_layers_to_drop
from ..training.arguments import STAGES

# Superblock sizes whose number of followers divides 12 (Figure 4, right).
SIZES = (2, 3, 4, 5, 7, 13)
# Per cent of the tokens that H2O evicts (Table 3).
EVICTED = (20, 40, 60)
# Share of the steps for stage 1.
STAGE1_SHARE = 0.05


@dataclass(frozen=True)
class Cell:
    """
    One row of a table, trained once per seed.

    Attributes:
        name: what the row is called, and its folder.
        flags: what `peft-uniattn train` is told beyond what all rows share.
        stages: what of the recipe is run. ("none",) fine-tunes the unmodified base, () trains nothing at all.
        stage1_share: share of the steps for stage 1 where the run leaves it out of all other rows; None: none.
        h2o_budget: share of the tokens that H2O keeps in the cache when the row is evaluated; None keeps all.
    """

    name: str
    flags: tuple[str, ...] = ()
    stages: tuple[str, ...] = ("stage2",)
    stage1_share: float | None = None
    h2o_budget: float | None = None


@dataclass(frozen=True)
class Findings:
    """
    What the rows depend on, found on the model and its training data before any row is run.

    Attributes:
        plan: the Superblocks of UniAttn, and those on which CLA-Full works.
        half: Superblocks with half of the followers: CLA takes keys and values from them, and so saves as much.
        similarity: cosine similarity of the input and output of every layer's attention, bottom to top.
        by_error: for numbers of followers, the Superblocks of least calibration error.
        by_similarity: for numbers of followers, the Superblocks of most similar softmax activations.
        given: the Superblocks that the arguments mean, where `plan` has been chosen in their place; else None.
    """

    plan: Plan
    half: Plan
    similarity: Sequence[float]
    by_error: dict[int, list[list[int]]] = field(default_factory=dict)
    by_similarity: dict[int, list[list[int]]] = field(default_factory=dict)
    given: Plan | None = None

    @property
    def fixed(self) -> Plan:
        """The Superblocks that the arguments mean."""
        return self.given or self.plan


def cells(table: str, found: Findings) -> list[Cell]:
    """
    The rows of a table.

    Args:
        table: of [`TABLES`].
        found: see [`Findings`].

    Raises:
        ValueError: for an unknown table.
    """
    if table not in TABLES:
        raise ValueError(f"table {table!r} is not known; use one or more of {', '.join(TABLES)}")
    return TABLES[table](found)


def uniattn(name: str, superblocks: Sequence[Sequence[int]], *flags: str) -> Cell:
    """Calibration, stage 1 and stage 2 with these Superblocks."""
    return Cell(name, ("--superblocks", _as_text(superblocks), *flags), STAGES)


POST_TRAIN = Cell("post-train", ("--compare_with_base", "true"), ("none",))


def _main(found: Findings) -> list[Cell]:
    """Table 1: the rivals at the same saving (half) and on as many layers (full), UniAttn on both."""
    plan = found.plan
    return [
        Cell("pre-trained", stages=()),
        POST_TRAIN,
        *(
            Cell(
                f"llmdrop-{name}",
                ("--method", "llmdrop", "--superblocks", "", "--dropped_layers", _dropped(found, half=half)),
            )
            for name, half in (("half", True), ("full", False))
        ),
        *(
            Cell(f"cla-{name}", ("--method", "cla", "--superblocks", _as_text(blocks)))
            for name, blocks in (("half", found.half.superblocks), ("full", plan.superblocks))
        ),
        uniattn("uniattn-half", found.half.superblocks),
        uniattn("uniattn", plan.superblocks),
    ]


def _ablation(found: Findings) -> list[Cell]:
    """Table 2: what compensation, its initialisation and stage 1 bring."""
    plan = ("--superblocks", _as_text(found.plan.superblocks))
    return [
        POST_TRAIN,
        Cell("no-compensation", (*plan, "--compensation", NONE)),
        Cell("zero-init", (*plan, "--zero_init", "true")),
        Cell("calibrated", plan, ("calibrate", "stage2")),
        # What stage 1 brings is asked here also where the other rows go without it.
        Cell("two-stage", plan, STAGES, stage1_share=STAGE1_SHARE),
    ]


def _h2o(found: Findings) -> list[Cell]:
    """Table 3: H2O on top of plain post-training and of UniAttn; each model is trained once."""
    trained = [POST_TRAIN, uniattn("uniattn", found.plan.superblocks)]
    return [
        replace(row, name=f"{row.name}+h2o-{evicted}", h2o_budget=(100 - evicted) / 100) if evicted else row
        for row in trained
        for evicted in (0, *EVICTED)
    ]


def _designs(found: Findings) -> list[Cell]:
    """Table 8: where the compensation reads and adds."""
    return [uniattn(f"design-{name}", found.plan.superblocks, "--compensation", name) for name in DESIGNS]


def _grouping(found: Findings) -> list[Cell]:
    """Table 9: fixed Superblocks from the top down, grouped by similarity, and chosen by calibration error."""
    rows = []
    blocks = found.fixed.superblocks
    for count in range(1, len(blocks) + 1):
        kept = blocks[len(blocks) - count :]
        followers = sum(len(block) - 1 for block in kept)
        rows.append(uniattn(f"fixed-{followers}", kept))
        if followers in found.by_similarity:
            rows.append(uniattn(f"similarity-{followers}", found.by_similarity[followers]))
        if followers in found.by_error:
            rows.append(uniattn(f"error-{followers}", found.by_error[followers]))
    return rows


def _number(found: Findings) -> list[Cell]:
    """Figure 4, left: the number of Superblocks, from the top down to the bottom of the model."""
    size = len(found.fixed.superblocks[-1])
    top = found.fixed.superblocks[-1][-1] + 1
    starts = range(top - size, -1, -size)
    return [
        uniattn(f"number-{count}", [range(first, first + size) for first in starts[:count]][::-1])
        for count in range(1, len(starts) + 1)
    ]


def _size(found: Findings) -> list[Cell]:
    """Figure 4, right: the size of Superblocks at (about) the same number of followers, up to the top."""
    followers, top = len(found.fixed.followers), found.fixed.superblocks[-1][-1] + 1
    rows = []
    for size in SIZES:
        count = followers // (size - 1)
        if count and count * size <= top:
            firsts = range(top - count * size, top, size)
            rows.append(uniattn(f"size-{size}", [range(first, first + size) for first in firsts]))
    return rows


TABLES: dict[str, Callable[[Findings], list[Cell]]] = {
    "main": _main,
    "ablation": _ablation,
    "h2o": _h2o,
    "designs": _designs,
    "grouping": _grouping,
    "number": _number,
    "size": _size,
}


# Tables whose rows are named by findings; how the others' rows are called and trained can be told without a model, by
# findings of none.
NAMED_BY_FINDINGS = ("grouping", "number", "size")
_STAND_IN = Plan(((0, 1, 2, 3),), num_layers=4)
UNFOUND = Findings(_STAND_IN, _STAND_IN, similarity=[0.0] * 4)


def _as_text(superblocks: Sequence[Sequence[int]]) -> str:
    return ",".join(f"{block[0]}-{block[-1]}" for block in superblocks)


def _dropped(found: Findings, *, half: bool) -> str:
    # Within the upper half, as in the paper, also where Superblocks reach further down.
    lowest = max(min(found.plan.leader_of), found.plan.num_layers // 2 - 1)
    number = num_layers_to_drop(found.plan, half=half)
    return ",".join(map(str, choose_layers_to_drop(found.similarity, number, start_layer=lowest)))
