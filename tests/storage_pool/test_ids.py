# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""One object has one spelling."""

import pytest

from storage_pool.errors import InvalidName
from storage_pool.ids import BLANK, check_id, is_id, make_id

GOOD = "853a81a1-6e7e-47dd-820f-5e454c7a0b50"


@pytest.mark.parametrize(
    "bad",
    [
        "",
        GOOD + "\n",
        "\n" + GOOD,
        GOOD.upper(),
        "{" + GOOD + "}",
        "urn:uuid:" + GOOD,
        GOOD.replace("-", ""),
        GOOD + ".meta",
        GOOD + ".lease",
        "../" + GOOD,
        GOOD[:-1] + "*",
        GOOD[:-1] + "?",
        GOOD[:-1] + "٠",
        GOOD[:-1] + "０",
        GOOD[:-1] + "\0",
        GOOD[:-1],
        GOOD.replace("-", "_"),
        b"853a81a1-6e7e-47dd-820f-5e454c7a0b50",
        None,
        12,
        BLANK,
    ],
)
def test_another_spelling_is_refused(bad):
    with pytest.raises(InvalidName) as caught:
        check_id(bad, "volume UUID")
    assert "volume UUID" in str(caught.value) and "\n" not in str(caught.value)


def test_the_blank_uuid_is_accepted_only_where_it_means_none():
    assert check_id(BLANK, blank=True) == BLANK


def test_new_ids_are_valid_and_differ():
    made = {make_id() for _ in range(50)}
    assert len(made) == 50 and all(map(is_id, made))
    assert all(name[14] == "4" and name[19] in "89ab" for name in made)
