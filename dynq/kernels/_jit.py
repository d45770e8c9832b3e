"""How every kernel is compiled.

No ``parallel``: threads belong to dynq.codec, and a kernel's bytes must not depend on their number. No ``fastmath``:
it would let the compiler reorder sums, and the NumPy twins in dynq.reference must give the same bytes.
"""

from collections.abc import Callable
from typing import Any

from numba import njit

kernel: Callable[..., Any] = njit(nogil=True, cache=True, error_model="numpy")
