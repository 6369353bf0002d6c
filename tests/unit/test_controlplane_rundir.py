"""Run directories: one VM a name, stale ones reclaimed, nothing left."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cellvisor.controlplane import rundir
from cellvisor.core.errors import Conflict, UsageError
from cellvisor.core.wire import places


def test_directory_is_private_and_removed(tmp_path: Path) -> None:
    base = str(tmp_path / "cellvisor")
    claimed = rundir.claim("web", base)
    assert stat.S_IMODE(os.stat(claimed.path).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(base).st_mode) == 0o700
    assert places.holder(claimed.path) == {"pid": os.getpid()}
    assert places.running(base) == {"web": {"pid": os.getpid()}}
    Path(claimed.file("api.sock")).touch()
    claimed.remove()
    claimed.remove()
    assert os.listdir(base) == []
    assert places.running(base) == {}


def test_second_vm_of_a_name_is_refused_and_the_holder_named(tmp_path: Path) -> None:
    first = rundir.claim("web", str(tmp_path))
    with pytest.raises(Conflict, match=f"--name web: .*process {os.getpid()}"):
        rundir.claim("web", str(tmp_path))
    first.remove()
    rundir.claim("web", str(tmp_path)).remove()


def test_automatic_names_take_the_lowest_free(tmp_path: Path) -> None:
    claimed = [rundir.claim(None, str(tmp_path)) for _ in range(3)]
    assert [one.name for one in claimed] == ["vm0", "vm1", "vm2"]
    claimed[1].remove()
    again = rundir.claim(None, str(tmp_path))
    assert again.name == "vm1"
    for one in (claimed[0], claimed[2], again):
        one.remove()


def test_directory_of_a_dead_vm_is_reclaimed(tmp_path: Path) -> None:
    script = f"from cellvisor.controlplane import rundir; rundir.claim('web', {str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", script], check=True)
    stale = tmp_path / "web"
    (stale / "api.sock").touch()
    (stale / "deep").mkdir()
    assert places.holder(str(stale)) is None
    claimed = rundir.claim("web", str(tmp_path))
    assert sorted(os.listdir(claimed.path)) == [places.LOCK, places.PILOT]
    claimed.remove()


def test_the_lock_lives_as_long_as_whoever_inherited_it(tmp_path: Path) -> None:
    claimed = rundir.claim("web", str(tmp_path))
    heir = subprocess.Popen(["sleep", "60"], pass_fds=[claimed.lock_fd])
    os.close(claimed.lock_fd)
    with pytest.raises(Conflict):
        rundir.claim("web", str(tmp_path))
    heir.kill()
    heir.wait()
    rundir.claim("web", str(tmp_path)).remove()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "ä", "x" * 65, "a b", "a\0", ".hidden"])
def test_bad_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--name"):
        rundir.claim(name, str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_too_long_for_a_socket_path(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at most 107"):
        rundir.claim("name", str(tmp_path / ("b" * 90)))
    assert os.listdir(tmp_path) == []
    base = "/" + "b" * 69
    longest = "n" * (places.MAX_SOCKET_PATH - len(os.path.join(base, "x", places.LONGEST)) + 1)
    assert len(os.path.join(places.vm_dir(longest, base), places.LONGEST)) == 107
    with pytest.raises(UsageError, match="at most 107"):
        places.vm_dir(longest + "n", base)


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    (tmp_path / "base").symlink_to(target)
    with pytest.raises(UsageError, match="not a directory of"):
        rundir.claim("web", str(tmp_path / "base"))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="not a directory"):
        rundir.claim("web", str(tmp_path / "file"))


def test_base_follows_the_environment() -> None:
    assert places.base_dir({"XDG_RUNTIME_DIR": "/run/user/7"}) == "/run/user/7/cellvisor"
    assert places.base_dir({"XDG_RUNTIME_DIR": "relative"}) == "/run/cellvisor"
    assert places.base_dir({}) == "/run/cellvisor"
