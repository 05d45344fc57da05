"""How many tokens an evicting cache keeps, and how many of them for being recent."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """
    What each key/value head may keep.

    Args:
        budget: a share of the tokens seen (a float above 0, up to 1), or a number of tokens (an int from 1 up).
        recent: how much of it goes to the newest tokens: a share of the budget (a float from 0 to 1), or a number of
            tokens. The newest token always stays.
        grows: whether the tokens seen include generated ones; if not, a share is taken of the first forward's tokens.

    Raises:
        ValueError: names the argument, the value and the way out.
    """

    budget: int | float
    recent: int | float = 0.5
    grows: bool = True

    def __post_init__(self):
        if not _is_number(self.budget) or not 0 < self.budget <= _highest(self.budget):
            raise ValueError(
                f"budget={self.budget!r} must be a share of the tokens (a float above 0, up to 1.0, which keeps all) "
                "or a number of tokens (an int from 1 up)"
            )
        if not _is_number(self.recent) or not 0 <= self.recent <= _highest(self.recent):
            raise ValueError(
                f"recent={self.recent!r} must be a share of the budget (a float from 0.0 to 1.0) or a number of "
                "tokens (an int from 0 up)"
            )
        if isinstance(self.budget, int) and isinstance(self.recent, int) and self.recent > self.budget:
            raise ValueError(
                f"recent={self.recent} is more than budget={self.budget} tokens; use a smaller recent, or a share "
                "such as 0.5"
            )

    def capacity(self, seen: int) -> int:
        """How many of `seen` tokens are kept; a share is rounded to the nearest number of tokens, at least 1."""
        if isinstance(self.budget, int):
            return min(self.budget, seen)
        return max(1, round(self.budget * seen))

    def recent_of(self, capacity: int) -> int:
        """How many of `capacity` tokens are kept for being the newest, at least 1."""
        recent = self.recent if isinstance(self.recent, int) else round(self.recent * capacity)
        return max(1, min(recent, capacity))


def _highest(value: int | float) -> float:
    return 1.0 if isinstance(value, float) else float("inf")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
