"""Rows side by side, each in a process of its own, on all GPUs."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import Queue

import torch
from tqdm.auto import tqdm

from .cell import CellResult
from .matrix import Cell

Run = Callable[..., list[CellResult]]
Work = tuple[tuple[Cell, ...], int]


def side_by_side(work: Sequence[Work], run: Run, jobs: int) -> Iterator[list[CellResult]]:
    """
    Run all of `work`, `jobs` at a time; GPUs take turns.

    What fails does not stop the others. It is tried once more when they are done, with the machine to itself: mostly
    it is memory that was short.

    Args:
        work: rows that are trained alike, and their seed.
        run: takes both and returns results, or reads them if they have been written before.
        jobs: processes at a time.

    Yields:
        results, in the order in which they are done.

    Raises:
        RuntimeError: at the end, if something has failed twice; names it.
    """
    names = visible_devices()
    devices: Queue[str] = Queue()
    for job in range(jobs):
        devices.put(names[job % len(names)])
    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        rows = {pool.submit(run_apart, devices, jobs, run, group, seed): (group, seed) for group, seed in work}
        try:
            for row in as_completed(rows):
                if (error := row.exception()) is None:
                    yield row.result()
                else:
                    tqdm.write(f"{error}; it is tried again at the end, alone")
                    failed.append(rows[row])
        finally:
            pool.shutdown(cancel_futures=True)
    errors = {}
    for group, seed in failed:
        try:
            yield run_apart(devices, 1, run, group, seed)
        except RuntimeError as error:
            errors[f"{group[0].name}-{seed}"] = str(error)
    if errors:
        raise RuntimeError(
            f"{'; '.join(errors.values())}. The same command tries again what is missing, and goes on where it "
            f"stopped; to begin anew, remove {', '.join(errors)} in the output folder first"
        )


def visible_devices() -> list[str]:
    """The GPUs that this process sees, as `CUDA_VISIBLE_DEVICES` names each; [""] without one."""
    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in given.split(",")] if given else list(map(str, range(count)))
    return names[:count] or [""]


def run_apart(devices: Queue[str], jobs: int, run: Run, group: tuple[Cell, ...], seed: int) -> list[CellResult]:
    """
    Run rows in a process of their own, on the next free device.

    Raises:
        RuntimeError: if the process fails.
    """
    device = devices.get()
    try:
        process = multiprocessing.get_context("spawn").Process(
            target=_on_device, args=(device, jobs, run, group, seed)
        )
        process.start()
        process.join()
    finally:
        devices.put(device)
    if process.exitcode:
        raise RuntimeError(f"row {group[0].name!r} with seed {seed} failed; its own message is above")
    return run(group, seed)  # which reads the file that the process has written


def _on_device(device: str, jobs: int, run: Run, group: tuple[Cell, ...], seed: int) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = device
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    run(group, seed)
