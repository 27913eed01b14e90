# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The command ``qcow`` (also ``qemu-img``): dispatch and exit statuses.

Invariant: whatever happens, the user sees one clear line and a documented
exit status, never a traceback (``QCOW_DEBUG=1`` shows it).  Only the module of
the wanted subcommand is imported.
"""

from __future__ import annotations

import os
import sys

from qcowlib.cli.console import Console, Failure, usage_failure
from qcowlib.cli.parser import Args, HelpWanted, Option, Scanner, Wrong, parse, wrong_option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    from qcowlib.cli.parser import Command

    class CommandModule(Protocol):
        """What each module of a subcommand has."""

        COMMAND: Command
        run: Callable[[Args, Console], int]


__all__ = ["COMMANDS", "command_module", "entry", "main"]

#: Subcommands in the order of the help.
COMMANDS = (
    "amend",
    "apply",
    "backup",
    "backup-set",
    "bench",
    "bitmap",
    "chain",
    "check",
    "commit",
    "compact",
    "compare",
    "convert",
    "create",
    "dd",
    "demo",
    "diff",
    "info",
    "map",
    "measure",
    "merge",
    "overlay",
    "rebase",
    "resize",
    "restore",
    "salvage",
    "seal",
    "serve",
    "snapshot",
    "verify",
)

INTERRUPTED = 130

_GLOBAL = (
    Option("h", "help", "help", "show this help"),
    Option("V", "version", "version", "show the version"),
    Option("T", "trace", "trace", "accepted for compatibility", meta="PATTERN"),
)


def entry() -> int:
    """Run the command with the arguments of the process; returns the exit status."""
    prog = os.environ.get("QEMU_IMG_NAME") or os.path.basename(sys.argv[0])
    if prog in ("__main__.py", "-m", ""):
        prog = "qcow"
    return main(sys.argv[1:], prog)


def main(argv: Sequence[str], prog: str = "qcow") -> int:
    """Run one command line under the name *prog*; returns the exit status.

    0 success, 1 failure (``check`` and ``compare`` have more), 130 interrupted.
    """
    console = Console(prog)
    try:
        status = _guarded(argv, console)
    except KeyboardInterrupt:
        status = INTERRUPTED
    try:
        console.flush()
    except OSError as error:
        console.error(f"cannot write standard output: {error.strerror}")
        return status or 1
    return status


def _guarded(argv: Sequence[str], console: Console) -> int:
    try:
        return _run(argv, console)
    except Failure as failure:
        return console.fail(failure)
    except BrokenPipeError:
        return 1
    except MemoryError:
        console.error("out of memory")
    except OSError as error:
        console.error(_os_text(error), _hint(error))
    except Exception as error:
        _internal(error, console)
    return 1


def _os_text(error: OSError) -> str:
    from qcowlib.errors import Error

    if isinstance(error, Error):
        return str(error)
    text = error.strerror or str(error)
    return f"{error.filename}: {text}" if error.filename is not None else text


def _hint(error: Exception) -> str:
    hint = getattr(error, "hint", None)
    return f"{hint}\n" if hint else ""


def _internal(error: Exception, console: Console) -> None:
    from qcowlib.errors import Error

    if os.environ.get("QCOW_DEBUG") == "1":
        import traceback

        console.err(traceback.format_exc())
    if isinstance(error, Error):
        console.error(str(error), _hint(error))
    else:
        console.error(f"internal error: {type(error).__name__}: {error}", "Run again with QCOW_DEBUG=1 for details.\n")


def _run(argv: Sequence[str], console: Console) -> int:
    from_scan = Scanner([console.prog, *argv], _GLOBAL, leading=True)
    try:
        for option, _text in from_scan:
            if option.name == "help":
                return _help(None, console)
            if option.name == "version":
                return _version(console)
    except Wrong as wrong:
        raise wrong_option(wrong) from None
    words = from_scan.operands
    if not words:
        raise usage_failure("Not enough arguments")
    if words[0] not in COMMANDS:
        raise usage_failure(f"Command not found: {words[0]}")
    module = command_module(words[0])
    try:
        words, last = _resize_size(words)
        args = parse(module.COMMAND, words, console)
    except HelpWanted:
        return _help(module.COMMAND, console)
    args.operands += last
    return module.run(args, console)


def _resize_size(words: list[str]) -> tuple[list[str], list[str]]:
    """Take off the last word of ``resize``, so that ``-1G`` is a size and not an option."""
    if words[0] != "resize" or words[-1] in ("-h", "--help"):
        return words, []
    if len(words) < 3:
        raise usage_failure("Not enough arguments")
    return words[:-1], words[-1:]


def command_module(name: str) -> CommandModule:
    """Import and return the module of subcommand *name*."""
    # __import__ and not importlib, which is not loaded at start.
    module: CommandModule = getattr(__import__("qcowlib.cli", fromlist=[_file_name(name)]), _file_name(name))
    return module


def _file_name(name: str) -> str:
    return f"cmd_{name.replace('-', '_')}"


def _help(command: Command | None, console: Console) -> int:
    from qcowlib.cli import helptext

    console.out(helptext.render(command, console.prog))
    return 0


def _version(console: Console) -> int:
    from qcowlib.cli import helptext

    console.out(helptext.version(console.prog))
    return 0
