# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A passphrase given to any command, whatever is wrong with the line, is in nothing that comes out of it.

Looked through: standard output and error, with tracebacks asked for, every
error made on the way (``str``, ``repr``, arguments, causes), what is logged,
and every file that the command leaves.
"""

from __future__ import annotations

import base64
import logging
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcowlib
from qcowlib.cli.console import Failure
from qcowlib.cli.main import COMMANDS
from qcowlib.errors import Error
from qcowlib.luks import KeyChange, LuksHeader
from qcowlib.qcow2.amend import AmendOptions
from qcowlib.qcow2.create import Encryption
from qcowlib.storage.encrypted import create_luks
from qcowlib.storage.file import FileStorage
from tests.qcowlib.cli.conftest import Outcome, run_ours

WORD = "Tr0ub4dor"
NEXT = "c0rrecth0rse"
#: In any of these forms it would be a passphrase given away.
FORMS = [
    form
    for word in (WORD, NEXT)
    for form in (word, base64.b64encode(word.encode()).decode(), word.encode().hex(), word[:5], word[-5:])
]
SIZE = 1 << 20
GIVEN = f"--object secret,id=s,file=passphrase --object secret,id=n,data={NEXT}"
E = "--image-opts driver=qcow2,file.filename=e,encrypt.key-secret=s"
TOP = "driver=qcow2,file.filename=top,encrypt.key-secret=s,backing.encrypt.key-secret=s"

#: A line for each command that takes keys, and for each way to be given one; all succeed.
LINES = {
    "amend": f"amend -p {GIVEN} -o encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=1 {E}",
    "amend-luks": f"amend {GIVEN} -o state=active,new-secret=n,iter-time=1 --image-opts"
    " driver=luks,file.filename=l,key-secret=s",
    "apply": f"apply --output=json --no-check {GIVEN} {E} changes",
    "backup": f"backup --output=json {GIVEN} --bitmap b -b base -F raw {E} new",
    "bench": f"bench -c 2 -q {GIVEN} {E}",
    "bitmap": f"bitmap --add {GIVEN} {E} more",
    "check": f"check --output=json --report=report {GIVEN} {E}",
    "commit": f"commit -p {GIVEN} --image-opts {TOP}",
    "compact": f"compact -p --output=json {GIVEN} {E}",
    "compare": f"compare -p {GIVEN} {E} driver=qcow2,file.filename=e,encrypt.key-secret=s",
    "convert": f"convert -p {GIVEN} {E} -O qcow2 -o encrypt.format=luks,encrypt.key-secret=n,encrypt.iter-time=1 new",
    "create": f"create {GIVEN} -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1 new 1M",
    "create-luks": f"create {GIVEN} -f luks -o key-secret=n,iter-time=1 new 1M",
    "dd": f"dd {GIVEN} --image-opts if={E[13:]} of=new bs=64k count=2",
    "diff": f"diff --output=json {GIVEN} {E} driver=qcow2,file.filename=e,encrypt.key-secret=s",
    "info": f"info --output=json {GIVEN} {E}",
    "map": f"map --output=json {GIVEN} {E}",
    "measure": f"measure --output=json {GIVEN} -O qcow2 {E}",
    "merge": f"merge --plan {GIVEN} --image-opts --from e --to top {TOP}",
    "rebase": f"rebase -p {GIVEN} --image-opts -b '' {TOP}",
    "resize": f"resize {GIVEN} {E} 2M",
    "restore": f"restore --plan {GIVEN} --image-opts driver=qcow2,file.filename=increment {E[13:]}",
    "salvage": f"salvage --output=json {GIVEN} {E} new",
    "seal": f"seal --output=json --seal=seal {GIVEN} {E}",
    "serve": f"serve --plan {GIVEN} --socket sock {E}",
    "snapshot": f"snapshot -c s {GIVEN} {E}",
    "verify": f"verify --output=json --seal=sealed {GIVEN} {E}",
}
#: Commands that take no keys.
KEYLESS = {"backup-set", "chain", "demo", "overlay"}


#: The same words, wrong in one way.
WRONG = ("--bogus", f"--objects=secret,id=x,data={WORD}", f"--o=secret,id=x,data={WORD}")
SWAPS = (
    ("key-secret=s", "key-secret=n"),
    ("key-secret=s", "key-secret=nobody"),
    ("filename=e", "filename=no"),
    ("new-secret=n", "new-secret=nobody"),
    ("passphrase", "no"),
    ("driver=qcow2", "driver=raw"),
)
BAD_OBJECTS = (
    f"secret,id=x,data={WORD[:4]},{WORD[4:]}",
    f"secret,id=x,data={WORD[:4]},{WORD[4:]}=1",
    f"secret,id=x,data={WORD},file=passphrase",
    f"secret,data={WORD}",
    f"secret,id=x,data={WORD},format=base64",
    f"secret,id=x,data={WORD},keyid=s,iv={NEXT}",
    f"secret,id=x,data={WORD},keyid=nobody",
    f"secret,id=s,data={NEXT}",
    f"data={WORD},id=x",
    f'{{"qom-type":"secret","id":"x","data":{WORD}}}',
    f'{{"qom-type":"secret","id":"x","data":"{WORD}',
    f'{{"qom-type":"secret","id":"x","data":"{WORD}","{NEXT}":"y"}}',
    f'{{"qom-type":"secret","id":"x","data":"\\q{WORD}"}}',
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that each line finds, by name."""
    where = tmp_path_factory.mktemp("secrets")
    (where / "passphrase").write_text(WORD)
    area, _ = LuksHeader.create(WORD, cipher_alg="aes-128", iter_time=0)
    encrypt = Encryption(2, area)
    qcowlib.create(where / "e", SIZE, cluster_size=4096, encrypt=encrypt)
    qcowlib.create(where / "top", SIZE, backing="e", backing_format="qcow2", check_backing=False, encrypt=encrypt)
    (where / "base").write_bytes(bytes(SIZE))
    file = FileStorage.create(where / "l")
    create_luks(file, SIZE, WORD, iter_time=0, cipher_alg="aes-128")
    file.close()
    with qcowlib.open(where / "e", "r+", secret=WORD) as image:
        image.add_bitmap("b")
        image.pwrite(b"guest" * 1000, 4096)
    for line in (
        f"seal --seal=sealed {GIVEN} {E}",
        f"diff --stream=changes {GIVEN} {E} driver=qcow2,file.filename=e,encrypt.key-secret=s",
        f"backup {GIVEN} --bitmap b -b base -F raw {E} increment",
    ):
        assert run_ours(shlex.split(line), where, "qcow").status == 0, line
    return {path.name: path.read_bytes() for path in where.iterdir()}


