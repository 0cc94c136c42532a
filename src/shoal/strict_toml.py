"""TOML into frozen dataclasses, where every mistake is one sentence with its line.

Parsing is the standard library's, checking is pydantic's; what is here finds the line of a mistake and words it.
Types are strict (a string is not a number, true is not 1), except that a whole number may stand for a float.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import tomllib
import types
import typing
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from shoal.errors import UsageError, nearest

T = TypeVar("T")
_TOML_NAMES: dict[type, str] = {bool: "boolean", str: "string", int: "integer", float: "number", list: "array"}
STRICT = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""Set as `__pydantic_config__` of each config dataclass: unknown keys and loose types are refused."""

_UNKNOWN_KEY = ("unexpected_keyword_argument", "extra_forbidden")


def parse(text: str, *, origin: str, error: type[UsageError]) -> dict[str, Any]:
    """Parse TOML text. `origin` (a file's name) and the line stand in the message of the `error` raised."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as mistake:
        raise error(f"{origin}: not valid TOML: {mistake}") from None


def read(path: Path, *, error: type[UsageError]) -> str:
    """Return the text of `path`, or raise `error` naming why it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as mistake:
        reason = mistake.strerror if isinstance(mistake, OSError) else "it is not UTF-8 text"
        raise error(f"cannot read {path}: {reason}") from None


def build(cls: type[T], values: dict[str, Any], *, text: str, origin: str, error: type[UsageError]) -> T:
    """Make a `cls` (a frozen dataclass, nested ones included) from parsed TOML.

    Args:
        values: the parsed document.
        text: the document itself, searched for the line of a mistake; may be empty (flags have no line).
        origin: how to call the document in a message.
        error: the class to raise, once, for the first mistake.
    """
    try:
        # By way of JSON: there, strict checking takes an array for a tuple and a table for a dataclass.
        document = json.dumps(values, default=str)
        return typing.cast(T, _adapter(typing.cast(Hashable, cls)).validate_json(document))
    except pydantic.ValidationError as mistakes:
        mistake = _most_telling(mistakes.errors())
        path = _keys(cls, mistake["loc"])
        at = [*path, "kind"] if mistake["type"] == "union_tag_invalid" else path
        line = line_of(text, at)
        where = f"{origin}:{line}" if line else origin
        raise error(f"{where}: {_sentence(cls, path, mistake)}") from None


def _most_telling(mistakes: list[Any]) -> Any:
    """An unknown key before all else: a required key that is misspelt is also missing, which says less."""
    unknown = (mistake for mistake in mistakes if mistake["type"] in _UNKNOWN_KEY)
    return next(unknown, mistakes[0])


def line_of(text: str, path: list[str]) -> int:
    """Return the line (from 1) where the key at `path` stands in TOML `text`, its table's line if not, else 0."""
    if path and path[-1].isdigit():
        path = path[:-1]  # an item of an array stands on its key's line
    table, index = list(path[:-1]), ""
    if table and table[-1].isdigit():
        index = table.pop()
    key = path[-1] if path else ""
    current: list[str] = []
    best, seen = 0, -1
    for number, line in enumerate(text.splitlines(), start=1):
        header = re.match(r"\s*(\[\[?)\s*([^\]]+?)\s*\]", line)
        if header:
            current = [part.strip().strip("\"'") for part in header[2].split(".")]
            if current in (table, path):
                seen += 1
                if not index or seen == int(index):
                    best = number
            continue
        entry = re.match(r"\s*[\"']?([\w.-]+)[\"']?\s*=", line)
        inside = current == table and (not index or seen == int(index))
        if entry and ((inside and entry[1] == key) or current + entry[1].split(".") == path):
            return number
    return best


@functools.cache
def _adapter(cls: Hashable) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(typing.cast(Any, cls))


