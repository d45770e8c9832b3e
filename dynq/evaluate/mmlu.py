"""MMLU (Hendrycks et al. 2021, "Measuring Massive Multitask Language Understanding"), five shots, as the field runs it.

The prompt is the original evaluation's:

    The following are multiple choice questions (with answers) about abstract algebra.

    <question>
    A. <choice>
    ...
    Answer: B

    (five of these, then the question itself, which ends with "Answer:")

with one space before the subject, as lm-evaluation-harness writes it (the original code wrote two). An answer is the
letter with the largest log-probability after "Answer:". A tokenizer has two tokens for a letter, " A" and "A", and
models differ in which they use; the two are different events, so their probabilities are added (logsumexp). The better
one of the two alone would count a model as less sure only because it spreads a letter over both spellings.

Where a prompt is longer than the context, shots are dropped from the front, and those beside the question stay.
"""

import copy
import csv
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynq.errors import DynqError
from dynq.progress import progress
from dynq.text import encode

LETTERS = "ABCD"
CHANCE = 25.0
HUB = "cais/mmlu"
Z = 1.959964  # 95 %

_ANSWERS = {letter: at for at, letter in enumerate(LETTERS)} | {str(at): at for at in range(len(LETTERS))}


@dataclass(frozen=True)
class Question:
    """answer: which of the four choices is right, 0 to 3."""

    text: str
    choices: tuple[str, ...]
    answer: int

    def prompt(self, solved: bool) -> str:
        """The question as it stands in a prompt; with its answer as a shot."""
        choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=True))
        return f"{self.text}{choices}\nAnswer:" + (f" {LETTERS[self.answer]}\n\n" if solved else "")


@dataclass(frozen=True)
class Subject:
    """name: "abstract_algebra"; shots: solved questions to show first; questions: those to answer."""

    name: str
    shots: tuple[Question, ...]
    questions: tuple[Question, ...]


# --- the data set ---------------------------------------------------------------------------------------------------


def load(
    source: str | Path, subjects: Iterable[str] | None = None, *, limit: int | None = None, shots: int = 5
) -> list[Subject]:
    """Read the questions.

    Args:
        source: a folder of the original layout, ``dev/<subject>_dev.csv`` and ``test/<subject>_test.csv`` with the
            columns question, four choices, answer ("A" to "D", or 0 to 3; a first line with the columns' names is
            skipped), or "cais/mmlu", the data set of the hub.
        subjects: their names; all by default.
        limit: the first so many questions of each subject, for a quick look.
        shots: solved questions before each.

    Raises:
        DynqError: no such folder, subject or file; a subject without questions; a line that is no question (file and
            line are named); the hub cannot be reached.
    """
    if limit is not None and limit < 1:
        raise DynqError(f"{limit} questions a subject asked for; at least 1 is needed")
    if not 0 <= shots <= 5:
        raise DynqError(f"{shots} shots asked for; MMLU has 0 to 5")
    folder = Path(source)
    if not folder.exists() and str(source) == HUB:
        dev, test = _from_hub(str(source))
        return [
            _subject(name, dev.get(name, []), test[name], f"{source}: {name}", shots, limit)
            for name in _choose(sorted(test), subjects, str(source))
        ]
    if not (folder / "test").is_dir() or not (folder / "dev").is_dir():
        raise DynqError(f"{source}: no folder with dev/ and test/ in it, which MMLU's CSV files lie in, nor {HUB!r}")
    names = sorted(path.name.removesuffix("_test.csv") for path in (folder / "test").glob("*_test.csv"))
    if not names:
        raise DynqError(f"{folder / 'test'}: there is no file *_test.csv")
    loaded = []
    for name in _choose(names, subjects, str(source)):
        test_path = folder / "test" / f"{name}_test.csv"
        dev_questions = _read_csv(folder / "dev" / f"{name}_dev.csv") if shots else []
        loaded.append(_subject(name, dev_questions, _read_csv(test_path), str(test_path), shots, limit))
    return loaded


