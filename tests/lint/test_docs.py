"""The documents exist, and the files that they name do too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.lint.source import ROOT

NAMED = re.compile(r"`((?:core|devices|controlplane|ctl|tests|deploy|src|\.ci)/[\w./-]*)`")
LINKED = re.compile(r"\]\(([^)#:]+)\)")
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "BENCH.md")


def missing(root: Path, text: str) -> list[str]:
    """Return each path of ours that `text` names or links and that does not exist."""
    names = [*NAMED.findall(text), *LINKED.findall(text)]
    return sorted({name for name in names if not (root / name).exists()})


@pytest.mark.parametrize("name", DOCUMENTS)
def test_document_names_only_what_exists(name: str) -> None:
    text = (ROOT / name).read_text()
    assert len(text) > 200
    assert missing(ROOT, text) == []


def test_readme_gives_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    for command in ("make demo", "make test"):
        assert command in text
        assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_missing_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    text = "see `core/` and `core/gone.py`, [here](gone.md), [web](https://example.org/x)"
    assert missing(tmp_path, text) == ["core/gone.py", "gone.md"]
