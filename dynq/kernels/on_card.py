"""The kernels on a graphics card: their own sources, compiled by numba.cuda, a thread for each block or row.

A kernel works on blocks or rows side by side, in lanes. On a card every thread has one lane, so the constants that
count lanes become 1, and arrays of scratch become arrays of a thread's own, of sizes that must be known: that is all
that is changed in a source. Products are not contracted with sums (NVVM would, by default), division and square roots
are exact, and no sum is reordered, so that the card's bytes should be the processor's. (With contraction an H100 gave
99.88 % of Q4_K's codes alike, and more than 99.99 % of IQ4_XS's and IQ3_S's.)
"""

import ast
import inspect
import sys
import textwrap
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from functools import cache
from threading import RLock
from typing import Any

import numpy as np
from numba.core.dispatcher import Dispatcher

from dynq.errors import DynqError

_LOCK = RLock()
_LOCAL = ast.parse("_cuda.local.array", mode="eval").body
# what numba.cuda has under other names
_NAMES = {
    f"np.{name}": ast.parse(f"_cuda.libdevice.{other}", mode="eval").body
    for name, other in {"rint": "rintf", "floor": "floorf", "sqrt": "fsqrt_rn"}.items()
}
Known = tuple[tuple[str, int], ...]


class _Threaded(ast.NodeTransformer):
    """Puts known numbers in the place of names, and a thread's own arrays in that of np.empty and np.zeros."""

    def __init__(self, function: ast.FunctionDef, known: Mapping[str, int], space: Mapping[str, Any]):
        self.known = {name: value for name, value in known.items() if name not in _changing(function)}
        self.sizes = {name: value for name, value in space.items() if isinstance(value, int)} | dict(known)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if isinstance(node.ctx, ast.Load) and node.id in self.known:
            return ast.Constant(self.known[node.id])
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        return _NAMES.get(ast.unparse(node), node)

    def visit_Assign(self, node: ast.Assign) -> ast.stmt | list[ast.stmt]:
        call = ast.unparse(node.value.func) if isinstance(node.value, ast.Call) else ""
        if call in ("np.empty", "np.zeros") and isinstance(node.value, ast.Call):
            shape, dtype = node.value.args
            node.value = ast.Call(_LOCAL, [ast.Constant(self._number(shape)), dtype], [])
            target = node.targets[0]
            fill = ast.parse(f"{ast.unparse(target)}[:] = 0").body if call == "np.zeros" else []
            return [node, *fill]
        target, value = node.targets[0], node.value
        pairs: list[tuple[ast.expr, ast.expr]] = [(target, value)]
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = list(zip(target.elts, value.elts, strict=True))
        for name, value in pairs:
            if isinstance(name, ast.Name) and isinstance(number := self._number(value), int):
                self.sizes[name.id] = number
        self.generic_visit(node)
        return node

    def _number(self, node: ast.expr) -> Any:
        """The value of an expression of known numbers, None where it has others."""
        try:
            return eval(compile(ast.Expression(node), "", "eval"), {"__builtins__": {}}, self.sizes)
        except (NameError, AttributeError, TypeError, ZeroDivisionError, IndexError):
            return None


