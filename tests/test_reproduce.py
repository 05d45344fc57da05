"""The paper's tables on a model of one's own: the right rows, the same steps for all, one file each."""

import dataclasses
import json
import shutil
from functools import partial
from queue import Queue
from unittest.mock import Mock

import pytest
from recipe_runs import flags, write_inputs
from row_stand_in import write_row
from typer.testing import CliRunner

from peft_uniattn.cli import app
from peft_uniattn.grouping import choose
from peft_uniattn.grouping.losses import LossCosts
from peft_uniattn.plan import make_plan
from peft_uniattn.reproduce import TABLES, Findings, Reproduction, cells, findings
from peft_uniattn.reproduce import cell as row
from peft_uniattn.reproduce.cell import CellResult, Evaluation, accuracies, steps_of
from peft_uniattn.reproduce.matrix import Cell
from peft_uniattn.reproduce.side_by_side import run_apart, side_by_side, visible_devices
from peft_uniattn.reproduce.table import spread, table
from peft_uniattn.training.arguments import parse_arguments
from peft_uniattn.training.data import load_data
from peft_uniattn.training.loading import load_tokenizer

# Layers 8 to 15 of 16: Superblocks [8-11] [12-15]; the upper a layer, the less its attention does.
FOUND = Findings(
    make_plan(16),
    half=make_plan(16, start_layer=12),
    similarity=[layer / 16 for layer in range(16)],
    by_error={3: [[0, 1], [4, 5, 6]], 6: [[0, 1, 2, 3], [4, 5, 6, 7]]},
    by_similarity={3: [[2, 3, 4, 5]], 6: [[2, 3, 4, 5], [6, 7, 8, 9]]},
)


def rows(name):
    return {cell.name: cell for cell in cells(name, FOUND)}


def flag(cell, name):
    return cell.flags[cell.flags.index(f"--{name}") + 1]


def test_the_main_table_has_the_rows_of_table_1():
    assert list(rows("main")) == [
        *("pre-trained", "post-train", "llmdrop-half", "llmdrop-full", "cla-half", "cla-full"),
        *("uniattn-half", "uniattn"),
    ]


def test_rivals_work_on_half_and_on_all_of_the_layers():
    main = rows("main")
    assert flag(main["llmdrop-half"], "dropped_layers") == "15,14,13"
    assert flag(main["llmdrop-full"], "dropped_layers") == "15,14,13,12,11,10"
    assert flag(main["cla-half"], "superblocks") == "12-15"
    assert flag(main["cla-full"], "superblocks") == "8-11,12-15"


def test_rows_take_turns_on_a_device_also_after_one_that_fails_which_is_named(tmp_path):
    devices = Queue()
    devices.put("3")
    with pytest.raises(RuntimeError, match="row 'broken' with seed 0 failed"):
        run_apart(devices, 1, partial(write_row, tmp_path), (Cell("broken"),), 0)
    assert run_apart(devices, 1, partial(write_row, tmp_path), (Cell("second"),), 0) == "second on 3"
    assert devices.qsize() == 1


@pytest.mark.parametrize(
    ("given", "count", "names"),
    [(None, 2, ["0", "1"]), ("1", 1, ["1"]), ("2, GPU-7f", 2, ["2", "GPU-7f"]), ("3,9", 1, ["3"]), ("", 0, [""])],
)
def test_rows_keep_to_the_gpus_that_the_command_was_given(monkeypatch, given, count, names):
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_devices() == names


@pytest.fixture
def tried(monkeypatch):
    """Rows in the order in which they are tried, and beside how many; those named so fail once or always."""
    seen = []

    def run_here(devices, jobs, run, group, seed):
        (cell,) = group
        seen.append((cell.name, jobs))
        if cell.name == "broken" or (cell.name == "crowded" and jobs > 1):
            raise RuntimeError(f"row {cell.name!r} with seed {seed} failed")
        return cell.name

    monkeypatch.setattr("peft_uniattn.reproduce.side_by_side.run_apart", run_here)
    return seen


def test_a_row_that_fails_beside_others_is_tried_again_alone(tried):
    results = list(side_by_side([((Cell(name),), 0) for name in ("crowded", "first")], None, 2))
    assert results == ["first", "crowded"]
    assert sorted(tried[:2]) == [("crowded", 2), ("first", 2)]
    assert tried[2:] == [("crowded", 1)]


