"""Training data: what every format becomes, the paper's prompt token by token, and what happens to bad rows."""

from __future__ import annotations

import copy
import gzip
import json
import zipfile

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from trl import TrlParser

from peft_uniattn.training.data import DataArguments, load_data, sources
from peft_uniattn.training.data.formats import BadRow, converter

# Typed from Appendix A of the paper; the line breaks are those of the official code.
APPENDIX_A = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n%s\n\n### Input:\n%s\n\n### Response:"
)
CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHOICES = [{"label": label, "text": text} for label, text in zip("ABC", ("ant", "bee", "cow"), strict=True)]
DIALOGUE = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.fixture(autouse=True)
def quiet_and_clean(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer():
    """A byte is a token, and an end of sequence follows."""
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>")
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="module")
def joining(tokenizer):
    """The same, but ":" and ">" are one token with an "n" after them, as ":no" is for Qwen2.5's tokenizer."""
    vocabulary = {**tokenizer.get_vocab(), ":n": len(tokenizer), ">n": len(tokenizer) + 1}
    made = copy.deepcopy(tokenizer)
    made.backend_tokenizer.model = models.BPE(vocab=vocabulary, merges=[(":", "n"), (">", "n")])
    assert len(made("a:n>n")["input_ids"]) == 3
    return made


def appending(tokenizer):
    """The same, but it appends the end of sequence itself."""
    made = copy.deepcopy(tokenizer)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    return made


def encoded(tokenizer, answer, style="paper"):
    """The tokens and labels of the question "Q" and its answer."""
    rows = datasets.DatasetDict(train=datasets.Dataset.from_list([{"question": "Q", "answer": answer}]))
    arguments = DataArguments(test_size=0, prompt_style=style)
    (row,) = load_data(arguments, tokenizer, max_length=2000, seed=0, splits=rows).train
    return row


@pytest.fixture
def load(tmp_path, tokenizer):
    """Load rows from a JSON lines file; nothing is held out unless asked for."""

    def run(rows, *, max_length=2000, seed=0, **arguments):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = DataArguments(**{"dataset_name": str(path), "test_size": 0, **arguments})
        return load_data(given, tokenizer, max_length=max_length, seed=seed)

    return run


def texts(dataset, tokenizer) -> list[tuple[str, str]]:
    """What carries no loss, and what does, of every example."""
    pairs = []
    for row in dataset:
        start = next(index for index, label in enumerate(row["labels"]) if label != -100)
        assert row["labels"][start:] == row["input_ids"][start:]
        pairs.append((tokenizer.decode(row["input_ids"][:start]), tokenizer.decode(row["labels"][start:])))
    return pairs


def questions(count, first=0):
    return [{"question": f"q{first + index}", "answer": f"a{first + index}"} for index in range(count)]


