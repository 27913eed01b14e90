# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The mailbox: its bytes, and both sides against each other and a storage that loses and tears writes."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spm import mailbox
from spm.errors import MailboxError
from spm.mailbox import BOX_SIZE, CLEAN, EMPTY, EMPTY_BOX, SLOTS, ExtendRequest, HsmMailbox, SpmMailbox
from spm.timing import MailboxTiming
from storage_pool.errors import InvalidName
from storage_pool.ids import make_id

GOLDEN = Path(__file__).parent / "golden/mailbox"
MESSAGES = json.loads((GOLDEN / "messages.json").read_text())
BOXES = json.loads((GOLDEN / "mailboxes.json").read_text())
PROCESSING = json.loads((GOLDEN / "spm_processing.json").read_text())
DOMAIN = "25958256-4ccc-4ab6-bec4-3150f7625b43"


def requests(count, size=10):
    return [ExtendRequest(DOMAIN, make_id(), size + number) for number in range(count)]


class Areas:
    """Both volumes, written in whole boxes."""

    def __init__(self, hosts=mailbox.MAX_HOST_ID):
        self.inbox = bytearray((hosts + 1) * BOX_SIZE)
        self.outbox = bytearray((hosts + 1) * BOX_SIZE)

    def write_inbox(self, host):
        if host.dirty:
            self.inbox[host.offset : host.offset + BOX_SIZE] = host.begin_write()
            host.written()

    def write_outbox(self, manager):
        for offset, data in manager.begin_write():
            self.outbox[offset : offset + len(data)] = data
        manager.written()

    def read(self, host):
        return host.receive(bytes(self.outbox[host.offset : host.offset + BOX_SIZE]))

    def serve(self, manager, answer=lambda request: request.size_mib):
        done = manager.scan(bytes(self.inbox))
        for incoming in done:
            manager.reply(incoming, answer(incoming.request))
        self.write_outbox(manager)
        return [incoming.request for incoming in done]

    def round(self, host, manager):
        self.write_inbox(host)
        self.serve(manager)
        return self.read(host)


@pytest.fixture
def areas():
    return Areas(8)


@pytest.fixture
def manager():
    return SpmMailbox(8)


@pytest.fixture
def host():
    return HsmMailbox(7)


@pytest.mark.parametrize("row", MESSAGES["messages"], ids=lambda row: str(row["size"]))
def test_mb01_message_is_byte_for_byte_what_vdsm_writes(row):
    request = ExtendRequest(row["domain"], row["volume"], row["size"])
    assert request.pack().hex() == row["hex"]
    assert ExtendRequest.parse(request.pack()) == request


@pytest.mark.parametrize("size", MESSAGES["rejected_sizes"])
def test_mb01_impossible_size_is_refused(size):
    with pytest.raises(MailboxError, match="size"):
        ExtendRequest(DOMAIN, make_id(), size).pack()


@pytest.mark.parametrize("names", [("", make_id()), (make_id(), ""), ("x" * 36, make_id())])
def test_mb01_missing_domain_or_volume_is_refused(names):
    with pytest.raises(MailboxError, match="without domain"):
        ExtendRequest(*names, 1).pack()


@pytest.mark.parametrize("row", MESSAGES["packed_uuids"], ids=lambda row: row["hex"][:8])
def test_mb02_uuids_are_little_endian_numbers(row):
    assert mailbox.pack_uuid(row["uuid"]).hex() == row["hex"]
    assert mailbox.unpack_uuid(bytes.fromhex(row["hex"])) == row["uuid"]


def test_mb02_what_is_no_uuid_is_refused():
    with pytest.raises(InvalidName):
        mailbox.pack_uuid("25958256")


@pytest.mark.parametrize("row", BOXES["boxes"], ids=lambda row: row["what"])
def test_mb03_checksum_good_bad_and_empty(row):
    box = (GOLDEN / row["file"]).read_bytes()
    slots = {slot: mailbox._slot(box, int(slot)).hex() for slot in row["slots"]}
    if "flipped" not in row["what"]:
        assert slots == row["slots"]
    assert box[-4:].hex() == row["checksum_hex"]
    if row["spm_accepts"]:
        assert mailbox.seal(box[:-4]) == box
    damaged = not row["spm_accepts"] and any(box)
    assert mailbox.is_intact(box) is not damaged
    manager = SpmMailbox()
    inbox = EMPTY_BOX * 7 + box + EMPTY_BOX * 243
    found = manager.scan(inbox)
    wanted = [bytes.fromhex(text) for _, text in sorted(row["slots"].items(), key=lambda item: int(item[0]))]
    assert [incoming.request.pack() for incoming in found] == (
        [message for message in wanted if message != CLEAN] if row["spm_accepts"] else []
    )
    assert manager.damaged == ({7} if damaged else set())


