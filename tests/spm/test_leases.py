# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""One contract for leases, three implementations: sanlock (both bindings), files of one host, simulated."""

import contextlib
import os
import socket
import time
from typing import NamedTuple

import pytest

from spm.embedded import EmbeddedLeases, live_hosts
from spm.errors import LeaseError, LeaseHeld, LeaseLost
from spm.lease_watch import LeaseToken, LeaseWatch
from spm.proof import ProvingLeases
from spm.sanlock import SanlockLeases, _parse_state
from spm.testing.leases import SimHost, SimLeases, SimSpace
from spm.timing import LeaseTiming
from storage_pool.ids import make_id
from storage_pool.lease_records import LOCKSPACE_MAGIC, SafeleaseTag, parse_leader
from storage_pool.leases import Lease, LeaseArea
from storage_pool.testing.lvm import attached

from .conftest import IO_TIMEOUT_S, MIB, lease_file, library_client, make_client, sanlock_daemon

TIMING = LeaseTiming(io_timeout_s=float(IO_TIMEOUT_S))
HOST_ID = 7


class Setup(NamedTuple):
    """Leases of a host that joined, two free leases, the lockspace's area and the host's clock."""

    leases: ProvingLeases
    sdm: Lease
    volume: Lease
    area: LeaseArea
    clock: object


def boot_clock():
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def sanlock_setup(tmp_path, run_dirs, client, **layout):
    space = make_id()
    path = lease_file(tmp_path / "leases", space, ["SDM", "volume"], **layout)
    step = layout.get("alignment", MIB)
    run_dir = run_dirs()
    leases = SanlockLeases(client, TIMING, str(run_dir))
    area = LeaseArea(str(path), 0)
    sdm, volume = (Lease(space, name, LeaseArea(str(path), step * n)) for n, name in ((1, "SDM"), (2, "volume")))
    return run_dir, Setup(leases, sdm, volume, area, boot_clock)


def make_sanlock(tmp_path, run_dirs, client, **layout):
    @contextlib.contextmanager
    def make():
        run_dir, setup = sanlock_setup(tmp_path, run_dirs, client, **layout)
        with sanlock_daemon(run_dir, "one"):
            yield setup
            setup.leases.close()

    return make()


@contextlib.contextmanager
def make_embedded(tmp_path):
    area = LeaseArea(str(lease_file(tmp_path / "ids", "space", [])), 0)
    leases = EmbeddedLeases(str(tmp_path), boot_clock, time.sleep)
    yield Setup(leases, *(Lease("space", name, area) for name in ("SDM", "volume")), area, boot_clock)


@contextlib.contextmanager
def make_simulated():
    space = SimSpace(lambda: 1000.0, TIMING)
    leases = SimLeases(SimHost(space, "one"))
    area = LeaseArea("ids", 0)
    yield Setup(leases, *(Lease("space", name, area) for name in ("SDM", "volume")), area, lambda: 1000.0)


SANLOCK = pytest.mark.real("sanlock")
#: What only the daemon has, through both bindings.
BOTH = pytest.mark.parametrize(
    "setup", [pytest.param("module", marks=SANLOCK), pytest.param("library", marks=SANLOCK)], indirect=True
)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("module", marks=SANLOCK),
        pytest.param("library", marks=SANLOCK),
        pytest.param("library-1", marks=SANLOCK),
        pytest.param("library-2", marks=SANLOCK),
        pytest.param("library-4", marks=SANLOCK),
        pytest.param("library-8", marks=SANLOCK),
        "embedded",
        "simulated",
    ],
)
def setup(request, tmp_path_factory, run_dirs):
    tmp_path = tmp_path_factory.mktemp("leases")
    name, _, sectors = request.param.partition("-")
    layout = {"block_size": 4096, "alignment": int(sectors) * MIB} if sectors else {}
    if name == "embedded":
        made = make_embedded(tmp_path)
    elif name == "simulated":
        made = make_simulated()
    else:
        made = make_sanlock(tmp_path, run_dirs, make_client(name, tmp_path), **layout)
    with made as setup:
        with pytest.raises(LeaseError, match="not joined"):
            setup.leases.acquire(setup.sdm)
        setup.leases.join(setup.sdm.lockspace, HOST_ID, setup.area)
        yield setup


