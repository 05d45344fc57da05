"""What a row states beyond its accuracy: cache under H2O, time to the first token, curves, differences; in a file."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import tiny_adapter, tiny_model
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from recipe_runs import flags, write_inputs
from test_reproduce import FOUND, flag, result, rows, write_questions

from peft_uniattn import to_standalone
from peft_uniattn.plan import make_plan
from peft_uniattn.reproduce import TABLES, Reproduction, cells
from peft_uniattn.reproduce.cell import CellResult, Evaluation, read_config, steps_of, training_of
from peft_uniattn.reproduce.curves import read_curves
from peft_uniattn.reproduce.findings import _read
from peft_uniattn.reproduce.held import measure_kv_bytes
from peft_uniattn.reproduce.plot import _show_the_end, plot_curves, plot_sweeps
from peft_uniattn.reproduce.record import Record, short, write_record
from peft_uniattn.reproduce.same import check_same
from peft_uniattn.reproduce.table import difference, notes, standard_error, table
from peft_uniattn.reproduce.ttft import Prompts
from peft_uniattn.training.arguments import parse_arguments
from peft_uniattn.training.two_stage import TwoStageRun


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    given = flags(write_inputs(directory), directory, max_steps=6, calibration_examples=6)
    more = {"prompt_style": "paper", "max_length": 48, "eval_strategy": "steps", "eval_steps": 2}
    return [*given[: given.index("--output_dir")], *(part for key in more for part in (f"--{key}", str(more[key])))]


@pytest.fixture(scope="module")
def shared(argv, tmp_path_factory):
    return parse_arguments([*argv, "--output_dir", str(tmp_path_factory.mktemp("shared"))])


def test_h2o_has_the_rates_of_table_3_on_both_models():
    assert {name: cell.h2o_budget for name, cell in rows("h2o").items()} == {
        "post-train": None,
        **{f"post-train+h2o-{evicted}": (100 - evicted) / 100 for evicted in (20, 40, 60)},
        "uniattn": None,
        **{f"uniattn+h2o-{evicted}": (100 - evicted) / 100 for evicted in (20, 40, 60)},
    }


def test_rows_under_h2o_need_no_training_of_their_own(shared):
    trainings = {training_of(cell, shared, 0.2) for cell in cells("h2o", FOUND)}
    assert len(trainings) == 2


def test_without_a_share_for_stage_1_the_row_that_asks_what_it_brings_still_has_it(shared):
    ablation = rows("ablation")
    assert "stage1" not in steps_of(rows("main")["uniattn"], shared, 0.0)
    assert steps_of(ablation["two-stage"], shared, 0.0) == {"calibrate": 2, "stage1": 1, "stage2": 3}
    # What remains of UniAttn's own row is then the calibrated one, and is trained once.
    assert training_of(rows("main")["uniattn"], shared, 0.0) == training_of(ablation["calibrated"], shared, 0.0)


def test_with_a_share_for_stage_1_uniattn_is_the_two_stage_row(shared):
    assert training_of(rows("main")["uniattn"], shared, 0.2) == training_of(rows("ablation")["two-stage"], shared, 0.2)


CHOSEN = dataclasses.replace(
    FOUND, plan=dataclasses.replace(FOUND.plan, superblocks=((1, 2), (5, 6, 7))), given=FOUND.plan
)


@pytest.mark.parametrize("name", ["main", "ablation", "h2o"])
def test_chosen_superblocks_are_those_of_uniattn(name):
    chosen = {cell.name: cell for cell in cells(name, CHOSEN)}
    assert flag(chosen["calibrated" if name == "ablation" else "uniattn"], "superblocks") == "1-2,5-7"


@pytest.mark.parametrize("name", ["grouping", "number", "size"])
def test_tables_about_fixed_superblocks_take_those_that_were_given(name):
    assert cells(name, CHOSEN) == cells(name, FOUND)


@pytest.mark.parametrize("found", [FOUND, CHOSEN])
def test_findings_are_read_as_they_were_written(found, tmp_path):
    path = tmp_path / "findings.json"
    path.write_text(json.dumps(dataclasses.asdict(found)))
    assert _read(path) == (found, None, None)


def test_findings_of_an_earlier_release_are_read(tmp_path):
    content = dataclasses.asdict(FOUND)
    del content["given"]
    path = tmp_path / "findings.json"
    path.write_text(json.dumps(content))
    assert _read(path) == (FOUND, None, None)


@pytest.mark.parametrize("kind", ["base", "standalone"])
def test_bytes_that_h2o_holds_are_its_share(kind):
    model = tiny_model(dtype=torch.float32)
    halves = 12  # of keys and of values, in 6 layers
    if kind == "standalone":
        model, halves = to_standalone(tiny_adapter(model, superblocks=[[1, 2, 3], [4, 5]])), 9
    per_half = 2 * 8 * 4  # key/value heads, head_dim, bytes
    assert measure_kv_bytes(model) == (halves * per_half, 128)
    assert measure_kv_bytes(model, h2o_budget=0.25) == (halves * per_half // 4, 128)


def test_a_result_of_an_earlier_release_is_read(tmp_path):
    path = tmp_path / "row-0.json"
    new = {"kv_tokens", "h2o_budget", "curves", "ttft_ms", "ttft_base_ms", "ttft_conditions"}
    content = dataclasses.asdict(result("row", 0, {"a": 50.0}, 2000))
    path.write_text(json.dumps({name: value for name, value in content.items() if name not in new}))
    assert CellResult.read(path).ttft_ms is None
    assert table([CellResult.read(path)]).splitlines()[2].startswith("| row | 2,000 | – | 50.0 |")


def test_the_difference_is_taken_seed_by_seed():
    base = [result("post-train", seed, {"a": accuracy}, 1) for seed, accuracy in enumerate((40.0, 50.0, 90.0))]
    ours = [result("ours", seed, {"a": accuracy}, 1) for seed, accuracy in enumerate((39.0, 47.0))]
    # -1 and -3: mean -2, standard deviation sqrt(2), standard error 1. The third seed has no partner.
    assert difference(ours, base) == "−2.0 ± 1.0"
    assert difference(ours[:1], base) == "−1.0"
    assert difference(ours, []) == "–"


def test_the_standard_error_is_the_deviation_by_the_root_of_the_number():
    assert standard_error([1.0, 3.0, 5.0, 7.0], digits=3) == "1.291"  # sqrt(20 / 3) / 2
    assert standard_error([1.0]) == "–"


def test_a_time_stands_beside_its_ratio_to_the_base():
    conditions = {"prompts": 2, "tokens": 1024, "dtype": "float32", "rounds": 3, "device": "NVIDIA X"}
    timed = dataclasses.replace(
        result("row", 0, {"a": 1.0}, 1), ttft_ms=9.0, ttft_base_ms=10.0, ttft_conditions=conditions
    )
    assert "| 9.0 (0.90×) |" in table([timed])
    assert "median of 3 prefills of 2 x 1,024 tokens in float32 on NVIDIA X" in notes([timed])


def test_curves_count_steps_from_the_first_stage(tmp_path):
    journal = tmp_path / "journal.json"
    log = [{"loss": 3.0, "step": 1}, {"eval_loss": 2.5, "step": 2}, {"train_loss": 2.8, "step": 2}]
    steps = {"calibration": {"loss": 4.0}, "stage 1": {"loss": 3.5, "log": log}, "stage 2": {"loss": 2.0, "log": log}}
    journal.write_text(json.dumps({"results": {"base": {"loss": 9.0}, **steps}}))
    assert read_curves(journal, {"calibrate": 20, "stage1": 2, "stage2": 5}) == {
        "training": [(21, 3.0), (23, 3.0)],
        "evaluations": [(22, 2.5), (24, 2.5)],
        "held-out": [(0, 9.0), (20, 4.0), (22, 3.5), (27, 2.0)],
    }


def test_a_picture_is_the_same_every_time(tmp_path):
    curves = {"training": [(1, 3.0), (2, 2.0)], "held-out": [(0, 9.0), (2, 2.0)]}
    drawn = [dataclasses.replace(result("row", seed, {"a": 1.0}, 1), curves=curves) for seed in (0, 1)]
    for name in ("first.svg", "second.svg"):
        plot_curves(drawn, tmp_path / name, caption="conditions")
    assert (tmp_path / "first.svg").read_text() == (tmp_path / "second.svg").read_text()


def test_a_picture_of_losses_shows_where_they_end():
    axes = Figure().subplots()
    axes.plot([0, 10, 40], [9.0, 3.0, 2.0])
    axes.plot([0, 10, 40], [8.0, 2.8, 2.1])
    _show_the_end(axes)
    assert axes.get_ylim() == pytest.approx((1.95, 3.05))


def test_a_sweep_shows_accuracy_by_number_and_size(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(Axes, "errorbar", lambda axes, x, y, **options: drawn.setdefault(len(drawn), (x, y, options)))
    found = [
        result("post-train", 0, {"a": 60.0}, 8),
        *(result("number-2", seed, {"a": accuracy}, 6) for seed, accuracy in enumerate((50.0, 52.0))),
        result("number-1", 0, {"a": 55.0}, 7),
        result("size-13", 0, {"a": 40.0}, 6),
    ]
    plot_sweeps(found, tmp_path / "sweeps.svg", caption="")
    (numbers, accuracies, options), (sizes, _, _) = drawn.values()
    assert (numbers, accuracies, sizes) == ([1, 2], [55.0, 51.0], [13])
    assert options["yerr"] == pytest.approx([0.0, 2**0.5])


def test_a_sweep_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="number, size"):
        plot_sweeps([result("post-train", 0, {"a": 60.0}, 8)], tmp_path / "sweeps.svg", caption="")


def test_a_record_is_read_as_it_was_written_but_for_folders(tmp_path):
    results = [result("row", 0, {"a": 50.0}, 2000), result("row", 1, {"a": 52.0}, 2000)]
    results[0].flags.extend(["--data", "/home/someone/data.jsonl"])
    write_record(
        tmp_path / "results.json",
        results,
        model="/home/smol",
        command="peft-uniattn reproduce --data-dir /home/d",
        findings=FOUND,
    )
    record = Record.read(tmp_path / "results.json")
    assert record.model == "smol"
    assert record.command == "peft-uniattn reproduce --data-dir d"
    assert record.results == [dataclasses.replace(results[0], flags=["--data", "data.jsonl"]), results[1]]
    assert short("configs/a.yaml") == "configs/a.yaml"


@pytest.mark.parametrize("changes", [{"number": 0}, {"tokens": -1}, {"rounds": 0}])
def test_prompts_that_cannot_be_timed_are_refused(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}="):
        Prompts(**changes)


@pytest.fixture(scope="module")
def h2o_run(argv, tmp_path_factory):
    """UniAttn's row, and the one with 20 % evicted: folder, reproduction, results and number of trainings."""
    directory = tmp_path_factory.mktemp("h2o")
    evaluation = Evaluation(("social_iqa_cloze",), str(write_questions(directory / "data")))
    run = Reproduction(
        directory / "out",
        tuple(argv),
        tables=("h2o",),
        seeds=(0,),
        evaluation=evaluation,
        prompts=Prompts(2, 16, rounds=3),
    )
    h2o_rows = TABLES["h2o"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TABLES, "h2o", lambda found: h2o_rows(found)[4:6])
        trainings = []
        patch.setattr(
            "peft_uniattn.reproduce.cell.TwoStageRun", lambda given: trainings.append(given) or TwoStageRun(given)
        )
        results = run.run()
        yield directory / "out", run, results, len(trainings)


