# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Every operation on random images: answers, exit status and resulting images are those of the real qemu-img.

Images are made alike by the real programs; the line runs once with each; then
the real tool judges both results.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from tests.qcowlib.cli.alike import LONG, NAMES, SIZES, Images, assert_alike, images, recorded, writes
from tests.qcowlib.cli.conftest import Outcome, Pair, run_ours, run_real, split
from tests.qcowlib.qcow2 import corpus

pytestmark = [pytest.mark.real("qemu-img", "qemu-io"), pytest.mark.fuzz, pytest.mark.timeout(0)]

few = settings(max_examples=8 * LONG, deadline=None)
version_3 = images(versions=("1.1",))
#: Reports of progress have tests of their own: how many there are depends on the host.
quiet = st.sampled_from(("", "", "-q"))


@contextmanager
def built(made: Images, *more: str) -> Iterator[Pair]:
    """Give both folders with the images *made*."""
    with tempfile.TemporaryDirectory() as root:
        for line in (*made.lines, *more):
            note(line)
        pair = made.build(Path(root))
        pair.setup(*more)
        yield pair


def play(pair: Pair, lines: list[str], *names: str, allocation: bool = True) -> None:
    """Run *lines* with both programs (``!`` lines are the real one's in both folders), then have *names* judged."""
    for line in lines:
        note(line)
        if line.startswith("!"):
            pair.attempt(line[1:])
        else:
            pair.compare(line)
    assert_alike(pair, *names, allocation=allocation)


@few
@given(version_3, quiet, st.sampled_from(("", "-d", "-b mid", "-b base", "-b mid -d", "-b other", "-r 1G")))
def test_commit(made: Images, flag: str, words: str) -> None:
    with built(made) as pair:
        # Written in pieces of its own size, zeros as zeros: docs/drop_in.md.
        play(pair, [f"commit {flag} {words} top"], *NAMES, allocation=False)


@few
@given(
    version_3,
    quiet,
    st.sampled_from(("-b base", "-b mid", "-b other", "-b ''", "-u -b base", "-u -b other", "-u -b ''", "-b none")),
)
def test_rebase(made: Images, flag: str, words: str) -> None:
    form = made.base if "-b base" in words else "qcow2"
    with built(made) as pair:
        play(pair, [f"rebase {flag} {words} -F {form} top"], *NAMES)


snapshots = st.one_of(
    st.builds("snapshot {} -{} {} top".format, st.sampled_from(("", "-q")), st.sampled_from("ccad"),
              st.sampled_from(("one", "two", "1", "2"))),
    st.just("snapshot -l top"),
    st.builds('!io top "{}"'.format, writes(top=0)),
)  # fmt: skip


@few
@given(images(), st.lists(snapshots, min_size=2, max_size=8))
def test_snapshot(made: Images, lines: list[str]) -> None:
    with built(made) as pair:
        play(pair, lines, "top")