class Watch:
    """What one command line gives away."""

    def __init__(self, where: Path, made: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
        self.where = where
        self.made = made
        self.errors: list[BaseException] = []
        watched = self.errors

        def counted(kind: type[BaseException]) -> None:
            first = kind.__init__

            def init(self: BaseException, *args: object, **words: object) -> None:
                watched.append(self)
                first(self, *args, **words)

            monkeypatch.setattr(kind, "__init__", init)

        counted(Error)
        counted(Failure)
        monkeypatch.setenv("QCOW_DEBUG", "1")

    def run(self, words: list[str]) -> Outcome:
        """Run a line among fresh files, and look through all that it told and left."""
        for path in self.where.iterdir():
            path.unlink()
        for name, content in self.made.items():
            (self.where / name).write_bytes(content)
        self.errors.clear()
        outcome = run_ours(words, self.where, "qcow")
        told = [outcome.out, outcome.err]
        for error in self.errors:
            cause: BaseException | None = error
            while cause is not None:
                told += [str(cause), repr(cause), repr(cause.args), repr(getattr(cause, "__notes__", ()))]
                cause = cause.__cause__ or cause.__context__
        for path in self.where.iterdir():
            if path.name != "passphrase" and path.is_file():
                told.append(path.read_bytes().decode("latin-1"))
        for text in told:
            for form in FORMS:
                assert form not in text, (words, form, text[max(0, text.index(form) - 80) :][:200])
        assert "Traceback" not in outcome.err, (words, outcome.err)
        return outcome


@pytest.fixture
def watch(tmp_path: Path, made: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(tmp_path, made, monkeypatch)


def test_every_command_is_tried() -> None:
    assert {line.split()[0] for line in LINES.values()} | KEYLESS == set(COMMANDS)


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_no_passphrase_comes_out_whatever_is_wrong(line: str, watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    words = shlex.split(line)
    assert watch.run(words).status in (0, 3), line
    for change in changes(words):
        watch.run(change)
    assert not any(form in caplog.text for form in FORMS)


def changes(words: list[str]) -> Iterator[list[str]]:
    """Yield *words* wrong in one way each."""
    first = words.index("--object") + 1
    for wrong in WRONG:
        yield [words[0], wrong, *words[1:]]
    # All of these are told by one function.
    for bad in BAD_OBJECTS if words[0] in ("bitmap", "info") else BAD_OBJECTS[:1]:
        yield [*words[:first], bad, *words[first + 1 :]]
    for old, new in SWAPS:
        yield [word.replace(old, new) for word in words]
    for at, word in enumerate(words):
        # Without its --object, what follows it would be the name of a file; without --plan, serve serves.
        if at and word not in ("--object", "--plan"):
            yield words[:at] + words[at + 1 :]


@pytest.mark.parametrize("name", sorted(KEYLESS - {"demo"}))
def test_a_command_without_keys_repeats_no_passphrase(name: str, watch: Watch) -> None:
    for words in (
        [name, f"--object=secret,id=s,data={WORD}", "e"],
        [name, "--object", f"secret,id=s,data={WORD}", "e"],
    ):
        assert watch.run(words).status


def test_errors_of_the_library_repeat_no_passphrase(watch: Watch) -> None:
    for name, content in watch.made.items():
        (watch.where / name).write_bytes(content)
    wrong = NEXT + "x"
    with qcowlib.open(watch.where / "e", "r+", secret=WORD) as image:
        for change in (
            KeyChange("active", new_secret=NEXT, secret=wrong),
            KeyChange("active", new_secret=NEXT, secret=WORD, keyslot=0),
            KeyChange("active", new_secret=NEXT, secret=WORD, keyslot=9),
            KeyChange("inactive", old_secret=wrong),
            KeyChange("inactive", old_secret=WORD),
            KeyChange("bogus", old_secret=WORD, new_secret=NEXT),
        ):
            with pytest.raises(qcowlib.Error):
                image.amend(AmendOptions(encrypt=change))
            assert not any(form in repr(change) + repr(AmendOptions(encrypt=change)) for form in FORMS)
    with pytest.raises(qcowlib.Error):
        qcowlib.open(watch.where / "e", secret=wrong)
    assert watch.errors
    for error in watch.errors:
        assert not any(form in f"{error}{error!r}{error.args!r}" for form in FORMS)
