"""Work behind a program's back: in order, waited for, and never silently lost."""

import os
import threading
import time

import pytest
import torch

from hf_seqkv.errors import SeqKVWarning
from hf_seqkv.store.prefix_store import PrefixStore
from hf_seqkv.store.writer import BACKLOG, Writer


def test_jobs_run_in_order_on_another_thread():
    writer, done = Writer(), []
    for i in range(3 * BACKLOG):
        writer.submit(lambda i=i: done.append((i, threading.get_ident())))
    writer.wait()
    assert [i for i, _ in done] == list(range(3 * BACKLOG))
    assert {thread for _, thread in done} != {threading.get_ident()}


def test_a_full_backlog_waits():
    writer, gate = Writer(), threading.Event()
    for _ in range(BACKLOG):
        writer.submit(gate.wait)
    late = threading.Thread(target=writer.submit, args=(lambda: None,))
    late.start()
    late.join(0.05)
    assert late.is_alive()
    gate.set()
    late.join(5)
    assert not late.is_alive()
    writer.wait()


@pytest.mark.filterwarnings("default")
def test_what_fails_is_said_and_the_next_job_runs():
    writer, done = Writer(), []

    def both():
        writer.submit(lambda: 1 / 0)
        writer.submit(lambda: done.append(1))
        writer.wait()

    with pytest.warns(SeqKVWarning, match=r"not stored.*division"):
        both()
    assert done == [1]


def test_the_models_threads_stay():
    before, writer, seen = torch.get_num_threads(), Writer(), []
    writer.submit(lambda: seen.append(torch.get_num_threads()))
    writer.wait()
    assert seen == [1]
    assert torch.get_num_threads() == before


def test_closing_a_store_waits(tmp_path):
    done = []
    with PrefixStore(tmp_path) as store:
        store.submit(lambda: (time.sleep(0.1), done.append(1)))
    assert done == [1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_after_a_fork():
    """The child has a thread of its own, and does not wait for jobs of its parent."""
    writer, gate = Writer(), threading.Event()
    writer.submit(gate.wait)
    child = os.fork()
    if child == 0:
        done = []
        writer.wait()
        writer.submit(lambda: done.append(1))
        writer.wait()
        os._exit(0 if done == [1] else 1)
    gate.set()
    assert os.waitpid(child, 0)[1] == 0
    writer.wait()
