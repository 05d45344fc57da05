"""The command line as a user meets it: help, errors without tracebacks, exit codes."""

import pytest
from typer.testing import CliRunner

from peft_uniattn.cli import app

runner = CliRunner()


def test_help_shows_an_example():
    result = runner.invoke(app, ["quickstart", "--help"])
    assert result.exit_code == 0
    assert "peft-uniattn quickstart --superblock-size" in " ".join(result.output.split())


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


def test_bad_input_leaves_no_output_directory(tmp_path):
    runner.invoke(app, ["quickstart", "--output-dir", str(tmp_path / "out"), "--superblock-size", "1"])
    assert not (tmp_path / "out").exists()
