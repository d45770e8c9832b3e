"""How every kernel is compiled.

No ``parallel``: threads belong to dynq.codec, and a kernel's bytes must not depend on their number. No ``fastmath``:
it would let the compiler reorder sums, and the NumPy twins in dynq.reference must give the same bytes.
"""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.dispatcher import Dispatcher


def kernel(function: Callable) -> Any:
    """Compile `function` on its first call, keep the machine code on disk.

    numba rebuilds what it kept when the function's own file changes. Kernels here share helpers across files, so the
    stamp it compares is that of the function's file and of every file whose kernels it can see, theirs included.
    """
    compiled = njit(nogil=True, cache=True, error_model="numpy")(function)
    if not isinstance(compiled, Dispatcher):  # NUMBA_DISABLE_JIT
        return compiled
    module = sys.modules[function.__module__]
    files = {module.__file__}
    for seen in vars(module).values():
        files |= getattr(seen, "kernel_files", set()) if isinstance(seen, Dispatcher) else set()
    compiled.kernel_files = files
    sources = b"".join(Path(str(file)).read_bytes() for file in sorted(map(str, files)))
    compiled._cache._cache_file._source_stamp = hashlib.sha256(sources).hexdigest()
    return compiled


def call(compiled: Callable, *arguments: Any) -> None:
    """How a family's `encode` runs the kernels that search; dynq.kernels.on_card has another."""
    compiled(*arguments)
