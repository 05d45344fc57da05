"""
Accuracy of a base model and of what was made of it, on the same questions, by lm-eval.

    python examples/evaluate.py BASE ADAPTER_OR_MODEL --tasks social_iqa_cloze,commonsense_qa_cloze --limit 200

With --data-dir the questions come from the files that their authors publish, else from the Hub. The command
`peft-uniattn eval` does the same for one model.
"""

from pathlib import Path
from typing import Annotated

import typer

from peft_uniattn.evaluation import evaluate, load_for_evaluation


def main(
    models: Annotated[list[str], typer.Argument(help="Base models, adapters or standalone models.")],
    tasks: str = "social_iqa_cloze,commonsense_qa_cloze",
    limit: Annotated[int | None, typer.Option(help="Questions of each set. Default: all.")] = None,
    data_dir: Path | None = None,
    batch_size: int = 8,
) -> None:
    """Print one line for each model and set."""
    for path in models:
        model, tokenizer = load_for_evaluation(path)
        results = evaluate(model, tokenizer, tasks.split(","), data_dir=data_dir, batch_size=batch_size, limit=limit)
        for task, scores in results["results"].items():
            # Answers of different lengths are compared by log-likelihood per character where the task has that.
            accuracy = scores.get("acc_norm,none", scores["acc,none"])
            print(f"{path}  {task}  {accuracy:.1%}")


if __name__ == "__main__":
    typer.run(main)
