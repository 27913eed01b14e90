# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Writes docs/api.md from the signatures and docstrings of the source; nothing is imported.

Usage: ``python docs/make_api.py [--check]``.

Invariant: the text depends on the source alone, so that a test can tell whether
the file is current.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs/api.md"

_WIDTH = 100

# Modules whose own text says what their names leave out.
_WITH_TEXT = ("jobs/convert.py", "jobs/backup.py", "driver.py")

Function = ast.FunctionDef | ast.AsyncFunctionDef

HEAD = """\
# API reference

Made from the docstrings by `python docs/make_api.py`; do not edit. The [guide](guide/README.md) has the examples.
Offsets, lengths and sizes are in bytes. Everything in the first two sections can be imported from `qcowlib` itself.
"""


class Section(NamedTuple):
    """A heading, and the names of one module after another: ``{module: names}``; no names: all of ``__all__``."""

    title: str
    text: str
    modules: dict[str, tuple[str, ...]]


SECTIONS = (
    Section(
        "Images and jobs",
        "",
        {
            "image.py": ("open", "Image", "OpenImage"),
            "jobs/creation.py": ("create", "NewOptions"),
            "jobs/convert.py": ("convert",),
            "jobs/compare.py": ("compare", "Comparison"),
            "jobs/measure.py": ("measure", "Measurement"),
            "jobs/dd.py": ("dd",),
            "jobs/commit.py": ("commit",),
            "jobs/compact.py": ("compact", "plan_compact", "CompactPlan"),
            "jobs/merge.py": ("merge", "plan_merge"),
            "jobs/merge_plan.py": ("MergePlan", "MergeSource"),
            "jobs/rebase.py": ("rebase", "flatten"),
            "jobs/backup.py": ("backup", "restore", "measure_backup", "plan_restore", "RestorePlan"),
            "inspection.py": ("inspect", "Inspection", "Finding", "StreamReader"),
            "jobs/backup_set.py": ("backup_set", "restore_set", "finish_set", "DiskBackup", "DiskRestore"),
            "jobs/diff.py": ("diff", "Change", "diff_overlay"),
            "jobs/diff_stream.py": ("write_diff", "apply", "read_diff", "Applied"),
            "jobs/salvage.py": ("salvage", "Salvaged", "Lost"),
            "jobs/seal.py": (
                "seal",
                "Sealed",
                "verify",
                "Verified",
                "Damage",
                "heal",
                "diff_seals",
                "plan_seal",
                "plan_verify",
            ),
            "jobs/many.py": ("many", "Outcome", "images_in", "create_overlays", "plan_overlays", "OverlaysPlan"),
            "nbd/server.py": ("serve", "NbdServer"),
            "nbd/export.py": ("Export",),
            "picture/survey.py": ("survey",),
            "picture/panels.py": ("Picture", "Panel", "Category"),
            "picture/svg.py": ("svg",),
            "picture/page.py": ("page",),
            "picture/heat.py": ("heat",),
            "picture/tree.py": ("chain_tree", "ChainTree", "ChainNode"),
            "gate.py": ("deny_all", "qemu_like", "same_directory", "directories"),
        },
    ),
    Section("Errors", "", {"errors.py": ()}),
    Section(
        "What calls return and take",
        "",
        {
            "driver.py": ("Extent", "Snapshot", "Bitmap"),
            "info.py": ("ImageInfo",),
            "qcow2/check.py": ("Report",),
            "qcow2/references.py": ("Finding",),
            "qcow2/create.py": ("Encryption",),
            "luks.py": ("KeyChange",),
            "qcow2/amend.py": ("AmendOptions",),
            "gate.py": ("References", "FileName", "parse_name", "resolve_name"),
            "jobs/pipeline.py": ("Control",),
            "crypto.py": ("Secret",),
            "_extent.pyi": ("RunList",),
        },
    ),
    Section(
        "asyncio",
        "The jobs of `qcowlib` are here too, each as an awaitable that runs in one thread of the loop's executor.",
        {"aio.py": ()},
    ),
    Section("fsspec", "In `qcowlib.fs`, with the extra `fsspec`.", {"fs.py": ()}),
    Section(
        "Storage",
        "",
        {
            "storage/base.py": (),
            "storage/file.py": ("FileStorage",),
            "storage/memory.py": (),
            "storage/view.py": ("StorageView",),
            "storage/linear.py": (),
            "storage/reader.py": (),
        },
    ),
    Section(
        "Testing",
        "",
        {
            "testing/conformance.py": (),
            "testing/recorder.py": (),
            "testing/crash.py": (),
            "testing/model.py": (),
            "testing/faults.py": (),
            "testing/hostile.py": (),
            "testing/sim.py": (),
            "testing/reference.py": (),
            "testing/strategies.py": (),
            "testing/tiny.py": (),
        },
    ),
)


def main() -> int:
    """Write the file, or with ``--check`` say whether it is current."""
    text = render()
    if "--check" in sys.argv[1:]:
        current = TARGET.is_file() and TARGET.read_text() == text
        if not current:
            sys.stderr.write("docs/api.md is not current: run python docs/make_api.py\n")
        return 0 if current else 1
    TARGET.write_text(text)
    return 0


def render() -> str:
    """Return the whole text."""
    lines = [HEAD]
    for section in SECTIONS:
        lines.append(f"\n## {section.title}\n")
        if section.text:
            lines.append(f"{section.text}\n")
        for file, names in section.modules.items():
            lines.extend(_module(file, names, overview=not names or file in _WITH_TEXT))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _module(file: str, names: tuple[str, ...], *, overview: bool) -> Iterator[str]:
    tree = ast.parse((ROOT / "qcowlib" / file).read_text())
    name = "qcowlib." + re.sub(r"\.pyi?$", "", file).replace("/", ".")
    if overview:
        yield f"### {name}\n"
        yield _prose(ast.get_docstring(tree) or "") + "\n"
    found = dict(_definitions(tree))
    for wanted in names or _exported(tree):
        if wanted in found:
            yield from _entry(name, wanted, found[wanted])


