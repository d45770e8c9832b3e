"""What each stage of encoding brings: the KLD after it by a second way of measuring, and the report's table."""

import numpy as np
import pytest
import tiny_models

from dynq import codec, export, stages
from dynq.checkpoint import open_checkpoint
from dynq.encoding import encode
from dynq.evaluate import kld
from dynq.layer_inputs import kept_aside
from dynq.recipe import Recipe
from dynq.torch_model import load_model
from dynq.tune import JUDGES


def test_stages_are_measured_on_the_chunks_that_are_kept_aside(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(tiny_models.make("llama-biased", tmp_path / "model"))
    chosen = {name: "Q4_0" if info.quantizable else "F32" for name, info in checkpoint.tensors.items()}
    teacher, file = load_model(checkpoint), tmp_path / "file.gguf"
    tokens, domains = np.random.default_rng(0).integers(2, 300, (12, 16)).astype(np.int32), ["a"] * 12
    export.export(checkpoint, Recipe(chosen, "", 0, 0.0, None), None, file, level="search")

    def found(level, tuning, domains=domains):
        plain = encode(checkpoint, chosen, None, level="plain")
        how = {"level": level, "tuning": tuning, "tokens": tokens, "domains": domains}
        return {row["stage"]: row["kld"] for row in stages.stages(checkpoint, teacher, plain, file, **how)}

    def by_hand(level):
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        encoded = encode(checkpoint, chosen, None, level=level)
        weights = ((name, codec.dequantize(data, fmt).reshape(shapes[name])) for name, fmt, data in encoded)
        aside = tokens[kept_aside(domains, JUDGES)]
        reference = kld.make_reference(teacher, aside, tmp_path / "reference", first=0)
        return float(kld.measure(load_model(checkpoint, weights), reference).kld.mean())

    plain, searched = by_hand("plain"), by_hand("search")
    assert plain > 1.01 * searched > 0
    assert found("search", {}) == pytest.approx({"plain": plain, "search": searched}, rel=1e-3)
    tuned = {"kld": [0.25, 0.125], "steps": 3}
    assert found("feedback", tuned) == pytest.approx({"plain": plain, "feedback": 0.25, "tuning": 0.125}, rel=1e-3)
    assert list(found("plain", {})) == ["plain"]
    assert found("search", {"reason": "too few"}, domains=list("abcdefghijkl")) == {}
    monkeypatch.setenv("DYNQ_MEMORY", "20000B")
    assert found("search", {}) == {}


def test_ratios_are_to_the_line_before_and_to_plain():
    found = [{"stage": s, "kld": k} for s, k in (("plain", 0.4), ("feedback", 0.3), ("tuning", 0.24))]
    first, second, third = stages.stage_rows(found, {"steps": 7, "codes": 0.125})
    assert [row["KLD"] for row in (first, second, third)] == [0.4, 0.3, 0.24]
    assert [row["to plain"] for row in (first, second, third)] == pytest.approx([1, 0.75, 0.6])
    assert [row["ratio to the line before"] for row in (second, third)] == pytest.approx([0.75, 0.8])
    names = [row["encoding"] for row in (first, second, third)]
    assert names[:2] == ["plain", "+ feedback"]
    assert names[2] == "+ tuning of scales and codes: 7 steps, 12.5 % of the codes changed"
    without = stages.stage_rows([{"stage": "plain", "kld": 0.0}, {"stage": "search", "kld": None}], {})
    assert [row["to plain"] for row in without] == [None, None]  # nothing lost, or not finite
    assert stages.stage_rows([], {}) == []
