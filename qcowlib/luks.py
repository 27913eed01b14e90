# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""LUKS version 1 headers: parse, unlock, create, and change key slots.

Invariant: a header is checked completely before any of its numbers is used,
so that what a hostile one costs is bounded by the bytes that are there and by
``max_iterations``; and a change is given as writes in an order that leaves at
least one working key slot at any moment.

Pure functions on bytes: reading and writing them is the caller's.  Source of
the layout: the LUKS on-disk format specification 1.2.3; of the checks and of
what is written: qemu-img 7.2.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, NamedTuple

from qcowlib.crypto import Cipher, CipherSpec, Secret, new_hash, passphrase_of
from qcowlib.errors import CorruptImage, FormatError, SecretError, UnsupportedFeature, UsageError, printable
from qcowlib.units import SECTOR, round_up

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import ReadableBuffer

    Passphrase = Secret | str | bytes

__all__ = ["HEADER_BYTES", "MAGIC", "MAX_ITERATIONS", "KeyChange", "LuksHeader", "LuksSlot", "luks_header_length"]

MAGIC = b"LUKS\xba\xbe"
#: Bytes of the fixed part; key material follows from byte 4096 on.
HEADER_BYTES = 592
#: More PBKDF2 rounds than this, over all slots that are tried, are refused:
#: some minutes of work, an iteration time of two seconds makes 10^7.
MAX_ITERATIONS = 1 << 28

_SLOTS = 8
_STRIPES = 4000
_MATERIAL_START = 4096
_ACTIVE = 0x00AC71F3
_INACTIVE = 0x0000DEAD
_MIN_ITERATIONS = 1000
_DIGEST_BYTES = 20
_FIXED = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")
# qemu-img's algorithm names and the mode names it knows.
_CIPHERS = {"aes-128": 16, "aes-192": 24, "aes-256": 32}
_HASHES = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")
_DEFAULT_TIME = 2000


class KeyChange(NamedTuple):
    """What happens to LUKS key slots: ``state`` is ``active`` (add a key) or ``inactive`` (erase).

    ``secret`` is the passphrase that unlocks the image, needed to add another
    one; ``force`` allows to overwrite a slot in use and to erase the last one.
    """

    state: str | None = None
    keyslot: int | None = None
    old_secret: Passphrase | None = None
    new_secret: Passphrase | None = None
    iter_time: int | None = None
    secret: Passphrase | None = None
    force: bool = False

    def __repr__(self) -> str:
        # No passphrase is part of it.
        return f"KeyChange(state={self.state!r}, keyslot={self.keyslot!r}, force={self.force!r})"

    def check(self) -> None:
        """Raise UsageError or SecretError, in qemu's words, for parts that do not go together."""
        if self.state is None:
            raise UsageError("Parameter 'state' is missing")
        if self.state not in ("active", "inactive"):
            raise UsageError(f"Parameter 'state' does not accept value '{printable(self.state)}'")
        if self.state == "active":
            if self.new_secret is None:
                raise UsageError("'new-secret' is required to activate a keyslot")
            if self.old_secret is not None:
                raise UsageError("'old-secret' must not be given when activating keyslots")
            if self.secret is None:
                raise SecretError("the passphrase of the image is needed to add another one")
        else:
            if self.new_secret is not None:
                raise UsageError("'new-secret' must not be given when erasing keyslots")
            if self.iter_time is not None:
                raise UsageError("'iter-time' must not be given when erasing keyslots")


class LuksSlot(NamedTuple):
    """One key slot; *offset* of its key material in bytes from the header's start."""

    active: bool
    iterations: int
    salt: bytes
    offset: int
    stripes: int


