"""The kernels on a graphics card: their own sources, compiled by numba.cuda, a thread for each block or row.

A kernel works on blocks or rows side by side, in lanes. On a card every thread has one lane, so the constants that
count lanes become 1, and arrays of scratch become arrays of a thread's own, of sizes that must be known: that is all
that is changed in a source. Products are not contracted with sums (NVVM would, by default), division and square roots
are exact, and no sum is reordered: the card gives the same bytes as the processor.
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Mapping
from contextlib import contextmanager
from functools import cache, cached_property
from threading import RLock
from typing import Any

import numpy as np
import torch
from numba.core.dispatcher import Dispatcher

from dynq.errors import DynqError

_LOCK = RLock()
_LOCAL = ast.parse("_cuda.local.array", mode="eval").body
# what numba.cuda has under another name
_ROUNDINGS = {
    f"np.{name}": ast.parse(f"_cuda.libdevice.{name}f", mode="eval").body for name in ("rint", "floor")
}
Known = tuple[tuple[str, int], ...]


class _Threaded(ast.NodeTransformer):
    """Puts known numbers in the place of names, and a thread's own arrays in that of np.empty and np.zeros."""

    def __init__(self, known: Mapping[str, int], space: Mapping[str, Any]):
        self.known = known
        self.sizes = {name: value for name, value in space.items() if isinstance(value, int)} | known

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if isinstance(node.ctx, ast.Load) and node.id in self.known:
            return ast.Constant(self.known[node.id])
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        return _ROUNDINGS.get(ast.unparse(node), node)

    def visit_Assign(self, node: ast.Assign) -> ast.stmt | list[ast.stmt]:
        call = ast.unparse(node.value.func) if isinstance(node.value, ast.Call) else ""
        if call in ("np.empty", "np.zeros") and isinstance(node.value, ast.Call):
            shape, dtype = node.value.args
            node.value = ast.Call(_LOCAL, [ast.Constant(self._number(shape)), dtype], [])
            target = node.targets[0]
            fill = ast.parse(f"{ast.unparse(target)}[:] = 0").body if call == "np.zeros" else []
            return [node, *fill]
        target = node.targets[0]
        pairs = zip(target.elts, node.value.elts, strict=True) if _both_tuples(target, node.value) else [(target, node.value)]
        for name, value in pairs:
            if isinstance(name, ast.Name) and isinstance(number := self._number(value), int):
                self.sizes.setdefault(name.id, number)
        self.generic_visit(node)
        return node

    def _number(self, node: ast.expr) -> Any:
        """The value of an expression of known numbers, None where it has others."""
        try:
            return eval(compile(ast.Expression(node), "", "eval"), {"__builtins__": {}}, self.sizes)
        except (NameError, AttributeError, TypeError, ZeroDivisionError, IndexError):
            return None


def _both_tuples(target: ast.expr, value: ast.expr) -> bool:
    return isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)


@cache
def _cuda() -> Any:
    try:
        from numba import cuda
        from numba.cuda.cudadrv import nvvm  # noqa: F401
    except ImportError as error:
        raise DynqError(f"encoding on a graphics card needs numba-cuda (pip install 'numba-cuda[cu13]'): {error}") from None
    return cuda


@cache
def device_function(kernel: Dispatcher, known: Known) -> Any:
    """The kernel for one thread. known: constants and arguments that are numbers, which scratch is as large as."""
    function = kernel.py_func
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    space = dict(vars(sys.modules[function.__module__]))
    tree = ast.fix_missing_locations(_Threaded(dict(known), space).visit(tree))
    for name in set(function.__code__.co_names) & set(space):
        if isinstance(space[name], Dispatcher):
            space[name] = device_function(space[name], known)
    space["_cuda"] = _cuda()
    exec(compile(tree, inspect.getsourcefile(function) or "", "exec"), space)
    return _cuda().jit(device=True)(space[function.__name__])


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
    """A kernel that is launched on torch tensors with as many threads as there are blocks or rows.

    known: as in device_function; slices: for arguments of the kernel what a thread, number t, takes of them, as source
    text. Arguments that are NumPy arrays are tables that stay on the card. With tensors on the processor the kernel
    itself is called.
    """

    def __init__(self, kernel: Dispatcher, known: Mapping[str, int], slices: Mapping[str, str]):
        self.kernel, self.known, self.slices = kernel, known, slices
        self.types: set[tuple[Any, ...]] = set()

    @cached_property
    def launch(self) -> Any:
        names = list(inspect.signature(self.kernel.py_func).parameters)
        passed = ", ".join(name + self.slices.get(name, "") for name in names)
        given = ", ".join([*names, "_count"])
        source = f"def launch({given}):\n    t = _grid(1)\n    if t < _count:\n        _kernel({passed})\n"
        known = tuple(sorted(self.known.items()))
        space = {"_kernel": device_function(self.kernel, known), "_grid": _cuda().grid}
        exec(source, space)
        return _cuda().jit(space["launch"])

    def __call__(self, count: int, *arguments: Any) -> None:
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        if not tensors[0].is_cuda:
            self.kernel(*(x.numpy() if isinstance(x, torch.Tensor) else x for x in arguments))
            return
        given = [_table(x, tensors[0].device) if isinstance(x, np.ndarray) else x for x in arguments]
        configured = self.launch[(count + THREADS - 1) // THREADS, THREADS]
        types = tuple((x.dtype, x.dim()) if isinstance(x, torch.Tensor) else type(x) for x in given)
        if types in self.types:
            configured(*given, count)
            return
        with _uncontracted():
            configured(*given, count)
        self.types.add(types)


THREADS = 32  # of a group; rows are few, and every processor of a card should have some
_TABLES: dict[tuple[int, torch.device], tuple[np.ndarray, torch.Tensor]] = {}


def _table(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the card; it is kept, so that its id stays its own."""
    key = id(array), device
    if key not in _TABLES:
        _TABLES[key] = array, torch.from_numpy(array).to(device)
    return _TABLES[key][1]
