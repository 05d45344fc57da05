"""What may be said about distillation."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...named import as_flag

STAGES = ("stage1", "stage2")


@dataclass
class DistillationArguments:
    """
    How the unified model learns from the original one; off by default.

    The loss is (1 − alpha)·task + alpha·T²·KL(teacher ‖ student) + attention_weight·error. KL and error are means over
    the tokens that carry task loss; the error is the squared relative error of the residual stream behind attention,
    averaged over the followers.

    Raises:
        ValueError: for weights that are negative or not finite, and for unknown stages.
    """

    distillation_alpha: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the KL divergence from the teacher's predictions, 0 to 1; the task gets the rest."
        },
    )
    distillation_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of both distributions in the KL divergence."}
    )
    distillation_attention_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the error of the followers' residual stream behind attention (equation 13)."},
    )
    distillation_stages: str = field(
        default="stage1",
        metadata={
            "help": "Which stages learn from a teacher: 'stage1' (the model without its adapter), 'stage2' (a frozen "
            "copy of the base, which has to fit beside the model), or 'stage1,stage2'."
        },
    )

    def __post_init__(self) -> None:
        if not 0 <= self.distillation_alpha <= 1:
            raise ValueError(
                f"distillation_alpha={self.distillation_alpha} must be between 0 (off) and 1 (no task loss)"
            )
        if not 0 < self.distillation_temperature < float("inf"):
            raise ValueError(f"distillation_temperature={self.distillation_temperature} must be positive, such as 1")
        if not 0 <= self.distillation_attention_weight < float("inf"):
            raise ValueError(
                f"distillation_attention_weight={self.distillation_attention_weight} must be 0 (off) or positive"
            )
        self.distillation_stages = as_flag(self.distillation_stages)
        names = [name.strip() for name in self.distillation_stages.split(",")]
        if not set(names) <= set(STAGES):
            raise ValueError(
                f"distillation_stages={self.distillation_stages!r} must name {' or '.join(STAGES)}, or both"
            )
        self.distillation_stages = ",".join(name for name in STAGES if name in names)

    @property
    def enabled(self) -> bool:
        """Whether anything is asked of a teacher."""
        return self.distillation_alpha > 0 or self.distillation_attention_weight > 0

    def applies_to(self, stage: str) -> bool:
        """Whether `stage` ("stage1" or "stage2") learns from a teacher."""
        return self.enabled and stage in self.distillation_stages.split(",")
