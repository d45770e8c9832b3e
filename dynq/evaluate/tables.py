"""The rows of an evaluation of files: one table for a reader, one with every statistic, and what else was asked."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

PERCENT = ("Δp", "Same top p", "Cor(")  # what llama-perplexity prints in percent


def rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each file that was measured, smallest first, then for each that could not be."""
    with_mixes = evaluation["mixes_with_importance"] is not None
    found = []
    for entry in evaluation["files"]:
        s = entry["statistics"]
        row = {
            "file": entry["label"] if entry["kind"] == "file" else f"mix {entry['label']}",
            "GiB": (entry["file_bytes"] or entry["tensor_bytes"]) / 2**30,
            "bpw": entry["bpw"],
            "Mean KLD": s["Mean KLD"],
            "±": s["Mean KLD ±"],
            "99.9% KLD": s["99.9% KLD"],
            "PPL": s["Mean PPL(Q)"],
            "PPL ratio": s["Mean PPL(Q)/PPL(base)"],
            "same top, %": 100 * s["Same top p"],
            **_engine_cells(evaluation, entry),
        }
        if with_mixes:
            row["/ mixes"] = entry.get("kld_ratio")
        notes = [f"dominated by {entry['dominated_by']}"] if entry.get("dominated_by") else []
        notes += [f"computed in bfloat16: floor {entry['floor']:.2g}"] if entry["dtype"] == "bfloat16" else []
        notes += [f"no {task}: {reason}" for task, reason in entry.get("not_measured", {}).items()]
        found.append(row | {"note": "; ".join(notes) or None})
    empty = dict.fromkeys(found[0] if found else ("file", "note"))
    found += [empty | {"file": failed["label"], "note": failed["error"]} for failed in evaluation["failed"]]
    return found


def _engine_cells(evaluation: Mapping[str, Any], entry: Mapping[str, Any], domain: str = "") -> dict[str, Any]:
    """Columns of the file's run in llama.cpp, empty for what did not run there; none where it was not asked for."""
    if "engine" not in evaluation["asked"]:
        return {}
    found = entry.get("engine")
    s = {} if found is None else found["domains"][domain] if domain else found["statistics"]
    return {
        "llama.cpp KLD": s.get("Mean KLD"),
        "llama.cpp ±": s.get("Mean KLD ±"),
    }


def domain_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """KLD and same top-1 of each file on the whole text and on each domain; none where there is one domain only."""
    if len(evaluation["text"]["domains"]) < 2:
        return []
    found = []
    for entry in evaluation["files"]:
        if entry["kind"] != "file":
            continue
        for domain, s in {"whole": entry["statistics"], **entry["domains"]}.items():
            found.append(
                {
                    "file": entry["label"] if domain == "whole" else "",
                    "domain": domain,
                    "chunks": evaluation["text"]["domains"].get(domain, evaluation["text"]["chunks"]),
                    "Mean KLD": s["Mean KLD"],
                    "±": s["Mean KLD ±"],
                    "99.9% KLD": s["99.9% KLD"],
                    "PPL ratio": s["Mean PPL(Q)/PPL(base)"],
                    "same top, %": 100 * s["Same top p"],
                    **_engine_cells(evaluation, entry, "" if domain == "whole" else domain),
                }
            )
    return found


