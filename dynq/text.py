"""The text a model is calibrated and evaluated on: plain files, chats, or sampled from the model itself.

Chunks are what llama.cpp's tools make of a text: consecutive, none overlapping, each starting with the BOS token
where the tokenizer adds one (see `compute_imatrix` in its tools/imatrix/imatrix.cpp).
"""

import filecmp
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynq import chat_template
from dynq.errors import DynqError
from dynq.progress import progress
from dynq.threads import each, one_thread_each

Messages = list[dict[str, str]]

_FAMILIES = {
    "code": ("code-python", "code-other", "sql", "devops", "data"),
    "knowledge": ("maths", "physics", "science", "finance", "history", "health", "philosophy", "language"),
}
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}  # names used by ShareGPT


@dataclass(frozen=True)
class Text:
    """tokens: int32 [n_chunks, n_ctx]; description: source, counts, seed; sha256: of shape and tokens.

    domains: of each chunk, the file it is from (see `labels`), or the family of prompts it is sampled with.
    """

    tokens: NDArray[np.int32]
    description: str
    sha256: str
    domains: tuple[str, ...]


def prompts(split: str, *, foreign: bool = False) -> list[Messages]:
    """The hand-written conversations of the package, each ending with a user's turn.

    split: "calibrate", or "evaluate": fewer, on other subjects. foreign: those that are not in English alone. Raises
    DynqError for another name.
    """
    return [entry["messages"] for entry in _entries(split) if not foreign or entry["lang"] != "en"]


