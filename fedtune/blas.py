"""One arithmetic thread for what must give the same bits on every run.

OpenBLAS splits QR and SVD over its threads, and how many there are changes the last bits of the result: it depends on
OMP_NUM_THREADS, on the machine's load limits and on who imported numpy first. Work inside `one_thread` does not.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import RLock

from numpy.linalg import _umath_linalg  # its file is linked to the BLAS

# As numpy's wheels, distributions and MKL call them; {} is `set` or `get`.
_NAMES = (
    "scipy_openblas_{}_num_threads64_",
    "scipy_openblas_{}_num_threads",
    "openblas_{}_num_threads64_",
    "openblas_{}_num_threads",
)
_LOCK = RLock()


@contextmanager
def one_thread() -> Iterator[None]:
    """Holds numpy's OpenBLAS at one thread for the length of a `with` block; one block at a time in a process.

    Another BLAS is left as it is (Apple's gives the same bits by itself).
    """
    found = _controls()
    if found is None:
        yield
        return
    get, put = found
    with _LOCK:
        before = get()
        put(1)
        try:
            yield
        finally:
            put(before)


@cache
def _controls() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """Finds the two functions in the library that numpy's linear algebra is linked to."""
    library = ctypes.CDLL(_umath_linalg.__file__)
    for name in _NAMES:
        if hasattr(library, name.format("set")) and hasattr(library, name.format("get")):
            put = library[name.format("set")]
            put.argtypes, put.restype = (ctypes.c_int,), None
            return library[name.format("get")], put
    return None
