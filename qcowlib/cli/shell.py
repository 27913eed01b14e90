# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Completion files for bash, zsh and fish, and the manual page, made from the option tables.

Invariant: they name exactly the commands and options that the parser knows;
``python -m qcowlib.cli.shell`` writes them anew, a test says when that is due.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

from qcowlib.cli.main import COMMANDS, command_module
from qcowlib.cli.manual import manual
from qcowlib.cli.options import CACHE_MODES
from qcowlib.cli.parser import Command, Option

__all__ = ["FILES", "bash", "fish", "zsh"]

_NOTE = "Made by: python -m qcowlib.cli.shell"
_LICENCE = "SPDX-FileCopyrightText: 2026 The qcowlib authors\n# SPDX-License-Identifier: Apache-2.0"
_PROGRAMS = ("-h", "--help", "-V", "--version")

#: What an option takes, by its placeholder in the help; files are completed where a name is wanted.
_VALUES = {
    "FMT": ("qcow2", "raw", "luks"),
    "CACHE": CACHE_MODES,
    "FORM": ("human", "json"),
    "WHAT": ("leaks", "all"),
    "MODE": ("off", "metadata", "falloc", "full"),
    "OBJECT": ("secret,id=",),
}
_FILES = ("FILE", "BACKING", "BASE", "DIR")


def _commands() -> Iterator[Command]:
    for name in COMMANDS:
        yield command_module(name).COMMAND


def _names(option: Option) -> list[str]:
    return [f"-{option.short}"] * bool(option.short) + [f"--{option.long}"] * bool(option.long)


def bash() -> str:
    """Return the completion file for bash."""
    lines = [
        f"# {_LICENCE}",
        f"# {_NOTE}",
        "",
        "_qcow() {",
        "    local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}",
        "    local command= word options= values= file=yes",
        "    # bash splits --option=value into three words.",
        "    if [[ $current == = ]]; then current=",
        "    elif [[ $before == = ]]; then before=${COMP_WORDS[COMP_CWORD-2]}; fi",
        '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
        "        case $word in -*) ;; *) command=$word; break ;; esac",
        "    done",
        "    case $command in",
        f"    '') options='{' '.join(_PROGRAMS)}' values='{' '.join(COMMANDS)}' file= ;;",
    ]
    for command in _commands():
        names = " ".join(name for option in command.options for name in _names(option))
        lines += [f"    {command.name})", f"        options='{names}'", "        case $before in"]
        for option in command.options:
            if not option.meta:
                continue
            if option.meta in _VALUES:
                action = f"values='{' '.join(_VALUES[option.meta])}' options= file="
            else:
                action = "options=" if option.meta in _FILES else "options= file="
            lines.append(f"        {'|'.join(_names(option))}) {action} ;;")
        lines += ["        esac ;;"]
    lines += [
        "    esac",
        "    if [[ $current == -* ]]; then",
        '        mapfile -t COMPREPLY < <(compgen -W "$options" -- "$current")',
        "    elif [[ -n $values ]]; then",
        '        mapfile -t COMPREPLY < <(compgen -W "$values" -- "$current")',
        "    elif [[ -n $file ]]; then",
        '        mapfile -t COMPREPLY < <(compgen -f -- "$current")',
        "        compopt -o filenames 2>/dev/null",
        "    else",
        "        COMPREPLY=()",
        "    fi",
        "}",
        "complete -F _qcow qcow",
    ]
    return "\n".join(lines) + "\n"


def _zsh_text(text: str) -> str:
    for special in "\\'[]:":
        text = text.replace(special, "'\\''" if special == "'" else f"\\{special}")
    return text


def _zsh_spec(option: Option) -> str:
    names = _names(option)
    star = "*" if option.repeat else ""
    exclusive = f"({' '.join(names)})" if len(names) > 1 and not star else ""
    value = ""
    if option.meta:
        if option.meta in _VALUES:
            action = f"({' '.join(_VALUES[option.meta])})"
        else:
            action = "_files" if option.meta in _FILES else " "
        value = f":{_zsh_text(option.meta.lower())}:{action}"
    shown = [f"{name}=" if name.startswith("--") and option.meta else name for name in names]
    if len(shown) > 1:
        return f"'{exclusive}{star}'{{{','.join(shown)}}}'[{_zsh_text(option.text)}]{value}'"
    return f"'{star}{shown[0]}[{_zsh_text(option.text)}]{value}'"


def zsh() -> str:
    """Return the completion file for zsh."""
    lines = ["#compdef qcow", f"# {_LICENCE}", f"# {_NOTE}", "", "_qcow() {", "    local context state line"]
    lines += ["    _arguments -C '(- *)'{-h,--help}'[show the help]' '(- *)'{-V,--version}'[show the version]' \\"]
    lines += ["        '1:command:->command' '*::argument:->argument'", "    case $state in", "    command)"]
    lines += ["        local -a commands=("]
    lines += [f"            '{command.name}:{_zsh_text(command.summary)}'" for command in _commands()]
    lines += ["        )", "        _describe command commands ;;", "    argument)", "        case $line[1] in"]
    for command in _commands():
        lines.append(f"        {command.name})")
        specs = [_zsh_spec(option) for option in command.options]
        lines += ["            _arguments -s \\"]
        lines += [f"                {spec} \\" for spec in specs]
        lines += ["                '*:file:_files' ;;"]
    lines += ["        esac ;;", "    esac", "}", "", '_qcow "$@"']
    return "\n".join(lines) + "\n"


def _fish_text(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")


def fish() -> str:
    """Return the completion file for fish."""
    lines = [f"# {_LICENCE}", f"# {_NOTE}", ""]
    none = "complete -c qcow -n __fish_use_subcommand"
    lines += [f"{none} -s h -l help -d 'show the help'", f"{none} -s V -l version -d 'show the version'"]
    for command in _commands():
        lines.append(f"{none} -f -a {command.name} -d '{_fish_text(command.summary)}'")
    for command in _commands():
        lines.append("")
        for option in command.options:
            words = [f"complete -c qcow -n '__fish_seen_subcommand_from {command.name}'"]
            words += [f"-s {option.short}"] * bool(option.short) + [f"-l {option.long}"] * bool(option.long)
            if option.meta in _VALUES:
                words.append(f"-x -a '{' '.join(_VALUES[option.meta])}'")
            elif option.meta:
                words.append("-r" if option.meta in _FILES else "-x")
            words.append(f"-d '{_fish_text(option.text)}'")
            lines.append(" ".join(words))
    return "\n".join(lines) + "\n"


#: What is made, by its place in the source tree.
FILES: dict[str, Callable[[], str]] = {
    "completions/qcow": bash,
    "completions/_qcow": zsh,
    "completions/qcow.fish": fish,
    "docs/qcow.1": manual,
}


def main() -> int:
    """Write all files below the working directory."""
    for name, make in FILES.items():
        os.makedirs(os.path.dirname(name), exist_ok=True)  # noqa: PTH103
        with open(name, "w", encoding="utf-8") as file:
            file.write(make())
    return 0


if __name__ == "__main__":
    sys.exit(main())
