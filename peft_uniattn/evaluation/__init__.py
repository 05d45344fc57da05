"""Accuracy of base models, adapters and standalone models, measured with lm-eval."""

from .contamination import Contamination, check_contamination, find_contamination
from .evaluate import evaluate, load_for_evaluation, write_results
from .tasks import CLOZE_TASKS, PAPER_TASKS, check_has_accuracy, task_questions, task_specs

__all__ = [
    "CLOZE_TASKS",
    "PAPER_TASKS",
    "Contamination",
    "check_contamination",
    "check_has_accuracy",
    "evaluate",
    "find_contamination",
    "load_for_evaluation",
    "task_questions",
    "task_specs",
    "write_results",
]
