"""Accuracy by lm-eval: the questions are lm-eval's own, wherever the rows come from; the answers are the model's."""

import gzip
import json
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import aligned, tiny_adapter, tiny_model
from datasets import Dataset, DatasetDict
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from peft_uniattn import to_standalone
from peft_uniattn.cli import app
from peft_uniattn.evaluation import (
    PAPER_TASKS,
    check_has_accuracy,
    evaluate,
    load_for_evaluation,
    task_questions,
    task_specs,
)
from peft_uniattn.evaluation.compressed import H2OLanguageModel
from peft_uniattn.evaluation.language_model import LanguageModel
from peft_uniattn.evaluation.tasks import task_manager

# One row of each set as its authors publish it, and as the data set's page on the Hub shows it.
PUBLISHED = {
    "ori_pqal.json": {
        "1": {"QUESTION": "Do cells die?", "CONTEXTS": ["One.", "Two."], "final_decision": "maybe", "YEAR": "2011"},
        "2": {"QUESTION": "Is it so?", "CONTEXTS": ["Three."], "final_decision": "yes", "YEAR": "2012"},
    },
    "test_ground_truth.json": {"1": "maybe"},
}
PUBLISHED_LINES = {
    "dev.json": [
        {"question": "Which nerve?", "cop": 3, "opa": "first", "opb": "second", "opc": "third", "opd": "fourth"}
    ],
    "phrases_no_exclude_test.jsonl": [
        {
            "question": "A man coughs. Why?",
            "options": {"A": "cold", "B": "flu", "C": "dust", "D": "smoke"},
            "answer": "dust",
            "answer_idx": "C",
        }
    ],
    "socialIQa_v1.4_dev.jsonl": [
        {
            "context": "Kim left.",
            "question": "Why?",
            "answerA": "rain",
            "answerB": "hunger",
            "answerC": "work",
            "correct": "B",
        }
    ],
    "dev_rand_split.jsonl": [
        {
            "answerKey": "D",
            "question": {
                "stem": " Where is a door? ",
                "choices": [{"label": letter, "text": f"place {letter}"} for letter in "ABCDE"],
            },
        }
    ],
    "train_rand_split.jsonl": [
        {
            "answerKey": "A",
            "question": {
                "stem": f"Example {number}?",
                "choices": [{"label": letter, "text": f"thing {letter}"} for letter in "ABCDE"],
            },
        }
        for number in range(8)
    ],
}
ON_THE_HUB = {
    "pubmedqa": {"QUESTION": "Do cells die?", "CONTEXTS": ["One.", "Two."], "final_decision": "maybe"},
    "medmcqa": {
        "question": "Which nerve?",
        "cop": 2,
        "opa": "first",
        "opb": "second",
        "opc": "third",
        "opd": "fourth",
    },
    "medqa_4options": {
        "sent1": "A man coughs. Why?",
        "ending0": "cold",
        "ending1": "flu",
        "ending2": "dust",
        "ending3": "smoke",
        "label": 2,
    },
    "social_iqa": {
        "context": "Kim left.",
        "question": "Why?",
        "answerA": "rain",
        "answerB": "hunger",
        "answerC": "work",
        "label": "2",
    },
    "commonsense_qa": {
        "question": " Where is a door? ",
        "choices": {"label": list("ABCDE"), "text": [f"place {letter}" for letter in "ABCDE"]},
        "answerKey": "D",
    },
}


@pytest.fixture(scope="module", name="task_manager")
def fixture_task_manager():
    return task_manager()


@pytest.fixture
def data_dir(tmp_path):
    directory = tmp_path / "data" / "below"
    directory.mkdir(parents=True)
    for name, content in PUBLISHED.items():
        (directory / name).write_text(json.dumps(content))
    for name, rows in PUBLISHED_LINES.items():
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory.parent


def only_task(task_manager, spec):
    (task,) = task_manager.load([spec])["tasks"].values()
    return task


def asked(task, shots: int = 0):
    doc = next(iter(task.eval_docs))
    return {
        "prompt": task.fewshot_context(doc, shots),
        "target": task.doc_to_target(doc),
        "choices": task.doc_to_choice(doc),
        "delimiter": task.config.target_delimiter,
        "metrics": sorted(task._metric_fn_list),
    }


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_a_local_copy_asks_what_the_official_task_asks(name, data_dir, task_manager):
    row = ON_THE_HUB[name]
    hub = DatasetDict({split: Dataset.from_list([row]) for split in ("train", "validation", "test")})
    official = {"group": "official", "task": [{"task": name, "custom_dataset": lambda **_: hub}]}
    (local,) = task_specs([name], data_dir=data_dir)
    assert asked(only_task(task_manager, local)) == asked(only_task(task_manager, official))


