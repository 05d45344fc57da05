"""The recipe in two processes on CPUs (gloo), under DDP or FSDP2, without a launcher's start-up time."""

from __future__ import annotations

import contextlib
import os
import socket
import traceback
from pathlib import Path

from killed_run import context, count_moments


def on_two_ranks(argv: list[str], log: Path, *, dies_after: int | None = None) -> None:
    """
    Run the recipe in two processes.

    Args:
        argv: the flags.
        log: what the processes print goes to files beside it.
        dies_after: training steps after which both processes die as by `kill -9`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context().Process(target=one_rank, args=(argv, rank, port, log, dies_after)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    for rank, process in enumerate(processes):
        assert process.exitcode == 0, f"rank {rank}: {log.with_suffix(f'.{rank}').read_text()[-3000:]}"


def one_rank(argv: list[str], rank: int, port: int, log: Path, dies_after: int | None) -> None:
    os.environ.update(
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    )
    import torch

    from peft_uniattn.training.main import main

    torch.set_num_threads(1)
    allow_fsdp_on_cpus()
    count_moments(None, dies_after, steps=True)
    with (
        open(log.with_suffix(f".{rank}"), "w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            main(argv)
        except Exception:
            traceback.print_exc()
            raise


def allow_fsdp_on_cpus() -> None:
    """accelerate hands its FSDP plugin on to accelerators only; PyTorch's FSDP2 works on CPUs as well."""
    from accelerate.state import AcceleratorState, DistributedType

    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
        if plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = plugin

    AcceleratorState.__init__ = init
