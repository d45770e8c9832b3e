import json
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dynq.errors import DynqError
from dynq.text import check_held_out, end_of_turn, load_text, prompts, sample_chats, spread

DATA = Path(__file__).parents[1] / "dynq" / "data"
CORPUS = Path(__file__).parents[2] / "shared" / "corpus"


# the prompts


@pytest.fixture(scope="module")
def entries() -> list[dict]:
    return [json.loads(line) for line in (DATA / "prompts.jsonl").read_text("utf-8").splitlines()]


def whole(entry: dict) -> str:
    return " ".join(" ".join(message["content"] for message in entry["messages"]).lower().split())


def test_prompts_are_many_and_various(entries) -> None:
    assert len(entries) >= 360
    assert len({entry["id"] for entry in entries}) == len(entries)
    assert len({entry["domain"] for entry in entries}) >= 14
    languages = Counter(entry["lang"] for entry in entries)
    assert len(languages) >= 10 and min(languages.values()) >= 5
    assert 0.4 <= languages["en"] / len(entries) <= 0.6
    several = sum(sum(message["role"] == "user" for message in entry["messages"]) > 1 for entry in entries)
    assert several >= 0.15 * len(entries)
    assert sum("```" in whole(entry) for entry in entries) >= 8
    words = sorted(len(whole(entry).split()) for entry in entries if entry["lang"] == "en")
    assert words[len(words) // 20] <= 10 and words[-10] >= 100
    assert sum(len(entry["messages"][-1]["content"]) > 400 for entry in entries) >= 24


def test_splits_cover_the_same_domains(entries) -> None:
    evaluate = [entry for entry in entries if entry["split"] == "evaluate"]
    assert 0.15 <= len(evaluate) / len(entries) <= 0.25
    assert {entry["domain"] for entry in evaluate} == {entry["domain"] for entry in entries}
    assert len(prompts("evaluate")) == len(evaluate)
    assert len(prompts("calibrate")) + len(evaluate) == len(entries)
    with pytest.raises(DynqError, match="'test'"):
        prompts("test")


def test_roles_alternate_and_end_with_the_user(entries) -> None:
    for entry in entries:
        roles = [message["role"] for message in entry["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) + ["user"], entry["id"]
        assert all(message["content"].strip() == message["content"] != "" for message in entry["messages"]), entry["id"]


def test_no_two_prompts_are_alike(entries) -> None:
    """Jaccard similarity of character 5-grams."""
    shingles = [{text[at : at + 5] for at in range(max(1, len(text) - 4))} for text in map(whole, entries)]
    for (one, a), (two, b) in combinations(zip(entries, shingles, strict=True), 2):
        limit = 0.5 if one["split"] == two["split"] else 0.3
        assert len(a & b) < limit * len(a | b), (one["id"], two["id"])


def test_no_template_is_shared(entries) -> None:
    openings = Counter(" ".join(re.findall(r"\w+", whole(entry))[:3]) for entry in entries)
    assert openings.most_common(1)[0][1] <= 0.02 * len(entries), openings.most_common(3)


@pytest.mark.skipif(not CORPUS.exists(), reason="the conversations for comparison are not on this machine")
def test_no_prompt_comes_from_the_corpus(entries) -> None:
    foreign = {
        message["content"].strip().lower()
        for path in CORPUS.glob("*.jsonl")
        for line in path.read_text("utf-8").splitlines()
        for message in json.loads(line)["messages"]
    }
    own = {message["content"].strip().lower() for entry in entries for message in entry["messages"]}
    assert not own & foreign


# files


def test_a_text_that_is_calibrated_on_proves_nothing(tmp_path) -> None:
    for name, text in (("seen.txt", "a"), ("copy.txt", "a"), ("other.txt", "b")):
        (tmp_path / name).write_text(text)
    seen, copy, other = (str(tmp_path / name) for name in ("seen.txt", "copy.txt", "other.txt"))
    check_held_out(seen, other)
    for calibration in ("", "sampled", "missing.txt"):
        check_held_out(calibration, copy)
    check_held_out(seen, "sampled")  # held out by its prompts
    with pytest.raises(DynqError, match=r"copy.txt: it is calibrated on as well \(seen.txt\)"):
        check_held_out(f"{other},{seen}", f"{copy},{other}")


class Letters:
    """A tokenizer of one token a character: BOS 1 in front if asked for."""

    chat_template = None
    bos_token_id = 1

    def __init__(self, add_bos: bool = False):
        self.add_bos = add_bos

    def __call__(self, text: str, add_special_tokens: bool = True, **_) -> dict[str, list[int]]:
        return {"input_ids": [1] * (self.add_bos and add_special_tokens) + [ord(letter) for letter in text]}


def as_text(tokens: np.ndarray) -> list[str]:
    return ["".join(map(chr, chunk)) for chunk in tokens]


def load(spec, tokenizer=None, n_ctx=4, n_chunks=99):
    return load_text(str(spec), tokenizer or Letters(), n_ctx=n_ctx, n_chunks=n_chunks, seed=0)


def test_plain_text_is_cut_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcdefghijklm\n")
    text = load(path)
    assert as_text(text.tokens) == ["abcd", "efgh", "ijkl"] and text.tokens.dtype == np.int32
    assert text.description == "a.txt: 3 chunks of 4 tokens (99 were asked for, the text has no more)"
    assert as_text(load(path, n_chunks=2).tokens) == ["abcd", "efgh"]
    assert load(path, n_chunks=3).description == "a.txt: 3 chunks of 4 tokens"


def test_bos_as_llama_imatrix_places_it(tmp_path: Path) -> None:
    """In front of the text, and over the first token of every later chunk."""
    path = tmp_path / "a.txt"
    path.write_text("abcdefghijklm")
    assert as_text(load(path, Letters(add_bos=True)).tokens) == ["\1abc", "\1efg", "\1ijk"]


def test_several_files_take_turns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("aaaaAAAA")
    (tmp_path / "b.txt").write_text("bbbbBBBBbbbb")
    text = load(f"{tmp_path / 'a.txt'}, {tmp_path / 'b.txt'}")
    assert as_text(text.tokens) == ["aaaa", "bbbb", "AAAA", "BBBB", "bbbb"]
    (tmp_path / "c,d.txt").write_text("cdcd")
    assert as_text(load(tmp_path / "c,d.txt").tokens) == ["cdcd"]


def test_long_text_is_tokenised_only_as_far_as_needed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcd" * 100_000)
    seen = []

    class Watched(Letters):
        def __call__(self, text, **kwargs):
            seen.append(len(text))
            return super().__call__(text, **kwargs)

    assert as_text(load(path, Watched(), n_chunks=2).tokens) == ["abcd"] * 2
    assert max(seen) < 1000


def test_chats_without_a_template_and_all_spellings(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]},
        {"conversations": [{"from": "human", "value": "ef"}]},
        {"text": "gh"},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    assert "".join(as_text(load(path, n_ctx=2).tokens)) == "ab\n\ncd\n\nef\n\ngh"


def test_chats_go_through_the_template(tmp_path: Path, tiny) -> None:
    _, tokenizer = tiny
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}))
    text = load(path, tokenizer, n_ctx=5)
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
    assert expected.startswith(tokenizer.decode(text.tokens.ravel())) and text.tokens.size >= 10
    assert text.tokens[0, 0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_hash_depends_on_tokens_and_chunks(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh")
    (tmp_path / "b.txt").write_text("abcdefgi")
    hashes = {
        load(tmp_path / "a.txt").sha256,
        load(tmp_path / "b.txt").sha256,
        load(tmp_path / "a.txt", n_ctx=8).sha256,
    }
    assert len(hashes) == 3
    assert load(tmp_path / "a.txt").sha256 in hashes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc", "a.txt: 3 tokens, fewer than one chunk of 4"),
        ("a.txt", b"abcdef\xff", "not UTF-8 at byte 6"),
        ("a.txt", None, "cannot be read: No such file"),
        ("a.jsonl", b'{"text": "abcd"}\n{"text": ', r"a\.jsonl:2: no valid JSON"),
        ("a.jsonl", b'{"text": "abcd"}\n\n[1]', r"a\.jsonl:3: no conversation"),
        ("a.jsonl", b'{"messages": []}', r"a\.jsonl:1: no conversation"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', r"a\.jsonl:1: a turn without"),
        ("a.jsonl", b"", "a.jsonl: 0 tokens"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DynqError, match=message):
        load(tmp_path / name)


def test_sampling_needs_the_model_and_chunks_a_size() -> None:
    with pytest.raises(DynqError, match="needs the model"):
        load("sampled")
    with pytest.raises(DynqError, match="0 chunks of 4"):
        load("", n_chunks=0)


def test_import_is_light() -> None:
    code = "import sys, dynq.text; print({'torch', 'transformers', 'numba'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


# sampling


@pytest.fixture(scope="module")
def tiny():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = DATA / "dynq-tiny"
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


def test_end_of_turn_comes_from_the_template(tiny) -> None:
    model, tokenizer = tiny
    bare = SimpleNamespace(
        config=SimpleNamespace(eos_token_id=None), generation_config=SimpleNamespace(eos_token_id=None)
    )
    newline = tokenizer("\n")["input_ids"]
    assert end_of_turn(bare, tokenizer) == ({2}, newline)
    assert end_of_turn(model, tokenizer) == ({0, 2}, newline)


def test_sampled_text_follows_the_model(tiny) -> None:
    """Where tokens are drawn from p, the mean of -log p(drawn) - entropy(p) is zero within its standard error.

    p is computed afresh, each chat alone, without padding or cache, so wrong masks, positions or rows would show.
    """
    import torch

    model, tokenizer = tiny
    short = [tokenizer(text)["input_ids"] for text in ("Hi", "The capital of", "Once upon a time there was a small")]
    encoded = short * 5 + [tokenizer("one two three four five " * 4)["input_ids"]]
    chats = sample_chats(model, tokenizer, encoded, max_tokens=64, generator=torch.Generator().manual_seed(3))
    excess, spread = [], []
    for prompt, chat in zip(encoded, chats, strict=True):
        assert chat[: len(prompt)] == prompt and len(prompt) < len(chat) <= len(prompt) + 33
        answer = chat[len(prompt) :]
        answer = answer[: next((at + 1 for at, token in enumerate(answer) if token in (0, 2)), len(answer))]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        excess += (-log_p[range(len(answer)), answer] - entropy).tolist()
        spread += ((log_p.exp() * log_p**2).sum(-1) - entropy**2).tolist()
    error = float(np.sqrt(np.sum(spread))) / len(excess)
    assert len(excess) > 200
    assert abs(np.mean(excess)) < 4 * error, (np.mean(excess), error)
    assert error < 0.2  # greedy or cold sampling would lie far below, a wrong mask far above


def test_sampled_chunks(tiny) -> None:
    model, tokenizer = tiny
    import torch

    before = torch.random.get_rng_state()
    one = load_text("", tokenizer, n_ctx=64, n_chunks=2, seed=5, model=model)
    two = load_text("sampled", tokenizer, n_ctx=64, n_chunks=2, seed=5, model=model)
    other = load_text("", tokenizer, n_ctx=64, n_chunks=2, seed=6, model=model, split="evaluate")
    assert one.tokens.shape == (2, 64) and one.tokens.dtype == np.int32
    assert one.sha256 == two.sha256 != other.sha256
    assert torch.equal(before, torch.random.get_rng_state())  # nobody else's random numbers are used up
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert one.tokens[:, 0].tolist() == [start, tokenizer.bos_token_id]  # a conversation's start, a document's
    assert (other.tokens[:, 0] == start).all()
    assert re.fullmatch(
        r"sampled from the model with \d+ prompts \(evaluate split\), seed 6: 2 chunks of 64 tokens", other.description
    )


def test_sampled_tokens_do_not_depend_on_threads(tiny) -> None:
    import torch

    model, tokenizer = tiny
    before, found = torch.get_num_threads(), set()
    encoded = [tokenizer(text)["input_ids"] for text in ("Hi", "The capital of", "Once upon a time there was")] * 13
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            own = torch.Generator().manual_seed(1)
            found.add(str(sample_chats(model, tokenizer, encoded, max_tokens=48, generator=own)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
    apart = torch.Generator().manual_seed(2)
    assert str(sample_chats(model, tokenizer, encoded, max_tokens=48, generator=apart)) not in found


def test_base_model_without_template(tiny) -> None:
    model, tokenizer = tiny
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        text = load_text("", tokenizer, n_ctx=64, n_chunks=1, seed=0, model=model)
    finally:
        tokenizer.chat_template = template
    assert text.tokens.shape == (1, 64)
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") != text.tokens[0, 0]


def test_domains_of_chunks(tiny, tmp_path) -> None:
    model, tokenizer = tiny
    text = load_text("", tokenizer, n_ctx=64, n_chunks=6, seed=0, model=model)
    assert text.domains[1::2] == ("documents",) * 3 and "documents" not in text.domains[::2]
    assert set(text.domains) <= {"documents", "chats", "code", "knowledge", "other languages"}
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else model.config.bos_token_id
    assert (text.tokens[1::2, 0] == begin).all()
    held_out = load_text("", tokenizer, n_ctx=64, n_chunks=3, seed=0, model=model, split="evaluate")
    assert "documents" not in held_out.domains
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"the text of {name} goes on and on. " * 40)
    files = load_text(f"{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}", tokenizer, n_ctx=16, n_chunks=5, seed=0)
    assert files.domains == ("a.txt", "b.txt", "a.txt", "b.txt", "a.txt")


def test_every_domain_keeps_its_share() -> None:
    domains = ["a", "b", "a", "b", "a", "c", "a", "b"]
    some = spread(domains, 4)
    assert some.tolist() == sorted(set(some.tolist()))
    assert sorted(domains[at] for at in some) == ["a", "a", "b", "b"]
    turns = ["chat", "document"] * 80
    assert Counter(turns[at] for at in spread(turns, 64)) == {"chat": 32, "document": 32}
    for count in (8, 9):  # all, in their order
        assert spread(domains, count).tolist() == list(range(8))
    assert spread([], 3).tolist() == []
