"""Encode AML, the byte code of ACPI tables (ACPI 6.5, chapter 20).

A term is bytes; each function encodes one operator and takes operands that are terms, whole numbers, or
text. Text is a string literal: a name that is meant as a reference goes through `ref`.
"""

from __future__ import annotations

import re
from typing import TypeAlias
from uuid import UUID

from cellvisor.core.errors import Internal

Term: TypeAlias = bytes | int | str

ZERO = b"\x00"
ONE = b"\x01"
ONES = b"\xff"
NOTHING = ZERO  # as a target: NullName, the result is not stored
LOCAL = tuple(bytes([0x60 + index]) for index in range(8))
ARG = tuple(bytes([0x68 + index]) for index in range(7))

SYSTEM_MEMORY = 0
SYSTEM_IO = 1

# Field access types and update rules (20.2.5.2 FieldFlags).
ANY_ACCESS, BYTE_ACCESS, WORD_ACCESS, DWORD_ACCESS, QWORD_ACCESS = range(5)
LOCKED = 0x10
PRESERVE, WRITE_AS_ONES, WRITE_AS_ZEROS = 0x00, 0x20, 0x40

_SEGMENT = re.compile(r"[A-Z_][A-Z0-9_]{0,3}\Z")


def ref(path: str) -> bytes:
    """Encode a NameString such as "\\_SB.PC00", "^PWRB" or "STA" (segments are padded with "_")."""
    rest = path.lstrip("\\^")
    prefix = path[: len(path) - len(rest)]
    if prefix not in ("", "\\") and set(prefix) != {"^"}:
        raise Internal(f"AML name {path!r} has a wrong prefix")
    segments = rest.split(".") if rest else []
    for segment in segments:
        if not _SEGMENT.match(segment):
            raise Internal(f"AML name {path!r}: segment {segment!r} is not 1 to 4 of A-Z, 0-9, _")
    encoded = b"".join(segment.ljust(4, "_").encode() for segment in segments)
    if not segments:
        return prefix.encode() + b"\x00"
    if len(segments) > 255:
        raise Internal(f"AML name {path!r} has more than 255 segments")
    count = {1: b"", 2: b"\x2e"}.get(len(segments), b"\x2f" + bytes([len(segments)]))
    return prefix.encode() + count + encoded


def integer(value: int) -> bytes:
    """Encode a whole number, 0 .. 2**64-1, in the fewest bytes."""
    if not 0 <= value < 1 << 64:
        raise Internal(f"AML has no integer {value}")
    if value < 2:
        return bytes([value])
    for opcode, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4)):
        if value < 1 << (8 * size):
            return bytes([opcode]) + value.to_bytes(size, "little")
    return b"\x0e" + value.to_bytes(8, "little")


def string(text: str) -> bytes:
    """Encode a string literal (ASCII without NUL)."""
    if not text.isascii() or "\0" in text:
        raise Internal(f"AML string {text!r} is not ASCII")
    return b"\x0d" + text.encode() + b"\x00"


def term(value: Term) -> bytes:
    """Encode an operand: bytes as they are, a number as integer, text as string literal."""
    if isinstance(value, int):
        return integer(value)
    return string(value) if isinstance(value, str) else value


def terms(values: tuple[Term, ...]) -> bytes:
    """Encode operands one after the other."""
    return b"".join(term(value) for value in values)


def length_of(size: int, *, counts_itself: bool = True) -> bytes:
    """Encode a PkgLength for `size` bytes (20.2.4); the length counts its own bytes unless in a field."""
    for extra in range(4):
        total = size + extra + 1 if counts_itself else size
        if extra == 0 and total < 1 << 6:
            return bytes([total])
        if extra and total < 1 << (4 + 8 * extra):
            return bytes([extra << 6 | total & 0xF]) + (total >> 4).to_bytes(extra, "little")
    raise Internal(f"AML package of {size} bytes is too long")


def _package(opcode: bytes, body: bytes) -> bytes:
    return opcode + length_of(len(body)) + body


# --- Named objects ------------------------------------------------------------------------------------


def name(path: str, value: Term) -> bytes:
    """Name (path, value)."""
    return b"\x08" + ref(path) + term(value)


def alias(source: str, path: str) -> bytes:
    """Alias (source, path)."""
    return b"\x06" + ref(source) + ref(path)


def scope(path: str, *body: Term) -> bytes:
    """Scope (path) {body}."""
    return _package(b"\x10", ref(path) + terms(body))


