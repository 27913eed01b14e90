# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Options of formats (``-o``): how they are typed, shown and listed.

Invariant: which options there are is said by :mod:`qcowlib.qcow2.create`;
this module adds the order in which they are shown, and what only commands know.
"""

from __future__ import annotations

from qcowlib.cli.console import Failure
from qcowlib.cli.values import list_size, parse_bool, parse_number, split_options, wants_help
from qcowlib.qcow2.create import QCOW2_OPTIONS, RAW_OPTIONS, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from qcowlib.cli.console import Console

__all__ = ["OptionList", "amend_help", "amend_table", "create_help", "create_table", "help_wanted"]


_SHOWN_NAMES = (
    "encryption encrypt.format encrypt.key-secret encrypt.cipher-alg encrypt.cipher-mode "
    "encrypt.ivgen-alg encrypt.ivgen-hash-alg encrypt.hash-alg encrypt.iter-time encrypt.state "
    "encrypt.keyslot encrypt.old-secret encrypt.new-secret cluster_size extended_l2 preallocation "
    "compression_type size key-secret cipher-alg cipher-mode ivgen-alg ivgen-hash-alg hash-alg iter-time "
    "compat backing_file backing_fmt data_file data_file_raw lazy_refcounts refcount_bits nocow "
    "extent_size_hint state keyslot old-secret new-secret"
)
#: The order in which ``create`` shows the options.
_SHOWN = _SHOWN_NAMES.split()

#: Of these the file layer knows; they are listed only with a file name.
_FILE_LAYER = ("extent_size_hint", "nocow", "preallocation")

_LUKS = (
    Option("key-secret", "str", None, "ID of the secret that provides the keyslot passphrase"),
    Option("cipher-alg", "str", None, "Name of encryption cipher algorithm"),
    Option("cipher-mode", "str", None, "Name of encryption cipher mode"),
    Option("ivgen-alg", "str", None, "Name of IV generator algorithm"),
    Option("ivgen-hash-alg", "str", None, "Name of IV generator hash algorithm"),
    Option("hash-alg", "str", None, "Name of encryption hash algorithm"),
    Option("iter-time", "num", None, "Time to spend in PBKDF in milliseconds"),
)

_CREATE = {
    "qcow2": QCOW2_OPTIONS,
    "raw": RAW_OPTIONS,
    "file": RAW_OPTIONS,
    "luks": (*RAW_OPTIONS, *_LUKS),
}

_AMEND = (
    Option("encrypt.state", "str", None, "Select new state of affected keyslots (active/inactive)"),
    Option("encrypt.keyslot", "num", None, "Select a single keyslot to modify explicitly"),
    Option("encrypt.old-secret", "str", None, "Select all keyslots that match this password"),
    Option("encrypt.new-secret", "str", None, "New secret to set in the matching keyslots. Empty string to erase"),
)
_AMEND_NAMES = (
    "size compat backing_file backing_fmt data_file data_file_raw lazy_refcounts refcount_bits encrypt.iter-time"
)
_AMEND_TOO = _AMEND_NAMES.split()


def create_table(fmt: str) -> tuple[Option, ...]:
    """Return the options of creating a file of format *fmt*, in the order they are shown."""
    table = _sorted(_CREATE[fmt])
    if fmt != "qcow2":  # what the file layer adds comes last
        table = tuple(sorted(table, key=lambda option: option.name in _FILE_LAYER))
    return table


def amend_table(fmt: str) -> tuple[Option, ...]:
    """Return the options of changing an image of format *fmt*, qcow2 or luks."""
    if fmt == "luks":
        keys = (option._replace(name=option.name.removeprefix("encrypt.")) for option in _AMEND)
        return _sorted((*keys, *(option for option in _LUKS if option.name == "iter-time")))
    return _sorted((*_AMEND, *(option for option in QCOW2_OPTIONS if option.name in _AMEND_TOO)))


def _sorted(options: Sequence[Option]) -> tuple[Option, ...]:
    return tuple(sorted(options, key=lambda option: _SHOWN.index(option.name)))


class OptionList:
    """Values given for the options of *table*; the last of a repeated one counts."""

    __slots__ = ("_table", "_values")

    def __init__(self, table: Sequence[Option]) -> None:
        self._table = table
        self._values: dict[str, tuple[str, bool | int | str]] = {}

    def parse(self, lists: Sequence[str], console: Console) -> None:
        """Add the items of *lists*.  Raises :class:`Failure` at the first wrong one."""
        known = {option.name: option for option in self._table}
        for text in lists:
            for name, value in split_options(text):
                if value is None:
                    name, value = (name[2:], "off") if name.startswith("no") else (name, "on")
                option = known.get(name)
                if option is None:
                    raise Failure(f"Invalid parameter '{name}'")
                self._values[name] = (value, _typed(option, value, console))

    def set(self, name: str, value: bool | int | str) -> None:
        """Set one option, as another option of the command does."""
        self._values[name] = (str(value), value)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def remove(self, name: str) -> None:
        """Forget an option."""
        self._values.pop(name, None)

    def text(self, name: str) -> str | None:
        """Return the value as text, or None."""
        value = self._values.get(name)
        return value[1] if value is not None and isinstance(value[1], str) else None

    def number(self, name: str, default: int) -> int:
        """Return the value of a size or number."""
        value = self._values.get(name)
        return int(value[1]) if value is not None and isinstance(value[1], int) else default

    def flag(self, name: str, default: bool = False) -> bool:
        """Return the value of a boolean."""
        value = self._values.get(name)
        return bool(value[1]) if value is not None else default

    def show(self) -> str:
        """Return `` key=value`` of all given or defaulted options, as the ``Formatting`` line shows them."""
        parts = []
        for option in self._table:
            given = self._values.get(option.name)
            if given is not None:
                parts.append(f" {option.name}={_shown(option, given)}")
            elif option.default is not None:
                parts.append(f" {option.name}={option.default}")
        return "".join(parts)


def _typed(option: Option, text: str, console: Console) -> bool | int | str:
    if option.type == "bool":
        return parse_bool(option.name, text)
    if option.type == "size":
        return list_size(option.name, text, console)
    if option.type == "num":
        return parse_number(option.name, text)
    return text


def _shown(option: Option, given: tuple[str, bool | int | str]) -> str:
    text, value = given
    if option.type in ("size", "num") and isinstance(value, int):
        return str(value - (1 << 64) if value >> 63 else value)  # printed as a signed number
    if option.type == "str":
        return text.replace(",", ",,")
    return text


_TYPES = {"str": "<str>", "size": "<size>", "num": "<num>", "bool": "<bool (on/off)>"}


def _listed(options: Sequence[Option]) -> str:
    lines = []
    for option in sorted(options, key=lambda o: o.name):
        name = f"  {option.name}={_TYPES[option.type]}"
        lines.append(f"{name:24} - {option.help}\n")
    return "".join(lines)


def create_help(fmt: str, with_file: bool) -> str:
    """Return the list of options for creating format *fmt*."""
    table = create_table(fmt)
    if with_file:
        return "Supported options:\n" + _listed(table)
    hidden = () if fmt == "file" else _FILE_LAYER[:2] if fmt == "qcow2" else _FILE_LAYER
    return (
        f"Supported {fmt} options:\n"
        + _listed([option for option in table if option.name not in hidden])
        + "\nThe protocol level may support further options.\n"
        + "Specify the target filename to include those options.\n"
    )


def amend_help(fmt: str) -> str:
    """Return the list of options for changing an image of format *fmt*."""
    return f"Amend options for '{fmt}':\n" + _listed(amend_table(fmt))


def help_wanted(lists: Sequence[str]) -> bool:
    """Return whether one of the lists asks for help."""
    return wants_help(lists)
