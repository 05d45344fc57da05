"""The medical sets are trained on and asked with one prompt, and what is asked is not trained on."""

import json

import pytest
from test_evaluation import PUBLISHED, PUBLISHED_LINES

from peft_uniattn.evaluation import check_contamination, task_questions, task_specs
from peft_uniattn.evaluation.tasks import task_manager
from peft_uniattn.training.data.formats import converter
from peft_uniattn.training.data.prompt import PAPER_PROMPT

ROWS = {
    "pubmedqa_cloze": PUBLISHED["ori_pqal.json"]["1"],
    "medqa_4options_cloze": PUBLISHED_LINES["phrases_no_exclude_test.jsonl"][0],
}


@pytest.fixture
def data_dir(tmp_path):
    for name, content in PUBLISHED.items():
        (tmp_path / name).write_text(json.dumps(content))
    for name, rows in PUBLISHED_LINES.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def loaded(name, data_dir):
    return task_manager().load(task_specs([name], data_dir=data_dir, prompt="paper"))["tasks"][name]


@pytest.mark.parametrize("name", ROWS)
def test_questions_are_asked_as_they_are_trained(name, data_dir):
    row = ROWS[name]
    example = converter("auto", list(row))(row)
    task = loaded(name, data_dir)
    (doc,) = task.test_docs() if task.has_test_docs() else task.validation_docs()
    assert task.doc_to_text(doc) == PAPER_PROMPT.format(instruction=example.instruction, input=example.input)
    choices, target = task.doc_to_choice(doc), task.doc_to_target(doc)
    assert (target if isinstance(target, str) else choices[target]) == example.output


def test_pubmedqa_is_scored_by_its_words_as_in_the_official_definition(data_dir):
    task = loaded("pubmedqa_cloze", data_dir)
    (doc,) = task.test_docs()
    assert task.doc_to_choice(doc) == ["yes", "no", "maybe"]
    assert list(task.aggregation()) == ["acc"]


@pytest.mark.parametrize("name", ["pubmedqa_cloze", "medmcqa_cloze", "medqa_4options_cloze"])
def test_a_medical_question_in_training_data_is_found(name, data_dir):
    questions = task_questions([name], data_dir=data_dir)[name]
    with pytest.raises(ValueError, match=f"hold questions of the evaluation set {name}"):
        check_contamination([f"### Input:\n{questions[0]}\n### Response:"], questions, name=name)
