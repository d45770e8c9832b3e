"""The model card of a run: what is known of the source, names that the hub finds, the recipe."""

import html
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from dynq import card
from dynq.checkpoint import TensorInfo
from dynq.recipe import Recipe


def source(path="/models/mine", url="", **metadata):
    metadata = {f"general.{key}": value for key, value in metadata.items()}
    return SimpleNamespace(path=Path(path), url=url, metadata=metadata)


def test_front_matter_has_what_is_known():
    assert card.front_matter(source(name="mine")) == {}
    snapshot = "/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/c1899de"
    found = card.front_matter(source(snapshot, license="apache-2.0", languages=["en", "no"]))
    assert found == {"base_model": "Qwen/Qwen3-0.6B", "license": "apache-2.0", "language": ["en", "no"]}


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("https://huggingface.co/Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B/", "Qwen/Qwen3-0.6B"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B/tree/main", None),
        ("https://example.org/Qwen/Qwen3-0.6B", None),
    ],
)
def test_base_model_as_a_gguf_tells(url, base):
    assert card.front_matter(source("mine.gguf", **{"source.repo_url": url})).get("base_model") == base


def evaluation(*targets):
    """Targets (text, bytes) between two mixes of 100 and 200 bytes."""
    sizes = {"Q3_K_S": 100, "Q4_K_M": 200} | {f"dynq {text}": size for text, size in targets}
    return {
        "files": [{"label": label, "tensor_bytes": size} for label, size in sizes.items()],
        "targets": [
            {"target": text, "label": f"dynq {text}", "file": f"{card.file_safe(text)}.gguf"}
            | {"below": "Q3_K_S", "above": "Q4_K_M", "like": text.removeprefix("like:") if ":" in text else None}
            for text, _ in targets
        ],
    }


def test_names_end_in_a_quantization():
    named = card.hub_names("My model", evaluation(("3.5bpw", 120), ("like:Q2_K", 90), ("8GB", 190)))
    assert [(row["file"], row["name"], row["tag"]) for row in named] == [
        ("3.5bpw.gguf", "Mymodel-3.5bpw-Q3_K_S.gguf", "Q3_K_S"),
        ("like-Q2_K.gguf", "Mymodel-Q2_K.gguf", "Q2_K"),
        ("8GB.gguf", "Mymodel-8GB-Q4_K_M.gguf", "Q4_K_M"),
    ]


def test_a_copy_of_a_hubs_model_tells_where_it_is_from():
    for url in ("hf://Qwen/Qwen3-0.6B", "hf://Qwen/Qwen3-0.6B@refs%2Fpr%2F1/"):
        assert card.front_matter(source(url=url)) == {"base_model": "Qwen/Qwen3-0.6B"}
    for url in ("s3://Qwen/Qwen3-0.6B", "hf://datasets/Qwen/Qwen3-0.6B"):
        assert card.front_matter(source(url=url)) == {}


def test_a_tag_that_two_files_share_is_none():
    named = card.hub_names("m", evaluation(("3.5bpw", 120), ("3.6bpw", 130), ("like:Q4_K_M", 200)))
    assert [row["tag"] for row in named] == ["", "", "Q4_K_M"]
    assert len({row["name"] for row in named}) == 3


def test_text_of_a_model_is_never_markup():
    evil = "a_b*c* `x` [y](z) <img src=x onerror=alert(1)> | \n# h &lt; ü 0.6B"
    shown = card.plain(evil)
    assert not set("*`[]<>|\n#&") & set(re.sub(r"&#\d+;", "", shown))
    assert html.unescape(shown) == " ".join(evil.split())
    assert card.plain("Qwen3-0.6B (4 chats), seed 0: a.txt") == "Qwen3-0.6B (4 chats), seed 0: a.txt"
    assert card.front_matter(source("/cache/models--a--b\nlicense: x/snapshots/1")) == {}


def test_recipe_as_a_table():
    shapes = {"blk.0.attn_q.weight": (256, 256), "blk.1.attn_q.weight": (256, 256), "blk.0.attn_norm.weight": (256,)}
    tensors = {name: TensorInfo(name, shape, "BF16") for name, shape in shapes.items()}
    formats = dict(zip(shapes, ("Q4_K", "Q2_K", "F32"), strict=True))
    checkpoint = SimpleNamespace(path=Path("m"), tensors=tensors)
    table = card.recipe_table(Recipe(formats, "4bpw", 1, 3.5, 0.1), checkpoint)
    assert table == {
        "bpw": 3.5,
        "rows": [{"kind": "attn_q", "tensors": 2, "bpw": (4.5 + 2.625) / 2, "formats": "Q4_K (0), Q2_K (1)"}],
        "rest": "F32",
    }