def test_rows_that_are_trained_alike_are_trained_once(h2o_run):
    _, _, (uniattn, compressed), trainings = h2o_run
    assert trainings == 1
    assert compressed.curves == uniattn.curves
    # Stages of 1 and 3 steps log each, and evaluate every second and the last; held out: the base and three stages.
    assert {name: len(curve) for name, curve in uniattn.curves.items()} == {
        "training": 4,
        "evaluations": 3,
        "held-out": 4,
    }


def test_h2o_holds_its_share_of_the_same_model(h2o_run):
    _, _, (uniattn, compressed), _ = h2o_run
    # Of 128 tokens 80 % are 102, and bytes are whole.
    assert compressed.kv_bytes == uniattn.kv_bytes * 102 // 128


def test_every_row_has_its_time_beside_the_bases(h2o_run):
    _, _, results, _ = h2o_run
    for found in results:
        assert found.ttft_ms > 0
        assert found.ttft_base_ms > 0
        assert found.ttft_conditions["prompts"] == 2


def test_files_of_rows_and_the_record_say_the_same(h2o_run):
    out, _, results, _ = h2o_run
    assert [CellResult.read(out / f"{found.cell}-0.json") for found in results] == results
    named = [dataclasses.replace(found, flags=list(map(short, found.flags))) for found in results]
    assert Record.read(out / "results.json").results == named


