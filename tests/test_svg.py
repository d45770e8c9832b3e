"""The picture without JavaScript shows what the figure holds."""

import xml.etree.ElementTree as ET

from test_figures import figures

from dynq import svg

SVG = "{http://www.w3.org/2000/svg}"


def entry(label, kind, size, divergence, **more):
    statistics = {"Mean KLD": divergence, "Mean KLD ±": 0.01, "99.9% KLD": 2.0, "Mean PPL(Q)": 9, "Mean PPL(base)": 8}
    statistics |= {"Same top p": 0.75}
    return {"label": label, "kind": kind, "tensor_bytes": size, "bpw": 3.0, "statistics": statistics} | more


def drawn(*entries):
    return ET.fromstring(
        svg.render(figures.frontier({"files": list(entries), "model": {"name": "a <model> & more"}}).figure)
    )


def test_points_lines_and_words():
    files = [
        entry("Q2_K", "mix", 3e9, 0.5),
        entry("Q4_K_M", "mix", 5e9, 0.05),
        entry("good.gguf", "file", 4e9, 0.1),
        entry("bad.gguf", "file", 4.5e9, 0.2, dominated_by="good.gguf"),
    ]
    root = drawn(*files)
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert {"Q2_K", "Q4_K_M", "good", "bad", "files (hollow: dominated)", "llama.cpp's mixes", "0.1", "4"} <= set(words)
    assert words[0].startswith("a <model> & more: ") and "tensor data, GB (10^9 bytes)" in words
    diamonds = [shape.get("fill") for shape in root.iter(f"{SVG}polygon")]
    assert sorted(diamonds) == ["#0072B2", "#0072B2", "white"]  # one hollow, one in the legend
    (line,) = root.iter(f"{SVG}polyline")
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in line.get("points").split())
    assert x0 < x1 and y0 < y1  # larger and better: to the right and down


def test_every_kind_has_its_own_mark():
    """Corners 4 level with each other (square), 3 (triangle), 4 around (diamond): the colours alone do not tell."""
    kinds = ("mix", "other mix", "uniform", "dynamic")
    root = drawn(*(entry(f"e{at}", kind, 4e9 + at, 0.1) for at, kind in enumerate(kinds)))
    legend = [shape for shape in root.iter() if shape.tag in (f"{SVG}circle", f"{SVG}polygon")][1::2]
    colours = [shape.get("fill") for shape in legend]
    corners = [len(shape.get("points", "").split()) for shape in legend]
    assert len(set(colours)) == 4 and corners == [0, 4, 3, 4]
    tops = [{point.split(",")[1] for point in shape.get("points").split()} for shape in legend[1::2]]
    assert [len(levels) for levels in tops] == [2, 3]


def test_what_has_no_logarithm_is_left_out():
    root = drawn(entry("a.gguf", "file", 5, 0.1), entry("same.gguf", "file", 6, -1e-9))
    assert "same" not in [text.text for text in root.iter(f"{SVG}text")]
    assert len(list(drawn(entry("same.gguf", "file", 6, 0.0)).iter(f"{SVG}polygon"))) == 1  # the legend's
