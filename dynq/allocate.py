"""Choose a format for every tensor: the smallest predicted KL divergence within a number of bytes.

One format out of several for each tensor, the sum of bytes bounded, the sum of losses smallest: a multiple-choice
knapsack, which `dynq.knapsack` solves. `allocate` turns a sensitivity table and a target such as "3.5bpw" into a
`Recipe`.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from dynq import formats, mixes
from dynq.errors import DynqError
from dynq.knapsack import choose
from dynq.recipe import Recipe

if TYPE_CHECKING:
    import pyarrow

    from dynq.checkpoint import TensorInfo

PROFILES: dict[str, frozenset[str] | None] = {
    "all": None,
    # formats that llama.cpp repacks for NEON and the i8mm instructions, and 16 bits
    "cpu-arm": frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q8_0", "F16"}),
    "k-quants": frozenset({"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16", "BF16"}),
}
"""Name -> the formats it allows (None: all)."""
_CANDIDATES = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K"),
    *("Q5_K", "Q6_K", "Q8_0", "F16"),
)  # the other formats err more at the same bytes; a profile brings them in

_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SPELLED = {
    "b": "B",
    "kb": "kB",
    "mb": "MB",
    "gb": "GB",
    "tb": "TB",
    "kib": "KiB",
    "mib": "MiB",
    "gib": "GiB",
    "tib": "TiB",
}


# --- what the user asks for -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A size. kind "bpw": bits over all weights; "file": bytes of the whole file; "like": as the mix named `like`."""

    text: str
    kind: str
    value: float = 0.0
    unit: str = ""
    like: str = ""


def parse_target(text: str) -> Target:
    """ "3.5bpw", "8GB", "2.5GiB", "6346016B" or "like:Q4_K_M" as a `Target`; DynqError with examples for anything else.

    B are bytes, GB 10^9 and GiB 2^30 of them, all of the whole file. Case and blanks do not matter.
    """
    plain = re.sub(r"\s+", "", text)
    if plain.lower().startswith("like:"):
        name = plain[5:].upper()
        if name not in mixes.MIXES:
            raise DynqError(f"target {text!r}: no mix {plain[5:]!r}; llama.cpp's mixes are {', '.join(mixes.MIXES)}")
        return Target(text, "like", like=name)
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(bpw|bits?|[kmgt]i?b|b)", plain.lower())
    # to most "4b" and "8B" are bits and parameters, not bytes
    if not match or float(match[1]) <= 0 or (match[2] == "b" and not re.fullmatch(r"\d{4,}", match[1])):
        raise DynqError(
            f'target {text!r} is not a size; write it as "3.5bpw", "8GB", "750MB", "6346016B" or "like:Q4_K_M"'
        )
    number, unit = float(match[1]), match[2]
    if unit in _UNITS:
        return Target(text, "file", number * _UNITS[unit], unit)
    return Target(text, "bpw", number, "bpw")


def parse_bytes(text: str) -> int | None:
    """Bytes of a size such as "5GB"; None for "". DynqError for anything else."""
    if not text:
        return None
    target = parse_target(text)
    if target.kind != "file":
        raise DynqError(f'size {text!r}: write it as "5GB" or "500MB"')
    return math.floor(target.value)


def parse_pins(texts: Iterable[str]) -> dict[str, str]:
    """["token_embd.weight=Q8_0", "blk.*.attn_v.weight>=Q5_K"] as the `pins` of `allocate`; DynqError if malformed."""
    pins: dict[str, str] = {}
    for text in texts:
        match = re.fullmatch(r"\s*([^\s<>=]+)\s*(=|<=|>=)\s*([^\s<>=]+)\s*", text)
        if not match:
            raise DynqError(
                f'pin {text!r}: write TENSORS=FORMAT, for example "blk.*.attn_v.weight=Q6_K" (or >= or <= as bounds)'
            )
        glob, relation, fmt = match.groups()
        pins[glob] = ("" if relation == "=" else relation) + fmt
    return pins


def candidates(names: Iterable[str], profile: str) -> list[str]:
    """The formats that a sensitivity table needs: `names`, and those of dynq's that the profile allows.

    Without names those of the profile alone; for "all", the best known at each size. DynqError: an unknown format or
    profile.
    """
    if profile not in PROFILES:
        raise DynqError(f"no profile {profile!r}; there are {', '.join(PROFILES)}")
    named = [formats.get(name).name for name in names]
    allowed = PROFILES[profile] or (() if named else _CANDIDATES)
    return list(dict.fromkeys(named + [name for name in formats.FORMATS if name in allowed]))