def test_ls08_joined_host_is_live_and_others_are_free(setup):
    assert setup.leases.host_state(setup.sdm.lockspace, HOST_ID) in ("live", "unknown")
    assert setup.leases.host_state(setup.sdm.lockspace, 8) in ("free", "unknown")


def test_ls10_owner_is_told_while_held_and_none_otherwise(setup):
    assert setup.leases.owner(setup.sdm) is None
    own = setup.leases.acquire(setup.sdm)
    try:
        assert own.host_id == HOST_ID
        assert setup.leases.owner(setup.sdm) == own
        assert setup.leases.owner(setup.volume) is None
    finally:
        setup.leases.release(setup.sdm)
    assert setup.leases.owner(setup.sdm) is None


def test_lease_is_not_taken_twice_and_can_be_taken_again(setup):
    first = setup.leases.acquire(setup.sdm)
    with pytest.raises(LeaseHeld):
        setup.leases.acquire(setup.sdm)
    setup.leases.release(setup.sdm)
    second = setup.leases.acquire(setup.sdm)
    setup.leases.release(setup.sdm)
    assert second.version == first.version + 1


def test_release_of_what_is_not_held_is_fine(setup):
    setup.leases.release(setup.sdm)


@pytest.mark.real("sanlock")
@pytest.mark.parametrize("layout", [{}, {"block_size": 4096}], ids=["512", "4096"])
def test_s6_lease_whose_leader_another_host_wrote_is_free_once_given_back(tmp_path, run_dirs, layout):
    """The daemon of the owner leaves such a leader as it is and marks its own block."""
    with make_sanlock(tmp_path, run_dirs, library_client(tmp_path), **layout) as (leases, sdm, _, area, _):
        leases.join(sdm.lockspace, HOST_ID, area)
        leases.acquire(sdm)
        with open(sdm.area.path, "r+b") as file:
            file.seek(sdm.area.offset)
            leader = file.read(512)
            assert leases.owner(sdm).host_id == HOST_ID
            leases.release(sdm)
            file.seek(sdm.area.offset)
            file.write(leader)
        assert leases.owner(sdm) is None and leases.settle_s(sdm) == 0.0
        leases.acquire(sdm)
        assert leases.owner(sdm).host_id == HOST_ID


def test_volume_lease_is_apart_from_the_pool_lease(setup):
    setup.leases.acquire(setup.sdm)
    setup.leases.acquire(setup.volume)
    setup.leases.release(setup.volume)
    assert setup.leases.owner(setup.sdm) is not None
    setup.leases.release(setup.sdm)


def test_shared_lease_is_released_too(setup):
    setup.leases.acquire(setup.volume, shared=True)
    setup.leases.release(setup.volume)
    setup.leases.acquire(setup.volume)
    setup.leases.release(setup.volume)


def test_s2_token_of_a_held_lease_is_proved_by_storage(setup):
    own = setup.leases.acquire(setup.sdm)
    proof = setup.leases.prove(setup.sdm)
    assert proof.owner == own and proof.generation == own.generation
    now_s = setup.clock()
    assert now_s - TIMING.deadline_s < proof.renewed_s <= now_s + 1
    watch = LeaseWatch(TIMING, own, 1, proof, now_s)
    token = LeaseToken(
        watch, setup.clock, lambda: (setup.leases.prove(setup.sdm), 1), lambda why: None, setup.leases.connected
    )
    token.check()
    assert watch.prove(setup.leases.prove(setup.sdm), 1, now_s) == "fresh"
    setup.leases.release(setup.sdm)
    assert watch.prove(setup.leases.prove(setup.sdm), 1, now_s) == "lost"


def test_lease_that_was_given_back_needs_no_settling(setup):
    setup.leases.acquire(setup.sdm)
    setup.leases.release(setup.sdm)
    assert setup.leases.settle_s(setup.sdm) == 0.0


