"""From the rows of known data sets to one kind of example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]

QUESTION_COLUMNS = ("prompt", "instruction", "question", "input")
ANSWER_COLUMNS = ("completion", "output", "response", "answer")
ACCEPTED_COLUMNS = (
    f"'messages' (role and content), or one of {QUESTION_COLUMNS} with one of {ANSWER_COLUMNS}, or those of "
    "CommonsenseQA, SIQA, MedQA or PubMedQA"
)
NOT_ONE_ROUND = "not one question with one answer"


class Example(NamedTuple):
    """
    A question and its answer.

    Attributes:
        instruction: what to do; empty if the data has no instruction beside the question.
        input: the question, or what the instruction is about.
        output: the answer.
        history: messages before the question.
    """

    instruction: str
    input: str
    output: str
    history: tuple[dict[str, str], ...] = ()

    @property
    def prompt_messages(self) -> list[dict[str, str]]:
        question = "\n\n".join(part for part in (self.instruction, self.input) if part)
        return [*self.history, {"role": "user", "content": question}]

    @property
    def completion_messages(self) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": self.output}]


class BadRow(Exception):
    """A row that cannot be used because something is wrong with it; the message says what."""


class SkippedRow(Exception):
    """A row that the user asked to leave out; the message says why."""


def converter(dataset_format: str, columns: Sequence[str], *, list_choices: bool = False) -> Callable[[Row], Example]:
    """
    The function that makes a row into an `Example`, or raises `BadRow` or `SkippedRow`.

    Args:
        dataset_format: one of `DataArguments.dataset_format`.
        columns: the names of the columns, by which "auto" decides.
        list_choices: list the choices of multiple-choice questions below the question.

    Raises:
        ValueError: if the columns are not those of the format.
    """
    found = _detect(columns) if dataset_format == "auto" else dataset_format
    if found is None or not _has_columns(found, columns):
        raise ValueError(
            f"dataset_format={dataset_format!r} does not fit the columns {list(columns)}; accepted are "
            f"{ACCEPTED_COLUMNS}"
        )
    read = _reader(found, columns, list_choices)

    def convert(row: Row) -> Example:
        try:
            return read(row)
        except KeyError as error:
            raise BadRow(f"missing {error.args[0]!r}") from error
        except (TypeError, ValueError) as error:  # a text where a list should be, choices without a label
            raise BadRow(f"does not have the shape of dataset_format={found!r}") from error

    return convert


def _reader(dataset_format: str, columns: Sequence[str], list_choices: bool) -> Callable[[Row], Example]:
    """As [`converter`], for rows that have the shape of their format."""
    if dataset_format == "instruction":
        question, answer = _first(QUESTION_COLUMNS, columns), _first(ANSWER_COLUMNS, columns)
        return lambda row: _instruction(row, question, answer)
    if dataset_format == "messages":
        return lambda row: dialogue(_required(row, "messages"))
    if dataset_format == "tulu3":
        return lambda row: _one_round(_required(row, "messages"))
    read_choices = {"commonsenseqa": _commonsenseqa, "siqa": _siqa, "medqa": _medqa, "pubmedqa": _pubmedqa}
    return lambda row: _multiple_choice(*read_choices[dataset_format](row), list_choices=list_choices)


def dialogue(messages: Iterable[Row]) -> Example:
    """The last answer of the assistant is the answer, the message before it the question."""
    turns = [{"role": turn["role"], "content": _text(turn["content"], "content")} for turn in messages]
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if not turns:
        raise BadRow("no answer of the assistant")
    *history, answer = turns
    history = [turn for turn in history if turn["content"]]
    if not history or history[-1]["role"] != "user":
        raise BadRow("empty question")
    *history, question = history
    return _checked(Example("", question["content"], answer["content"], tuple(history)))


def _instruction(row: Row, question: str, answer: str) -> Example:
    asked, answered = _required(row, question), _required(row, answer)
    if isinstance(asked, list):  # TRL's conversational prompt and completion
        return dialogue([*asked, *answered])
    if question == "instruction":
        return _checked(Example(_text(asked, question), _text(row.get("input"), "input"), _text(answered, answer)))
    return _checked(Example("", _text(asked, question), _text(answered, answer)))


def _one_round(messages: Sequence[Row]) -> Example:
    """The paper's filter of the Tulu 3 mixture: one question, not empty, with one answer."""
    if [turn["role"] for turn in messages] != ["user", "assistant"]:
        raise SkippedRow(NOT_ONE_ROUND)
    if not _text(messages[0]["content"], "content"):
        raise SkippedRow("empty question")
    return dialogue(messages)


