"""`peft-uniattn analyze` as a user meets it: results, plots, progress, and errors in one sentence."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from conftest import loud, tiny_model
from typer.testing import CliRunner
from word_tokenizer import word_tokenizer

from peft_uniattn.analysis.record import Record
from peft_uniattn.cli import app

ENTRIES = {"superblocks", "size", "followers", "kv_retain_rate", "loss_uncompensated", "loss", "accuracy"}
runner = CliRunner()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a model, a text and instruction data."""
    folder = tmp_path_factory.mktemp("analyze")
    word_tokenizer().save_pretrained(folder / "model")
    loud(tiny_model(dtype=torch.float32, eos_token_id=2)).save_pretrained(folder / "model")
    (folder / "book.txt").write_text(" ".join(f"w{i * i % 89}" for i in range(2000)))
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i % 7} w{i + 3}"} for i in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "empty.txt").write_text("")
    return folder


def analyze(*arguments):
    return runner.invoke(app, ["analyze", *map(str, arguments)])


def analyzed(workplace, tmp_path, command, *arguments, data="book.txt"):
    """The result of a small run, as JSON, with its plot drawn as well."""
    common = ("--model", workplace / "model", "--dataset", workplace / data, "--length", 16, "--sequences", 8)
    output = ("--output", tmp_path / "result.json", "--plot", tmp_path / "result.svg")
    result = analyze(command, *common, *arguments, *output)
    assert result.exit_code == 0, result.output
    return json.loads((tmp_path / "result.json").read_text()), result


RUNS = {
    "similarity": (),
    "plan": ("--followers", 3, "--max-size", 4, "--held-out", 4),
    "sweep": ("--superblock-size", 3, "--followers", 3, "--held-out", 4, "--ttft-length", 8, "--ttft-repetitions", 1),
    "depth": ("--superblock-size", 3, "--held-out", 4, "--ttft-length", 8, "--ttft-repetitions", 1),
    "compensation": ("--superblock-size", 3, "--held-out", 4, "--rank", 4),
}


@pytest.fixture(scope="module")
def results(workplace, tmp_path_factory):
    """Every analysis, run once: command -> (JSON, what it printed, its folder)."""
    found = {}
    for command, arguments in RUNS.items():
        folder = tmp_path_factory.mktemp(command)
        found[command] = (*analyzed(workplace, folder, command, *arguments), folder)
    return found


@pytest.mark.parametrize("command", RUNS)
def test_a_result_says_on_what_it_was_measured(results, command):
    content, _, _ = results[command]
    assert content["analysis"] == command
    assert (content["model"], content["data"]["name"]) == ("model", "book.txt")
    assert content["settings"]["seed"] == 0
    assert {"device", "dtype", "attn_implementation", "threads", "torch", "transformers"} <= set(
        content["environment"]
    )


@pytest.mark.parametrize("command", RUNS)
def test_a_result_names_no_folders(results, workplace, command):
    _, _, folder = results[command]
    text = (folder / "result.json").read_text() + (folder / "result.svg").read_text()
    assert str(workplace.parent) not in text


@pytest.mark.parametrize("command", RUNS)
def test_progress_is_shown(results, command):
    assert "%|" in results[command][1].stderr


@pytest.mark.parametrize("command", RUNS)
def test_a_plot_can_be_drawn_again_from_its_result(results, tmp_path, command):
    _, _, folder = results[command]
    assert analyze("show", folder / "result.json", "--plot", tmp_path / "again.svg").exit_code == 0
    assert (tmp_path / "again.svg").read_bytes() == (folder / "result.svg").read_bytes()


@pytest.mark.parametrize("command", RUNS)
def test_a_table_can_be_printed_again_in_markdown(results, command):
    _, _, folder = results[command]
    table = analyze("show", folder / "result.json", "--markdown").stdout.strip().splitlines()
    assert len(table) > 3
    assert len({line.count("|") for line in table}) == 1
    assert set(table[1]) == set("|- ")


@pytest.mark.parametrize("command", RUNS)
def test_a_plot_is_small_and_has_no_colours(results, command):
    _, _, folder = results[command]
    svg = (folder / "result.svg").read_text()
    ElementTree.fromstring(svg)
    assert len(svg) < 200_000
    colours = set(re.findall(r"#[0-9a-f]{6}", svg))
    assert colours
    assert all(colour[1:3] == colour[3:5] == colour[5:7] for colour in colours)


