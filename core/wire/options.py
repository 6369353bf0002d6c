"""The one codec for options: `key=value,...` text, JSON bodies and the dataclass that declares the keys.

A dataclass is described once (`describe`) as a schema of plain data that travels in messages; `parse_kv` and
`validate` check against the schema alone, so that nobody has to import a device to know its options.
Text follows Cloud Hypervisor: K/M/G/T sizes, on|off, [lists], "quotes", q@[cpus] pairs, 1-3 ranges.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any, TypeVar

from cellvisor.core.errors import UsageError

Schema = dict[str, Any]
T = TypeVar("T")

_SUFFIXES = {"K": 10, "M": 20, "G": 30, "T": 40}
_WORDS = {"on": True, "true": True, "off": False, "false": False}
_MAX_RANGE = 4096
_MAX_INT = 2**63 - 1
_SCALARS = {str: "string", int: "integer", bool: "boolean", float: "number"}


def option(default: Any = dataclasses.MISSING, *, help: str = "", **rules: Any) -> Any:
    """Declare one key of an Options dataclass; without `default` the key is required.

    Rules: `size` (integer of bytes with suffix), `path`, `choices`, `min`, `max`, `length` (bytes of a
    string), `power_of_two`, `bare` (a word without "=" means this key), `separator` ("@": objects are
    written `a@b`, in the order of their fields).
    """
    unknown = set(rules) - {"size", "path", "choices", "min", "max", "length", "power_of_two", "bare",
                            "separator"}
    if unknown:
        raise TypeError(f"option: unknown rule {', '.join(sorted(unknown))}")
    metadata = {"help": help, **rules}
    if isinstance(default, list):
        items = list(default)
        return dataclasses.field(default_factory=lambda: list(items), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOptions:
    """The keys that every device has; the controlplane acts on them, the device ignores them."""

    id: str | None = option(None, help="name of the device, made up when missing", length=32)
    pci_segment: int = option(0, help="PCI segment", min=0, max=0)
    pci_device_id: int | None = option(None, help="slot on the bus, lowest free one when missing",
                                       min=1, max=31)
    restart_budget: int = option(5, help="restarts within restart_window, then the device is parked; 0: none", min=0)
    restart_window: float = option(10.0, help="seconds", min=0)
    restart_backoff: list[float] = option(  # noqa: RUF009  it makes a factory of a list
        [0.0, 0.01, 0.05, 0.25, 1.0], help="seconds before the 1st, 2nd, ... restart in a row", min=0)
    hang_timeout: float = option(5.0, help="seconds without a sign of life until it is restarted; 0: for ever", min=0)
    io_timeout: float = option(30.0, help="the same for one call to its back end", min=0)
    iommu: bool = option(False, help="behind a virtual IOMMU (not available)", choices=(False,))


def describe(cls: type[Any]) -> Schema:
    """Return the schema of an Options dataclass: {"keys": {name: {type, required, default, help, ...}}}."""
    hints = _hints(cls)
    keys: dict[str, Schema] = {}
    for field in dataclasses.fields(cls):
        rule = _describe_type(hints[field.name], bool(field.metadata.get("size")), field.name)
        rule["help"] = ""
        rule.update({k: list(v) if k == "choices" else v for k, v in field.metadata.items() if k != "size"})
        default: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        rule["required"] = default is dataclasses.MISSING
        if not rule["required"]:
            rule["default"] = _plain(default)
        keys[field.name] = rule
    return {"keys": keys}


def _hints(cls: Any) -> dict[str, Any]:
    return _evaluated(cls)


@functools.cache
def _evaluated(cls: Any) -> dict[str, Any]:
    # This takes 2 ms; a worker forked from a process that did it before has the result.
    return typing.get_type_hints(cls)


def _describe_type(hint: Any, size: bool, name: str) -> Schema:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        if len(members) == 1:
            return _describe_type(members[0], size, name)
    if typing.get_origin(hint) in (list, tuple):
        return {"type": "list", "item": _describe_type(typing.get_args(hint)[0], size, name)}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return {"type": "object", **describe(hint)}
    if hint is int and size:
        return {"type": "size"}
    if hint in _SCALARS:
        return {"type": _SCALARS[hint]}
    raise TypeError(f"option {name}: type {hint!r} has no text form")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def parse_kv(text: str, schema: Schema, flag: str = "") -> dict[str, Any]:
    """Read `key=value,key=value` into a dict of the keys that were given, checked as validate() does.

    `flag` ("--disk") begins every error. Raises UsageError, one line naming key and value.
    """
    keys = schema["keys"]
    bare = next((name for name, rule in keys.items() if rule.get("bare")), None)
    raw: dict[str, Any] = {}
    for part in _split(text, ",", flag):
        name, equals, value = part.partition("=")
        if not equals and bare is not None:
            name, value = bare, part
        elif not equals and keys.get(name, {}).get("type") == "boolean":
            value = "on"
        elif not equals:
            _refuse_unknown(name, keys, flag)
            raise _wrong(flag, name, None, "has no value", f"write {name}=...")
        _refuse_unknown(name, keys, flag)
        if name in raw:
            raise _wrong(flag, name, value, "is given twice")
        raw[name] = _from_text(value, keys[name], name, flag)
    return validate(raw, schema, flag)


def validate(values: object, schema: Schema, flag: str = "") -> dict[str, Any]:
    """Check a dict (from JSON or text) against `schema`; returns the given keys with normal types.

    A null means "not given". Raises UsageError: unknown key (with the known ones), wrong type, out of range.
    """
    keys = schema["keys"]
    if not isinstance(values, dict):
        raise UsageError(f"{flag or 'options'}: {type(values).__name__} instead of an object")
    result: dict[str, Any] = {}
    for name, value in values.items():
        _refuse_unknown(name, keys, flag)
        if value is not None:
            result[name] = _check(value, keys[name], name, flag)
    for name, rule in keys.items():
        if rule["required"] and name not in result:
            raise UsageError(f"{flag + ': ' if flag else ''}{name} is missing", hint=f"give {name}=...")
    return result


def defaults(schema: Schema) -> dict[str, Any]:
    """Return the default of every key that is not required."""
    return {name: rule["default"] for name, rule in schema["keys"].items() if not rule["required"]}


def build(cls: type[T], values: object, flag: str = "") -> T:
    """Make an Options object from a dict: validated, defaults filled in, nested objects built."""
    return _build(cls, validate(values, describe(cls), flag))


def _build(cls: type[T], values: dict[str, Any]) -> T:
    hints = _hints(cls)
    return cls(**{name: _build_value(hints[name], value) for name, value in values.items()})


def _build_value(hint: Any, value: Any) -> Any:
    for member in typing.get_args(hint) or (hint,):
        if dataclasses.is_dataclass(member) and isinstance(member, type):
            if isinstance(value, list):
                return [_build(member, item) for item in value]
            return _build(member, value)
        if typing.get_origin(member) in (list, tuple):
            return _build_value(member, value)
    return value


# --- errors -----------------------------------------------------------------------------------------------


def _wrong(flag: str, name: str, value: object, why: str, hint: str = "") -> UsageError:
    shown = "" if value is None else f"={_show(value)}"
    return UsageError(f"{flag + ': ' if flag else ''}{name}{shown} {why}", hint=hint)


def _show(value: object) -> str:
    text = ("on" if value else "off") if isinstance(value, bool) else str(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 80 else text[:77] + "..."


def _refuse_unknown(name: object, keys: dict[str, Schema], flag: str) -> None:
    if name not in keys:
        import difflib

        close = difflib.get_close_matches(str(name)[:80], keys, 1)
        advice = f"did you mean {close[0]}? " if close else ""
        raise UsageError(f"{flag + ': ' if flag else ''}unknown key {_show(name)!r}",
                         hint=f"{advice}known keys: {', '.join(sorted(keys))}" if keys else "it takes none")


# --- text -------------------------------------------------------------------------------------------------


def _split(text: str, separator: str, flag: str) -> list[str]:
    """Split outside quotes and brackets; quotes go away at the innermost level only."""
    parts, part, depth, quoted = [], "", 0, False
    for char in text:
        if char == '"':
            quoted = not quoted
        elif not quoted and char in "[]":
            depth += 1 if char == "[" else -1
            if depth < 0:
                break
        elif not quoted and depth == 0 and char == separator:
            parts.append(part)
            part = ""
            continue
        part += char
    if depth or quoted:
        raise UsageError(f"{flag + ': ' if flag else ''}{_show(text)} has an open "
                         f"{'quote' if quoted else 'bracket'}")
    return [*parts, part] if part or parts else []


def _from_text(text: str, rule: Schema, name: str, flag: str) -> Any:
    kind = rule["type"]
    if kind == "list":
        inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
        result: list[Any] = []
        for part in _split(inner, ",", flag):
            span = part.split("-") if rule["item"]["type"] == "integer" else []
            if len(span) == 2 and all(end.isdecimal() for end in span):
                first, last = int(span[0]), int(span[1])
                if not 0 <= last - first < _MAX_RANGE:
                    raise _wrong(flag, name, part, "is no range that makes sense")
                result.extend(range(first, last + 1))
            else:
                item = {"separator": rule.get("separator", ""), **rule["item"]}
                result.append(_from_text(part, item, name, flag))
        return result
    if kind == "object":
        return _object_from_text(text, rule, name, flag)
    text = text.replace('"', "")
    if kind == "boolean":
        if text.lower() not in _WORDS:
            raise _wrong(flag, name, text, "is neither on nor off")
        return _WORDS[text.lower()]
    if kind == "integer":
        return _integer(text, name, flag)
    if kind == "number":
        try:
            return float(text)
        except ValueError:
            raise _wrong(flag, name, text, "is not a number") from None
    return _size(text, name, flag) if kind == "size" else text


def _object_from_text(text: str, rule: Schema, name: str, flag: str) -> dict[str, Any]:
    separator = rule.get("separator")
    if not separator:
        inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
        return parse_kv(inner, rule, f"{flag}: {name}" if flag else name)
    parts = _split(text, separator, flag)
    if len(parts) != len(rule["keys"]):
        raise _wrong(flag, name, text, f"is not {separator.join(rule['keys'])}")
    return {key: _from_text(part, inner, f"{name}.{key}", flag)
            for (key, inner), part in zip(rule["keys"].items(), parts, strict=True)}


def _integer(text: str, name: str, flag: str) -> int:
    try:
        return int(text, 16 if text.lower().startswith("0x") else 10)
    except ValueError:
        raise _wrong(flag, name, text, "is not a whole number") from None


def _size(text: str, name: str, flag: str) -> int:
    shift = _SUFFIXES.get(text[-1:].upper(), 0)
    digits = text[:-1] if shift else text
    try:
        return _integer(digits, name, flag) << shift
    except UsageError:
        raise _wrong(flag, name, text, "is not a size", "a number, or one with K, M, G or T") from None


# --- values -----------------------------------------------------------------------------------------------


def _check(value: Any, rule: Schema, name: str, flag: str) -> Any:
    kind = rule["type"]
    if kind == "list":
        if not isinstance(value, list | tuple):
            raise _wrong(flag, name, value, "is not a list")
        return [_check(item, {**rule["item"], **_limits(rule)}, f"{name}[{index}]", flag)
                for index, item in enumerate(value)]
    if kind == "object":
        return validate(value, rule, f"{flag}: {name}" if flag else name)
    value = _check_type(value, kind, rule, name, flag)
    if rule.get("choices") and value not in rule["choices"]:
        only = "|".join(_show(choice) for choice in rule["choices"])
        raise _wrong(flag, name, value, f"is not {only}")
    if "length" in rule and len(value.encode()) > rule["length"]:
        raise _wrong(flag, name, value, f"has {len(value.encode())} bytes, at most {rule['length']}")
    if rule.get("min") is not None and value < rule["min"]:
        raise _wrong(flag, name, value, f"is below {rule['min']}")
    if rule.get("max") is not None and value > rule["max"]:
        raise _wrong(flag, name, value, f"is above {rule['max']}")
    if rule.get("power_of_two") and (value <= 0 or value & (value - 1)):
        raise _wrong(flag, name, value, "is not a power of two")
    return value


def _limits(rule: Schema) -> Schema:
    return {key: rule[key] for key in ("choices", "min", "max", "length", "power_of_two") if key in rule}


def _check_type(value: Any, kind: str, rule: Schema, name: str, flag: str) -> Any:
    if kind == "boolean":
        if not isinstance(value, bool):
            raise _wrong(flag, name, value, "is neither true nor false")
        return value
    if kind == "string":
        if not isinstance(value, str):
            raise _wrong(flag, name, value, "is not a string")
        if "\0" in value or (rule.get("path") and not value):
            raise _wrong(flag, name, value, "is not a file name" if rule.get("path") else "holds a NUL")
        lower = value.lower()
        return lower if lower in rule.get("choices", ()) else value
    if kind == "size" and isinstance(value, str):
        value = _size(value, name, flag)
    if isinstance(value, bool) or not isinstance(value, int | float if kind == "number" else int):
        raise _wrong(flag, name, value, "is not a number" if kind == "number" else "is not a whole number")
    if kind != "number" and not (0 if kind == "size" else -_MAX_INT) <= value <= _MAX_INT:
        raise _wrong(flag, name, value, "is out of range")
    return value