def _changing(function: ast.FunctionDef) -> set[str]:
    """Names that the function gives values of its own, sizes of arrays apart."""
    sizes = {
        id(name)
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute) and node.value.attr == "shape"
        for name in ast.walk(node)
    }
    stored = (node for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    return {node.id for node in stored if id(node) not in sizes}


@cache
def _cuda() -> Any:
    try:
        import numba_cuda  # noqa: F401 (what numba has of its own is older)
        from numba import cuda
    except ImportError as error:
        message = f"encoders on a graphics card need numba-cuda; pip install 'numba-cuda[cu13]': {error}"
        raise DynqError(message) from None
    warnings.filterwarnings("ignore", message="Grid size")  # numba would have more threads than there are rows
    return cuda


def usable(device: str) -> str:
    """The device if it is a card that numba can compile for, else `cpu`."""
    if not device.startswith("cuda"):
        return "cpu"
    try:
        cuda = _cuda()
        from numba.cuda.cudadrv import nvvm

        nvvm.NVVM()
        return device if cuda.is_available() else "cpu"
    except Exception:  # packages, compiler and driver each have their own errors, and older ones than these
        return "cpu"


@cache
def device_function(kernel: Dispatcher, known: Known) -> Any:
    """The kernel for one thread. known: constants and arguments that are numbers, which scratch is as large as."""
    function = kernel.py_func
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    space = dict(vars(sys.modules[function.__module__]))
    tree = ast.fix_missing_locations(_Threaded(definition, dict(known), space).visit(tree))
    for name in set(function.__code__.co_names) & set(space):
        if isinstance(space[name], Dispatcher):
            space[name] = device_function(space[name], known)
    space["_cuda"] = _cuda()
    exec(compile(tree, inspect.getsourcefile(function) or "", "exec"), space)
    return _cuda().jit(space[function.__name__], device=True, lto=False)


@contextmanager
def _uncontracted() -> Any:
    """While a kernel is compiled: keep a x b + c two operations, each of them rounded, as on the processor."""
    from numba.cuda.cudadrv import nvvm

    with _LOCK:
        original = nvvm.compile_ir
        nvvm.compile_ir = lambda ir, **options: original(ir, **(options | {"fma": False}))
        try:
            yield
        finally:
            nvvm.compile_ir = original


class OnCard:
    """A kernel that is launched on arrays of a card with as many threads as there are blocks or rows.

    known: as in device_function; slices: for arguments of the kernel what a thread, number t, takes of them, as source
    text.
    """

    def __init__(self, kernel: Dispatcher, known: Known, slices: Mapping[str, str]):
        names = list(inspect.signature(kernel.py_func).parameters)
        passed = ", ".join(name + slices.get(name, "") for name in names)
        given = ", ".join([*names, "_count"])
        source = f"def launch({given}):\n    t = _grid(1)\n    if t < _count:\n        _kernel({passed})\n"
        space = {"_kernel": device_function(kernel, known), "_grid": _cuda().grid}
        exec(source, space)
        # compiled at once: a linker that optimises would contract what NVVM is told not to (_uncontracted)
        self.launch = _cuda().jit(space["launch"], lto=False)

    def __call__(self, count: int, *arguments: Any) -> None:
        with _uncontracted():  # the first call with arrays of one kind compiles
            self.launch[(count + THREADS - 1) // THREADS, THREADS](*arguments, count)


# of a group: rows and blocks can be few, and every processor of a card should have some
THREADS = 32


# --- blocks ----------------------------------------------------------------------------------------------------------

# what the kernels that fit blocks call their results, one for each block
_RESULTS = ("codes", "scales", "mins", "d", "dmin", "m", "integers", "entries", "signs", "levels")
_SLICES = dict.fromkeys(("x", *_RESULTS), "[t : t + 1]") | {"w": "[t % w.shape[0] : t % w.shape[0] + 1]"}
# weights that share a scale, where it is no argument and not the whole block
_SUB = {"fit_symmetric": 16, "fit_super_blocks": 32, "fit": 8}


@cache
def _fit(kernel: Dispatcher, known: Known) -> OnCard:
    return OnCard(kernel, known, _SLICES)


def run(kernel: Dispatcher, *arguments: Any) -> None:
    """Call a kernel that fits blocks, its arguments x, w, numbers, tables and results to fill, on the card."""
    cuda = _cuda()
    given = inspect.signature(kernel.py_func).bind(*arguments).arguments
    known = {name: int(value) for name, value in given.items() if isinstance(value, int) and name != "rounds"}
    lanes = given["x"].shape[1] // known.get("sub", _SUB.get(kernel.py_func.__name__, given["x"].shape[1]))
    known |= {"GROUP": 1, "LANES": lanes, "lanes": lanes, "width": given["x"].shape[1]}
    results = {name: cuda.device_array_like(value) for name, value in given.items() if name in _RESULTS}
    rest = {name: _there(name, value) for name, value in given.items() if name not in _RESULTS}
    with _LOCK:  # threads that ask at the same time wait for one
        fit = _fit(kernel, tuple(sorted(known.items())))
    fit(len(given["x"]), *((rest | results)[name] for name in given))
    for name, result in results.items():
        result.copy_to_host(given[name])


_TABLES: dict[int, tuple[np.ndarray, Any]] = {}


def table(array: np.ndarray) -> Any:
    """An array that is kept as long as the program, on the card: copied once, and its id stays its own."""
    if id(array) not in _TABLES:
        _TABLES[id(array)] = array, _cuda().to_device(array)
    return _TABLES[id(array)][1]


def shared(tensor: Any) -> Any:
    """A tensor on the card as numba's own array; nothing is copied, and no stream is waited for."""
    return _cuda().as_cuda_array(tensor, sync=False)


def _there(name: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return type(value)(*map(table, value))
    if not isinstance(value, np.ndarray):
        return value
    return table(value) if name in ("values", "entry_at") else _cuda().to_device(np.ascontiguousarray(value))
