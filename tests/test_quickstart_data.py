"""The first run's instruction data: what the built-in examples are like, and which datasets of one's own are read."""

import gzip
import json
import re
import sys
import types
from pydoc_data.topics import topics

import datasets
import pytest

from peft_uniattn.quickstart.data import load_examples
from peft_uniattn.quickstart.python_manual import LONGEST_ANSWER, examples_by_topic
from peft_uniattn.training.data import sources

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(20)]


@pytest.fixture(autouse=True)
def quiet_and_clean(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    datasets.disable_progress_bars()


@pytest.fixture
def dataset_file(tmp_path):
    def write(rows: list[dict], name: str = "rows.jsonl") -> str:
        path = tmp_path / name.removesuffix(".gz")
        table = datasets.Dataset.from_list(rows)
        if path.suffix == ".parquet":
            table.to_parquet(path)
        elif path.suffix == ".csv":
            table.to_csv(path)
        else:
            table.to_json(path, lines=path.suffix == ".jsonl")
        if name.endswith(".gz"):
            (tmp_path / name).write_bytes(gzip.compress(path.read_bytes()))
        return str(tmp_path / name)

    return write


def pairs(part: datasets.Dataset) -> list[tuple[str, str]]:
    return [(row["prompt"][-1]["content"], row["completion"][0]["content"]) for row in part]


def everything(parts: datasets.DatasetDict) -> list[tuple[str, str]]:
    return sorted(pairs(parts["train"]) + pairs(parts["test"]))


class TestBuiltInExamples:
    def test_they_are_several_hundred_conversations_in_trls_format(self):
        parts = load_examples()
        assert set(parts) == {"train", "test"}
        assert len(parts["train"]) > 400 and len(parts["test"]) > 40
        for part in parts.values():
            assert part.column_names == ["prompt", "completion"]
            for row in part:
                assert [turn["role"] for turn in row["prompt"]] == ["user"]
                assert [turn["role"] for turn in row["completion"]] == ["assistant"]

    def test_every_call_gives_the_same_and_the_seed_decides_the_split(self):
        first, again, other = load_examples(seed=3), load_examples(seed=3), load_examples(seed=4)
        assert first["test"][:] == again["test"][:] and first["train"][:] == again["train"][:]
        assert first["test"][:] != other["test"][:]

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("held_out", [0.05, 0.1, 0.3])
    def test_held_out_topics_are_unseen_in_training(self, seed, held_out):
        parts = load_examples(seed=seed, held_out=held_out)
        topic_of = {pair: name for name, examples in examples_by_topic(topics).items() for pair in examples}
        train, test = ({topic_of[pair] for pair in pairs(parts[part])} for part in ("train", "test"))
        assert not train & test
        assert len(parts["test"]) / (len(parts["train"]) + len(parts["test"])) == pytest.approx(held_out, abs=0.01)

    def test_no_passage_stands_on_both_sides_of_the_split(self, monkeypatch):
        def manual(name: str, opening: str = "") -> str:
            return f"{name}\n*****\n\n{opening}" + " ".join(f"The {name} has number {i} alone." for i in range(9))

        shared = "".join(f"Passage {i} says the same in either of the two topics that have it. " for i in range(4))
        texts = {name: manual(name) for name in ("alpha", "bravo", "gamma", "delta")}
        texts |= {name: manual(name, shared) for name in ("twin one", "twin two")}
        monkeypatch.setitem(sys.modules, "pydoc_data.topics", types.SimpleNamespace(topics=texts))
        sizes = set()
        for seed in range(10):
            parts = load_examples(seed=seed, held_out=0.4)
            assert not all(any(shared in answer for _, answer in pairs(part)) for part in parts.values())
            sizes.add(len(parts["train"]) + len(parts["test"]))
        assert sizes == {5, 6}  # both twins on one side, or one held out and the other dropped

    def test_questions_and_answers_are_unique(self):
        examples = everything(load_examples())
        assert len({question for question, _ in examples}) == len({answer for _, answer in examples}) == len(examples)

    def test_answers_are_bounded_whole_and_clean(self):
        for question, answer in everything(load_examples()):
            assert 60 <= len(answer) <= LONGEST_ANSWER, question
            assert not answer.endswith((":", ",", ";", "—")), question
            assert answer.count("```") % 2 == 0, question
            prose = "".join(answer.split("```")[::2])
            assert not re.search(r"\+--|::=|^See also:|^(New|Added|Changed) in version|  +\S", prose, re.MULTILINE), (
                answer
            )

    def test_a_python_without_the_manual_is_told_what_to_do(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
        with pytest.raises(ValueError, match="pass dataset="):
            load_examples()


MANUAL = {
    "outer": """\
Outer things
************

Outer things hold the inner ones, and this sentence is long enough to
keep. [1]

Inner things
============

Inner things are well-
known, and this sentence is long enough to be kept as an answer.

   inner ::= "inner"

thing.method(argument)

   Return the thing's answer to *argument*, which is always the same
   answer.

   Changed in version 3.9: Nothing of note.

-[ Footnotes ]-

[1] A footnote that nobody should see in the middle of an answer.
""",
    "inner": """\
Inner things
************

Inner things are well-
known, and this sentence is long enough to be kept as an answer.

   inner ::= "inner"
""",
}


class TestCuttingTheManual:
    def test_passages_become_questions_with_unwrapped_answers(self):
        examples = dict(examples_by_topic(MANUAL)["outer"])
        assert examples == {
            "What does the Python reference manual say about Outer things?": (
                "Outer things hold the inner ones, and this sentence is long enough to keep."
            ),
            "What does `thing.method(argument)` do in Python (Inner things)?": (
                "Return the thing's answer to *argument*, which is always the same answer."
            ),
        }

    def test_a_passage_of_two_topics_counts_for_the_shorter_one(self):
        assert examples_by_topic(MANUAL)["inner"] == [
            (
                "What does the Python reference manual say about Inner things?",
                "Inner things are well-known, and this sentence is long enough to be kept as an answer.\n\n"
                '```\ninner ::= "inner"\n```',
            )
        ]

    def test_long_sections_go_on_in_further_answers_that_say_where_they_start(self):
        paragraph = "This paragraph has a number of sentences. " * 12
        text = f"Title\n*****\n\n{paragraph}\n\nSecond comes next. {paragraph}\n\nThird is last. {paragraph}\n"
        examples = examples_by_topic({"long": text})["long"]
        assert len(examples) == 3
        assert examples[1][0].endswith('about Title? Start at "Second comes next. This paragraph has …".')
        assert all(len(answer) <= LONGEST_ANSWER for _, answer in examples)

    def test_a_paragraph_over_the_limit_is_cut_at_a_sentence_end(self):
        text = "Title\n*****\n\n" + "Short sentence, e.g. this one. " * 60
        ((_, answer),) = examples_by_topic({"long": text})["long"]
        assert 800 < len(answer) <= LONGEST_ANSWER and answer.endswith("this one.")


class TestOwnDatasets:
    @pytest.mark.parametrize(
        "name",
        ["rows.json", "rows.jsonl", "rows.csv", "rows.parquet", "rows.jsonl.gz", "rows.csv.gz"],
    )
    def test_files_of_every_kind_are_read(self, dataset_file, name):
        parts = load_examples(dataset_file(ROWS, name), held_out=0.25)
        assert (len(parts["train"]), len(parts["test"])) == (15, 5)
        assert everything(parts) == sorted((row["prompt"], row["completion"]) for row in ROWS)

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": "Q", "completion": "A"},
            {"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]},
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
            {"prompt": "an id", "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
            {"instruction": "Q", "input": "", "output": "A"},
            {"instruction": "Q", "input": None, "response": "A", "source": "x"},
            {"question": "Q", "answer": "A"},
            {"input": "Q", "output": "A"},
        ],
        ids=lambda row: "+".join(row),
    )
    def test_accepted_columns_give_the_same_examples(self, dataset_file, row):
        parts = load_examples(dataset_file([row] * 4))
        assert parts["train"][0] == {
            "prompt": [{"role": "user", "content": "Q"}],
            "completion": [{"role": "assistant", "content": "A"}],
        }

    def test_an_input_follows_its_instruction(self, dataset_file):
        parts = load_examples(dataset_file([{"instruction": "Add.", "input": "1 and 2", "output": "3"}] * 4))
        assert pairs(parts["test"]) == [("Add.\n\n1 and 2", "3")]

    def test_the_last_answer_of_a_dialogue_is_the_completion(self, dataset_file):
        said = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Why?"), ("assistant", "So.")]
        messages = [{"role": role, "content": content} for role, content in said]
        goodbye = [{"role": "user", "content": "Bye"}]
        parts = load_examples(dataset_file([{"messages": messages + goodbye}] * 4))
        assert parts["train"][0] == {"prompt": messages[:-1], "completion": messages[-1:]}

    def test_empty_rows_are_dropped_and_counted(self, dataset_file):
        empty = [
            {"prompt": "", "completion": "x"},
            {"prompt": "x", "completion": " \n"},
            {"prompt": None, "completion": "x"},
        ]
        with pytest.warns(UserWarning, match="3 of 23 rows"):
            parts = load_examples(dataset_file(ROWS + empty))
        assert everything(parts) == sorted((row["prompt"], row["completion"]) for row in ROWS)

    def test_unknown_columns_are_named_beside_the_accepted_ones(self, dataset_file):
        with pytest.raises(ValueError) as error:
            load_examples(dataset_file([{"text": "x", "label": 1}] * 4))
        for name in (
            "'text'",
            "'label'",
            "'prompt'",
            "'completion'",
            "'messages'",
            "'instruction'",
            "'output'",
            "'response'",
        ):
            assert name in str(error.value)

    @pytest.mark.parametrize("usable", [0, 1])
    def test_too_few_usable_rows_are_refused(self, dataset_file, usable):
        rows = [{"prompt": "", "completion": "x"}] * 3 + ROWS[:usable]
        with pytest.warns(UserWarning), pytest.raises(ValueError, match=f"{usable} usable examples"):
            load_examples(dataset_file(rows))

    def test_a_missing_file_and_an_unknown_kind_are_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            load_examples(str(tmp_path / "missing.jsonl"))
        (tmp_path / "notes.txt").write_text("hello")
        with pytest.raises(ValueError, match=r"\.jsonl"):
            load_examples(str(tmp_path / "notes.txt"))

    @pytest.mark.parametrize("test_part", ["test", "validation"])
    def test_a_dataset_of_the_hub_keeps_its_own_split(self, monkeypatch, test_part):
        parts = {"train": ROWS[:15], test_part: ROWS[15:]}
        hub = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
        monkeypatch.setattr(sources, "load_dataset", lambda name, *_, **__: {"somebody/some-data": hub}[name])
        loaded = load_examples("somebody/some-data")
        assert pairs(loaded["train"]) == [(row["prompt"], row["completion"]) for row in ROWS[:15]]
        assert pairs(loaded["test"]) == [(row["prompt"], row["completion"]) for row in ROWS[15:]]


class TestArguments:
    @pytest.mark.parametrize("own", [False, True])
    @pytest.mark.parametrize(("most", "tests"), [(2, 1), (10, 2)])
    def test_max_examples_bounds_both_parts_and_is_decided_by_the_seed(self, dataset_file, own, most, tests):
        source = dataset_file(ROWS) if own else None
        first, again, other = (load_examples(source, seed=s, held_out=0.2, max_examples=most) for s in (1, 1, 2))
        assert (len(first["train"]), len(first["test"])) == (most - tests, tests)
        assert everything(first) == everything(again) != everything(other)

    def test_a_generous_maximum_changes_nothing(self):
        assert everything(load_examples(max_examples=10**6)) == everything(load_examples())

    @pytest.mark.parametrize("held_out", [0, 1, -0.1, 10])
    def test_a_share_outside_0_and_1_is_refused(self, held_out):
        with pytest.raises(ValueError, match="held_out="):
            load_examples(held_out=held_out)

    @pytest.mark.parametrize("most", [1, 0, -5])
    def test_a_maximum_without_room_for_both_parts_is_refused(self, most):
        with pytest.raises(ValueError, match="max_examples="):
            load_examples(max_examples=most)


def test_the_same_rows_in_a_json_array_and_in_json_lines_are_the_same_examples(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    assert everything(load_examples(str(tmp_path / "a.json"))) == everything(load_examples(str(tmp_path / "b.jsonl")))
