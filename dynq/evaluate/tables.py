"""The rows of an evaluation of files: one table for a reader, one with every statistic, one by domain."""

from collections.abc import Mapping
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
        }
        if with_mixes:
            row["/ mixes"] = entry.get("kld_ratio")
        found.append(row | {"note": f"dominated by {entry['dominated_by']}" if entry.get("dominated_by") else None})
    empty = dict.fromkeys(found[0] if found else ("file", "note"))
    found += [empty | {"file": failed["label"], "note": failed["error"]} for failed in evaluation["failed"]]
    return found


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
                }
            )
    return found


def statistic_rows(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """Every statistic under llama-perplexity's name, one column for each file that was measured."""
    measured = [entry for entry in evaluation["files"] if entry["kind"] == "file"]
    names = [name for name in (measured[0]["statistics"] if measured else ()) if not name.endswith(" ±")]
    return [
        {"statistic": name} | {entry["label"]: _shown(entry["statistics"], name) for entry in measured}
        for name in names
    ]


def _shown(statistics: Mapping[str, float], name: str) -> str:
    percent = any(part in name for part in PERCENT)
    factor, digits = (100, 3) if percent else (1, 6)
    error = statistics.get(f"{name} ±")
    tail = "" if error is None else f" ± {factor * error:.{digits}f}"
    return f"{factor * statistics[name]:.{digits}f}{tail}" + (" %" if percent else "")