def _definitions(tree: ast.Module) -> Iterator[tuple[str, tuple[ast.stmt, str]]]:
    """Yield each definition at the top, also in ``if``, with its docstring."""
    body: list[ast.stmt] = []
    for node in tree.body:
        body += node.body + node.orelse if isinstance(node, ast.If) else [node]
    for index, node in enumerate(body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, (node, ast.get_docstring(node) or "")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            after = body[index + 1] if index + 1 < len(body) else None
            if isinstance(target, ast.Name):
                yield target.id, (node, _string(after))


def _string(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return node.value.value
    return ""


def _exported(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return [str(name) for name in ast.literal_eval(node.value)]
    return []


def _entry(module: str, name: str, found: tuple[ast.stmt, str]) -> Iterator[str]:
    node, text = found
    yield f"#### {name}\n"
    if isinstance(node, ast.ClassDef):
        yield from _class(module, node, text)
        return
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        code = _call(node)
    elif isinstance(node, ast.AnnAssign):
        code = f"{name}: {ast.unparse(node.annotation)}"
    else:
        code = ast.unparse(node)
    yield f"```text\n{code}\n```\n"
    yield f"In `{module}`. {_prose(text)}\n"


def _class(module: str, node: ast.ClassDef, text: str) -> Iterator[str]:
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    yield f"```text\nclass {node.name}{f'({bases})' if bases else ''}\n```\n"
    yield f"In `{module}`. {_prose(text)}\n"
    fields = [
        f"{item.target.id}: {ast.unparse(item.annotation)}" + (f" = {ast.unparse(item.value)}" if item.value else "")
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not item.target.id.startswith("_")
    ]
    if fields:
        yield "```text\n" + "\n".join(fields) + "\n```\n"
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
    for method in methods:
        special = method.name.startswith("_") and not (method.name == "__init__" and len(method.args.args) > 1)
        tests = method.name.startswith("test_")
        if special or (module.endswith(("image", "aio")) and method.name == "__init__"):
            continue
        doc = ast.get_docstring(method) or ""
        if not tests and (doc or method.name == "__init__" or module.endswith(".base")):
            yield f"* `{_signature(method)}`" + (f"<br>{_item(doc)}" if doc else "")
    tests = [method.name for method in methods if method.name.startswith("test_")]
    if tests:
        yield "\nTests: " + ", ".join(f"`{name}`" for name in tests)
    yield ""


def _signature(node: Function) -> str:
    """Return the call as a reader writes it; properties without parentheses."""
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    if "property" in decorators:
        return node.name + returns.replace(" ->", ":")
    word = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    return f"{word}{node.name}({', '.join(_arguments(node.args))}){returns}"


def _arguments(args: ast.arguments) -> Iterator[str]:
    """Yield the arguments but ``self`` and ``cls``, each with annotation and default."""
    plain = args.posonlyargs + args.args
    defaults = [None] * (len(plain) - len(args.defaults)) + list(args.defaults)
    for argument, default in zip(plain, defaults, strict=True):
        if argument.arg not in ("self", "cls"):
            yield _argument(argument, default)
    if args.vararg is not None:
        yield "*" + _argument(args.vararg, None)
    elif args.kwonlyargs:
        yield "*"
    for argument, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        yield _argument(argument, default)
    if args.kwarg is not None:
        yield "**" + _argument(args.kwarg, None)


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    text = argument.arg if argument.annotation is None else f"{argument.arg}: {ast.unparse(argument.annotation)}"
    if default is None:
        return text
    return f"{text} = {ast.unparse(default)}" if argument.annotation is not None else f"{text}={ast.unparse(default)}"


def _call(node: Function) -> str:
    """Return the signature over as many lines as it needs."""
    text = _signature(node)
    if len(text) <= _WIDTH:
        return text
    head, tail = text.split("(", 1)[0], text[text.rindex(") -> ") :] if node.returns is not None else ")"
    return "\n".join([f"{head}(", *(f"    {argument}," for argument in _arguments(node.args)), tail])


_ROLE = re.compile(r":\w+:`([^`]+)`")


def _inline(text: str) -> str:
    text = _ROLE.sub(lambda match: f"`{_short(match.group(1))}`", text)
    return text.replace("``", "`")


def _short(target: str) -> str:
    return target[1:].rsplit(".", 1)[-1] if target.startswith("~") else target.lstrip(".")


def _item(text: str) -> str:
    """Return a docstring as one line of a list."""
    return " ".join(_inline(text).split())


def _prose(text: str) -> str:
    """Return a docstring as Markdown: tables and literal blocks become blocks."""
    out: list[str] = []
    lines = text.splitlines()
    index = 0
    while index < len(lines):
        line = lines[index]
        if re.match(r"=+ =+", line):
            end = max(number for number in range(index, len(lines)) if re.match(r"=+ =+", lines[number]))
            out += ["```text", *lines[index + 1 : end], "```"]
            index = end + 1
        elif line.endswith("::"):
            end = index + 1
            while end < len(lines) and (not lines[end].strip() or lines[end].startswith("    ")):
                end += 1
            code = [row[4:] for row in lines[index + 1 : end]]
            out += [_inline(line[:-1]), "", "```text", *_strip(code), "```", ""]
            index = end
        else:
            out.append(_inline(line))
            index += 1
    return "\n".join(out)


def _strip(lines: list[str]) -> list[str]:
    return "\n".join(lines).strip("\n").splitlines()


if __name__ == "__main__":
    sys.exit(main())
