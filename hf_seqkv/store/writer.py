"""`Writer`: one thread that codes and stores pages while the model goes on, so that generation waits for no disk.

At exit the interpreter waits until all is written.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ..errors import SeqKVWarning

BACKLOG = 16  # jobs that wait at once, of up to 64 pages each: beyond that, giving one more waits


class Writer:
    """Runs jobs in the order in which they were given."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        # One core: the model's own threads are busy on the others.
        self._pool = ThreadPoolExecutor(1, "seqkv-writer", initializer=torch.set_num_threads, initargs=(1,))
        self._room, self._process = threading.Semaphore(BACKLOG), os.getpid()
        self._last: Future | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Do a job later; what it raises becomes a warning, as nobody is there to catch it."""
        if self._process != os.getpid():  # a fork has no threads of its parent; what waits there is written there
            self._start()
        self._room.acquire()
        self._last = self._pool.submit(self._run, job)

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:
            warnings.warn(f"pages were not stored: {error!r}", SeqKVWarning, stacklevel=2)
        finally:
            self._room.release()

    def wait(self) -> None:
        """Return once all jobs given so far are done."""
        if self._last is not None and self._process == os.getpid():
            self._last.result()
