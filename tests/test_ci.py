"""The jobs in .github/workflows run what the Makefile has, on the versions that pyproject.toml allows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}
LIBRARIES = ("torch", "transformers", "peft", "trl")


def allowed() -> dict[str, Requirement]:
    """By name, the requirements of pyproject.toml, optional ones too."""
    found = map(Requirement, re.findall(r'"([a-zA-Z][\w.\[\]-]*[<>=][^"]*)"', PROJECT))
    return {requirement.name: requirement for requirement in found}


def oldest() -> dict[str, Version]:
    lines = (ROOT / ".github/oldest.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {pin.name: Version(next(iter(pin.specifier)).version) for pin in pins}


def versions_jobs() -> dict[str, dict]:
    jobs = WORKFLOWS["ci.yml"]["jobs"]["versions"]["strategy"]["matrix"]["include"]
    return {job["versions"]: job for job in jobs}


def test_the_oldest_job_pins_the_libraries_that_matter():
    assert set(oldest()) == set(LIBRARIES)
    assert versions_jobs()["oldest"]["constraints"] == ".github/oldest.txt"


@pytest.mark.parametrize("library", LIBRARIES)
def test_its_versions_are_the_oldest_allowed(library):
    lower = [Version(bound.version) for bound in allowed()[library].specifier if bound.operator == ">="]
    assert lower == [oldest()[library]]


def test_its_python_is_the_oldest_allowed():
    lower = re.search(r'requires-python = ">=([\d.]+)"', PROJECT)[1]
    assert versions_jobs()["oldest"]["python"] == lower


def test_the_newest_job_takes_what_pyproject_allows():
    assert versions_jobs()["newest"]["constraints"] == ""


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_jobs_run_targets_of_the_makefile(workflow):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name, job in WORKFLOWS[workflow]["jobs"].items():
        commands = [step["run"] for step in job["steps"] if "run" in step]
        assert commands, name
        assert {command.split()[0] for command in commands} == {"make"}
        assert {command.split()[1] for command in commands} <= targets


def test_there_is_a_nightly_run_of_the_slow_tests():
    nightly = WORKFLOWS["nightly.yml"]
    assert nightly[True]["schedule"]  # YAML reads the key "on" so
    assert [step["run"] for step in nightly["jobs"]["slow"]["steps"] if "run" in step] == ["make slow"]
