"""Small random models and tokenizers, made on the spot, with the quirks that trained ones have."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from families import MODELS, PREPARE
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dynq import pretokenizers

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


_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_V3 = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
    " ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
PRE_TOKENIZERS: dict[str, list[str]] = {
    "gpt-2": ["gpt-2"],
    "smollm": ["digits", "gpt-2"],
    "llama-bpe": [_CL100K],
    "glm4": [_CL100K],
    "dbrx": [_CL100K],
    "qwen2": [_CL100K.replace("{1,3}", "")],
    "qwen35": [_QWEN35],
    "tekken": [_TEKKEN],
    "gpt-4o": [_O200K],
    "deepseek-llm": [
        "[\r\n]",
        pretokenizers.PRE["deepseek-llm"].steps[1][1],  # 217 characters, looked at in test_tokenizer.py
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        "[一-龥ࠀ-一가-퟿]+",
        "digits",
    ],
    "deepseek-coder": ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", "digits"],
    "deepseek-v3": [r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_V3],
}
"""llama.cpp's name -> the steps of a tokenizer.json that it is for: regexes, "digits", or ByteLevel's own regex."""


def pre_tokenizer(steps: list[str], behavior: str = "isolated") -> pre_tokenizers.PreTokenizer:
    """A pre-tokenizer of steps as in `PRE_TOKENIZERS`; with the behavior "removed" what no regex matches is lost."""
    parts: list[pre_tokenizers.PreTokenizer] = []
    for step in steps:
        if step == "digits":
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        elif step != "gpt-2":
            parts.append(pre_tokenizers.Split(Regex(step), behavior, invert=behavior == "removed"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="gpt-2" in steps)
    return pre_tokenizers.Sequence([*parts, byte_level]) if parts else byte_level


def byte_level(
    kind: str,
    texts: Iterable[str],
    directory: Path,
    *,
    vocab_size: int,
    alphabet: list[str] | None = None,
    added: Iterable[AddedToken] = (),
    nfc: bool = False,
    across: bool = False,
) -> Path:
    """Train a byte-level BPE with the pre-tokenizer called `kind` in llama.cpp, and save it as Hugging Face does.

    added: more added tokens. nfc: normalise. across: learn from unsplit text, so that tokens cross the borders of the
    pieces and every other way to split shows.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind in ("llama-bpe", "glm4", "tekken")))
    # Phi-4 and Granite 4 write their Split this way
    splits = pre_tokenizer(PRE_TOKENIZERS[kind], "removed" if kind == "dbrx" else "isolated")
    # no vocabulary of deepseek-llm has a token of two digits
    tokenizer.pre_tokenizer = pre_tokenizer(["digits"] if kind == "deepseek-llm" else []) if across else splits
    tokenizer.normalizer = normalizers.NFC() if nfc else normalizers.Sequence([])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=special,
        initial_alphabet=alphabet or pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = splits
    tokenizer.add_tokens([AddedToken("[user word]", normalized=False), *added])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": special[1]}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