def statistic_rows(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """Every statistic under llama-perplexity's name, a column for each file that was measured and for each engine."""
    columns = {}
    for entry in evaluation["files"]:
        if entry["kind"] == "file":
            columns[entry["label"]] = entry["statistics"]
            if "engine" in entry:
                columns[f"{entry['label']}, llama.cpp"] = entry["engine"]["statistics"]
    names = [name for name in next(iter(columns.values()), ()) if not name.endswith(" ±")]
    return [
        {"statistic": name} | {column: _shown(statistics, name) for column, statistics in columns.items()}
        for name in names
    ]


def _shown(statistics: Mapping[str, float], name: str) -> str:
    percent = any(part in name for part in PERCENT)
    factor, digits = (100, 3) if percent else (1, 6)
    error = statistics.get(f"{name} ±")
    tail = "" if error is None else f" ± {factor * error:.{digits}f}"
    return f"{factor * statistics[name]:.{digits}f}{tail}" + (" %" if percent else "")


# --- what was asked beside it -----------------------------------------------------------------------------------------


def answer_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """MMLU and greedy answers, the original's first; none where neither was asked. Flips count against the original."""
    asked = evaluation["asked"]
    rows: list[dict[str, Any]] = []
    if "mmlu" in asked and asked["mmlu"]["original"]:
        rows.append({"file": "original"} | _mmlu_cells(asked["mmlu"]["original"]))
    for entry in evaluation["files"]:
        if entry["kind"] == "file" and (mine := {"mmlu", "greedy"} & entry.keys()):
            rows.append(
                {"file": entry["label"]}
                | (_mmlu_cells(entry["mmlu"]) if "mmlu" in mine else {})
                | (_greedy_cells(entry["greedy"]) if "greedy" in mine else {})
            )
    keys = dict.fromkeys(key for row in sorted(rows, key=len, reverse=True) for key in row)
    return [dict.fromkeys(keys) | row for row in rows]


def _mmlu_cells(score: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "MMLU, %": 100 * score["accuracy"],
        "MMLU 95 %": _interval(score),
        "right→wrong": score.get("correct_to_wrong"),
        "wrong→right": score.get("wrong_to_correct"),
        "changed": score.get("changed"),
        "(MMLU-25)/GB": score.get("efficiency"),
    }


def _greedy_cells(parted: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "same greedy, %": 100 * parted["share"],
        "greedy 95 %": _interval(parted),
        "part after": parted["median"],
    }


def _interval(share: Mapping[str, Any]) -> str:
    return f"{100 * share['low']:.1f} to {100 * share['high']:.1f}"


def subject_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """MMLU in percent by subject: the original, then a column for each file, with flips both ways."""
    measured = [entry for entry in evaluation["files"] if "mmlu" in entry]
    if not measured:
        return []
    original = evaluation["asked"]["mmlu"]["original"]["subjects"]
    rows = []
    for name, score in original.items():
        row: dict[str, Any] = {"subject": name.replace("_", " "), "questions": score["n"]}
        row |= {"original, %": 100 * score["accuracy"], "95 %": _interval(score)}
        for entry in measured:
            own = entry["mmlu"]["subjects"][name]
            row[f"{entry['label']}, %"] = 100 * own["accuracy"]
            row[f"{entry['label']}, flips"] = f"-{own['correct_to_wrong']} +{own['wrong_to_correct']}"
        rows.append(row)
    return rows


def worst_rows(where: Mapping[str, Any], with_domain: bool = False) -> list[dict[str, Any]]:
    """The tokens that a file predicts worst, the worst first, in context and with both models' most likely tokens."""
    return [
        {"KLD": token["kld"]}
        | ({"domain": token["domain"]} if with_domain else {})
        | {
            "text before": "… " + " ".join(token["before"].split()),
            "followed by": _guesses([token["followed"]]),
            "original's most likely": _guesses(token["original_top"]),
            "file's most likely": _guesses(token["file_top"]),
        }
        for token in where["tokens"]
    ]


def _guesses(guesses: Sequence[Mapping[str, Any]]) -> str:
    """Tokens with their probability in percent, in the original and in the file."""
    return ", ".join(
        f"{json.dumps(guess['text'], ensure_ascii=False)} {100 * guess['original']:.3g} → {100 * guess['file']:.3g}"
        for guess in guesses
    )


def layers_title(entry: Mapping[str, Any]) -> str:
    """What `layer_rows` shows: the chunks are fewer than those of the other tables."""
    layers = entry["where"]["layers"]
    chunks = f"{layers['chunks']} chunk" + "s" * (layers["chunks"] > 1)
    return f"{entry['label']}: one layer in full precision; the file's KLD on the same {chunks}: {layers['kld']:.4g}"


def layer_rows(where: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What restoring each layer to full precision saves, the most first."""
    return [
        {
            "restored": row["name"],
            "formats": row["formats"],
            "bytes": row["bytes"],
            "KLD then": row["kld"],
            "saved": row["saved"],
            "±": row["saved_error"],
            "saved, %": 100 * row["saved"] / max(where["layers"]["kld"], 1e-12),
        }
        for row in where["layers"]["rows"]
    ]
