# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``commit``: write an overlay into its base.

Invariant: nothing is written before the whole chain is open.
"""

from __future__ import annotations

from qcowlib.cli import options
from qcowlib.cli.console import Console, Failure
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import open_image
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.values import size_option

__all__ = ["COMMAND", "run"]

COMMAND = Command(
    "commit",
    "Write what an overlay holds into its backing file.",
    "FILE",
    (
        options.HELP,
        options.OBJECT,
        options.IMAGE_OPTS,
        options.QUIET,
        options.FORMAT,
        options.CACHE,
        Option("b", "", "base", "write into this image of the chain (implies -d)", meta="BASE"),
        Option("d", "", "keep", "do not empty the overlay"),
        options.PROGRESS,
        options.PROGRESS_FORM,
        Option(
            "r",
            "",
            "rate",
            "at most this many bytes a second",
            meta="RATE",
            convert=lambda text, console: size_option("rate limit", text, console),
        ),
        options.OUTPUT_EXTRA,
    ),
    "commit overlay.qcow2",
)


def run(args: Args, console: Console) -> int:
    """Run ``commit``."""
    ref = options.single_image(args)
    options.wants_json(args)
    secrets = parse_secrets(args.texts("object"))
    cache = options.cache_mode(args)
    with open_image(ref, console, secrets=secrets, writable=True, cache=cache) as image:
        base = args.text("base")
        names = [layer.storage.name for layer in image.layers[1:]]
        if base is not None and base not in names:
            raise Failure(f"Did not find '{base}' in the backing chain of '{ref.text}'")
        if not names:
            raise Failure("Image does not have a backing file")
        raise Failure("Committing is not supported yet")
