"""The compiled backend for processors: numba and LLVM vectors, no compiler needed."""

from .attend import attend_codes, path, tolerance
from .encode import encode_pages
from .threads import count as thread_count

__all__ = ["attend_codes", "encode_pages", "path", "thread_count", "tolerance"]
