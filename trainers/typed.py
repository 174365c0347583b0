"""Values of settings: what TOML, JSON or `--set key=value` say, as the type of their field; and back to text.

Types: whole numbers, numbers, true or false, text, Literal, tuples of these, and any of them or None.
"""

from __future__ import annotations

import json
import types
import typing
from typing import Any, Literal

from avstore.errors import UsageError


def typed(key: str, value: Any, hint: Any) -> Any:
    """`value` (from TOML, JSON or text) as the type of the field. UsageError naming key, value and type."""
    try:
        return _convert(value, hint)
    except (TypeError, ValueError) as e:
        raise UsageError(f"{key} = {value!r}", f"expected {_words(hint)}", f"e.g. --set {key}=...") from e


def _convert(value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        for option in arguments:
            if value == option or (isinstance(value, str) and value == str(option)):
                return option
        raise ValueError(value)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            if type(None) in arguments:
                return None
            raise ValueError(value)
        for option in arguments:
            if option is not type(None):
                try:
                    return _convert(value, option)
                except (TypeError, ValueError):
                    continue
        raise ValueError(value)
    if origin is tuple:
        parts = [p for p in value.strip("()[] ").split(",") if p.strip()] if isinstance(value, str) else list(value)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(p, arguments[0]) for p in parts)
        if len(parts) != len(arguments):
            raise ValueError(value)
        return tuple(_convert(p, a) for p, a in zip(parts, arguments, strict=True))
    if hint is bool:
        if isinstance(value, bool):
            return value
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        raise ValueError(value)
    if hint is int:
        if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
            raise ValueError(value)
        return int(value)
    if hint is float:
        if isinstance(value, bool):
            raise ValueError(value)
        number = float(value)
        if number != number or number in (float("inf"), float("-inf")):
            raise ValueError(value)
        return number
    if hint is str:
        if not isinstance(value, str):
            raise ValueError(value)
        return value
    raise TypeError(f"fields of type {hint} cannot be set")


def _words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(a) for a in arguments)
    if origin is tuple:
        each = "values" if not arguments else _words(arguments[0])
        return f"{each} separated by commas" + ("" if Ellipsis in arguments else f" ({len(arguments)} of them)")
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "none"}.get(
        hint, str(hint)
    )


def as_text(value: Any) -> str:
    """A value as `--set` takes it."""
    return (
        ",".join(as_text(v) for v in value)
        if isinstance(value, tuple | list)
        else (json.dumps(value) if isinstance(value, bool) or value is None else str(value))
    )
