"""What a run and an evaluation of files are shown by: ``report.html``, which needs no network, and what lies beside."""

from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2
from plotly.offline import get_plotlyjs

import dynq
from dynq import card, experts, figures, figures_sensitivity, figures_sweep, mixes, sensitivity, svg
from dynq.evaluate import tables
from dynq.figures_experts import experts_map
from dynq.files import replacing
from dynq.fisher import Fisher
from dynq.folder import RunFolder, file_safe
from dynq.imatrix import read_imatrix
from dynq.recipe import Recipe
from dynq.stages import stage_rows

if TYPE_CHECKING:
    from dynq.checkpoint import Checkpoint


def write_report(folder: RunFolder, checkpoint: "Checkpoint") -> None:
    """Write ``report.html`` and ``model-card.md`` from what the run folder holds. Equal folders give equal bytes."""
    evaluation = folder.read_json("evaluation.json")
    by_label = {entry["label"]: entry for entry in evaluation["files"]}
    table = sensitivity.read_table(folder.path)
    agreement = sensitivity.agreement(table)
    grids = []
    for target in evaluation["targets"]:
        name = file_safe(target["target"])
        recipe = Recipe.load(folder / f"{name}.recipe.json")
        mix = mixes.mix(target["below"], checkpoint.tensors, checkpoint.metadata, evaluation["mixes_with_importance"])
        exported = folder.read_json(f"{name}.export.json")
        stages = stage_rows(exported.get("stages", []), exported["tuning"])  # not in the folders of older versions
        grids.append(
            _embedded(figures.recipe_grid(recipe, checkpoint.tensors, mix), f"recipe-{name}")
            | {
                "target": target["target"],
                "stages": figures.html_table(stages, "KLD after each stage of encoding") if stages else "",
                "predicted": [recipe.predicted_kld, exported["predicted_kld"]],
                "recipe_file": f"{name}.recipe.json",
                "types_file": f"{name}.tensor-types.txt",
                "generated": target["generated"],
            }
        )
    seen = experts.tokens_seen(checkpoint, Fisher(folder / "fisher")) if checkpoint.architecture.known else None
    values = {
        "evaluation": evaluation,
        "by_label": by_label,
        "state": folder.state,
        "calibration_text": folder.read_json("calibrate-text.json") if checkpoint.architecture.known else None,
        "agreement": agreement,
        "grids": grids,
        "frontier": _embedded(figures.frontier(evaluation), "frontier"),
        "experts": _embedded(experts_map(seen, read_imatrix(folder / "imatrix.gguf"), checkpoint), "experts")
        if seen
        else None,
        "scatter": _embedded(figures_sensitivity.prediction_scatter(table, agreement), "scatter"),
        "plotlyjs": get_plotlyjs(),
        "style": _data("style.css"),
    }
    more = card.values(folder, checkpoint, evaluation)
    for name, own in (("report.html", values), ("model-card.md", values | more)):
        with replacing(folder / name) as beside:
            beside.write_text(_template(f"{name}.j2").render(own), encoding="utf-8")


def file_tables(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """The HTML tables of an evaluation of files by name; "" for what was not asked. Those of "where" stand apart."""
    tables_of = {
        "table": (tables.rows(evaluation), "Every file on the same text"),
        "domains": (tables.domain_rows(evaluation), ""),
        "answers": (tables.answer_rows(evaluation), ""),
        "subjects": (tables.subject_rows(evaluation), "Subjects of MMLU; flips: right to wrong, wrong to right"),
        "statistics": (tables.statistic_rows(evaluation), ""),
    }
    return {name: figures.html_table(rows, caption) if rows else "" for name, (rows, caption) in tables_of.items()}


def write_files_report(folder: RunFolder, evaluation: Mapping[str, Any]) -> None:
    """Write ``report.html`` of an evaluation of files; ``frontier.svg`` and ``layers.svg`` of what was measured."""
    pictures = {}
    if evaluation["files"]:
        pictures["frontier"] = figures.frontier(evaluation)
    if any("where" in entry for entry in evaluation["files"]):
        pictures["layers"] = figures.layer_costs(evaluation)
    drawn = {name: _embedded(p, name) | {"svg": svg.render(p.figure)} for name, p in pictures.items()}
    several = len(evaluation["text"]["domains"]) > 1
    values = file_tables(evaluation)
    values["worst"] = "".join(
        figures.html_table(tables.worst_rows(entry["where"], several), f"{entry['label']}: its worst tokens")
        for entry in evaluation["files"]
        if "where" in entry
    )
    page = _template("evaluation.html.j2").render(
        values,
        evaluation=evaluation,
        version=dynq.__version__,
        drawn=drawn,
        plotlyjs=get_plotlyjs(),
        style=_data("style.css"),
    )
    written = {"report.html": page} | {f"{name}.svg": picture["svg"] for name, picture in drawn.items()}
    for name in ("frontier.svg", "layers.svg"):
        (folder / name).unlink(missing_ok=True)  # of an evaluation before this one
    for name, text in written.items():
        with replacing(folder / name) as beside:
            beside.write_text(text, encoding="utf-8")


def write_sweep_report(folder: RunFolder, result: Mapping[str, Any]) -> None:
    """Write ``sweep.html``, the summary of a sweep."""
    drawn = _embedded(figures_sweep.sweep_frontier(result), "frontier") if result["runs"] else None
    page = _template("sweep.html.j2").render(
        result=result, drawn=drawn, plotlyjs=get_plotlyjs(), style=_data("style.css")
    )
    with replacing(folder / "sweep.html") as beside:
        beside.write_text(page, encoding="utf-8")


def _embedded(picture: figures.Picture, name: str) -> dict[str, Any]:
    # a fixed id: plotly would draw a new one every time, and the same run would give other bytes
    return {
        "html": picture.figure.to_html(
            full_html=False, include_plotlyjs=False, div_id=name, config={"displayModeBar": False}
        ),
        "table": picture.table,
    }


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(autoescape=name.endswith(".html.j2"), undefined=jinja2.StrictUndefined)
    environment.filters |= {"plain": card.plain, "file_safe": file_safe}
    return environment.from_string(_data(name))


def _data(name: str) -> str:
    return (files("dynq") / "data" / name).read_text("utf-8")