def test_a_row_that_fails_twice_stops_no_other_and_is_named(tried):
    rows = side_by_side([((Cell(name),), 0) for name in ("broken", "crowded", "first")], None, 2)
    assert [next(rows), next(rows)] == ["first", "crowded"]
    with pytest.raises(RuntimeError, match=r"row 'broken' with seed 0 failed.* again.* remove broken-0 in"):
        next(rows)


def test_the_ablation_has_the_rows_of_table_2():
    ablation = rows("ablation")
    assert {name: cell.stages for name, cell in ablation.items()} == {
        "post-train": ("none",),
        "no-compensation": ("stage2",),
        "zero-init": ("stage2",),
        "calibrated": ("calibrate", "stage2"),
        "two-stage": ("calibrate", "stage1", "stage2"),
    }


def test_groupings_are_compared_at_equal_numbers_of_followers():
    grouping = rows("grouping")
    assert flag(grouping["fixed-3"], "superblocks") == "12-15"
    assert flag(grouping["similarity-3"], "superblocks") == "2-5"
    assert flag(grouping["error-3"], "superblocks") == "0-1,4-6"
    assert flag(grouping["fixed-6"], "superblocks") == "8-11,12-15"


def test_the_number_of_superblocks_grows_from_the_top_down():
    assert [flag(cell, "superblocks") for cell in cells("number", FOUND)] == [
        *("12-15", "8-11,12-15", "4-7,8-11,12-15", "0-3,4-7,8-11,12-15"),
    ]


def test_sizes_keep_the_number_of_followers():
    assert [(cell.name, flag(cell, "superblocks")) for cell in cells("size", FOUND)] == [
        ("size-2", "4-5,6-7,8-9,10-11,12-13,14-15"),
        ("size-3", "7-9,10-12,13-15"),
        ("size-4", "8-11,12-15"),
        ("size-5", "11-15"),
        ("size-7", "9-15"),
    ]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("given", [[], ["--superblocks", "8-11,12-15"]], ids=["default plan", "explicit one"])
