"""Names of points in a picture: none over another, none over a point."""

import numpy as np
import pytest

from dynq.label_places import MARK, SIDES, _box, _meet, places


def test_a_name_that_is_alone_stands_where_it_would_best_be() -> None:
    points = [(100.0, 100.0), (400.0, 100.0)]
    assert places(points, ["Q4_K", "Q5_K"], ["top left", "bottom right"]) == ["top left", "bottom right"]


def test_a_neighbour_takes_another_side_and_where_none_is_left_no_name_stands() -> None:
    close = [(100.0, 100.0), (110.0, 100.0)]
    assert places(close, ["IQ3_XXS", "Q2_K"], ["bottom left"] * 2) == ["bottom left", "top right"]
    heap = [(100.0 + i, 100.0) for i in range(6)]
    found = places(heap, ["IQ3_XXS"] * 6, ["top right"] * 6)
    assert found == ["bottom left", "", "", "", "", "top right"]


@pytest.mark.parametrize("seed", range(5))
def test_nothing_lies_over_anything(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = [(float(x), float(y)) for x, y in rng.uniform(0, 300, (30, 2))]
    names = ["x" * int(n) for n in rng.integers(1, 12, 30)]
    sides = places(points, names, [SIDES[i % 4] for i in range(30)])
    boxes = [_box(x, y, 7.0 * len(name), side) for (x, y), name, side in zip(points, names, sides, strict=True) if side]
    assert 5 < len(boxes) < 30
    marks = [(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in points]
    assert not any(_meet(a, b) for i, a in enumerate(boxes) for b in [*boxes[:i], *marks])