def test_mb03_event_block_is_byte_for_byte_what_vdsm_writes():
    block = (GOLDEN / BOXES["event_block"]["file"]).read_bytes()
    assert mailbox.pack_event(BOXES["event_block"]["uuid"]) == block
    assert mailbox.parse_event(block) == BOXES["event_block"]["uuid"]
    assert mailbox.parse_event(EMPTY_BOX) is None


@pytest.mark.parametrize("row", BOXES["message_ids"], ids=lambda row: str(row["message_id"]))
def test_mb03_message_id_names_host_and_slot(row):
    assert row["host"] * BOX_SIZE + row["slot"] * mailbox.MESSAGE_SIZE == row["inbox_offset"]
    if row["host"]:
        body = bytearray(mailbox._CHECKED)
        request = requests(1)[0]
        body[row["slot"] * 64 : row["slot"] * 64 + 64] = request.pack()
        inbox = EMPTY_BOX * row["host"] + mailbox.seal(bytes(body)) + EMPTY_BOX * (250 - row["host"])
        assert SpmMailbox().scan(inbox) == [mailbox.Incoming(row["message_id"], request)]


def test_mb04_manager_clears_its_outbox_at_start_and_keeps_boxes_of_others(areas):
    areas.outbox[:] = b"x" * len(areas.outbox)
    manager = SpmMailbox(3)
    areas.write_outbox(manager)
    assert areas.outbox[BOX_SIZE : 4 * BOX_SIZE] == bytes(3 * BOX_SIZE)
    assert set(areas.outbox[:BOX_SIZE] + areas.outbox[4 * BOX_SIZE :]) == {ord("x")}


def test_mb04_host_starts_with_an_empty_box(areas, host):
    areas.inbox[host.offset : host.offset + BOX_SIZE] = (GOLDEN / "one_message.bin").read_bytes()
    areas.write_inbox(host)
    assert not any(areas.inbox)


def test_mb05_empty_requests_and_replies_are_skipped(areas, host, manager):
    assert manager.scan(bytes(areas.inbox)) == []
    host.post(requests(1)[0])
    assert areas.read(host) == []


def test_mb06_send_receive_reply_and_the_slot_is_free_again(areas, host, manager):
    request = requests(1)[0]
    assert host.post(request)
    areas.write_inbox(host)
    assert areas.serve(manager) == [request]
    assert areas.read(host) == [mailbox.Reply(request, request.size_mib)]
    areas.write_inbox(host)
    assert mailbox._slot(bytes(areas.inbox), host.host_id * 64) == CLEAN
    areas.serve(manager)
    assert mailbox._slot(bytes(areas.outbox), host.host_id * 64) == CLEAN
    areas.read(host)
    areas.write_inbox(host)
    assert not any(areas.inbox) and not host.waiting


def test_mb06_replies_are_byte_for_byte_what_vdsm_writes():
    manager = SpmMailbox()
    body = b"".join(bytes.fromhex(row["hex"]) for row in MESSAGES["messages"])
    incoming = manager.scan(EMPTY_BOX * 7 + mailbox.seal(body) + EMPTY_BOX * 243)
    carried_out = [row[1:] for row in PROCESSING["log"] if row[0] == "extend"]
    replies = {row[0]: row[1] for row in PROCESSING["log"] if row[0] != "extend"}
    assert {item.message_id for item in incoming} == set(replies)
    manager.begin_write()
    manager.written()
    for item in incoming:
        if list(item.request) in carried_out:
            manager.reply(item, item.request.size_mib)
    ((offset, page),) = manager.begin_write()
    assert offset == 7 * BOX_SIZE and page[-4:] == bytes(4)
    for item in incoming:
        if list(item.request) in carried_out:
            assert mailbox._slot(page, item.message_id % 64).hex() == replies[item.message_id]