def _choose(names: list[str], wanted: Iterable[str] | None, source: str) -> list[str]:
    if wanted is None:
        return names
    chosen = list(dict.fromkeys(name.strip().replace(" ", "_") for name in wanted))
    for name in chosen:
        if name not in names:
            raise DynqError(f"{source}: no subject {name!r}; there are {', '.join(names)}")
    if not chosen:
        raise DynqError(f"{source}: no subject was chosen")
    return chosen


def _subject(
    name: str, dev: list[Question], test: list[Question], where: str, shots: int, limit: int | None
) -> Subject:
    if not test:
        raise DynqError(f"{where}: an empty subject, it has no questions")
    if len(dev) < shots:
        raise DynqError(f"{where}: {shots} shots asked for, the subject's dev part has {len(dev)}")
    return Subject(name, tuple(dev[:shots]), tuple(test[:limit]))


def _read_csv(path: Path) -> list[Question]:
    questions = []
    start = 1  # the line where the row begins: a quoted cell may hold newlines
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file, strict=True)
            for row in rows:
                if row and not (start == 1 and row[-1].strip().lower() == "answer"):
                    questions.append(_question(row, f"{path}:{start}"))
                start = rows.line_num + 1
    except OSError as error:
        raise DynqError(f"{path}: the questions cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DynqError(f"{path}: not UTF-8 at byte {error.start}; convert it first") from error
    except csv.Error as error:
        raise DynqError(f"{path}:{start}: no valid CSV: {error}") from error
    return questions


def _question(row: list[str], where: str) -> Question:
    if len(row) != 2 + len(LETTERS):
        raise DynqError(f"{where}: {len(row)} columns, {2 + len(LETTERS)} are needed: question, four choices, answer")
    answer = _ANSWERS.get(row[-1].strip())
    if answer is None:
        raise DynqError(f"{where}: the answer {row[-1]!r} is neither A to D nor 0 to 3")
    if not row[0].strip():
        raise DynqError(f"{where}: the question is empty")
    return Question(row[0], tuple(row[1:-1]), answer)


def _from_hub(dataset: str) -> tuple[dict[str, list[Question]], dict[str, list[Question]]]:
    """Subject -> questions, of the dev and the test part: all/<part>-00000-of-00001.parquet."""
    import pyarrow.parquet as pq
    from huggingface_hub import hf_hub_download

    parts = []
    for part in ("dev", "test"):
        try:
            path = hf_hub_download(dataset, f"all/{part}-00000-of-00001.parquet", repo_type="dataset")
        except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's errors
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DynqError(f"{dataset}: the Hugging Face hub did not give it; name a folder: {reason}") from error
        found: dict[str, list[Question]] = {}
        try:
            table = pq.read_table(path).select(["question", "subject", "choices", "answer"])
        except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors are kinds of these
            reason = error.args[0] if error.args else type(error).__name__
            raise DynqError(f"{path}: not MMLU's questions ({reason}); delete it, it is fetched again") from error
        for at, row in enumerate(table.to_pylist()):
            cells = [str(row["question"]), *map(str, row["choices"]), str(row["answer"])]
            found.setdefault(row["subject"], []).append(_question(cells, f"{path}: row {at}"))
        parts.append(found)
    return parts[0], parts[1]


# --- prompts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """Every question as tokens, made once for all the models that are compared.

    subjects: their names; subject ``[n]``: which of them; ids: tokens of each prompt, up to "Answer:"; answer ``[n]``:
    the right choice; dropped ``[n]``: shots that did not fit the context; cut ``[n]``: whether even the bare question
    was longer than it and lost its beginning. letters: for each of A to D the tokens that spell it.
    """

    subjects: tuple[str, ...]
    subject: tuple[int, ...]
    ids: tuple[list[int], ...]
    answer: tuple[int, ...]
    dropped: tuple[int, ...]
    cut: tuple[bool, ...]
    letters: tuple[tuple[int, ...], ...]

    @property
    def sha256(self) -> str:
        """Hash of all that a model's answers depend on beside the model."""
        return hashlib.sha256(repr((self.ids, self.answer, self.letters)).encode()).hexdigest()


def prepare(subjects: Iterable[Subject], tokenizer: Any, n_ctx: int) -> Prompts:
    """Tokens of every question with as many of its subject's shots as n_ctx has room for.

    tokenizer: of transformers. Raises DynqError where it has no token for a letter.
    """
    subjects = list(subjects)
    rows = []
    for at, subject in enumerate(progress(subjects, desc="MMLU prompts", unit="subject", leave=False)):
        intro = "The following are multiple choice questions (with answers) about "
        intro += subject.name.replace("_", " ") + ".\n\n"
        shots = [shot.prompt(True) for shot in subject.shots]
        for question in subject.questions:
            for dropped in range(len(shots) + 1):
                ids = encode(tokenizer, intro + "".join(shots[dropped:]) + question.prompt(False))
                if len(ids) <= n_ctx:
                    break
            rows.append((at, ids[-n_ctx:], question.answer, dropped, len(ids) > n_ctx))
    subject_of, ids_of, answers, dropped_of, cut = zip(*rows, strict=True)
    names = tuple(subject.name for subject in subjects)
    return Prompts(names, subject_of, ids_of, answers, dropped_of, cut, letter_tokens(tokenizer))


def letter_tokens(tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """For each of A to D the single tokens that spell it after "Answer:", with a space and without.

    A spelling is left out where some letter has no token for it: it would favour the other letters.
    """
    before = tokenizer("Answer:", add_special_tokens=False)["input_ids"]
    vocabulary = tokenizer.get_vocab()
    spaced: list[int] = []
    for letter in LETTERS:
        ids = tokenizer(f"Answer: {letter}", add_special_tokens=False)["input_ids"]
        if len(ids) == len(before) + 1 and ids[:-1] == before:
            spaced.append(ids[-1])
    # from the vocabulary: "Answer:A" may hold a token ":A", while a model that has written ":" goes on with "A"
    bare = [vocabulary[letter] for letter in LETTERS if letter in vocabulary]
    spellings = [tokens for tokens in (spaced, bare) if len(tokens) == len(LETTERS)]
    if not spellings:
        raise DynqError("the tokenizer has no single tokens for the letters A to D, so MMLU cannot be scored")
    return tuple(tuple(dict.fromkeys(tokens)) for tokens in zip(*spellings, strict=True))


# --- answers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What a model answered; plain lists inside, for a JSON file (`dataclasses.asdict`, ``Answers(**loaded)``).

    log_probs ``[n][4]``: of each letter, both spellings together, natural logarithm; the other columns are those of
    `Prompts`, whose hash is `prompts`.
    """

    prompts: str
    subjects: list[str]
    subject: list[int]
    answer: list[int]
    dropped: list[int]
    cut: list[bool]
    log_probs: list[list[float]]

    @property
    def chosen(self) -> np.ndarray:
        """int64 ``[n]``: the letter with the largest log-probability, the first of equals."""
        return np.asarray(self.log_probs).argmax(-1)

    @property
    def right(self) -> np.ndarray:
        """bool ``[n]``."""
        return self.chosen == np.asarray(self.answer)


@torch.inference_mode()
def answer(model: Any, prompts: Prompts, *, batch: int = 8, desc: str = "MMLU") -> Answers:
    """Ask a model all questions. An empty desc means no progress bar.

    What the prompts of a subject have in common (its shots) runs through the model once.
    """
    log_probs = np.zeros((len(prompts.ids), len(LETTERS)))
    with progress(total=len(prompts.ids), desc=desc, unit="question") if desc else nullcontext() as bar:
        for rows in _alike(prompts):
            shared = _shared([prompts.ids[row] for row in rows]) if len(rows) > 1 else 0
            cache = None
            if shared:
                ids = torch.tensor([prompts.ids[rows[0]][:shared]], device=model.device)
                cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            for start in range(0, len(rows), batch):
                members = rows[start : start + batch]
                last = _last_log_probs(model, [prompts.ids[row][shared:] for row in members], cache)
                for at, tokens in enumerate(prompts.letters):
                    log_probs[members, at] = torch.logsumexp(last[:, list(tokens)].double(), -1).cpu().numpy()
                if bar is not None:
                    bar.update(len(members))
    return Answers(
        prompts.sha256,
        list(prompts.subjects),
        list(prompts.subject),
        list(prompts.answer),
        list(prompts.dropped),
        list(prompts.cut),
        log_probs.tolist(),
    )


def _alike(prompts: Prompts) -> Iterator[list[int]]:
    """Rows that begin alike, the shortest first, so that a batch has little padding."""

    def beginning(row: int) -> tuple[int, int, bool]:
        return prompts.subject[row], prompts.dropped[row], prompts.cut[row]

    order = sorted(range(len(prompts.ids)), key=lambda row: (beginning(row), len(prompts.ids[row])))
    for _, rows in groupby(order, beginning):
        yield list(rows)


def _shared(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with, at most all but the last of the shortest."""
    first, last = min(rows), max(rows)  # in the order of lists: what these two share, those between share
    longest = min(map(len, rows)) - 1
    return next((at for at in range(longest) if first[at] != last[at]), longest)


def _last_log_probs(model: Any, ids: list[list[int]], cache: Any) -> torch.Tensor:
    """float32 ``[rows, n_vocab]`` after the last token of each row. cache: of one row, what stands before all of them.

    Rows are padded on the right, where nothing that counts looks.
    """
    last = torch.tensor([len(row) - 1 for row in ids])
    padded = torch.zeros((len(ids), int(last.max()) + 1), dtype=torch.long)
    for at, row in enumerate(ids):
        padded[at, : len(row)] = torch.tensor(row)
    if cache is not None:
        cache = copy.deepcopy(cache)  # the pass writes into it
        cache.batch_repeat_interleave(len(ids))
    kept = last.unique()
    logits = model(
        input_ids=padded.to(model.device),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=kept.to(model.device),
    ).logits
    return torch.log_softmax(logits[torch.arange(len(ids)), torch.searchsorted(kept, last)].float(), -1)


# --- scores ---------------------------------------------------------------------------------------------------------


def wilson(right: int, n: int, z: float = Z) -> tuple[float, float]:
    """Confidence interval of a share, 95 % by default (Wilson 1927); ``(0, 1)`` of nothing."""
    if not n:
        return 0.0, 1.0
    share, scale = right / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z / scale * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def efficiency(accuracy: float, file_bytes: int) -> float:
    """``(MMLU - 25) / GB``: percent above guessing for each 10^9 bytes of the file. accuracy: a fraction."""
    return (100 * accuracy - CHANCE) / (file_bytes / 1e9)


def score(answers: Answers, reference: Answers | None = None, *, file_bytes: int | None = None) -> dict[str, Any]:
    """Accuracy over all questions and per subject, each with its interval, and flips against the original's answers.

    Returns n, right, accuracy, low, high (fractions) and, with `reference`, the counts correct_to_wrong,
    wrong_to_correct and changed (another letter, right or not); fewer_shots and cut: questions whose prompt was too
    long for the context; efficiency, if `file_bytes` is given; subjects: name -> the same counts.

    Raises:
        DynqError: the reference answered other questions.
    """
    if reference is not None and reference.prompts != answers.prompts:
        raise DynqError("the original answered other MMLU prompts than the file; answer them anew with both")
    subject = np.asarray(answers.subject)
    result = _counts(answers, reference, np.ones(len(subject), bool))
    result |= {"fewer_shots": int(np.count_nonzero(answers.dropped)), "cut": sum(answers.cut)}
    if file_bytes is not None:
        result["efficiency"] = efficiency(result["accuracy"], file_bytes)
    result["subjects"] = {name: _counts(answers, reference, subject == at) for at, name in enumerate(answers.subjects)}
    return result


def _counts(answers: Answers, reference: Answers | None, which: np.ndarray) -> dict[str, Any]:
    right = answers.right[which]
    n, n_right = len(right), int(right.sum())
    low, high = wilson(n_right, n)
    counts: dict[str, Any] = {"n": n, "right": n_right, "accuracy": n_right / n, "low": low, "high": high}
    if reference is not None:
        was = reference.right[which]
        counts |= {
            "correct_to_wrong": int((was & ~right).sum()),
            "wrong_to_correct": int((~was & right).sum()),
            "changed": int((answers.chosen != reference.chosen)[which].sum()),
        }
    return counts
