"""Experts: tokens that reach them, and more text for those that hardly any token reached."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch

from dynq import experts
from dynq.calibrate import calibrate
from dynq.checkpoint import open_checkpoint
from dynq.figures_experts import experts_map
from dynq.fisher import Fisher
from dynq.text import load_text
from dynq.torch_model import load_model, load_tokenizer

N_CTX, N_CHUNKS = 32, 2


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Checkpoint, model, tokenizer, text file, importance and Fisher samples of a small mixture."""
    folder = tmp_path_factory.mktemp("experts")
    checkpoint = open_checkpoint(tiny_models.make("qwen3moe", folder / "model"))
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    file = folder / "text.txt"
    file.write_text(" ".join(f"the {i * i} dogs jump over {i} lazy foxes {chr(97 + i % 26)}" for i in range(60)))
    text = load_text(str(file), tokenizer, n_ctx=N_CTX, n_chunks=N_CHUNKS, seed=0)
    importance = calibrate(checkpoint, model, text.tokens, folder, keep=8)
    return checkpoint, model, tokenizer, file, importance, Fisher(folder / "fisher")


def _further(parts: tuple, limit: int, wanted: int, spec: str | None = None) -> tuple:
    checkpoint, model, tokenizer, file, importance, _ = parts
    spec = str(file) if spec is None else spec
    sizes = {"n_ctx": N_CTX, "n_chunks": N_CHUNKS, "limit": limit, "wanted": wanted}
    return experts.top_up(checkpoint, model, tokenizer, importance, spec=spec, **sizes)


def test_every_token_is_seen_by_as_many_experts_as_it_is_sent_to(parts: tuple) -> None:
    checkpoint, *_, fisher = parts
    seen = experts.tokens_seen(checkpoint, fisher)
    assert sorted(seen) == [0, 1, 2]
    used = checkpoint.architecture.config["num_experts_per_tok"]
    assert all(counts.sum() == N_CTX * N_CHUNKS * used for counts in seen.values())


def test_more_text_counts_as_calibration_on_it_would(parts: tuple, tmp_path: Path) -> None:
    checkpoint, model, tokenizer, file, importance, _ = parts
    topped, read = _further(parts, limit=3, wanted=10**6)
    assert read == 3 * N_CTX
    text = load_text(str(file), tokenizer, n_ctx=N_CTX, n_chunks=N_CHUNKS + 3, seed=0)
    alone = calibrate(checkpoint, model, text.tokens[N_CHUNKS:], tmp_path, keep=8)
    names = experts.stacks(checkpoint)
    assert len(names) == 9
    for name in names:
        np.testing.assert_array_equal(topped.counts[name], importance.counts[name] + alone.counts[name])
        np.testing.assert_allclose(topped.sums[name], importance.sums[name] + alone.sums[name], rtol=1e-5)


def test_only_starved_experts_get_more(parts: tuple) -> None:
    checkpoint, _, _, _, importance, _ = parts
    counts = np.concatenate([importance.counts[name] for name in experts.stacks(checkpoint)])
    wanted = int(np.median(counts))
    topped, read = _further(parts, limit=40, wanted=wanted)
    assert 0 < read < 40 * N_CTX  # it ends when all have enough
    for name, before in importance.counts.items():
        few = (before < wanted) & (len(before) > 1)
        assert (topped.counts[name][few] >= wanted).all()
        np.testing.assert_array_equal(topped.counts[name][~few], before[~few])
        np.testing.assert_array_equal(topped.sums[name][~few], importance.sums[name][~few])


def test_prompts_follow_where_files_end(parts: tuple) -> None:
    importance = parts[4]
    topped, read = _further(parts, limit=2, wanted=10**6, spec="")
    assert read == 2 * N_CTX
    assert all((topped.counts[name] >= counts).all() for name, counts in importance.counts.items())


def test_bytes_do_not_depend_on_threads(parts: tuple) -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(_further(parts, limit=4, wanted=10**6, spec="")[0].sums)
    finally:
        torch.set_num_threads(before)
    for sums in found[1:]:
        assert all(np.array_equal(sums[name], values) for name, values in found[0].items())


def test_nothing_is_read_where_nothing_is_missing(parts: tuple) -> None:
    importance = parts[4]
    assert _further(parts, limit=0, wanted=10**6) == (importance, 0)
    assert _further(parts, limit=4, wanted=0) == (importance, 0)


def test_the_picture_names_the_starved(parts: tuple) -> None:
    checkpoint, *_, importance, fisher = parts
    seen = experts.tokens_seen(checkpoint, fisher) | {1: np.array([0, 500, 3, 500, 500, 500, 500, 500])}
    rows = experts.expert_rows(seen, importance, checkpoint)
    assert rows[1]["tokens, fewest"] == 0 and rows[1]["under 64"] == 2
    picture = experts_map(seen, importance, checkpoint)
    drawn = json.loads(picture.figure.to_json())["data"][0]
    assert [pair[0] for pair in drawn["customdata"][1]] == [1, 3, 4, 5, 6, 7, 2, 0]  # busiest first
    assert all(str(row["starved"]) in picture.table for row in rows)
