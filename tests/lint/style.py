"""House rules for one file at a time: each takes a Source and returns complaints."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.lint.source import ROOT, Source

MAX_PYTHON = 400
MAX_C = 600
MAX_PROSE = 5  # lines of a module's docstring; indented lines are drawings and do not count
LONG_METHOD = 8  # from so many lines on a public method must say what it does
MUTABLE_CALLS = frozenset({"list", "dict", "set", "bytearray", "deque", "defaultdict", "Counter", "OrderedDict",
                           "WeakSet", "WeakValueDictionary", "WeakKeyDictionary", "count", "cycle"})
MUTATORS = frozenset({"append", "extend", "insert", "pop", "popitem", "remove", "clear", "update", "setdefault",
                      "add", "discard", "sort", "reverse", "appendleft", "popleft"})
NOT_OURS = frozenset({"pytestmark"})  # pytest's own name for a module's marks
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sizes(source: Source, limit: int = MAX_PYTHON) -> list[str]:
    """A file stays readable in one sitting."""
    return [f"{source.path}: {source.lines} lines, at most {limit}"] if source.lines > limit else []


def no_print(source: Source) -> list[str]:
    """Only the command line prints; everybody else logs."""
    if source.path.startswith("ctl/"):
        return []
    return [source.at(node, "print outside ctl") for node in ast.walk(source.tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"]


def no_star_import(source: Source) -> list[str]:
    """Every name says where it comes from."""
    return [source.at(node, "import *") for node in ast.walk(source.tree)
            if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)]


def future_annotations(source: Source) -> list[str]:
    """Annotations are never evaluated."""
    if not source.tree.body or all(isinstance(node, ast.Expr) for node in source.tree.body):
        return []
    found = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in source.tree.body)
    return [] if found else [f"{source.path}: no `from __future__ import annotations`"]


def module_docstring(source: Source) -> list[str]:
    """A module says in at most five lines what it is for; drawings come on top."""
    if not source.text.strip():
        return []
    text = ast.get_docstring(source.tree, clean=False)
    if not text or not text.strip():
        return [f"{source.path}: no module docstring"]
    prose = [line for line in text.strip().splitlines() if line.strip() and not line.startswith(" ")]
    return [f"{source.path}: {len(prose)} lines of module docstring, at most {MAX_PROSE}"] \
        if len(prose) > MAX_PROSE else []


def docstrings(source: Source) -> list[str]:
    """Every public class and function says at least one sentence, and so does every long public method.

    Exempt: a class without methods that only names itself (an error), and in a device type's file the methods
    that the contract in devices/device.py describes.
    """
    described = CONTRACT if source.path.startswith(("devices/virtio/", "devices/vfio/")) else frozenset()
    return [source.at(node, f"{name} has no docstring with a sentence") for name, node in _public(source.tree)
            if not _sentence(node) and node.name not in described]


def _public(tree: ast.Module) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    for node in tree.body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            methods = [item for item in node.body if isinstance(item, Function)]
            if methods or not node.bases:
                yield node.name, node
            for method in methods:
                long = (method.end_lineno or 0) - method.lineno + 1 >= LONG_METHOD
                if long and not method.name.startswith("_"):
                    yield f"{node.name}.{method.name}", method
        elif node.name != "main" or len(node.body) > LONG_METHOD:
            yield node.name, node


def _methods(source: Source) -> frozenset[str]:
    return frozenset(item.name for node in source.tree.body if isinstance(node, ast.ClassDef)
                     for item in node.body if isinstance(item, Function))


CONTRACT = _methods(Source("devices/device.py", (ROOT / "devices/device.py").read_text()))


def _sentence(node: Function | ast.ClassDef) -> bool:
    text = ast.get_docstring(node) or ""
    first = text.split("\n\n")[0]
    return len(first.split()) >= 2 and any(mark in first for mark in ".:;?!")


def module_state(source: Source) -> list[str]:
    """Nothing at module level changes: containers there are CONSTANTS that no code touches; no `global`."""
    found = [source.at(node, "`global`: keep the state in an object") for node in ast.walk(source.tree)
             if isinstance(node, ast.Global)]
    constants = set()
    for node in source.tree.body:
        for name in assigned(node):
            if not _mutable(getattr(node, "value", None)) or name.startswith("__") or name in NOT_OURS:
                continue
            if name.isupper():
                constants.add(name)
            else:
                found.append(source.at(node, f"mutable {name} at module level: make it a CONSTANT or an attribute"))
    for node in ast.walk(source.tree):
        name = _changed(node)
        if name in constants:
            found.append(source.at(node, f"{name} is a constant, and changed here"))
    return found


def assigned(node: ast.stmt) -> list[str]:
    """Return the plain names that a statement assigns."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        return True
    return isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] in MUTABLE_CALLS


def _changed(node: ast.AST) -> str:
    # The name of the container that this node changes, "" if none.
    target: ast.expr | None = None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
        target = node.func.value
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
        target = node.value
    elif isinstance(node, ast.AugAssign):
        target = node.target
    return target.id if isinstance(target, ast.Name) else ""


def skips_have_reasons(source: Source) -> list[str]:
    """A skipped test names what is missing."""
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.skip":
            found += [] if _is_called(source.tree, node) else [source.at(node, "pytest.mark.skip without a reason")]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        reason = next((word.value for word in node.keywords if word.arg in ("reason", "msg")), None)
        if name in ("pytest.skip", "pytest.mark.skip", "pytest.xfail") and node.args:
            reason = node.args[0]
        needs = name in ("pytest.skip", "pytest.xfail", "pytest.mark.skip", "pytest.mark.skipif",
                         "pytest.mark.xfail", "pytest.importorskip")
        empty = reason is None or (isinstance(reason, ast.Constant) and len(str(reason.value).split()) < 2)
        if needs and empty:
            found.append(source.at(node, f"{name} without a reason"))
    return found


def _is_called(tree: ast.Module, function: ast.Attribute) -> bool:
    return any(isinstance(node, ast.Call) and node.func is function for node in ast.walk(tree))


EVERYWHERE = (sizes, no_star_import, future_annotations, module_docstring, module_state)
PRODUCT = (*EVERYWHERE, no_print, docstrings)
TESTS = (*EVERYWHERE, skips_have_reasons)