# --- from a sensitivity table to a recipe -----------------------------------------------------------------------------


@lru_cache(maxsize=100_000)
def _stored(fmt: str, shape: tuple[int, ...]) -> tuple[str, int]:
    """What a tensor asked to be `fmt` is stored as, after llama.cpp's fallback for its row, and its bytes."""
    real = formats.usable(fmt, shape[-1])
    return real, formats.tensor_bytes(real, shape)


def allocate(
    table: "pyarrow.Table",
    checkpoint_tensors: "Mapping[str, TensorInfo]",
    target: str | Target,
    *,
    metadata: Mapping[str, Any],
    header_bytes: int = 0,
    pins: Mapping[str, str] | None = None,
    profile: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    has_importance: bool = True,
) -> Recipe:
    """The recipe of smallest predicted KL divergence within a target size.

    table: columns tensor, format, predicted_kld (nats per token); one row per candidate. Candidates that llama.cpp's
    row fallback makes the same format are one; bytes are computed from the shapes.
    checkpoint_tensors: every tensor of the file; those not quantizable are kept as they are.
    metadata: the GGUF's key/values (alignment, and what llama.cpp's mixes depend on). header_bytes: bytes of the file
    before tensor data, for targets in bytes, where each tensor's padding counts as well.
    pins: glob over tensor names -> format, or ">=FORMAT" or "<=FORMAT" (bounds in bits per weight); where several
    match a tensor, the last counts. profile: a key of PROFILES.
    has_importance: whether the mix of a "like:" target is the one made with an importance matrix.

    A target above the largest candidates takes the largest and says so in provenance["allocation"]["note"].
    DynqError: a target below the smallest possible size (which is said in the target's unit), a pin that matches
    nothing or asks for a format without a row in the table, a profile that leaves a tensor nothing, a table that does
    not belong to these tensors.
    """
    problem = Problem.of(
        table,
        checkpoint_tensors,
        target,
        metadata=metadata,
        header_bytes=header_bytes,
        pins=pins,
        profile=profile,
        has_importance=has_importance,
    )
    return problem.recipe(problem.solve(), provenance or {})


class Option(NamedTuple):
    """A format that a tensor may take, after fallbacks; bytes in the file, padding included; predicted loss in nats."""

    format: str
    bytes: int
    loss: float