def test_the_recipe_takes_the_flags_of_every_row(name, given, tmp_path):
    for cell in cells(name, FOUND):
        stages = ["--stages", ",".join(cell.stages)] if cell.stages else []
        parse_arguments(
            [*given, *cell.flags, *stages, "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
        )


@pytest.fixture
def argv(tmp_path):
    inputs = write_inputs(tmp_path)
    given = flags(inputs, tmp_path / "unused", max_steps=6, calibration_examples=6)
    # The paper's prompt, which the evaluation asks with; `output_dir` is reproduce's own.
    return [*given[: given.index("--output_dir")], "--prompt_style", "paper", "--max_length", "48"]


def test_every_row_gets_the_same_number_of_steps(argv, tmp_path):
    shared = parse_arguments([*argv, "--output_dir", str(tmp_path)])
    main = rows("main")
    assert steps_of(main["uniattn"], shared, 1 / 3) == {"calibrate": 2, "stage1": 2, "stage2": 2}
    assert steps_of(main["cla-full"], shared, 1 / 3) == {"stage2": 6}
    assert steps_of(main["post-train"], shared, 1 / 3) == {"plain": 6}
    assert steps_of(main["pre-trained"], shared, 1 / 3) == {}


def test_without_a_share_for_it_stage_1_is_left_out(argv, tmp_path):
    shared = parse_arguments([*argv, "--output_dir", str(tmp_path)])
    assert steps_of(rows("main")["uniattn"], shared, 0.0) == {"calibrate": 2, "stage2": 4}


def test_too_few_steps_are_refused(argv, tmp_path):
    shared = parse_arguments([*argv, "--output_dir", str(tmp_path), "--max_steps", "3"])
    with pytest.raises(ValueError, match="max_steps=3 is used up before stage 2"):
        steps_of(rows("main")["uniattn"], shared, 0.5)


def test_a_missing_number_of_steps_is_refused(argv, tmp_path):
    shared = parse_arguments([*argv, "--output_dir", str(tmp_path), "--max_steps", "-1"])
    with pytest.raises(ValueError, match="same number of steps; say how many"):
        steps_of(rows("main")["uniattn"], shared, 0.5)


def test_cloze_tasks_count_by_length_normalised_likelihood():
    metrics = {"acc,none": 0.25, "acc_norm,none": 0.5}
    found = accuracies({"results": {"a_cloze": metrics, "b": metrics, "a_group": {"alias": "a"}}})
    assert found == {"a_cloze": 50.0, "b": 25.0}


def test_a_group_of_tasks_does_not_count_beside_its_members():
    metrics = {"group": {"acc,none": 0.6}, "a": {"acc,none": 1.0}, "b": {"acc,none": 0.5}}
    assert accuracies({"results": metrics, "groups": {"group": {"acc,none": 0.6}}}) == {"a": 100.0, "b": 50.0}


def result(cell, seed, accuracy, kv_bytes, loss=None):
    losses = {} if loss is None else {"base": 9.0, "after stage 2": loss}
    return CellResult(cell, seed, accuracy, kv_bytes, losses, {"stage2": 5}, 1.0, [], {"device": "d", "torch": "2"})


def test_a_table_shows_mean_and_deviation_over_seeds():
    shown = table(
        [
            result("pre-trained", 0, {"a": 50.0, "b": 40.0}, 2000),
            result("ours", 0, {"a": 52.0, "b": 44.0}, 1500, 2.0),
            result("ours", 1, {"a": 54.0, "b": 46.0}, 1500, 3.0),
        ]
    ).splitlines()
    assert shown[2] == "| pre-trained | 2,000 (100.0 %) | – | 50.0 | 40.0 | 45.0 | – | – | – | 1 |"
    mean = "53.0 ± 1.4 | 45.0 ± 1.4 | 49.0 ± 1.4 | 1.0 | – | 2.500 ± 0.707"
    assert shown[3] == f"| ours | 1,500 (75.0 %) | – | {mean} | 2 |"


def test_bytes_are_no_share_of_rows_that_share_too():
    assert table([result("uniattn", 0, {"a": 52.0}, 1500)]).splitlines()[2].startswith("| uniattn | 1,500 | – |")


def test_rows_that_were_asked_other_things_are_not_tabulated():
    with pytest.raises(ValueError, match=r"b was asked \['y'\]"):
        table([result("a", 0, {"x": 1.0}, 1), result("b", 0, {"y": 1.0}, 1)])


def test_a_single_value_has_no_deviation():
    assert spread([1.25]) == "1.2"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tables": ("main", "other")}, r"tables=\['main', 'other'\] must be some of main"),
        ({"seeds": ()}, "seeds is empty"),
        ({"seeds": (0, 1, 0)}, r"seeds=\[0, 1, 0\] names one twice"),
        ({"stage1_share": 1.0}, r"stage1_share=1.0 must lie between"),
        ({"grouping": "random"}, "grouping='random' must be one of fixed, error"),
        ({"grouping_model": "other"}, "grouping_model='other' has no use with grouping='fixed'"),
        ({"jobs": 0}, "jobs=0"),
    ],
)
def test_what_cannot_be_run_is_refused(changes, words, tmp_path):
    arguments = {"tables": ("main",), "seeds": (0,), **changes}
    with pytest.raises(ValueError, match=words):
        Reproduction(tmp_path, (), evaluation=Evaluation(("social_iqa_cloze",)), **arguments)


