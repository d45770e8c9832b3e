"""The same questions, answered by a model with every tensor in one format: what fewer bits sound like."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dynq import export
from dynq.checkpoint import Checkpoint, open_checkpoint
from dynq.engine import generate
from dynq.errors import DynqError
from dynq.evaluate import compare, greedy
from dynq.imatrix import Importance
from dynq.progress import progress
from dynq.text import encode_prompt
from dynq.torch_model import load_model, load_tokenizer


@dataclass(frozen=True)
class Spoken:
    """One format's answers. tensor_bytes and bpw: of the whole model so stored; kept: for each answer the tokens that
    it has in common with the original's before they part, of how many the original's has.
    """

    format: str
    tensor_bytes: int
    bpw: float
    answers: list[str]
    kept: list[tuple[int, int]]


def talk(
    checkpoint: Checkpoint,
    names: Sequence[str],
    questions: Sequence[str],
    *,
    n_tokens: int = 40,
    importance: Importance | None = None,
    threads: int | None = None,
) -> list[Spoken]:
    """Greedy answers of the original, in its own format, and of the model in each of the formats `names`.

    Tensors whose rows do not divide take the format's fallback. importance: of the encoders; there it is plain rounding
    without. The model is held in memory twice.
    """
    tokenizer, original = load_tokenizer(checkpoint), load_model(checkpoint)
    asked, stop = _asked(tokenizer, original, questions, n_tokens)
    whole = greedy.answer(original, asked, stop, n_tokens=n_tokens, desc="")
    kinds = {info.dtype for info in checkpoint.tensors.values() if info.quantizable}
    own = {name: info.dtype for name, info in checkpoint.tensors.items()}
    found = [_spoken("/".join(sorted(kinds)), own, checkpoint, tokenizer, whole, whole)]
    for fmt in progress(names, desc="answers", unit="format"):
        chosen = compare.uniform(fmt, checkpoint.tensors)
        model = load_model(checkpoint, read=export.simulate(checkpoint, chosen, importance, threads=threads))
        answers = greedy.answer(model, asked, stop, n_tokens=n_tokens, desc="")
        found.append(_spoken(fmt, chosen, checkpoint, tokenizer, answers, whole))
    return found


def talk_of(
    checkpoint: Checkpoint, file: Path, questions: Sequence[str], *, n_tokens: int = 40, device: str = "cpu"
) -> list[Spoken]:
    """Greedy answers of the original and of a GGUF that was made from it, one model in memory at a time."""
    tokenizer, quantized = load_tokenizer(checkpoint), open_checkpoint(file, allow_requantize=True)
    answers: list[list[list[int]]] = []
    for one in progress([checkpoint, quantized], desc="answers", unit="model"):
        model = load_model(one, device=device)
        asked, stop = _asked(tokenizer, model, questions, n_tokens)
        answers.append(greedy.answer(model, asked, stop, n_tokens=n_tokens, desc=""))
    whole, own = answers
    types = [{name: info.dtype for name, info in model.tensors.items()} for model in (checkpoint, quantized)]
    return [
        _spoken("original", types[0], checkpoint, tokenizer, whole, whole),
        _spoken(file.name, types[1], checkpoint, tokenizer, own, whole),
    ]


def ask(checkpoint: Checkpoint, file: Path, prompt: str, n_tokens: int) -> dict[str, str] | None:
    """What llama.cpp itself answers from a file: "prompt" and "text". None where it is not installed, and, with its
    reason printed, where it does not open a file of an architecture that dynq does not know either."""
    if find_spec("xllamacpp") is None:
        return None
    if not checkpoint.architecture.known:  # llama.cpp tokenizes
        try:
            return {"prompt": prompt, "text": generate(file, prompt, n_tokens).text}
        except DynqError as error:
            print(error)
            return None
    tokenizer = load_tokenizer(checkpoint)
    turn = [{"role": "user", "content": prompt}]
    asked = encode_prompt(tokenizer, turn) if tokenizer.chat_template else tokenizer(prompt).input_ids
    return {"prompt": prompt, "text": generate(file, asked, n_tokens).text}


def _asked(tokenizer: Any, model: Any, questions: Sequence[str], n_tokens: int) -> tuple[list[list[int]], set[int]]:
    """Token ids of each question in the chat template, and the tokens that end an answer."""
    conversations = [[{"role": "user", "content": question}] for question in questions]
    n_ctx = model.config.get_text_config().max_position_embeddings
    asked = greedy.encode_prompts(tokenizer, n_ctx=n_ctx, n_tokens=n_tokens, conversations=conversations)
    return asked, greedy.stop_tokens(model, tokenizer)


def _spoken(
    name: str,
    chosen: dict[str, str],
    checkpoint: Checkpoint,
    tokenizer: Any,
    answers: list[list[int]],
    whole: list[list[int]],
) -> Spoken:
    size = compare.stored_bytes(chosen, checkpoint.tensors)
    places = [greedy.first_difference(a, b) for a, b in zip(whole, answers, strict=True)]
    kept = [(len(a) if at is None else at, len(a)) for a, at in zip(whole, places, strict=True)]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in answers]
    return Spoken(name, size, 8 * size / checkpoint.n_weights, texts, kept)


def beside(found: Sequence[Spoken], questions: Sequence[str]) -> list[dict[str, str]]:
    """A line for each question, a column for each format; line breaks in answers are shown as ⏎."""
    names = {f"{one.format}, {one.bpw:.2f} bits": one for one in found}
    return [
        {"question": question} | {name: " ⏎ ".join(one.answers[i].split("\n")) for name, one in names.items()}
        for i, question in enumerate(questions)
    ]


def sizes(found: Sequence[Spoken]) -> list[dict[str, Any]]:
    """A line for each format: its size, and how long the answers stay the original's."""
    return [
        {
            "format": one.format,
            "bits per weight": one.bpw,
            "MB (10^6 bytes)": one.tensor_bytes / 1e6,
            "same answers": f"{sum(a == b for a, b in one.kept)} of {len(one.kept)}",
            "tokens before they part": f"{sum(a for a, _ in one.kept)} of {sum(b for _, b in one.kept)}",
        }
        for one in found
    ]
