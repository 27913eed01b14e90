# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What the command has beyond qemu-img: several files, JSON everywhere, help for each command."""

from __future__ import annotations

import json
import os
import pty
from pathlib import Path
from typing import Any

import pytest

import qcowlib
from qcowlib.cli.main import COMMANDS, main


def test_several_files_give_a_list(qcow: Any) -> None:
    for name in ("a", "b"):
        assert qcow("create", "-q", "-f", "qcow2", name, "1M").status == 0
    outcome = qcow("info", "--output=json", "a", "b")
    assert [item["filename"] for item in json.loads(outcome.out)] == ["a", "b"]
    text = qcow("info", "a", "b").out
    assert text.count("file format: qcow2") == 2


def test_one_bad_file_of_several_does_not_hide_the_others(qcow: Any) -> None:
    qcow("create", "-q", "-f", "qcow2", "a", "1M")
    outcome = qcow("info", "nofile", "a")
    assert outcome.status == 1
    assert "image: a" in outcome.out
    assert outcome.err == "qcow: Could not open 'nofile': Could not open 'nofile': No such file or directory\n"


def test_check_of_several_files_returns_the_worst(qcow: Any) -> None:
    qcow("create", "-q", "-f", "qcow2", "a", "1M")
    qcow("create", "-q", "raw", "1M")
    assert qcow("check", "a", "a").status == 0
    assert qcow("check", "a", "raw").status == 63
    assert qcow("check", "nofile", "a").status == 1


def test_create_and_resize_answer_in_json(qcow: Any) -> None:
    made = qcow("create", "--output=json", "-f", "qcow2", "a", "1M")
    assert json.loads(made.out) == {"filename": "a", "format": "qcow2", "virtual-size": 1 << 20}
    grown = qcow("resize", "--output=json", "a", "2M")
    assert json.loads(grown.out) == {"filename": "a", "virtual-size": 2 << 20}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_options_and_an_example(qcow: Any, command: str) -> None:
    for flag in ("-h", "--help"):
        outcome = qcow(command, flag)
        assert (outcome.status, outcome.err) == (0, "")
        assert outcome.out.startswith(f"usage: qcow {command} ")
        assert f"\nExample:\n  qcow {command} " in outcome.out
        assert "-h, --help" in outcome.out


def test_general_help_names_every_command_and_format(qcow: Any) -> None:
    out = qcow("--help").out
    assert all(f"\n  {command} " in out for command in COMMANDS)
    assert "Supported formats: file luks qcow2 raw" in out


def test_version_is_two_lines(qcow: Any) -> None:
    outcome = qcow("--version")
    assert outcome.status == 0
    assert len(outcome.out.splitlines()) == 2


def test_own_options_do_not_make_prefixes_ambiguous(qcow: Any) -> None:
    qcow("create", "-q", "-f", "qcow2", "a", "1M")
    assert qcow("resize", "--p=metadata", "a", "2M").status == 0


# Without words the demo is a long run of its own.
@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "demo"])
def test_no_line_ends_in_a_traceback(qcow: Any, command: str) -> None:
    for words in ([], ["x"], ["x", "y"], ["x", "y", "z"], ["--object", "secret,id=a,data=b", "x"], ["\udcff", "\0"]):
        outcome = qcow(command, *words)
        assert "Traceback" not in outcome.err
        assert "internal error" not in outcome.err, (command, words, outcome.err)


