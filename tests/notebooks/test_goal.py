"""The goal of the whole: at most 0.60 of the KLD of llama.cpp's mix at the same bytes, on held-out text.

Everything at its defaults but less text, so that it takes a minute or two; README has the figures of whole runs.
"""

import json

import pytest
from conftest import dynq_command

SMALL = {"n_chunks": 12, "n_ctx": 256, "n_swaps": 0, "n_tokens": 1, "eval_n_ctx": 256, "eval_chunks": 6}
TARGETS = ("like:Q2_K", "like:Q3_K_M")


def test_divergence_at_most_060_of_the_mix_at_the_same_bytes(tmp_path):
    pytest.importorskip("xllamacpp")
    targets = [word for target in TARGETS for word in ("--target", target)]
    small = [word for name, value in SMALL.items() for word in ("-p", f"{name}={value}")]
    done = dynq_command("run", "dynq-tiny", *targets, *small, "--out", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    evaluation = json.loads(done.stdout)
    by_label = {entry["label"]: entry for entry in evaluation["files"]}
    for target in TARGETS:
        own, mix = by_label[f"dynq {target}"], by_label[target.removeprefix("like:")]
        assert own["tensor_bytes"] <= mix["tensor_bytes"]
        ratio = own["statistics"]["Mean KLD"] / mix["statistics"]["Mean KLD"]
        assert ratio <= 0.60, (target, ratio)