def _multiple_choice(question: str, choices: Sequence[str], answer: str, *, list_choices: bool) -> Example:
    if list_choices:
        question = "\n".join([question, *(f"- {choice}" for choice in choices)])
    return _checked(Example("", question, answer))


def _commonsenseqa(row: Row) -> tuple[str, list[str], str]:
    """The original file nests stem and choices in `question`; on the Hub they are columns."""
    question = _required(row, "question")
    if isinstance(question, Mapping):
        stem, choices = question["stem"], [(choice["label"], choice["text"]) for choice in question["choices"]]
    else:
        stem, choices = question, zip(row["choices"]["label"], row["choices"]["text"], strict=True)
    choices = {label: _text(text, "choices") for label, text in choices}
    return _text(stem, "question"), list(choices.values()), _chosen(choices, _required(row, "answerKey"))


def _siqa(row: Row) -> tuple[str, list[str], str]:
    """`correct` is a letter in the original files; `label` counts from 1."""
    choices = {letter: _text(_required(row, f"answer{letter}"), f"answer{letter}") for letter in "ABC"}
    correct = row.get("correct") or _required(row, "label")
    letter = {"1": "A", "2": "B", "3": "C"}.get(str(correct).strip(), correct)
    question = f"{_text(row.get('context'), 'context')} {_text(_required(row, 'question'), 'question')}"
    return question.strip(), list(choices.values()), _chosen(choices, letter)


def _medqa(row: Row) -> tuple[str, list[str], str]:
    """The options are an object from letters to texts, or a list of texts that begin with their letter."""
    options = _required(row, "options")
    if isinstance(options, Mapping):
        texts = [_text(text, "options") for text in options.values()]
    else:
        texts = [_text(text, "options").split(". ", 1)[-1] for text in options]
    answer = _text(_required(row, "answer"), "answer")
    if answer not in texts:
        raise BadRow("the answer is none of the choices")
    return _text(_required(row, "question"), "question"), [text for text in texts if text], answer


def _pubmedqa(row: Row) -> tuple[str, list[str], str]:
    """The original file has its names in capitals; the Hub's nests the passages in `context`."""
    if "QUESTION" in row:
        question, passages = _required(row, "QUESTION"), _required(row, "CONTEXTS")
    else:
        question, passages = _required(row, "question"), _required(row, "context")["contexts"]
    choices = {name: name for name in ("yes", "no", "maybe")}
    passages = [passages] if isinstance(passages, str) else passages
    abstract = "\n".join(_text(passage, "contexts") for passage in passages)
    return (
        f"{abstract}\n\n{_text(question, 'question')}",
        list(choices),
        _chosen(choices, _required(row, "final_decision")),
    )


COLUMNS = {
    "commonsenseqa": [{"question", "answerKey"}],
    "siqa": [{"question", "answerA", "answerB", "answerC", "correct"}, {"question", "answerA", "answerB", "label"}],
    "medqa": [{"question", "options", "answer"}],
    "pubmedqa": [{"QUESTION", "CONTEXTS", "final_decision"}, {"question", "context", "final_decision"}],
    "messages": [{"messages"}],
    "tulu3": [{"messages"}],
}


def _detect(columns: Sequence[str]) -> str | None:
    if "messages" in columns and not {"prompt", "completion"} <= set(columns):
        return "messages"
    names = ("commonsenseqa", "siqa", "medqa", "pubmedqa", "instruction")
    return next((name for name in names if _has_columns(name, columns)), None)


def _has_columns(name: str, columns: Sequence[str]) -> bool:
    if name == "instruction":
        return bool(_first(QUESTION_COLUMNS, columns) and _first(ANSWER_COLUMNS, columns))
    return any(needed <= set(columns) for needed in COLUMNS[name])


def _first(names: Sequence[str], columns: Sequence[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _required(row: Row, name: str) -> Any:
    if row.get(name) is None:
        raise BadRow(f"missing {name!r}")
    return row[name]


def _chosen(choices: Mapping[str, str], label: str) -> str:
    if label not in choices:
        raise BadRow("the answer is none of the choices")
    return choices[label]


def _checked(example: Example) -> Example:
    if not example.instruction and not example.input:
        raise BadRow("empty question")
    if not example.output:
        raise BadRow("empty answer")
    return example


def _text(value: object, name: str) -> str:
    """The text of the field `name` as it stands, that of a message in parts joined; blank ones are empty."""
    if isinstance(value, list) and value and all(map(_is_text_part, value)):
        value = "".join(part["text"] for part in value)
    if isinstance(value, list | Mapping):
        raise BadRow(f"{name!r} is no text but {'a list' if isinstance(value, list) else 'an object'}")
    text = "" if value is None else str(value)
    return text if text.strip() else ""


def _is_text_part(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
