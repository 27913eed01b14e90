# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What ``--help`` and ``--version`` print.

Invariant: help is made from the option tables that the parser uses, so it
cannot name an option that does not exist.
"""

from __future__ import annotations

from qcowlib.cli import main
from qcowlib.cli.names import FORMATS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcowlib.cli.parser import Command, Option

__all__ = ["render", "version"]

COPYRIGHT = "Copyright (c) 2026 the qcowlib authors; licensed under Apache-2.0"


def version(prog: str) -> str:
    """Return the two lines of ``--version``."""
    return f"{prog} version {_number()}\n{COPYRIGHT}\n"


def _number() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return f"{installed('qcowlib')} (qcowlib)"
    except PackageNotFoundError:
        return "(qcowlib, not installed)"


def render(command: Command | None, prog: str) -> str:
    """Return the help of *command*, or of the program if None."""
    return _program(prog) if command is None else _command(command, prog)


def _program(prog: str) -> str:
    lines = [
        f"usage: {prog} [standard options] command [command options]",
        "QCOW2 and raw disk image utility",
        "",
        "    '-h', '--help'       display this help and exit",
        "    '-V', '--version'    output version information and exit",
        "    '-T', '--trace'      accepted for compatibility, no effect",
        "",
        "Command syntax:",
    ]
    commands = [main.command_module(name).COMMAND for name in main.COMMANDS]
    lines += [f"  {c.name} {_usage(c)}" for c in commands]
    lines += ["", "Commands:"]
    lines += [f"  {c.name:10} {c.summary}" for c in commands]
    lines += [
        "",
        f"'{prog} COMMAND --help' explains the options of one command.",
        "Sizes are bytes; suffixes k, M, G, T, P and E are powers of 1024.",
        "",
        f"Supported formats: {' '.join(sorted((*FORMATS, 'file', 'luks')))}",
    ]
    return "\n".join(lines) + "\n"


def _command(command: Command, prog: str) -> str:
    lines = [f"usage: {prog} {command.name} {_usage(command)}", "", command.summary, "", "Options:"]
    for option in command.options:
        names = _names(option)
        lines.append(f"  {names:28} {option.text}" if len(names) <= 28 else f"  {names}\n{'':31}{option.text}")
    lines += ["", "Example:", f"  {prog} {command.example}"]
    return "\n".join(lines) + "\n"


def _names(option: Option) -> str:
    short = f"-{option.short}" if option.short else ""
    long = f"--{option.long}" if option.long else ""
    names = ", ".join(n for n in (short, long) if n)
    if not option.meta:
        return names
    return f"{names}={option.meta}" if long else f"{names} {option.meta}"


def _usage(command: Command) -> str:
    words = []
    for option in command.options:
        if option.name == "help":
            continue
        name = f"-{option.short}" if option.short else f"--{option.long}"
        value = f"{' ' if option.short else '='}{option.meta}" if option.meta else ""
        words.append(f"[{name}{value}]")
    return " ".join([*words, command.operands])
