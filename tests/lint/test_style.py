"""Sizes, docstrings, printing, module state and skips, over the whole tree; and each rule on a planted fault."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lint import style
from tests.lint.source import ROOT, Source, c_files, python_files

Rule = Callable[[Source], list[str]]


@pytest.mark.parametrize("rule", style.PRODUCT, ids=lambda rule: rule.__name__)
def test_product(rule: Rule, product: list[Source]) -> None:
    assert [line for source in product for line in rule(source)] == []


@pytest.mark.parametrize("rule", style.TESTS, ids=lambda rule: rule.__name__)
def test_tests(rule: Rule, checks: list[Source]) -> None:
    assert [line for source in checks for line in rule(source)] == []


def test_c_files_stay_short() -> None:
    files = c_files(ROOT)
    assert files
    assert [line for source in files for line in style.sizes(source, style.MAX_C)] == []


def test_print_the_median(product: list[Source], record_property: Callable[[str, object], None]) -> None:
    sizes = [source.lines for source in product if source.text.strip()]
    median = statistics.median(sizes)
    record_property("median_lines", median)
    print(f"median {median:.0f} lines in {len(sizes)} files, largest {max(sizes)}")
    assert median <= 200


HEAD = '"""What it is for."""\n\nfrom __future__ import annotations\n\n'


@pytest.mark.parametrize(("rule", "text"), [
    (style.sizes, "x = 1\n" * 401),
    (style.no_print, "def f():\n    print('x')\n"),
    (style.no_star_import, "from os import *\n"),
    (style.future_annotations, '"""Doc."""\nimport os\n'),
    (style.module_docstring, "x = 1\n"),
    (style.module_docstring, '""""""\n'),
    (style.module_docstring, '"""One.\n' + "More.\n" * 5 + '"""\n'),
    (style.docstrings, "def public():\n    pass\n"),
    (style.docstrings, 'def public():\n    """Nope"""\n'),
    (style.docstrings, "class Public:\n    pass\n"),
    (style.docstrings, "class Public(Base):\n    def f(self):\n        pass\n"),
    (style.docstrings, 'class Public:\n    """Say it."""\n    def long(self):\n' + "        x = 1\n" * 8),
    (style.module_state, "cache = {}\n"),
    (style.module_state, "_seen: set[int] = set()\n"),
    (style.module_state, "queue = collections.deque()\n"),
    (style.module_state, "names = [n for n in 'ab']\n"),
    (style.module_state, "TABLE = {}\ndef f():\n    TABLE['x'] = 1\n"),
    (style.module_state, "TABLE = []\ndef f():\n    TABLE.append(1)\n"),
    (style.module_state, "TABLE = []\nTABLE += [1]\n"),
    (style.module_state, "TABLE = {}\ndef f():\n    del TABLE['x']\n"),
    (style.module_state, "count = 0\ndef f():\n    global count\n"),
    (style.skips_have_reasons, "pytest.skip()\n"),
    (style.skips_have_reasons, "pytest.skip('')\n"),
    (style.skips_have_reasons, "@pytest.mark.skip\ndef test_x(): pass\n"),
    (style.skips_have_reasons, "@pytest.mark.skipif(True)\ndef test_x(): pass\n"),
    (style.skips_have_reasons, "pytest.importorskip('kvm')\n"),
    (style.skips_have_reasons, "@pytest.mark.xfail\ndef test_x(): pass\n@pytest.mark.xfail()\ndef test_y(): pass\n"),
])
def test_faults_are_found(rule: Rule, text: str) -> None:
    assert len(rule(Source("core/planted.py", text))) == 1


@pytest.mark.parametrize("text", [
    "",
    HEAD + "TABLE = {'a': 1}\nVALUE: list[int] = [1, 2]\n__all__ = ['x']\n",
    HEAD + 'class Short(Base):\n    x = 1\n\n\ndef f():\n    """Do it.\n\n    More.\n    """\n',
    HEAD + 'def _private(items):\n    items.append(1)\n    items["x"] = 2\n',
    '"""Prose.\n\n' + "    a drawing\n" * 20 + '"""\n',
])
def test_good_files_pass(text: str) -> None:
    source = Source("core/planted.py", text)
    assert [line for rule in style.PRODUCT for line in rule(source)] == []


def test_a_device_need_not_describe_the_contract_again() -> None:
    method = "    def on_queue(self):\n" + "        x = 1\n" * 8
    text = f'class Rng(DeviceBase):\n    """Serves it."""\n{method}'
    assert style.docstrings(Source("devices/virtio/rng.py", text)) == []
    assert len(style.docstrings(Source("devices/worker.py", text))) == 1


def test_skips_with_reasons_pass() -> None:
    text = ("pytest.skip('no /dev/kvm')\npytest.skip(reason='iasl missing: apt-get install acpica-tools')\n"
            "pytest.mark.skipif(True, reason='no tap device')\npytest.skip(f'{tool} is missing')\n")
    assert style.skips_have_reasons(Source("tests/planted.py", text)) == []


def test_planted_file_is_seen(tmp_path: Path) -> None:
    (tmp_path / "core" / "deep").mkdir(parents=True)
    (tmp_path / "core" / "deep" / "bad.py").write_text("print(1)\n")
    (tmp_path / "core" / "x.c").write_text("int x;\n" * 601)
    sources = python_files(tmp_path, "core")
    assert [source.module for source in sources] == ["cellvisor.core.deep.bad"]
    assert style.no_print(sources[0]) == ["core/deep/bad.py:1: print outside ctl"]
    assert len([line for source in c_files(tmp_path) for line in style.sizes(source, style.MAX_C)]) == 1
