"""Why KLD comes first: two encodings of the embedded model that perplexity cannot tell apart.

Perplexity is the mean of signed changes, ln q - ln p of the token that follows: what is lost at one position is gained
back at another. KLD compares whole distributions, is never negative, and does not cancel. Q5_K and Q4_K were chosen
because their perplexities agree on this text, within a fraction of their errors; LOG.md has the same on a longer one.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from dynq import export
from dynq.checkpoint import open_checkpoint
from dynq.evaluate import compare, greedy, kld
from dynq.progress import progress
from dynq.text import encode, prompts
from dynq.torch_model import load_model, load_tokenizer

FORMATS = ("Q5_K", "Q4_K")
CHUNKS, N_CTX = 8, 256  # of the prompts kept for evaluation
PROMPTS, ANSWER_TOKENS = 16, 16  # greedy answers: prompts and the most tokens of each


@dataclass(frozen=True)
class Encoded:
    """Every tensor in one format, against the original.

    statistics: as `kld.statistics` names them. change: float64 ``[n]``, ln q - ln p of each token that follows in the
    text: above 0 a gain, below 0 a loss. answers: greedy ones beside the original's.
    """

    format: str
    statistics: dict[str, float]
    change: np.ndarray
    answers: greedy.Divergence


def equal_perplexity(*, threads: int | None = None) -> list[Encoded]:
    """The pair, measured now. threads: of the encoders; torch has its own."""
    checkpoint = open_checkpoint("dynq-tiny")
    tokenizer, original = load_tokenizer(checkpoint), load_model(checkpoint)
    text = "\n\n".join(turn["content"] for conversation in prompts("evaluate") for turn in conversation)
    tokens = np.array(encode(tokenizer, text)[: CHUNKS * N_CTX], np.int32).reshape(CHUNKS, N_CTX)
    n_ctx = original.config.max_position_embeddings
    asked = greedy.encode_prompts(tokenizer, PROMPTS, n_ctx=n_ctx, n_tokens=ANSWER_TOKENS)
    stop = greedy.stop_tokens(original, tokenizer)

    pair = []
    with (
        TemporaryDirectory(ignore_cleanup_errors=True) as folder,  # Windows keeps an open memory map
        progress(total=1 + len(FORMATS), desc="two of equal perplexity", unit="model") as bar,
    ):
        reference = kld.make_reference(original, tokens, Path(folder) / "reference", desc="")
        wanted = greedy.answer(original, asked, stop, n_tokens=ANSWER_TOKENS, desc="")
        bar.update()
        for fmt in FORMATS:
            chosen = compare.uniform(fmt, checkpoint.tensors)
            model = load_model(checkpoint, read=export.simulate(checkpoint, chosen, None, threads=threads))
            scores = kld.measure(model, reference, desc="")
            answers = greedy.answer(model, asked, stop, n_tokens=ANSWER_TOKENS, desc="")
            parted = greedy.compare(wanted, answers, n_tokens=ANSWER_TOKENS)
            pair.append(Encoded(fmt, kld.statistics(scores), scores.nll_base - scores.nll, parted))
            bar.update()
    return pair
