# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The rules of the house that a machine can hold: sizes, headers, imports of compiled code, words."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.bare

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("qcowlib", "storage_pool", "spm")

MAX_FUNCTION = 70
MAX_LINES = {".py": 600, ".pyx": 1200, ".pxd": 300, ".pyi": 300}

HEADER = ("SPDX-FileCopyrightText: 2026 The qcowlib authors", "SPDX-License-Identifier: Apache-2.0")
SOURCE_SUFFIXES = (".py", ".pyx", ".pxd", ".pyi", ".sh")

# A compiled module may cimport those before it; modules of one line do not know each other.
CIMPORT_ORDER = (
    {"_ondisk"},
    {"_extent"},
    {"_io", "_codec", "_deflate", "_crypt"},
    {"_build", "_refcount", "_references", "_relocate", "_runs", "_scan", "_survey"},
    {"_cluster"},
    {"_chain"},
)
CIMPORT_OUTSIDE = ("cython", "cpython", "libc", "posix")


def tracked() -> list[Path]:
    """Return the files of the project: what git tracks, or would."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout.decode().split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


FILES = tracked()
SOURCES = [path for path in FILES if path.suffix in SOURCE_SUFFIXES or path.name == "run"]
PYTHON = [path for path in FILES if path.suffix == ".py"]
PRODUCT = [path for path in PYTHON if path.relative_to(ROOT).parts[0] in PACKAGES]
CYTHON = [path for path in FILES if path.suffix == ".pyx"]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def is_test_support(path: Path) -> bool:
    return "testing" in path.relative_to(ROOT).parts


def test_source_files_exist_where_the_rules_look() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in PRODUCT} == set(PACKAGES)
    assert CYTHON


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_file_starts_with_spdx_header(path: Path) -> None:
    head = path.read_text().splitlines()[:4]
    for line in HEADER:
        assert any(line in text for text in head), f"{relative(path)}: no line '{line}' at its start"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.suffix in MAX_LINES], ids=relative)
def test_file_is_not_too_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES[path.suffix]


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_python_function_is_not_too_long(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{relative(path)}:{node.lineno}: {node.name} has {length} lines"


def cython_functions(text: str) -> list[tuple[int, int]]:
    """Return (first line, number of lines) of each function of Cython source *text*."""
    lines = text.splitlines()
    found = []
    for number, line in enumerate(lines):
        match = re.match(r"(\s*)(?:async def|def|cpdef|cdef|cdef inline)\b[^=]*\(", line)
        if match is None or line.lstrip().startswith("cdef extern"):
            continue
        indent = len(match.group(1))
        last = number
        for after in range(number + 1, len(lines)):
            body = lines[after]
            if body.strip() and len(body) - len(body.lstrip()) <= indent and not body.lstrip().startswith(")"):
                break
            if body.strip():
                last = after
        found.append((number + 1, last - number + 1))
    return found


@pytest.mark.parametrize("path", CYTHON, ids=relative)
def test_cython_function_is_not_too_long(path: Path) -> None:
    for line, length in cython_functions(path.read_text()):
        assert length <= MAX_FUNCTION, f"{relative(path)}:{line}: {length} lines"


def imported_names(text: str) -> list[tuple[str, str]]:
    """Return (verb, module) of each import and cimport line of Cython source *text*."""
    return [
        (match.group(2) or match.group(3), match.group(1) or match.group(4))
        for match in re.finditer(r"^\s*(?:from\s+(\S+)\s+(c?import)|(c?import)\s+(\S+))\b", text, re.MULTILINE)
    ]


@pytest.mark.parametrize("path", [*CYTHON, *(p for p in FILES if p.suffix == ".pxd")], ids=relative)
def test_compiled_module_imports_only_what_lies_below(path: Path) -> None:
    rank = next((rank for rank, names in enumerate(CIMPORT_ORDER) if path.stem in names), None)
    assert rank is not None, f"give {path.stem} a place in CIMPORT_ORDER"
    below = set().union(*CIMPORT_ORDER[:rank]) | {path.stem}
    for verb, module in imported_names(path.read_text()):
        if module.startswith("qcowlib."):
            name = module.removeprefix("qcowlib.")
            allowed = below if verb == "cimport" else {"errors"}
            assert name in allowed, f"{relative(path)}: {verb} of {module}"
        elif verb == "cimport":
            assert module.split(".")[0] in CIMPORT_OUTSIDE, f"{relative(path)}: cimport of {module}"


@pytest.mark.parametrize("path", CYTHON, ids=relative)
def test_compiled_module_has_stub_and_stays_behind_the_door(path: Path) -> None:
    assert path.with_suffix(".pyi").is_file()
    pattern = re.compile(rf"^\s*(from\s+qcowlib\.{path.stem}\b|import\s+qcowlib\.{path.stem}\b)", re.MULTILINE)
    importers = [relative(other) for other in PRODUCT if pattern.search(other.read_text())]
    assert importers in ([], ["qcowlib/native.py"])


@pytest.mark.parametrize("path", PRODUCT, ids=relative)
def test_module_and_its_public_names_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{relative(path)} has no docstring"
    public = exported(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name in public:
            assert ast.get_docstring(node), f"{relative(path)}:{node.lineno}: {node.name} has no docstring"


def exported(tree: ast.Module) -> set[str]:
    """Return the names in the module's ``__all__``."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return set(ast.literal_eval(node.value))
    return set()


@pytest.mark.parametrize("path", [path for path in PRODUCT if not is_test_support(path)], ids=relative)
def test_product_has_no_assert(path: Path) -> None:
    lines = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
    assert not lines, f"{relative(path)}: assert in lines {lines}"


FORBIDDEN = {
    "unfinished work": re.compile(r"\b(TODO|FIXME|XXX|HACK)\b"),
    "a path of one machine": re.compile(r"(?<![\w.])/(work|root|home)/"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what: str) -> None:
    for path in FILES:
        if path == Path(__file__).resolve() or path.suffix not in (*SOURCE_SUFFIXES, ".md", ".toml", ".txt"):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not FORBIDDEN[what].search(line), f"{relative(path)}:{number}: {what}: {line.strip()}"


def test_no_test_is_skipped_or_expected_to_fail() -> None:
    words = re.compile(
        r"pytest\.(skip|xfail|importorskip)|mark\.(skip|skipif|xfail)\b|unittest\.skip|@reproduce_failure"
    )
    for path in PYTHON:
        if path.relative_to(ROOT).parts[0] in ("tests", "bench") and path != Path(__file__).resolve():
            assert not words.search(path.read_text()), f"{relative(path)} skips or expects failure"


def test_test_that_starts_a_real_program_says_so() -> None:
    program = re.compile(r"[\"'](qemu-img|qemu-io|qemu-nbd|nbdkit|lvm|sanlock|mke2fs)[\"']")
    for path in PYTHON:
        text = path.read_text()
        if (
            path.name.startswith("test_")
            and path.relative_to(ROOT).parts[0] == "tests"
            and path != Path(__file__).resolve()
        ):
            named = set(program.findall(text))
            if named and re.search(r"subprocess|shutil\.which|Popen", text):
                assert re.search(r"mark\.real\(", text), (
                    f"{relative(path)} uses {sorted(named)} without pytest.mark.real"
                )