@dataclass(frozen=True)
class Problem:
    """What there is to decide: for every quantizable tensor its options, of which one each, within `room` bytes."""

    target: Target
    tensors: "Mapping[str, TensorInfo]"
    options: dict[str, list[Option]]
    room: int
    budget: int  # of all that counts: `room` and what is fixed
    pins: dict[str, str]
    profile: str

    @classmethod
    def of(
        cls,
        table: "pyarrow.Table",
        checkpoint_tensors: "Mapping[str, TensorInfo]",
        target: str | Target,
        *,
        metadata: Mapping[str, Any],
        header_bytes: int = 0,
        pins: Mapping[str, str] | None = None,
        profile: str | None = None,
        has_importance: bool = True,
    ) -> "Problem":
        """Arguments and errors of `allocate`."""
        target = parse_target(target) if isinstance(target, str) else target
        fixed = [info for info in checkpoint_tensors.values() if not info.quantizable]
        options = _candidates(table, checkpoint_tensors, pins or {}, profile)

        align = int(metadata.get("general.alignment", 32)) if target.kind == "file" else 1
        outside = sum(_pad(formats.tensor_bytes(info.kept, tuple(info.shape)), align) for info in fixed)
        outside += header_bytes if target.kind == "file" else 0
        padded = {name: [Option(f, _pad(size, align), loss) for f, size, loss in row] for name, row in options.items()}
        problem = cls(target, checkpoint_tensors, padded, 0, outside, dict(pins or {}), profile or "all")
        return problem.resized(target, target_bytes(target, checkpoint_tensors, metadata, has_importance))

    def resized(self, target: Target, budget: int) -> "Problem":
        """The same choices within another number of bytes, of the file or of tensor data as `target` was before.

        DynqError where the smallest choices do not fit.
        """
        outside = self.budget - self.room
        smallest = outside + sum(min(option.bytes for option in row) for row in self.options.values())
        if smallest > budget:
            n_weights = sum(math.prod(info.shape) for info in self.tensors.values())
            raise DynqError(_too_small(target, smallest, n_weights, budget))
        return replace(self, target=target, room=budget - outside, budget=budget)

    def pinned(self, taken: Mapping[str, str]) -> "Problem":
        """The same problem with the formats of these tensors decided; each must be among the tensor's options."""
        decided = {name: [o for o in self.options[name] if o.format == fmt] for name, fmt in taken.items()}
        return replace(self, options=self.options | decided, pins=self.pins | dict(taken))

    def solve(self, *, exact: bool = True) -> dict[str, str]:
        """The format of each tensor of `options` for which the sum of losses is smallest; exact: as in `choose`."""
        rows = list(self.options.values())
        sizes, losses = [[o.bytes for o in row] for row in rows], [[o.loss for o in row] for row in rows]
        picked = choose(sizes, losses, self.room, exact=exact)
        return {name: row[j].format for (name, row), j in zip(self.options.items(), picked, strict=True)}

    def chosen(self, taken: Mapping[str, str]) -> dict[str, Option]:
        """The option of each tensor that has the format named for it."""
        return {name: next(o for o in row if o.format == taken[name]) for name, row in self.options.items()}

    def recipe(self, taken: Mapping[str, str], provenance: Mapping[str, Any]) -> Recipe:
        """The recipe of one format for each tensor of `options`; predicted_kld is the sum of the losses."""
        chosen = self.chosen(taken)
        every = {name: taken[name] if name in chosen else info.kept for name, info in self.tensors.items()}
        tensor_bytes = sum(_stored(fmt, tuple(self.tensors[name].shape))[1] for name, fmt in every.items())
        n_weights = sum(math.prod(info.shape) for info in self.tensors.values())
        used = self.budget - self.room + sum(option.bytes for option in chosen.values())
        allocation: dict[str, Any] = {"budget_bytes": self.budget, "used_bytes": used, "profile": self.profile}
        allocation["pins"] = self.pins
        best = all(option.loss <= min(o.loss for o in self.options[name]) for name, option in chosen.items())
        if best and self.budget > used:
            allocation["note"] = (
                f"the target {self.target.text} is more than the best of the candidate formats need: "
                f"{_in_unit(self.target, used, n_weights)} is the largest, and it was taken"
            )
        return Recipe(
            formats=every,
            target=self.target.text,
            tensor_bytes=tensor_bytes,
            bpw=8 * tensor_bytes / n_weights,
            predicted_kld=float(math.fsum(option.loss for option in chosen.values())),
            provenance={**provenance, "allocation": allocation},
        )


def target_bytes(
    target: Target, tensors: "Mapping[str, TensorInfo]", metadata: Mapping[str, Any], has_importance: bool
) -> int:
    """The bytes that a target allows: of the whole file for kind "file", else of all tensor data."""
    if target.kind == "like":
        return mixes.mix_bytes(target.like, tensors, metadata, has_importance)
    if target.kind == "file":
        return math.floor(target.value)
    return math.floor(target.value * sum(math.prod(info.shape) for info in tensors.values()) / 8)