@pytest.mark.real("sanlock")
def test_ls09_connection_of_a_daemon_that_died_is_noticed_at_once(tmp_path, run_dirs):
    run_dir, setup = sanlock_setup(tmp_path, run_dirs, library_client(tmp_path))
    with sanlock_daemon(run_dir, "one") as daemon:
        setup.leases.join(setup.sdm.lockspace, HOST_ID, setup.area)
        setup.leases.acquire(setup.sdm)
        assert setup.leases.connected()
        daemon.kill()
        daemon.wait()
        assert not setup.leases.connected()
    setup.leases.close()


@BOTH
def test_ls11_inquire_lists_what_is_held(setup):
    leases = setup.leases
    assert leases.held() == []
    leases.acquire(setup.volume)
    leases.acquire(setup.sdm)
    assert sorted(leases.held()) == sorted([setup.volume, setup.sdm])
    leases.release(setup.volume)
    leases.release(setup.sdm)
    assert leases.held() == []


@BOTH
def test_ls13_value_block_is_empty_at_first_and_stays_what_was_set(setup):
    leases = setup.leases
    leases.acquire(setup.sdm)
    leases.acquire(setup.volume, value=True)
    assert leases.get_value(setup.volume) == bytes(512)
    leases.set_value(setup.volume, b"job".ljust(512, b"\0"))
    with pytest.raises(LeaseError, match="set_lvb failed"):
        leases.set_value(setup.sdm, bytes(512))
    for size in (0, 4097):
        with pytest.raises(LeaseError, match="1 to 4096 bytes"):
            leases.get_value(setup.volume, size)
    leases.release(setup.volume)
    leases.acquire(setup.volume, value=True)
    assert leases.get_value(setup.volume) == b"job".ljust(512, b"\0")
    leases.set_value(setup.volume, bytes(512))
    leases.release(setup.volume)
    leases.release(setup.sdm)


@BOTH
def test_ls09_broken_connection_is_made_anew_unless_a_lease_is_held(setup):
    leases = setup.leases
    leases.acquire(setup.sdm)
    for held in (True, False):
        with socket.socket(fileno=os.dup(leases.fileno())) as connection:
            connection.shutdown(socket.SHUT_RDWR)
        assert not leases.connected()
        if held:
            with pytest.raises(LeaseLost, match="broke while SDM was held"):
                leases.held()
            leases.close()
        acquire_when_free(leases, setup.sdm)
        leases.release(setup.sdm)


def acquire_when_free(leases, lease):
    """The daemon frees the leases of a connection that broke a moment later."""
    for _ in range(1000):
        with contextlib.suppress(LeaseHeld):
            return leases.acquire(lease)
        time.sleep(0.01)
    raise TimeoutError


@pytest.mark.real("sanlock")
def test_ls11_temporary_error_is_raised_as_such(tmp_path, run_dirs):
    leases = SanlockLeases(library_client(tmp_path), TIMING, str(run_dirs()))
    with pytest.raises(LeaseError) as error:
        leases.held()
    assert error.value.code < 0 and not isinstance(error.value, LeaseLost)


@pytest.mark.parametrize(
    ("text", "lease"),
    [
        ("space:SDM:/dev/x:1048576:3", Lease("space", "SDM", LeaseArea("/dev/x", 1 << 20))),
        ("s:v:/srv/a\\:b/ids:0:SH:7", Lease("s", "v", LeaseArea("/srv/a:b/ids", 0))),
    ],
)
def test_ls11_answer_of_inquire_is_read_with_escaped_colons(text, lease):
    assert _parse_state(text) == lease


@pytest.mark.parametrize("text", ["", "a:b:c", "a:b:c:d", "\0:::"])
def test_ls11_other_answers_are_an_error(text):
    with pytest.raises(LeaseError, match="inquire answered"):
        _parse_state(text)


@pytest.mark.real("sanlock")
def test_daemon_that_does_not_run_is_a_clear_error(tmp_path, run_dirs):
    leases = SanlockLeases(library_client(tmp_path), TIMING, str(run_dirs()))
    with pytest.raises(LeaseError, match="sanlock: register failed"):
        leases.fileno()