def test_no_model_is_left(h2o_run):
    out, _, _, _ = h2o_run
    assert {path.name for path in out.iterdir()} == {
        *("findings.json", "results.json", "table.md", "accuracy.svg", "curves.svg"),
        *("uniattn-0.json", "uniattn+h2o-20-0.json"),
    }


def test_a_run_that_is_stopped_leaves_its_finished_rows_in_one_file(h2o_run, monkeypatch):
    out, run, results, _ = h2o_run
    whole = (out / "results.json").read_text()
    monkeypatch.setattr(Reproduction, "_timed", None)  # whatever comes after the rows fails
    (out / "results.json").unlink()
    with pytest.raises(TypeError):
        run.run()
    assert [found.cell for found in Record.read(out / "results.json").results] == [found.cell for found in results]
    (out / "results.json").write_text(whole)


def test_what_is_there_is_not_run_again(h2o_run, monkeypatch):
    _, run, results, _ = h2o_run
    monkeypatch.setattr("peft_uniattn.reproduce.cell.TwoStageRun", None)
    monkeypatch.setattr("peft_uniattn.reproduce.run.measure_ttft", None)
    assert run.run() == results


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"argv": ["--max_steps", "7"]}, r"max_steps=4 \(was 3\)"),
        ({"limit": 3}, r"limit=3 \(was None\)"),
    ],
)
def test_a_row_with_other_settings_is_refused_before_anything_is_run(h2o_run, changes, words, monkeypatch):
    _, run, _, _ = h2o_run
    argv = (*run.argv, *changes.pop("argv", ()))
    monkeypatch.setattr("peft_uniattn.reproduce.cell.TwoStageRun", None)
    other = dataclasses.replace(run, argv=argv, evaluation=dataclasses.replace(run.evaluation, **changes))
    with pytest.raises(ValueError, match=f"uniattn-0.json was made with other settings: {words}"):
        other.run()


