"""The documentation: its examples run, its loss pages are complete, its links lead somewhere.

Every ```python block of docs/**/*.md and README.md runs; the blocks of a page share their names.
What a block prints has to stand in the comments behind its prints, in order:

    print(loss.item())  # 0.5375...

`...` stands for anything. Comments directly below a print are its further output.

A block that imports a package of OPTIONAL runs where that is installed, and is only compiled
elsewhere.
"""

from __future__ import annotations

import contextlib
import doctest
import functools
import importlib.util
import inspect
import io
import json
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import mlloss_cuda

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"]
BLOCK = re.compile(r"^```python[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<url>[^)\s]+)\)")
HEADING = re.compile(r"^#+ +(?P<title>.+?) *$", re.MULTILINE)
OPTIONAL = {"lightning"}  # that pages show, and development does not need

OUTPUT_CHECKER = doctest.OutputChecker()
OUTPUT_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=page_name)


def losses() -> dict[str, Callable[..., Any]]:
    """The public functions that take logits, or the like, and a target."""
    found = {}
    for name in mlloss_cuda.__all__:
        member = getattr(mlloss_cuda, name)
        if not inspect.isfunction(member):
            continue
        parameters = inspect.signature(member).parameters
        if "target" in parameters and "hidden" not in parameters:
            found[name] = member
    return found


LOSSES = losses()


def load(name: str) -> ModuleType:
    """Import docs/<name>.py, which is in no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expected_output(code: str) -> str:
    """The comments behind prints and in the lines directly below them."""
    lines: list[str] = []
    printing = False  # whether the last statement is a print
    starting = True  # whether the next token is the first one of a statement
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            if printing:
                lines.append(token.string.removeprefix("#").strip())
        elif token.type == tokenize.NEWLINE:
            starting = True
        elif token.type == tokenize.NL and not token.line.strip():
            printing = False
        elif token.type not in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT) and starting:
            printing = token.string == "print"
            starting = False
    return "".join(f"{line}\n" for line in lines)


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("print(1)  # 1\n", "1\n"),
        ("x = 1  # one\nprint(x)  # 1\n# 2\ny = 2\n# three\n", "1\n2\n"),
        ("if x:\n    print(1)  # 1\n# 2\n", "1\n2\n"),
        ("for x in y:\n    print(x)\n# 1\n# 2\n\nx = 1\n", "1\n2\n"),
        ("print(1)  # 1\n\n# two\nprint(2)  # 2\n", "1\n2\n"),
        ("# nothing\nprint(1)\n", ""),
    ],
)
def test_expected_output(code: str, output: str) -> None:
    assert expected_output(code) == output


def can_run(code: str) -> bool:
    """Whether the packages of OPTIONAL that a block imports are installed."""
    imported = re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)
    return all(importlib.util.find_spec(name) is not None for name in OPTIONAL & {*imported})


def test_blocks_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "OPTIONAL", {"no_such_package", "json"})
    assert can_run("import json\nimport other\n")
    assert can_run("text = 'no_such_package'\n")
    assert not can_run("import json\n\nfrom no_such_package import name\n")


@pytest.fixture
def light_compile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace, but generate no code: that takes a compiler and many seconds."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


@every_page
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_python_blocks(page: Path, light_compile: None) -> None:
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in BLOCK.finditer(text):
            # Line numbers in errors are those of the page.
            first_line = text[: block.start("code")].count("\n")
            code = compile("\n" * first_line + block["code"], str(page), "exec")
            if not can_run(block["code"]):
                continue
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, namespace)
            want, got = expected_output(block["code"]), printed.getvalue()
            assert OUTPUT_CHECKER.check_output(want, got, OUTPUT_FLAGS), (
                f"{page_name(page)}:{first_line}: the comments say\n{want}\nbut it prints\n{got}"
            )


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_has_a_complete_page(name: str) -> None:
    loss = LOSSES[name]
    page = DOCS / "losses" / f"{loss.__name__}.md"  # an alias is on the page of the loss
    text = page.read_text(encoding="utf-8")
    for wanted in (name, *inspect.signature(loss).parameters):
        assert f"`{wanted}`" in text, f"{page_name(page)} does not mention `{wanted}`"
    table = text.partition("\n## Arguments\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", table, re.MULTILINE)
    documented = [argument for row in rows for argument in re.findall(r"`(\w+)`", row)]
    assert sorted(documented) == sorted(inspect.signature(loss).parameters)


@pytest.mark.parametrize("name", LOSSES)
def test_documented_defaults(name: str) -> None:
    """The second column of the table of arguments holds the defaults."""
    loss = LOSSES[name]
    text = (DOCS / "losses" / f"{loss.__name__}.md").read_text(encoding="utf-8")
    for argument, parameter in inspect.signature(loss).parameters.items():
        if parameter.default is inspect.Parameter.empty:
            continue
        row = re.search(rf"^\| [^|]*`{argument}`[^|]* \| `([^`|]+)` \|", text, re.MULTILINE)
        assert row is not None, f"no default for {argument}"
        assert row[1] == repr(parameter.default)


def anchors(page: Path) -> set[str]:
    """The anchors that mkdocs and code hosts give to headings."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    found = set()
    for heading in HEADING.finditer(text):
        plain = re.sub(r"[^\w\s-]", "", heading["title"].replace("`", "")).strip().lower()
        found.add(re.sub(r"\s", "-", plain))
    return found


