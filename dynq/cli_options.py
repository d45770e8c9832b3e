"""Options that several commands have, and how all of them print JSON."""

import json
from typing import Annotated, Any

import typer

Threads = Annotated[int | None, typer.Option(help="Default: as many as there are cores.")]
Scheduler = Annotated[
    str | None, typer.Option(help="A running Dask cluster, tcp://HOST:PORT, whose workers share the work.")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="So many processes here share the work, by Dask. Default: none, threads.")
]
Requantize = Annotated[bool, typer.Option("--allow-requantize", help="Take a GGUF that is already quantized.")]
Yes = Annotated[bool, typer.Option("--yes", help="Go on where memory or disk are reckoned not to suffice.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
ResultsAsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else.")]


def json_text(value: Any) -> str:
    """JSON as the commands print it."""
    return json.dumps(value, indent=1, ensure_ascii=False)