def write_questions(directory):
    """Six questions of SIQA that the tiny tokenizer knows the words of."""
    directory.mkdir()
    questions = [
        {
            "context": f"w{number} w5 w6",
            "question": "w7 w8 w9 w1 w3 w2",
            "answerA": f"w{number}",
            "answerB": f"w{number + 1}",
            "answerC": f"w{number + 2}",
            "correct": "ABC"[number % 3],
        }
        for number in range(6)
    ]
    (directory / "socialIQa_v1.4_dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return directory


@pytest.fixture
def data_dir(tmp_path):
    return write_questions(tmp_path / "data")


def test_superblocks_by_loss_are_measured_once_on_the_model_that_is_named(tmp_path, data_dir, argv, monkeypatch):
    shared = parse_arguments([*argv, "--output_dir", str(tmp_path / "out")])
    other = shutil.copytree(shared.model.model_name_or_path, tmp_path / "post-trained")
    asked = []
    cheap = {(0, 1): 0.2, (0, 2): 0.3, (0, 3): 0.4, (4, 5): 0.1}

    def measure(model, decoder, dataloader, *, layers, max_size, **options):
        asked.append(model.config._name_or_path)
        assert all((batch["labels"] != -100).any() for batch in dataloader)
        losses = {}
        for leader in layers:
            loss = 1.0
            for layer in range(leader + 1, min(leader + max_size, layers.stop)):
                losses[leader, layer] = loss = loss + cheap.get((leader, layer), 9.0)
        return LossCosts(1.0, losses, tokens=1)

    monkeypatch.setattr("peft_uniattn.grouping.choose.measure_losses", measure)
    evaluation = Evaluation(("social_iqa_cloze",), str(data_dir))
    options = {
        "tables": ("main",),
        "evaluation": evaluation,
        "seeds": (0,),
        "grouping": "loss",
        "grouping_model": str(other),
    }
    found = findings.find(shared, tmp_path / "findings.json", **options)
    assert asked == [str(other)]
    # 4 followers and 2.
    assert found.plan.superblocks == ((0, 1, 2, 3), (4, 5))
    assert found.half.superblocks == ((0, 1), (4, 5))
    assert found.given.superblocks == ((0, 1, 2), (3, 4, 5))


def test_groupings_of_every_number_of_followers_are_measured_once_each(tmp_path, data_dir, argv, monkeypatch):
    argv = [*argv, "--superblock_size", "2", "--output_dir", str(tmp_path / "out")]
    measures = {name: Mock(wraps=getattr(choose, name)) for name in ("measure_costs", "softmax_similarity")}
    for name, measure in measures.items():
        monkeypatch.setattr(choose, name, measure)
    evaluation = Evaluation(("social_iqa_cloze",), str(data_dir))
    options = {"tables": ("grouping",), "evaluation": evaluation, "seeds": (0,)}
    found = findings.find(parse_arguments(argv), tmp_path / "findings.json", **options)
    assert [measure.call_count for measure in measures.values()] == [1, 1]
    for chosen in (found.by_error, found.by_similarity):
        followers = {number: sum(len(block) - 1 for block in blocks) for number, blocks in chosen.items()}
        assert followers == {1: 1, 2: 2, 3: 3}


def write_training_data(folder, last):
    """Twenty other questions and `last`, as what `argv` trains on."""
    before = [{"question": f"w{number} w1", "answer": "w2"} for number in range(20)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*before, last]))


def test_a_table_that_is_asked_for_later_finds_its_superblocks(tmp_path, data_dir, argv, monkeypatch):
    shared = parse_arguments([*argv, "--superblocks", "2-3,4-5", "--output_dir", str(tmp_path / "out")])
    evaluation, path = Evaluation(("social_iqa_cloze",), str(data_dir)), tmp_path / "findings.json"
    first = findings.find(shared, path, tables=("main",), evaluation=evaluation, seeds=(0,))
    assert first.by_error == first.by_similarity == {}
    later = findings.find(shared, path, tables=("main", "grouping"), evaluation=evaluation, seeds=(0,))
    assert dataclasses.replace(later, by_error={}, by_similarity={}) == first
    for chosen in (later.by_error, later.by_similarity):
        assert {number: sum(len(block) - 1 for block in blocks) for number, blocks in chosen.items()} == {1: 1, 2: 2}
    monkeypatch.setattr(findings, "load_model", None)
    assert findings.find(shared, path, tables=("grouping",), evaluation=evaluation, seeds=(0,)) == later


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grouping": "loss"}, r"grouping='loss' \(was 'fixed'\)"),
        ({"superblocks": "0-1"}, r"superblocks='0-1' \(was '2-3,4-5'\)"),
        ({"dataset_name": "other.jsonl"}, r"dataset_name=\['other.jsonl'\] \(was \['data.jsonl'\]\)"),
    ],
    ids=["grouping", "superblocks", "data"],
)
def test_superblocks_found_for_something_else_are_refused(change, words, tmp_path, data_dir, argv):
    shutil.copy(tmp_path / "data.jsonl", tmp_path / "other.jsonl")
    options = {"tables": ("main",), "evaluation": Evaluation(("social_iqa_cloze",), str(data_dir)), "seeds": (0,)}
    flags = [*argv, "--superblocks", "2-3,4-5", "--output_dir", str(tmp_path / "out")]
    path = tmp_path / "findings.json"
    found = findings.find(parse_arguments(flags), path, **options)
    assert findings.find(parse_arguments([*flags, "--calibration_examples", "4"]), path, **options) == found
    options |= {name: change.pop(name) for name in ("grouping",) if name in change}
    more = [
        word for name, value in change.items() for word in (f"--{name}", value.replace("other", f"{tmp_path}/other"))
    ]
    with pytest.raises(ValueError, match=f"findings.json was made with other settings: {words}"):
        findings.find(parse_arguments([*flags, *more]), path, **options)


