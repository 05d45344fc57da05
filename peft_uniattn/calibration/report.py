"""What calibration found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class FollowerError:
    """
    Error of one follower on the calibration data, relative to the norm of the original attention output.

    The error is the paper's ε (equation 13): the difference of the residual streams after attention, with the layers
    below already compensated. Where a norm follows the attention output (Gemma-2 and 3, OLMo-2), it is the difference
    of the attention outputs alone; where the compensation adds to the output of the FFN, that after the whole layer.

    Attributes:
        layer: layer index.
        leader: layer index of its leader.
        before: ‖ε‖ without this follower's compensation.
        after: ‖ε − Norm(x)·W_c‖.
    """

    layer: int
    leader: int
    before: float
    after: float


@dataclass(frozen=True)
class CalibrationReport:
    """
    Attributes:
        method: "pseudoinverse" or "ridge".
        ridge: the ridge's strength; None for the pseudoinverse.
        rank: rank of the compensation; None if full.
        batches: how many batches were used.
        tokens: how many tokens, padding left out.
        seconds: wall time.
        followers: errors, bottom to top.
    """

    method: str
    ridge: float | None
    rank: int | None
    batches: int
    tokens: int
    seconds: float
    followers: list[FollowerError]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        rank = "full" if self.rank is None else f"rank {self.rank}"
        data = f"{self.tokens:,} tokens in {self.batches} batches"
        lines = [
            f"Calibration: {self.method}, {rank}, {data}, {self.seconds:.0f} s",
            "  layer  leader  error before  error after  left",
        ]
        for error in self.followers:
            left = error.after / error.before if error.before else 0.0
            lines.append(
                f"  {error.layer:5d}  {error.leader:6d}  {error.before:12.3f}  {error.after:11.3f}  {left:4.0%}"
            )
        lines.append("  (error of the residual stream after attention, relative to the original attention output)")
        return "\n".join(lines)