def device(path: str, *body: Term) -> bytes:
    """Device (path) {body}."""
    return _package(b"\x5b\x82", ref(path) + terms(body))


def method(path: str, arguments: int, *body: Term, serialized: bool = False, sync_level: int = 0) -> bytes:
    """Method (path, arguments, serialized) {body}."""
    flags = arguments | (8 if serialized else 0) | sync_level << 4
    return _package(b"\x14", ref(path) + bytes([flags]) + terms(body))


def op_region(path: str, space: int, offset: Term, length: Term) -> bytes:
    """OperationRegion (path, space, offset, length)."""
    return b"\x5b\x80" + ref(path) + bytes([space]) + term(offset) + term(length)


def field(region: str, access: int, *items: tuple[str, int], rule: int = PRESERVE,
          lock: bool = False) -> bytes:
    """Field (region) of (name, bits) items in order; an empty name leaves a gap of that many bits."""
    body = ref(region) + bytes([access | rule | (LOCKED if lock else 0)])
    for item, bits in items:
        body += (ref(item) if item else ZERO) + length_of(bits, counts_itself=False)
    return _package(b"\x5b\x81", body)


def mutex(path: str, sync_level: int = 0) -> bytes:
    """Mutex (path, sync_level)."""
    return b"\x5b\x01" + ref(path) + bytes([sync_level])


def event(path: str) -> bytes:
    """Event (path)."""
    return b"\x5b\x02" + ref(path)


# --- Data ---------------------------------------------------------------------------------------------


def package(*elements: Term) -> bytes:
    """Package {elements}, at most 255."""
    if len(elements) > 255:
        raise Internal(f"AML Package of {len(elements)} elements: use var_package")
    return _package(b"\x12", bytes([len(elements)]) + terms(elements))


def var_package(*elements: Term) -> bytes:
    """Package {elements} whose count is a term: any number."""
    return _package(b"\x13", integer(len(elements)) + terms(elements))


def buffer(data: bytes, size: Term | None = None) -> bytes:
    """Buffer (size) {data}; `size` defaults to the data's."""
    return _package(b"\x11", term(len(data) if size is None else size) + data)


def eisa_id(text: str) -> bytes:
    """EISAID ("PNP0A08"): three letters and four hexadecimal digits in one dword."""
    if not re.fullmatch(r"[A-Z]{3}[0-9A-F]{4}", text):
        raise Internal(f"{text!r} is no EISA id")
    vendor = sum((ord(letter) - 0x40) << shift for letter, shift in zip(text, (26, 21, 16), strict=False))
    # Always a DWordConst: iasl writes it so, and Linux tells an id from a small number by its type only.
    return b"\x0c" + (vendor | int(text[3:], 16)).to_bytes(4, "big")


def to_uuid(text: str) -> bytes:
    """ToUUID (text): a 16-byte buffer, the first three groups little-endian."""
    return buffer(UUID(text).bytes_le)


# --- Statements ---------------------------------------------------------------------------------------


def if_(condition: Term, *body: Term) -> bytes:
    """If (condition) {body}; follow it with `else_`."""
    return _package(b"\xa0", term(condition) + terms(body))


def else_(*body: Term) -> bytes:
    """Else {body}, right after an `if_`."""
    return _package(b"\xa1", terms(body))


def while_(condition: Term, *body: Term) -> bytes:
    """While (condition) {body}."""
    return _package(b"\xa2", term(condition) + terms(body))


def break_() -> bytes:
    """Leave the innermost While."""
    return b"\xa5"


def continue_() -> bytes:
    """Start the innermost While again."""
    return b"\x9f"


def return_(value: Term) -> bytes:
    """Return (value)."""
    return b"\xa4" + term(value)


def call(path: str, *arguments: Term) -> bytes:
    """Call the method `path`."""
    return ref(path) + terms(arguments)


def notify(target: str | bytes, value: Term) -> bytes:
    """Notify (target, value); `target` is a path or a term such as LOCAL[0]."""
    return b"\x86" + (ref(target) if isinstance(target, str) else target) + term(value)


def acquire(path: str, timeout_ms: int = 0xFFFF) -> bytes:
    """Acquire (path, timeout); 0xFFFF waits for ever. Gives true on time-out."""
    return b"\x5b\x23" + ref(path) + timeout_ms.to_bytes(2, "little")


def release(path: str) -> bytes:
    """Release (path)."""
    return b"\x5b\x27" + ref(path)