class LuksHeader(NamedTuple):
    """The fixed part of a header; *payload* (start of the data of a LUKS file) in bytes."""

    cipher_name: str
    cipher_mode: str
    hash: str
    payload: int
    key_bytes: int
    digest: bytes
    salt: bytes
    iterations: int
    uuid: str
    slots: tuple[LuksSlot, ...]

    @classmethod
    def parse(cls, data: ReadableBuffer) -> LuksHeader:
        """Return the header in the first 592 bytes of *data*.

        Raises FormatError when it is none, UnsupportedFeature for another
        version or cipher, CorruptImage when its parts contradict each other.
        """
        raw = bytes(memoryview(data).cast("B")[:HEADER_BYTES])
        if len(raw) < HEADER_BYTES or not raw.startswith(MAGIC):
            raise FormatError("Volume is not in LUKS format")
        _, version, *texts, payload, key_bytes, digest, salt, iterations, uuid = _FIXED.unpack_from(raw)
        if version != 1:
            raise UnsupportedFeature(f"LUKS version {version} is not supported")
        names = [_text(value) for value in (*texts, uuid)]
        slots = []
        for index in range(_SLOTS):
            state, rounds, slot_salt, sector, stripes = _SLOT.unpack_from(raw, _FIXED.size + index * _SLOT.size)
            if state not in (_ACTIVE, _INACTIVE):
                raise CorruptImage(f"LUKS key slot {index} has an unknown state")
            slots.append(LuksSlot(state == _ACTIVE, rounds, slot_salt, sector * SECTOR, stripes))
        header = cls(
            names[0],
            names[1],
            names[2],
            payload * SECTOR,
            key_bytes,
            digest,
            salt,
            iterations,
            names[3],
            tuple(slots),
        )
        header._check()
        return header

    def _check(self) -> None:
        if not 0 < self.key_bytes <= 64:
            raise CorruptImage(f"LUKS header has an impossible key length: {self.key_bytes}")
        if self.iterations == 0:
            raise CorruptImage("LUKS header has no iterations for the master key")
        if self.payload < _MATERIAL_START:
            raise CorruptImage("LUKS payload overlaps the header")
        taken: list[tuple[int, int]] = []
        for index, slot in enumerate(self.slots):
            end = slot.offset + self.key_bytes * _STRIPES
            if slot.stripes != _STRIPES:
                raise CorruptImage(f"LUKS key slot {index} is corrupted (stripes {slot.stripes} != {_STRIPES})")
            if slot.active and slot.iterations == 0:
                raise CorruptImage(f"LUKS key slot {index} has no iterations")
            if slot.offset < round_up(HEADER_BYTES, SECTOR) or end > self.payload:
                raise CorruptImage(f"LUKS key slot {index} overlaps the header or the payload")
            if any(slot.offset < other_end and start < end for start, other_end in taken):
                raise CorruptImage(f"LUKS key slot {index} overlaps another one")
            taken.append((slot.offset, end))

    def pack(self) -> bytes:
        """Return the 592 bytes of the fixed part."""
        names = [text.encode() for text in (self.cipher_name, self.cipher_mode, self.hash)]
        fixed = _FIXED.pack(
            MAGIC,
            1,
            *names,
            self.payload // SECTOR,
            self.key_bytes,
            self.digest,
            self.salt,
            self.iterations,
            self.uuid.encode(),
        )
        return fixed + b"".join(self.pack_slot(index) for index in range(_SLOTS))

    def pack_slot(self, index: int) -> bytes:
        """Return the 48 bytes of one slot."""
        slot = self.slots[index]
        return _SLOT.pack(
            _ACTIVE if slot.active else _INACTIVE, slot.iterations, slot.salt, slot.offset // SECTOR, slot.stripes
        )

    @property
    def spec(self) -> CipherSpec:
        """The cipher; raises UnsupportedFeature when it is not one of ours."""
        return CipherSpec.parse(self.cipher_name, self.cipher_mode, self.key_bytes)

    def info(self) -> dict[str, object]:
        """Return what ``qemu-img info`` shows, keys as there; needs no passphrase and no cipher library."""
        mode, _, rest = self.cipher_mode.partition("-")
        ivgen, _, ivgen_hash = rest.partition(":")
        bits = self.key_bytes * (4 if mode == "xts" else 8)
        slots: list[dict[str, object]] = []
        for slot in self.slots:
            if slot.active:
                slots.append(
                    {"active": True, "iters": slot.iterations, "key-offset": slot.offset, "stripes": slot.stripes}
                )
            else:
                slots.append({"active": False, "key-offset": slot.offset})
        found: dict[str, object] = {
            "ivgen-alg": ivgen,
            "hash-alg": self.hash,
            "cipher-alg": f"{self.cipher_name}-{bits}",
            "uuid": self.uuid,
            "cipher-mode": mode,
            "slots": slots,
            "payload-offset": self.payload,
            "master-key-iters": self.iterations,
        }
        if ivgen_hash:
            found["ivgen-hash-alg"] = ivgen_hash
        return found

    # --- keys ----------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        area: ReadableBuffer,
        passphrase: Passphrase,
        *,
        host_sectors: bool = True,
        max_iterations: int = MAX_ITERATIONS,
    ) -> Cipher:
        """Return the cipher of the header at the start of *area*, which must hold the key material too.

        *host_sectors*: as the attribute of the Cipher (False for a LUKS file).
        Raises SecretError when no key slot takes the passphrase.
        """
        header = cls.parse(area)
        _, key = header.unlock(area, passphrase, max_iterations=max_iterations)
        return Cipher(header.spec, key, host_sectors=host_sectors)

    def unlock(
        self, area: ReadableBuffer, passphrase: Passphrase, *, max_iterations: int = MAX_ITERATIONS
    ) -> tuple[int, bytes]:
        """Return (number of the slot that takes *passphrase*, master key)."""
        spec, phrase = self.spec, passphrase_of(passphrase)
        left = max_iterations
        for index, slot in enumerate(self.slots):
            if not slot.active:
                continue
            left -= slot.iterations + self.iterations
            if left < 0:
                raise UnsupportedFeature(f"the LUKS key slots ask for more than {max_iterations} iterations")
            key = self._try_slot(spec, index, area, phrase)
            if key is not None:
                return index, key
        raise SecretError("Invalid password, cannot unlock any keyslot")

    def _try_slot(self, spec: CipherSpec, index: int, area: ReadableBuffer, phrase: bytes) -> bytes | None:
        slot = self.slots[index]
        material = bytearray(memoryview(area).cast("B")[slot.offset : slot.offset + self.key_bytes * _STRIPES])
        if len(material) != self.key_bytes * _STRIPES or len(material) % SECTOR:
            raise CorruptImage(f"the key material of LUKS key slot {index} is cut off or not whole sectors")
        slot_key = _derive(self.hash, phrase, slot.salt, slot.iterations, self.key_bytes)
        Cipher(spec, slot_key, host_sectors=True).decrypt(material, 0)
        key = _merge(self.hash, material, self.key_bytes)
        digest = _derive(self.hash, key, self.salt, self.iterations, _DIGEST_BYTES)
        return key if _same(digest, self.digest) else None

    @classmethod
    def create(
        cls,
        passphrase: Passphrase,
        *,
        cipher_alg: str = "aes-256",
        cipher_mode: str = "xts",
        ivgen_alg: str = "plain64",
        ivgen_hash_alg: str | None = None,
        hash_alg: str = "sha256",
        iter_time: int = _DEFAULT_TIME,
        host_sectors: bool = True,
        clock: Callable[[], float] | None = None,
    ) -> tuple[bytes, Cipher]:
        """Return a new header with its whole key material area, and its cipher.

        Options as qemu-img's; *iter_time* in milliseconds of processor time,
        measured with *clock* (seconds).  The area ends where the payload of a
        LUKS file starts; slot 0 is in use.
        """
        spec = _spec_of_options(cipher_alg, cipher_mode, ivgen_alg, ivgen_hash_alg, hash_alg)
        phrase = passphrase_of(passphrase)
        size = spec.key_bytes
        key = os.urandom(size)
        cipher = Cipher(spec, key, host_sectors=host_sectors)
        salt = os.urandom(32)
        # A eighth for the digest is cryptsetup's share and QEMU's.
        rounds = _iterations(hash_alg, _DIGEST_BYTES, iter_time, clock, share=8)
        area = _area_bytes(size)
        header = cls(
            "aes",
            spec.text,
            hash_alg,
            _MATERIAL_START + _SLOTS * area,
            size,
            _derive(hash_alg, key, salt, rounds, _DIGEST_BYTES),
            salt,
            rounds,
            _uuid(),
            tuple(LuksSlot(False, 0, bytes(32), _MATERIAL_START + i * area, _STRIPES) for i in range(_SLOTS)),
        )
        made = bytearray(header.payload)
        for offset, data in header._fill_slot(0, key, phrase, iter_time, clock):
            made[offset : offset + len(data)] = data
        made[: _FIXED.size] = header.pack()[: _FIXED.size]
        for index in range(1, _SLOTS):
            at = _FIXED.size + index * _SLOT.size
            made[at : at + _SLOT.size] = header.pack_slot(index)
        return bytes(made), cipher

    def change(self, area: ReadableBuffer, change: KeyChange) -> list[tuple[int, bytes]]:
        """Return the writes of *change*, as :meth:`add_key` and :meth:`erase_keys` do."""
        change.check()
        if change.new_secret is None or change.secret is None:
            return self.erase_keys(area, keyslot=change.keyslot, old=change.old_secret, force=change.force)
        return self.add_key(
            area,
            change.secret,
            change.new_secret,
            keyslot=change.keyslot,
            iter_time=change.iter_time,
            force=change.force,
        )

    def add_key(
        self,
        area: ReadableBuffer,
        old: Passphrase,
        new: Passphrase,
        *,
        keyslot: int | None = None,
        iter_time: int | None = None,
        force: bool = False,
        clock: Callable[[], float] | None = None,
    ) -> list[tuple[int, bytes]]:
        """Return the writes (offset in the header, bytes) that let *new* unlock as well.

        Each must be durable before the next.  *keyslot*: which one to use,
        it must be free, unless with *force*; else the first free one.  Where
        no slot is free and *old* unlocks that one alone, its salt and number
        of iterations stay, whatever *iter_time* is.
        """
        free = next((index for index, slot in enumerate(self.slots) if not slot.active), None)
        chosen = free if keyslot is None else keyslot
        if chosen is None:
            raise UsageError("Can't add a keyslot - all keyslots are in use")
        self._check_slot(chosen)
        if self.slots[chosen].active and not force:
            raise UsageError(f"Refusing to overwrite active keyslot {chosen} - please erase it first")
        used, key = self.unlock(area, old)
        time = _DEFAULT_TIME if iter_time is None else iter_time
        phrase = passphrase_of(new)
        filled = self._fill_slot(chosen, key, phrase, time, clock)
        if not self.slots[chosen].active:
            return filled
        if free is not None:
            # While the slot is being overwritten, the new key has another one: at any moment one works.
            return [*self._fill_slot(free, key, phrase, time, clock), *filled, *self._clear_slot(free)]
        others = [index for index in range(_SLOTS) if index != chosen]
        if used != chosen or self._slots_of(area, old, others):
            return filled
        return self._switch_slot(area, chosen, key, phrase)

    def erase_keys(
        self,
        area: ReadableBuffer,
        *,
        keyslot: int | None = None,
        old: Passphrase | None = None,
        force: bool = False,
    ) -> list[tuple[int, bytes]]:
        """Return the writes that make a slot, or all slots that *old* unlocks, unusable.

        Each must be durable before the next: a slot is marked unused before
        its key material is overwritten.  Without *force* the last key stays.
        """
        active = [index for index, slot in enumerate(self.slots) if slot.active]
        if keyslot is not None:
            self._check_slot(keyslot)
            if keyslot not in active and not force:
                raise UsageError(f"Given keyslot {keyslot} is already erased (inactive) ")
            if old is not None and keyslot not in self._slots_of(area, old, [keyslot]):
                raise UsageError(f"Given keyslot {keyslot} doesn't contain the given old password for erase operation")
            chosen = [keyslot]
            refusal = f"Attempt to erase the only active keyslot {keyslot} which will erase"
        elif old is not None:
            chosen = self._slots_of(area, old, active)
            if not chosen:
                raise UsageError("No keyslots match given (old) password for erase operation")
            refusal = "All the active keyslots match the (old) password that was given and erasing them will erase"
        else:
            raise UsageError(
                "To erase keyslot(s), either explicit keyslot index or the password currently contained in them"
                " must be given"
            )
        if chosen == active and not force:
            raise UsageError(f"{refusal} all the data in the image irreversibly - refusing operation")
        writes: list[tuple[int, bytes]] = []
        for index in chosen:
            writes += self._clear_slot(index)
        return writes

    def _clear_slot(self, index: int) -> list[tuple[int, bytes]]:
        slot = self.slots[index]._replace(active=False, iterations=0, salt=bytes(32))
        slots = (*self.slots[:index], slot, *self.slots[index + 1 :])
        entry = self._replace(slots=slots).pack_slot(index)
        return [(_FIXED.size + index * _SLOT.size, entry), (slot.offset, os.urandom(self.key_bytes * _STRIPES))]

    def _check_slot(self, keyslot: int) -> None:
        if not 0 <= keyslot < _SLOTS:
            raise UsageError(f"Invalid keyslot {keyslot} specified, must be between 0 and {_SLOTS - 1}")

    def _slots_of(self, area: ReadableBuffer, passphrase: Passphrase, slots: list[int]) -> list[int]:
        if sum(self.slots[index].iterations + self.iterations for index in slots) > MAX_ITERATIONS:
            raise UnsupportedFeature(f"the LUKS key slots ask for more than {MAX_ITERATIONS} iterations")
        spec, phrase = self.spec, passphrase_of(passphrase)
        return [index for index in slots if self._try_slot(spec, index, area, phrase) is not None]

    def _fill_slot(
        self, index: int, key: bytes, phrase: bytes, iter_time: int, clock: Callable[[], float] | None
    ) -> list[tuple[int, bytes]]:
        """Key material first: until the slot's entry is written, it is not looked at."""
        rounds = _iterations(self.hash, self.key_bytes, iter_time, clock)
        salt = os.urandom(32)
        slot = self.slots[index]._replace(active=True, iterations=rounds, salt=salt)
        material = _spread(self.hash, key)
        slot_key = _derive(self.hash, phrase, salt, rounds, self.key_bytes)
        Cipher(self.spec, slot_key, host_sectors=True).encrypt(material, 0)
        entry = self._replace(slots=(*self.slots[:index], slot, *self.slots[index + 1 :])).pack_slot(index)
        return [(slot.offset, bytes(material)), (_FIXED.size + index * _SLOT.size, entry)]

    def _switch_slot(self, area: ReadableBuffer, index: int, key: bytes, phrase: bytes) -> list[tuple[int, bytes]]:
        """Hand the slot from its passphrase to another one by one write of one sector, which is whole or absent.

        Any bytes are key material: what lies there, decrypted by the new
        passphrase, gives the key with the right last stripe.  The old one
        needs the sector that is gone, 512 bytes of which nothing else tells.
        """
        slot = self.slots[index]
        material = bytearray(memoryview(area).cast("B")[slot.offset : slot.offset + self.key_bytes * _STRIPES])
        slot_key = _derive(self.hash, phrase, slot.salt, slot.iterations, self.key_bytes)
        cipher = Cipher(self.spec, slot_key, host_sectors=True)
        cipher.decrypt(material, 0)
        last = len(material) - SECTOR
        material[last:] = os.urandom(SECTOR)
        material[-self.key_bytes :] = bytes(self.key_bytes)
        # With zeros as the last stripe, what comes out is what the key has to be mixed with.
        material[-self.key_bytes :] = _mix(_merge(self.hash, material, self.key_bytes), key)
        sector = material[last:]
        cipher.encrypt(sector, last // SECTOR)
        return [(slot.offset + last, bytes(sector))]


def luks_header_length(cipher_alg: str = "aes-256", cipher_mode: str = "xts") -> int:
    """Return the length in bytes of a header that :meth:`LuksHeader.create` would make."""
    size = _key_bytes(cipher_alg, cipher_mode)
    return _MATERIAL_START + _SLOTS * _area_bytes(size)


def _area_bytes(key_bytes: int) -> int:
    return round_up(key_bytes * _STRIPES, 4096)


def _key_bytes(cipher_alg: str, cipher_mode: str) -> int:
    try:
        size = _CIPHERS[cipher_alg]
    except KeyError:
        raise UnsupportedFeature(f"Algorithm '{printable(cipher_alg)}' not supported") from None
    return 2 * size if cipher_mode == "xts" else size


def _spec_of_options(
    cipher_alg: str, cipher_mode: str, ivgen_alg: str, ivgen_hash_alg: str | None, hash_alg: str
) -> CipherSpec:
    if hash_alg not in _HASHES:
        raise UsageError(f"Parameter 'hash-alg' does not accept value '{printable(hash_alg)}'")
    if ivgen_hash_alg is not None and ivgen_hash_alg not in _HASHES:
        raise UsageError(f"Parameter 'ivgen-hash-alg' does not accept value '{printable(ivgen_hash_alg)}'")
    text = f"{cipher_mode}-{ivgen_alg}" + (f":{ivgen_hash_alg or 'sha256'}" if ivgen_alg == "essiv" else "")
    spec = CipherSpec.parse("aes", text, _key_bytes(cipher_alg, cipher_mode))
    if spec.key_bytes * _STRIPES % SECTOR:
        # 4000 stripes of 24 bytes; QEMU stops with an assertion here.
        raise UnsupportedFeature(f"{spec.algorithm} in mode {spec.mode} does not fill whole sectors of key material")
    new_hash(hash_alg)
    return spec


def _text(raw: bytes) -> str:
    text, terminator, _ = raw.partition(b"\0")
    if not terminator:
        raise CorruptImage("a text of the LUKS header is not terminated")
    try:
        return text.decode("ascii")
    except UnicodeDecodeError:
        raise CorruptImage("a text of the LUKS header is not ASCII") from None


def _uuid() -> str:
    """A random UUID (RFC 9562, version 4)."""
    raw = bytearray(os.urandom(16))
    raw[6] = raw[6] & 0x0F | 0x40
    raw[8] = raw[8] & 0x3F | 0x80
    text = raw.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def _derive(name: str, phrase: bytes, salt: bytes, iterations: int, size: int) -> bytes:
    import hashlib

    new_hash(name)
    return hashlib.pbkdf2_hmac(name, phrase, salt, iterations, size)


def _same(a: bytes, b: bytes) -> bool:
    import hmac

    return hmac.compare_digest(a, b)


def _iterations(name: str, size: int, milliseconds: int, clock: Callable[[], float] | None, *, share: int = 1) -> int:
    """Return how many PBKDF2 rounds for *size* bytes take *milliseconds* / *share*, at least 1000."""
    if not 0 <= milliseconds <= 3_600_000:
        raise UsageError(f"iteration time out of range: {milliseconds} ms")
    if clock is None:
        from qcowlib.runtime import cpu_seconds

        clock = cpu_seconds
    rounds, spent = 1 << 13, 0.0
    while spent < 0.05 and rounds < 1 << 26:
        rounds *= 2
        start = clock()
        _derive(name, b"password", b"salt" * 8, rounds, size)
        spent = clock() - start
    wanted = rounds / max(spent, 1e-6) * milliseconds / 1000 / share
    return max(_MIN_ITERATIONS, min(int(wanted), MAX_ITERATIONS // 16))


# --- anti-forensic splitter (LUKS specification, section 2.4) ------------------------------------------------


def _diffuse(name: str, block: bytes) -> bytes:
    """Replace each piece of the hash's length by the hash of its number and itself; the last may be shorter."""
    step = new_hash(name).digest_size
    pieces = []
    for index, at in enumerate(range(0, len(block), step)):
        piece = block[at : at + step]
        pieces.append(new_hash(name, index.to_bytes(4, "big") + piece).digest()[: len(piece)])
    return b"".join(pieces)


def _mix(a: bytes, b: bytes) -> bytes:
    return (int.from_bytes(a, "big") ^ int.from_bytes(b, "big")).to_bytes(len(a), "big")


def _spread(name: str, key: bytes) -> bytearray:
    """Return *key* spread over 4000 stripes, all of which are needed to get it back."""
    size = len(key)
    made = bytearray(os.urandom(size * (_STRIPES - 1)))
    block = bytes(size)
    for at in range(0, len(made), size):
        block = _diffuse(name, _mix(block, bytes(made[at : at + size])))
    made += _mix(block, key)
    return made


def _merge(name: str, material: bytearray, size: int) -> bytes:
    block = bytes(size)
    for at in range(0, size * (_STRIPES - 1), size):
        block = _diffuse(name, _mix(block, bytes(material[at : at + size])))
    return _mix(block, bytes(material[-size:]))
