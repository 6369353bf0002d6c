"""Keys of people and VMs (CURVE, 40 characters of Z85 each), and where they are: `~/.config/cellvisor`.

    keys/NAME.key   TOML, mode 0600: public, secret          clients.toml   NAME = "public key": who may steer VMs here
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cellvisor.core.errors import Conflict, NotFound, UsageError
from cellvisor.core.wire.places import is_word

KEY_LENGTH = 40
MAX_FILE = 1 << 20
CLIENTS, REMOTES = "clients.toml", "remotes.toml"


@dataclass(frozen=True, slots=True)
class Pair:
    """A public key and its secret one."""

    public: str
    secret: str = field(repr=False)


def config_dir(environ: Mapping[str, str] | None = None) -> str:
    """Return `$XDG_CONFIG_HOME/cellvisor`, else `~/.config/cellvisor`."""
    home = (os.environ if environ is None else environ).get("XDG_CONFIG_HOME", "")
    return os.path.join(home if home.startswith("/") else os.path.expanduser("~/.config"), "cellvisor")


def key_file(name: str) -> str:
    """Return where the pair of that name is. Raises UsageError for a name that cannot be a file's."""
    if not (is_word(name) and name[0].isalnum()) or len(name) > 64:
        raise UsageError(f"key {name[:80]!r}: no name", hint="a letter or digit, then letters, digits, '.', '_' or '-'")
    return os.path.join(config_dir(), "keys", f"{name}.key")


def read_toml(path: str, *, private: bool = False) -> dict[str, Any]:
    """Read a file. Raises NotFound, or UsageError that names the line; a `private` one must be ours alone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound(f"{path}: no such file") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    with os.fdopen(fd, "rb") as file:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise UsageError(f"{path}: not a regular file")
        if private and mode & 0o077:
            raise UsageError(f"{path}: mode {stat.S_IMODE(mode):04o} lets others read a secret",
                             hint=f"chmod 600 {path}, or make another key")
        data = file.read(MAX_FILE)
    import tomllib  # 5 ms that most commands can spare

    try:
        return tomllib.loads(data.decode())
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are ones
        raise UsageError(f"{path}: {error}") from None


def text_of(path: str, table: Mapping[str, Any], key: str, prefix: str = "") -> str:
    """Return a value that must be there and a string. Raises UsageError naming key and value."""
    if key not in table:
        raise UsageError(f"{path}: {prefix}{key} is missing")
    if not isinstance(table[key], str):
        raise UsageError(f"{path}: {prefix}{key} = {repr(table[key])[:60]} is not a string")
    return str(table[key])


def check_public(path: str, key: str, value: object) -> str:
    """Return a key if it can be one. Raises UsageError naming file, key and value."""
    import zmq.utils.z85

    with contextlib.suppress(Exception):  # z85 raises what it likes
        if isinstance(value, str) and len(value) == KEY_LENGTH and len(zmq.utils.z85.decode(value.encode())) == 32:
            return value
    raise UsageError(f"{path}: {key} = {repr(value)[:60]} is no public key",
                     hint=f"it has {KEY_LENGTH} characters: cellvisor keys show")


def read_pair(path: str) -> Pair:
    """Read a pair. Raises NotFound, UsageError."""
    import zmq

    table = read_toml(path, private=True)
    for key in set(table) - {"public", "secret"}:
        raise UsageError(f"{path}: unknown key {key[:60]!r}", hint="known keys: public, secret")
    pair = Pair(text_of(path, table, "public"), text_of(path, table, "secret"))
    try:
        fits = zmq.curve_public(pair.secret.encode()).decode() == pair.public
    except (ValueError, zmq.ZMQError):
        fits = False
    if not fits:
        raise UsageError(f"{path}: the secret does not belong to public = {pair.public[:60]!r}",
                         hint="make another one with cellvisor keys new")
    return pair


def make_pair(path: str) -> Pair:
    """Make a pair and write it to a new file, mode 0600. Raises Conflict if there is one, UsageError."""
    import zmq

    public, secret = (key.decode() for key in zmq.curve_keypair())
    try:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        raise Conflict(f"{path}: exists", hint="choose another name, or remove it: whoever trusts it will not "
                                               "know the next one") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    with os.fdopen(fd, "w") as file:
        os.fchmod(fd, 0o600)
        file.write(f'public = "{public}"\nsecret = "{secret}"\n')
    return Pair(public, secret)


def read_clients(path: str) -> dict[str, str]:
    """Return public key -> name of everybody in an allow-list. Raises NotFound, UsageError."""
    return {check_public(path, name, key): name for name, key in read_toml(path).items()}