class TestPrompt:
    @pytest.mark.parametrize(
        ("row", "instruction", "given"),
        [
            ({"instruction": "Add.", "input": "1 and 2", "output": "A"}, "Add.", "1 and 2"),
            ({"instruction": "Add 1 and 2.", "input": "", "output": "A"}, "Add 1 and 2.", ""),
            ({"input": "1 and 2?", "output": "A"}, "", "1 and 2?"),
            ({"question": "1 and 2?", "answer": "A"}, "", "1 and 2?"),
            ({"messages": DIALOGUE}, "", "Q"),
        ],
        ids=["both", "instruction-only", "input-only", "question", "dialogue"],
    )
    def test_it_is_that_of_appendix_a_with_empty_places_where_there_is_nothing(
        self, load, tokenizer, row, instruction, given
    ):
        assert texts(load([row]).train, tokenizer) == [(APPENDIX_A % (instruction, given), "A</s>")]

    def test_only_the_answer_and_its_end_of_sequence_carry_loss(self, load, tokenizer):
        (row,) = load([{"question": "Q", "answer": "answer"}]).train
        assert sum(label != -100 for label in row["labels"]) == len("answer") + 1
        assert row["labels"][-1] == row["input_ids"][-1] == tokenizer.eos_token_id

    def test_a_tokenizer_that_appends_the_end_of_sequence_itself_does_not_get_two(self, tokenizer):
        row = encoded(appending(tokenizer), "A")
        assert [label for label in row["labels"] if label != -100] == [
            *tokenizer("A")["input_ids"],
            tokenizer.eos_token_id,
        ]

    def test_a_chat_template_takes_the_whole_dialogue(self, load, tokenizer):
        before = [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"},
        ]
        data = load([{"messages": before + DIALOGUE}], prompt_style="chat")
        assert texts(data.train, tokenizer) == [("<system>S<user>q<assistant>a</s><user>Q<assistant>", "A</s>")]

    def test_a_chat_template_joins_instruction_and_input(self, load, tokenizer):
        data = load([{"instruction": "Add.", "input": "1", "output": "A"}], prompt_style="chat")
        assert texts(data.train, tokenizer) == [("<user>Add.\n\n1<assistant>", "A</s>")]

    @pytest.mark.parametrize("style", ["paper", "chat"])
    @pytest.mark.parametrize("answer", ["no", "yes"])
    def test_an_answer_never_changes_the_tokens_of_the_prompt(self, joining, style, answer):
        prompt = APPENDIX_A % ("", "Q") if style == "paper" else "<user>Q<assistant>"
        row = encoded(joining, answer, style)
        answer_ids = [*joining(answer)["input_ids"], joining.eos_token_id]
        assert row["input_ids"] == joining(prompt)["input_ids"] + answer_ids
        assert [label for label in row["labels"] if label != -100] == answer_ids

    def test_where_a_tokenizer_ends_prompts_by_itself_the_answer_still_comes_before_the_end(self, joining):
        whole = [*joining(APPENDIX_A % ("", "Q"))["input_ids"], *joining("no")["input_ids"], joining.eos_token_id]
        assert encoded(appending(joining), "no")["input_ids"] == whole

    def test_an_answer_begins_where_a_template_writes_an_answered_prompt_in_another_way(self, tokenizer):
        thinking = copy.deepcopy(tokenizer)
        thinking.chat_template = CHAT.replace("<assistant>{% endif %}", "<assistant>?{% endif %}")
        assert texts([encoded(thinking, "A", "chat")], tokenizer) == [("<user>Q<assistant>", "A</s>")]

    @pytest.mark.parametrize(("style", "missing"), [("chat", "chat_template"), ("paper", "eos_token")])
    def test_a_tokenizer_without_what_the_prompt_needs_is_refused(self, tokenizer, style, missing):
        lacking = copy.deepcopy(tokenizer)
        setattr(lacking, missing, None)
        arguments = DataArguments(dataset_name="never-read.jsonl", prompt_style=style)
        with pytest.raises(ValueError, match=rf"set tokenizer\.{missing}"):
            load_data(arguments, lacking, max_length=9, seed=0)