def test_references_can_be_kept_inside_the_folder(qcow: Any, tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "inner").mkdir()
    qcow("create", "-q", "-f", "qcow2", "outside", "1M")
    qcow("create", "-q", "-f", "qcow2", "inner/base", "1M")
    qcow("create", "-q", "-f", "qcow2", "-b", "../outside", "-F", "qcow2", "inner/escapes")
    qcow("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "inner/stays")
    commands = (["info", "--backing-chain"], ["check"], ["map"], ["compare", "outside"], ["commit", "-d"])
    for words in commands:
        assert qcow(*words, "inner/escapes").status == 0
    monkeypatch.setenv("QCOW_REFERENCES", "folder")
    for words in commands:
        assert qcow(*words, "inner/stays").status == 0
        outcome = qcow(*words, "inner/escapes")
        assert outcome.status in (1, 2)
        assert outcome.err.count("\n") == 1
    monkeypatch.setenv("QCOW_REFERENCES", "none")
    assert qcow("map", "inner/stays").status == 1
    assert qcow("info", "inner/stays").status == 0
    monkeypatch.setenv("QCOW_REFERENCES", "some")
    assert "QCOW_REFERENCES must be" in qcow("map", "inner/stays").err


def test_what_an_image_says_stays_on_its_line(qcow: Any) -> None:
    qcow("create", "-q", "-f", "qcow2", "-u", "-b", "no\nfile\x1b[31m", "-F", "raw", "a", "1M")
    outcome = qcow("info", "a")
    assert "backing file: no\\nfile\\x1b[31m" in outcome.out
    outcome = qcow("info", "--backing-chain", "a")
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (1, "", 1)


def test_progress_is_plain_lines_in_a_pipe_and_qemus_under_its_name(qcow: Any) -> None:
    qcow("create", "-q", "a", "1M")
    assert qcow("convert", "-p", "a", "b").out == "    (0.00/100%)\n    (100.00/100%)\n    (100.00/100%)\n"
    assert "\r" in qcow("convert", "-p", "a", "b", prog="qemu-img").out


def test_progress_on_a_terminal_has_rate_and_time_left(tmp_path: Any) -> None:
    (tmp_path / "a").write_bytes(b"x" * (8 << 20))
    pid, fd = pty.fork()
    if pid == 0:
        os._exit(main(["convert", "-p", str(tmp_path / "a"), str(tmp_path / "b")], "qcow"))
    text = b""
    try:
        while part := os.read(fd, 4096):
            text += part
    except OSError:
        pass  # the end, as a terminal tells it
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(fd)
    last = text.decode().split("\r")[-3]
    assert last.startswith("    (100.00/100%) ")
    assert last.rstrip().endswith("00:00:00 left")


def test_map_draws_one_picture_at_a_time(qcow: Any) -> None:
    qcow("create", "-q", "-f", "qcow2", "a", "64M")
    assert qcow("map", "--svg", "a").out.startswith("<svg ")
    assert qcow("map", "--html", "a").out.startswith("<!DOCTYPE html>")
    heat = qcow("map", "--heat", "--cells=64", "a").out
    assert "The guest's disk, by kind of cluster; a character is 1 MiB" in heat and "\x1b" not in heat
    panels = json.loads(qcow("map", "--heat", "--output=json", "a").out)["panels"]
    assert panels[0]["totals"]["nothing stored"] == 64 << 20
    assert qcow("map", "--svg", "--html", "a").status == 1
    assert qcow("map", "--svg", "-s", "1M", "a").status == 1


def test_chain_draws_a_tree_and_fails_for_a_broken_one(qcow: Any) -> None:
    qcow("create", "-q", "-f", "qcow2", "base", "1M")
    qcow("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top")
    outcome = qcow("chain", "top")
    assert outcome.status == 0 and [line.split("  ")[0] for line in outcome.out.splitlines()] == ["base", "└── top"]
    assert [item["filename"] for item in json.loads(qcow("chain", "--output=json", "top").out)] == ["base", "top"]
    qcow("rebase", "-u", "-b", "gone", "-F", "qcow2", "top")
    assert qcow("chain", ".").status == 1
    assert qcow("chain", "nofile").status == 1


def test_folder_is_checked_with_one_line_an_image_and_a_summary(qcow: Any, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        qcow("create", "-q", "-f", "qcow2", name, "1M")
    with (tmp_path / "b").open("r+b") as file:  # a leaked cluster: its refcount is 1, nothing refers to it
        file.truncate(5 << 16)
        file.seek(2 * 65536 + 4 * 2)
        file.write(b"\0\1")
    outcome = qcow("check", "-j", "2", ".")
    assert outcome.status == 3
    assert outcome.out == "a: no errors\nb: 1 leaked clusters\nc: no errors\n3 images: 2 clean, 1 with leaks\n"
    lines = [json.loads(line) for line in qcow("check", "--output=json", "a", "b", "nofile", "-j1").out.splitlines()]
    assert [line.get("result") for line in lines] == ["clean", "with leaks", "failed", None]
    assert lines[1]["leaks"] == 1 and "No such file" in lines[2]["error"]
    assert lines[3] == {"summary": {"images": 3, "clean": 1, "failed": 1, "with leaks": 1}}
    assert qcow("check", "-r", "leaks", ".").status == 0
    assert qcow("check", ".").out.endswith("3 images: 3 clean\n")


def test_folder_of_images_is_described(qcow: Any, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    qcow("create", "-q", "-f", "qcow2", "d/a", "1M")
    qcow("create", "-q", "-f", "qcow2", "-b", "a", "-F", "qcow2", "d/b")
    out = qcow("info", "d").out.splitlines()
    assert out[0].startswith("d/a: qcow2, 1 MiB virtual, ") and out[1].endswith(", over a")
    assert out[2] == "2 images: 2 qcow2"
    lines = [json.loads(line) for line in qcow("info", "--output=json", "--backing-chain", "-R", ".").out.splitlines()]
    assert [len(line["chain"]) for line in lines[:-1]] == [1, 2]
    assert qcow("info", "-j", "17", "d").status == 1


def test_thousand_overlays_in_one_call(qcow: Any, tmp_path: Path) -> None:
    qcow("create", "-q", "-f", "qcow2", "base", "1M")
    planned = qcow("overlay", "--plan", "-b", "base", "-F", "qcow2", "--count", "1000", "vm-%04d")
    assert (planned.status, planned.out) == (0, "1000 overlays over base would be made\n")
    assert not list(tmp_path.glob("vm-*"))
    outcome = qcow("overlay", "-b", "base", "-F", "qcow2", "--count", "1000", "vm-%04d")
    assert (outcome.status, outcome.out) == (0, "1000 overlays over base\n")
    assert len(list(tmp_path.glob("vm-*"))) == 1000
    assert qcow("overlay", "-b", "base", "-F", "qcow2", "vm-0001").status == 1
    assert qcow("overlay", "-b", "base", "-F", "qcow2", "--count", "3", "x%s").status == 1
    (tmp_path / "names").write_text("one\ntwo\n")
    made = json.loads(qcow("overlay", "-b", "base", "-F", "qcow2", "--names", "names", "--output=json").out)
    assert made == {"backing-filename": "base", "overlays": ["one", "two"], "virtual-size": 1 << 20}


def test_diff_says_what_differs_in_each_form(qcow: Any, tmp_path: Path) -> None:
    qcow("create", "-q", "-f", "qcow2", "old", "4M")
    qcow("create", "-q", "-f", "qcow2", "-b", "old", "-F", "qcow2", "new")
    with qcowlib.open(tmp_path / "new", "r+") as image:
        image.add_bitmap("b")
        image.pwrite(b"x" * 100, 1 << 20)
    assert qcow("diff", "old", "new").out.splitlines()[1].split() == ["0x100000", "0x1000", "data"]
    assert json.loads(qcow("diff", "--output=json", "--unit", "64k", "old", "new").out) == [
        {"start": 1 << 20, "length": 65536, "zero": False}
    ]
    assert qcow("diff", "--plan", "old", "new").out == "1 ranges: 4 KiB of data, 0 B of zeros\n"
    assert json.loads(qcow("diff", "--bitmap", "b", "--output=json", "new").out) == [
        {"start": 1 << 20, "length": 4096, "zero": False},
        {"start": (1 << 20) + 4096, "length": 61440, "zero": True},
    ]
    assert qcow("diff", "old", "new", "--stream", "x.diff").out == "1 records: 4 KiB of data, 0 B of zeros\n"
    told = json.loads(qcow("apply", "--plan", "--output=json", "x.diff").out)
    assert told == {"records": 1, "data": 4096, "zeros": 0}
    assert qcow("apply", "old", "x.diff", "-q").status == 0
    assert qcow("diff", "--plan", "old", "new").out == "0 ranges: 0 B of data, 0 B of zeros\n"
    for wrong in ("old", "--bitmap b old new", "-c old new", "--stream s --overlay o old new"):
        outcome = qcow("diff", *wrong.split())
        assert outcome.status == 1 and outcome.err.startswith("qcow: ")
    (tmp_path / "x.diff").write_bytes(b"QCOWDIFF" + bytes(100))
    assert qcow("apply", "old", "x.diff").err == "qcow: x.diff: the stream has a damaged header after 0 records\n"


def test_set_of_disks_is_backed_up_by_one_line(qcow: Any, tmp_path: Path) -> None:
    entries = []
    for name in ("a", "b"):
        qcow("create", "-q", "-f", "qcow2", f"{name}-full", "1M")
        qcow("create", "-q", "-f", "qcow2", name, "1M")
        qcow("bitmap", "--add", name, "nightly")
        with qcowlib.open(tmp_path / name, "r+") as image:
            image.pwrite(b"x", 0)
        backing = f"{name}-full"
        entries.append({"source": name, "target": f"{name}-1", "bitmap": "nightly", "backing": backing})
    (tmp_path / "set").write_text(json.dumps(entries))
    assert qcow("backup-set", "j", "set").err == "qcow: disk 1 of the set lacks 'backing-format'\n"
    (tmp_path / "set").write_text(json.dumps([{**entry, "backing-format": "qcow2"} for entry in entries]))
    assert qcow("backup-set", "--plan", "j", "set").out.count("at most") == 2
    assert qcow("backup-set", "j", "set").out == "2 disks, 128 KiB changed, all bitmaps advanced.\n"
    assert json.loads(qcow("backup-set", "--finish", "--output=json", "j").out)["result"] == "nothing"
    (tmp_path / "back").write_text(json.dumps([{"increment": "a-1", "target": "a-full"}]))
    assert qcow("backup-set", "--restore", "j", "back").out == "1 disks restored.\n"
    assert qcow("compare", "-q", "a", "a-full").status == 0
    for text in ("{}", "[1]", '[{"x": "y"}]', '[{"source": 1}]', "["):
        (tmp_path / "set").write_text(text)
        assert qcow("backup-set", "j", "set").status == 1


def test_sealed_disks_are_verified_and_mended(qcow: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        qcow("create", "-q", "-f", "qcow2", name, "1M")
        with qcowlib.open(tmp_path / name, "r+") as image:
            image.pwrite(b"x" * 100, 0)
    assert "digest: " in qcow("seal", "a").out
    assert json.loads(qcow("seal", "--output=json", "--sign", "test -s", "b").out)["hashes"] == 1
    assert qcow("verify", "a").out == "The disk is as it was sealed.\n"
    assert qcow("verify", "-j", "2", ".").out.endswith("2 images: 2 as sealed\n")
    with qcowlib.open(tmp_path / "a", "r+") as image:
        image.pwrite(b"y", 50)
    outcome = qcow("verify", "a")
    assert (outcome.status, outcome.out) == (2, "0x0 0x10000 changed\n")
    outcome = qcow("verify", "a", "b", "--output=json")
    kinds = [json.loads(line).get("result") for line in outcome.out.splitlines()]
    assert outcome.status == 2 and kinds == ["damaged", "as sealed", None]
    assert qcow("verify", "--from", "b", "a").out == "64 KiB mended\nThe disk is as it was sealed.\n"
    assert qcow("verify", "--check", "false", "a").err == "qcow: 'false' ended with status 1\n"
    assert qcow("verify", "--seal", "x", "a", "b").status == 1
    assert "to read" in qcow("seal", "--plan", "a").out


def test_damaged_image_is_salvaged_and_reported(qcow: Any, tmp_path: Path) -> None:
    qcow("create", "-q", "-f", "qcow2", "a", "64M")
    with qcowlib.open(tmp_path / "a", "r+") as image:
        image.pwrite(b"x" * (1 << 20), 0)
    assert qcow("salvage", "a", "whole").out == "Everything was read.\n"
    raw = (tmp_path / "a").read_bytes()
    table = int.from_bytes(raw[int.from_bytes(raw[40:48], "big") :][:8], "big") & 0x00FFFFFFFFFFFE00
    with (tmp_path / "a").open("r+b") as file:  # entry 3 leads to no cluster, entry 5 past the end
        file.seek(table + 24)
        file.write((0x80000000000A0200).to_bytes(8, "big"))
        file.seek(table + 40)
        file.write((0x8000000100000000).to_bytes(8, "big"))
    outcome = qcow("salvage", "--plan", "--output=json", "a")
    found = json.loads(outcome.out)
    assert outcome.status == 2 and {one["start"] for one in found["lost"]} == {3 << 16, 5 << 16}
    assert qcow("salvage", "a", "rescued").status == 2
    assert qcow("compare", "-q", "whole", "rescued").status == 1
    assert qcow("check", "-q", "-r", "all", "--report", "report", "a").status in (0, 2, 3)
    report = json.loads((tmp_path / "report").read_text())
    assert report["before"]["corruptions"] and "after" in report
    places = {one["guest-offset"] for one in report["before"]["findings"]}
    assert 3 << 16 in places and {"kind", "owner", "host-offset"} <= report["before"]["findings"][0].keys()
    assert qcow("check", "--report", "report", "a", "whole").status == 1


def test_merge_cut_after_it_was_linked_is_ended_by_the_same_command(qcow: Any, tmp_path: Path) -> None:
    for number, name in enumerate("abcd"):
        below = ["-b", "abcd"[number - 1], "-F", "qcow2"] if number else []
        assert qcow("create", "-q", "-f", "qcow2", *below, name, *([] if number else ["4M"])).status == 0
    words = ("merge", "-d", "--from", "a", "--to", "c", "d")
    plan = json.loads(qcow("merge", "--plan", "--from", "a", "--to", "c", "--output=json", "d").out)
    assert (len(plan["sources"]), plan["above"]) == (2, "d")
    journal = tmp_path / "a.merge"
    names = [str(tmp_path / name) for name in "dca"]
    kept = {name: (tmp_path / name).stat() for name in "bc"}
    remove = [[name, kept[name].st_dev, kept[name].st_ino] for name in "cb"]
    state = {"journal": 1, "merge": [*names, None], "state": "linking", "done": 4 << 20, "end": 4 << 20}
    state |= {"above": ["d", "qcow2"], "result": ["a", "qcow2"], "remove": remove, "seen": []}
    assert qcow("rebase", "-u", "-b", "a", "-F", "qcow2", "d").status == 0
    journal.write_text(json.dumps(state))
    outcome = qcow(*words)
    assert (outcome.status, outcome.out) == (0, "Layers merged.\n")
    assert sorted(path.name for path in tmp_path.iterdir() if len(path.name) == 1) == ["a", "d"]
    assert not journal.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("backing.driver=qcow2", "'backing' is for images that name a backing file"),
        ("backing.backing.driver=raw", "only the first backing file takes a driver"),
    ],
)
def test_what_is_said_of_a_backing_file_is_used_or_refused(qcow: Any, options: str, message: str) -> None:
    qcow("create", "-q", "-f", "qcow2", "a", "1M")
    outcome = qcow("map", "--image-opts", f"driver=qcow2,file.filename=a,{options}")
    assert outcome.status == 1
    assert message in outcome.err


def test_compressed_data_are_not_written_over_data(qcow: Any, tmp_path: Path) -> None:
    qcow("create", "-q", "-f", "qcow2", "new", "64k")
    with qcowlib.open(tmp_path / "new", "r+") as image:
        image.pwrite(b"9" * 65536, 0)
    qcowlib.create(tmp_path / "source", 65536)
    outcome = qcow("convert", "-n", "-O", "qcow2", "-c", "-S", "0", "source", "new")
    assert (outcome.status, outcome.err.count("\n")) == (1, 1)
    assert "compressed data can only be written where nothing is allocated" in outcome.err
    with qcowlib.open(tmp_path / "new") as image:
        assert image.pread(4, 0) == b"9999"


@pytest.mark.parametrize(
    "line",
    [
        ("check", "blkdebug::a"),
        ("commit", "blkdebug::a"),
        ("rebase", "-u", "-b", "", "blkdebug::a"),
        ("compact", "blkdebug::a"),
        ("info", "--image-opts", "driver=blkdebug,image.driver=qcow2,image.file.filename=a"),
        ("resize", "--image-opts", "driver=blkdebug,image.driver=qcow2,image.file.filename=a", "2M"),
    ],
    ids=lambda line: line[0],
)
def test_a_command_that_would_pass_by_blkdebug_refuses_it(qcow: Any, line: tuple[str, ...]) -> None:
    assert qcow("create", "-q", "-f", "qcow2", "a", "1M").status == 0
    outcome = qcow(*line)
    assert outcome.status == 1
    assert outcome.err.startswith("qcow: Could not open '")
    assert "through blkdebug\n" in outcome.err or "behind blkdebug can only be read\n" in outcome.err
    assert outcome.err.count("\n") == 1