def write_training_files(folder, rows):
    """Six training examples of every set as they are published: the evaluation row with a number in front."""
    lines = {name: PUBLISHED_LINES[name][0] for name in PUBLISHED_LINES}
    choices = lines["dev_rand_split.jsonl"]["question"]
    train = {
        "medmcqa/train.json": [{**lines["dev.json"], "question": f"{n} Which nerve?"} for n in rows],
        "phrases_no_exclude_train.jsonl": [
            {**lines["phrases_no_exclude_test.jsonl"], "question": f"{n} A man coughs. Why?"} for n in rows
        ],
        "train_rand_split.jsonl": [
            {"answerKey": "D", "question": {**choices, "stem": f"{n} {choices['stem']}"}} for n in rows
        ],
    }
    for name, content in train.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    article = PUBLISHED["ori_pqal.json"]["1"]
    articles = {f"{n + 10}": {**article, "QUESTION": f"{n} Do cells die?"} for n in rows}
    (folder / "ori_pqal.json").write_text(json.dumps({"1": article, **articles}))
    with zipfile.ZipFile(folder / "socialiqa-train-dev.zip", "w") as archive:
        siqa = [{**lines["socialIQa_v1.4_dev.jsonl"], "context": f"{n} Kim left."} for n in rows]
        archive.writestr("socialiqa-train-dev/train.jsonl", "\n".join(map(json.dumps, siqa)))
        archive.writestr("socialiqa-train-dev/train-labels.lst", "2\n" * len(rows))


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_five_examples_of_a_local_copy_are_those_of_the_official_task(name, data_dir, task_manager):
    write_training_files(data_dir / "below", range(6))
    row = ON_THE_HUB[name]
    first = next(column for column in ("QUESTION", "sent1", "context", "question") if column in row)
    train = Dataset.from_list([{**row, first: f"{number} {row[first]}"} for number in range(6)])
    test = Dataset.from_list([row])
    hub = DatasetDict({"train": train, "validation": test, "test": test})
    official = {"group": "official", "task": [{"task": name, "custom_dataset": lambda **_: hub}]}
    (local,) = task_specs([name], data_dir=data_dir, num_fewshot=5)
    tasks = [only_task(task_manager, spec) for spec in (local, official)]
    for task in tasks:
        task.set_fewshot_seed(0)  # as `evaluate` does
    prompts = [asked(task, shots=5)["prompt"] for task in tasks]
    assert prompts[0] == prompts[1]
    assert sum(f"{number} {row[first]}".strip() in prompts[0] for number in range(6)) == 5


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_the_definition_of_a_local_copy_is_the_file_inside_lm_eval(name, data_dir, task_manager):
    shipped = Path(task_manager.task_index[name].yaml_path).read_text()
    (local,) = task_specs([name], data_dir=data_dir)
    config = only_task(task_manager, local).config
    assert f"dataset_path: {config.dataset_path}\n" in shipped
    for value in (config.doc_to_text, config.doc_to_target):
        assert callable(value) or json.dumps(value).strip('"').replace("\\\\", "\\") in shipped


def test_the_test_split_of_pubmedqa_is_what_its_authors_hold_out(data_dir, task_manager):
    (spec,) = task_specs(["pubmedqa"], data_dir=data_dir)
    task = only_task(task_manager, spec)
    assert [doc["QUESTION"] for doc in task.test_docs()] == ["Do cells die?"]
    assert [doc["QUESTION"] for doc in task.training_docs()] == ["Is it so?"]


def test_examples_come_from_the_training_file(data_dir, task_manager):
    (spec,) = task_specs(["commonsense_qa"], data_dir=data_dir, num_fewshot=5)
    prompt = asked(only_task(task_manager, spec), shots=5)["prompt"]
    assert prompt.count("Question: Example ") == 5
    assert prompt.count("\nAnswer: A\n") == 5