def test_arguments_that_do_not_fit_a_row_are_refused_before_anything_is_run(h2o_run, tmp_path, monkeypatch):
    out, run, _, _ = h2o_run
    shutil.copy(out / "findings.json", tmp_path)
    monkeypatch.setattr("peft_uniattn.reproduce.cell.TwoStageRun", None)
    other = dataclasses.replace(run, directory=tmp_path, argv=(*run.argv, "--rank", "4"), tables=("main",))
    with pytest.raises(ValueError, match="rank=4 is of UniAttn's compensation"):
        other.run()


def test_a_recipe_file_that_has_changed_since_is_other_settings(h2o_run, tmp_path):
    _, run, results, _ = h2o_run
    config, path = tmp_path / "recipe.yaml", tmp_path / "uniattn-0.json"
    flags = [*results[0].flags[:-1], "--config", str(config), "--output_dir"]
    config.write_text("weight_decay: 0.1\n")
    dataclasses.replace(results[0], flags=flags, config=read_config(flags)).write(path)
    check_same(path, flags, run.evaluation)
    config.write_text("weight_decay: 0.2\n")
    with pytest.raises(ValueError, match=r"uniattn-0.json was made with .*weight_decay=0.2 \(was 0.1\)"):
        check_same(path, flags, run.evaluation)


def test_a_folder_that_a_killed_call_left_goes_when_its_row_is_read(h2o_run):
    out, run, results, _ = h2o_run
    (out / "uniattn-0" / "model").mkdir(parents=True)
    assert run.run() == results
    assert not (out / "uniattn-0").exists()


def test_rows_may_be_continued_where_their_folders_have_moved(h2o_run, tmp_path):
    _, run, results, _ = h2o_run
    path = tmp_path / "uniattn-0.json"
    moved = [f"/elsewhere{flag}" if flag.startswith("/") else flag for flag in results[0].flags]
    dataclasses.replace(results[0], flags=moved).write(path)
    check_same(path, results[0].flags, run.evaluation)


def test_what_a_row_of_an_earlier_release_was_asked_is_not_compared(h2o_run, tmp_path):
    _, _, results, _ = h2o_run
    path = tmp_path / "uniattn-0.json"
    dataclasses.replace(results[0], evaluation={}).write(path)
    check_same(path, results[0].flags, Evaluation(("another",)))


def test_a_chosen_plan_keeps_the_given_one_beside_it():
    assert CHOSEN.fixed == FOUND.fixed == make_plan(16)
