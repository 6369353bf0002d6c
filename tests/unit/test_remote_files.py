"""What the API over TCP stands on: files of keys, allow-lists, and a log read in pieces."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from cellvisor.controlplane import logtail, remote
from cellvisor.core.errors import NotFound, UsageError
from cellvisor.core.wire import keys
from cellvisor.ctl import dispatch


def test_what_is_asked_of_a_log_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\nthree")
    assert logtail.read(str(path), 0, None) == {"text": "one\ntwo\n", "rest": "three", "next": 8}
    assert logtail.read(str(path), 8, None) == {"text": "", "rest": "three", "next": 8}
    for lines, text in ((0, ""), (1, "two\n"), (2, "one\ntwo\n"), (9, "one\ntwo\n")):
        assert logtail.read(str(path), 0, lines)["text"] == text
    assert logtail.read(str(path), 4000, None)["text"] == "one\ntwo\n", "a file that began anew"
    path.write_bytes(b"\xff" * (3 << 20))
    assert logtail.read(str(path), 0, 5)["next"] == (2 << 20) + logtail.PIECE
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "none"):
        with pytest.raises(NotFound, match=name):
            logtail.read(str(tmp_path / name), 0, None)


def test_keys_are_private_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    old = os.umask(0)
    try:
        assert dispatch.run(["keys", "new", "laptop", "--json"]) == 0
    finally:
        os.umask(old)
    made = json.loads(capsys.readouterr().out)
    path = made["path"]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
    assert "secret" not in made and len(made["public"]) == 40
    before = Path(path).read_text()
    assert dispatch.run(["keys", "new", "laptop"]) == 1
    assert Path(path).read_text() == before
    assert dispatch.run(["keys", "show", "laptop"]) == 0
    out = capsys.readouterr().out
    assert made["public"] in out and keys.read_pair(path).secret not in out
    assert keys.read_pair(path).secret not in repr(keys.read_pair(path))
    os.chmod(path, 0o640)
    assert dispatch.run(["keys", "show", "laptop"]) == 2
    assert "mode 0640 lets others read a secret" in capsys.readouterr().err
    os.chmod(path, 0o600)
    for text, said in (('public = "x"', "secret is missing"), ('public = 1\nsecret = ""', "public = 1 is not a string"),
                       ('more = 1', "unknown key 'more'"), ("public", "(at "), ("\xff", "(at "),
                       (before.replace("secret = ", 'secret = "x" # '), "the secret does not belong to public")):
        Path(path).write_text(text)
        with pytest.raises(UsageError) as caught:
            keys.read_pair(path)
        assert path in str(caught.value) and said in str(caught.value)
    for name in ("../x", "", ".x", "a b", "x" * 65):
        with pytest.raises(UsageError, match="no name"):
            keys.key_file(name)


def test_tcp_only_with_keys_and_an_allow_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    where = "tcp://[::1]:7300"
    with pytest.raises(UsageError, match=r"only with keys, and .*server.key: no such file .cellvisor keys new server"):
        remote.check(where)
    public = keys.make_pair(keys.key_file("server")).public
    with pytest.raises(UsageError, match=r"only with an allow-list, and .*clients.toml: no such file"):
        remote.check(where)
    clients = tmp_path / "cellvisor" / "clients.toml"
    for text, said in (("", "allows nobody"), ("x = 1", "x = 1 is no public key"), ("x", "(at ")):
        clients.write_text(text)
        with pytest.raises(UsageError) as caught:
            remote.check(where)
        assert said in str(caught.value)
    clients.write_text(f'x = "{public}"')
    odd = tmp_path / "a,b.key"
    odd.symlink_to(keys.key_file("server"))
    checked = remote.parse(remote.check(f'{where},key="{odd}"'))
    assert checked == remote.Remote("[::1]", 7300, 7301, str(odd), str(clients))
