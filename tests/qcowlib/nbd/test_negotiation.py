# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The negotiation as bytes in and bytes out: what it answers, what it refuses, what it survives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowlib.nbd.negotiation import Negotiation
from qcowlib.nbd.protocol import MAX_OPTION, MAX_OPTIONS, MAX_SKIP, ExportInfo
from tests.qcowlib.nbd import wire

MAPS = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0")
EXPORTS = {
    "disk": ExportInfo("disk", "the first", 1 << 30, 0x16D, 65536, MAPS),
    "other": ExportInfo("other", "", 512, 3, 4096, MAPS[:2]),
}
ACK, ERR = 1, 1 << 31
UNSUP, INVALID, UNKNOWN, TOO_BIG = ERR | 1, ERR | 3, ERR | 6, ERR | 9


def started(flags: int = 3) -> Negotiation:
    talk = Negotiation(EXPORTS)
    assert talk.feed(flags.to_bytes(4, "big")) == b""
    return talk


def ask(talk: Negotiation, data: bytes) -> list[tuple[int, bytes]]:
    return [(reply.kind, reply.data) for reply in wire.option_replies(talk.feed(data))]


def test_greeting_offers_fixed_newstyle() -> None:
    assert Negotiation.greeting() == b"NBDMAGICIHAVEOPT\0\3"


def test_list_names_every_export_with_its_description() -> None:
    answers = ask(started(), wire.option(3))
    assert answers == [(2, wire.text("disk") + b"the first"), (2, wire.text("other")), (ACK, b"")]


def test_go_tells_size_flags_and_block_sizes_and_ends_the_negotiation() -> None:
    talk = started()
    answers = ask(talk, wire.go("disk", 1, 2) + b"rest")
    assert answers == [
        (3, b"\0\0" + (1 << 30).to_bytes(8, "big") + b"\x01\x6d"),
        (3, b"\0\1disk"),
        (3, b"\0\2the first"),
        (3, b"\0\3" + bytes((0, 0, 0, 1, 0, 1, 0, 0, 2, 0, 0, 0))),
        (ACK, b""),
    ]
    assert talk.agreed is not None and talk.agreed.export.name == "disk" and not talk.agreed.structured
    assert talk.rest == b"rest"


def test_info_tells_the_same_and_goes_on() -> None:
    talk = started()
    assert ask(talk, wire.go("other", number=6))[-1] == (ACK, b"")
    assert talk.agreed is None and not talk.closed


def test_no_name_is_the_first_export() -> None:
    talk = started()
    ask(talk, wire.go(""))
    assert talk.agreed is not None and talk.agreed.export.name == "disk"


@pytest.mark.parametrize("flags", [1, 3])
def test_export_name_answers_without_a_head(flags: int) -> None:
    talk = started(flags)
    answer = talk.feed(wire.option(1, b"other"))
    assert answer == (512).to_bytes(8, "big") + b"\0\3" + (b"" if flags & 2 else bytes(124))
    assert talk.agreed is not None


def test_export_name_that_is_not_there_ends_the_connection() -> None:
    talk = started()
    assert talk.feed(wire.option(1, b"nothing")) == b"" and talk.closed


def test_df_is_offered_with_structured_replies_only() -> None:
    talk = started()
    assert ask(talk, wire.option(8)) == [(ACK, b"")]
    assert ask(talk, wire.go("other"))[0][1][-2:] == (3 | 1 << 7).to_bytes(2, "big")
    assert talk.agreed is not None and talk.agreed.structured


def test_abort_is_answered_and_ends() -> None:
    talk = started()
    assert ask(talk, wire.option(2)) == [(ACK, b"")] and talk.closed


@pytest.mark.parametrize(("queries", "found"), [((), (0, 1, 2)), (("qemu:",), (1, 2)), (("qemu:dirty-bitmap:",), (2,))])
def test_contexts_are_listed_by_parts_of_their_name(queries: tuple[str, ...], found: tuple[int, ...]) -> None:
    answers = ask(started(), wire.contexts(*queries, export="disk", number=9))
    assert answers == [*((4, number.to_bytes(4, "big") + MAPS[number].encode()) for number in found), (ACK, b"")]


