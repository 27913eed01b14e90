# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Stored tasks: their bytes, their states, and that every cut ends in done or undone."""

import json
import shutil
from pathlib import Path

import pytest

from qcowlib.errors import StorageError
from spm import tasks
from spm.errors import LeaseLost, TaskFailed
from spm.tasks import Job, Recovery, TaskManager, TaskRecord, TaskStore, may_follow
from storage_pool.errors import InvalidName, MetadataError
from storage_pool.ids import make_id
from storage_pool.rooted import Rooted

GOLDEN = Path(__file__).parent / "golden/tasks"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
STATES = json.loads((Path(__file__).parents[1] / "storage_pool/golden/tables/tables.json").read_text())["task_states"]


class Token:
    """Dies, or loses its lease, at the check number ``at``."""

    epoch = 1

    def __init__(self, at=None, error=None):
        self.at, self.error, self.checks = at, error, 0

    def check(self):
        self.checks += 1
        if self.checks == self.at:
            raise self.error


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def root(tmp_path):
    made = Rooted(str(tmp_path))
    yield made
    made.close()


@pytest.fixture
def store(root):
    return TaskStore(root)


@pytest.fixture
def token():
    return Token()


def undo(world, name="volume"):
    return Recovery(f"undo {name}", "test", "World", "discard", (name,))


@pytest.fixture
def world():
    return set()


@pytest.fixture
def manager(store, world):
    return TaskManager(store, {"discard": lambda token, params: world.discard(params[0])})


def test_op16_stored_task_of_vdsm_is_read(store, tmp_path):
    shutil.copytree(GOLDEN / EXPECTED["dir"], tmp_path / EXPECTED["dir"])
    record = store.load(EXPECTED["dir"])
    wanted = EXPECTED["read_back"]
    assert (record.name, record.state, record.tag) == (wanted["name"], wanted["state"], wanted["tag"])
    assert record.jobs == tuple(Job(job["name"], job["runcmd"]) for job in wanted["jobs"])
    assert record.recoveries == tuple(
        Recovery(item["name"], item["module"], item["object"], item["function"], tuple(item["params"]))
        for item in wanted["recoveries"]
    )


