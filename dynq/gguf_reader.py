"""gguf's reader, made fast on vocabularies and safe from strangers' files.

`gguf.GGUFReader` makes several NumPy arrays for every element of an array: 13 s and 0.5 GB for the header of a file
with 150,000 tokens and as many merges. Here an array of numbers is one view, and strings are decoded as they are found.
It believes what a file says of itself, so `dynq.gguf_header` looks at that first.
"""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from dynq import gguf_header
from dynq.files import no_collection, taking_apart

_length = struct.Struct("<Q").unpack_from


class _Texts(list[str]):
    """The strings of an array; nbytes: what they and their lengths take in the file."""

    nbytes = 0


class _TextsField(gguf.gguf_reader.ReaderField):
    """A field whose last part are `_Texts`."""

    def contents(self, index_or_slice: int | slice = slice(None)) -> Any:
        return self.parts[-1][index_or_slice]


class Reader(gguf.GGUFReader):
    """As gguf.GGUFReader: `fields` (key -> field with `contents()`) and `tensors` (views of the mapped file).

    DynqError for a file that is damaged anywhere but in the tensors' data.
    """

    def __init__(self, path: str | Path) -> None:
        gguf_header.check(Path(path))
        with taking_apart(path), no_collection():
            super().__init__(path)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != gguf.GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        item, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        kind, n, at = gguf.GGUFValueType(int(item[0])), int(count[0]), orig_offs + 12
        if n == 0:
            return super()._get_field_parts(orig_offs, raw_type)
        parts: list[Any] = [item, count]
        if kind == gguf.GGUFValueType.STRING:
            view, texts, start = self.data.data, _Texts(), at
            for _ in range(n):
                at += 8
                end = at + _length(view, at - 8)[0]
                if end > len(view):
                    raise ValueError("a string runs past the end of the file")
                texts.append(str(view[at:end], "utf-8"))
                at = end
            texts.nbytes = at - start
            parts.append(texts)
        else:
            parts.append(self._get(at, self.gguf_scalar_to_np[kind], n))
            if len(parts[-1]) != n:
                raise ValueError("an array runs past the end of the file")
            at += parts[-1].nbytes
        return at - orig_offs, parts, [2], [gguf.GGUFValueType.ARRAY, kind]

    def _push_field(self, field: gguf.gguf_reader.ReaderField, skip_sum: bool = False) -> int:
        if isinstance(field.parts[-1], _Texts):
            field = _TextsField(*field)
        return super()._push_field(field, skip_sum)

    def packed(self) -> dict[str, bytes]:
        """Each key of the metadata with its name, type and value as the file has them; none of a big-endian file."""
        if self.byte_order != "I":
            return {}
        found = {}
        for field in self.fields.values():
            if not field.name.startswith("GGUF."):
                size = sum(part.nbytes for part in field.parts)
                found[field.name] = self.data[field.offset : field.offset + size].tobytes()
        return found