def test_similarity_gives_neighbours_and_the_matrix(results):
    found = results["similarity"][0]["results"]
    for name in ("per_head", "head_mean"):
        assert len(found[name]["neighbours"]) == 5
        assert [len(row) for row in found[name]["matrix"]] == [6] * 6
        assert all(0 < value <= 1 for value in found[name]["neighbours"])
    assert (found["sequences"], found["tokens"]) == (8, 128)


def test_plan_scores_its_choice_against_others_with_as_many_followers(results):
    found = results["plan"][0]["results"]
    assert found["followers"] == 3
    assert found["kv_retain_rate"] == 0.75
    assert set(found["scores"]) == {"by error", "by similarity", "fixed, from the top"}
    assert found["scores"]["by error"]["superblocks"] == found["superblocks"]
    for scores in found["scores"].values():
        assert scores["followers"] == 3
        assert set(scores) == ENTRIES


def test_plan_without_held_out_sequences_only_chooses(workplace, tmp_path):
    content, _ = analyzed(workplace, tmp_path, "plan", "--kv-target", 0.9, "--method", "similarity", data="rows.jsonl")
    assert content["results"]["followers"] == 2
    assert content["results"]["scores"] == {}


def test_sweep_varies_number_and_size(results):
    found = results["sweep"][0]["results"]
    assert [entry["superblocks"] for entry in found["number"]] == [[[3, 4, 5]], [[0, 1, 2], [3, 4, 5]]]
    assert [entry["size"] for entry in found["size"]] == [2, 4]
    assert all(entry["followers"] == 3 for entry in found["size"])
    for entry in found["number"]:
        assert set(entry) == ENTRIES | {"ttft", "ttft_base"}
        assert 0 < entry["ttft"]["fastest"] <= entry["ttft"]["median"]


def test_sweep_of_the_size_alone_is_drawn_as_well(workplace, tmp_path):
    content, _ = analyzed(workplace, tmp_path, "sweep", *RUNS["sweep"], "--vary", "size")
    assert set(content["results"]) == {"base", "size"}
    assert (tmp_path / "result.svg").exists()


def test_depth_drops_one_follower_after_the_other_most_similar_first(results):
    found = results["depth"][0]["results"]
    assert found["superblocks"] == [[3, 4, 5]]
    similarity = {int(layer): value for layer, value in found["similarity"].items()}
    order = sorted(similarity, key=similarity.get, reverse=True)
    assert [entry["layers"] for entry in found["dropped"]] == [order[:count] for count in range(3)]
    assert len({entry["loss"] for entry in found["dropped"]}) == 3


def test_compensation_compares_methods_and_ranks_fitted_and_held_out(results):
    found = results["compensation"][0]["results"]
    assert [(entry["method"], entry["rank"]) for entry in found["variants"]] == [
        ("pseudoinverse", None),
        ("ridge", None),
        ("ridge", 4),
    ]
    for entry in found["variants"]:
        assert [follower["layer"] for follower in entry["followers"]] == [4, 5]
    # 16 positions are fewer than 32 dimensions: the means that it was fitted to are met exactly.
    for follower in found["variants"][0]["followers"]:
        assert follower["fit"]["means"]["left_percent"] < 1e-2
        assert follower["held_out"]["tokens"]["left_percent"] > 1
    assert found["random_left_percent"] == 0


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("plan", ("--followers", 6), "followers=6 do not fit into layers 0 to 5"),
        ("plan", (), "give one of the two"),
        ("sweep", ("--followers", 6), "followers=6 do not fit into the model's 6 layers"),
        ("sweep", ("--superblock-size", 7), "superblock_size=7"),
        ("sweep", ("--vary", "depth"), "vary='depth' is not known"),
        ("depth", ("--superblocks", "3-9"), "names layer 9"),
        ("depth", ("--superblocks", "3:5"), "'3:5' is not a range"),
        ("depth", ("--max-dropped", 3, "--superblock-size", 3), "max_dropped=3 is outside 0 to 2"),
        ("similarity", ("--dtype", "int8"), "dtype='int8' is not known"),
        ("similarity", ("--device", "cuda:77"), "device='cuda:77' is not available"),
        ("similarity", ("--plot", "figure.xyz"), "ends in no known format"),
        ("similarity", ("--length", 5000), "holds 0 pieces of length=5000"),
        ("similarity", ("--attn", "magic"), "magic"),
    ],
)
def test_bad_input_ends_in_one_sentence(workplace, command, arguments, message):
    common = ("--model", workplace / "model", "--dataset", workplace / "book.txt", "--length", 16, "--sequences", 4)
    check_refused(analyze(command, *common, *arguments), message)


