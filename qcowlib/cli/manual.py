# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The manual page, made from the option tables.

Invariant: no text of a table can be taken for a request of the formatter.
"""

from __future__ import annotations

from qcowlib.cli.main import COMMANDS, command_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcowlib.cli.parser import Command, Option

__all__ = ["manual"]

_HEAD = """\
.\\" SPDX-FileCopyrightText: 2026 The qcowlib authors
.\\" SPDX-License-Identifier: Apache-2.0
.\\" Made by: python -m qcowlib.cli.shell
.TH QCOW 1 "" "qcowlib" "User commands"
.SH NAME
qcow \\- make, change, check and copy qcow2 and raw disk images
.SH SYNOPSIS
.B qcow
.RI [ "standard options" ]
.I command
.RI [ "command options" ]
.SH DESCRIPTION
.B qcow
works on disk images in the formats qcow2, raw and LUKS.
Commands, options, output and exit statuses are those of
.BR qemu-img (1);
where it is run under that name, for example through a symbolic link, the lines on the standard error
begin with it.
.PP
A
.I FILE
is a path,
.BI file: PATH\\fR,
a
.BI json:{ \\fR...\\fP }
object, or, with
.BR \\-\\-image\\-opts ,
a list as
.BR driver=qcow2,file.filename=PATH .
Without
.B \\-f
the format is recognised by the first bytes of the file; name it for files that others can write to.
.PP
Sizes are bytes; the suffixes k, M, G, T, P and E are powers of 1024.
.PP
A passphrase is given as
.BI \\-\\-object\\ secret,id= ID ,file= PATH
and referred to by its ID.
.SH STANDARD OPTIONS
.TP
.BR \\-h ", " \\-\\-help
show the help, after a command that of the command
.TP
.BR \\-V ", " \\-\\-version
show the version
.SH COMMANDS
"""

_TAIL = """\
.SH PROGRESS
With
.B \\-p
the part done is shown; on a terminal with the rate and the time left.
.B \\-\\-progress=json
writes one JSON object a line to the standard error.
Colours are never used, so
.B NO_COLOR
changes nothing.
.SH EXIT STATUS
0 success, 1 failure, 130 interrupted.
.TP
.B check
0 clean, 1 the check failed, 2 corrupt, 3 leaked clusters only, 63 the format has no check
.TP
.B compare
0 identical, 1 different, 2 an image could not be opened, 3 or 4 reading failed
.SH ENVIRONMENT
.TP
.B QEMU_IMG_NAME
the name that lines on the standard error begin with
.TP
.B QCOW_REFERENCES
which backing and data files an image may name: any (as qemu\\-img), folder (only inside the folder of
the image) or none
.TP
.B QCOW_DEBUG
1: show where an unexpected error came from
.SH SEE ALSO
.BR qemu\\-img (1),
.BR qemu\\-nbd (8)
"""


def manual() -> str:
    """Return the page, for section 1."""
    commands = (command_module(name).COMMAND for name in COMMANDS)
    return _HEAD + "".join(_command(command) for command in commands) + _TAIL


def _plain(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text


def _command(command: Command) -> str:
    lines = [f".SS {command.name}", _plain(command.summary), ".PP", f".B qcow {command.name}"]
    lines += ["[options]", f".I {_plain(command.operands)}" if command.operands else ""]
    for option in command.options:
        lines += [".TP", _option(option), _plain(option.text)]
    lines += [".PP", "Example:", ".PP", ".EX", f"qcow {_plain(command.example)}", ".EE"]
    return "\n".join(line for line in lines if line) + "\n"


def _option(option: Option) -> str:
    names = [f"\\fB\\-{option.short}\\fP"] * bool(option.short)
    if option.long:
        names.append(f"\\fB{_plain('--' + option.long)}\\fP")
    value = f"{'=' if option.long else ' '}\\fI{_plain(option.meta)}\\fP" if option.meta else ""
    return ", ".join(names) + value
