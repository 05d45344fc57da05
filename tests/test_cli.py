"""The command line as a user meets it: help, errors without tracebacks, exit codes."""

import shlex
import sys
from importlib.metadata import version

import pytest
import recipe_runs
import torch
from transformers import LlamaConfig, Qwen2Config
from typer.main import get_command
from typer.testing import CliRunner

from peft_uniattn.cli import app
from peft_uniattn.cli.errors import reported
from peft_uniattn.training.arguments import parse_arguments

runner = CliRunner()


def commands(command, path=()):
    """Every command by its path, groups left out."""
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))
    if not hasattr(command, "commands"):
        yield pytest.param(path, command, id=" ".join(path))


def examples(path, text):
    """The arguments of the examples in a help text."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1 + len(path) :] for line in lines if line.strip().startswith("peft-uniattn ")]


@pytest.mark.parametrize(("path", "command"), commands(get_command(app)))
def test_help_shows_an_example(path, command):
    result = runner.invoke(app, [*path, "--help"])
    assert result.exit_code == 0
    shown = " ".join(result.output.split())
    assert "Example" in shown
    assert f"peft-uniattn {' '.join(path)} " in shown


@pytest.mark.parametrize(("path", "command"), commands(get_command(app)))
def test_examples_have_no_unknown_options(path, command):
    found = examples(path, command.help)
    assert found
    for arguments in found:
        command.make_context(" ".join(path), arguments)


def test_version_is_that_of_the_package():
    assert runner.invoke(app, ["--version"]).output.strip() == version("peft-uniattn")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--superblock-size", "1"], "superblock_size=1"),
        (["--rank", "0"], "r=0"),
        (["--method", "magic"], "method='magic'"),
        (["--dataset", "no-such-file.jsonl"], "no-such-file.jsonl"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, message, tmp_path):
    result = runner.invoke(app, ["quickstart", "--output-dir", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_help_of_train_lists_every_kind_of_argument_and_shows_an_example():
    result = runner.invoke(app, ["train", "--help"])
    assert result.exit_code == 0
    flags = ("--model_name_or_path", "--dataset_name", "--superblock_size", "--stage1_learning_rate", "--bf16")
    assert all(flag in result.output for flag in flags)
    assert "Example: peft-uniattn train --model_name_or_path" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model_name_or_path is missing"),
        (["--stages", "stage3"], "stages='stage3'"),
        (["--superblocks", "16to19"], "superblocks='16to19' must look like '16-19,20-23'"),
        (["--model_name_or_path", "m", "--use_peft"], "use_peft=True"),
        (["--model_name_or_path", "m", "--evaluation", "nowhere:accuracy"], "evaluation='nowhere:accuracy'"),
        (["--config", "no-such-file.yaml"], "config='no-such-file.yaml' does not exist"),
        (["--learnin_rate", "3"], "unknown arguments: ['--learnin_rate', '3']"),
    ],
)
def test_bad_input_of_train_ends_in_one_sentence(arguments, message, tmp_path):
    usual = ["--output_dir", str(tmp_path / "out"), "--use_cpu", "--bf16", "false"]
    result = runner.invoke(app, ["train", *usual, *arguments])
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_train_refuses_flags_that_it_does_not_know(tmp_path):
    result = runner.invoke(app, ["train", "--output_dir", str(tmp_path), "--use_cpu", "--superblok_size", "3"])
    assert result.exit_code not in (0, None)
    assert "superblok_size" in result.stderr


def test_train_reads_yaml_which_flags_override(tmp_path):
    (tmp_path / "recipe.yaml").write_text("superblocks: 2-4\nrank: 7\nuse_cpu: true\nbf16: false\nmax_steps: 5\n")
    read = parse_arguments(["--config", str(tmp_path / "recipe.yaml"), "--max_steps", "6"])
    assert (read.plan.superblocks, read.plan.rank, read.training.max_steps) == ("2-4", 7, 6)
    assert read.plan.peft_config().superblocks == [[2, 3, 4]]


def test_train_post_trains_a_model_and_shows_the_receipt(tmp_path):
    inputs = recipe_runs.write_inputs(tmp_path)
    result = runner.invoke(app, ["train", *recipe_runs.flags(inputs, tmp_path / "out", stages="calibrate")])
    assert result.exit_code == 0, result.output
    assert "held-out loss, calibrated" in result.output
    assert (tmp_path / "out" / "calibrated" / "adapter_model.safetensors").exists()


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "peft_uniattn.forecast.plot", raising=False)
    monkeypatch.delitem(sys.modules, "peft_uniattn.analysis.plots", raising=False)
    result = runner.invoke(app, ["plan", "tiny", "--plot", str(tmp_path / "plan.svg")])
    assert result.exit_code == 1
    assert "this needs matplotlib, which is not installed; pip install 'peft-uniattn[analysis]'" in result.stderr


def test_a_file_that_ends_too_early_is_an_error_that_says_so(capsys):
    with pytest.raises(SystemExit, match="1"), reported():
        raise EOFError("Compressed file ended before the end-of-stream marker was reached")  # as gzip raises it
    assert "error: Compressed file ended" in capsys.readouterr().err


def test_bad_input_leaves_no_output_directory(tmp_path):
    runner.invoke(app, ["quickstart", "--output-dir", str(tmp_path / "out"), "--superblock-size", "1"])
    assert not (tmp_path / "out").exists()


def refused(*arguments):
    """What is printed for arguments that cannot be meant."""
    result = runner.invoke(app, arguments)
    assert result.exit_code not in (0, None)
    assert result.exception is None or isinstance(result.exception, SystemExit)  # no traceback
    return " ".join(result.stderr.split())


@pytest.mark.parametrize(
    "arguments", [("plan",), ("eval",), ("bench", "memory", "--model"), ("quickstart", "--model")], ids=" ".join
)
def test_a_checkpoint_that_is_not_there_is_named_with_its_argument(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(*arguments, "./no-such-model")
    assert "model='./no-such-model'" in message
    assert "give a folder with a config.json" in message


def test_train_names_a_checkpoint_that_is_not_there(tmp_path):
    (tmp_path / "data.jsonl").write_text("{}")
    flags = ["--use_cpu", "--bf16", "false", "--output_dir", str(tmp_path / "out")]
    message = refused(
        "train", *flags, "--dataset_name", str(tmp_path / "data.jsonl"), "--model_name_or_path", "./no-such-model"
    )
    assert "model_name_or_path='./no-such-model'" in message and "give a folder with a config.json" in message


@pytest.mark.parametrize("config", [LlamaConfig(), Qwen2Config()], ids=["llama", "qwen2"])
@pytest.mark.parametrize("argument", ["eval", "quickstart --model", "train --model_name_or_path"])
def test_a_checkpoint_without_a_tokenizer_is_named_before_its_weights_are_read(config, argument, tmp_path):
    config.save_pretrained(tmp_path / "bare")  # transformers makes an empty tokenizer for Qwen2, and none for Llama
    (tmp_path / "data.jsonl").write_text("{}")
    rest = ["--use_cpu", "--bf16", "false", "--dataset_name", str(tmp_path / "data.jsonl")]
    rest += ["--output_dir", str(tmp_path / "out")]
    message = refused(*argument.split(), str(tmp_path / "bare"), *(rest if argument.startswith("train") else []))
    name = "model_name_or_path" if argument.startswith("train") else "model"
    assert f"{name}='{tmp_path / 'bare'}' has no tokenizer" in message


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("plan", "tiny", "--superblocks", "3-40"), ("superblocks=[[3, 4, …, 40]] names layer 40",)),
        (("plan", "tiny", "--superblocks", "6-4"), ("superblocks='6-4'", "2 layers or more, lowest first")),
        (
            ("plan", "tiny", "--superblocks", "0-12345"),
            ("superblocks='0-12345'", "no model has more than 10,000 layers"),
        ),
        (("reproduce", "--output-dir", "out", "--seeds", "0,b"), ("seeds='0,b'", "such as 0,1,2")),
        (("analyze", "show", "no-such.json"), ("no-such.json", "does not exist")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_wrong_values_are_named_with_the_way_out(arguments, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(*arguments).replace(" │ │ ", " ")
    assert all(part in message for part in parts), message


def test_an_unknown_task_is_named_before_the_model_is_loaded():
    pytest.importorskip("lm_eval")
    message = refused("eval", "./no-such-model", "--tasks", "no_such_task")
    assert "'no_such_task' is not known" in message and "social_iqa" in message


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--tasks", "nothere.yaml"), ("tasks: 'nothere.yaml': there is no such file",)),
        (("--tasks", "broken.yaml"), ("tasks: 'broken.yaml' cannot be read", "line 1", "repair it")),
        (("--dtype", "foo"), ("dtype='foo' is not known", "bfloat16")),
        (("--dtype", "nn"), ("dtype='nn' is not known",)),
        (("--max-length", "-5"), ("Invalid value for '--max-length'",)),
        (("--output", "folder"), ("output='folder' is a folder", "'folder/results.json'")),
        (("--output", "broken.yaml/results.json"), ("output='broken.yaml/results.json'", "choose another file")),
    ],
    ids=" ".join,
)
def test_wrong_values_of_eval_are_named_before_the_model_is_loaded(arguments, parts, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.yaml").write_text("a: [1,")
    message = refused("eval", "./no-such-model", "--tasks", "social_iqa", *arguments)
    assert all(part in message for part in parts), message
    assert "no-such-model" not in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_train_without_a_gpu_says_how_to_train_on_the_cpu(tmp_path):
    message = refused("train", "--model_name_or_path", "m", "--output_dir", str(tmp_path / "out"), "--bf16", "true")
    assert "--use_cpu --bf16 false" in message
