"""One process per job: its memory goes back at its end, and one that crashes takes its own job only.

Processes are spawned: forked ones would inherit locks of threads that are not there, and the device of the parent.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Died:
    """The process ended without a result: killed by a signal (negative) or by itself, for instance by a fault."""

    exit_code: int


@dataclass(frozen=True)
class Finished(Generic[Job, Result]):
    job: Job
    result: Result | Died


def run_each(function: Callable[[Job], Result], jobs: Sequence[Job], *, parallel: int = 1) -> Iterator[Finished]:
    """Call a function once per job, each call in a process of its own. Results come as they are ready.

    While the caller works on a result, no new process is started.

    Args:
        function: at the top of a module; argument and result travel between processes.
        jobs: its arguments; they are started in this order.
        parallel: processes at once.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(jobs)
    running: dict[Connection, tuple[BaseProcess, Job]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                ours, theirs = context.Pipe(duplex=False)
                process: BaseProcess = context.Process(target=_run_one, args=(function, waiting[0], theirs))
                process.start()
                theirs.close()  # the child holds the only other end: when it dies, ours says so
                running[ours] = (process, waiting.pop(0))
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                ended, job = running.pop(ready)
                yield Finished(job, _receive(ready, ended))
    finally:
        for connection, (left, _) in running.items():
            connection.close()
            left.terminate()
            left.join()


def _run_one(function: Callable[[Job], Result], job: Job, connection: Connection) -> None:
    connection.send(function(job))
    connection.close()


def _receive(connection: Connection, process: BaseProcess) -> object:
    try:
        result = connection.recv()
    except (EOFError, OSError):  # nothing, or half a message
        result = None
    connection.close()
    process.join()
    return result if result is not None else Died(process.exitcode or 0)
