"""MMLU: a model whose answers are forced, flips and intervals by hand, and what a bad folder is answered with."""

import json
import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dynq.checkpoint import open_checkpoint
from dynq.errors import DynqError
from dynq.evaluate import mmlu
from dynq.torch_model import load_model, load_tokenizer

HEADER = "question,choice0,choice1,choice2,choice3,answer\n"
RIGHT = {"knot_theory": "ABCDABC", "tea": "DDB"}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(open_checkpoint("dynq-tiny"))


def row(number, answer):
    return f'"Which, of number {number} and\nother ones?",one {number},two,three,"fo""ur",{answer}\n'


@pytest.fixture
def folder(tmp_path):
    """One subject without a header and with letters, as first published; one with both, and digits."""
    for part in ("dev", "test"):
        (tmp_path / part).mkdir()
    for name, head in (("knot_theory", ""), ("tea", HEADER)):
        letters = "ABCD" if not head else "0123"
        for part, answers in (("dev", "DCBAD"), ("test", RIGHT[name])):
            rows = (row(at, letters["ABCD".index(answer)]) for at, answer in enumerate(answers))
            (tmp_path / part / f"{name}_{part}.csv").write_text(head + "".join(rows))
    return tmp_path


class Forced:
    """Answers the question of number n with ``answers[subject][n]``; spells the letter with and without a space."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, answers):
        self.tokenizer, self.answers, self.seen = tokenizer, answers, []

    def __call__(self, input_ids, past_key_values=None, use_cache=False, logits_to_keep=0):
        ids = input_ids if past_key_values is None else torch.cat([past_key_values.ids, input_ids], 1)
        if isinstance(logits_to_keep, int):  # the pass over what the prompts share
            return SimpleNamespace(past_key_values=Cache(ids), logits=None)
        before = ids.shape[1] - input_ids.shape[1]
        logits = torch.zeros(len(ids), len(logits_to_keep), len(self.tokenizer))
        spaced, bare = ([self.tokenizer.encode(space + x)[0] for x in "ABCD"] for space in (" ", ""))
        for at, ids_row in enumerate(ids):
            for place, last in enumerate(logits_to_keep.tolist()):
                text = self.tokenizer.decode(ids_row[: before + last + 1])
                numbers = re.findall(r"number (\d+)", text)
                if text.endswith("Answer:") and numbers:
                    self.seen.append(text)
                    subject = re.search(r"about (.+)\.\n", text)[1].replace(" ", "_")
                    letter = "ABCD".index(self.answers[subject][int(numbers[-1])])
                    # the most likely single token is another letter's, the two spellings together win
                    logits[at, place, bare[letter]] = logits[at, place, spaced[letter]] = 5.0
                    logits[at, place, spaced[letter - 1]] = 5.3
        return SimpleNamespace(logits=logits, past_key_values=past_key_values)


class Cache:
    def __init__(self, ids):
        self.ids = ids

    def batch_repeat_interleave(self, n):
        self.ids = self.ids.repeat_interleave(n, 0)


def run(folder, tokenizer, answers, n_ctx=1024, **options):
    prompts = mmlu.prepare(mmlu.load(folder, **options), tokenizer, n_ctx)
    model = Forced(tokenizer, answers)
    return mmlu.answer(model, prompts, batch=3, desc=""), model


def test_prompt_is_the_original_one(folder, tokenizer):
    prompts = mmlu.prepare(mmlu.load(folder, ["tea"], shots=1), tokenizer, 1024)
    question = 'Which, of number 0 and\nother ones?\nA. one 0\nB. two\nC. three\nD. fo"ur\nAnswer:'
    intro = "The following are multiple choice questions (with answers) about tea.\n\n"
    assert tokenizer.decode(prompts.ids[0]) == f"{intro}{question} D\n\n{question}"


def test_letters_are_tokens_with_and_without_space(tokenizer):
    for letter, tokens in zip("ABCD", mmlu.letter_tokens(tokenizer), strict=True):
        assert [tokenizer.decode([token]) for token in tokens] == [" " + letter, letter]


def test_forced_answers_are_found(folder, tokenizer):
    wanted = {"knot_theory": "AACDDBC", "tea": "DAB"}
    answers, model = run(folder, tokenizer, wanted)
    assert "".join("ABCD"[i] for i in answers.chosen) == wanted["knot_theory"] + wanted["tea"]
    assert all(text.count("Answer: ") == 5 and text.startswith("The following are") for text in model.seen)
    result = mmlu.score(answers)
    assert (result["n"], result["right"], result["fewer_shots"], result["cut"]) == (10, 7, 0, 0)
    assert {name: part["right"] for name, part in result["subjects"].items()} == {"knot_theory": 5, "tea": 2}
    assert result["accuracy"] == 0.7 and "changed" not in result


def test_flips_by_hand(folder, tokenizer):
    original, _ = run(folder, tokenizer, {"knot_theory": "AACDDBC", "tea": "DAB"})  # wrong: 1, 4 and tea's 1
    file, _ = run(folder, tokenizer, {"knot_theory": "BBCDCBA", "tea": "DAB"})  # wrong: 0, 4, 6 and tea's 1
    result = mmlu.score(file, original, file_bytes=2 * 10**9)
    assert (result["correct_to_wrong"], result["wrong_to_correct"], result["changed"]) == (2, 1, 4)
    assert result["subjects"]["tea"]["changed"] == 0
    assert result["efficiency"] == pytest.approx((60 - 25) / 2)
    same = mmlu.score(original, original)
    assert (same["correct_to_wrong"], same["wrong_to_correct"], same["changed"]) == (0, 0, 0)


def test_wilson_by_hand():
    # 7 of 10 at z = 2: middle (0.7 + 0.2) / 1.4, half 2 / 1.4 * sqrt(0.021 + 0.01)
    assert mmlu.wilson(7, 10, 2.0) == pytest.approx((0.9 / 1.4 - 0.031**0.5 / 0.7, 0.9 / 1.4 + 0.031**0.5 / 0.7))
    low, high = mmlu.wilson(0, 20)
    assert low == pytest.approx(0, abs=1e-12) and high == pytest.approx(1.959964**2 / (20 + 1.959964**2))
    assert mmlu.wilson(0, 0) == (0.0, 1.0)


def test_shots_are_dropped_from_the_front(folder, tokenizer):
    subjects = mmlu.load(folder, ["tea"])
    whole = mmlu.prepare(subjects, tokenizer, 1024)
    longest = max(map(len, whole.ids))
    prompts = mmlu.prepare(subjects, tokenizer, longest - 1)
    text = tokenizer.decode(prompts.ids[0])
    assert max(prompts.dropped) == 1 and not any(prompts.cut)
    assert text.startswith("The following are") and text.count("Answer: ") == 4
    assert "number 0" not in text.partition("number 1")[0] and text.count("number 4") == 1
    bare = mmlu.prepare(subjects, tokenizer, 20)
    assert set(bare.dropped) == {5} and all(bare.cut) and {len(ids) for ids in bare.ids} == {20}
    assert bare.ids[0] == whole.ids[0][-20:]


def test_batches_and_shared_shots_change_nothing(folder, tokenizer):
    model = load_model(open_checkpoint("dynq-tiny"))
    prompts = mmlu.prepare(mmlu.load(folder), tokenizer, 1024)
    answers = mmlu.answer(model, prompts, batch=3, desc="")
    for at in (0, 4, 9):
        with torch.inference_mode():
            log_p = model(torch.tensor([prompts.ids[at]])).logits[0, -1].double().log_softmax(-1)
        naive = [float(log_p[list(tokens)].exp().sum().log()) for tokens in prompts.letters]
        np.testing.assert_allclose(answers.log_probs[at], naive, atol=1e-4)


def test_answers_survive_a_json_file(folder, tokenizer):
    answers, _ = run(folder, tokenizer, RIGHT)
    again = mmlu.Answers(**json.loads(json.dumps(asdict(answers))))
    assert again == answers and mmlu.score(again, answers)["accuracy"] == 1.0
    with pytest.raises(DynqError, match="other MMLU prompts"):
        mmlu.score(replace(answers, prompts="x"), answers)


def test_limit_takes_the_first_questions(folder):
    assert [len(s.questions) for s in mmlu.load(folder, limit=2)] == [2, 2]
    assert mmlu.load(folder, ["knot theory"], limit=2)[0].questions == mmlu.load(folder)[0].questions[:2]
    with pytest.raises(DynqError, match="0 questions a subject"):
        mmlu.load(folder, limit=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Why?,a,b,c,A\n", r"tea_test.csv:2: 5 columns, 6 are needed"),
        ("Why?,a,b,c,d,E\n", r"tea_test.csv:2: the answer 'E'"),
        (row(1, 2) + "Why?,a,b,c,d,4\n", r"tea_test.csv:4: the answer '4'"),  # the first row takes two lines
        (" ,a,b,c,d,A\n", r"tea_test.csv:2: the question is empty"),
        (row(1, 2) + '"Why?,a,b,c,d,A\n', r"tea_test.csv:4: no valid CSV"),
        ("", r"tea_test.csv: an empty subject"),
    ],
)
def test_bad_lines_are_named(folder, line, message):
    (folder / "test" / "tea_test.csv").write_text(HEADER + line)
    with pytest.raises(DynqError, match=message):
        mmlu.load(folder)


def test_bad_folders_are_named(folder):
    with pytest.raises(DynqError, match=r"nowhere: no folder with dev/ and test/"):
        mmlu.load(folder / "nowhere")
    with pytest.raises(DynqError, match=r"no subject 'coffee'; there are knot_theory, tea"):
        mmlu.load(folder, ["coffee"])
    (folder / "dev" / "tea_dev.csv").write_text(HEADER + row(1, 2))
    with pytest.raises(DynqError, match="5 shots asked for, the subject's dev part has 1"):
        mmlu.load(folder)
    (folder / "dev" / "tea_dev.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(DynqError, match=r"tea_dev.csv: not UTF-8 at byte 0"):
        mmlu.load(folder)
    (folder / "dev" / "tea_dev.csv").unlink()
    with pytest.raises(DynqError, match=r"tea_dev.csv: the questions cannot be read: No such file"):
        mmlu.load(folder)


def test_the_hubs_data_set_gives_the_same_questions(folder, tmp_path, monkeypatch):
    """The layout of cais/mmlu: a config "all" with one file a split; the answer is a class label, kept as int64."""
    import huggingface_hub

    local = mmlu.load(folder)
    columns = [("question", pa.string()), ("subject", pa.string()), ("choices", pa.list_(pa.string()))]
    schema = pa.schema([*columns, ("answer", pa.int64())])
    (tmp_path / "hub" / "all").mkdir(parents=True)
    for part in ("dev", "test"):
        rows = [
            {"question": q.text, "subject": s.name, "choices": list(q.choices), "answer": q.answer}
            for s in reversed(local)
            for q in (s.shots if part == "dev" else s.questions)
        ]
        path = tmp_path / "hub" / "all" / f"{part}-00000-of-00001.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema), path)
    asked = []

    def download(dataset, name, repo_type):
        asked.append((dataset, name, repo_type))
        return str(tmp_path / "hub" / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    assert mmlu.load("cais/mmlu") == local
    assert asked == [("cais/mmlu", f"all/{part}-00000-of-00001.parquet", "dataset") for part in ("dev", "test")]
    assert [s.name for s in mmlu.load("cais/mmlu", ["tea"], limit=2)] == ["tea"]

    pq.write_table(pa.Table.from_pylist([*rows[:1], rows[1] | {"answer": 4}], schema), path)
    with pytest.raises(DynqError, match=r"test-00000-of-00001.parquet: row 1: the answer '4' is neither"):
        mmlu.load("cais/mmlu")
    pq.write_table(pa.table({"text": ["x"]}), path)
    with pytest.raises(DynqError, match=r"test-00000-of-00001.parquet: not MMLU's questions .*\"question\""):
        mmlu.load("cais/mmlu")
    path.write_bytes(b"half")
    with pytest.raises(DynqError, match=r"test-00000-of-00001.parquet: not MMLU's questions"):
        mmlu.load("cais/mmlu")

    def refuse(*_, **__):
        raise OSError("offline\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(DynqError, match=r"cais/mmlu: the Hugging Face hub did not give it; name a folder: offline$"):
        mmlu.load("cais/mmlu")
