"""What tests/bench/quality.py says of two files, and published recipes on a model of another depth."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "bench"))
import published
import quality
from passages import passages

from dynq import describe, mixes
from dynq.checkpoint import open_checkpoint
from dynq.errors import DynqError
from dynq.folder import RunFolder
from dynq.imatrix import Importance, write_imatrix
from dynq.recipe import Recipe
from dynq.text import encode, prompts
from dynq.torch_model import load_tokenizer

RECIPES = sorted((Path(__file__).parent / "bench" / "recipes").glob("*.json"))


def statistics(kld: float, high: float = 1.0, same: float = 0.9) -> dict[str, float]:
    return {"Mean KLD": kld, "99.9% KLD": high, "Same top p": same}


def entry(kld: float, size: int = 100, **domains: float) -> dict:
    """An entry of `against_original`."""
    by_domain = {name: statistics(value) for name, value in domains.items()}
    return {"tensor_bytes": size, "file_bytes": size + 9, "statistics": statistics(kld), "domains": by_domain}


def pair(goal: quality.Goal | None = quality.Goal(0.3, 0.6)) -> quality.Pair:
    return quality.Pair("Q2_K", "like:Q2_K", Path("mix.gguf"), goal)


def test_ratios_are_ours_by_theirs_and_count_changed_tokens():
    found = quality.ratios(statistics(0.1, 2.0, 0.95), statistics(0.4, 1.0, 0.8))
    assert found == pytest.approx({"KLD": 0.25, "99.9 %": 2.0, "top-1": 0.25})
    nothing = statistics(1.0, same=1.0)
    assert quality.ratios(nothing, nothing)["top-1"] == 0
    assert quality.ratios(statistics(1.0), nothing)["top-1"] == 1


@pytest.mark.parametrize(("kld", "code", "met", "in_domains"), [(3, 5, True, True), (3.1, 5, False, True)])
def test_goals(kld, code, met, in_domains):
    found = quality.result(pair(), entry(10, wiki=10, code=10), entry(kld, wiki=2, code=code), {"mix.gguf": 4.0})
    assert (found["met"], found["met_in_domains"], found["worst_domain"]) == (met, in_domains, "code")
    assert found["theirs"]["seconds"] == 4 and found["ours"]["seconds"] is None
    worse = quality.result(pair(), entry(10, wiki=10, code=10), entry(kld, wiki=7, code=code), {})
    assert (worse["worst_domain"], worse["met_in_domains"]) == ("wiki", False)
    first, second = quality.table([found, worse], "mix").splitlines()[1:]
    assert ("0.3 met" in first) == met and "0.6 met" in first and "0.6 missed" in second
    assert len(quality.domain_table([found], "mix").splitlines()) == 3


def test_a_recipe_is_beaten_in_all_three_or_not():
    domains = {"wiki": 1.0}
    ours, theirs = entry(0.5, **domains), entry(1.0, **domains)
    found = quality.result(pair(None), theirs, ours, {})
    assert (found["goal"], found["met"], found["better"]) == (None, None, False)  # equal in two of the three
    ours["statistics"] = statistics(0.5, 0.9, 0.91)
    assert quality.result(pair(None), theirs, ours, {})["better"]


def test_more_bytes_than_the_rival_is_an_error():
    with pytest.raises(DynqError, match="101 bytes, 100 are allowed"):
        quality.result(pair(), entry(1, 100, wiki=1.0), entry(1, 101, wiki=1.0), {})
    large = entry(1, 101, wiki=1.0) | {"file_bytes": 109}  # a smaller header leaves more for the tensors
    recipe = quality.Pair("theirs", "109B", Path("theirs.gguf"))
    assert quality.result(recipe, entry(1, 100, wiki=1.0), large, {})["ours"]["tensor_bytes"] == 101


def test_every_row_has_a_goal():
    assert set(quality.QUICK) <= set(quality.GOALS) and set(quality.GOALS) | set(quality.ARM) <= set(mixes.MIXES)


def test_passages_begin_behind_what_is_skipped(tmp_path):
    tokenizer = load_tokenizer(open_checkpoint("dynq-tiny"))
    file = tmp_path / "text.txt"
    file.write_text(" ".join(map(str, range(200))))
    ids = encode(tokenizer, file.read_text())
    for skip, count in ((0, 2), (3, 2)):
        found = passages(file, tokenizer, n_ctx=16, chunks=count, skip=skip)
        assert found.ravel().tolist() == ids[16 * skip : 16 * (skip + count)]
    last = len(ids) // 16 - 1
    assert len(passages(file, tokenizer, n_ctx=16, chunks=2, skip=last)) == 1
    with pytest.raises(DynqError, match=f"no more than {last + 1} chunks of 16 tokens"):
        passages(file, tokenizer, n_ctx=16, chunks=2, skip=last + 1)


def test_domains_of_a_text(tmp_path, monkeypatch):
    model = open_checkpoint("dynq-tiny")
    bench = quality.Bench(model, "dynq-tiny", tmp_path / "out", [], 1)
    bench.run.path.mkdir(parents=True)
    own = np.arange(96).reshape(3, 32)
    bench.run.write_json("evaluate-text.json", {"tokens": own.tolist()})
    monkeypatch.setattr(RunFolder, "state", {"steps": {"calibrate-text": {"parameters": {"text": ""}}}})
    file = tmp_path / "text.txt"
    file.write_text(" ".join(map(str, range(100))))
    found = bench.text(f"sampled,{file},languages", 2, 1)
    assert found.domains == {"sampled": 2, "languages": 2, "text.txt": 2}
    tokenizer = load_tokenizer(model)
    assert found.tokens[:2].tolist() == own[:2].tolist()  # of these none is skipped
    assert found.tokens[4:].ravel().tolist() == encode(tokenizer, file.read_text())[32:96]
    foreign = [messages[-1]["content"] for messages in prompts("evaluate", foreign=True)]
    assert 0 < len(foreign) < len(prompts("evaluate")) and any("ä" in text for text in foreign)
    said = tokenizer.decode(found.tokens[2:4].ravel().tolist())
    assert foreign[0][:40] in said
    written = [json.loads(line)["messages"] for line in (tmp_path / "out" / "languages.jsonl").read_text().splitlines()]
    assert written == prompts("evaluate", foreign=True)


def test_predictions_beside_what_was_measured(tmp_path):
    run = RunFolder(tmp_path)
    recipe = Recipe({"a": "Q4_K"}, "like:Q2_K", 1, 4.5, 0.3)
    for name, found in (("2bpw", {"plain": 0.25, "feedback": 0.2, "tuning": 0.1}), ("3bpw", {})):
        recipe.save(tmp_path / f"{name}.recipe.json")
        stages = [{"stage": stage, "kld": kld} for stage, kld in found.items()]
        run.write_json(f"{name}.export.json", {"predicted_kld": 0.22, "stages": stages})
    first, second = quality.predictions(run, ["2bpw", "3bpw"])
    figures = {"plain: predicted": 0.3, "plain: measured": 0.25, "plain: ratio": 1.2}
    figures |= {"feedback: predicted": 0.22, "feedback: measured": 0.2, "feedback: ratio": 1.1}
    assert first == {"target": "2bpw"} | figures and second == {"target": "3bpw"} | dict.fromkeys(figures)


def test_layers_are_read_as_they_are_written():
    for numbers in ([0], [0, 1, 2, 5], [3, 7, 8, 9], list(range(40))):
        assert published.layers(describe.layers(numbers)) == set(numbers)


def test_relative_depth():
    assert [published.relative(i, 5, 5) for i in range(5)] == [0, 1, 2, 3, 4]
    assert [published.relative(i, 12, 36) for i in (0, 1, 11)] == [0, 3, 35]
    assert published.relative(0, 1, 36) == 0


def test_tables_speak_of_each_layer_once_and_of_every_tensor():
    model = open_checkpoint("dynq-tiny")
    for path in RECIPES:
        table = json.loads(path.read_text())
        for rule in [*table["tensors"].values(), table.get("mixes")]:
            if isinstance(rule, dict):
                found = [layer for text in rule.values() for layer in published.layers(text)]
                assert sorted(found) == list(range(table["layers"]))
        recipe = published.read(path, model)
        assert recipe.formats.keys() == model.tensors.keys() and recipe.provenance["source"].startswith("https://")


def test_rules_of_a_table():
    model = open_checkpoint("dynq-tiny")  # 12 layers, the embedding is the head
    table = {
        "architecture": "qwen3",
        "layers": 23,
        "tensors": {"token_embd": "Q4_K", "output": "Q6_K", "attn_v": {"Q8_0": "0", "Q5_K": "1-22"}},
        "mixes": {"Q3_K_M": "0-21", "Q6_K": "22"},
    }
    found = published.from_table(table, model)
    assert found["token_embd.weight"] == "Q6_K"
    assert [found[f"blk.{i}.attn_v.weight"] for i in (0, 1, 11)] == ["Q8_0", "Q5_K", "Q5_K"]
    whole = mixes.mix("Q3_K_M", model.tensors, model.metadata, True)
    assert [found[f"blk.{i}.ffn_down.weight"] for i in (3, 11)] == [whole["blk.3.ffn_down.weight"], "Q6_K"]
    assert "output_norm.weight" not in found


def test_a_table_of_another_model_is_refused(tmp_path):
    model = open_checkpoint("dynq-tiny")
    table = {"architecture": "llama", "layers": 2, "tensors": {"attn_v": "Q6_K"}, "source": "", "published": ""}
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    with pytest.raises(DynqError, match="for llama, the model is qwen3"):
        published.read(path, model)
    path.write_text(json.dumps(table | {"architecture": "qwen3", "model": ""}))
    with pytest.raises(DynqError, match=r"no format for token_embd.weight \(73 tensors\)"):
        published.read(path, model)


@pytest.mark.parametrize("with_llama", [True, False])
def test_rivals_are_what_they_are_called_and_made_once(tmp_path, with_llama):
    if with_llama and importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("needs llama-cpp-python (the extra bench)")
    model = open_checkpoint("dynq-tiny")
    rng = np.random.default_rng(0)
    rows = {name: info.row for name, info in model.tensors.items() if info.quantizable}
    sums = {name: rng.lognormal(0, 2, (1, row)).astype(np.float32) for name, row in rows.items()}
    (tmp_path / "run").mkdir()
    bench = quality.Bench(model, "dynq-tiny", tmp_path, [], 1)
    bench.with_llama, bench.encoder = with_llama, str(with_llama)

    def made(scale: float) -> Path:
        importance = Importance({n: s**scale for n, s in sums.items()}, {n: np.ones(1, np.float32) for n in sums})
        write_imatrix(tmp_path / "run" / "imatrix.gguf", importance)
        return bench.mix("Q3_K_S").theirs

    mix = made(1.0)
    assert Recipe.from_gguf(mix).formats == mixes.mix("Q3_K_S", model.tensors, model.metadata, True)
    assert bench.seconds[mix.name] > 0
    written = mix.stat().st_mtime_ns
    assert made(1.0) == mix and mix.stat().st_mtime_ns == written
    assert made(0.0).read_bytes() != mix.read_bytes()  # another importance, another file
    recipe = bench.recipe(RECIPES[0])
    assert Recipe.from_gguf(recipe.theirs).formats == published.read(RECIPES[0], model).formats
    assert recipe.target == f"{recipe.theirs.stat().st_size}B" and recipe.goal is None
