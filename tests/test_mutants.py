"""The tool that puts faults into functions: what it finds, and that a fault is one."""

from __future__ import annotations

import ast
import textwrap
from types import SimpleNamespace

import mutants
import pytest

SOURCE = textwrap.dedent(
    """
    def larger(a, b):
        if a < b:
            return b + 0
        return a


    class Thing:
        @property
        def ready(self):
            return not self.missing and True
    """
)


@pytest.fixture
def module(tmp_path):
    file = tmp_path / "things.py"
    file.write_text(SOURCE)
    namespace = {"__name__": "things"}
    exec(compile(SOURCE, str(file), "exec"), namespace)
    return SimpleNamespace(file=file, **namespace)


def test_every_kind_of_fault_is_found_with_its_place(module):
    found = {(mutant.function, mutant.line, mutant.change) for mutant in mutants.mutants(module.file)}
    assert found == {
        ("larger", 3, "condition negated"),
        ("larger", 3, "Lt -> LtE"),
        ("larger", 4, "return None"),
        ("larger", 4, "Add -> Sub"),
        ("larger", 4, "0 -> 1"),
        ("larger", 5, "return None"),
        ("Thing.ready", 11, "return None"),
        ("Thing.ready", 11, "And -> Or"),
        ("Thing.ready", 11, "not left out"),
        ("Thing.ready", 11, "True -> False"),
    }


def test_a_fault_is_noticed(module):
    function = mutants.live(module, "larger")
    [fault] = [mutant for mutant in mutants.mutants(module.file) if mutant.change == "condition negated"]
    assert function(1, 2) == 2
    function.__code__ = fault.code
    assert function(1, 2) == 1


def test_the_function_under_a_property_is_found(module):
    assert mutants.live(module, "Thing.ready")(SimpleNamespace(missing=False))


@pytest.mark.parametrize("code", ["'a'", "f(x)", "x.y", "x = y"])
def test_the_rest_is_left_alone(code):
    [statement] = ast.parse(code).body
    assert mutants.change(statement) is None
