"""Names and texts that would be markup if a page took them as they are."""

from collections.abc import Collection
from html.parser import HTMLParser
from typing import Any

EVIL = "</script><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """The tags, the attributes for events and the links of a page, and its text outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.text, self._inside = "", ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [key for key, _ in attrs if key.startswith("on")]
        self._inside = tag if tag in ("script", "style") else self._inside

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag == self._inside else self._inside

    def handle_data(self, data: str) -> None:
        self.text += "" if self._inside else data


def evil(value: Any, keep: Collection[str]) -> Any:
    """With EVIL behind every text, but for those under the keys in `keep`."""
    if isinstance(value, dict):
        return {key: item if key in keep else evil(item, keep) for key, item in value.items()}
    if isinstance(value, list):
        return [evil(item, keep) for item in value]
    return value + EVIL if isinstance(value, str) else value