def test_mb06_63_slots_are_filled_then_freed_and_the_64th_request_waits(areas, host, manager):
    wanted = requests(SLOTS + 1)
    for request in wanted:
        host.post(request)
    areas.write_inbox(host)
    assert areas.serve(manager) == wanted[:SLOTS]
    assert [reply.request for reply in areas.read(host)] == wanted[:SLOTS]
    replies = [reply for _ in range(4) for reply in areas.round(host, manager)]
    assert [reply.request for reply in replies] == wanted[SLOTS:]
    areas.round(host, manager)
    areas.round(host, manager)
    assert not host.waiting


def test_mb06_a_failure_is_told_and_the_same_request_can_be_sent_again(areas, host, manager):
    request = requests(1)[0]
    host.post(request)
    areas.write_inbox(host)
    areas.serve(manager, lambda request: 0)
    assert areas.read(host) == [mailbox.Reply(request, 0)]
    assert host.post(request)
    replies = [reply for _ in range(4) for reply in areas.round(host, manager)]
    assert replies == [mailbox.Reply(request, request.size_mib)]


@pytest.mark.parametrize("events", [True, False])
def test_mb07_round_trip_within_three_intervals(areas, host, manager, events):
    timing = MailboxTiming()
    interval = timing.event_s if events else timing.poll_s
    request = requests(1)[0]
    answered = None
    host.post(request)
    areas.write_inbox(host)
    if events:
        areas.inbox[:BOX_SIZE] = mailbox.pack_event(make_id())
    # Worst phases: the manager looked just before, the host looks just before the answer.
    for tick in range(1, 100):
        now = tick * timing.event_s
        block = bytes(areas.inbox[:BOX_SIZE])
        if manager.has_event(block) or now % timing.poll_s == 0:
            areas.serve(manager)
        if now % (timing.reply_s if events else timing.poll_s) == 0 and areas.read(host):
            answered = now
            break
    assert answered is not None and answered <= 3 * interval


def test_mb07_the_same_event_is_news_only_once(manager):
    block = mailbox.pack_event(make_id())
    assert manager.has_event(block)
    assert not manager.has_event(block)
    assert manager.has_event(mailbox.pack_event(make_id()))
    assert not manager.has_event(EMPTY_BOX)


def test_mb08_damaged_box_is_ignored_and_others_are_served(manager):
    bad = (GOLDEN / "bad_checksum.bin").read_bytes()
    good = (GOLDEN / "one_message.bin").read_bytes()
    inbox = EMPTY_BOX + bad + good + EMPTY_BOX * 6
    assert [incoming.message_id for incoming in manager.scan(inbox)] == [2 * 64]
    assert manager.damaged == {1}
    # Whole at the next scan, it is heard.
    whole = mailbox.seal(bad[:-4])
    assert [incoming.message_id for incoming in manager.scan(EMPTY_BOX + whole + good + EMPTY_BOX * 6)] == [64]


def test_mb08_host_250_is_heard():
    request = requests(1)[0]
    inbox = EMPTY_BOX * 250 + mailbox.seal(request.pack())
    assert SpmMailbox().scan(inbox) == [mailbox.Incoming(250 * 64, request)]


def test_bytes_that_a_sum_lets_pass_are_no_request(manager):
    message = bytearray(requests(1)[0].pack())
    message[0], message[1] = message[1], message[0]
    inbox = EMPTY_BOX + mailbox.seal(bytes(message)) + EMPTY_BOX * 7
    assert manager.scan(inbox) == []
    assert manager.damaged == set()


def test_request_equal_to_an_active_one_is_dropped(host):
    request = requests(1)[0]
    assert host.post(request)
    assert not host.post(request)


def test_request_that_came_back_to_its_slot_after_clean_is_seen(areas, host, manager):
    request = requests(1)[0]
    for _ in range(3):
        host.post(request)
        replies = [reply for _ in range(4) for reply in areas.round(host, manager)]
        assert replies == [mailbox.Reply(request, request.size_mib)]


