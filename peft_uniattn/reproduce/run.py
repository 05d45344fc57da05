"""All rows of some tables with several seeds, one file each, so that an interrupted call goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..training.arguments import Arguments, parse_arguments
from ..training.journal import check_writable, write_atomically
from .cell import CellResult, Evaluation, flags_of, is_done, result_file, run_cells, steps_of, training_of
from .findings import GROUPINGS, find
from .matrix import NAMED_BY_FINDINGS, STAGE1_SHARE, TABLES, UNFOUND, Cell, Findings, cells
from .plot import plot, plot_curves, plot_sweeps, sweeps
from .record import write_record
from .same import check_same
from .side_by_side import side_by_side
from .table import notes, table
from .ttft import Prompts, measure_ttft


@dataclass(frozen=True)
class Reproduction:
    """
    Args:
        directory: where results, table and plot go. What is there already is not run again, and refused if it was made
            with other settings.
        argv: arguments of the training recipe that all rows share, `--max_steps` among them.
        tables: names of [`TABLES`].
        seeds: of every row.
        evaluation: what every row is asked.
        stage1_share: share of the steps for stage 1, in rows that have one; 0 leaves it out of all but the row that
            asks what it brings.
        grouping: "fixed", "error" or "loss", see `find`.
        grouping_model: see `find`.
        jobs: rows at a time, each in a process of its own; on several GPUs they take turns.
        keep_models: leave adapters and models in the directory.
        prompts: what times to the first token are measured on, when all rows are done.
        command: what was called, for the record.
        model: honest name of the base, for the record; default what the arguments name.
        rows: names of the only rows to run; empty for all of the tables.

    Raises:
        ValueError: for unknown tables, no seeds, or shares and jobs out of range.
    """

    directory: Path
    argv: tuple[str, ...]
    tables: tuple[str, ...]
    seeds: tuple[int, ...]
    evaluation: Evaluation
    stage1_share: float = STAGE1_SHARE
    grouping: str = "fixed"
    grouping_model: str | None = None
    jobs: int = 1
    keep_models: bool = False
    prompts: Prompts = field(default_factory=Prompts)
    command: str = "peft-uniattn reproduce"
    model: str | None = None
    rows: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = [name for name in self.tables if name not in TABLES]
        if unknown or not self.tables:
            raise ValueError(f"tables={list(self.tables)} must be some of {', '.join(TABLES)}")
        if not self.seeds:
            raise ValueError("seeds is empty; give one or more")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} names one twice, which would count twice; give each once")
        if not 0 <= self.stage1_share < 1:
            raise ValueError(f"stage1_share={self.stage1_share} must lie between 0 and 1")
        if self.grouping not in GROUPINGS:
            raise ValueError(f"grouping={self.grouping!r} must be one of {', '.join(GROUPINGS)}")
        if self.grouping_model is not None and self.grouping == "fixed":
            raise ValueError(
                f"grouping_model={self.grouping_model!r} has no use with grouping='fixed'; choose 'error' or 'loss', "
                "or leave it out"
            )
        if self.jobs < 1:
            raise ValueError(f"jobs={self.jobs} must be 1 or more")

    def run(self) -> list[CellResult]:
        """
        Run what has not been run yet; write `results.json`, `table.md`, `accuracy.svg` and `curves.svg`.

        Raises:
            ValueError: if training data hold evaluation questions, the tables have not all of `rows`, or arguments do
                not fit each other or the model.
        """
        shared = parse_arguments([*self.argv, "--output_dir", str(self.directory)])
        self._check_before(shared)
        found = find(
            shared,
            self.directory / "findings.json",
            tables=self.tables,
            evaluation=self.evaluation,
            seeds=self.seeds,
            grouping=self.grouping,
            grouping_model=self.grouping_model,
        )
        rows = self._chosen(found)
        alike: dict[Any, list[Cell]] = {}
        for row in rows:
            alike.setdefault(training_of(row, shared, self.stage1_share), []).append(row)
        # One seed of all rows before the next, so that an early stop leaves a whole table. Untrained rows have one.
        work = [
            (tuple(group), seed)
            for seed in self.seeds
            for group in alike.values()
            if group[0].stages or seed == self.seeds[0]
        ]
        self._check(work, shared)
        model = self.model or str(shared.model.model_name_or_path)
        results: dict[tuple[str, int], CellResult] = {}
        with tqdm(total=sum(len(group) for group, _ in work), desc="reproducing", unit="row") as bar:
            for group in self._results(work):
                for result in group:
                    results[result.cell, result.seed] = result
                    bar.set_postfix_str(f"{result.cell} {result.mean_accuracy:.1f} %")
                    bar.update()
                # After each, so that what a stopped run has finished stands in one file too.
                ordered = [
                    results[row.name, seed] for seed in self.seeds for row in rows if (row.name, seed) in results
                ]
                self._write(ordered, found, model)
        ordered = self._timed(ordered, rows, shared)
        self._write(ordered, found, model)
        plot(ordered, self.directory / "accuracy.svg", caption=self._caption(ordered))
        plot_curves(ordered, self.directory / "curves.svg", caption=self._caption(ordered))
        if sweeps(ordered):
            plot_sweeps(ordered, self.directory / "sweeps.svg", caption=self._caption(ordered))
        return ordered

    def _check_before(self, shared: Arguments) -> None:
        """Raise an error for whatever can be told to be wrong before anything is measured."""
        import matplotlib  # noqa: F401, which draws the results when all rows are done

        check_writable(self.directory)
        if shared.recipe.compare_with_base:
            raise ValueError(
                "compare_with_base=True would train the base beside every row; leave it out, post-train is that row"
            )
        if shared.recipe.adapter is not None:
            raise ValueError(
                f"adapter={shared.recipe.adapter!r} would give some rows a start that others have not; leave it out"
            )
        named_later = any(name in NAMED_BY_FINDINGS for name in self.tables)
        for cell in self._chosen(UNFOUND, allow_unknown=named_later):
            steps = steps_of(cell, shared, self.stage1_share)
            parse_arguments([*self.argv, *flags_of(cell, steps), "--output_dir", str(self.directory)])
            if "stage1" in steps and shared.recipe.stage1_early_stop != "none":
                raise ValueError(
                    f"stage1_early_stop={shared.recipe.stage1_early_stop!r} would leave {cell.name!r} with fewer "
                    "steps than other rows; add --stage1_early_stop none, or --stage1-share 0"
                )

    def _chosen(self, found: Findings, *, allow_unknown: bool = False) -> list[Cell]:
        """The rows of all tables, each once, or those that are asked for."""
        rows = {cell.name: cell for name in self.tables for cell in cells(name, found)}
        unknown = [name for name in self.rows if name not in rows]
        if unknown and not allow_unknown:
            raise ValueError(f"rows={list(self.rows)}: {unknown[0]!r} must be one of {', '.join(rows)}")
        return [cell for cell in rows.values() if not self.rows or cell.name in self.rows]

    def _check(self, work: Sequence[tuple[tuple[Cell, ...], int]], shared: Arguments) -> None:
        """Raise ValueError for a row that the arguments do not fit, or that is there with other settings."""
        for group, seed in work:
            for cell in group:
                told = flags_of(cell, steps_of(cell, shared, self.stage1_share))
                flags = [*self.argv, *told, "--seed", str(seed)]
                parse_arguments([*flags, "--output_dir", str(self.directory)])
                if (path := result_file(self.directory, cell.name, seed)).exists():
                    check_same(path, flags, self.evaluation)

    def _write(self, results: Sequence[CellResult], found: Findings, model: str) -> None:
        write_record(self.directory / "results.json", results, model=model, command=self.command, findings=found)
        write_atomically(self.directory / "table.md", f"{table(results)}\n\n{notes(results)}\n")

    def _results(self, work: Sequence[tuple[tuple[Cell, ...], int]]) -> Iterator[list[CellResult]]:
        run = partial(
            _run_cells,
            directory=self.directory,
            argv=self.argv,
            evaluation=self.evaluation,
            stage1_share=self.stage1_share,
            keep_models=self.keep_models,
        )
        done = [(group, seed) for group, seed in work if is_done(self.directory, group, seed)]
        left = [one for one in work if one not in done]
        yield from (run(group, seed) for group, seed in done)  # which reads them
        if self.jobs == 1:
            yield from (run(group, seed) for group, seed in left)
            return
        yield from side_by_side(left, run, self.jobs)

    def _timed(self, results: Sequence[CellResult], rows: Sequence[Cell], shared: Arguments) -> list[CellResult]:
        """Add the times to the first token to results without them, now that nothing else runs; also on disk."""
        conditions = self.prompts.conditions(shared)
        untimed = {result.cell for result in results if result.ttft_conditions != conditions}
        if not conditions["tokens"] or not untimed:
            return list(results)
        times = measure_ttft(
            [row for row in rows if row.name in untimed], self.argv, shared, self.stage1_share, conditions
        )
        timed = [replace(result, **times.get(result.cell, {})) for result in results]
        for result in timed:
            result.write(result_file(self.directory, result.cell, result.seed))
        return timed

    def _caption(self, results: Sequence[CellResult]) -> str:
        trained = next((result for result in results if result.steps), results[0])
        return (
            f"{sum(trained.steps.values())} steps each, {len(self.seeds)} seeds (bars: standard deviation), "
            f"{trained.environment['device']}, torch {trained.environment['torch']}"
        )


def _run_cells(group: tuple[Cell, ...], seed: int, **options: object) -> list[CellResult]:
    return run_cells(group, seed, **options)