def sleep(milliseconds: Term) -> bytes:
    """Sleep (milliseconds)."""
    return b"\x5b\x22" + term(milliseconds)


def create_field(kind: str, source: Term, index: Term, path: str) -> bytes:
    """CreateXField (source, index, path); kind is "bit", "byte", "word", "dword" or "qword".

    `index` is in bytes, except for "bit" where it is in bits.
    """
    opcodes = {"bit": 0x8D, "byte": 0x8C, "word": 0x8B, "dword": 0x8A, "qword": 0x8F}
    return bytes([opcodes[kind]]) + term(source) + term(index) + ref(path)


def store(value: Term, target: bytes) -> bytes:
    """Store (value, target)."""
    return b"\x70" + term(value) + target


def increment(target: bytes) -> bytes:
    """Increment (target)."""
    return b"\x75" + target


def decrement(target: bytes) -> bytes:
    """Decrement (target)."""
    return b"\x76" + target


# --- Expressions: the result also goes to `target` ------------------------------------------------------


def _binary(opcode: int, left: Term, right: Term, target: bytes) -> bytes:
    return bytes([opcode]) + term(left) + term(right) + target


def add(left: Term, right: Term, target: bytes = NOTHING) -> bytes:
    """Add (left, right, target)."""
    return _binary(0x72, left, right, target)


def subtract(left: Term, right: Term, target: bytes = NOTHING) -> bytes:
    """Subtract (left, right, target): left - right."""
    return _binary(0x74, left, right, target)


def multiply(left: Term, right: Term, target: bytes = NOTHING) -> bytes:
    """Multiply (left, right, target)."""
    return _binary(0x77, left, right, target)


def shift_left(value: Term, bits: Term, target: bytes = NOTHING) -> bytes:
    """ShiftLeft (value, bits, target)."""
    return _binary(0x79, value, bits, target)


def shift_right(value: Term, bits: Term, target: bytes = NOTHING) -> bytes:
    """ShiftRight (value, bits, target)."""
    return _binary(0x7A, value, bits, target)


def and_(left: Term, right: Term, target: bytes = NOTHING) -> bytes:
    """And (left, right, target)."""
    return _binary(0x7B, left, right, target)


def or_(left: Term, right: Term, target: bytes = NOTHING) -> bytes:
    """Or (left, right, target)."""
    return _binary(0x7D, left, right, target)


def xor(left: Term, right: Term, target: bytes = NOTHING) -> bytes:
    """Xor (left, right, target)."""
    return _binary(0x7F, left, right, target)


def not_(value: Term, target: bytes = NOTHING) -> bytes:
    """Not (value, target)."""
    return b"\x80" + term(value) + target


def find_set_right_bit(value: Term, target: bytes = NOTHING) -> bytes:
    """FindSetRightBit (value, target): 1 for bit 0, 0 if no bit is set."""
    return b"\x82" + term(value) + target


def index(source: Term, number: Term, target: bytes = NOTHING) -> bytes:
    """Index (source, number, target): a reference to one element."""
    return _binary(0x88, source, number, target)


def deref(reference: Term) -> bytes:
    """DerefOf (reference)."""
    return b"\x83" + term(reference)


def size_of(path: bytes) -> bytes:
    """SizeOf (object)."""
    return b"\x87" + path


def concatenate(left: Term, right: Term, target: bytes = NOTHING) -> bytes:
    """Concatenate (left, right, target)."""
    return _binary(0x73, left, right, target)


def to_integer(value: Term, target: bytes = NOTHING) -> bytes:
    """ToInteger (value, target)."""
    return b"\x99" + term(value) + target


def logical_and(left: Term, right: Term) -> bytes:
    """LAnd (left, right)."""
    return b"\x90" + term(left) + term(right)


def logical_or(left: Term, right: Term) -> bytes:
    """LOr (left, right)."""
    return b"\x91" + term(left) + term(right)


def logical_not(value: Term) -> bytes:
    """LNot (value)."""
    return b"\x92" + term(value)


def equal(left: Term, right: Term) -> bytes:
    """LEqual (left, right)."""
    return b"\x93" + term(left) + term(right)


def greater(left: Term, right: Term) -> bytes:
    """LGreater (left, right)."""
    return b"\x94" + term(left) + term(right)


def less(left: Term, right: Term) -> bytes:
    """LLess (left, right)."""
    return b"\x95" + term(left) + term(right)