def test_answer_left_from_an_earlier_life_is_cleaned_before_its_slot_is_used(areas, host, manager):
    old = requests(1)[0]
    host.post(old)
    areas.write_inbox(host)
    areas.serve(manager)
    reborn = HsmMailbox(host.host_id)
    reborn.start(bytes(areas.outbox[host.offset : host.offset + BOX_SIZE]))
    new = old._replace(size_mib=old.size_mib + 100)
    reborn.post(new)
    replies = [reply for _ in range(5) for reply in areas.round(reborn, manager)]
    assert replies == [mailbox.Reply(new, new.size_mib)]


def test_new_manager_finds_requests_that_the_old_one_left(areas, host, manager):
    wanted = requests(3)
    for request in wanted:
        host.post(request)
    areas.write_inbox(host)
    manager.scan(bytes(areas.inbox))
    successor = SpmMailbox(8)
    areas.write_outbox(successor)
    assert areas.serve(successor) == wanted
    assert [reply.request for reply in areas.read(host)] == wanted


def test_answer_is_not_put_into_a_slot_that_holds_another_request(areas, host, manager):
    host.post(requests(1)[0])
    areas.write_inbox(host)
    (incoming,) = manager.scan(bytes(areas.inbox))
    host.stop()
    areas.write_inbox(host)
    manager.scan(bytes(areas.inbox))
    assert not manager.reply(incoming, 10)


def test_answer_whose_write_failed_is_written_with_the_next(areas, host, manager):
    areas.write_outbox(manager)
    host.post(requests(1)[0])
    areas.write_inbox(host)
    (incoming,) = manager.scan(bytes(areas.inbox))
    manager.reply(incoming, 10)
    lost = manager.begin_write()
    assert manager.begin_write() == lost
    manager.written()
    assert not manager.dirty and manager.begin_write() == []


def test_too_many_waiting_requests_are_refused(host, monkeypatch):
    monkeypatch.setattr(mailbox, "QUEUE_LIMIT", 2)
    for request in requests(SLOTS + 2):
        host.post(request)
    with pytest.raises(MailboxError, match="wait"):
        host.post(requests(1)[0])


@pytest.mark.parametrize("number", [0, 251, -1])
def test_host_without_a_box_is_refused(number):
    with pytest.raises(MailboxError, match="no mailbox"):
        HsmMailbox(number)


@given(
    st.binary(min_size=64, max_size=64) | st.builds(lambda tail: b"1xtnd" + tail, st.binary(min_size=59, max_size=59))
)
def test_any_64_bytes_are_a_request_that_packs_to_them_or_none(data):
    request = ExtendRequest.parse(data)
    assert request is None or request.pack() == data


@given(st.integers(0, 2**32), st.integers(1, 70))
def test_every_request_is_answered_over_a_storage_that_loses_and_tears_writes(seed, count):
    """Managers come and go, hosts restart, any write may be lost or torn in sectors; nothing is lost or mixed up."""
    chance = random.Random(seed)
    areas, host, manager = Areas(2), HsmMailbox(1), SpmMailbox(2)
    wanted = requests(count)
    open_requests = dict.fromkeys(wanted)
    for request in wanted:
        host.post(request)
    sizes = {}

    def put(area, offset, data, troubled):
        for sector in range(0, len(data), 512):
            if not troubled or chance.random() < 0.5:
                area[offset + sector : offset + sector + 512] = data[sector : sector + 512]

    for step in range(400):
        troubled = step < 200
        if host.dirty or chance.random() < 0.1:
            lost = troubled and chance.random() < 0.3
            put(areas.inbox, host.offset, host.begin_write(), lost)
            if not lost:
                host.written()
        if troubled and chance.random() < 0.05:
            manager = SpmMailbox(2)
        for incoming in manager.scan(bytes(areas.inbox)):
            size = 0 if troubled and chance.random() < 0.2 else incoming.request.size_mib
            volume = incoming.request.volume
            sizes[volume] = max(size, sizes.get(volume, 0))
            manager.reply(incoming, size)
        lost = troubled and chance.random() < 0.3
        for offset, data in manager.begin_write():
            put(areas.outbox, offset, data, lost)
        if not lost:
            manager.written()
        for reply in areas.read(host):
            if reply.size_mib:
                assert sizes[reply.request.volume] == reply.request.size_mib
                del open_requests[reply.request]
            else:
                host.post(reply.request)
    assert not open_requests
    assert not host.waiting
    assert mailbox._slot(bytes(areas.inbox), 64) == EMPTY