class TestFormats:
    @pytest.mark.parametrize(
        ("row", "question", "answer"),
        [
            ({"question": {"stem": "Who?", "choices": CHOICES}, "answerKey": "B"}, "Who?", "bee"),
            (
                {"question": "Who?", "choices": {"label": ["A", "B"], "text": ["ant", "bee"]}, "answerKey": "B"},
                "Who?",
                "bee",
            ),
            (
                {"context": "So.", "question": "Why?", "answerA": "x", "answerB": "y", "answerC": "z", "correct": "C"},
                "So. Why?",
                "z",
            ),
            (
                {"context": "So.", "question": "Why?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "2"},
                "So. Why?",
                "y",
            ),
            ({"question": "Which?", "options": ["A. one", "B. two"], "answer": "two"}, "Which?", "two"),
            ({"question": "Which?", "options": {"A": "one", "B": "two"}, "answer": "two"}, "Which?", "two"),
            (
                {"QUESTION": "Does it?", "CONTEXTS": ["P.", "R."], "final_decision": "maybe"},
                "P.\nR.\n\nDoes it?",
                "maybe",
            ),
            (
                {"question": "Does it?", "context": {"contexts": ["P.", "R."]}, "final_decision": "no"},
                "P.\nR.\n\nDoes it?",
                "no",
            ),
        ],
        ids=[
            "commonsenseqa",
            "commonsenseqa-hub",
            "siqa",
            "siqa-hub",
            "medqa-list",
            "medqa-object",
            "pubmedqa",
            "pubmedqa-hub",
        ],
    )
    def test_multiple_choice_sets_are_recognised_and_become_question_and_answer(
        self, load, tokenizer, row, question, answer
    ):
        assert texts(load([row]).train, tokenizer) == [(APPENDIX_A % ("", question), f"{answer}</s>")]

    def test_choices_can_be_listed_below_the_question(self, load, tokenizer):
        row = {"question": {"stem": "Who?", "choices": CHOICES}, "answerKey": "B"}
        ((prompt, _),) = texts(load([row], list_choices=True).train, tokenizer)
        assert prompt == APPENDIX_A % ("", "Who?\n- ant\n- bee\n- cow")

    @pytest.mark.parametrize("style", ["paper", "chat"])
    def test_of_tulu_only_one_question_with_one_answer_is_taken(self, load, tokenizer, style):
        rows = [
            {"messages": DIALOGUE},
            {"messages": DIALOGUE * 2},
            {"messages": [{"role": "system", "content": "S"}, *DIALOGUE]},
            {"messages": [{"role": "user", "content": ""}, DIALOGUE[1]]},
        ]
        report = load(rows, dataset_format="tulu3", prompt_style=style).report
        assert (report.kept, report.bad) == (1, {})
        assert report.skipped == {"not one question with one answer": 2, "empty question": 1}

    def test_a_message_in_parts_of_text_is_their_text(self, load, tokenizer):
        def message(role, *parts):
            return {"role": role, "content": [{"type": "text", "text": part} for part in parts]}

        data = load([{"messages": [message("user", "One", " ", "question?"), message("assistant", "Answer.")]}])
        assert texts(data.train, tokenizer) == [(APPENDIX_A % ("", "One question?"), "Answer.</s>")]

    def test_the_papers_prompt_has_no_place_for_earlier_turns(self, load):
        report = load([{"messages": DIALOGUE * 2}, {"messages": DIALOGUE}]).report
        assert (report.kept, report.skipped) == (1, {"not one question with one answer": 1})

    def test_unknown_columns_and_a_format_that_does_not_fit_are_refused_by_name(self, load):
        for wrong in ({}, {"dataset_format": "siqa"}):
            with pytest.raises(ValueError, match=r"dataset_format=.*\['text', 'label'\].*'messages'.*'completion'"):
                load([{"text": "x", "label": 1}], **wrong)

    def test_excluded_ids_are_never_trained_on(self, load, tokenizer, tmp_path):
        (tmp_path / "test.json").write_text('{"1": "yes"}')
        rows = [{"id": index, **row} for index, row in enumerate(questions(3))]
        data = load(rows, exclude_ids=str(tmp_path / "test.json"))
        assert sorted(answer for _, answer in texts(data.train, tokenizer)) == ["a0</s>", "a2</s>"]
        assert data.report.skipped == {"excluded id": 1}

    def test_ids_that_no_row_has_are_warned_of(self, load, tmp_path):
        (tmp_path / "test.json").write_text('["x"]')
        with pytest.warns(UserWarning, match=r"exclude_ids=.* names 1 ids, and no row .*: nothing is left out"):
            load([{"id": 1, "question": "q", "answer": "a"}], exclude_ids=str(tmp_path / "test.json"))

    def test_a_passage_that_is_a_text_is_one_passage(self, load, tokenizer):
        row = {"QUESTION": "Does it?", "CONTEXTS": "One passage.", "final_decision": "yes"}
        ((text, _),) = texts(load([row]).train, tokenizer)
        assert "One passage.\n\nDoes it?" in text

    def test_excluding_without_a_column_of_ids_is_refused(self, load, tmp_path):
        (tmp_path / "test.json").write_text("[1]")
        with pytest.raises(ValueError, match=r"exclude_ids=.*'id' or 'pubid'"):
            load(questions(3), exclude_ids=str(tmp_path / "test.json"))

    def test_of_several_data_sets_those_without_ids_are_taken_whole(self, tokenizer, tmp_path):
        (tmp_path / "test.json").write_text('["10"]')
        by_id = {str(9 + index): row for index, row in enumerate(questions(2))}
        (tmp_path / "by_id.json").write_text(json.dumps(by_id))
        (tmp_path / "rows.json").write_text(json.dumps([{"question": "q", "answer": "other"}]))
        arguments = DataArguments(
            dataset_name=[str(tmp_path / "rows.json"), str(tmp_path / "by_id.json")],
            exclude_ids=str(tmp_path / "test.json"),
            test_size=0,
        )
        data = load_data(arguments, tokenizer, max_length=2000, seed=0)
        assert sorted(answer for _, answer in texts(data.train, tokenizer)) == ["a0</s>", "other</s>"]


class TestSources:
    @pytest.mark.parametrize(
        "name", ["r.json", "r.jsonl", "r.csv", "r.parquet", "r.json.gz", "r.jsonl.gz", "r.csv.gz"]
    )
    @pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
    def test_files_of_every_kind_are_read(self, tmp_path, tokenizer, name, streaming, monkeypatch):
        # After a stream of Parquet, `datasets` waits 5 s for its threads.
        monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
        path = tmp_path / name.removesuffix(".gz")
        table = datasets.Dataset.from_list(questions(5))
        {".csv": table.to_csv, ".parquet": table.to_parquet}.get(
            path.suffix, lambda file: table.to_json(file, lines=path.suffix == ".jsonl")
        )(path)
        if name.endswith(".gz"):
            (tmp_path / name).write_bytes(gzip.compress(path.read_bytes()))
        arguments = DataArguments(dataset_name=str(tmp_path / name), test_size=0, dataset_streaming=streaming)
        data = load_data(arguments, tokenizer, max_length=2000, seed=0)
        assert sorted(answer for _, answer in texts(data.train, tokenizer)) == [f"a{i}</s>" for i in range(5)]

    @pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
    @pytest.mark.parametrize(
        ("name", "row"),
        [
            ("axiong/pmc_llama_instructions", {"instruction": "I", "input": "Q", "output": "A", "source": "x"}),
            ("allenai/tulu-3-sft-mixture", {"id": "x", "messages": DIALOGUE, "source": "y"}),
        ],
    )
    def test_the_papers_data_sets_are_taken_from_the_hub_by_name(self, monkeypatch, tokenizer, name, row, streaming):
        def hub(asked, config, *, streaming):
            assert (asked, config) == (name, None)
            rows = datasets.Dataset.from_list([row] * 4)
            return {"train": rows.to_iterable_dataset() if streaming else rows}

        monkeypatch.setattr(sources, "load_dataset", hub)
        arguments = DataArguments(dataset_name=name, dataset_streaming=streaming, test_size=1)
        data = load_data(arguments, tokenizer, max_length=2000, seed=0)
        prompt = APPENDIX_A % ("I" if "instruction" in row else "", "Q")
        assert texts(data.train, tokenizer) == [(prompt, "A</s>")] * 3
        assert texts(data.test, tokenizer) == [(prompt, "A</s>")]

    def test_a_json_object_of_rows_by_id_is_read(self, tmp_path, tokenizer):
        rows = {str(9 + index): row for index, row in enumerate(questions(3))}
        (tmp_path / "by_id.json").write_text(json.dumps(rows))
        (tmp_path / "test.json").write_text('["10"]')
        arguments = DataArguments(
            dataset_name=str(tmp_path / "by_id.json"), exclude_ids=str(tmp_path / "test.json"), test_size=0
        )
        data = load_data(arguments, tokenizer, max_length=2000, seed=0)
        assert sorted(answer for _, answer in texts(data.train, tokenizer)) == ["a0</s>", "a2</s>"]

    def test_siqas_archive_is_read_without_its_dev_part(self, tmp_path, tokenizer):
        def row(name):
            return json.dumps({"context": name, "question": "Why?", "answerA": "x", "answerB": "y", "answerC": "z"})

        with zipfile.ZipFile(tmp_path / "siqa.zip", "w") as archive:
            archive.writestr("folder/train.jsonl", "\n".join([row("one"), row("two")]))
            archive.writestr("folder/train-labels.lst", "3\n1\n")
            archive.writestr("folder/dev.jsonl", row("dev"))
            archive.writestr("__MACOSX/folder/._train.jsonl", b"\x00\x05")
        data = load_data(
            DataArguments(dataset_name=str(tmp_path / "siqa.zip"), test_size=0), tokenizer, max_length=2000, seed=0
        )
        expected = [(APPENDIX_A % ("", "one Why?"), "z</s>"), (APPENDIX_A % ("", "two Why?"), "x</s>")]
        assert sorted(texts(data.train, tokenizer)) == expected

    def test_several_data_sets_are_mixed_whatever_their_formats(self, tmp_path, tokenizer):
        for name, rows in (("one", questions(2)), ("two", [{"messages": DIALOGUE}])):
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        names = [str(tmp_path / f"{name}.jsonl") for name in ("one", "two")]
        data = load_data(DataArguments(dataset_name=names, test_size=0), tokenizer, max_length=2000, seed=0)
        assert sorted(answer for _, answer in texts(data.train, tokenizer)) == ["A</s>", "a0</s>", "a1</s>"]

    def test_what_is_neither_file_nor_on_the_hub_is_refused_with_the_way_out(self, tmp_path, tokenizer):
        (tmp_path / "notes.txt").write_text("hello")
        (tmp_path / "broken.jsonl").write_text('{"question": \n')
        for name, error, message in (
            (tmp_path / "missing.jsonl", FileNotFoundError, "no such file"),
            (tmp_path / "notes.txt", ValueError, r"\.parquet"),
            (tmp_path / "broken.jsonl", ValueError, "cannot be read"),
            ("nobody/nothing-of-that-name", ValueError, "downloaded file"),
        ):
            with pytest.raises(error, match=message):
                load_data(DataArguments(dataset_name=str(name)), tokenizer, max_length=9, seed=0)

    @pytest.mark.parametrize(
        ("name", "content", "reason"),
        [
            ("r.json.gz", gzip.compress(b"[1, 2]")[:-4], "Compressed file ended"),
            ("r.csv.gz", gzip.compress(b"question,answer\nq,a\n")[:-4], "Compressed file ended"),
            ("r.jsonl.gz", b'{"question": "q", "answer": "a"}\n', "Not a gzipped file"),
            ("r.jsonl", b"", "it is empty"),
            ("r.csv", b"", "No columns"),
            ("r.json", b"[]", "(it is empty|no data)"),
            ("r.zip", b"none", "File is not a zip file"),
            ("r.parquet", b"none", "Parquet"),
        ],
        ids=["cut.json.gz", "cut.csv.gz", "no.gz", "empty.jsonl", "empty.csv", "no-rows.json", "no.zip", "no.parquet"],
    )
    @pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
    def test_a_damaged_file_is_named_with_what_is_wrong(self, tmp_path, tokenizer, name, content, reason, streaming):
        path = tmp_path / name
        path.write_bytes(content)
        arguments = DataArguments(dataset_name=str(path), test_size=0, dataset_streaming=streaming)
        with pytest.raises(ValueError, match=f"^dataset_name='{path}' cannot be read: .*{reason}.*; repair it"):
            load_data(arguments, tokenizer, max_length=2000, seed=0)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [('["1" "2"]', "Expecting ',' delimiter"), ("1", "neither a list"), ('[{"id": 1}]', "neither a list")],
    )
    def test_ids_that_cannot_be_read_are_named_with_their_file(self, load, tmp_path, content, reason):
        path = tmp_path / "test.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=f"^exclude_ids='{path}' cannot be read: .*{reason}"):
            load([{"id": 1, "question": "q", "answer": "a"}], exclude_ids=str(path))