@pytest.mark.parametrize("sampling", [("--test_size", "12"), ("--test_size", "0", "--max_rows", "8")], ids=" ".join)
def test_a_question_that_only_one_seed_leaves_out_is_found(sampling, tmp_path, data_dir, argv):
    words = "w0 w5 w6 w7 w8 w9 w1 w3 w4"
    write_training_data(tmp_path, {"question": words, "answer": "w0"})
    question = {"stem": words, "choices": [{"label": "A", "text": "w0"}]}
    (data_dir / "dev_rand_split.jsonl").write_text(json.dumps({"question": question, "answerKey": "A"}) + "\n")
    evaluation = Evaluation(("commonsense_qa_cloze",), str(data_dir))
    flags = [*argv, *sampling, "--output_dir", str(tmp_path / "out")]
    held = {seed: words in trained_with(parse_arguments([*flags, "--seed", str(seed)])) for seed in range(8)}
    without, with_it = (next(seed for seed in held if held[seed] is kept) for kept in (False, True))
    shared = parse_arguments([*flags, "--seed", str(without)])
    with pytest.raises(ValueError, match="hold questions of the evaluation set commonsense_qa_cloze"):
        findings.find(
            shared, tmp_path / "findings.json", tables=("main",), evaluation=evaluation, seeds=(without, with_it)
        )


def test_data_that_an_earlier_release_searched_are_searched_again(tmp_path, data_dir, argv):
    """It had searched what one seed trains on, and not what others do."""
    shared = parse_arguments([*argv, "--output_dir", str(tmp_path / "out")])
    options = {"tables": ("main",), "evaluation": Evaluation(("social_iqa_cloze",), str(data_dir)), "seeds": (0,)}
    path = tmp_path / "findings.json"
    findings.find(shared, path, **options)
    content = json.loads(path.read_text())
    del content["told"], content["checked"]["data"]["rows"]
    path.write_text(json.dumps(content))
    asked = json.loads((data_dir / "socialIQa_v1.4_dev.jsonl").read_text().splitlines()[0])
    words = f"{asked['context']} {asked['question']}"
    write_training_data(tmp_path, {"question": words, "answer": "w0"})
    with pytest.raises(ValueError, match="hold questions of the evaluation set social_iqa_cloze"):
        findings.find(shared, path, **options)


def trained_with(arguments):
    """All training texts of a run as one."""
    tokenizer = load_tokenizer(arguments.model, arguments.training)
    data = load_data(arguments.data, tokenizer, max_length=arguments.training.max_length, seed=arguments.training.seed)
    return "\n".join(tokenizer.decode(row["input_ids"]) for row in data.train)


def test_other_questions_are_looked_for_in_data_that_were_searched_before(tmp_path, data_dir, argv):
    words = "w0 w5 w6 w7 w8 w9 w1 w3 w4"
    write_training_data(tmp_path, {"question": words, "answer": "w0"})
    question = {"stem": words, "choices": [{"label": "A", "text": "w0"}]}
    (data_dir / "dev_rand_split.jsonl").write_text(json.dumps({"question": question, "answerKey": "A"}) + "\n")
    shared = parse_arguments([*argv, "--test_size", "0", "--output_dir", str(tmp_path / "out")])
    options = {"path": tmp_path / "findings.json", "tables": ("main",), "seeds": (0,)}
    findings.find(shared, evaluation=Evaluation(("social_iqa_cloze",), str(data_dir)), **options)
    with pytest.raises(ValueError, match="hold questions of the evaluation set commonsense_qa_cloze"):
        findings.find(shared, evaluation=Evaluation(("commonsense_qa_cloze",), str(data_dir)), **options)


def reproduced(tmp_path, data_dir, argv, *more):
    # A word is a token of the tiny tokenizer, and the paper's prompt puts nothing between itself and the answer.
    asked = ["--tasks", "social_iqa_cloze", "--prompt", "official", "--data-dir", str(data_dir)]
    return CliRunner().invoke(app, ["reproduce", "--output-dir", str(tmp_path / "out"), *asked, *more, *argv])


