# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The command line: declarative option tables and a GNU-like parser.

Invariant: options are seen strictly in the order given, and the first wrong
one ends the parse, so which error is reported for a line with several is the
same as for qemu-img.  Rules: options may follow operands, ``--`` ends them,
short options may be joined, long ones cut to a unique prefix.  The text
quoted in an error is the word before the scan position, as qemu-img quotes it.
"""

from __future__ import annotations

from qcowlib.cli.console import Failure, usage_failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from qcowlib.cli.console import Console

__all__ = ["Args", "Command", "HelpWanted", "Option", "Scanner", "parse"]


class HelpWanted(Exception):
    """The line asks for help; nothing after it matters."""


class Option:
    """One option of a command.

    *name* is the key of the value in :class:`Args`; *convert* turns the text
    into the value when the option is met (it raises :class:`Failure`);
    *repeat* collects all values instead of keeping the last.  An *extra*
    option is one that qemu-img lacks: it never makes a prefix ambiguous.
    """

    __slots__ = ("convert", "extra", "long", "meta", "name", "repeat", "short", "text")

    def __init__(
        self,
        short: str,
        long: str,
        name: str,
        text: str,
        *,
        meta: str = "",
        convert: Callable[[str, Console], object] | None = None,
        repeat: bool = False,
        extra: bool = False,
    ) -> None:
        self.short = short
        self.long = long
        self.name = name
        self.text = text
        self.meta = meta
        self.convert = convert
        self.repeat = repeat
        self.extra = extra


class Command:
    """One subcommand: its options and what its help says.

    *operands* is the rest of the usage line, *example* one whole command
    line.  With *getopt_style* wrong options are reported in the older form
    that qemu-img has for ``measure``: a line by the scanner, then the help.
    """

    __slots__ = ("example", "getopt_style", "name", "operands", "options", "summary")

    def __init__(
        self,
        name: str,
        summary: str,
        operands: str,
        options: tuple[Option, ...],
        example: str,
        *,
        getopt_style: bool = False,
    ) -> None:
        self.name = name
        self.summary = summary
        self.operands = operands
        self.options = options
        self.example = example
        self.getopt_style = getopt_style


class Args:
    """The values of one command line, by option name."""

    __slots__ = ("_values", "actions", "operands")

    def __init__(self) -> None:
        self._values: dict[str, object] = {}
        self.actions: list[tuple[str, str]] = []
        self.operands: list[str] = []

    def put(self, option: Option, value: object) -> None:
        """Record a value; the last one counts unless the option repeats."""
        if option.repeat:
            kept = self._values.setdefault(option.name, [])
            if isinstance(kept, list):
                kept.append(value)
        else:
            self._values[option.name] = value

    def flag(self, name: str) -> bool:
        """Return whether the option was given."""
        return name in self._values

    def text(self, name: str) -> str | None:
        """Return the option's text, or None."""
        value = self._values.get(name)
        return value if isinstance(value, str) else None

    def texts(self, name: str) -> list[str]:
        """Return all texts of a repeatable option."""
        value = self._values.get(name)
        return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []

    def number(self, name: str) -> int | None:
        """Return the option's number, or None."""
        value = self._values.get(name)
        return value if isinstance(value, int) else None


class Wrong(Exception):
    """A wrong option: *kind* is ``unknown``, ``missing``, ``ambiguous`` or ``value``; *word* quotes it."""

    def __init__(self, kind: str, word: str, detail: str) -> None:
        super().__init__(kind)
        self.kind = kind
        self.word = word
        self.detail = detail