BAD = [
    ({"question": "q", "answer": None}, "missing 'answer'"),
    ({"question": None, "answer": "a"}, "missing 'question'"),
    ({"question": "q", "answer": " \n"}, "empty answer"),
    ({"question": "", "answer": "a"}, "empty question"),
    ({"question": "q" * 500, "answer": "a"}, "nothing of the answer left within max_length=400"),
]


class TestBadRows:
    @pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
    def test_each_is_counted_by_reason_and_named_by_its_number(self, load, streaming):
        rows = questions(2) + [row for row, _ in BAD] + questions(3)
        data = load(rows, max_length=400, max_bad_rows=5, dataset_streaming=streaming)
        assert len(list(data.train)) == 5
        assert (data.report.rows, data.report.kept) == (10, 5)
        assert data.report.bad == {reason: 1 for _, reason in BAD}
        expected = {reason: {"rows.jsonl [train]": [2 + index]} for index, (_, reason) in enumerate(BAD)}
        assert data.report.bad_rows == expected

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"question": "q", "answer": ["14 December", "December"]}, "'answer' is no text but a list"),
            ({"question": "q", "answer": {"text": "Bob", "start": 3}}, "'answer' is no text but an object"),
            ({"instruction": "i", "input": ["x"], "output": "a"}, "'input' is no text but a list"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, DIALOGUE[1]]},
                "'content' is no text but a list",
            ),
            (
                {"question": {"stem": ["q"], "choices": CHOICES}, "answerKey": "B"},
                "'question' is no text but a list",
            ),
            (
                {"question": "q", "choices": {"label": ["A"], "text": [["ant"]]}, "answerKey": "A"},
                "'choices' is no text but a list",
            ),
        ],
    )
    def test_what_is_no_text_is_not_trained_on(self, row, reason):
        with pytest.raises(BadRow, match=f"^{reason}$"):
            converter("auto", list(row))(row)

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "missing 'role'"),
            ({"messages": "q"}, "does not have the shape of dataset_format='messages'"),
            ({"question": {"text": "q"}, "choices": CHOICES, "answerKey": "A"}, "missing 'stem'"),
            (
                {"question": "q", "choices": {"label": ["A", "B"], "text": ["ant"]}, "answerKey": "A"},
                "does not have the shape of dataset_format='commonsenseqa'",
            ),
            ({"question": "q", "options": 4, "answer": "a"}, "does not have the shape of dataset_format='medqa'"),
        ],
        ids=["sharegpt", "text-for-messages", "no-stem", "choice-without-text", "number-for-options"],
    )
    def test_a_row_of_another_shape_than_its_format_is_counted(self, load, row, reason):
        with pytest.raises(ValueError, match=rf"2 × {reason} \(rows.jsonl \[train\] row 0, 1\)"):
            load([row, row])

    @pytest.mark.parametrize(("limit", "allowed"), [(0, 0), (2, 2), (0.1, 1), (0.25, 2)])
    def test_more_than_max_bad_rows_stop_the_run_naming_them(self, load, limit, allowed):
        bad = {"question": "q", "answer": ""}
        load(questions(10 - allowed) + [bad] * allowed, max_bad_rows=limit)
        with pytest.raises(ValueError) as error:
            load(questions(10 - allowed - 1) + [bad] * (allowed + 1), max_bad_rows=limit)
        assert f"max_bad_rows={limit} allows {allowed}: {allowed + 1} × empty answer" in str(error.value)
        assert f"rows.jsonl [train] row {9 - allowed}" in str(error.value)

    def test_a_stream_stops_while_it_is_read(self, load):
        bad = {"question": "q", "answer": ""}
        data = load(questions(3) + [bad] * 3 + questions(5), max_bad_rows=2, dataset_streaming=True)
        with pytest.raises(ValueError, match=r"3 × empty answer \(rows.jsonl \[train\] row 3, 4, 5\)"):
            list(data.train)

    def test_a_share_of_a_stream_is_taken_of_a_thousand_rows_at_least(self, load):
        bad = {"question": "q", "answer": ""}
        assert len(list(load([bad] * 10 + questions(2), max_bad_rows=0.01, dataset_streaming=True).train)) == 2
        with pytest.raises(ValueError, match="11 of 11 rows"):
            list(load([bad] * 11 + questions(2), max_bad_rows=0.01, dataset_streaming=True).train)

    def test_rows_of_a_sample_keep_their_numbers(self, load):
        rows = [{"question": "q", "answer": "" if index % 2 else "a"} for index in range(40)]
        report = load(rows, max_rows=20, max_bad_rows=40).report
        (named,) = report.bad_rows["empty answer"].values()
        assert report.rows == 20 and all(number % 2 for number in named) and max(named) > 20

    def test_the_report_is_a_sentence_and_plain_json(self, load):
        report = load([*questions(3), {"question": "q", "answer": ""}], max_bad_rows=1).report
        assert str(report) == ("4 rows, 3 kept, 0 of them truncated; bad: 1 × empty answer (rows.jsonl [train] row 3)")
        assert json.loads(json.dumps(report.to_dict()))["bad"] == {"empty answer": 1}

    def test_when_nothing_is_left_the_run_is_refused(self, load):
        with pytest.raises(ValueError, match="nothing to train on"):
            load([{"messages": DIALOGUE * 2}], dataset_format="tulu3")


