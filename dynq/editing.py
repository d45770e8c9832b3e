"""A recipe that a person edits: set a format, pin, undo; the rest is solved again for any size.

Nothing here knows of a screen. What shows a draft listens to it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from dynq import formats
from dynq.allocate import Option, Problem, Target
from dynq.budget import Budget
from dynq.errors import DynqError
from dynq.recipe import Recipe

_KEPT = 200  # steps that can be undone


@dataclass(frozen=True)
class State:
    """One state of a draft. formats: of every quantizable tensor; pinned: those that solving leaves alone."""

    problem: Problem
    formats: dict[str, str]
    pinned: frozenset[str] = frozenset()

    @property
    def pins(self) -> dict[str, str]:
        """The pinned tensors and their formats."""
        return {name: fmt for name, fmt in self.formats.items() if name in self.pinned}


class Totals(NamedTuple):
    """used, budget: bytes, of the whole file or of tensor data as the target is; kld: predicted, nats per token."""

    target: str
    used: int
    budget: int
    tensor_bytes: int
    bpw: float
    kld: float


class Alternative(NamedTuple):
    """A format that `tensors` of some tensors may take, and what that changes: bytes, and predicted KLD in nats."""

    format: str
    tensors: int
    bytes: int
    kld: float


class Draft:
    """An editable recipe.

    A tensor whose format a person sets is pinned: the next `solve` or `aim` keeps it and chooses the others anew.
    start: a recipe to begin with, where it came from included; by default the best one for the target, and provenance
    says where that came from.
    """

    def __init__(
        self,
        budget: Budget,
        target: str | Target,
        *,
        start: Recipe | None = None,
        provenance: Mapping[str, Any] | None = None,
    ):
        self.budget = budget
        problem = budget.at(target)
        self.state = _taken(problem, start) if start is not None else State(problem, problem.solve())
        told = start.provenance if start is not None else provenance or {}
        # what a search measured is not true of what is made by hand
        self.provenance = {key: value for key, value in told.items() if key not in ("allocation", "search")}
        self._undo: list[State] = []
        self._redo: list[State] = []
        self._moving = False
        self._listeners: list[Callable[[], None]] = []

    def listen(self, listener: Callable[[], None]) -> None:
        """`listener` is called after every change."""
        self._listeners.append(listener)

    # --- what it is ---------------------------------------------------------------------------------------------------

    @property
    def can_undo(self) -> bool:
        return bool(self._undo)

    @property
    def can_redo(self) -> bool:
        return bool(self._redo)

    def chosen(self) -> dict[str, Option]:
        """Format, bytes and loss of every quantizable tensor."""
        return self.state.problem.chosen(self.state.formats)

    def totals(self) -> Totals:
        problem, chosen = self.state.problem, self.chosen()
        used = problem.budget - problem.room + sum(option.bytes for option in chosen.values())
        data = self.budget.data
        in_data = chosen if problem.target.kind != "file" else data.chosen(self.state.formats)
        tensor_bytes = data.budget - data.room + sum(option.bytes for option in in_data.values())
        kld = sum(option.loss for option in chosen.values())
        bpw = 8 * tensor_bytes / self.budget.n_weights
        return Totals(problem.target.text, used, problem.budget, tensor_bytes, bpw, kld)

    def shares(self) -> dict[str, float]:
        """The part of the predicted KLD that each tensor is to blame for; zeros where nothing is lost."""
        losses = {name: option.loss for name, option in self.chosen().items()}
        total = sum(losses.values())
        return {name: loss / total if total > 0 else 0.0 for name, loss in losses.items()}

    def layer_shares(self) -> dict[int | None, dict[str, float]]:
        """layer -> format -> the part of the layer's quantizable weights in it; None: outside of the layers."""
        counted: dict[int | None, dict[str, int]] = {}
        for name, fmt in self.state.formats.items():
            info = self.budget.tensors[name]
            own = counted.setdefault(info.layer, {})
            own[fmt] = own.get(fmt, 0) + info.n_weights
        order = sorted(counted, key=lambda layer: (layer is not None, layer))
        return {layer: {fmt: n / sum(counted[layer].values()) for fmt, n in counted[layer].items()} for layer in order}

    def alternatives(self, names: Iterable[str]) -> list[Alternative]:
        """What each format would change if these tensors took it, fewest bits first."""
        found: dict[str, Alternative] = {}
        names, chosen = list(names), self.chosen()
        every = dict.fromkeys(option.format for name in names for option in self.state.problem.options[name])
        for fmt in sorted(every, key=lambda fmt: (formats.get(fmt).bpw, fmt)):
            found[fmt] = Alternative(fmt, 0, 0, 0.0)
            for name in names:
                if (new := self._option(name, fmt)) is not None:
                    _, n, size, kld = found[fmt]
                    old = chosen[name]
                    found[fmt] = Alternative(fmt, n + 1, size + new.bytes - old.bytes, kld + new.loss - old.loss)
        return list(found.values())

    def recipe(self) -> Recipe:
        """The draft as a recipe; its pins stand in the allocation's."""
        state = self.state
        return replace(state.problem, pins=state.problem.pins | state.pins).recipe(state.formats, self.provenance)

    # --- what a person does -------------------------------------------------------------------------------------------

    def set(self, names: Iterable[str], fmt: str) -> int:
        """Store these tensors in `fmt`, or in llama.cpp's fallback for their rows, and pin them; how many took it.

        DynqError where none has it among its options.
        """
        names = list(names)
        taken = {name: option.format for name in names if (option := self._option(name, fmt)) is not None}
        if not taken:
            raise DynqError(
                f"{fmt} is no option of {_some(names)}: it was not measured, or a pin or profile forbids it"
            )
        self._take(taken)
        return len(taken)

    def step(self, names: Iterable[str], up: bool) -> int:
        """Give each of these tensors its next larger (smaller) option that errs less (more), and pin it; how many."""
        taken = {}
        for name in names:
            row, now = self.state.problem.options[name], self.state.formats[name]
            useful = [o for o in row if not any(p.bytes <= o.bytes and p.loss < o.loss for p in row)]
            size = next(o.bytes for o in row if o.format == now)
            beyond = [o for o in useful if (o.bytes > size if up else o.bytes < size)]
            if beyond:
                taken[name] = (min if up else max)(beyond, key=lambda o: (o.bytes, -o.loss if up else o.loss)).format
        if taken:
            self._take(taken)
        return len(taken)

    def pin(self, names: Iterable[str], on: bool = True) -> None:
        """Keep these tensors' formats when the rest is solved again; on=False: let them go."""
        self._check(names := list(names))
        pinned = self.state.pinned | set(names) if on else self.state.pinned - set(names)
        if pinned != self.state.pinned:
            self._change(replace(self.state, pinned=frozenset(pinned)))

    def aim(self, target: str | Target, *, moving: bool = False) -> None:
        """Solve for another size. moving: a slider is on its way; its whole way is one step to undo.

        DynqError: not a size, or too small for the pins.
        """
        self._solve(self.budget.at(target), continues=self._moving, moving=moving)

    def solve(self) -> None:
        """Choose what is not pinned anew, within the target. DynqError where the pins leave no room."""
        self._solve(self.state.problem)

    def load(self, recipe: Recipe) -> None:
        """Take a recipe's formats, and its pins of single tensors. DynqError if it does not belong to this model."""
        self._change(_taken(self.state.problem, recipe))

    def undo(self) -> None:
        if self._undo:
            self._redo.append(self.state)
            self._show(self._undo.pop())

    def redo(self) -> None:
        if self._redo:
            self._undo.append(self.state)
            self._show(self._redo.pop())

    # --- inside -------------------------------------------------------------------------------------------------------

    def _option(self, name: str, fmt: str) -> Option | None:
        """The option of a tensor that is `fmt`, or its fallback where its rows do not divide into blocks."""
        self._check([name])
        row = self.state.problem.options[name]
        real = formats.usable(fmt, self.budget.tensors[name].shape[-1])
        return next((option for option in row if option.format == real), None)

    def _check(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.state.formats:
                raise DynqError(f"{name!r} is no tensor that can be quantized here")

    def _take(self, taken: Mapping[str, str]) -> None:
        pinned = self.state.pinned | set(taken)
        self._change(replace(self.state, formats=self.state.formats | dict(taken), pinned=pinned))

    def _solve(self, problem: Problem, continues: bool = False, moving: bool = False) -> None:
        pinned = self.state.pins
        inside = problem.pinned(pinned)
        try:
            taken = inside.resized(problem.target, problem.budget).solve(exact=not moving)
        except DynqError as error:
            raise DynqError(f"{error}, with {len(pinned)} pinned" if pinned else str(error)) from None
        self._change(replace(self.state, problem=problem, formats=taken), continues, moving)

    def _change(self, state: State, continues: bool = False, moving: bool = False) -> None:
        if not continues:
            self._undo = [*self._undo[-_KEPT + 1 :], self.state]
        self._redo = []
        self._show(state, moving)

    def _show(self, state: State, moving: bool = False) -> None:
        self.state, self._moving = state, moving
        for listener in self._listeners:
            listener()


def _taken(problem: Problem, recipe: Recipe) -> State:
    """The state that a recipe describes. DynqError if it does not belong to this problem."""
    taken = {}
    for name, row in problem.options.items():
        if name not in recipe.formats:
            raise DynqError(f"the recipe has no {name}: it belongs to another model")
        taken[name] = recipe.formats[name]
        if not any(option.format == taken[name] for option in row):
            raise DynqError(f"the recipe stores {name} as {taken[name]}, which is no option here: measure that format")
    pins = recipe.provenance.get("allocation", {}).get("pins", {})
    return State(problem, taken, frozenset(name for name in taken if pins.get(name) == taken[name]))


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"any of {len(names)} tensors"
