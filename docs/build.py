"""make docs: every notebook, executed on the embedded model, as a page that can be read without running anything.

Usage: python docs/build.py [--run runs/docs] [--only 00_start_here ...]. Notebooks 03 to 07 are one run in the run
folder, so a second call skips what has not changed; 00 to 02 then read its importance. Pages go beside this file. Their
figures fetch plotly.js, and their formulas MathJax, when they are looked at; every figure has a table.
"""

import argparse
import re
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

from dynq import run
from dynq.folder import RunFolder

HERE = Path(__file__).parent
TEACHING = ("00_start_here", "01_one_block", "02_formats")
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
{code}
{style}
body {{ max-width: 920px; }} pre {{ padding: .6rem; overflow-x: auto; }} .highlight {{ background: #f6f6f6; }}
.jp-OutputArea-output {{ overflow-x: auto; }} nav {{ margin: 1rem 0; }}
</style>
<script>MathJax = {{tex: {{inlineMath: [["$", "$"]], displayMath: [["$$", "$$"]]}}}};</script>
<script async src="https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-mml-chtml.js"></script>
</head><body><nav>{links}</nav>
{body}
<nav>{links}</nav></body></html>
"""


def page(notebook: Path, names: list[str]) -> str:
    """An executed notebook as HTML, without progress bars and the cell that papermill put in."""
    name = next(name for name in names if notebook.name.startswith(name))
    document = nbformat.read(notebook, 4)
    document.cells = [cell for cell in document.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    for cell in document.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        else:
            cell.source = re.sub(r"\((\d\d_\w+)\.ipynb", r"(\1.html", cell.source)
    look = {"exclude_input_prompt": True, "exclude_output_prompt": True, "exclude_anchor_links": True}
    body, _ = HTMLExporter(template_name="basic", **look).from_notebook_node(document)
    return PAGE.format(
        title=document.cells[0].source.splitlines()[0].lstrip("# "),
        code=HtmlFormatter().get_style_defs(".highlight"),
        style=(HERE.parent / "dynq" / "data" / "style.css").read_text(encoding="utf-8"),
        links=" · ".join(other if other == name else f'<a href="{other}.html">{other}</a>' for other in names),
        body=body,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="runs/docs", help="the run folder")
    parser.add_argument("--only", nargs="*", default=None, metavar="NAME", help="pages to build; default all")
    arguments = parser.parse_args()
    folder = RunFolder(arguments.run)
    names = [*TEACHING, *run.NOTEBOOKS]
    wanted = arguments.only if arguments.only is not None else names
    made = []
    if set(wanted) & set(run.NOTEBOOKS):
        made = run.plan("dynq-tiny", ["3.5bpw"], folder)
        run.execute(made, folder)
    first = []
    for name in (name for name in TEACHING if name in wanted):
        parameters = {key: parameter.default for key, parameter in run.inspect(name).items()}
        first.append(run.Task(name, "", parameters | ({"run": str(folder.path)} if parameters.get("run") else {})))
    run.execute_each(first, folder)
    for task in [*first, *made]:
        if task.notebook in wanted:
            text = page(folder / "notebooks" / task.output, names)
            (HERE / f"{task.notebook}.html").write_text(text, encoding="utf-8")
            print(f"docs/{task.notebook}.html: {len(text.encode()) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