class TestLength:
    def test_truncation_cuts_the_end_and_is_counted(self, load, tokenizer):
        prompt = len(APPENDIX_A % ("", "Q"))
        rows = [{"question": "Q", "answer": "short"}, {"question": "Q", "answer": "much longer"}]
        data = load(rows, max_length=prompt + 6)
        assert sorted(answer for _, answer in texts(data.train, tokenizer)) == ["much l", "short</s>"]
        assert (data.report.kept, data.report.truncated) == (2, 1)
        assert (data.report.tokens, data.report.completion_tokens) == (2 * (prompt + 6), 12)


class TestSplits:
    def answers(self, dataset, tokenizer):
        return [answer for _, answer in texts(dataset, tokenizer)]

    @pytest.mark.parametrize(("size", "count"), [(0.25, 5), (3, 3), (0.001, 1)])
    def test_rows_are_held_out_where_there_is_no_test_split(self, load, tokenizer, size, count):
        data = load(questions(20), test_size=size)
        train, test = self.answers(data.train, tokenizer), self.answers(data.test, tokenizer)
        assert len(test) == count and sorted(train + test) == sorted(f"a{i}</s>" for i in range(20))

    def test_order_and_split_are_decided_by_the_seed(self, load, tokenizer):
        first, again, other = (load(questions(20), test_size=5, seed=seed) for seed in (1, 1, 2))
        for part in ("train", "test"):
            same, differs = (self.answers(getattr(data, part), tokenizer) for data in (again, other))
            assert self.answers(getattr(first, part), tokenizer) == same != differs

    @pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
    def test_a_test_split_is_used_and_cut_to_the_number(self, monkeypatch, tokenizer, streaming):
        parts = {
            "train": datasets.Dataset.from_list(questions(6)),
            "test": datasets.Dataset.from_list(questions(9, 50)),
        }
        if streaming:
            parts = {name: rows.to_iterable_dataset() for name, rows in parts.items()}
        monkeypatch.setattr(sources, "load_dataset", lambda *_, **__: parts)
        arguments = DataArguments(dataset_name="somebody/some-data", test_size=4, dataset_streaming=streaming)
        data = load_data(arguments, tokenizer, max_length=2000, seed=0)
        assert sorted(self.answers(data.train, tokenizer)) == [f"a{i}</s>" for i in range(6)]
        test = self.answers(data.test, tokenizer)
        assert len(test) == 4 and all(int(answer[1:3]) >= 50 for answer in test)

    def test_a_stream_holds_out_its_first_examples_and_gives_the_rest_every_epoch(self, load, tokenizer):
        data = load(questions(12), test_size=3, dataset_streaming=True)
        assert self.answers(data.test, tokenizer) == ["a0</s>", "a1</s>", "a2</s>"]
        for epoch in range(2):
            data.train.set_epoch(epoch)
            assert sorted(self.answers(data.train, tokenizer)) == sorted(f"a{i}</s>" for i in range(3, 12))
        assert data.report.rows == data.report.kept == 12

    def test_rows_in_memory_are_taken_as_they_are(self, tokenizer):
        parts = datasets.DatasetDict(
            train=datasets.Dataset.from_list(questions(4)), test=datasets.Dataset.from_list(questions(2, 50))
        )
        data = load_data(DataArguments(), tokenizer, max_length=2000, seed=0, splits=parts)
        assert (len(data.train), len(data.test)) == (4, 2)


