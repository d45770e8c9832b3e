"""What a step of tuning (`dynq.tune`) reads, how far it goes, and how much hints weigh beside the KLD.

Figures: LOG.md, "Tuning". What counts is how far codes go in all. A longer text fills larger steps, `STEPS` at most,
not more of them: codes that move on and on, without having seen each other's move, lose again what they have gained.
"""

import numpy as np

BATCH = 4  # chunks a step, at least
BETAS = (0.9, 0.99)  # of the mean of gradients and of their squares, each step (Adam)
STEPS = 160  # of a tuning, at most
PASSES = 4  # over a text that is shorter than these, at most
LAST = 0.05  # of a full step: the last one; their lengths fall like a cosine
WARMUP = 5  # steps of growing length: Adam's first ones are as long for small gradients as for large
TOGETHER = 1 << 26  # bytes of logits: chunks of a step are read side by side up to here
HINTS = 100.0  # in the loss beside the KLD: of the layers' mean relative squared error
SCARCE = 160 * 512  # tokens, up to which that holds; more of them say more by their KLD


def passes_over(chunks: int, asked: int) -> int:
    """How often a text of so many chunks is read: as asked, -1 as often as `STEPS` of `BATCH` take, -2 twice that."""
    if asked >= 0:
        return asked
    return min(PASSES, -asked * max(1, round(STEPS * BATCH / max(chunks, 1))))


def chunks_a_step(chunks: int, passes: int) -> int:
    """`BATCH`, or more, so that so many passes over a text of so many chunks take `STEPS` steps at most."""
    return max(BATCH, -(-chunks * passes // STEPS))


def side_by_side(n_ctx: int, n_vocab: int) -> int:
    """How many chunks are read in one pass: as many as `TOGETHER` takes the logits of, one at least."""
    return max(1, TOGETHER // (4 * n_ctx * n_vocab))


def length(step: int, steps: int) -> float:
    """Of a step, the first is 1, in full ones."""
    return float(max(0.5 + 0.5 * np.cos(np.pi * (step - 1) / steps), LAST)) * min(1.0, step / WARMUP)


def hints_weight(tokens: int) -> float:
    """Of hints in the loss: `HINTS`, or less where the text is longer than `SCARCE`, by the root of that."""
    return HINTS * min(1.0, (SCARCE / tokens) ** 0.5)