class Scanner:
    """Yields ``(option, text)``; afterwards :attr:`operands` holds the rest.

    With *leading* the scan stops at the first operand.  Operands before
    options are moved behind them step by step, as GNU getopt does, because
    the quoted word depends on it.
    """

    __slots__ = ("_first", "_last", "_leading", "_long", "_position", "_rest", "_short", "words")

    def __init__(self, words: Sequence[str], options: Iterable[Option], *, leading: bool = False) -> None:
        self.words = list(words)
        self._short = {o.short: o for o in options if o.short}
        self._long = {o.long: o for o in options if o.long}
        self._leading = leading
        self._position = 1
        self._first = self._last = 1  # words[first:last] are operands already passed
        self._rest = ""  # unread letters of a group of short options

    @property
    def operands(self) -> list[str]:
        return self.words[self._position :]

    def __iter__(self) -> Iterator[tuple[Option, str]]:
        while True:
            if not self._rest and not self._advance():
                return
            if self._rest:
                yield self._short_option()
            else:
                yield self._long_option()

    def _quoted(self) -> str:
        return self.words[self._position - 1]

    def _rotate(self) -> None:
        first, last, position = self._first, self._last, self._position
        self.words[first:position] = self.words[last:position] + self.words[first:last]
        self._first += position - last
        self._last = position

    def _settle(self) -> None:
        if self._first != self._last and self._last != self._position:
            self._rotate()
        elif self._last != self._position:
            self._first = self._position

    def _advance(self) -> bool:
        """Move to the next word with options; false at the end."""
        count = len(self.words)
        if not self._leading:
            self._settle()
            while self._position < count and not _is_option(self.words[self._position]):
                self._position += 1
            self._last = self._position
        if self._position < count and self.words[self._position] == "--":
            self._position += 1
            if self._first != self._last:
                self._rotate()
            elif self._first == self._last:
                self._first = self._position
            self._last = self._position = count
        if self._position >= count:
            if self._first != self._last:
                self._position = self._first
            return False
        word = self.words[self._position]
        if not _is_option(word):
            return False
        if not word.startswith("--"):
            self._rest = word[1:]
        return True

    def _short_option(self) -> tuple[Option, str]:
        letter, self._rest = self._rest[0], self._rest[1:]
        if not self._rest:
            self._position += 1
        option = self._short.get(letter)
        if option is None:
            raise Wrong("unknown", self._quoted(), f"invalid option -- '{letter}'")
        if not option.meta:
            return option, ""
        if self._rest:
            text, self._rest = self._rest, ""
        elif self._position < len(self.words):
            text = self.words[self._position]
        else:
            raise Wrong("missing", self._quoted(), f"option requires an argument -- '{letter}'")
        self._position += 1
        return option, text

    def _long_option(self) -> tuple[Option, str]:
        word = self.words[self._position]
        self._position += 1
        name, equals, text = word[2:].partition("=")
        if "data" in text:
            # No message repeats what may be a passphrase.
            word = f"--{name}=..."
        option = self._long.get(name)
        if option is None:
            matches = [o for o in self._long.values() if o.long.startswith(name) and not o.extra]
            if len(matches) > 1:
                listed = " ".join(f"'--{o.long}'" for o in matches)
                raise Wrong("unknown", word, f"option '{word}' is ambiguous; possibilities: {listed}")
            if not matches:
                raise Wrong("unknown", word, f"unrecognized option '--{name}'")
            option = matches[0]
        if not option.meta:
            if equals:
                raise Wrong("unknown", word, f"option '--{option.long}' doesn't allow an argument")
            return option, ""
        if not equals:
            if self._position >= len(self.words):
                raise Wrong("missing", word, f"option '--{option.long}' requires an argument")
            text = self.words[self._position]
            self._position += 1
        return option, text


def _is_option(word: str) -> bool:
    return len(word) > 1 and word[0] == "-"


def parse(command: Command, words: Sequence[str], console: Console) -> Args:
    """Return the values of *words*, whose first is the name of *command*.

    Raises :class:`Failure` for the first wrong option and
    :class:`HelpWanted` at ``-h``.
    """
    args = Args()
    scanner = Scanner(words, command.options)
    try:
        for option, text in scanner:
            if option.name == "help":
                raise HelpWanted
            value = option.convert(text, console) if option.convert else text
            args.put(option, value)
            args.actions.append((option.name, text))
    except Wrong as wrong:
        if command.getopt_style:
            console.err(f"{command.name}: {wrong.detail}\n")
            raise HelpWanted from None
        raise wrong_option(wrong) from None
    args.operands = scanner.operands
    return args


def wrong_option(wrong: Wrong) -> Failure:
    """Return the failure that reports *wrong*."""
    text = "missing argument for" if wrong.kind == "missing" else "unrecognized"
    return usage_failure(f"{text} option '{wrong.word}'")
