"""`dynq recipe`: anybody's recipe shown, compared, applied."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from dynq.cli_options import AsJson, Requantize, Threads, Yes, json_text

recipe_app = typer.Typer(
    help="Show, compare and apply recipes: formats of the tensors of any GGUF.", no_args_is_help=True
)


@recipe_app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A recipe file, or any GGUF: its header is read.")],
    as_json: AsJson = False,
) -> None:
    """Print the formats of a recipe by kind of tensor and layer, with bytes and bits per weight.

    What --json prints is a recipe file as well: keep it, edit it, apply it.
    """
    from dynq import describe

    described = describe.read(file)
    print(json_text(describe.as_json(described)) if as_json else describe.show_text(described))


@recipe_app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="A recipe file or any GGUF.")],
    b: Annotated[Path, typer.Argument(help="Another.")],
    as_json: AsJson = False,
) -> None:
    """Print the tensors whose formats differ between two recipes, with their bytes."""
    from dynq import describe

    first, second = describe.read(a), describe.read(b)
    print(json_text(describe.difference(first, second)) if as_json else describe.difference_text(first, second))


@recipe_app.command()
def apply(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, or any GGUF: its header is read.")],
    model: Annotated[str, typer.Argument(help="The original: what `dynq run` takes as MODEL.")],
    out: Annotated[Path, typer.Option(help="The GGUF to write.")],
    imatrix: Annotated[Path | None, typer.Option(help="Importance matrix, dynq's or llama.cpp's.")] = None,
    level: Annotated[str, typer.Option(help="How hard the encoders search: plain or search.")] = "plain",
    max_shard_size: Annotated[
        str, typer.Option(help="Split a larger file into shards of at most 5GB, 500MB, ... Default: one file.")
    ] = "",
    threads: Threads = None,
    allow_requantize: Requantize = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Encode a model by somebody's recipe: a published recipe file, or the formats of a published GGUF."""
    from dynq import describe, export, reckon
    from dynq.allocate import parse_bytes
    from dynq.checkpoint import open_checkpoint
    from dynq.codec import check_level
    from dynq.imatrix import read_imatrix

    check_level(level)
    described = describe.read(recipe)
    importance = read_imatrix(imatrix) if imatrix else None
    checkpoint = open_checkpoint(model, allow_requantize)
    reckon.of_applied(checkpoint, described.recipe, out, level=level, threads=threads).tell(sys.stderr, yes=yes)
    made = export.apply(
        described,
        checkpoint,
        importance,
        out,
        imatrix_file=imatrix.name if imatrix else "",
        level=level,
        threads=threads,
        shard_bytes=parse_bytes(max_shard_size),
    )
    if as_json:
        print(json_text({"file": str(out.with_name(made["files"][0])), **made}))
        return
    split = f" in {len(made['files'])} files" if len(made["files"]) > 1 else ""
    where = out.with_name(made["files"][0])
    print(f"{where}: {made['bytes']:,} bytes{split}, {made['bpw']:.3f} bpw, read back and verified")
    if other := made["other_shapes"]:
        print(
            f"{len(other)} tensors ({other[0]}, ...) have another shape than in {recipe.name}: other bytes than its own"
        )
    for name, (wanted, written) in made["fallbacks"].items():
        print(f"{name}: its rows do not divide into {wanted}'s blocks, {written} is written")
