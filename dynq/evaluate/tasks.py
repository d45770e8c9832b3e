"""What is measured of a file: its divergence, and on demand MMLU, greedy answers, where it hurts, llama.cpp's own run.

A task is made once for all files. Its results are plain JSON values, so that they can be kept.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from dynq import libllama
from dynq.checkpoint import Checkpoint
from dynq.errors import DynqError
from dynq.evaluate import greedy, kld, mmlu, precision, where
from dynq.evaluate.original import Text
from dynq.progress import progress
from dynq.torch_model import load_tokenizer

ANSWER_TOKENS = 32  # of a greedy answer
ANSWERS_SHOWN = 5
COST_GROUPS = 32  # layers, and tensors outside of them, that are restored one by one
COST_CHUNKS = 4  # of the text, evenly spaced, that each restored layer is measured on


@dataclass(frozen=True)
class Asked:
    """What to measure beside the divergence; by default nothing.

    mmlu: a folder or "cais/mmlu"; mmlu_limit: questions of each subject; greedy: prompts; where: worst tokens;
    engine: whether the files run in llama.cpp as well.
    """

    mmlu: str = ""
    mmlu_limit: int | None = None
    greedy: int = 0
    where: int = 0
    engine: bool = False


Measure = Callable[[kld.Base], tuple[kld.TokenScores, precision.Arithmetic]]


class Subject:
    """A model that is measured: loaded when a result first needs it, run over the text at most once.

    checkpoint: where its tensors come from; load: gives the model; base: what it is measured against; measure: does
    that without the model, by the workers of a cluster.
    """

    def __init__(
        self,
        label: str,
        checkpoint: Checkpoint,
        load: Callable[[], Any],
        base: Callable[[], kld.Base] | None = None,
        measure: Measure | None = None,
    ):
        self.label = label
        self.checkpoint = checkpoint
        self._load = load
        self._base = base
        self._measure = measure

    @cached_property
    def model(self) -> Any:
        return self._load()

    @cached_property
    def base(self) -> kld.Base:
        assert self._base is not None
        return self._base()

    @cached_property
    def measured(self) -> tuple[kld.TokenScores, precision.Arithmetic]:
        base = self.base  # first: making it takes the original's model, which goes before another one comes
        if self._measure:
            return self._measure(base)
        return precision.measure(self.model, base, desc=self.label)

    @property
    def scores(self) -> kld.TokenScores:
        return self.measured[0]

    def release(self) -> None:
        """Give the model's memory back."""
        self.__dict__.pop("model", None)


class Task:
    """name: the key of its results; reads_text: whether it needs the original's log-probabilities; asks_original:
    whether it compares with what the original answers; about: what the results depend on beside the file.
    """

    name: ClassVar[str]
    reads_text: ClassVar[bool] = False
    asks_original: ClassVar[bool] = False
    about: list[Any]

    def ask_original(self, subject: Subject) -> Any:
        """What `measure` compares with."""
        raise NotImplementedError

    def measure(self, subject: Subject, original: Any) -> dict[str, Any]:
        """Results of a file."""
        raise NotImplementedError

    def describe(self, original: Any) -> dict[str, Any]:
        """What was asked, and the original's own result; original: None where no file needed it."""
        raise NotImplementedError


class Divergence(Task):
    """The statistics of llama-perplexity, on the whole text and by domain."""

    name, reads_text = "divergence", True

    def __init__(self, fingerprint: str, sha256: str, domains: dict[str, int]):
        """fingerprint: of the original; sha256: of the text; domains: as in `Text`."""
        self.domains = domains
        self.about = [self.name, fingerprint, sha256, domains, precision.SHARE]

    def measure(self, subject: Subject, original: Any = None) -> dict[str, Any]:
        scores, told = self._measured(subject)
        if not all(np.isfinite(column).all() for column in (scores.kld, scores.nll)):
            raise DynqError("its answers are not finite numbers somewhere in the text: the file is damaged")
        return {"statistics": kld.statistics(scores), "domains": self._by_domain(scores)} | told

    def _measured(self, subject: Subject) -> tuple[kld.TokenScores, dict[str, Any]]:
        scores, arithmetic = subject.measured
        return scores, asdict(arithmetic)

    def _by_domain(self, scores: kld.TokenScores) -> dict[str, dict[str, float]]:
        scored, at, found = len(scores.kld) // sum(self.domains.values()), 0, {}
        for name, chunks in self.domains.items():
            own = slice(at, at + chunks * scored)
            columns = {column: getattr(scores, column)[own] for column in scores.__dataclass_fields__}
            found[name] = kld.statistics(kld.TokenScores(**columns))
            at = own.stop
        return found


