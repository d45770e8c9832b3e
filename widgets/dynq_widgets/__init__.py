"""Views on dynq's objects for JupyterLab. The state is a dynq object, the logic is in `dynq`.

A view is the last value of a cell, or goes through IPython's `display`. Where nobody is there to move it
(``DYNQ_DISPLAY=static``, or anywidget is not installed) it shows its twin instead: plain HTML, no widget.
"""

from dynq_widgets.block_inspector import BlockInspector
from dynq_widgets.budget_explorer import BudgetExplorer
from dynq_widgets.divergence_reader import DivergenceReader
from dynq_widgets.recipe_grid import RecipeGrid
from dynq_widgets.run_panel import RunPanel
from dynq_widgets.scale_drag import ScaleDrag
from dynq_widgets.view import View

__all__ = ["BlockInspector", "BudgetExplorer", "DivergenceReader", "RecipeGrid", "RunPanel", "ScaleDrag", "View"]
