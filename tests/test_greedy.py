"""Greedy answers: forced ones, first differences by hand, and a model that agrees with itself."""

from types import SimpleNamespace

import pytest
import torch

from dynq.checkpoint import open_checkpoint
from dynq.errors import DynqError
from dynq.evaluate import greedy
from dynq.text import prompts
from dynq.torch_model import load_model, load_tokenizer


@pytest.fixture(scope="module")
def tiny():
    checkpoint = open_checkpoint("dynq-tiny")
    return load_model(checkpoint), load_tokenizer(checkpoint)


def test_first_difference():
    assert greedy.first_difference([1, 2, 3], [1, 2, 3]) is None
    assert greedy.first_difference([1, 2, 3], [4, 2, 3]) == 0
    assert greedy.first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert greedy.first_difference([1, 2], [1, 2, 3]) == 2  # one goes on where the other ended


def test_divergence_by_hand():
    original = [[1, 2, 3], [1, 2, 3], [5], [7, 8, 9]]
    file = [[1, 2, 3], [1, 9, 3], [5, 6], [0, 8, 9]]
    found = greedy.compare(original, file, n_tokens=4)
    assert (found.n, found.identical, found.share) == (4, 1, 0.25)
    assert found.low < 0.25 < found.high
    assert (found.mean, found.median) == (pytest.approx(2 / 3), 1.0)  # they part at 1, 1 and 0
    assert found.histogram == [1, 2, 0, 0]
    same = greedy.compare(original, original, n_tokens=4)
    assert (same.share, same.mean, same.median, same.histogram) == (1.0, None, None, [0] * 4)


class Counting(torch.nn.Module):
    """Says the last token plus one."""

    device = torch.device("cpu")

    def __init__(self, tokenizer):
        super().__init__()
        self.size = len(tokenizer)

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=True, logits_to_keep=0):
        following = (input_ids[:, -1:] + 1) % self.size
        return SimpleNamespace(logits=torch.nn.functional.one_hot(following, self.size), past_key_values=None)


def test_answers_are_the_most_likely_tokens(tiny):
    _, tokenizer = tiny
    end = len(tokenizer) - 2
    answers = greedy.answer(Counting(tokenizer), [[9, 9, 100], [20], [end]], {2}, n_tokens=5, desc="")
    assert answers[:2] == [[101, 102, 103, 104, 105], [21, 22, 23, 24, 25]]
    assert answers[2] == [end + 1, 0, 1, 2]  # token 2 ends an answer


def test_batches_change_nothing_and_a_model_agrees_with_itself(tiny):
    model, tokenizer = tiny
    encoded = greedy.encode_prompts(tokenizer, 4, n_ctx=1024, n_tokens=6)
    stop = greedy.stop_tokens(model, tokenizer)
    answers = greedy.answer(model, encoded, stop, n_tokens=6, batch=3, desc="")
    alone = []
    for prompt in encoded:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=list(stop))
        alone.append(ids[0, len(prompt) :].tolist())
    assert answers == alone
    assert greedy.compare(answers, greedy.answer(model, encoded, stop, n_tokens=6, batch=3, desc="")).share == 1


def test_prompts_are_the_held_out_ones(tiny):
    _, tokenizer = tiny
    encoded = greedy.encode_prompts(tokenizer, n_ctx=1024)
    assert len(encoded) == len(prompts("evaluate"))
    text = tokenizer.decode(encoded[0])
    assert prompts("evaluate")[0][-1]["content"] in text and text.endswith("<|im_start|>assistant\n")
    short = greedy.encode_prompts(tokenizer, 1, n_ctx=48)[0]
    assert short == encoded[0][-16:]
    with pytest.raises(DynqError, match="0 prompts"):
        greedy.encode_prompts(tokenizer, 0, n_ctx=48)
    with pytest.raises(DynqError, match="the model's context is 32"):
        greedy.encode_prompts(tokenizer, n_ctx=32)


def test_answers_beside_each_other(tiny):
    _, tokenizer = tiny
    words = [tokenizer.encode(text) for text in ("one two three", "one two four", "five")]
    rows = greedy.beside(tokenizer, [[50]] * 3, [words[0], words[0], words[2]], [words[0], words[1], words[0]])
    assert [row["first_difference"] for row in rows] == [0, len(words[1]) - 1, None]
    assert (rows[1]["common"], rows[1]["original"], rows[1]["file"]) == ("one two", "one two three", "one two four")
    assert rows[2]["common"] == "one two three"