def record(path, host_id, timestamp):
    """Let a host of sanlock renew its id, as its daemon writes it."""
    with open(path, "r+b") as file:
        file.seek((host_id - 1) * 512)
        data = bytearray(file.read(512))
        assert parse_leader(bytes(data)) is not None and int.from_bytes(data[:4], "little") == LOCKSPACE_MAGIC
        data[32:40] = host_id.to_bytes(8, "little")
        data[152:160] = timestamp.to_bytes(8, "little")
        data[174:176] = (1).to_bytes(2, "little")
        file.seek((host_id - 1) * 512)
        file.write(data)


def test_embedded_refuses_a_domain_that_another_host_renews(tmp_path):
    path = lease_file(tmp_path / "ids", "space", [])
    record(path, 3, 1000)
    clock = iter(range(1001, 2000))

    def sleep(seconds):
        record(path, 3, next(clock))

    leases = EmbeddedLeases(str(tmp_path), boot_clock, sleep)
    with pytest.raises(LeaseHeld, match="host 3 uses this domain"):
        leases.join("space", 1, LeaseArea(str(path), 0))
    with pytest.raises(LeaseError, match="not joined"):
        leases.acquire(Lease("space", "SDM", LeaseArea(str(path), 0)))


def test_s1_embedded_lease_ends_when_a_host_of_sanlock_appears_later(tmp_path):
    with make_embedded(tmp_path) as one:
        path = one.area.path
        one.leases.join("space", 1, one.area)
        owner = one.leases.acquire(one.sdm)
        assert one.leases.prove(one.sdm).owner == owner
        record(path, 3, 1000)
        watch = LeaseWatch(TIMING, owner, 1, one.leases.prove(one.sdm), boot_clock())
        assert watch.reason == "another host holds the lease"
        one.leases.release(one.sdm)
        with pytest.raises(LeaseHeld, match="host 3 uses this domain"):
            one.leases.acquire(one.sdm)


@pytest.mark.real("losetup")
def test_s1_embedded_sees_a_renewal_that_came_through_another_path_to_the_device(tmp_path):
    """What this host's page cache holds of the device is old as soon as another host wrote."""
    path = lease_file(tmp_path / "disk", "space", [])
    record(path, 3, 1000)
    with attached([path]) as (device,), open(device, "rb") as kept:
        # Somebody on this host read it and still has it open.
        kept.read(4 * MIB)
        clock = iter(range(1001, 2000))
        assert live_hosts(LeaseArea(device, 0), lambda _: record(path, 3, next(clock))) == [3]


@pytest.mark.parametrize("tag", [SafeleaseTag(12, 77), SafeleaseTag(None)])
def test_s1_embedded_refuses_a_lease_that_is_held_in_the_older_form(tmp_path, tag):
    path = tmp_path / "leases"
    path.write_bytes(tag.pack().ljust(2 * MIB, b"\0"))
    lease = Lease("space", "SDM", LeaseArea(str(path), MIB))
    leases = EmbeddedLeases(str(tmp_path), boot_clock, time.sleep)
    leases.join("space", 1, LeaseArea(str(lease_file(tmp_path / "ids", "space", [])), 0))
    if tag.host_id is None:
        assert leases.acquire(lease).host_id == 1
    else:
        with pytest.raises(LeaseHeld, match="host 12 holds the lease in the form of older versions"):
            leases.acquire(lease)


def test_embedded_takes_a_domain_whose_hosts_are_gone_after_their_limit(tmp_path):
    path = lease_file(tmp_path / "ids", "space", [])
    record(path, 3, 1000)
    slept = []
    assert live_hosts(LeaseArea(str(path), 0), slept.append) == []
    assert sum(slept) == TIMING.limit_s


def test_embedded_lease_is_held_against_another_process_until_its_helpers_end(tmp_path):
    with make_embedded(tmp_path) as one, make_embedded(tmp_path) as two:
        for setup in (one, two):
            setup.leases.join("space", 1, setup.area)
        one.leases.acquire(one.sdm)
        (inherited,) = (os.dup(fd) for fd in one.leases.filenos())
        one.leases.release(one.sdm)
        with pytest.raises(LeaseHeld, match="another process"):
            two.leases.acquire(two.sdm)
        assert two.leases.owner(two.sdm) is not None
        os.close(inherited)
        two.leases.acquire(two.sdm)
