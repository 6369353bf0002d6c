"""Commands as an ordinary user: nothing is allowed but to read what root keeps to itself, where Python may be.

/dev/kvm and /dev/net/tun have the modes that they have on a desktop, or others, for that command alone: it sees
them through a mount namespace of its own.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from tests.debian import need

USER = 54321  # without a name: nobody's
# $1 is where the nodes are made, then their modes and numbers; the rest is the command.
_SCRIPT = """set -e
mount -t tmpfs none "$1"
mknod -m "$2" "$1/kvm" c "$3" "$4"
mknod -m 666 "$1/tun" c "$5" "$6"
mount --bind "$1/kvm" /dev/kvm
mount --bind "$1/tun" /dev/net/tun
shift 6
exec "$@"
"""


def command(where: Path, *, kvm: str = "666") -> list[str]:
    """Return how to begin a command of the user, who owns `where`; `kvm` is the mode of root's /dev/kvm."""
    os.chown(where, USER, USER)
    nodes = where / "nodes"
    nodes.mkdir(exist_ok=True)
    numbers = [str(part) for path in ("/dev/kvm", "/dev/net/tun") for device in [os.stat(path).st_rdev]
               for part in (os.major(device), os.minor(device))]
    kept = "-all,+dac_read_search"
    return [need("unshare", "util-linux"), "--mount", "sh", "-c", _SCRIPT, "sh", str(nodes), kvm, *numbers,
            need("setpriv", "util-linux"), "--reuid", str(USER), "--regid", str(USER), "--clear-groups",
            f"--inh-caps={kept}", f"--ambient-caps={kept}", f"--bounding-set={kept}",
            str(Path(sys.executable).with_name("cellvisor"))]


def own(path: str) -> str:
    """Give a directory to the user, and to nobody else."""
    os.chown(path, USER, USER)
    os.chmod(path, stat.S_IRWXU)
    return path
