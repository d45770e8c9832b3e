"""Where the names of points go in a picture, so that none lies over another name or over a point."""

from collections.abc import Sequence

SIDES = ("top right", "bottom left", "bottom right", "top left")
"""plotly's words for where a name stands, in the order in which they are tried."""
WIDE, HIGH, MARK = 7.0, 15.0, 8.0  # pixels: of a letter, of a line, from the middle of a mark to its edge

Box = tuple[float, float, float, float]


def places(points: Sequence[tuple[float, float]], names: Sequence[str], first: Sequence[str]) -> list[str]:
    """The side of each point where its name stands, "" where there is no room for it.

    points: in pixels, y upwards. first: the side that each would best have. Earlier names have the choice.
    """
    taken: list[Box] = [(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in points]
    found = []
    for (x, y), name, side in zip(points, names, first, strict=True):
        for tried in dict.fromkeys((side, *SIDES)):
            box = _box(x, y, WIDE * len(name), tried)
            if not any(_meet(box, other) for other in taken):
                taken.append(box)
                found.append(tried)
                break
        else:
            found.append("")
    return found


def _box(x: float, y: float, width: float, side: str) -> Box:
    """What a name covers: left, bottom, right, top. It begins beside the mark's own box, above or below."""
    left = x + MARK if side.endswith("right") else x - MARK - width
    low = y if side.startswith("top") else y - HIGH
    return left, low, left + width, low + HIGH


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
