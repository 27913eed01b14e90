# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A writer at full speed into a thin volume of a volume group, whose host asks the manager for room.

usage: growth_writer.py FOLDER DEVICE DOMAIN VOLUME SOCKET MIB CHUNK-MIB PERCENT

Prints one JSON object: what growing took, the seconds of the whole, and by request the seconds from asking until
the volume was extended (the manager's answer) and until the writer, which goes on, has the room.
"""

import json
import sys
import threading
import time
from pathlib import Path

from qcowlib.units import MiB
from spm.cli.endpoint import ask
from spm.cli.place import clock
from spm.growth import open_growing
from storage_pool.block_domain import BlockDomain
from storage_pool.testing.lvm import local_lvm
from storage_pool.thin import ThinPolicy


def block(number):
    """Return 1 MiB that tells its place."""
    return number.to_bytes(8, "big") * (MiB // 8)


def main(folder, device, uuid, volume, socket, mib, chunk, percent):
    domain = BlockDomain.open(local_lvm(Path(folder), [device]), uuid)

    asked, answered, seen = {}, {}, {}

    def request(size):
        asked[size] = time.monotonic()
        body = {"domain": uuid, "volume": volume, "size_mib": -(-size // MiB)}

        def wait():
            if ask(socket, "/extend", body)[0] == 200:
                answered[size] = time.monotonic()

        threading.Thread(target=wait, daemon=True).start()

    policy = ThinPolicy(int(chunk) * MiB, int(percent))
    image, storage = open_growing(domain, volume, request, clock, time.sleep, policy=policy)
    began = time.monotonic()
    with image:
        for number in range(int(mib)):
            image.pwrite(block(number), number * MiB)
            for size in asked.keys() - seen.keys():
                if storage.size >= size:
                    seen[size] = time.monotonic()
        image.flush()
    seconds = time.monotonic() - began
    figures = {
        name: [round(times[size] - asked[size], 3) for size in sorted(times)]
        for name, times in (("extended_s", answered), ("refreshed_s", seen))
    }
    print(json.dumps({**storage.growth._asdict(), "seconds": round(seconds, 3), **figures}))


if __name__ == "__main__":
    main(*sys.argv[1:])
