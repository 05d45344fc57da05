"""How many rows were read, and what became of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

NAMED_ROWS = 10
# A stream has no length of which to take a share: until so many rows are read, it counts as this long.
SHORTEST_STREAM = 1000


@dataclass
class DataReport:
    """
    Counts over all data sets and splits that were read. Of a stream: over what has been read so far.

    Attributes:
        rows: rows read.
        kept: examples made of them.
        truncated: of those, cut to the maximum length.
        tokens: all tokens of the examples.
        completion_tokens: tokens that carry loss.
        skipped: rows left out on purpose, by reason.
        bad: unusable rows, by reason.
        bad_rows: the first ten of them by reason and data set, as row numbers from 0.
    """

    rows: int = 0
    kept: int = 0
    truncated: int = 0
    tokens: int = 0
    completion_tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    bad: dict[str, int] = field(default_factory=dict)
    bad_rows: dict[str, dict[str, list[int]]] = field(default_factory=dict)

    def add(self, facts: Iterable[Mapping[str, Any]], source: str) -> None:
        """Count encoded rows (see `encode_rows`) of the data set `source`."""
        for fact in facts:
            self.rows += 1
            if reason := fact["bad"]:
                self.bad[reason] = self.bad.get(reason, 0) + 1
                named = self.bad_rows.setdefault(reason, {}).setdefault(source, [])
                if len(named) < NAMED_ROWS:
                    named.append(fact["row"])
            elif reason := fact["skipped"]:
                self.skipped[reason] = self.skipped.get(reason, 0) + 1
            else:
                self.kept += 1
                self.truncated += fact["truncated"]
                self.tokens += fact["tokens"]
                self.completion_tokens += fact["completion_tokens"]

    def check(self, max_bad_rows: float, *, so_far: bool = False) -> None:
        """
        Raise ValueError if more rows are bad than `max_bad_rows`, a share below 1 or a number.

        Args:
            max_bad_rows: see `DataArguments`.
            so_far: more rows are to come.
        """
        rows = max(self.rows, SHORTEST_STREAM) if so_far else self.rows
        allowed = max_bad_rows * rows if max_bad_rows < 1 else max_bad_rows
        if (bad := sum(self.bad.values())) > allowed:
            raise ValueError(
                f"{bad} of {self.rows} rows are unusable, and max_bad_rows={max_bad_rows:g} allows "
                f"{int(allowed)}: {self._named()}; repair the data, or raise max_bad_rows"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        text = f"{self.rows} rows, {self.kept} kept, {self.truncated} of them truncated"
        for reason, count in self.skipped.items():
            text += f"; {count} skipped: {reason}"
        return f"{text}; bad: {self._named()}" if self.bad else text

    def _named(self) -> str:
        return "; ".join(f"{count} × {reason} ({self._rows(reason)})" for reason, count in self.bad.items())

    def _rows(self, reason: str) -> str:
        named = self.bad_rows[reason]
        more = ", …" if self.bad[reason] > sum(map(len, named.values())) else ""
        return ", ".join(f"{source} row {', '.join(map(str, rows))}" for source, rows in named.items()) + more
