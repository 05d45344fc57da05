"""A run of the recipe in a process of its own that kills itself at a chosen moment, as `kill -9` would."""

import contextlib
import multiprocessing
import os
import signal
import sys
from pathlib import Path

# Whatever the file system sees of a run, and every training step, is a moment at which it may die.
STEPS = "training steps"
FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "shutil.rmtree"}


class Moments:
    """
    Counts what happens to files below `directory`, if it is given, and training steps if `steps`; kills the process at
    number `last`.
    """

    def __init__(self, directory: Path | None, steps: bool, last: int | None) -> None:
        self.directory = None if directory is None else os.fspath(directory)
        self.steps = steps
        self.last = last
        self.count = 0

    def happened(self) -> None:
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, details: tuple) -> None:
        if (
            self.directory
            and event in FILE_EVENTS
            and any(
                isinstance(part, (str, os.PathLike)) and os.fspath(part).startswith(self.directory) for part in details
            )
        ):
            self.happened()


def count_moments(directory: Path | None, last: int | None, *, steps: bool) -> Moments:
    """From now on, count the moments of this process."""
    from trl import SFTTrainer

    moments = Moments(directory, steps, last)
    sys.addaudithook(moments.audit)
    training_step = SFTTrainer.training_step

    def counted_step(self, *args, **kwargs):
        loss = training_step(self, *args, **kwargs)
        if moments.steps:
            moments.happened()
        return loss

    SFTTrainer.training_step = counted_step
    return moments


def run_here(argv: list[str], directory: Path | None, steps: bool, last: int | None, count_file: Path) -> None:
    """The whole recipe, up to the moment `last`; writes how many moments there were."""
    import torch

    from peft_uniattn.training.main import main

    torch.set_num_threads(1)
    moments = count_moments(directory, last, steps=steps)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        main(argv)
    count_file.write_text(str(moments.count))


def context() -> multiprocessing.context.BaseContext:
    """Processes that are forked from one which has imported everything and computed nothing."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["peft_uniattn.training.main"])
    return made


def run(argv: list[str], output_dir: Path, *, last: int | None = None, inside: str | None = None) -> int | None:
    """
    Run the recipe in another process.

    Args:
        argv: the flags.
        output_dir: named by them.
        last: the process dies at this moment, counted from 1; None: it lives.
        inside: what counts: only what happens to files of `output_dir` whose names begin so, or "training steps".
            Default: all of it.

    Returns:
        how many moments it had; None if it was killed.
    """
    steps = inside in (None, STEPS)
    directory = None if inside == STEPS else output_dir / (inside or "")
    count_file = output_dir.with_name(output_dir.name + ".moments")
    process = context().Process(target=run_here, args=(argv, directory, steps, last, count_file))
    process.start()
    process.join(timeout=300)
    if process.exitcode == -signal.SIGKILL:
        return None
    assert process.exitcode == 0, f"the run failed with exit code {process.exitcode}"
    return int(count_file.read_text())