def _entries(split: str) -> list[dict[str, Any]]:
    """The same with their "domain" (subject) and "lang"."""
    if split not in ("calibrate", "evaluate"):
        raise DynqError(f"no prompts for split {split!r}; there are 'calibrate' and 'evaluate'")
    lines = (files("dynq") / "data" / "prompts.jsonl").read_text("utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if entry["split"] == split]


def _family(entry: dict[str, Any]) -> str:
    """What a prompt is alike to others in: four kinds of text, of which each fills chunks of its own."""
    if entry["lang"] != "en":
        return "other languages"
    return next((family for family, subjects in _FAMILIES.items() if entry["domain"] in subjects), "chats")


def check_held_out(calibration: str, evaluation: str) -> None:
    """DynqError where a file of the evaluation text has the contents of one that was calibrated on.

    calibration, evaluation: as `load_text` takes them. What is sampled is held out by its prompts.
    """
    pairs = ((a, b) for a in text_files(evaluation) for b in text_files(calibration) if a.is_file() and b.is_file())
    for path, seen in pairs:
        if filecmp.cmp(path, seen, shallow=False):
            raise DynqError(
                f"{path}: it is calibrated on as well ({seen.name}), so it proves nothing; take another text"
            )


def text_files(spec: str) -> list[Path]:
    """The files that a `spec` of `load_text` names; none where the text is sampled."""
    if spec in ("", "sampled"):
        return []
    return [Path(spec)] if Path(spec).exists() else [Path(part.strip()) for part in spec.split(",") if part.strip()]


def labels(paths: Sequence[Path]) -> list[str]:
    """The names of files, with their folders where two have the same."""
    seen = Counter(path.name for path in paths)
    return [path.name if seen[path.name] == 1 else str(path) for path in paths]


def load_text(
    spec: str,
    tokenizer: Any,
    *,
    n_ctx: int,
    n_chunks: int,
    seed: int,
    model: Any = None,
    split: str = "calibrate",
) -> Text:
    """Tokens from the source that `spec` names, as `n_chunks` chunks of `n_ctx` tokens.

    spec: "" or "sampled": answers that `model` gives to `prompts(split)`, see `sample_chats`; every chunk starts with
            the start of a conversation, the last one in it is cut. A chunk holds conversations of one family (code,
            knowledge, chats, other languages). Of the calibration split every second chunk holds documents, which
            the model begins by itself: with them feedback errs less on every kind of text (LOG, "Calibration text").
        Otherwise a path or several, separated by commas. Chunks are taken from the start of each file, and from
            several files in turn, one chunk each, until they are enough. Markers of special tokens in a file count as
            those tokens (``llama-imatrix --parse-special``). Files are
            - ``.jsonl``: one conversation a line, {"messages": [{"role", "content"}]}, {"conversations": ...} (also
              with ShareGPT's "from" and "value") or {"text": ...}, rendered by the model's chat template, without
              one as the bare contents with empty lines between, and joined to one stream;
            - anything else: plain UTF-8 text, less one newline at its very end, as llama.cpp's ``-f`` reads it.
    tokenizer, model: of transformers; `model` only for sampled text.
    seed: of the sampling and of the order of the prompts; files are taken as they are.

    A source that is too short gives fewer chunks and the description says so. Raises DynqError if it does not fill a
    single one, or if a file is missing, not UTF-8, or has a line that is no conversation (named with its number).
    """
    if n_ctx < 2 or n_chunks < 1:
        raise DynqError(f"{n_chunks} chunks of {n_ctx} tokens asked for; at least 1 of 2 is needed")
    if spec in ("", "sampled"):
        if model is None:
            raise DynqError("text sampled from the model needs the model; pass it, or name a file")
        from dynq.torch_model import check_in_memory  # imports torch

        check_in_memory(model, "text sampled from the model (give files with --text)")
        chunks, domains, source = _sampled_chunks(model, tokenizer, split, n_ctx, n_chunks, seed)
        source = f"{source} ({split} split), seed {seed}"
    else:
        paths = text_files(spec)
        chunks, domains = _file_chunks(paths, tokenizer, n_ctx, n_chunks)
        source = ", ".join(path.name for path in paths)
    tokens = np.array(chunks, dtype=np.int32)
    asked = "" if len(tokens) == n_chunks else f" ({n_chunks} were asked for, the text has no more)"
    digest = hashlib.sha256(repr(tokens.shape).encode() + tokens.astype("<i4").tobytes()).hexdigest()
    return Text(tokens, f"{source}: {len(tokens)} chunks of {n_ctx} tokens{asked}", digest, tuple(domains))


def further_chunks(spec: str, tokenizer: Any, *, n_ctx: int, skip: int, most: int) -> list[list[int]]:
    """The chunks that follow in the files of a `spec` of `load_text` behind its first `skip`, at most so many.

    None where the text is sampled.
    """
    paths = text_files(spec)
    return _file_chunks(paths, tokenizer, n_ctx, skip + most)[0][skip:] if paths else []


def spread(domains: Sequence[str], count: int) -> np.ndarray:
    """int64 [count]: chunks at equal distances, sorted, so that each domain keeps its share; all where they are fewer.

    domains: of each chunk.
    """
    ordered = np.argsort(np.array(domains), kind="stable")
    n = len(ordered)
    return np.sort(ordered[np.arange(count) * n // count]) if count < n else np.arange(n)


def sample_chats(
    model: Any, tokenizer: Any, encoded: list[list[int]], *, max_tokens: int, generator: Any, bar: Any = None
) -> list[list[int]]:
    """Let `model` continue prompts at temperature 1 without top-k or top-p, so that the answers follow its own
    distribution: what the Fisher information of a text assumes.

    encoded: token ids of each prompt, its template included. Returns prompt and answer in one list of ids for each,
    in the same order. A prompt and an answer take at most half of `max_tokens` each (a prompt keeps its beginning).
    An answer ends with the model's end-of-turn token, which is kept, and what the chat template writes after it.
    generator: torch.Generator on the CPU; equal seeds give equal answers, whatever the number of threads. bar: counts
    tokens.
    """
    import torch

    from dynq import kv_cache

    stop, tail = end_of_turn(model, tokenizer)
    encoded = [prompt[: max_tokens // 2] for prompt in encoded]
    # neighbours of equal length share a batch: less padding
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    # an even number, of one size: two threads end together; a card takes all at once
    parts = 1
    if model.device.type == "cpu":
        parts = 2 * -(-len(order) // (2 * kv_cache.rows(_values(model), max_tokens)))
    batches = [part.tolist() for part in np.array_split(order, parts) if len(part)]
    seeds = torch.randint(1 << 62, (len(batches),), generator=generator).tolist()
    chats: list[list[int]] = [[] for _ in encoded]

    def sample(i: int) -> None:
        own = torch.Generator().manual_seed(seeds[i])
        answers = answer_batch(model, [encoded[at] for at in batches[i]], max_tokens // 2, stop, own, bar)
        for at, answer in zip(batches[i], answers, strict=True):
            chats[at] = encoded[at] + answer + (tail if answer[-1] in stop else [])

    with one_thread_each(None if model.device.type == "cpu" else 1) as workers:
        each(workers, sample, range(len(batches)))
    return chats


def _values(model: Any) -> int:
    """Keys and values of a token, numbers."""
    from dynq import kv_cache  # imports torch

    config = model.config.get_text_config()
    return int(config.num_hidden_layers * kv_cache.width(config.to_dict()))


def _sampled_chunks(
    model: Any, tokenizer: Any, split: str, n_ctx: int, n_chunks: int, seed: int
) -> tuple[list[list[int]], list[str], str]:
    """Chunks packed from sampled chats and documents, the domain of each, and what was sampled."""
    import torch

    from dynq import kv_cache
    from dynq.devices import free
    from dynq.torch_model import rounded

    writer = rounded(model)
    vocab, card = model.config.get_text_config().vocab_size, free(model.device) if model.device.type == "cuda" else 0
    at_once = kv_cache.at_once(_values(model), n_ctx, vocab, card)
    generator = torch.Generator().manual_seed(seed)
    entries = _entries(split)
    prompts = [encode_prompt(tokenizer, entry["messages"])[: n_ctx // 2] for entry in entries]
    start = _document_start(model, tokenizer)
    n_documents = 0 if split == "evaluate" or start is None else n_chunks // 2
    bar = progress(total=n_chunks * n_ctx, desc="sample text", unit="tok")

    def packed(
        encoded: list[list[int]], families: list[str], n_chunks: int, answer: float, cut: float
    ) -> tuple[list[tuple[str, list[int]]], int]:
        """(family, chunk) of as many chunks, and how many samples that took.

        answer: tokens of one, about; cut: for each token of a chunk, those of samples that its end cuts off.
        """
        chunks: list[tuple[str, list[int]]] = []
        filling: dict[str, list[int]] = {family: [] for family in families}
        used, answered = 0, 0
        order: list[int] = []
        while len(chunks) < n_chunks:
            # at the end some families' chunks are not full
            missing = (1 + cut) * ((n_chunks - len(chunks)) * n_ctx - sum(map(len, filling.values())) / 2)
            missing = max(missing, n_ctx / 2)
            answer = answered / used if used else answer
            members: list[int] = []
            while missing > 0 and len(members) < at_once:
                if not order:  # every prompt once before any comes again
                    order = torch.randperm(len(encoded), generator=generator).tolist()
                members.append(order.pop())
                missing -= len(encoded[members[-1]]) + answer
            batch = [encoded[at] for at in members]
            samples = sample_chats(writer, tokenizer, batch, max_tokens=n_ctx, generator=generator, bar=bar)
            for at, sample in zip(members, samples, strict=True):
                used, answered = used + 1, answered + len(sample) - len(encoded[at])
                family = families[at]
                filling[family] += sample
                if len(filling[family]) >= n_ctx:
                    chunks.append((family, filling[family][:n_ctx]))
                    filling[family] = []
        return chunks[:n_chunks], used

    try:
        chats, asked = packed(prompts, [_family(entry) for entry in entries], n_chunks - n_documents, n_ctx / 4, 0.25)
        documents, begun = packed([[start or 0]], ["documents"], n_documents, n_ctx / 2, 0.1)
        bar.update(bar.total - bar.n)
    finally:
        bar.close()
    turns = [pair for turn in zip(chats, documents, strict=False) for pair in turn]
    chunks = [*turns, *chats[len(documents) :]]
    source = f"sampled from the model with {asked} prompts" + (f" and {begun} documents" if begun else "")
    return [chunk for _, chunk in chunks], [family for family, _ in chunks], source


def _document_start(model: Any, tokenizer: Any) -> int | None:
    """The token that a text begins with, None where the model has none: or where it begins every turn of a chat."""
    found: int | None = tokenizer.bos_token_id
    if found is None:  # a config's own default is any token
        found = model.config.get_text_config().bos_token_id
        found = found if found in tokenizer.all_special_ids else None
    if found is not None and tokenizer.chat_template:
        turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
        if encode(tokenizer, _templated(tokenizer, turns, "prompt"), special=False).count(found) > 1:
            return None
    return found


def answer_batch(
    model: Any, encoded: list[list[int]], max_answer: int, stop: set[int], generator: Any, bar: Any
) -> list[list[int]]:
    """One answer of 1 to `max_answer` tokens per prompt: sampled at temperature 1, or greedy without a generator.

    Prompts are padded on the left; rows that ended leave the batch when half of them have. An answer ends with a token
    of `stop`, which is kept.
    """
    import inspect

    import torch

    from dynq import kv_cache

    accepted = inspect.signature(model.forward).parameters
    width = max(map(len, encoded))
    ids = torch.zeros((len(encoded), width), dtype=torch.long)  # the padding is masked, any token will do
    mask = torch.zeros((len(encoded), width), dtype=torch.long)
    for row, prompt in enumerate(encoded):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    device = model.device
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    rows = list(range(len(encoded)))  # which prompt each row of the batch belongs to
    answers: list[list[int]] = [[] for _ in encoded]
    open_rows = set(rows)
    cache, first = None, True
    last = torch.tensor([-1], device=device)
    with torch.inference_mode():
        while True:
            inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
            if "position_ids" in accepted:
                inputs["position_ids"] = positions
            if "logits_to_keep" in accepted:
                # an index, for the slice that a number gives is no matrix in memory, and copies the head for each row
                inputs["logits_to_keep"] = last
            output = model(**inputs, use_cache=True)
            cache = kv_cache.with_room(output.past_key_values) if first else output.past_key_values
            logits = output.logits[:, -1].float()
            if generator is None:
                ids = logits.argmax(-1, keepdim=True)
            else:
                # inverse of the distribution function: five times as fast as torch.multinomial
                sums = logits.softmax(-1).cumsum(-1)
                drawn = torch.rand(len(rows), 1, generator=generator).to(sums.device) * sums[:, -1:]
                ids = torch.searchsorted(sums, drawn, right=True).clamp(max=sums.shape[1] - 1)
            if bar is not None:
                bar.update(max(0, min(bar.total - bar.n, len(open_rows) + (sum(map(len, encoded)) if first else 0))))
            first = False
            for row, token in zip(rows, ids[:, 0].tolist(), strict=True):
                if row in open_rows:
                    answers[row].append(token)
                    if token in stop or len(answers[row]) == max_answer:
                        open_rows.remove(row)
            if not open_rows:
                return answers
            if 2 * len(open_rows) <= len(rows) and kv_cache.rows_can_leave(cache):
                # on the processor: of a model on several cards each layer's keys lie on another
                keep = torch.tensor([at for at, row in enumerate(rows) if row in open_rows])
                rows = [rows[at] for at in keep.tolist()]
                ids, mask, positions = ids[keep], mask[keep], positions[keep]
                cache.batch_select_indices(keep)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            positions = positions[:, -1:] + 1


def _file_chunks(paths: list[Path], tokenizer: Any, n_ctx: int, n_chunks: int) -> tuple[list[list[int]], list[str]]:
    """Chunks of the files in turn, and the file of each; a file that ends drops out."""
    bos = _bos(tokenizer)
    sources, lengths = [], []
    for path in paths:
        ids = _file_tokens(path, tokenizer, n_ctx * n_chunks)
        lengths.append(len(ids))
        sources.append([ids[at : at + n_ctx] for at in range(0, len(ids) - n_ctx + 1, n_ctx)])
    chunks: list[list[int]] = []
    domains: list[str] = []
    for turn in range(max(map(len, sources), default=0)):
        chunks += [list(source[turn]) for source in sources if turn < len(source)]
        domains += [name for name, source in zip(labels(paths), sources, strict=True) if turn < len(source)]
    if not chunks:
        names = ", ".join(map(str, paths))
        raise DynqError(
            f"{names}: {max(lengths, default=0)} tokens, fewer than one chunk of {n_ctx}; "
            "take a longer text or a smaller n_ctx"
        )
    if bos is not None:
        for chunk in chunks:
            chunk[0] = bos
    return chunks[:n_chunks], domains[:n_chunks]


def _file_tokens(path: Path, tokenizer: Any, need: int) -> list[int]:
    """The first `need` tokens of a file, or fewer if it has no more."""
    try:
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            ids: list[int] = []
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        ids += _line_tokens(tokenizer, line, f"{path}:{number}")
                    if len(ids) >= need:
                        break
            return ids[:need]
        text = path.read_text("utf-8")
    except OSError as error:
        raise DynqError(f"{path}: the text cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DynqError(f"{path}: not UTF-8 at byte {error.start}; convert it first") from error
    text = text.removesuffix("\n")
    # Only as much of a long text as is needed; tokens near the cut may differ from those of the whole, so 64 are spare.
    length = 16 * need
    while True:
        ids = encode(tokenizer, text[:length])
        if length >= len(text) or len(ids) >= need + 64:
            return ids[:need]
        length *= 4


def _line_tokens(tokenizer: Any, line: str, where: str) -> list[int]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise DynqError(f"{where}: no valid JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nested too deep
        raise DynqError(f"{where}: no valid JSON: {error}") from error
    if isinstance(entry, dict) and isinstance(entry.get("text"), str):
        return encode(tokenizer, entry["text"])
    turns = entry.get("messages", entry.get("conversations")) if isinstance(entry, dict) else None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise DynqError(f'{where}: no conversation; a line is {{"messages": [{{"role": ..., "content": ...}}]}}')
    messages = []
    for turn in turns:
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise DynqError(f"{where}: a turn without role or content as text")
        messages.append({"role": _ROLES.get(role, role), "content": content})
    if not tokenizer.chat_template:
        return encode(tokenizer, _plain(messages))
    return encode(tokenizer, _templated(tokenizer, messages, where), special=False)


def encode_prompt(tokenizer: Any, messages: Messages) -> list[int]:
    """Token ids of a conversation up to where the model's answer begins."""
    if not tokenizer.chat_template:
        return encode(tokenizer, _plain(messages))
    return encode(tokenizer, _templated(tokenizer, messages, "prompt", answer=True), special=False)


def _plain(messages: Messages) -> str:
    return "".join(message["content"] + "\n\n" for message in messages)


def _templated(tokenizer: Any, messages: Messages, where: str, answer: bool = False) -> str:
    """The chat template's text; a system message goes into the first user's where the template knows no such role."""
    merged = messages
    if len(messages) > 1 and messages[0]["role"] == "system":
        first = {"role": messages[1]["role"], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
        merged = [first, *messages[2:]]
    template = tokenizer.get_chat_template()
    for attempt in (messages, merged):
        try:
            return chat_template.render(template, attempt, answer=answer, values=tokenizer.special_tokens_map)
        except chat_template.TemplateError as error:
            failure = error
    raise DynqError(f"{where}: the model's chat template refuses it: {failure}") from failure


def encode(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """Token ids; with `special` a BOS in front where the tokenizer adds one, never an EOS at the end."""
    try:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except (TypeError, UnicodeEncodeError) as error:  # JSON can hold halves of characters
        raise DynqError(f"a text that is not Unicode ({error}); mend the file it is from") from error
    bos = _bos(tokenizer) if special else None
    return ids if bos is None else [bos, *ids]


def _bos(tokenizer: Any) -> int | None:
    """The BOS token if the tokenizer puts it before a text."""
    ids = tokenizer("a")["input_ids"]
    return ids[0] if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else None


def end_of_turn(model: Any, tokenizer: Any) -> tuple[set[int], list[int]]:
    """(tokens that end an answer, tokens the chat template writes after that one)."""
    stop: set[int] = set()
    for source in (tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id):
        stop.update([source] if isinstance(source, int) else source or [])
    tail: list[int] = []
    if tokenizer.chat_template:
        # the template itself shows it: the special token that follows an answer (fine-tunes forget to declare it)
        answer = "dynq-answer"
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        after = encode(tokenizer, _templated(tokenizer, messages, "prompt").rpartition(answer)[2], special=False)
        special = set(tokenizer.all_special_ids)
        at = next((at for at, token in enumerate(after) if token in special), None)
        if at is not None:
            stop.add(after[at])
            tail = after[at + 1 :]
    return stop, tail
