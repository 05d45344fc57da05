"""What the user may say about the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

DatasetFormat = Literal["auto", "instruction", "messages", "tulu3", "commonsenseqa", "siqa", "medqa", "pubmedqa"]
PromptStyle = Literal["paper", "chat"]


@dataclass
class DataArguments:
    """
    Which examples to train on, and what they look like to the model. The names are TRL's where TRL has the argument.

    Raises:
        ValueError: if an argument is out of range, or two of them contradict each other.
    """

    dataset_name: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names on the Hub or local files (.json, .jsonl, .csv, also with .gz; .parquet; SIQA's .zip). "
            "Several are mixed."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set of the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on. Where there is none, rows are held out: test_size."}
    )
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read rows as they are needed; training then needs max_steps."}
    )
    dataset_format: DatasetFormat = field(
        default="auto",
        metadata={
            "help": "What the rows hold. 'auto' goes by their columns; 'instruction': a question and an answer, such "
            "as PMC-LLaMA's instruction, input, output; 'messages': dialogues; 'tulu3': dialogues, of which only one "
            "question with one answer is taken, as in the paper; or a multiple-choice set."
        },
    )
    prompt_style: PromptStyle = field(
        default="paper",
        metadata={"help": "'paper': the prompt of the paper's Appendix A; 'chat': the tokenizer's chat template."},
    )
    list_choices: bool = field(
        default=False, metadata={"help": "Multiple-choice sets: list the choices below the question."}
    )
    exclude_ids: str | None = field(
        default=None,
        metadata={
            "help": "JSON file with ids (a list, or an object's keys) of rows never to train on, such as PubMedQA's "
            "test_ground_truth.json. Of several data sets, those without ids are taken whole."
        },
    )
    max_rows: int | None = field(
        default=None,
        metadata={"help": "Read at most so many rows of each data set, chosen at random (of a stream the first)."},
    )
    test_size: float = field(
        default=0.01,
        metadata={
            "help": "Examples to hold out where there is no test split: a share below 1, or a number; 0 for none. A "
            "test split is cut to the number."
        },
    )
    max_bad_rows: float = field(
        default=0.05,
        metadata={"help": "Stop if more rows than this are unusable: a share below 1, or a number; 0 allows none."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.dataset_name, str):  # a YAML file may give one name
            self.dataset_name = [self.dataset_name]
        for name in ("test_size", "max_bad_rows"):
            _check_share_or_number(name, getattr(self, name))
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows={self.max_rows} leaves nothing to train on; use 1 or more, or leave it out")
        if not self.dataset_streaming:
            return
        if self.dataset_name and len(self.dataset_name) > 1:
            raise ValueError(
                f"dataset_streaming reads one data set, but dataset_name={self.dataset_name} names "
                f"{len(self.dataset_name)}; leave dataset_streaming out, or write them into one file"
            )
        if 0 < self.test_size < 1:
            raise ValueError(
                f"test_size={self.test_size} is a share, but a stream has no length; give a number of rows, such as "
                "test_size=500, or 0"
            )


def _check_share_or_number(name: str, value: float) -> None:
    if not (0 <= value < 1 or value == int(value) >= 1):
        raise ValueError(f"{name}={value} must be a share from 0 up to 1, or a whole number of rows")
