"""Whether questions of an evaluation set stand in training data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_WORD = re.compile(r"\w+")
# A question of fewer words than this is an ordinary phrase, and only counts where a whole line of the data equals it.
_PHRASE = 8


@dataclass(frozen=True)
class Contamination:
    """
    One question that was found.

    Attributes:
        row: index of the training text.
        question: index of the question.
        exact: whether it stands there letter by letter, or only with other case, punctuation and white space.
    """

    row: int
    question: int
    exact: bool


def normalise(text: str) -> tuple[str, ...]:
    """The words of `text` in lower case, without punctuation and white space."""
    return tuple(_WORD.findall(text.lower()))


def find_contamination(training: Iterable[str], questions: Sequence[str]) -> list[Contamination]:
    """
    Where the evaluation `questions` stand in the `training` texts, anywhere inside a text.

    Compared word by word after normalisation, so that case, punctuation and line breaks hide nothing. A question of
    fewer than 8 words counts only where a line of a training text equals it.

    Args:
        training: whole training texts, prompt and answer.
        questions: what identifies each evaluation example: its question, with its context if that is short.
    """
    index = _Index(questions)
    return [
        Contamination(row, number, questions[number] in text)
        for row, text in enumerate(training)
        for number in sorted(index.questions_in(text))
    ]


def check_contamination(training: Iterable[str], questions: Sequence[str], *, name: str) -> None:
    """
    Raise ValueError if any of `questions` stands in the `training` texts.

    Args:
        training: whole training texts.
        questions: of the evaluation set.
        name: of the evaluation set, for the message.
    """
    found = find_contamination(training, questions)
    if not found:
        return
    examples = "; ".join(f"row {hit.row} holds {questions[hit.question][:80]!r}" for hit in found[:3])
    rows = {hit.row for hit in found}
    raise ValueError(
        f"{len(rows)} training rows hold questions of the evaluation set {name} ({examples}); leave these rows out, "
        "or do not evaluate on it"
    )


class _Index:
    """Questions by their first words, so that every position of a text is looked up once."""

    def __init__(self, questions: Sequence[str]) -> None:
        self._by_start: dict[tuple[str, ...], list[tuple[int, tuple[str, ...]]]] = {}
        self._short: dict[tuple[str, ...], list[int]] = {}
        for number, question in enumerate(questions):
            words = normalise(question)
            if len(words) < _PHRASE:
                self._short.setdefault(words, []).append(number)
            else:
                self._by_start.setdefault(words[:_PHRASE], []).append((number, words))
        self._short.pop((), None)

    def questions_in(self, text: str) -> set[int]:
        words = normalise(text)
        found = {
            number
            for start in range(len(words) - _PHRASE + 1)
            for number, question in self._by_start.get(words[start : start + _PHRASE], ())
            if words[start : start + len(question)] == question
        }
        if self._short:
            found.update(number for line in text.splitlines() for number in self._short.get(normalise(line), ()))
        return found
