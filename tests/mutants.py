"""
Mutation testing of the core files: `python tests/mutants.py --seconds 600 --out mutants.json`.

Small faults are put into functions, one at a time (another comparison, operator, constant, condition or result), and
the tests of the file have to notice. Every mutant lives in a fork of a process that has imported everything, so that
it costs no more than its tests. What the time allows is a sample, by seed; survivors are listed with their lines.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from types import CodeType, FunctionType

import pytest

TESTS = Path(__file__).parent
# Module -> the tests that have to notice.
HOOKS = ["test_hooks_on_a_follower_run_in_pairs", "test_what_a_hook_before_a_follower_changes_counts"]
TARGETS = {
    "peft_uniattn.plan": ["test_rival_plans.py", "test_plan.py", "test_refusals.py"],
    "peft_uniattn.layer": [
        *("test_artefacts.py", "test_compensation_designs.py"),
        *("test_adapter.py", "test_saving.py", "test_attention.py"),
    ],
    "peft_uniattn.tuner.layer": [
        *(f"test_parallel.py::{name}" for name in HOOKS),
        *("test_adapter.py", "test_saving.py", "test_attention.py"),
    ],
    "peft_uniattn.cache": ["test_rivals.py", "test_cache.py", "test_cache_kinds.py"],
    "peft_uniattn.calibration.solve": ["test_compensation_designs.py", "test_calibration.py"],
}
# A mutant whose tests take longer than this many seconds is noticed as well.
LIMIT = 300

COMPARISONS = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In},
}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
OPERATORS |= {ast.And: ast.Or, ast.Or: ast.And, ast.MatMult: ast.Mult}


@dataclass
class Mutant:
    """One fault: the function that has it, where, what it is, and the function's code with it."""

    function: str
    line: int
    source: str
    change: str
    code: CodeType = field(repr=False)


@dataclass
class Outcome:
    """Of a module: mutants there are, those noticed, and those that were not."""

    mutants: int
    killed: int = 0
    survivors: list[dict] = field(default_factory=list)


def change(node: ast.AST) -> tuple[str, ast.AST] | None:
    """Make a node faulty; what was done, and the node that takes its place."""
    match node:
        case ast.Compare(ops=[operator, *_]) if type(operator) in COMPARISONS:
            node.ops[0] = COMPARISONS[type(operator)]()
            return f"{type(operator).__name__} -> {type(node.ops[0]).__name__}", node
        case ast.BinOp(op=operator) | ast.BoolOp(op=operator) if type(operator) in OPERATORS:
            node.op = OPERATORS[type(operator)]()
            return f"{type(operator).__name__} -> {type(node.op).__name__}", node
        case ast.UnaryOp(op=ast.Not()):
            return "not left out", node.operand
        case ast.Constant(value=bool(value)):
            return f"{value} -> {not value}", ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            return f"{value} -> {value + 1}", ast.Constant(value + 1)
        case ast.If() | ast.IfExp():
            node.test = ast.UnaryOp(ast.Not(), node.test)
            return "condition negated", node
        case ast.Return(value=ast.expr()) if ast.unparse(node.value) != "None":
            return "return None", ast.Return(ast.Constant(None))
    return None


class Replacement(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions and methods by qualified name; not those inside of others."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from definitions(node, f"{prefix}{node.name}.")


def code_of(code: CodeType, function: str) -> CodeType:
    """The code of a function in that of its module."""
    for part in function.split("."):
        code = next(const for const in code.co_consts if isinstance(const, CodeType) and const.co_name == part)
    return code


def mutants(file: Path) -> list[Mutant]:
    """All mutants of the functions in a file."""
    source = file.read_text()
    lines, whole = source.splitlines(), ast.parse(source)
    original = compile(whole, str(file), "exec")
    owners = {n: name for name, f in definitions(whole) for statement in f.body for n in ast.walk(statement)}
    found = []
    for number, owned in enumerate(ast.walk(whole)):
        if owned not in owners:
            continue
        tree = ast.parse(source)
        node = next(islice(ast.walk(tree), number, None))
        line = getattr(node, "lineno", 0)
        if (changed := change(node)) is None:
            continue
        what, new = changed
        if new is not node:
            tree = Replacement(node, ast.copy_location(new, node)).visit(tree)
        function = owners[owned]
        code = code_of(compile(ast.fix_missing_locations(tree), str(file), "exec"), function)
        # A live function takes no other code than one with its closure.
        if code.co_freevars == code_of(original, function).co_freevars:
            found.append(Mutant(function, line, lines[line - 1].strip(), what, code))
    return found


def live(module, function: str) -> FunctionType:
    """The function in the imported module, under its decorators."""
    owner = module
    *classes, name = function.split(".")
    for part in classes:
        owner = getattr(owner, part)
    found = inspect.getattr_static(owner, name)
    found = getattr(found, "fget", None) or getattr(found, "__func__", found)
    return inspect.unwrap(found)


def run_tests(files: list[str]) -> int:
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *(str(TESTS / file) for file in files)]))


def is_noticed(module, mutant: Mutant, files: list[str]) -> bool:
    """Whether tests fail, crash or hang in a fork that has the mutant."""
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        live(module, mutant.function).__code__ = mutant.code
        os._exit(run_tests(files))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest could not run {files} with {mutant}")
    return code != 0


def sampled(targets: list[str], seed: int) -> Iterator[tuple[str, Mutant]]:
    """Mutants of all modules in turn, in an order by seed."""
    queues = {target: mutants(file_of(target)) for target in targets}
    for queue in queues.values():
        random.Random(seed).shuffle(queue)
    while any(queues.values()):
        for target, queue in queues.items():
            if queue:
                yield target, queue.pop()


def file_of(target: str) -> Path:
    return Path(importlib.import_module(target).__file__)


def survivors(result: dict) -> Iterator[tuple[str, Mutant]]:
    """The mutants that an earlier run's tests did not notice."""
    for target, outcome in result["modules"].items():
        places = [(known["function"], known["line"], known["change"]) for known in outcome["survivors"]]
        for mutant in mutants(file_of(target)):
            place = (mutant.function, mutant.line, mutant.change)
            if place in places:
                places.remove(place)
                yield target, mutant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long to go on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--again", action="store_true", help="try the survivors in OUT again, after tests were added")
    arguments = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    result = json.loads(arguments.out.read_text()) if arguments.again else {"seed": arguments.seed}
    targets = [name for name in TARGETS if not arguments.again or result["modules"][name]["survivors"]]
    if run_tests(sorted({file for target in targets for file in TARGETS[target]})):
        sys.exit("the tests fail without any mutant")
    started = time.monotonic()
    if arguments.again:
        trials = list(survivors(result))
        modules = {name: Outcome(**{**known, "survivors": []}) for name, known in result["modules"].items()}
    else:
        trials = sampled(list(TARGETS), arguments.seed)
        modules = {target: Outcome(len(mutants(file_of(target)))) for target in TARGETS}
    for target, mutant in trials:
        outcome = modules[target]
        if is_noticed(importlib.import_module(target), mutant, TARGETS[target]):
            outcome.killed += 1
        else:
            outcome.survivors.append({key: value for key, value in vars(mutant).items() if key != "code"})
        result["modules"] = {name: asdict(found) for name, found in modules.items()}
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
        if time.monotonic() - started > arguments.seconds and not arguments.again:
            break


if __name__ == "__main__":
    main()
