"""The tree, read and parsed once for all rules."""

from __future__ import annotations

import pytest

from tests.lint.source import PACKAGES, ROOT, Source, python_files


@pytest.fixture(scope="session")
def product() -> list[Source]:
    """Every Python file of the packages."""
    sources = python_files(ROOT, *PACKAGES)
    assert len(sources) > 50, "the tree was not found"
    return sources


@pytest.fixture(scope="session")
def checks() -> list[Source]:
    """Every Python file of the tests."""
    return python_files(ROOT, "tests")
