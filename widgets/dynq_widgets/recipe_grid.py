"""The recipe grid: layers down, kinds of tensor across; colour = bits, number = share of the predicted KLD."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traitlets import Dict, List, Unicode

from dynq import figures
from dynq.editing import Draft
from dynq.errors import DynqError
from dynq.files import replacing
from dynq.recipe import Recipe
from dynq_widgets.palette import palette
from dynq_widgets.view import LIVE, View, source

if TYPE_CHECKING:
    from dynq.checkpoint import TensorInfo

_SUFFIX = ".recipe.json"


class RecipeGrid(View):
    """Edit a `dynq.editing.Draft`: set and pin formats of many tensors, undo, solve the rest again, save, load.

    draft: what is edited; it may be shared with other views. beside: a recipe of the same model or the draft of any,
    shown on the right, where arrows mark more and fewer bits. path: where "Save" writes, ending in ".recipe.json";
    "Export" writes ".tensor-types.txt" beside it.
    """

    _esm = source("common.js", "recipe_grid.js")
    _css = source("theme.css", "recipe_grid.css")

    cells: List[Any] = List().tag(sync=True)  # [name, layer or None, kind] of every quantizable tensor
    state = Dict().tag(sync=True)  # of the draft; lists in the order of `cells`
    other_cells: List[Any] = List().tag(sync=True)
    other: Any = Dict(allow_none=True, default_value=None).tag(sync=True)
    palette = Dict().tag(sync=True)  # format -> bits per weight, colour, ink
    selection = List(Unicode()).tag(sync=True)  # names, set by the browser
    alternatives: List[Any] = List().tag(sync=True)  # what the selection may become
    message = Dict().tag(sync=True)
    path = Unicode().tag(sync=True)

    def __init__(self, draft: Draft, *, beside: "Recipe | Draft | None" = None, path: str | Path = "draft.recipe.json"):
        self.draft, self.beside = draft, beside
        tensors = beside.budget.tensors if isinstance(beside, Draft) else draft.budget.tensors
        super().__init__(
            cells=_cells(draft.state.formats, draft.budget.tensors),
            other_cells=[] if beside is None else _cells(self._other_formats(), tensors),
            state=self._state(),
            other=self._other(),
            palette=palette(self._formats()),
            path=str(path),
        )
        draft.listen(self._refresh)
        if isinstance(beside, Draft) and beside is not draft:
            beside.listen(self._refresh)
        self.observe(self._look, "selection")
        if LIVE:
            self.on_msg(lambda _, content, __: self.do(content))

    def twin(self) -> str:
        tensors = self.draft.budget.tensors
        mine = figures.recipe_grid(self.draft.recipe(), tensors).html()
        if self.beside is None:
            return mine
        theirs = self.beside.recipe() if isinstance(self.beside, Draft) else self.beside
        other = self.beside.budget.tensors if isinstance(self.beside, Draft) else tensors
        pages = "".join(f"<div>{page}</div>" for page in (mine, figures.recipe_grid(theirs, other).html()))
        return f'<div style="display:flex;flex-wrap:wrap;gap:1em">{pages}</div>'

    def do(self, what: Mapping[str, Any]) -> None:
        """Carry out what the browser asks for: {"do": "set", "names": [...], "format": "Q6_K"}. Says how it went."""
        try:
            self.message = {"kind": "info", "text": self._do(what)}
        except (DynqError, OSError) as error:
            self.message = {"kind": "error", "text": str(error)}

    def _do(self, what: Mapping[str, Any]) -> str:
        draft, names, action = self.draft, list(what.get("names", ())), what["do"]
        if action == "set":
            n = draft.set(names, what["format"])
            return f"{n} of {len(names)} tensors: {what['format']}, pinned"
        if action == "step":
            n = draft.step(names, bool(what["up"]))
            return f"{n} of {len(names)} tensors: one format {'up' if what['up'] else 'down'}, pinned"
        if action == "pin":
            draft.pin(names, bool(what["on"]))
            return f"{len(names)} tensors {'pinned' if what['on'] else 'let go'}"
        if action == "solve":
            draft.solve()
            return f"all but {len(draft.state.pinned)} pinned chosen anew for {draft.totals().target}"
        if action == "undo":
            draft.undo()
            return "undone"
        if action == "redo":
            draft.redo()
            return "done again"
        return self._file(action)

    def _file(self, action: str) -> str:
        path = Path(self.path).expanduser()
        if not path.name.endswith(_SUFFIX) or path.name == _SUFFIX:
            raise DynqError(f"{self.path!r} is no place for a recipe; name it like draft{_SUFFIX}")
        if action == "save":
            self.draft.recipe().save(path)
            return f"saved as {path}"
        if action == "load":
            self.draft.load(Recipe.load(path))
            return f"loaded {path}"
        if action == "export":
            types = path.with_name(path.name.removesuffix(_SUFFIX) + ".tensor-types.txt")
            with replacing(types) as beside:
                beside.write_text(self.draft.recipe().to_tensor_types(), encoding="utf-8")
            return f"exported for llama-quantize --tensor-type-file as {types}"
        raise DynqError(f"the grid does not know how to {action}")

    def _refresh(self) -> None:
        self.state = self._state()
        self.other = self._other()
        self._look()

    def _look(self, _: Any = None) -> None:
        known = [name for name in self.selection if name in self.draft.state.formats]
        self.alternatives = [told._asdict() for told in self.draft.alternatives(known)]

    def _state(self) -> dict[str, Any]:
        return _state(self.draft)

    def _formats(self) -> set[str]:
        """All that may be shown."""
        drafts = [own for own in (self.draft, self.beside) if isinstance(own, Draft)]
        found = {option.format for own in drafts for row in own.budget.data.options.values() for option in row}
        return found | set(self._other_formats().values() if self.beside is not None else ())

    def _other_formats(self) -> Mapping[str, str]:
        if isinstance(self.beside, Draft):
            return self.beside.state.formats
        assert self.beside is not None
        # in the draft's order, so that the columns stand alike
        return {name: self.beside.formats[name] for name in self.draft.state.formats if name in self.beside.formats}

    def _other(self) -> dict[str, Any] | None:
        if self.beside is None:
            return None
        if isinstance(self.beside, Draft):
            return _state(self.beside)
        chosen, recipe = self._other_formats(), self.beside
        options = {(name, o.format): o.loss for name, row in self.draft.budget.data.options.items() for o in row}
        losses = [options.get(pair) for pair in chosen.items()]
        whole = sum(loss for loss in losses if loss is not None)
        shares = [loss / whole if loss is not None and whole > 0 and None not in losses else None for loss in losses]
        totals = {"target": recipe.target, "used": recipe.tensor_bytes, "budget": None, "bpw": recipe.bpw}
        totals |= {"tensor_bytes": recipe.tensor_bytes, "kld": recipe.predicted_kld}
        return {"formats": list(chosen.values()), "pinned": [], "shares": shares, "totals": totals}


def _cells(names: Mapping[str, str], tensors: "Mapping[str, TensorInfo]") -> list[list[Any]]:
    return [[name, tensors[name].layer, tensors[name].kind] for name in names]


def _state(draft: Draft) -> dict[str, Any]:
    pinned, shares = draft.state.pinned, draft.shares()
    return {
        "formats": list(draft.state.formats.values()),
        "pinned": [i for i, name in enumerate(draft.state.formats) if name in pinned],
        "shares": [round(shares[name], 5) for name in draft.state.formats],
        "totals": draft.totals()._asdict(),
        "can_undo": draft.can_undo,
        "can_redo": draft.can_redo,
    }
