"""
Self-distillation: the original model as teacher of the unified one. Opt-in, and beyond the paper.

In stage 1 the teacher is the same model with its adapter at rest, so there is no second copy; in stage 2 it is a
frozen model that is handed over, usually the base. Student and teacher each run on their own hidden states.
"""

from .arguments import DistillationArguments
from .trainer import DistillationTrainer

__all__ = ["DistillationArguments", "DistillationTrainer"]
