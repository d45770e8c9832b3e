"""What a run is shown by: ``report.html``, which needs no network, and ``model-card.md``."""

from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2
from plotly.offline import get_plotlyjs

from dynq import figures, mixes, sensitivity
from dynq.files import replacing
from dynq.folder import RunFolder, file_safe
from dynq.recipe import Recipe

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
        mix = mixes.mix(target["below"], checkpoint.tensors, checkpoint.metadata, True)
        grids.append(
            _embedded(figures.recipe_grid(recipe, checkpoint.tensors, mix), f"recipe-{name}")
            | {
                "target": target["target"],
                "predicted": recipe.predicted_kld,
                "measured": by_label[target["label"]]["statistics"]["Mean KLD"],
                "recipe_file": f"{name}.recipe.json",
                "types_file": f"{name}.tensor-types.txt",
                "generated": target["generated"],
            }
        )
    values = {
        "evaluation": evaluation,
        "by_label": by_label,
        "state": folder.state,
        "calibration_text": folder.read_json("calibrate-text.json"),
        "agreement": agreement,
        "grids": grids,
        "frontier": _embedded(figures.frontier(evaluation), "frontier"),
        "scatter": _embedded(figures.prediction_scatter(table, agreement), "scatter"),
        "plotlyjs": get_plotlyjs(),
    }
    for name in ("report.html", "model-card.md"):
        with replacing(folder / name) as beside:
            beside.write_text(_template(f"{name}.j2").render(values), encoding="utf-8")


def _embedded(picture: figures.Picture, name: str) -> dict[str, Any]:
    # a fixed id: plotly would draw a new one every time, and the same run would give other bytes
    return {
        "html": picture.figure.to_html(
            full_html=False, include_plotlyjs=False, div_id=name, config={"displayModeBar": False}
        ),
        "table": picture.table,
    }


def _template(name: str) -> jinja2.Template:
    source = (files("dynq") / "data" / name).read_text("utf-8")
    environment = jinja2.Environment(autoescape=name.endswith(".html.j2"), undefined=jinja2.StrictUndefined)
    return environment.from_string(source)
