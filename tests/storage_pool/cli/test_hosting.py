# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What all verbs have in common: examples in the help, the right to change, domains found by UUID."""

import argparse
import shlex

import pytest

from storage_pool.cli import hosting, main
from storage_pool.cli.output import Output
from storage_pool.embedded import FileToken
from storage_pool.errors import NotFound
from storage_pool.file_domain import FileDomain
from storage_pool.ids import make_id
from storage_pool.volume import VolumeSpec, create_volume

WANTED = {
    "domain": "create list show upgrade check dump",
    "volume": "create list extend remove check sparsify reduce amend bitmaps bitmap-add bitmap-remove bitmap-clear",
    "image": "copy move import export upload download recover",
    "snapshot": "create preview undo commit delete",
    "template": "create list thin clone",
    "pool": "create show attach detach activate deactivate migrate reconstruct destroy",
    "iso": "list upload remove",
}


def verbs():
    """Return the parsers of all verbs, by subject and verb."""

    def below(parser):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                return action.choices
        return {}

    return {
        (subject, verb): inner
        for subject, parser in below(main.make_parser(main.MODULES)).items()
        for verb, inner in below(parser).items()
    }


def test_every_verb_is_there_with_json_and_an_example_that_is_a_right_command_line():
    found = verbs()
    missing = {(subject, verb) for subject, names in WANTED.items() for verb in names.split()} - set(found)
    assert not missing
    for (subject, verb), parser in found.items():
        head, _, line = parser.epilog.partition("\n  qpool ")
        assert head == "example:" and line.startswith(f"{subject} {verb} ")
        arguments = main.make_parser(main.MODULES).parse_args([*shlex.split(line), "--output=json"])
        assert (arguments.subject, arguments.verb, arguments.output) == (subject, verb, "json")


def session(tmp_path, **arguments):
    space = argparse.Namespace(
        lock=str(tmp_path / "lock"), device=None, no_activation=True, progress=False, held=None, runner=None
    )
    vars(space).update(arguments)
    return hosting.Session(space, Output(True))


def test_what_was_read_before_the_right_was_taken_is_forgotten(tmp_path, place):
    path = place()
    with session(tmp_path, domain=str(path)) as ours:
        domain = ours.domain()
        assert domain.entries() == {}
        with FileToken(str(tmp_path / "lock")) as token, FileDomain.open(str(path)) as theirs:
            create_volume(token, theirs, VolumeSpec(make_id(), make_id(), 1 << 20), 0)
        assert ours.locked() is domain and len(domain.entries()) == 1
        # One directory under two names is one object.
        assert ours.domain(domain.name) is domain


def test_a_domain_is_found_beside_ours_and_nowhere_else(tmp_path, place):
    ours, other = place(), place()
    uuid = next(other.glob("*-*")).name
    with session(tmp_path, domain=str(ours), other=[]) as opened:
        assert opened.find(uuid).uuid == uuid
        for name in ("../place1", "x" * 100):
            with pytest.raises(NotFound):
                opened.find(name)
