"""Asking graders that run in processes of their own, and ending one that takes too long.

A thread cannot be ended, and Python's own lock is held inside one long multiplication, so that not even a time limit of
another thread would be noticed. A process is ended by the operating system, whatever it does.
"""

import atexit
import functools
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from locum.errors import UserError
from locum.reinforce import grader

__all__ = ["grade"]

PREPARE_S = 300.0  # for loading libraries and data, on a busy machine

log = logging.getLogger(__name__)


def grade(questions: Sequence[tuple[Any, ...]], limit_s: float, workers: int) -> list[float]:
    """The reward of each question (a kind of `grader.KINDS`, then what that takes), in their order.

    An answer that takes longer than `limit_s` to grade, or the memory there is, counts as wrong, and this is logged.

    Raises: UserError for a question that cannot be graded, whatever the answer.
    """
    graders = _graders(os.getpid(), workers)
    if len(questions) < 2 or workers == 1:
        return [graders.ask(q, limit_s) for q in questions]
    with ThreadPoolExecutor(workers, "grade") as pool:
        return list(pool.map(functools.partial(graders.ask, limit_s=limit_s), questions))


class _Graders:
    """So many processes, started when they are needed, each asked by one thread at a time."""

    def __init__(self, workers: int) -> None:
        self.idle: queue.LifoQueue[_Process] = queue.LifoQueue()
        self.all = [_Process() for _ in range(workers)]
        for process in self.all:
            self.idle.put(process)
        atexit.register(self.close, os.getpid())

    def ask(self, question: tuple[Any, ...], limit_s: float) -> float:
        process = self.idle.get()
        try:
            outcome = process.ask(question, limit_s)
        finally:
            self.idle.put(process)
        if isinstance(outcome, str):
            log.warning("the answer %r counts as wrong: grading it %s", question[-1][-80:], outcome)
            return 0.0
        if "error" in outcome:
            raise UserError(outcome["error"])
        return float(outcome["reward"])

    def close(self, owner: int) -> None:
        for process in self.all if os.getpid() == owner else ():  # a forked process leaves them alone
            process.end()


@functools.cache
def _graders(owner: int, workers: int) -> _Graders:
    """Those of this process: pipes are not shared with forked ones."""
    return _Graders(workers)


class _Process:
    """One grader."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, question: tuple[Any, ...], limit_s: float) -> dict[str, Any] | str:
        """What it answers; how it failed to, where it does not."""
        ready = self._begun(question) or self._begun(question)  # one that lay idle may have been ended by the system
        if ready is None:
            raise RuntimeError("a process for grading ended before it was ready; memory may be short")
        if ready != "ready":
            return ready
        outcome, late = self._line(limit_s)
        if outcome is not None:
            return outcome
        return f"took longer than {limit_s:g} s" if late else "ended its process"

    def _begun(self, question: tuple[Any, ...]) -> Any:
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
        except OSError:
            self.end()
            return None
        return self._line(PREPARE_S)[0]

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is None or self._process.poll() is not None:
            self.end()
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(grader.__file__))],  # -P: files beside the script hide no library
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            )
        return self._process

    def _line(self, limit_s: float) -> tuple[Any, bool]:
        """The next line as JSON, None if there is none, and whether the time was over. The process is ended then."""
        process, late = self._process, threading.Event()
        assert process is not None
        assert process.stdout is not None

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit_s, stop)
        timer.daemon = True
        timer.start()
        try:
            line = process.stdout.readline()
        finally:
            timer.cancel()
            timer.join()  # from here on it ends nothing
        whole = line.endswith("\n")
        if late.is_set() or not whole:
            self.end()
        return (json.loads(line) if whole else None), late.is_set()

    def end(self) -> None:
        """End the process, if there is one; the next question starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()