@every_page
def test_internal_links(page: Path) -> None:
    for link in LINK.finditer(FENCED.sub("", page.read_text(encoding="utf-8"))):
        url = link["url"]
        if re.match(r"[a-z]+:", url):
            continue
        path, _, anchor = url.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{page_name(page)}: no file {url}"
        if DOCS in page.parents:
            assert DOCS in target.parents, f"{page_name(page)}: {url} is not in the site"
        if anchor:
            assert anchor in anchors(target), f"{page_name(page)}: no heading {url}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_every_public_name_is_in_the_api() -> None:
    """mkdocstrings fails on names that do not exist; this finds those that are left out."""
    text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    listed = set(re.findall(r"^::: mlloss_cuda\.(?:\w+\.)*(\w+)$", text, re.MULTILINE))
    for name in mlloss_cuda.__all__:
        member = getattr(mlloss_cuda, name)
        assert name in listed or getattr(member, "__name__", name) in listed, name


CELL = {
    "loss": "dice_loss",
    "target": "bool",
    "mask": "none",
    "dtype": "float32",
    "backend": "cpu",
    "ok": True,
}


def support_tables(tmp_path: Path, cells: list[dict[str, Any]], complete: bool = True) -> str:
    path = tmp_path / "support.json"
    results = {"cells": cells, "torch": "2.99", "version": "9.8", "complete": complete}
    path.write_text(json.dumps(results), encoding="utf-8")
    return load("support_table").support_tables(path)


def test_support_tables_count_combinations(tmp_path: Path) -> None:
    cells = [CELL, CELL | {"mask": "packed"}, CELL | {"target": "packed"}]
    text = support_tables(tmp_path, cells)
    assert "mlloss_cuda 9.8 under torch 2.99: 3 combinations, 3 of them passed" in text
    assert "| loss | bool | packed |" in text
    assert "| `dice_loss` | 2/2 | 1/1 |" in text
    assert "masks `none`, `packed` and the dtypes `float32`" in text
    assert "warning" not in text
    assert "## CUDA kernels on a GPU\n\nNot run." in text


def test_support_tables_name_failures(tmp_path: Path) -> None:
    cells = [CELL, CELL | {"mask": "packed", "ok": False}, CELL | {"loss": "b", "target": "int8"}]
    text = support_tables(tmp_path, cells)
    assert "| `dice_loss` | **1/2** | - |" in text
    assert "- `dice_loss`, target bool, mask packed, float32" in text


def test_support_tables_admit_what_is_missing(tmp_path: Path) -> None:
    assert "Incomplete" in support_tables(tmp_path, [CELL], complete=False)
    missing = load("support_table").support_tables(tmp_path / "nothing.json")
    assert "No results" in missing
    assert "`make test`" in missing


def test_support_page_holds_the_marker() -> None:
    hook = load("support_table")
    page = (DOCS / "support.md").read_text(encoding="utf-8")
    assert page.count(hook.MARKER) == 1
    assert hook.MARKER not in hook.on_page_markdown(page)
    assert hook.on_page_markdown("text") == "text"


def test_docstrings_become_markdown() -> None:
    pytest.importorskip("griffe", reason="the documentation's packages are not installed")
    as_markdown = load("docstrings").as_markdown
    assert as_markdown("See :func:`~a.b` and :class:`C`.") == "See `a.b` and `C`."
    example = "Text.\n\n    >>> f(\n    ...     1)\n    1\n\nMore.\n"
    fenced = "Text.\n\n    ```pycon\n    >>> f(\n    ...     1)\n    1\n    ```\n\nMore.\n"
    assert as_markdown(example) == fenced