def _pad(size: int, align: int) -> int:
    return -(-size // align) * align


def _candidates(
    table: "pyarrow.Table", tensors: "Mapping[str, TensorInfo]", pins: Mapping[str, str], profile: str | None
) -> dict[str, list[tuple[str, int, float]]]:
    """Per quantizable tensor its (format, bytes, loss), after fallbacks, profile and pins."""
    if profile is not None and profile not in PROFILES:
        raise DynqError(f"no profile {profile!r}; there are {', '.join(PROFILES)}")
    allowed = PROFILES[profile] if profile else None
    measured: dict[str, dict[str, tuple[str, int, float]]] = {
        name: {} for name, info in tensors.items() if info.quantizable
    }
    shapes = {name: tensors[name].shape for name in measured}
    columns = (table.column(c).to_pylist() for c in ("tensor", "format", "predicted_kld"))
    for name, fmt, loss in zip(*columns, strict=True):
        if name not in measured:
            raise DynqError(
                f"the sensitivity table has {name}, which this model does not quantize: another model's table"
            )
        if loss is None or not math.isfinite(loss):
            raise DynqError(f"the sensitivity table has {loss} for {name} as {fmt}; measure the sensitivity again")
        real, size = _stored(fmt, shapes[name])
        found = measured[name]
        if real == fmt or real not in found:
            found[real] = real, size, loss
    pinned = _match_pins(pins, tensors)

    result: dict[str, list[tuple[str, int, float]]] = {}
    for name, found in measured.items():
        if not found:
            raise DynqError(f"the sensitivity table has no row for {name}; measure the sensitivity again")
        rows = list(found.values())
        bound = pinned.get(name, "")
        if allowed is not None and bound[:1] in ("", "<", ">"):  # a pinned format is the user's own choice
            rows = [row for row in rows if row[0] in allowed]
            if not rows:
                raise DynqError(f"the profile {profile} allows {name} none of {', '.join(found)}; measure more formats")
        if bound:
            rows = _pin(name, tensors[name].shape, rows, bound)
        result[name] = rows
    return result


def _match_pins(pins: Mapping[str, str], tensors: "Mapping[str, TensorInfo]") -> dict[str, str]:
    """The pin of each tensor that has one; the last that matches counts."""
    pinned: dict[str, str] = {}
    for glob, wanted in pins.items():
        formats.get(wanted.lstrip("<>="))  # DynqError naming the known ones
        matches = [name for name in tensors if fnmatchcase(name, glob)]
        if not matches:
            near = difflib.get_close_matches(glob.replace("*", "0"), tensors, n=3, cutoff=0.5)
            near += [name for name in difflib.get_close_matches(glob, tensors, n=2, cutoff=0.5) if name not in near]
            hint = f"; near: {', '.join(near[:3])}" if near else f"; names look like {', '.join(list(tensors)[:3])}"
            raise DynqError(f"pin {glob!r} matches no tensor{hint}")
        quantizable = [name for name in matches if tensors[name].quantizable]
        if not quantizable:
            raise DynqError(f"pin {glob!r} matches only tensors that llama.cpp keeps in F32, such as {matches[0]}")
        pinned.update(dict.fromkeys(quantizable, wanted))
    return pinned


def _pin(
    name: str, shape: tuple[int, ...], rows: list[tuple[str, int, float]], wanted: str
) -> list[tuple[str, int, float]]:
    real, size = _stored(wanted.lstrip("<>="), shape)
    if wanted.startswith(">="):
        kept = [row for row in rows if row[1] >= size]
    elif wanted.startswith("<="):
        kept = [row for row in rows if row[1] <= size]
    else:
        kept = [row for row in rows if row[0] == real]
        if not kept and real in ("F32", "F16", "BF16"):
            kept = [(real, size, 0.0)]  # 16 bits: no loss worth a measurement
    if not kept and formats.get(real).needs_importance:
        raise DynqError(f"pin {name}={wanted}: {real} needs importance, and there is none for this tensor; pin another")
    if not kept:
        raise DynqError(
            f"pin {name}={wanted}: no sensitivity was measured for it (only {', '.join(row[0] for row in rows)}); "
            "add the format to the sensitivity step or pin one of these"
        )
    return kept


def _in_unit(target: Target, size: float, n_weights: int, up: bool = False) -> str:
    """`size` bytes in the target's unit, at least three decimals and four digits; up: never less than it."""
    if target.kind == "bpw":
        number, unit = 8 * size / n_weights, "bpw"
    elif target.kind == "file":
        number, unit = size / _UNITS[target.unit], _SPELLED[target.unit]
    else:
        number, unit = size / 1e6, "MB of tensor data"
    digits = max(3, 3 - math.floor(math.log10(number)))
    digits = 0 if unit == "B" else digits
    number = math.ceil(number * 10**digits) / 10**digits if up else number
    return f"{number:.{digits}f} {unit}"


def _too_small(target: Target, smallest: int, n_weights: int, budget: int) -> str:
    what = f" ({_in_unit(target, budget, n_weights)})" if target.kind == "like" else ""
    return (
        f"target {target.text}{what} is below what the candidate formats, pins and shapes allow: "
        f"the smallest possible is {_in_unit(target, smallest, n_weights, up=True)}"
    )