class TestArguments:
    def test_trls_parser_reads_them_from_yaml_and_flags(self, tmp_path):
        (tmp_path / "data.yaml").write_text("dataset_name: a/b\nmax_bad_rows: 7\nprompt_style: chat\n")
        parser = TrlParser([DataArguments])
        (given,) = parser.parse_args_and_config(["--config", str(tmp_path / "data.yaml"), "--prompt_style", "paper"])
        assert (given.dataset_name, given.max_bad_rows, given.prompt_style) == (["a/b"], 7, "paper")
        (given,) = parser.parse_args_and_config(["--dataset_name", "a/b", "c.json", "--dataset_streaming", "false"])
        assert given.dataset_name == ["a/b", "c.json"]

    @pytest.mark.parametrize(
        ("wrong", "named"),
        [
            ({"test_size": 1.5}, "test_size=1.5"),
            ({"max_bad_rows": -1}, "max_bad_rows=-1"),
            ({"max_rows": 0}, "max_rows=0"),
            ({"dataset_streaming": True, "dataset_name": ["a", "b"]}, "dataset_streaming"),
            ({"dataset_streaming": True, "test_size": 0.1}, "test_size=0.1"),
        ],
    )
    def test_values_that_cannot_be_meant_are_refused_by_name(self, wrong, named):
        with pytest.raises(ValueError, match=named):
            DataArguments(**wrong)

    def test_without_a_data_set_or_with_nothing_left_to_train_on_the_way_out_is_said(self, load, tokenizer):
        with pytest.raises(ValueError, match="dataset_name is missing"):
            load_data(DataArguments(), tokenizer, max_length=9, seed=0)
        with pytest.raises(ValueError, match=r"test_size=3 would hold out 3 of 3"):
            load(questions(3), test_size=3)
