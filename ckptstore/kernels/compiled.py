"""Which loops to use: NumPy's, or those that Numba compiles, once there is enough work to pay for loading them.

Loading Numba and its cached code takes most of a second, and saves about 0.3 s a GB and core. So it is loaded when
a process has saved and restored `WORTH_BYTES`: the usual way to rent or buy, which costs at most twice what the best
choice would have cost. `CKPTSTORE_KERNELS=numpy` or `=numba` decides at once.
"""

import importlib
import os
import threading
from typing import Any

from ckptstore.errors import InvalidInputError
from ckptstore.kernels import with_numpy

WORTH_BYTES = 3 * 2**30
VARIABLE = "CKPTSTORE_KERNELS"

_lock = threading.Lock()
_used: Any = with_numpy
_expected_bytes = 0
_is_decided = False


def _forked() -> None:
    """A thread that held the lock did not come along."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forked)


def loaded() -> Any:
    """The module of loops to use now: `with_numpy` or `with_numba`."""
    return _used


def expect(raw_bytes: int) -> None:
    """Tell that so many bytes are about to be encoded or decoded; loads the compiled loops if that pays."""
    global _expected_bytes, _is_decided
    with _lock:
        if _is_decided:
            return
        wish = os.environ.get(VARIABLE, "")
        if wish not in ("", "numpy", "numba"):
            raise InvalidInputError(f"{VARIABLE} is {wish!r}: set it to numpy or numba, or leave it unset.")
        _expected_bytes += raw_bytes
        if wish == "numpy" or (wish != "numba" and _expected_bytes < WORTH_BYTES):
            return
        _load(must=wish == "numba")
        _is_decided = True


def _load(*, must: bool) -> None:
    global _used
    try:
        _used = importlib.import_module("ckptstore.kernels.with_numba")
    except Exception as error:
        # Not installed; or no folder that Numba may write its cache to; or a cache that is damaged or on a full disk,
        # of which reading a pickle may raise anything. NumPy does the same.
        if must:
            raise InvalidInputError(
                f"{VARIABLE}=numba, and Numba cannot be used: {error}. Install it (pip install 'ckptstore[fast]'), or "
                "unset the variable: NumPy does the same, more slowly."
            ) from error
