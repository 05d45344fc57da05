"""Questions of an evaluation set are found in training data, and nothing else is."""

import pytest

from peft_uniattn.evaluation import check_contamination, find_contamination

QUESTION = "Tracy didn't go home that evening and resisted Riley's attacks. What next?"


def found(training, questions):
    return [(hit.row, hit.question, hit.exact) for hit in find_contamination(training, questions)]


def test_a_question_is_found_letter_by_letter():
    assert found(["nothing here", f"Instruction: {QUESTION}\nAnswer: run"], [QUESTION]) == [(1, 0, True)]


def test_case_punctuation_and_line_breaks_hide_nothing():
    disguised = QUESTION.upper().replace(" ", "\n  ").replace(".", " -- ").replace("'", "’")
    assert found([f"Now: {disguised} (think)"], [QUESTION]) == [(0, 0, False)]


def test_a_question_that_only_begins_alike_is_not_found():
    assert found([QUESTION.replace("next", "before")], [QUESTION]) == []


def test_a_short_phrase_inside_other_text_is_not_a_question():
    assert found(["What is the cause of death? It is asked often."], ["Cause of death?"]) == []


def test_a_short_question_on_a_line_of_its_own_is_found():
    assert found(["Question\nCause of death\nAnswer"], ["Cause of death?"]) == [(0, 0, False)]


def test_every_question_of_a_row_is_found():
    other = "Sydney walked past a homeless woman asking for change today"
    assert found([f"{other} {QUESTION}"], [QUESTION, "not there at all in any of the rows", other]) == [
        (0, 0, True),
        (0, 2, True),
    ]


def test_an_empty_question_is_nowhere():
    assert found(["", "text"], ["", "?!"]) == []


def test_contaminated_data_are_refused_by_row_and_set():
    with pytest.raises(ValueError, match=r"1 training rows hold questions of the evaluation set social_iqa.*row 1"):
        check_contamination(["clean", QUESTION], [QUESTION], name="social_iqa")


def test_clean_data_pass():
    check_contamination(["clean"], [QUESTION], name="social_iqa")
