"""Pictures of a run: each is a plotly figure with an HTML table beside it, made from the same numbers.

The table is what remains where JavaScript is stripped (GitHub) and what a screen reader reads. Colours are Cividis and
Okabe and Ito's palette, which the colour-blind can tell apart.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from dynq import formats
from dynq.evaluate.tables import layer_rows, layers_title
from dynq.label_places import places
from dynq.progress import is_static

if TYPE_CHECKING:
    from dynq.checkpoint import TensorInfo
    from dynq.evaluate.pair import Encoded
    from dynq.imatrix import Importance
    from dynq.recipe import Recipe

BLUE, ORANGE, GREEN, PINK, BLACK = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#333333"
SCALE = "Cividis"
# ticks that say the whole number: plotly's own leave "5" for 0.5
NATS = {"type": "log", "tickvals": [m * 10.0**e for e in range(-9, 2) for m in (1, 2, 5)], "tickformat": "~g"}


@dataclass(frozen=True)
class Picture:
    """A figure and its table. As the last value of a notebook's cell both are shown.

    A live notebook draws with plotly's own renderer, which needs no network; one that runs in batch gets HTML that
    fetches plotly.js when it is looked at, so that a saved notebook stays small.
    """

    figure: go.Figure
    table: str

    def html(self) -> str:
        """Both as HTML. The figure fetches plotly.js when it is looked at."""
        page: str = self.figure.to_html(full_html=False, include_plotlyjs="cdn", config={"displayModeBar": False})
        return page + self.table

    def _ipython_display_(self) -> None:
        from IPython.display import HTML, display

        if is_static():
            display(HTML(self.html()))
        else:
            self.figure.show()
            display(HTML(self.table))


def html_table(rows: Sequence[Mapping[str, Any]], caption: str = "") -> str:
    """Rows of a table as HTML; columns are the keys of the first row.

    Numbers stand right, floats with four digits; words stand left, whatever the page's own style says.
    """
    if not rows:
        return f"<p>{escape(caption)}: nothing to show</p>"
    head = "".join(f"<th{_side(rows[0][key])}>{escape(str(key))}</th>" for key in rows[0])
    body = "".join("<tr>" + "".join(_cell(row[key]) for key in rows[0]) + "</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if value is None:
        return "<td></td>"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    shown = escape(str(value)) if not number else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f"<td{_side(value)}>{shown}</td>"


def _side(value: Any) -> str:
    words = isinstance(value, (bool, str))
    return "" if value is None else f' style="text-align:{"left" if words else "right"}"'


def styled(figure: go.Figure, title: str, height: int = 420, **more: Any) -> go.Figure:
    return figure.update_layout(
        title=title, height=height, width=860, margin={"l": 70, "r": 30, "t": 60, "b": 60}, template="plotly_white"
    ).update_layout(**more)


# --- 03: importance ---------------------------------------------------------------------------------------------------


def importance_map(
    importance: "Importance", tensors: "Mapping[str, TensorInfo]", kind: str = "attn_q", bins: int = 256
) -> Picture:
    """Importance of each input channel of one kind of tensor, layer by layer, relative to the layer's mean.

    Wide layers are drawn in `bins` bins, each as bright as its largest channel. The table has every kind: the largest
    channel over the median one, and the share of the sum that the top 1 % of channels carry, as means over layers.
    """
    shares: dict[str, list[tuple[float, float]]] = {}
    rows: list[np.ndarray] = []
    layers: list[str] = []
    for name, info in tensors.items():
        mean = importance.mean(name)
        if mean is None:
            continue
        values = np.sort(mean.reshape(-1, mean.shape[-1]).mean(axis=0, dtype=np.float64))[::-1]
        top = values[: max(1, len(values) // 100)].sum() / max(values.sum(), 1e-300)
        shares.setdefault(info.kind, []).append((values[0] / max(float(np.median(values)), 1e-300), top))
        if info.kind == kind:
            flat = mean.reshape(-1, mean.shape[-1]).mean(axis=0, dtype=np.float64)
            cells = [float(part.max()) for part in np.array_split(flat, min(bins, len(flat)))]
            rows.append(np.log10(np.maximum(np.array(cells) / max(flat.mean(), 1e-300), 1e-6)))
            layers.append(str(info.layer))
    figure = go.Figure(
        go.Heatmap(z=[list(map(float, row)) for row in rows], y=layers, colorscale=SCALE, colorbar={"title": "log10"})
    )
    styled(figure, f"Importance of the channels that {kind} reads, over the layer's mean", 380)
    figure.update_xaxes(title="input channel").update_yaxes(title="layer", type="category")
    table = [
        {
            "kind": found,
            "tensors": len(pairs),
            "largest / median channel": float(np.mean([a for a, _ in pairs])),
            "share of the top 1 % of channels": float(np.mean([b for _, b in pairs])),
        }
        for found, pairs in shares.items()
    ]
    return Picture(figure, html_table(table, "How uneven the channels are, mean over layers"))


# --- 05: the recipe ---------------------------------------------------------------------------------------------------


def recipe_grid(recipe: "Recipe", tensors: "Mapping[str, TensorInfo]", mix: Mapping[str, str] | None = None) -> Picture:
    """The formats of a recipe: layers down, kinds of tensor across, colour = bits per weight.

    mix: another recipe's formats of about the same size; the table then has how the two spend their bytes.
    """
    shown = {name: fmt for name, fmt in recipe.formats.items() if tensors[name].quantizable}
    kinds = list(dict.fromkeys(tensors[name].kind for name in shown))
    layers = sorted({tensors[name].layer for name in shown}, key=lambda layer: -1 if layer is None else layer)
    at = {(tensors[name].layer, tensors[name].kind): fmt for name, fmt in shown.items()}
    names = [["" if (fmt := at.get((layer, kind))) is None else fmt for kind in kinds] for layer in layers]
    bits = [[formats.get(fmt).bpw if fmt else None for fmt in line] for line in names]
    figure = go.Figure(
        go.Heatmap(
            z=bits,
            x=kinds,
            y=["no layer" if layer is None else str(layer) for layer in layers],
            text=names,
            texttemplate="%{text}",
            textfont={"size": 10},
            colorscale=SCALE,
            colorbar={"title": "bpw"},
            xgap=1,
            ygap=1,
        )
    )
    styled(figure, f"Recipe for {recipe.target}: {recipe.bpw:.3f} bpw", 220 + 22 * len(layers))
    figure.update_yaxes(autorange="reversed", title="layer", type="category")
    lines = []
    for kind in kinds:
        own = [name for name in shown if tensors[name].kind == kind]
        line: dict[str, Any] = {"kind": kind, "tensors": len(own), "bpw": _bpw(own, recipe.formats, tensors)}
        if mix:
            line["bpw in the mix"] = _bpw(own, mix, tensors)
        found = [recipe.formats[name] for name in own]
        line["formats"] = ", ".join(
            f"{found.count(fmt)} {fmt}" for fmt in sorted(set(found), key=lambda f: formats.get(f).bpw)
        )
        lines.append(line)
    return Picture(figure, html_table(lines, "Where the bits go"))


def _bpw(names: Iterable[str], recipe: Mapping[str, str], tensors: "Mapping[str, TensorInfo]") -> float:
    names = list(names)
    size = sum(formats.tensor_bytes(recipe[name], tensors[name].shape) for name in names)
    return 8 * size / sum(tensors[name].n_weights for name in names)


def search_steps(lines: Sequence[Mapping[str, Any]]) -> Picture:
    """Held-out KLD at the start and after each accepted step of a search. lines: of `dynq.search_log.read_log`."""
    steps = [line for line in lines if "kld_held_out" in line]
    held_out = [line["kld_held_out"] for line in steps]
    figure = go.Figure(
        go.Scatter(
            x=list(range(len(steps))),
            y=held_out,
            text=["start", *(f"{len(line['tried'])} changes" for line in steps[1:])],
            mode="lines+markers",
            marker={"color": BLUE, "size": 8},
            line={"color": BLUE, "width": 1.5},
        )
    )
    best = int(np.argmin(held_out))
    figure.add_scatter(
        x=[best],
        y=[held_out[best]],
        mode="markers",
        name="taken",
        marker={"color": ORANGE, "size": 14, "symbol": "star"},
    )
    figure.data[0].name = "accepted"
    tried = len(lines) - 1
    styled(figure, f"{len(steps) - 1} of {tried} proposals accepted, step {best} taken", 340)
    figure.update_xaxes(title="step", dtick=1).update_yaxes(title="mean KLD, held-out chunks, nats")
    table = [
        {"step": 0, "changes": "start", "bytes": steps[0]["bytes"], "expected": None, "KLD change": None, "t": None}
    ]
    for step, line in enumerate(steps[1:], 1):
        changes = ", ".join(f"{name.removesuffix('.weight')} {a} to {b}" for name, (a, b) in line["tried"].items())
        table.append(
            {
                "step": step,
                "changes": changes,
                "bytes": line["bytes"],
                "expected": line["estimate"],
                "KLD change": line["kld"][1] - line["kld"][0],
                "t": line["t"],
            }
        )
    rows = [row | {"KLD held out": held} for row, held in zip(table, held_out, strict=True)]
    return Picture(figure, html_table(rows, "Accepted steps: expected on one part of the chunks, tested on another"))


# --- 06: the file -----------------------------------------------------------------------------------------------------


def feedback_gain(told: Sequence[Mapping[str, Any]], tensors: "Mapping[str, TensorInfo]") -> Picture:
    """Output error of each fed-back tensor over plain encoding's, by kind; in the table also what coupling its rows
    brought beside that. told: of `dynq.layer_inputs.reports`."""
    by_kind: dict[str, list[tuple[str, float]]] = {}
    coupled: dict[str, list[float]] = {}
    left = Counter[str]()
    why: dict[str, dict[str, None]] = {}
    for entry in told:
        info = tensors[entry["tensor"]]
        if not info.quantizable:
            continue
        kind = info.kind
        if entry["reason"]:  # of a stack perhaps that of some experts alone
            why.setdefault(kind, {})[entry["reason"]] = None
        if entry["level"] == "feedback":
            by_kind.setdefault(kind, []).append((entry["tensor"], entry["gain"]))
            coupled.setdefault(kind, []).append(entry["coupled"])
        else:
            left[kind] += 1
    figure = go.Figure()
    for kind, points in by_kind.items():
        figure.add_box(
            y=[ratio for _, ratio in points],
            text=[name for name, _ in points],
            name=kind,
            boxpoints="all",
            pointpos=0,
            jitter=0.6,
            marker={"color": BLUE, "size": 5},
            line={"width": 1},
            fillcolor="rgba(0,0,0,0)",
        )
    styled(figure, "Output error with feedback, on text kept aside", showlegend=False)
    figure.add_hline(y=1, line={"color": BLACK, "dash": "dot", "width": 1})
    figure.update_yaxes(title="squared error / that of plain", range=[0, 1.05])
    if not by_kind:
        figure.update_xaxes(visible=False)
        figure.add_annotation(
            text="no tensor is fed back: the table says why", x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False
        )
    rows = [
        {
            "kind": kind,
            "fed back": len(points := by_kind.get(kind, [])),
            "mean": _geometric([r for _, r in points]),
            "worst": max(r for _, r in points) if points else None,
            "rows coupled": _geometric(coupled.get(kind, [])),
            "not fed back": left[kind],
            "because": "; ".join(why.get(kind, {})),
        }
        for kind in dict.fromkeys([*by_kind, *left])
    ]
    return Picture(figure, html_table(rows, "Squared output error over that of plain encoding"))


def _geometric(ratios: Sequence[float]) -> float | None:
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def bytes_by_format(recipe: "Recipe", tensors: "Mapping[str, TensorInfo]") -> Picture:
    """How many bytes of a file each format takes, stacked by kind of tensor."""
    found = sorted(set(recipe.formats.values()), key=lambda fmt: (formats.get(fmt).bpw, fmt))
    size = {name: formats.tensor_bytes(fmt, tensors[name].shape) for name, fmt in recipe.formats.items()}
    figure = go.Figure()
    for kind in dict.fromkeys(info.kind for info in tensors.values() if info.quantizable):
        own = [name for name in size if tensors[name].kind == kind]
        totals = [sum(size[name] for name in own if recipe.formats[name] == fmt) / 1e6 for fmt in found]
        figure.add_bar(x=found, y=totals, name=kind)
    styled(figure, f"What the {recipe.tensor_bytes:,} bytes of tensor data are", barmode="stack")
    figure.update_yaxes(title="MB (10^6 bytes)")
    lines = []
    for fmt in found:
        own = [name for name, chosen in recipe.formats.items() if chosen == fmt]
        weights = sum(tensors[name].n_weights for name in own)
        total = sum(size[name] for name in own)
        lines.append(
            {"format": fmt, "bpw": formats.get(fmt).bpw, "tensors": len(own), "weights": weights, "bytes": total}
        )
    return Picture(figure, html_table(lines, "Formats in the file"))


# --- 07: the proof ----------------------------------------------------------------------------------------------------


def frontier(evaluation: Mapping[str, Any]) -> Picture:
    """KLD against size for everything that was scored; between two mixes the line is log KLD linear in bytes.

    Every kind has a colour and a mark of its own. A file with "dominated_by" (see dynq.evaluate.files) is drawn hollow.
    """
    unit, name_of_unit = (1e9, "GB (10^9 bytes)") if _largest(evaluation) >= 1e9 else (1e6, "MB (10^6 bytes)")
    style = {
        "mix": ("llama.cpp's mixes", ORANGE, "circle", "lines+markers+text"),
        "other mix": ("the mix asked for", GREEN, "square", "markers+text"),
        "uniform": ("one format", PINK, "triangle-up", "markers+text"),
        "dynamic": ("dynq", BLUE, "diamond", "markers+text"),
        "file": ("files", BLUE, "diamond", "markers+text"),
    }
    scored = [entry for entry in evaluation["files"] if entry["kind"] in style and entry["statistics"]]
    sizes = [entry["tensor_bytes"] / unit for entry in scored] or [0.0, 1.0]
    room = 0.15 * (max(sizes) - min(sizes)) or 0.1 * max(sizes)  # for the labels
    sides = _sides(scored, unit, max(sizes) - min(sizes) + 2 * room)
    figure = go.Figure()
    for kind, (name, colour, shape, mode) in style.items():
        own = [entry for entry in scored if entry["kind"] == kind]
        if not own:
            continue
        labels = [_short(entry["label"]) for entry in own]
        figure.add_scatter(
            x=[entry["tensor_bytes"] / unit for entry in own],
            y=[entry["statistics"]["Mean KLD"] for entry in own],
            error_y={"array": [entry["statistics"]["Mean KLD ±"] for entry in own], "thickness": 1},
            text=[label if sides[entry["label"]] else "" for label, entry in zip(labels, own, strict=True)],
            textposition=[sides[entry["label"]] or "top right" for entry in own],
            hovertext=labels,
            mode=mode,
            name=name + (" (hollow: dominated)" if any(entry.get("dominated_by") for entry in own) else ""),
            marker={
                "color": colour,
                "size": 11,
                "symbol": [shape + ("-open" if entry.get("dominated_by") else "") for entry in own],
            },
            line={"color": colour, "width": 1.5},
        )
    styled(figure, f"{evaluation['model']['name']}: divergence from the original at a size", 460)
    figure.update_xaxes(title=f"tensor data, {name_of_unit}", range=[min(sizes) - room, max(sizes) + room])
    figure.update_yaxes(title="mean KLD, nats per token (less is better)", **NATS)
    return Picture(figure, html_table(evaluation_rows(evaluation), "Every file on the same held-out text"))


def _sides(scored: Sequence[Mapping[str, Any]], unit: float, span: float) -> dict[str, str]:
    """Label -> the side where it stands, in a picture of about 620 x 330 pixels that is so many units wide; dynq's have
    the first choice."""
    first = {"dynamic": "bottom left", "file": "bottom left", "mix": "top right", "other mix": "top right"}
    order = sorted(scored, key=lambda entry: [*first, "uniform"].index(entry["kind"]))
    logs = [math.log10(max(entry["statistics"]["Mean KLD"], 1e-12)) for entry in order]
    high = max(logs, default=0.0) - min(logs, default=0.0) or 1.0
    points = [(620 * entry["tensor_bytes"] / unit / span, 330 * y / high) for entry, y in zip(order, logs, strict=True)]
    wanted = [first.get(entry["kind"], "bottom left") for entry in order]
    found = places(points, [_short(entry["label"]) for entry in order], wanted)
    return {entry["label"]: side for entry, side in zip(order, found, strict=True)}


def layer_costs(evaluation: Mapping[str, Any]) -> Picture:
    """KLD saved by each layer in full precision, a line for every file with "where" (see dynq.evaluate.tasks).

    What lies outside of the layers stands before the first and after the last one.
    """
    own = [entry for entry in evaluation["files"] if "where" in entry]
    names = {row["name"] for entry in own for row in entry["where"]["layers"]["rows"]}
    last = max((int(name[4:]) for name in names if name.startswith("blk.")), default=0)

    def place(name: str) -> int:
        return int(name[4:]) if name.startswith("blk.") else -1 if name.startswith("token_embd") else last + 1

    figure, tables = go.Figure(), []
    for entry, colour in zip(own, (BLUE, ORANGE, GREEN, PINK, BLACK) * len(own), strict=False):
        tables.append(html_table(layer_rows(entry["where"]), layers_title(entry)))
        rows = sorted(entry["where"]["layers"]["rows"], key=lambda row: place(row["name"]))
        if not rows:  # a file that is whole
            continue
        figure.add_scatter(
            x=[place(row["name"]) for row in rows],
            y=[row["saved"] for row in rows],
            error_y={"array": [row["saved_error"] for row in rows], "thickness": 1},
            text=["" if row["name"].startswith("blk.") else row["name"].removesuffix(".weight") for row in rows],
            textposition="top right",
            mode="lines+markers+text",
            name=_short(entry["label"]),
            marker={"color": colour, "size": 8},
            line={"color": colour, "width": 1.5},
        )
    styled(figure, "What a layer in full precision would save")
    figure.update_xaxes(title="layer", range=[-1.5, last + 2.5])
    figure.update_yaxes(title="less mean KLD, nats per token", **NATS)
    return Picture(figure, "".join(tables))


def gains_and_losses(pair: "Sequence[Encoded]") -> Picture:
    """How each encoding changes ln p of the tokens that follow: wide or narrow, with about the same mean.

    pair: of `dynq.evaluate.pair`. Changes beyond +-1.5 nats count in the outermost steps.
    """
    edges = np.linspace(-1.55, 1.55, 32)  # one step is centred on "no change"
    middles = [float(x) for x in (edges[1:] + edges[:-1]) / 2]
    figure, lines = go.Figure(), []
    for encoded, colour, dash in zip(pair, (BLUE, ORANGE), ("solid", "dash"), strict=True):
        change, s = encoded.change, encoded.statistics
        counts, _ = np.histogram(np.clip(change, edges[0], edges[-1]), edges)
        figure.add_scatter(
            x=middles,
            y=[100 * float(n) / len(change) for n in counts],
            mode="lines",
            name=f"{encoded.format}: mean {change.mean():+.3f}, KLD {s['Mean KLD']:.3f}",
            line={"color": colour, "dash": dash, "width": 2.5, "shape": "hvh"},
            fill="tozeroy",
        )
        lines.append(
            {
                "every tensor": encoded.format,
                "PPL(Q)/PPL(base)": s["Mean PPL(Q)/PPL(base)"],
                "±": s["Mean PPL(Q)/PPL(base) ±"],
                "gains, nats": float(np.maximum(change, 0).mean()),
                "losses, nats": float(np.minimum(change, 0).mean()),
                "sum = -ln PPL ratio": float(change.mean()),
                "KLD, nats": s["Mean KLD"],
                "KLD ±": s["Mean KLD ±"],
                "same top-1, %": 100 * s["Same top p"],
                "same greedy answers": f"{encoded.answers.identical} of {encoded.answers.n}",
            }
        )
    styled(figure, "The token that follows: gained and lost", legend={"x": 0.98, "xanchor": "right", "y": 0.98})
    figure.update_xaxes(title="ln q - ln p, nats (losses left of 0, gains right of it)", zerolinecolor=BLACK)
    figure.update_yaxes(title="share of the tokens, %")
    return Picture(figure, html_table(lines, "Gains and losses, mean over all tokens, and what they add up to"))


def _largest(evaluation: Mapping[str, Any]) -> int:
    return max((entry["tensor_bytes"] for entry in evaluation["files"]), default=0)


def _short(label: str) -> str:
    return label.removeprefix("uniform ").removeprefix("dynq ").removesuffix(".gguf")


def evaluation_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each file that was scored, smallest first."""
    return [
        {
            "file": entry["label"],
            "tensor bytes": entry["tensor_bytes"],
            "bpw": entry["bpw"],
            "KLD": entry["statistics"]["Mean KLD"],
            "±": entry["statistics"]["Mean KLD ±"],
            "99.9 % KLD": entry["statistics"]["99.9% KLD"],
            "perplexity": entry["statistics"]["Mean PPL(Q)"],
            "perplexity of the original": entry["statistics"]["Mean PPL(base)"],
            "same top-1, %": 100 * entry["statistics"]["Same top p"],
        }
        for entry in evaluation["files"]
        if entry["statistics"]
    ]