@few
@given(
    version_3,
    st.lists(
        st.builds(
            "resize {} top {}".format,
            st.sampled_from(("", "-q", "--shrink", "--shrink", "--preallocation=metadata", "--preallocation=off")),
            st.sampled_from((*SIZES, "+64k", "-- -64k", "+1000", "-1M", "70k")),
        ),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
)
def test_resize(made: Images, lines: list[str], snapshot: bool) -> None:
    if not any(" top" in line and "cluster_size=512" in line for line in made.lines):
        # What was cut off inside a cluster shows again there when it grows, and reads as zeros here.
        shrinks = [index for index, line in enumerate(lines) if "--shrink" in line]
        lines = lines[: shrinks[0] + 1] if shrinks else lines
    with built(made, *(["snapshot -c s top"] if snapshot else [])) as pair:
        # Zeros are stored only where the backing file would show through: docs/drop_in.md.
        play(pair, lines, "top", allocation=False)


amends = st.lists(
    st.sampled_from(
        (
            "compat=1.1", "lazy_refcounts=on", "lazy_refcounts=off", "refcount_bits=1", "refcount_bits=8",
            "refcount_bits=16", "refcount_bits=64",
        )
    ),
    min_size=1, max_size=3, unique=True,
)  # fmt: skip


# The real program changes refcounts of large clusters for minutes.
@few
@given(
    images(clusters=("512", "4k", "64k", "64k")),
    quiet,
    st.lists(amends, min_size=1, max_size=2),
    st.sampled_from(("", "compat=0.10", "size=2M", "size=4M")),
    st.booleans(),
)
def test_amend(made: Images, flag: str, lists: list[list[str]], last: str, snapshot: bool) -> None:
    if "size" in last and any("0.10" in line for line in made.lines):
        last = "compat=0.10"  # growing version 2 images is refused there: docs/drop_in.md
    changes = [*(",".join(words) for words in lists), *([last] if last else [])]
    with built(made, *(["snapshot -c s top"] if snapshot else [])) as pair:
        play(pair, [f"amend {flag} -o {words} top" for words in changes], "top", allocation=False)


bitmaps = st.one_of(
    st.builds(
        "bitmap {} top {}".format,
        st.sampled_from(
            (
                "--add", "--add -g 64k", "--add --disable -g 512", "--add -g 4k", "--add -g 1000", "--remove",
                "--clear", "--enable", "--disable", "--merge one", "--merge two", "--merge x -b other -F qcow2",
                "--merge x -b other", "--add --merge x -b other -F qcow2", "--disable --clear",
            )
        ),
        st.sampled_from(("one", "two")),
    ),
    st.builds('!io top "{}"'.format, writes(top=0)),
)  # fmt: skip


@few
@given(version_3, st.lists(bitmaps, min_size=3, max_size=9))
def test_bitmap(made: Images, lines: list[str]) -> None:
    with built(made, "bitmap --add -g 4k other x", 'io other "write 4k 8k" "write 48k 1k"') as pair:
        play(pair, lines, "top", "other")
        assert recorded(pair.ours / "top") == recorded(pair.real / "top")


conversions = st.builds(
    "convert {} {} {} {}".format,
    st.sampled_from(("-O raw", "-O qcow2", "-O qcow2 -c", "-O qcow2 -o cluster_size=4k", "-O qcow2 -o compat=0.10",
                     "-O qcow2 -o extended_l2=on", "-O qcow2 -o preallocation=metadata",
                     "-O qcow2 -c -o cluster_size=1k", "-O qcow2 -c -o compression_type=zstd",
                     "-O qcow2 -o lazy_refcounts=on,refcount_bits=1")),
    st.sampled_from(("", "-S 0", "-S 64k", "-S 512", "-W", "-m 3", "-r 1G", "-C", "-W -m 8", "-t none", "-U")),
    st.sampled_from(("", "", "-q", "--salvage", "-l s", "-l nothing")),
    st.sampled_from(("base", "top", "other", "mid other", "top base", "-B base -F qcow2 mid", "-B mid -F qcow2 top",
                     "-f raw base")),
)  # fmt: skip


@few
@given(version_3, conversions)
def test_convert(made: Images, line: str) -> None:
    with built(made, "snapshot -c s top") as pair:
        note(line)
        outcome = pair.compare(f"{line} new")
        if outcome.status:
            # The real one leaves a target that it made and could not open: docs/drop_in.md.
            (pair.real / "new").unlink(missing_ok=True)
        play(pair, [], *(["new"] if outcome.status == 0 else []))


cached = st.builds(
    "{} {}".format,
    st.sampled_from(("", "-t none", "-t writethrough", "-t directsync", "-t unsafe", "-t wrong")),
    st.sampled_from(("", "-T none", "-T writeback", "-T directsync", "-T unsafe", "-T wrong")),
)


@few
@given(
    version_3,
    cached,
    st.lists(st.builds("bitmap {} top {}".format, st.sampled_from(("--add", "--add -g 512", "--add --disable")),
                       st.sampled_from(("a", "b", "c"))), max_size=3, unique_by=lambda line: line[-1]),
    st.lists(writes(top=0), max_size=3),
    st.sampled_from((False, False, True)),
    st.sampled_from(("--bitmaps", "--bitmaps", "--bitmaps --skip-broken-bitmaps", "", "--skip-broken-bitmaps")),
    st.sampled_from(("-O qcow2", "-O qcow2 -c", "-O qcow2 -o cluster_size=4k", "-O qcow2 -o compat=0.10", "-O raw",
                     "-O qcow2 -B mid -F qcow2", "-n -O qcow2")),
)  # fmt: skip
def test_convert_with_bitmaps(
    made: Images, cache: str, added: list[str], commands: list[str], killed: bool, words: str, form: str
) -> None:
    size = next(line.split()[-1] for line in made.lines if line.startswith("create") and " top " in line)
    prepare = [f"create -q -f qcow2 new {'4M' if killed else size}"] if "-n" in form else []
    with built(made, *added, *prepare) as pair:
        if commands or killed:
            # Who ends without closing leaves its bitmaps inconsistent.
            wanted = [f'"{command}"' for command in commands] + ["abort"] * killed
            pair.attempt(f"io top {' '.join(wanted)}")
        outcome = pair.compare(f"convert {cache} {words} {form} top new")
        if outcome.status:
            return  # the real one may leave a file
        assert_alike(pair, "new")
        if "raw" not in form:
            assert recorded(pair.ours / "new") == recorded(pair.real / "new")


@few
@given(
    version_3,
    st.sampled_from(("-O qcow2", "-O qcow2 --target-is-zero", "-O qcow2 -c", "-O raw")),
    st.sampled_from(("top", "mid", "base")),
    st.sampled_from(SIZES),
    st.booleans(),
)
def test_convert_into_an_existing_target(made: Images, words: str, source: str, size: str, filled: bool) -> None:
    form = words.split()[1]
    fill = ['io new "write -P 9 0 64k"' if form == "qcow2" else 'io -f raw new "write -P 9 0 64k"']
    # A compressed cluster over data is refused by both, by us with the reason.
    filled = filled and not words.endswith(("--target-is-zero", "-c"))
    prepare = [f"create -q -f {form} new {size}", *(fill if filled else [])]
    with built(made, *prepare) as pair:
        play(pair, [f"convert -n {words} {source} new"], "new")


@few
@given(
    images(),
    st.sampled_from(("-O qcow2", "-O raw", "-O qcow2 -o cluster_size=4k", "-O qcow2 -o extended_l2=on",
                     "-O qcow2 -o preallocation=full", "-O qcow2 -o backing_file=base")),
    st.sampled_from(("--output=json", "--output=human")),
)  # fmt: skip
def test_what_only_looks(made: Images, words: str, output: str) -> None:
    with built(made, "snapshot -c s top") as pair:
        lines = [f"measure {words} {output} {name}" for name in NAMES]
        lines += [f"measure {words} {output} -l s top", f"measure {words} {output} --size 1M"]
        lines += [f"compare {flag} {one} {two}" for flag in ("", "-q") for one, two in (
            ("top", "mid"), ("top", "top"), ("mid", "other"), ("base", "mid"))]  # fmt: skip
        # Its strict verdict on images of another format depends on the size of its slices of tables.
        lines += ["compare -s top top", "compare -s other other", "compare -s base base"]
        lines += [f"check {output} {name}" for name in ("top", "mid", "other")]
        play(pair, lines)


@few
@given(images(), st.sampled_from(("", "-s 64k", "-s 1000k -l 64k", "-l 4k", "-s 3k -l 300k")))
def test_map(made: Images, words: str) -> None:
    with built(made) as pair:
        play(pair, [f"map {words} --output={output} {name}" for output in ("human", "json") for name in NAMES])


@few
@given(
    images(),
    st.sampled_from(("-O raw", "-O qcow2", "-f qcow2 -O qcow2", "")),
    st.sampled_from(NAMES),
    st.sampled_from(("", "bs=4k", "bs=1000", "bs=1M", "bs=64k count=3", "count=17", "skip=3 bs=100", "bs=1M skip=9",
                     "skip=5 bs=4k count=7")),
)  # fmt: skip
def test_dd(made: Images, words: str, source: str, blocks: str) -> None:
    with built(made) as pair:
        outcome = pair.compare(f"dd {words} {blocks} if={source} of=new")
        play(pair, [], *(["new"] if outcome.status == 0 else []), allocation=False)


def guest(folder: Path) -> bytes | None:
    """What the guest reads of ``top``, as the real program says; ``None`` where it cannot read all of it."""
    done = run_real(split("convert -U -f qcow2 -O raw top flat"), folder)
    content = (folder / "flat").read_bytes() if done.status == 0 else None
    (folder / "flat").unlink(missing_ok=True)
    return content


def errors(folder: Path) -> int:
    """How many errors the real program finds in ``top``; very many where it cannot check it."""
    done = run_real(split("check --output=json top"), folder)
    told = json.loads(done.out) if done.out else {"check-errors": 1 << 30}
    return int(told["check-errors"]) + int(told.get("corruptions", 0))


def beyond(outcome: Outcome) -> bool:
    """Whether there was what only we repair (counts to build anew), or tables that overlap, which it writes."""
    return any(words in outcome.err for words in ("rebuild", "Rebuild", "verlap", "Can't get refcount"))


# The real program writes where clusters overlap, and stops half-way: docs/drop_in.md.
@settings(max_examples=12 * LONG, deadline=None)
@given(images(clusters=("512", "4k", "64k", "64k")), st.booleans(), st.sampled_from(("leaks", "all")), st.data())
def test_repair_of_random_damage(made: Images, snapshot: bool, level: str, data: st.DataObject) -> None:
    with built(made, *(["snapshot -c s top"] if snapshot else [])) as pair:
        sound = corpus.Image("top", (pair.real / "top").read_bytes())
        content = corpus.damaged(sound, data.draw(corpus.damages(sound)))
        for folder in (pair.real, pair.ours):
            (folder / "top").write_bytes(content)
        pair.compare("check top")
        before = guest(pair.ours)
        line = split(f"check -r {level} top")
        real, ours = run_real(line, pair.real), run_ours(line, pair.ours)
        assert ours == real or beyond(real) or beyond(ours)
        assert before is None or guest(pair.ours) == before
        assert errors(pair.ours) <= errors(pair.real)
        # What is left is left by another repair too.
        again = (pair.ours / "top").read_bytes()
        run_ours(line, pair.ours)
        assert (pair.ours / "top").read_bytes() == again
