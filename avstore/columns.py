"""Lists of plans and records as text: found in the bytes and counted at opening, parsed when they are asked for.

A store of 240,000 videos has six million values in its records, of which a reader wants a million. Parsing all as
Python objects takes ten times as long as all else at opening, and ten times the memory. So a sealed file is cut into
the texts of its lists (canonical JSON makes that exact, see `members`), texts of one field are joined over all tasks,
and numbers go straight into numpy. Whatever does not look canonical is parsed by `json` instead: slower, same result.

Nothing here knows what the fields mean (`avstore.records`), and nothing is written to disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

NAME = re.compile(rb'(?:^|\],)"([^"\\]*)":\[')


def members(data: bytes, names: Sequence[str]) -> dict[str, bytes] | None:
    """The texts of the members of a sealed JSON object in canonical form (no spaces) that has these, in this order;
    None where it is not so. What it has besides ends up in the text before, which then is no JSON value.

    Exact, not a guess: inside a JSON string a quote has a backslash before it, so that `,"name":` with plain quotes
    can only be a key, of this object or of one inside. A column may be called like the member after it, `digest`; but
    that one alone is a string.
    """
    if not data.startswith(b"{") or not data.endswith(b"}\n"):
        return None
    out: dict[str, bytes] = {}
    at = 1
    for name, key, mark in _keys(tuple(names)):
        if not data.startswith(key, at):
            return None
        begin = at + len(key)
        end = data.find(mark, begin) if mark else len(data) - 2
        if end < 0 or (name == "digest" and end - begin != 66):
            return None
        out[name] = data[begin:end]
        at = end + 1
    return out


@cache
def _keys(names: tuple[str, ...]) -> list[tuple[str, bytes, bytes]]:
    """(name, its key, what comes before and as the next key) of each member; nothing after the last."""
    keys = [f'"{name}":' for name in names]
    marks = [f',{key}"' if key == '"digest":' else f",{key}" for key in keys[1:]] + [""]
    return [(n, k.encode(), m.encode()) for n, k, m in zip(names, keys, marks, strict=True)]


def list_members(text: bytes, count: int) -> dict[str, bytes] | None:
    """The texts of an object whose members are lists of `count` texts or nulls each, by name; None where it is not."""
    if text == b"{}":
        return {}
    if b"\\" in text or text[:2] != b'{"' or text[-2:] != b"]}":
        return _parsed(text, count)
    inside = text[1:-1]
    out: dict[str, bytes] = {}
    found = list(NAME.finditer(inside))
    for i, match in enumerate(found):
        end = found[i + 1].start() + 1 if i + 1 < len(found) else len(inside)
        part = inside[match.end() - 1 : end]
        # without a backslash quotes come in pairs: an odd number means that the end lies inside a string
        if part.count(b'"') % 2 or not has(part, count):
            return _parsed(text, count)
        out[match[1].decode()] = part
    return out


def _parsed(text: bytes, count: int) -> dict[str, bytes] | None:
    """`list_members` by way of the JSON parser."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if not isinstance(value, dict) or any(not isinstance(v, list) or len(v) != count for v in value.values()):
        return None
    return {k: json.dumps(v, ensure_ascii=False, separators=(",", ":")).encode() for k, v in value.items()}


def has(text: bytes, count: int) -> bool:
    """Whether the text of a list has `count` elements: numbers, booleans, strings, nulls, or lists of numbers.

    Counts separators; where strings make that uncertain, or the number differs, the JSON parser decides. A list that a
    forger made as short as its strings hold commas and nulls passes; parsing it (`Texts`) finds out.
    """
    if text[:1] != b"[" or text[-1:] != b"]":
        return False
    if count == 0 or text == b"[]":
        return count == 0 and text == b"[]"
    if b'"' in text:
        strings = text.count(b'"') // 2
        likely = b"\\" not in text and text.count(b",") + 1 == count == strings + text.count(b"null")
    elif text.count(b"[") > 1:
        likely = text.count(b"[") - 1 + text.count(b"null") == count
    else:
        likely = text.count(b",") + 1 == count
    if likely:
        return True
    try:
        return len(json.loads(text)) == count
    except ValueError:
        return False