def _keys(cls: type, loc: tuple[int | str, ...]) -> list[str]:
    """Pydantic's location without the tags it adds for unions: only keys that a user wrote."""
    keys: list[str] = []
    fields: tuple[Any, ...] = (cls,)
    for part in loc:
        names = {f.name for c in fields for f in dataclasses.fields(c)} if fields else set()
        if isinstance(part, str) and keys and part not in names and _tag_of(fields, part):
            fields = tuple(c for c in fields if _tag(c) == part)
            continue
        keys.append(str(part))
        if isinstance(part, str):
            fields = _dataclasses_at(fields, part)
    return keys


def _dataclasses_at(classes: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    found: list[Any] = []
    for cls in classes:
        if name in {f.name for f in dataclasses.fields(cls)}:
            found.extend(_inner_dataclasses(typing.get_type_hints(cls)[name]))
    return tuple(found)


def _inner_dataclasses(hint: Any) -> list[Any]:
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [inner for argument in typing.get_args(hint) for inner in _inner_dataclasses(argument)]


def _tag(cls: Any) -> str | None:
    for field in dataclasses.fields(cls):
        if field.name == "kind" and isinstance(field.default, str):
            return field.default
    return None


def _tag_of(classes: tuple[Any, ...], part: str) -> bool:
    return any(_tag(cls) == part for cls in classes)


def _sentence(cls: type, path: list[str], mistake: Any) -> str:
    name = ".".join(path) or "the document"
    got = mistake["input"]
    match mistake["type"]:
        case kind if kind in _UNKNOWN_KEY:
            fields = _names_at(cls, path[:-1])
            table = ".".join(path[:-1])
            holder = f"[{table}]" if table else "the top level"
            return (
                f"unknown key '{path[-1]}'{nearest(path[-1], fields)}; "
                f"{holder} takes {', '.join(sorted(fields)) or 'no key'}"
            )
        case "missing" | "missing_argument":
            return f"{name} is missing, and has no default"
        case "union_tag_not_found":
            return f"[{name}] has no kind"
        case "union_tag_invalid":
            valid = [t for c in _classes_at(cls, path) if (t := _tag(c))]
            kind = str(mistake["ctx"]["tag"])
            return f"{name}.kind: got '{kind}', expected one of {', '.join(valid)}{nearest(kind, valid)}"
        case "literal_error":
            expected = mistake["ctx"]["expected"]
            names = re.findall(r"'([^']+)'", expected)
            return f"{name}: got {got!r}, expected {expected}{nearest(str(got), names)}"
        case "dataclass_type" | "model_attributes_type" | "dict_type":
            return f"{name}: got {_show(got)}, expected a table [{name}]"
        case "value_error":
            return f"{name}: {mistake['ctx']['error']}"
        case _:
            expected = mistake["msg"].removeprefix("Input should be ").removeprefix("a valid ")
            return f"{name}: got {_show(got)}, expected {expected}"


def _show(value: Any) -> str:
    return f"the {_TOML_NAMES.get(type(value), type(value).__name__)} {value!r}"


def _classes_at(cls: type, path: list[str]) -> tuple[Any, ...]:
    classes: tuple[Any, ...] = (cls,)
    for part in path:
        if not part.isdigit():
            classes = _dataclasses_at(classes, part)
    return classes


def _names_at(cls: type, path: list[str]) -> set[str]:
    return {f.name for c in _classes_at(cls, path) for f in dataclasses.fields(c)}


def dump(values: Any) -> str:
    """Write a config dataclass as TOML: plain values first, then one table for each nested dataclass.

    None (TOML has no null) is left out, which reads back as the default: so a default of None is required there.
    """
    plain, tables = [], []
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if value is None:
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            tables.append(f"\n[{field.name}]\n{dump(value)}")
        else:
            plain.append(f"{field.name} = {_literal(value)}\n")
    return "".join(plain + tables)


def _literal(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return json.dumps(value, ensure_ascii=False)  # a TOML basic string has JSON's escapes
        case list() | tuple():
            return f"[{', '.join(_literal(item) for item in value)}]"
        case types.MappingProxyType() | dict():
            return "{" + ", ".join(f"{key} = {_literal(item)}" for key, item in value.items()) + "}"
        case _:
            raise AssertionError(f"{type(value).__name__} has no TOML form")