def test_training_questions_of_social_iqa_are_read_from_the_published_archive(data_dir, task_manager):
    rows = [{**PUBLISHED_LINES["socialIQa_v1.4_dev.jsonl"][0], "context": f"Sam {number}."} for number in range(2)]
    with zipfile.ZipFile(data_dir / "socialiqa-train-dev.zip", "w") as archive:
        archive.writestr("socialiqa-train-dev/train.jsonl", "\n".join(map(json.dumps, rows)))
        archive.writestr("socialiqa-train-dev/train-labels.lst", "3\n1\n")
    (spec,) = task_specs(["social_iqa"], data_dir=data_dir, num_fewshot=1)
    docs = list(only_task(task_manager, spec).training_docs())
    assert [(doc["context"], doc["label"]) for doc in docs] == [("Sam 0.", "3"), ("Sam 1.", "1")]


def test_a_cloze_task_scores_the_answers_text(data_dir, task_manager):
    (spec,) = task_specs(["commonsense_qa_cloze"], data_dir=data_dir)
    question = asked(only_task(task_manager, spec))
    assert question["prompt"] == "Question: Where is a door?\nAnswer:"
    assert question["choices"][question["target"]] == "place D"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"names": ["hellaswag"]}, ValueError, "'hellaswag' has no local copy"),
        ({"names": []}, ValueError, "is empty"),
        ({"names": ["medmcqa"], "num_fewshot": 5}, ValueError, "num_fewshot=5: no training file of medmcqa"),
    ],
)
def test_what_cannot_be_asked_is_refused(arguments, error, words, data_dir):
    with pytest.raises(error, match=words):
        task_specs(arguments.pop("names"), data_dir=data_dir, **arguments)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no dev_rand_split\.jsonl"):
        task_specs(["commonsense_qa"], data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("socialIQa_v1.4_dev.jsonl", b'\n{"a": [1', "data_dir: line 2 of '{path}' cannot be read: Expecting"),
        (
            "socialIQa_v1.4_dev.jsonl",
            b'{"question": "q"}',
            "data_dir: line 1 of '{path}' cannot be read: missing 'con",
        ),
        (
            "dev_rand_split.jsonl",
            b'{"question": "q"}',
            "data_dir: line 1 of '{path}' cannot be read: it has another shape",
        ),
        (
            "phrases_no_exclude_test.jsonl",
            b'{"question": "q", "options": {"A": "1", "B": "2", "C": "3", "D": "4"}, "answer_idx": "E"}',
            "data_dir: line 1 of '{path}' cannot be read: 'E' is not in list",
        ),
        ("dev_rand_split.jsonl", b"\n", "data_dir: '{path}' is empty"),
        ("dev.json.gz", gzip.compress(b"{}")[:-4], "data_dir: '{path}' cannot be read: Compressed file ended"),
        ("ori_pqal.json", b'{"1": {}}', "data_dir: '{path}' cannot be read: missing 'QUESTION'"),
        ("test_ground_truth.json", b"{", "data_dir: '{path}' cannot be read: Expecting"),
        ("socialiqa-train-dev.zip", b"none", "data_dir: '{path}' cannot be read: File is not a zip file"),
    ],
    ids=[
        "broken-line",
        "missing-column",
        "other-shape",
        "unknown-letter",
        "empty",
        "cut.gz",
        "missing-field",
        "broken-json",
        "no.zip",
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(name, content, message, data_dir):
    path = data_dir / "below" / name
    path.with_name(name.removesuffix(".gz")).unlink(missing_ok=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message.format(path=path) + ".*; "):
        task_specs(PAPER_TASKS, data_dir=data_dir)


def test_a_line_separator_inside_a_question_ends_no_line(data_dir):
    row = PUBLISHED_LINES["socialIQa_v1.4_dev.jsonl"][0] | {"question": "one\u2028two"}
    path = data_dir / "below" / "socialIQa_v1.4_dev.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert task_questions(["social_iqa"], data_dir=data_dir) == {"social_iqa": ["Kim left. one\u2028two"]}


WORDS = ["<unk>", "<pad>", "<end>", "Q:", "Kim", "left.", "Why?", "A:", "rain", "hunger", "work", "and", "so", "on"]


def word_tokenizer():
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def best_answer(model, tokenizer):
    """The answer of the highest log-likelihood, computed by hand for answers of one word."""
    ids = tokenizer("Q: Kim left. Why?\nA:", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1]
    answers = [WORDS.index(word) for word in ("rain", "hunger", "work")]
    return int(logits[answers].argmax())


@pytest.mark.parametrize("seed", range(4))
def test_accuracy_is_that_of_the_likeliest_answer(seed, data_dir):
    model, tokenizer = tiny_model(seed=seed, dtype=torch.float32), word_tokenizer()
    results = evaluate(model, tokenizer, ["social_iqa"], data_dir=data_dir)
    assert results["results"]["social_iqa"]["acc,none"] == float(best_answer(model, tokenizer) == 1)


@pytest.mark.parametrize("budget", [None, 0.5], ids=["whole", "h2o"])
def test_an_answer_longer_than_an_input_may_be_is_refused(budget):
    options = {"pretrained": tiny_model(dtype=torch.float32), "tokenizer": word_tokenizer(), "max_length": 2}
    language_model = LanguageModel(**options) if budget is None else H2OLanguageModel(budget=budget, **options)
    with pytest.raises(ValueError, match="max_length=2 has no room for an answer of 3 tokens"):
        language_model._loglikelihood_tokens([(("w1", "w2"), [1], [2]), (("w1", "w2 w3 w4"), [1], [2, 3, 4])])


def test_results_hold_no_rows_of_the_data(data_dir, caplog):
    results = evaluate(tiny_model(dtype=torch.float32), word_tokenizer(), ["social_iqa"], data_dir=data_dir)
    assert "Kim left" not in json.dumps(results, default=str)
    assert "--metadata" not in caplog.text  # a flag of lm-eval's own command line


@pytest.fixture
def saved(tmp_path):
    """Folders of a base model, an adapter on it and the adapter's standalone model."""
    tokenizer, base = word_tokenizer(), tmp_path / "base"
    tiny_model(dtype=torch.float32, vocab_size=len(WORDS)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model, _ = load_for_evaluation(str(base), device="cpu")
    adapter = tiny_adapter(model)
    adapter.save_pretrained(tmp_path / "adapter")
    to_standalone(adapter).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return {name: str(tmp_path / name) for name in ("base", "adapter", "model")}


def test_adapter_and_standalone_model_load_alike(saved):
    ids = torch.arange(3, 9).unsqueeze(0)
    adapter, standalone = (aligned(load_for_evaluation(saved[name], device="cpu")[0]) for name in ("adapter", "model"))
    assert torch.equal(adapter(input_ids=ids).logits, standalone(input_ids=ids).logits)


def test_an_adapter_without_tokenizer_takes_its_bases(saved):
    _, tokenizer = load_for_evaluation(saved["adapter"], device="cpu")
    assert tokenizer.get_vocab() == word_tokenizer().get_vocab()


def test_lm_eval_loads_an_adapter_by_its_own_peft_argument(saved):
    by_lm_eval = HFLM(pretrained=saved["base"], peft=saved["adapter"], device="cpu").model
    ours, _ = load_for_evaluation(saved["adapter"], device="cpu")
    ids = torch.arange(3, 9).unsqueeze(0)
    assert torch.equal(aligned(by_lm_eval)(input_ids=ids).logits, aligned(ours)(input_ids=ids).logits)


def test_the_command_writes_lm_evals_results(saved, data_dir, tmp_path):
    output = tmp_path / "out" / "results.json"
    command = ["eval", saved["model"], "--tasks", "social_iqa", "--data-dir", str(data_dir), "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "social_iqa" in result.output
    accuracy = json.loads(output.read_text())["results"]["social_iqa"]["acc,none"]
    model, tokenizer = load_for_evaluation(saved["model"], device="cpu")
    assert accuracy == float(best_answer(model, tokenizer) == 1)


def test_the_command_names_a_missing_file_before_it_loads_a_model(tmp_path):
    command = ["eval", "nowhere", "--tasks", "medmcqa", "--data-dir", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "has no dev.json" in result.output


def test_a_task_without_accuracy_is_refused_by_name(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "w1", "answer": "w2"}))
    task = {
        "task": "free_text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "free_text.yaml").write_text(yaml.safe_dump(task))
    with pytest.raises(ValueError, match="'free_text' measures exact_match, and tables show accuracy"):
        check_has_accuracy([str(tmp_path / "free_text.yaml")])


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_the_papers_tasks_have_accuracy(name, data_dir):
    check_has_accuracy([name, f"{name}_cloze"], data_dir=data_dir)