def test_contexts_are_chosen_by_whole_names_and_count_for_their_export() -> None:
    for wanted, expected in (("disk", ((2, MAPS[2]),)), ("other", ())):
        talk = started()
        ask(talk, wire.option(8))
        answers = ask(talk, wire.contexts(MAPS[2], "qemu:", "no:such", export="disk"))
        assert answers == [(4, b"\0\0\0\2" + MAPS[2].encode()), (ACK, b"")]
        ask(talk, wire.go(wanted))
        assert talk.agreed is not None and talk.agreed.contexts == expected


def test_contexts_need_structured_replies() -> None:
    assert ask(started(), wire.contexts(MAPS[0]))[0][0] == INVALID


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (wire.option(5), UNSUP),
        (wire.option(77, b"what"), UNSUP),
        (wire.go("nothing"), UNKNOWN),
        (wire.contexts(export="nothing", number=9), UNKNOWN),
        (wire.option(3, b"x"), INVALID),
        (wire.option(8, b"x"), INVALID),
        (wire.option(7, b""), INVALID),
        (wire.option(7, wire.text("disk") + b"\0\5"), INVALID),
        (wire.option(7, wire.text("disk") + b"\0\0more"), INVALID),
        (wire.option(7, wire.text(b"\xff") + b"\0\0"), INVALID),
        (wire.option(7, b"\xff\xff\xff\xff"), INVALID),
        (wire.go("n" * 4097), INVALID),
        (wire.contexts(*["base:"] * 65, number=9), TOO_BIG),
        (wire.option(9, wire.text("") + b"\xff\xff\xff\xff"), TOO_BIG),
        (wire.option(7, bytes(MAX_OPTION + 1)), TOO_BIG),
    ],
)
def test_what_is_wrong_is_refused_and_the_next_option_is_answered(data: bytes, kind: int) -> None:
    talk = started()
    answers = ask(talk, data + wire.option(8))
    assert [answer[0] for answer in answers] == [kind, ACK] and not talk.closed


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0\4",
        b"\0\0\0\3" + b"GET / HTTP/1.1\r\n",
        b"\0\0\0\3" + wire.option(7, b"")[:12] + (MAX_SKIP + 1).to_bytes(4, "big"),
        b"\0\0\0\0" + wire.option(3),
        b"\0\0\0\3" + wire.option(8) * (MAX_OPTIONS + 1),
    ],
)
def test_who_speaks_of_something_else_is_disconnected(data: bytes) -> None:
    talk = Negotiation(EXPORTS)
    talk.feed(data)
    assert talk.closed and talk.agreed is None and not talk.rest


def test_long_answers_are_given_in_parts() -> None:
    many = {str(number): ExportInfo(str(number) + "n" * 4000, "", 512, 3, 4096, ()) for number in range(50)}
    talk = Negotiation({info.name: info for info in many.values()})
    answer = talk.feed(b"\0\0\0\3" + wire.option(3) * 4)
    parts = []
    while answer:
        parts.append(len(wire.option_replies(answer)))
        answer = talk.feed(b"")
    assert parts == [51] * 4


OPTIONS = st.one_of(
    st.binary(max_size=40),
    st.builds(wire.option, st.integers(0, 12), st.binary(max_size=60)),
    st.builds(wire.go, st.sampled_from(["", "disk", "x"]), st.integers(0, 9), number=st.sampled_from([6, 7])),
    st.builds(wire.contexts, st.sampled_from([*MAPS, "qemu:", ""]), number=st.sampled_from([9, 10])),
    st.just(wire.option(8)),
    # Too long: only its head matters, what follows is skipped.
    st.just(wire.option(7)[:12] + (MAX_OPTION + 300).to_bytes(4, "big")),
)


@pytest.mark.fuzz
@given(st.sampled_from([b"", b"\0\0\0\3", b"\0\0\0\1"]), st.lists(OPTIONS, max_size=8), st.integers(1, 999))
def test_anything_is_answered_the_same_however_it_arrives(flags: bytes, options: list[bytes], step: int) -> None:
    sent = flags + b"".join(options)
    whole, pieces = Negotiation(EXPORTS), Negotiation(EXPORTS)
    expected = whole.feed(sent)
    answer, at = b"", 0
    while at < len(sent):
        answer += pieces.feed(sent[at : at + step])
        assert len(pieces.rest) <= MAX_OPTION + 16 + step
        at += step
    assert (answer, pieces.closed, pieces.agreed) == (expected, whole.closed, whole.agreed)
    if not whole.closed:
        assert bytes(pieces.rest) == bytes(whole.rest)
