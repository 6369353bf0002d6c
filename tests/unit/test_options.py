"""The option codec: text and JSON give the same values, every refusal is one line with key and value."""

from __future__ import annotations

from dataclasses import dataclass

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellvisor.core.errors import UsageError
from cellvisor.core.wire.options import DeviceOptions, build, defaults, describe, option, parse_kv, validate


@dataclass(frozen=True, slots=True)
class Pin:
    queue_index: int = option(min=0)
    host_cpus: list[int] = option()


@dataclass(frozen=True, slots=True)
class Topology:
    threads: int = option()
    cores: int = option()


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(DeviceOptions):
    path: str = option(help="the file", path=True)
    readonly: bool = option(False)
    size: int = option(1 << 20, size=True)
    queue_size: int = option(128, min=2, max=1024, power_of_two=True)
    queue_affinity: list[Pin] = option([], separator="@")
    topology: Topology | None = option(None, separator=":")
    limit: Topology | None = option(None)
    names: list[str] = option([])
    mode: str = option("raw", choices=("raw", "qcow2"))


@dataclass(frozen=True, slots=True)
class Console:
    mode: str = option("tty", choices=("off", "pty", "tty"), bare=True)
    file: str | None = option(None, path=True)


SCHEMA = describe(Options)


def parse(text: str) -> dict[str, object]:
    return parse_kv(text, SCHEMA, "--disk")


def test_schema_travels_in_a_message() -> None:
    assert msgpack.unpackb(msgpack.packb(SCHEMA)) == SCHEMA
    assert SCHEMA["keys"]["path"]["required"]
    assert SCHEMA["keys"]["path"]["help"] == "the file"
    assert defaults(SCHEMA)["queue_size"] == 128


def test_text_gives_typed_values() -> None:
    given = parse("path=/x,readonly=on,size=1G,queue_affinity=[0@[1,2],1@[4-6]],topology=2:4,names=[a,b]")
    assert given == {
        "path": "/x", "readonly": True, "size": 1 << 30, "names": ["a", "b"],
        "queue_affinity": [{"queue_index": 0, "host_cpus": [1, 2]},
                           {"queue_index": 1, "host_cpus": [4, 5, 6]}],
        "topology": {"threads": 2, "cores": 4},
    }
    assert validate(given, SCHEMA) == given
    made = build(Options, given)
    assert made.queue_affinity[1] == Pin(1, [4, 5, 6])
    assert made.topology == Topology(2, 4)
    assert (made.mode, made.id, made.queue_size) == ("raw", None, 128)


@pytest.mark.parametrize(("text", "value"), [
    ("1", 1), ("0x10", 16), ("4K", 4096), ("3m", 3 << 20), ("2T", 2 << 40), ("0", 0),
])
def test_sizes(text: str, value: int) -> None:
    assert parse(f"path=/x,size={text}")["size"] == value


@pytest.mark.parametrize(("text", "value"), [("on", True), ("true", True), ("off", False), ("False", False)])
def test_switches(text: str, value: bool) -> None:
    assert parse(f"path=/x,readonly={text}")["readonly"] is value


def test_quotes_protect_commas_and_brackets() -> None:
    assert parse('path="/a,b=[c"')["path"] == "/a,b=[c"
    assert parse('path=/x,names=["a,b",c]')["names"] == ["a,b", "c"]


def test_nested_object_in_brackets() -> None:
    assert parse("path=/x,limit=[threads=1,cores=2]")["limit"] == {"threads": 1, "cores": 2}


def test_bare_word_means_the_declared_key() -> None:
    schema = describe(Console)
    assert parse_kv("pty", schema) == {"mode": "pty"}
    assert parse_kv("file=/x", schema) == {"file": "/x"}
    assert validate({"mode": "Pty"}, schema) == {"mode": "pty"}
    with pytest.raises(UsageError, match=r"mode=xyz is not off\|pty\|tty"):
        parse_kv("xyz", schema, "--console")


@pytest.mark.parametrize(("text", "message"), [
    ("readonly=on", "--disk: path is missing"),
    ("path=/x,redonly=on", "--disk: unknown key 'redonly' (did you mean readonly? known keys: hang_timeout, id, "),
    ("path=/x,readonly=maybe", "--disk: readonly=maybe is neither on nor off"),
    ("path=/x,size=12Q", "--disk: size=12Q is not a size"),
    ("path=/x,size=", "--disk: size= is not a size"),
    ("path=/x,size=-1", "--disk: size=-1 is out of range"),
    ("path=/x,size=9999999999T", "is out of range"),
    ("path=/x,queue_size=100", "--disk: queue_size=100 is not a power of two"),
    ("path=/x,queue_size=2048", "--disk: queue_size=2048 is above 1024"),
    ("path=/x,queue_size=1", "--disk: queue_size=1 is below 2"),
    ("path=/x,queue_size=8,queue_size=8", "--disk: queue_size=8 is given twice"),
    ("path=/x,mode=vhd", "--disk: mode=vhd is not raw|qcow2"),
    ("path=/x,iommu=on", "--disk: iommu=on is not off"),
    ("path=/x,pci_device_id=0", "--disk: pci_device_id=0 is below 1"),
    ("path=", "--disk: path= is not a file name"),
    ("path=/x,names=[a", "has an open bracket"),
    ('path="/x', "has an open quote"),
    ("path=/x,queue_affinity=[0@[a]]", "--disk: queue_affinity.host_cpus=a is not a whole number"),
    ("path=/x,queue_affinity=[0@[9-1]]", "=9-1 is no range that makes sense"),
    ("path=/x,topology=1:2:3", "--disk: topology=1:2:3 is not threads:cores"),
    ("path=/x,limit=[threads=1]", "--disk: limit: cores is missing"),
    ("path", "--disk: path has no value"),
    ("path=/x,,readonly=on", "--disk: unknown key ''"),
])
def test_refusals_name_key_and_value(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("body", [
    [], {"path": 1}, {"path": "/x", "readonly": 1}, {"path": "/x", "readonly": "on"}, {"path": "/x", 3: 4},
    {"path": "/x", "size": True}, {"path": "/x", "size": 1.5}, {"path": "/x", "names": "a"},
    {"path": "/x", "names": [1]}, {"path": "/x", "topology": 3}, {"path": "a\0b"},
    {"path": "/x", "queue_affinity": [{"queue_index": -1, "host_cpus": []}]},
])
def test_json_of_the_wrong_type_is_refused(body: object) -> None:
    with pytest.raises(UsageError):
        validate(body, SCHEMA)


def test_null_means_not_given() -> None:
    assert validate({"path": "/x", "id": None, "size": "4K"}, SCHEMA) == {"path": "/x", "size": 4096}
    with pytest.raises(UsageError, match="path is missing"):
        validate({"path": None}, SCHEMA)


@given(st.text())
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    seen = ""
    try:
        parse(text)
    except UsageError as error:
        seen = str(error)
    assert "\n" not in seen
