"""Codecs on several threads: each takes a span of pages and does all there is to do for them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

S, T = TypeVar("S"), TypeVar("T")


def spans(count: int, most: int | None = None) -> list[slice]:
    """`count` pages in spans of at most `most`, or as many as torch has threads."""
    size = most or max(1, -(-count // torch.get_num_threads()))
    return [slice(at, min(at + size, count)) for at in range(0, count, size)]


def on_threads(function: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """Results for items, as many at once as torch has threads; none may depend on how many.

    In the function torch has one thread: its own idle ones spin for a while after each operation, and would take the
    processors from these.
    """
    items = list(items)
    threads = min(torch.get_num_threads(), len(items))
    if threads < 2:
        return [function(item) for item in items]
    return list(_pool(threads, os.getpid()).map(function, items))


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Kept: a new thread sets up allocators and products anew. A forked process has none of its parent's threads."""
    return ThreadPoolExecutor(threads, "seqkv-codec", initializer=torch.set_num_threads, initargs=(1,))
