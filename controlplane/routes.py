"""Cloud Hypervisor's HTTP API on the verb table: request line and body to a Request, an answer to a reply.

Pure functions. Paths, bodies, reply shapes and status codes are Cloud Hypervisor's wherever the verb is one of its;
errors are a JSON array of sentences, what went wrong first. Bodies are ASCII: `ch-remote` cuts replies into pieces.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from cellvisor.core.errors import CellvisorError, NotFound, UsageError
from cellvisor.core.wire.control import MAX_ID, PATHS, ObjectArgs, Request, Verb, check_args, check_fds, look_up
from cellvisor.core.wire.options import describe, parse_kv

ROOT = "/api/v1/"
MAX_BODY = 4 << 20
MAX_DEPTH = 64
OPERATION = "X-Cellvisor-Operation"
ERROR = "X-Cellvisor-Error"
REQUEST_ID = b"x-cellvisor-request"
FULL = b"x-cellvisor-answer"  # given: the answer as over ZeroMQ, not only what Cloud Hypervisor would say


@dataclass(frozen=True, slots=True)
class Reply:
    """What goes back. A 204 has no body and no Content-Length."""

    status: int
    body: bytes = b""
    extra: tuple[tuple[str, str], ...] = ()

    def headers(self, *, close: bool) -> list[tuple[str, str]]:
        """Return the header fields; `ch-remote` looks for the letters `Content-Length`."""
        found = [("Connection", "close" if close else "keep-alive"), *self.extra]
        if self.status != 204:
            found += [("Content-Type", "application/json"), ("Content-Length", str(len(self.body)))]
        return found


def find(target: str) -> tuple[Verb, str]:
    """Return the verb of a request target and its query. Raises NotFound, or UsageError if it is not supported."""
    path, _, query = target.partition("?")
    name = path.removeprefix(ROOT)
    verb = PATHS.get(name) if path.startswith(ROOT) else None
    if verb is None:
        import difflib

        close = difflib.get_close_matches(name[:60], PATHS, 1)
        hint = f"did you mean {ROOT}{close[0]}?" if close else f"paths are {ROOT}vmm.ping, {ROOT}vm.info, ..."
        raise NotFound(f"no path {path[:80]!r}", hint=hint, code="unknown-path")
    look_up(verb.name)
    return verb, query


def parse(key: str | None, method: str, target: str, body: bytes, fds: tuple[int, ...] = ()) -> tuple[Verb, Request]:
    """Read one request that may be hostile; `key` is the client's request id, None without.

    Raises UsageError or NotFound and nothing else.
    """
    verb, query = find(target)
    if key is not None and not 0 < len(key) <= MAX_ID:
        raise UsageError(f"{verb.http_path}: a request id of {len(key)} characters, 1 to {MAX_ID} work")
    reads = method == "GET"
    own = verb.reads and not verb.path  # a question of ours may come with a body
    if method not in ("GET", "PUT") or (reads != verb.reads and not (own and method == "PUT")):
        raise UsageError(f"{method[:20]} {verb.http_path}: the method is {'GET' if verb.reads else 'PUT'}",
                         code="wrong-method")
    check_fds(verb, fds)
    if body and (reads or not _takes_args(verb)):
        raise UsageError(f"{verb.http_path} takes no body, {len(body)} bytes came", code="unexpected-body")
    if reads or query:
        args: object = _from_query(verb, query)
    else:
        args = load(body, verb.http_path) if body else {}
    serving = look_up(verb.name)
    return verb, Request(key or "", serving.name, check_args(serving, args), fds)


def _takes_args(verb: Verb) -> bool:
    return verb.args is ObjectArgs or bool(describe(verb.args)["keys"])


def _from_query(verb: Verb, query: str) -> dict[str, Any]:
    if not query:
        return {}
    if verb.args is ObjectArgs:
        raise UsageError(f"{verb.http_path}: its arguments are a JSON body")
    from urllib.parse import parse_qsl

    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=64)
    except ValueError as error:
        raise UsageError(f"{verb.http_path}: query {query[:80]!r}: {error}") from None
    if any('"' in name + value for name, value in pairs):
        raise UsageError(f"{verb.http_path}: query {query[:80]!r} holds a quote")
    text = ",".join(f'{name}="{value}"' for name, value in pairs)
    return parse_kv(text, describe(verb.args), verb.name)


def load(body: bytes, what: str) -> object:
    """Read JSON from a client. Raises UsageError for anything that could not be passed on."""
    try:
        text = body.decode()
        value = json.loads(text, parse_constant=_no_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no character
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what}: the body is not JSON: {str(error)[:120]}", code="bad-json") from None
    _check_depth(value, what)
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _check_depth(value: object, what: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level if isinstance(outer, list | dict)
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            return
    raise UsageError(f"{what}: the body is nested more than {MAX_DEPTH} deep", code="bad-json")


def answer(verb: Verb, value: object, *, full: bool = False) -> Reply:
    """Make the reply to a request of `verb`: `value` is what it answered, or the CellvisorError."""
    if isinstance(value, CellvisorError):
        return refusal(value)
    if full:
        return Reply(200, dump(value))
    extra: tuple[tuple[str, str], ...] = ()
    if verb.path and not verb.reads and isinstance(value, dict) and isinstance(value.get("operation"), str):
        extra = ((OPERATION, value["operation"]),)
        plugged = value.get("plugged", True)  # not into a VM that is not booted: no body then
        value = {key: inner for key, inner in value.items() if plugged and key not in ("operation", "plugged")}
    if verb.reads or not verb.path or (verb.answers and value):  # verbs of ours answer all they have
        return Reply(200, dump(value), extra)
    return Reply(200 if verb.name == "shutdown-vmm" else 204, b"", extra)


def refusal(error: CellvisorError) -> Reply:
    """Make the reply for an error: its sentence, then what to do about it."""
    chain = [error.message, error.hint] if error.hint else [error.message]
    return Reply(error.status, dump(chain), ((ERROR, error.code if error.code.isascii() else "internal"),))


def dump(value: object) -> bytes:
    """Write JSON as ASCII; what JSON does not know becomes text."""
    return json.dumps(value, default=str, separators=(",", ":")).encode()
