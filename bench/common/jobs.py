"""Many trainings at once, in processes of their own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch
from tqdm import tqdm

What = TypeVar("What")
Outcome = TypeVar("Outcome")


def execute_all(
    execute: Callable[[What], Outcome],
    runs: Sequence[What],
    jobs: int,
    progress: tqdm,
    threads: int = 1,
) -> list[Outcome]:
    """Return the results in the order of the runs, whatever the number of processes.

    Every run has one thread to itself, unless ``threads`` says otherwise: on networks this small a
    second one gains nothing, and sums split between threads differently would make the numbers
    depend on ``jobs``.
    """
    if jobs == 1:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            results = []
            for run in runs:
                results.append(execute(run))
                progress.update()
            return results
        finally:
            torch.set_num_threads(before)
    context = multiprocessing.get_context("spawn")  # a fork may hang in torch's threads
    with ProcessPoolExecutor(
        jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        futures = {pool.submit(execute, run): i for i, run in enumerate(runs)}
        done: dict[int, Outcome] = {}
        try:
            for future in as_completed(futures):
                done[futures[future]] = future.result()
                progress.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [done[i] for i in range(len(runs))]