class InEngine(Divergence):
    """The same statistics with llama.cpp's own arithmetic, which quantizes activations too. Comes last."""

    name = "engine"

    def __init__(self, library: libllama.Library, fingerprint: str, sha256: str, domains: dict[str, int]):
        super().__init__(fingerprint, sha256, domains)
        self.library = library
        self.about.append(library.name)

    def _measured(self, subject: Subject) -> tuple[kld.TokenScores, dict[str, Any]]:
        base, path = subject.base, subject.checkpoint.path
        subject.release()
        with libllama.Llama(self.library, path, n_ctx=base.tokens.shape[1], threads=torch.get_num_threads()) as model:
            if model.n_vocab != base.n_vocab:
                raise DynqError(f"{path}: llama.cpp sees {model.n_vocab:,} tokens, the reference has {base.n_vocab:,}")
            chunks = progress(base.tokens, desc=f"{subject.label}: llama.cpp", unit="chunk")
            logits = (torch.from_numpy(model.logits(chunk, base.first)) for chunk in chunks)
            return kld.score(logits, base), {}

    def describe(self, original: Any = None) -> dict[str, Any]:
        return {"name": "llama.cpp", "library": self.library.name}


class Mmlu(Task):
    """Accuracy and flips, as `mmlu.score` gives them."""

    name, asks_original = "mmlu", True

    def __init__(self, source: str, limit: int | None, original: Checkpoint):
        """DynqError for a source that cannot be read."""
        self.source, self.limit, self.original = source, limit, original
        self.n_ctx = _context(original)
        self.subjects = mmlu.load(source, limit=limit)
        questions = hashlib.sha256(repr(self.subjects).encode()).hexdigest()
        self.about = [self.name, original.fingerprint, self.n_ctx, questions]

    @cached_property
    def prompts(self) -> mmlu.Prompts:
        return mmlu.prepare(self.subjects, load_tokenizer(self.original), self.n_ctx)

    def _answers(self, subject: Subject) -> mmlu.Answers:
        return mmlu.answer(subject.model, self.prompts, desc=f"{subject.label}: MMLU")

    def ask_original(self, subject: Subject) -> Any:
        return asdict(self._answers(subject))

    def measure(self, subject: Subject, original: Any) -> dict[str, Any]:
        size = sum(file.stat().st_size for file in subject.checkpoint.files)
        return mmlu.score(self._answers(subject), mmlu.Answers(**original), file_bytes=size)

    def describe(self, original: Any) -> dict[str, Any]:
        score = mmlu.score(mmlu.Answers(**original)) if original else None
        source = self.source if self.source == mmlu.HUB else Path(self.source).name
        return {"source": source, "limit": self.limit, "n_ctx": self.n_ctx, "original": score}


class Greedy(Task):
    """How many greedy answers stay the original's, as `greedy.compare` gives it, and a few that do not."""

    name, asks_original = "greedy", True

    def __init__(self, n: int, original: Checkpoint):
        self.n, self.original = n, original
        self.about = [self.name, original.fingerprint, n, ANSWER_TOKENS]

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.original)

    @cached_property
    def encoded(self) -> list[list[int]]:
        return greedy.encode_prompts(self.tokenizer, self.n, n_ctx=_context(self.original), n_tokens=ANSWER_TOKENS)

    def _answers(self, subject: Subject, stop: set[int]) -> list[list[int]]:
        desc = f"{subject.label}: greedy answers"
        return greedy.answer(subject.model, self.encoded, stop, n_tokens=ANSWER_TOKENS, desc=desc)

    def ask_original(self, subject: Subject) -> Any:
        stop = greedy.stop_tokens(subject.model, self.tokenizer)
        return {"stop": sorted(stop), "answers": self._answers(subject, stop)}

    def measure(self, subject: Subject, original: Any) -> dict[str, Any]:
        answers = self._answers(subject, set(original["stop"]))
        parted = greedy.compare(original["answers"], answers, n_tokens=ANSWER_TOKENS)
        shown = greedy.beside(self.tokenizer, self.encoded, original["answers"], answers)
        return parted.as_dict() | {"examples": shown[:ANSWERS_SHOWN]}

    def describe(self, original: Any) -> dict[str, Any]:
        return {"prompts": len(original["answers"]) if original else self.n, "n_tokens": ANSWER_TOKENS}


class Where(Task):
    """The tokens a file predicts worst, and what each layer would gain in full precision."""

    name, reads_text = "where", True

    def __init__(self, k: int, original: Checkpoint, text: Text):
        self.k, self.original, self.text = k, original, text
        self.about = [self.name, original.fingerprint, text.sha256, text.domains, k, COST_GROUPS, COST_CHUNKS]

    def measure(self, subject: Subject, original: Any = None) -> dict[str, Any]:
        reference, scores = subject.base, subject.scores
        assert isinstance(reference, kld.Reference)
        worst = where.worst_tokens(subject.model, reference, scores, load_tokenizer(self.original), k=self.k)
        step = -(-len(reference.tokens) // COST_CHUNKS)  # every domain has its share
        some = kld.Reference(reference.tokens[::step], reference.first, reference.depth[::step])
        costs = where.cost_of_tensors(
            subject.model, self.original, subject.checkpoint, some, by="layer", limit=COST_GROUPS
        )
        return {
            "tokens": [asdict(token) | {"domain": self.text.domain(token.chunk)} for token in worst],
            "layers": asdict(costs) | {"chunks": len(some.tokens)},
        }

    def describe(self, original: Any = None) -> dict[str, Any]:
        return {"tokens": self.k}


def _context(original: Checkpoint) -> int:
    return int(original.metadata[f"{original.architecture.name}.context_length"])