def test_op16_stored_task_is_byte_for_byte_what_vdsm_writes(store, token, tmp_path):
    shutil.copytree(GOLDEN / EXPECTED["dir"], tmp_path / EXPECTED["dir"])
    store.save(token, store.load(EXPECTED["dir"]))
    assert sorted(path.name for path in (tmp_path / EXPECTED["dir"]).iterdir()) == EXPECTED["files"]
    for name in EXPECTED["files"]:
        assert (tmp_path / EXPECTED["dir"] / name).read_bytes() == (GOLDEN / EXPECTED["dir"] / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [EXPECTED["dir"]]


def test_op16_allowed_states_are_those_of_vdsm():
    allowed = {new: {old for old in STATES["allowed_from"] if may_follow(old, new)} for new in STATES["allowed_from"]}
    assert allowed == {new: set(old) for new, old in STATES["allowed_from"].items()}
    assert set(STATES["done"]) == tasks.DONE


def test_op16_state_that_is_not_allowed_is_refused(manager, token):
    with pytest.raises(TaskFailed, match="from running to init"), manager.task(token, "create") as task:
        task.move("init")


def test_op16_finished_task_leaves_nothing(manager, store, token, world):
    with manager.task(token, "create") as task:
        task.push(undo(world))
        world.add("volume")
        assert store.load(task.record.id).state == "running"
    assert world == {"volume"} and store.names() == []


def test_op16_failed_task_is_undone_last_step_first(store, token):
    undone = []
    manager = TaskManager(store, {"note": lambda token, params: undone.append(*params)})
    with pytest.raises(StorageError), manager.task(token, "create") as task:
        for number in range(3):
            task.push(Recovery("", "", "", "note", (str(number),)))
        raise StorageError(28)
    assert undone == ["2", "1", "0"] and store.names() == []


def test_op16_one_undo_can_replace_all(store, token):
    undone = []
    manager = TaskManager(store, {"note": lambda token, params: undone.append(*params)})
    with pytest.raises(StorageError), manager.task(token, "create") as task:
        task.push(Recovery("", "", "", "note", ("a",)))
        task.push(Recovery("", "", "", "note", ("b",)))
        task.replace(Recovery("", "", "", "note", ("whole",)))
        raise StorageError(28)
    assert undone == ["whole"]


def test_s5_lost_lease_leaves_the_task_to_the_next_manager(manager, store, token, world):
    with pytest.raises(LeaseLost), manager.task(token, "create") as task:
        task.push(undo(world))
        world.add("volume")
        raise LeaseLost("lost")
    assert world == {"volume"} and len(store.names()) == 1
    assert manager.recover(token) == {}
    assert world == set() and store.names() == []


def create(manager, token, world):
    with manager.task(token, "create") as task:
        for name in ("one", "two"):
            task.push(undo(world, name))
            token.check()
            world.add(name)


def test_s5_manager_killed_at_every_step_is_followed_by_one_that_ends_the_task(store, manager, world):
    counted = Token()
    create(manager, counted, world)
    assert world == {"one", "two"} and counted.checks > 10
    for at in range(1, counted.checks + 1):
        world.clear()
        with pytest.raises(Killed):
            create(manager, Token(at, Killed()), world)
        # The one who cleans up is killed at each of its steps too.
        for again in range(1, 20):
            try:
                assert manager.recover(Token(again, Killed())) == {}
                break
            except Killed:
                continue
        assert store.names() == []
        assert world in (set(), {"one", "two"})


class Cut:
    """A directory whose change number ``at`` does not happen."""

    def __init__(self, root, at):
        self._root, self._left = root, at

    def __getattr__(self, name):
        method = getattr(self._root, name)
        if name not in ("rename", "replace", "make_directory", "remove_tree"):
            return method

        def counted(*arguments, **options):
            self._left -= 1
            if self._left == 0:
                raise Killed
            return method(*arguments, **options)

        return counted


def test_s5_save_that_is_cut_anywhere_leaves_the_old_or_the_new_task(root, token):
    old = TaskRecord(make_id(), "old", "running", (Job("old", "old"),), (undo(set()),))
    new = old._replace(name="new", recoveries=(undo(set()), undo(set())))
    seen = set()
    for at in range(1, 12):
        TaskStore(root).save(token, old)
        try:
            TaskStore(Cut(root, at)).save(token, new)
        except Killed:
            seen.add(TaskStore(root).load(old.id).name)
        TaskStore(root).remove(token, old.id)
    assert seen == {"old", "new"}


def test_s5_first_save_that_is_cut_is_forgotten_by_the_next_manager(root, manager, token):
    record = TaskRecord(make_id(), "new", "running", (Job("new", "new"),))
    with pytest.raises(Killed):
        TaskStore(Cut(root, 3)).save(token, record)
    assert TaskStore(root).names() == [record.id]
    assert manager.recover(token) == {}
    assert root.names() == []


def test_op16_bad_task_is_reported_and_keeps_nobody_from_starting(manager, store, token, world, tmp_path):
    bad, unknown = sorted((make_id(), make_id()))
    (tmp_path / bad).mkdir()
    (tmp_path / bad / f"{bad}.task").write_bytes(b"id = nonsense\n")
    store.save(token, TaskRecord(unknown, "odd", "running", (), (Recovery("x", "m", "o", "rm -rf", ()),)))
    good = TaskRecord(make_id(), "good", "running", (), (undo(world),))
    store.save(token, good)
    world.add("volume")
    left = manager.recover(token)
    assert set(left) == {bad, unknown}
    assert "rm -rf" in left[unknown]
    assert world == set() and store.names() == sorted((bad, unknown))


@pytest.mark.parametrize("count", ["-1", "1001", "٣", "x"])
def test_op16_impossible_counts_are_refused(store, token, tmp_path, count):
    record = TaskRecord(make_id(), "odd", "running")
    store.save(token, record)
    path = tmp_path / record.id / f"{record.id}.task"
    path.write_text(path.read_text().replace("nrecoveries = 0", f"nrecoveries = {count}"))
    with pytest.raises(MetadataError, match="nrecoveries"):
        store.load(record.id)


@pytest.mark.parametrize("record", [{"name": "a\nstate = finished"}, {"tag": "a\0"}, {"store": "\x1b[0m"}])
def test_op16_text_that_is_not_one_line_is_refused(record):
    with pytest.raises(InvalidName):
        TaskRecord(make_id(), "x")._replace(**record).files()


def test_op16_parameter_with_a_comma_is_refused():
    with pytest.raises(InvalidName, match="comma"):
        TaskRecord(make_id(), "x", recoveries=(Recovery("", "", "", "f", ("a,b",)),)).files()


def test_op16_equals_signs_come_back(store, token):
    record = TaskRecord(make_id(), "a=b", "queued", (Job("j", "f(a=1)"),))
    store.save(token, record)
    assert store.load(record.id) == record
