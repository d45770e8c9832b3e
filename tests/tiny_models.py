"""Small random models and tokenizers, made on the spot, with the quirks that trained ones have."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from families import MODELS, PREPARE
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 384  # rows of the embedding; the tokenizer has fewer tokens, so the last rows are padding
_WIDTH, _HEADS, _KV_HEADS = 128, 4, 2
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": _WIDTH,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KV_HEADS,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def make(name: str, directory: Path, *, seed: int = 0, shard: str = "5GB", **other: object) -> Path:
    """Save a random model of `MODELS` with a tokenizer. Returns the directory.

    Matrices are rounded to F16. Attention is sharp and the final norm is raised until the mean entropy of the next
    token is below 0.42 log V, so that a mistake anywhere moves the log-probabilities by much. other: settings in place
    of the model's own.
    """
    model_type, settings = MODELS[name]
    config = transformers.CONFIG_MAPPING[model_type](**{**COMMON, **settings, **other})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype="float32").eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim == 1:
                parameter.normal_(0, 0.3)
            else:
                gain = 1.5 if "q_proj" in parameter_name or "k_proj" in parameter_name else 1.0
                parameter.normal_(0, gain / math.sqrt(parameter.shape[-1]))
                parameter.copy_(parameter.half())
        PREPARE.get(name, lambda model: None)(model)
        tokens = torch.randint(2, VOCAB, (4, 64))
        while mean_entropy(model(tokens).logits) > 0.42 * math.log(VOCAB):
            model.model.norm.weight *= 1.1
    model.save_pretrained(directory, max_shard_size=shard)
    # ASCII only: llama.cpp reports no probabilities for a token that ends inside a character
    text = [f"the quick brown fox {i * i} jumps over the lazy dog {chr(97 + i % 26) * 3}" for i in range(200)]
    byte_level("gpt-2", text, directory, vocab_size=VOCAB - 60, alphabet=[chr(i) for i in range(33, 127)])
    return directory


def mean_entropy(logits: torch.Tensor) -> float:
    """Mean entropy in nats of the next token, over logits [..., V]."""
    logp = torch.log_softmax(logits.double(), -1)
    return float(-(logp.exp() * logp).sum(-1).mean())


QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_REGEX = QWEN2_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def byte_level(
    kind: str, texts: Iterable[str], directory: Path, *, vocab_size: int, alphabet: list[str] | None = None
) -> Path:
    """Train a byte-level BPE with the pre-tokenizer called `kind` in llama.cpp, and save it as Hugging Face does."""
    byte_level_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    regex_built_in = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)

    def split(pattern: str) -> pre_tokenizers.PreTokenizer:
        from tokenizers import Regex

        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level_only])

    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    tokenizer.pre_tokenizer = {
        "gpt-2": lambda: regex_built_in,
        "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), regex_built_in]),
        "qwen2": lambda: split(QWEN2_REGEX),
        "llama-bpe": lambda: split(LLAMA3_REGEX),
    }[kind]()
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=special,
        initial_alphabet=alphabet or pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken("[user word]", normalized=False)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": special[1]}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