@pytest.mark.parametrize("command", RUNS)
@pytest.mark.parametrize("option", ["output", "plot"])
def test_a_file_that_cannot_be_written_is_refused_before_the_model_is_loaded(workplace, tmp_path, command, option):
    required = ("--followers", 2) if command == "plan" else ()
    (tmp_path / "folder.svg").mkdir()
    for path, why in (
        (tmp_path / "folder.svg", f"is a folder; name a file, such as '{tmp_path / 'folder.svg' / 'results.svg'}'"),
        (workplace / "book.txt" / "new.svg", f": {workplace / 'book.txt'} is no folder that can be written to"),
    ):
        result = analyze(command, "--model", "no/such-model", *required, f"--{option}", path)
        check_refused(result, f"{option}='{path}'")
        check_refused(result, why)


def test_a_table_is_printed_though_its_result_cannot_be_written(workplace, tmp_path, monkeypatch):
    def full(self, path):
        raise OSError("no space left")

    monkeypatch.setattr(Record, "save", full)
    common = ("--model", workplace / "model", "--dataset", workplace / "book.txt", "--length", 16, "--sequences", 4)
    result = analyze("similarity", *common, "--output", tmp_path / "result.json")
    check_refused(result, "no space left")
    assert "averages over heads" in " ".join(result.stdout.split())


@pytest.mark.parametrize("command", RUNS)
def test_an_unknown_model_ends_in_one_sentence(workplace, command):
    required = ("--followers", 2) if command == "plan" else ()
    result = analyze(command, "--model", "no/such-model", "--dataset", workplace / "book.txt", *required)
    check_refused(result, "model='no/such-model' is no checkpoint that can be read")


@pytest.mark.parametrize(
    ("data", "message"), [("empty.txt", "holds 0 pieces"), ("missing.txt", "there is no such file")]
)
@pytest.mark.parametrize("command", RUNS)
def test_data_that_are_empty_or_missing_end_in_one_sentence(workplace, command, data, message):
    required = ("--followers", 2) if command == "plan" else ()
    result = analyze(command, "--model", workplace / "model", "--dataset", workplace / data, *required)
    check_refused(result, message)


def test_a_file_that_is_no_result_cannot_be_shown(workplace):
    result = analyze("show", workplace / "rows.jsonl")
    check_refused(result, "rows.jsonl is no result of an analysis")


@pytest.mark.parametrize("option", [(), ("--markdown",), ("--plot", "again.svg")], ids=str)
@pytest.mark.parametrize("command", RUNS)
def test_a_result_that_lacks_contents_cannot_be_shown(results, tmp_path, monkeypatch, command, option):
    monkeypatch.chdir(tmp_path)
    whole = results[command][0]
    strange = dict.fromkeys(whole["results"], 5)
    for lacking in (whole | {"results": {}}, whole | {"results": None}, whole | {"results": strange}):
        (tmp_path / "lacking.json").write_text(json.dumps(lacking))
        check_refused(analyze("show", "lacking.json", *option), "lacking.json is no result of an analysis")
    assert not (tmp_path / "again.svg").exists()


@pytest.mark.parametrize("lost", ["environment", "settings", "data"])
def test_a_result_that_lacks_its_conditions_cannot_be_shown(results, tmp_path, lost):
    (tmp_path / "lacking.json").write_text(json.dumps(results["similarity"][0] | {lost: {}}))
    check_refused(analyze("show", tmp_path / "lacking.json"), "lacking.json is no result of an analysis")


def check_refused(result, message: str) -> None:
    assert result.exit_code == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.output
