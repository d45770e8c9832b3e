"""What each stage of encoding brings to a file: the KLD on the same chunks of text after each of them.

The chunks are those of the calibration text that `dynq.tune.tuned` keeps aside. Feedback has chosen by them and then
fitted them too, and tuning has chosen among its states by them: so they compare stages, and a text that had no part in
any says how good the file is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynq import codec
from dynq.checkpoint import Checkpoint, open_checkpoint
from dynq.encoding import Stream
from dynq.evaluate import kld
from dynq.layer_inputs import kept_aside
from dynq.layerwise import reader
from dynq.memory import fits
from dynq.teacher import Teacher
from dynq.torch_model import device_of, load_model
from dynq.tune import JUDGES


def stages(
    checkpoint: Checkpoint,
    teacher: Any,
    plain: Stream,
    file: Path,
    *,
    level: str,
    tuning: Mapping[str, Any],
    tokens: np.ndarray,
    domains: Sequence[str],
) -> list[dict[str, Any]]:
    """{"stage", "kld" in nats}: "plain", the encoders' `level` where it is another, "tuning" where there was any.

    teacher: the original, as `load_model` gives it; plain: the tensors of the recipe as `plain` encodes them, taken
    only where `level` is another; file: the GGUF that was made of it, its first shard; tuning: what `tune.tuned` has
    reported, {} without it. tokens int32 [n_chunks, n_ctx] and domains, of each chunk: as `tuned` has them. In memory:
    one more model. Empty where no chunks are kept aside, or memory holds no other model.
    """
    aside = kept_aside(domains, JUDGES)
    if not aside.any() or aside.all() or reader(teacher) or not fits(checkpoint, device_of(teacher)):
        return []
    base = Teacher(checkpoint, teacher, tokens[aside], "")

    def measured(weights: Iterable[tuple[str, np.ndarray]]) -> float:
        model = load_model(checkpoint, weights, device=device_of(teacher))
        return float(kld.measure(model, base, batch=1, desc="").kld.mean())

    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    found = {}
    if level != "plain":
        decoded = ((name, codec.dequantize(data, fmt).reshape(shapes[name])) for name, fmt, data in plain)
        found["plain"] = measured(decoded)
    if tuning:
        found |= {level: tuning["kld"][0], "tuning": tuning["kld"][1]}
    else:
        made = open_checkpoint(file, allow_requantize=True)
        found[level] = measured((name, made.read(name)) for name in shapes)
    return [{"stage": stage, "kld": value if np.isfinite(value) else None} for stage, value in found.items()]


def stage_rows(found: Sequence[Mapping[str, Any]], tuning: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table of what `stages` has found: each KLD, and its ratio to the line before and to the first line."""
    rows = []
    for i, row in enumerate(found):
        name = f"+ {row['stage']}" if i else row["stage"]
        if row["stage"] == "tuning":
            name += f" of scales and codes: {tuning['steps']} steps, {100 * tuning['codes']:.1f} % of the codes changed"
        to_before, to_plain = _ratio(row, found[max(i - 1, 0)]), _ratio(row, found[0])
        rows.append({"encoding": name, "KLD": row["kld"], "ratio to the line before": to_before, "to plain": to_plain})
    return rows


def _ratio(row: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    """None where one of the two is not finite, or nothing was lost."""
    return None if row["kld"] is None or not other["kld"] else row["kld"] / other["kld"]
