"""Work for many processes at once; none of them outlives this one."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence

from cli.errors import DataError, UserError
from cpu.setup import usable_cores

_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>


def map_in_processes(work: Callable, tasks: Sequence, workers: int | None = None) -> Iterator:
    """Yields ``work(task)`` of each task, in order.

    Processes (None: one a core) are forked, so that `work` and `tasks` may hold much: only results
    are copied. Raises UserError: the system starts no more processes, one of them died, or `work`
    raised it.
    """
    if workers is not None and workers < 1:
        raise UserError(f"-workers is {workers}; give a number from 1 up")
    count = min(workers or usable_cores(), len(tasks))
    if count < 2 or not hasattr(os, "fork"):
        yield from map(work, tasks)
        return
    length = max(1, min(16, len(tasks) // (8 * count)))  # of what is sent at once
    parts = [tasks[start : start + length] for start in range(0, len(tasks), length)]
    fork, started = multiprocessing.get_context("fork"), []
    try:
        for first in range(count):
            receiver, sender = fork.Pipe(duplex=False)
            args = work, parts[first::count], sender
            process = fork.Process(target=_serve, args=args, daemon=True)
            try:
                process.start()
            except OSError as error:
                raise UserError(
                    f"process {first + 1} of {count} cannot be started: {error.strerror}; the "
                    "system or container limits their number: -workers 1 needs one only"
                ) from None
            started.append((process, receiver))
            sender.close()
        for number in range(len(parts)):
            process, receiver = started[number % count]
            try:
                results = receiver.recv()
            except EOFError:
                process.join()
                raise UserError(
                    f"a process that helped ended with exit code {process.exitcode}"
                    + ("; out of memory?" if process.exitcode == -signal.SIGKILL else "")
                ) from None
            if isinstance(results, UserError):
                raise results
            yield from results
    finally:
        for process, receiver in started:
            process.kill()
            process.join()
            receiver.close()


def _serve(work: Callable, parts: Sequence, sender) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent too, which ends this
    with contextlib.suppress(OSError, AttributeError):  # Linux has it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for tasks in parts:
        if os.getppid() != multiprocessing.parent_process().pid:
            os._exit(1)
        try:
            results = [work(task) for task in tasks]
        except UserError as error:  # a subclass of these may need more than a message
            results = (DataError if isinstance(error, DataError) else UserError)(str(error))
        sender.send(results)