def integers(parts: Sequence[bytes], count: int) -> np.ndarray:
    """int64 (count,) from the texts of lists of whole numbers, joined; ValueError where they hold anything else."""
    text = b",".join(p[1:-1] for p in parts if len(p) > 2)
    if text.translate(None, b"0123456789,-"):
        raise ValueError("something else than whole numbers in a list of numbers")
    if not text:
        out = np.zeros(0, np.int64)
    else:
        try:
            out = np.fromstring(text, np.int64, sep=",")  # text, which is not deprecated; five times json's speed
        except (ValueError, DeprecationWarning) as e:
            raise ValueError("a list of numbers cannot be read") from e
    if len(out) != count:
        raise ValueError(f"{len(out)} numbers instead of {count}")
    if out.size and (int(out.max()) >= 2**62 or int(out.min()) < 0):  # the parser stops at the largest int64
        raise ValueError("a number that is negative or beyond 2**62")
    return out


def boxes(parts: Sequence[bytes], count: int, default: tuple[int, int, int, int]) -> np.ndarray:
    """int64 (count, 4) from texts of lists of `[y, x, height, width]` or null, which means `default`."""
    whole = ",".join(map(str, default)).encode()
    flat = [b"[" + p.replace(b"null", whole).translate(None, b"[]") + b"]" for p in parts]
    return integers(flat, 4 * count).reshape(count, 4)


def flags(parts: Sequence[bytes], count: int, words: Mapping[str, bool]) -> np.ndarray:
    """bool (count,) from texts of lists of `words`; ValueError where they hold another."""
    out = []
    for text in parts:
        for word, flag in words.items():
            text = text.replace(f'"{word}"'.encode(), b"1" if flag else b"0")
        out.append(text)
    return integers(out, count).astype(bool)


def values(parts: Sequence[bytes], count: int, *, repeat: bool = True) -> list[Any]:
    """The values of lists, joined; ValueError where they are not `count` in all. `repeat`: equal strings become one
    object, which saves memory where few differ."""
    out = json.loads(b"[" + b",".join(p[1:-1] for p in parts if len(p) > 2) + b"]")
    if len(out) != count:
        raise ValueError(f"{len(out)} values instead of {count}")
    if repeat and any(b'"' in p for p in parts):
        known: dict[str, str] = {}
        out = [known.setdefault(v, v) if isinstance(v, str) else v for v in out]
    return out


class Texts(Mapping[str, list[Any]]):
    """Columns by name, parsed when they are first asked for: what `Catalogue.facts` is.

    `counts`: values in each part; `parts`: for each name the texts of one list per part. `wrong` makes the error of a
    part that does not hold what it should, and why.
    """

    def __init__(
        self, counts: Sequence[int], parts: dict[str, list[bytes]], wrong: Callable[[int, str], Exception]
    ) -> None:
        self.counts, self.parts, self.wrong = counts, parts, wrong
        self.first = np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))]).astype(np.int64)
        self.parsed: dict[str, list[Any]] = {}
        self._last: tuple[int, dict[str, list[Any]]] = (-1, {})

    @property
    def total(self) -> int:
        return int(self.first[-1])

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, name: str) -> list[Any]:
        if name not in self.parsed:
            self.parsed[name] = self._told(values, name)
        return self.parsed[name]

    def integers(self, name: str) -> np.ndarray:
        """int64 (total,): a column of whole numbers, not kept."""
        return self._told(integers, name)

    def flags(self, name: str, words: Mapping[str, bool]) -> np.ndarray:
        """bool (total,): a column of `words`, not kept."""
        return self._told(lambda parts, count: flags(parts, count, words), name)

    def boxes(self, name: str, default: tuple[int, int, int, int]) -> np.ndarray:
        return self._told(lambda parts, count: boxes(parts, count, default), name)

    def row(self, number: int) -> dict[str, Any]:
        """Every column at `number`. Only its part is parsed, and kept until another is asked for."""
        if len(self.parsed) == len(self.parts):
            return {name: column[number] for name, column in self.parsed.items()}
        part = int(np.searchsorted(self.first, number, "right")) - 1
        last, columns = self._last
        if last != part:
            try:
                columns = {name: values([texts[part]], self.counts[part]) for name, texts in self.parts.items()}
            except ValueError as e:
                raise self.wrong(part, str(e)) from e
            self._last = part, columns
        i = number - int(self.first[part])
        return {name: column[i] for name, column in columns.items()}

    def _told(self, parse: Callable[[Sequence[bytes], int], Any], name: str) -> Any:
        """What `parse` makes of a column; where it fails, the error of the first part with which it fails alone."""
        try:
            return parse(self.parts[name], self.total)
        except ValueError as e:
            for part, text in enumerate(self.parts[name]):
                try:
                    parse([text], self.counts[part])
                except ValueError as why:
                    raise self.wrong(part, f"{name}: {why}") from why
            raise e  # not reached: what is right part by part is right in all