@pytest.mark.slow
def test_every_row_of_the_main_table_is_trained_evaluated_and_kept(tmp_path, data_dir, argv):
    first = reproduced(tmp_path, data_dir, argv, "--seeds", "0,1")
    assert first.exit_code == 0, first.output
    results = {path.stem: CellResult.read(path) for path in (tmp_path / "out").glob("*-[01].json")}
    assert len(results) == 1 + 2 * 7
    assert {len(found.accuracy) for found in results.values()} == {1}
    # 6 layers, Superblocks [0-2] [3-5]: UniAttn keeps 4 halves less, CLA-full 4 layers less.
    whole = results["pre-trained-0"].kv_bytes
    assert results["uniattn-0"].kv_bytes == whole * 2 // 3
    assert results["cla-full-0"].kv_bytes == results["llmdrop-full-0"].kv_bytes == whole // 3
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert (tmp_path / "out" / "table.md").exists()
    assert (tmp_path / "out" / "accuracy.svg").exists()


def test_evaluation_questions_in_training_data_stop_everything(tmp_path, data_dir, argv):
    write_training_data(tmp_path, {"question": "w0 w5 w6 w7 w8 w9 w1 w3 w2", "answer": "w0"})
    outcome = reproduced(tmp_path, data_dir, [*argv, "--test_size", "0"])
    assert outcome.exit_code == 1
    assert "hold questions of the evaluation set social_iqa_cloze" in outcome.output
    assert not list((tmp_path / "out").glob("*-0.json"))


def test_only_the_rows_that_are_named_are_run(tmp_path, data_dir, argv):
    outcome = reproduced(tmp_path, data_dir, argv, "--rows", "pre-trained")
    assert outcome.exit_code == 0, outcome.output
    assert [path.name for path in (tmp_path / "out").glob("*-0.json")] == ["pre-trained-0.json"]


def test_finished_rows_are_read_without_processes_of_their_own(tmp_path, data_dir, argv, monkeypatch):
    reproduced(tmp_path, data_dir, argv, "--rows", "pre-trained")
    left = Mock(return_value=iter(()))
    monkeypatch.setattr("peft_uniattn.reproduce.run.side_by_side", left)
    outcome = reproduced(tmp_path, data_dir, argv, "--rows", "pre-trained", "--jobs", "2")
    assert outcome.exit_code == 0, outcome.output
    assert left.call_args.args[0] == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--rows", "pre-trained,uniatn"), "'uniatn' must be one of pre-trained, post-train, llmdrop-half"),
        (("--rows", "uniattn", "--max_steps", "2"), "max_steps=2 is used up before stage 2"),
        (("--tables", "size", "--max_steps", "2"), "max_steps=2 is used up before stage 2"),
        (("--rank", "4"), "rank=4 is of UniAttn's compensation"),
        (("--adapter", "trained"), "adapter='trained' would give some rows a start that others have not"),
        (("--compare_with_base", "true"), "compare_with_base=True would train the base beside every row"),
        (
            ("--stage1_early_stop", "train_loss"),
            "stage1_early_stop='train_loss' would leave 'uniattn-half' with fewer",
        ),
    ],
)
def test_rows_and_steps_that_cannot_be_are_refused_before_anything_is_measured(flags, words, tmp_path, data_dir, argv):
    outcome = reproduced(tmp_path, data_dir, [*argv, *flags])
    assert outcome.exit_code == 1
    assert words in " ".join(outcome.output.split())
    assert not (tmp_path / "out" / "findings.json").exists()


def test_a_row_that_no_table_turns_out_to_have_is_refused_by_name(tmp_path, data_dir, argv):
    outcome = reproduced(tmp_path, data_dir, argv, "--tables", "number", "--rows", "number-40")
    assert outcome.exit_code == 1
    assert "'number-40' must be one of number-1" in " ".join(outcome.output.split())


def test_a_device_gets_back_what_training_kept_on_it_before_a_row_is_evaluated(tmp_path, data_dir, argv, monkeypatch):
    load, events = row.load_for_evaluation, []
    monkeypatch.setattr(row, "clear_device_cache", lambda **options: events.append("cleared"))
    monkeypatch.setattr(row, "load_for_evaluation", lambda *args, **kw: events.append("loaded") or load(*args, **kw))
    reproduced(tmp_path, data_dir, argv, "--rows", "post-train")
    assert events == ["cleared", "loaded", "cleared"]
