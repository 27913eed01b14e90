# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Ciphers, secrets and LUKS headers: against published vectors, the cryptography package and QEMU."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import random
import struct
import subprocess
import threading
import traceback
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher as Reference
from cryptography.hazmat.primitives.ciphers import algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from qcowlib import crypto
from qcowlib.crypto import Cipher, CipherSpec, PackageCipher, Secret, legacy_aes
from qcowlib.errors import CorruptImage, FormatError, SecretError, StorageError, UnsupportedFeature, UsageError
from qcowlib.luks import LuksHeader, luks_header_length

SPECS = [
    CipherSpec("xts", 64, "plain64"),
    CipherSpec("xts", 32, "plain"),
    CipherSpec("xts", 48, "plain64"),
    CipherSpec("xts", 64, "essiv", "sha256"),
    CipherSpec("cbc", 16, "plain64"),
    CipherSpec("cbc", 24, "plain64"),
    CipherSpec("cbc", 32, "plain"),
    CipherSpec("cbc", 32, "essiv", "sha256"),
    CipherSpec("cbc", 16, "essiv", "md5"),
]
ids = [f"{spec.algorithm}-{spec.text}" for spec in SPECS]


def reference(spec: CipherSpec, key: bytes, data: bytes, first: int) -> bytes:
    """Encrypt sector by sector with the package's own modes."""
    made = b""
    for index in range(len(data) // 512):
        number = first + index
        vector = (number & 0xFFFFFFFF if spec.ivgen == "plain" else number).to_bytes(16, "little")
        if spec.ivgen_hash:
            essiv_key = hashlib.new(spec.ivgen_hash, key).digest()
            vector = Reference(algorithms.AES(essiv_key), modes.ECB()).encryptor().update(vector)
        if spec.mode == "xts" and spec.key_bytes == 48:
            return made  # AES-192 in XTS is not a mode of the package
        mode = modes.XTS(vector) if spec.mode == "xts" else modes.CBC(vector)
        made += Reference(algorithms.AES(key), mode).encryptor().update(data[512 * index : 512 * index + 512])
    return made


@pytest.mark.parametrize("spec", SPECS, ids=ids)
@pytest.mark.parametrize("first", [0, 1, (1 << 32) - 3, (1 << 55) - 100])
def test_ciphers_equal_the_reference_sector_by_sector(spec: CipherSpec, first: int) -> None:
    rng = random.Random(first)
    key, data = rng.randbytes(spec.key_bytes), rng.randbytes(37 * 512)
    buffer = bytearray(data)
    cipher = Cipher(spec, key, host_sectors=True)
    cipher.encrypt(buffer, first)
    expected = reference(spec, key, data, first)
    assert not expected or buffer == expected
    essiv = hashlib.new(spec.ivgen_hash, key).digest() if spec.ivgen_hash else None
    package = PackageCipher(key, xts=spec.mode == "xts", short_numbers=spec.ivgen == "plain", essiv=essiv)
    other = bytearray(data)
    package.crypt(other, other, first, True)
    assert other == buffer
    package.crypt(other, other, first, False)
    assert other == data
    target = bytearray(len(data))
    cipher.encrypt_into(data, target, first)
    assert target == buffer
    cipher.decrypt(buffer, first)
    assert buffer == data


def test_xts_equals_the_published_vector() -> None:
    """IEEE 1619-2007, vector 10: AES-256, data unit 0xff, 512 bytes 00..ff twice."""
    key = bytes.fromhex(
        "2718281828459045235360287471352662497757247093699959574966967627"
        "3141592653589793238462643383279502884197169399375105820974944592"
    )
    buffer = bytearray(bytes(range(256)) * 2)
    Cipher(CipherSpec("xts", 64, "plain64"), key, host_sectors=True).encrypt(buffer, 0xFF)
    assert buffer[:16].hex() == "1c3b3a102f770386e4836c99e370cf9b"
    assert buffer[16:32].hex() == "ea00803f5e482357a4ae12d414a3e63b"


@given(
    st.sampled_from(SPECS), st.binary(min_size=0, max_size=64), st.integers(0, 5), st.integers(0, 1 << 54), st.data()
)
def test_any_run_of_sectors_can_be_decrypted_alone(
    spec: CipherSpec, seed: bytes, sectors: int, first: int, data: st.DataObject
) -> None:
    key = (seed + bytes(64))[: spec.key_bytes - 1] + b"k"
    plain = random.Random(seed).randbytes(512 * sectors)
    cipher = Cipher(spec, key, host_sectors=True)
    buffer = bytearray(plain)
    cipher.encrypt(buffer, first)
    start = data.draw(st.integers(0, sectors))
    end = data.draw(st.integers(start, sectors))
    part = bytearray(buffer[512 * start : 512 * end])
    cipher.decrypt(part, first + start)
    assert part == plain[512 * start : 512 * end]


def test_threads_share_a_cipher() -> None:
    cipher = Cipher(SPECS[0], bytes(range(64)), host_sectors=True)
    expected = bytearray(1 << 18)
    cipher.encrypt(expected, 9)
    wrong: list[int] = []

    def work() -> None:
        for index in range(30):
            buffer = bytearray(1 << 18)
            cipher.encrypt(buffer, 9)
            if buffer != expected:
                wrong.append(index)

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_wrong_buffers_and_keys_are_refused() -> None:
    cipher = Cipher(SPECS[0], bytes(range(64)), host_sectors=True)
    with pytest.raises(UsageError):
        cipher.encrypt(bytearray(511), 0)
    with pytest.raises(UsageError):
        cipher.encrypt_into(bytes(512), bytearray(1024), 0)
    with pytest.raises(UsageError):
        cipher.decrypt(bytearray(512), -1)
    with pytest.raises(UsageError):
        Cipher(SPECS[0], bytes(63), host_sectors=True)
    both = memoryview(bytearray(2048))
    with pytest.raises(ValueError, match="overlap"):
        cipher.encrypt_into(both[:1024], both[512:1536], 0)
    for name, mode, size in (
        ("serpent", "xts-plain64", 64),
        ("aes", "ctr-plain64", 32),
        ("aes", "xts-benbi", 64),
        ("aes", "cbc-essiv", 32),
        ("aes", "xts-plain64", 40),
        ("aes", "", 32),
    ):
        with pytest.raises(UnsupportedFeature):
            CipherSpec.parse(name, mode, size)
    with pytest.raises(UnsupportedFeature, match="key size 20"):
        Cipher(CipherSpec("cbc", 16, "essiv", "sha1"), bytes(16), host_sectors=True)


# --- secrets -----------------------------------------------------------------------------------------------


def test_secrets_have_the_forms_of_the_object_option(tmp_path: Path) -> None:
    path = tmp_path / "pass,word"
    path.write_bytes(b"from a file\n")
    assert Secret.parse("secret,id=s0,data=geheim").reveal() == b"geheim"
    assert Secret.parse("secret,id=s0,data=a,,b=c,,").reveal() == b"a,b=c,"
    assert Secret.parse("secret,data=eA==,id=s0,format=base64").reveal() == b"x"
    loaded = Secret.parse(f"secret,id=s1,file={str(path).replace(',', ',,')}")
    assert (loaded.id, loaded.passphrase()) == ("s1", b"from a file\n")
    for text, message in (
        ("secret,data=x", "'id' is missing"),
        ("secret,id=s", "Either 'file' or 'data'"),
        ("secret,id=s,data=x,file=y", "mutually exclusive"),
        ("secret,id=s,data=geheim,format=rot13", "does not accept value 'rot13'"),
        ("secret,id=s,data=geheim!,format=base64", "Base64 data"),
        ("secret,id=s,data=x,blah=7", "'blah' is unexpected"),
        ("iothread,id=s", "'secret'"),
    ):
        with pytest.raises(UsageError, match=message):
            Secret.parse(text)
    with pytest.raises(StorageError, match="Unable to read"):
        Secret.parse(f"secret,id=s,file={tmp_path}/none")
    with pytest.raises(SecretError, match="not valid UTF-8"):
        Secret("s", b"\xff").passphrase()


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_secrets_round_trip_through_the_option(text: str) -> None:
    escaped = text.replace(",", ",,")
    assert Secret.parse(f"secret,id=s,data={escaped}").reveal() == text.encode()
    coded = base64.b64encode(text.encode()).decode()
    assert Secret.parse(f"secret,id=s,data={coded},format=base64").reveal() == text.encode()


def test_nothing_shows_a_secret() -> None:
    secret = Secret("s0", b"geheim\xff")
    cipher = Cipher(SPECS[0], b"geheim" * 10 + b"heim", host_sectors=True)
    assert "geheim" not in repr(secret) + str(secret) + repr(cipher)
    for thing in (secret, cipher):
        with pytest.raises(TypeError):
            pickle.dumps(thing)
    for call in (
        secret.passphrase,
        lambda: Secret.parse("secret,id=s,data=geheim!,format=base64"),
        lambda: Secret.parse("secret,id=s,data=geheim,format=geheimnis"),
        lambda: Secret.parse("secret,id=s,geheim"),
        lambda: LuksHeader.open(area(), "geheim"),
    ):
        with pytest.raises((SecretError, UsageError)) as caught:
            call()
        text = "".join(traceback.format_exception_only(caught.value))
        assert "geheim" not in text.replace("geheimnis", "")
        assert caught.value.__cause__ is None


# --- LUKS headers ------------------------------------------------------------------------------------------

_made: list[bytes] = []


def area() -> bytes:
    """A header with the passphrase ``a``, made once."""
    if not _made:
        _made.append(LuksHeader.create("a", iter_time=0)[0])
    return _made[0]


def patched(data: bytes, writes: list[tuple[int, bytes]]) -> bytes:
    made = bytearray(data)
    for offset, part in writes:
        made[offset : offset + len(part)] = part
    assert len(made) == len(data)
    return bytes(made)


def same_cipher(a: Cipher, b: Cipher) -> bool:
    one, other = bytearray(512), bytearray(512)
    a.encrypt(one, 7)
    b.encrypt(other, 7)
    return one == other


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cipher_alg": "aes-128", "hash_alg": "sha512"},
        {"cipher_alg": "aes-192", "hash_alg": "sha1"},
        {"cipher_mode": "cbc", "ivgen_alg": "essiv", "hash_alg": "sha1"},
        {"cipher_mode": "cbc", "cipher_alg": "aes-128", "ivgen_alg": "plain"},
    ],
)
def test_a_created_header_opens_with_its_passphrase_only(options: dict[str, str]) -> None:
    made, cipher = LuksHeader.create("pass", iter_time=0, **options)
    header = LuksHeader.parse(made)
    assert header.pack() == made[:592]
    assert header.payload == len(made)
    assert len(made) == luks_header_length(options.get("cipher_alg", "aes-256"), options.get("cipher_mode", "xts"))
    assert same_cipher(cipher, LuksHeader.open(made, Secret("s", b"pass")))
    with pytest.raises(SecretError):
        LuksHeader.open(made, "Pass")


def test_iterations_follow_the_clock() -> None:
    def clock_of(step: float) -> object:
        ticks = iter(range(1000))
        return lambda: next(ticks) * step

    slow, _ = LuksHeader.create("a", iter_time=10, clock=clock_of(1.0))  # type: ignore[arg-type]
    fast, _ = LuksHeader.create("a", iter_time=100, clock=clock_of(0.125))  # type: ignore[arg-type]
    assert LuksHeader.parse(slow).slots[0].iterations == 1000
    assert LuksHeader.parse(fast).slots[0].iterations == 13107
    assert LuksHeader.parse(fast).iterations == 1638


def test_key_slots_are_added_and_erased() -> None:
    old = area()
    writes = LuksHeader.parse(old).add_key(old, "a", "b", iter_time=0)
    assert writes[0][0] >= 4096 and writes[1][0] < 592  # the entry last
    both = patched(old, writes)
    assert same_cipher(LuksHeader.open(both, "a"), LuksHeader.open(both, "b"))
    header = LuksHeader.parse(both)
    assert [slot.active for slot in header.slots] == [True, True] + [False] * 6
    for keyslot, message in ((0, "Refusing to overwrite active"), (8, "Invalid keyslot 8")):
        with pytest.raises(UsageError, match=message):
            header.add_key(both, "a", "c", keyslot=keyslot)
    with pytest.raises(SecretError):
        header.add_key(both, "wrong", "c", keyslot=5)

    writes = header.erase_keys(both, old="a")
    assert writes[0][0] < 592 and writes[1][0] >= 4096  # the entry first
    last = patched(both, writes)
    with pytest.raises(SecretError):
        LuksHeader.open(last, "a")
    assert same_cipher(LuksHeader.open(last, "b"), LuksHeader.open(both, "b"))
    material = header.slots[0].offset
    assert last[material : material + 256000] != both[material : material + 256000]

    header = LuksHeader.parse(last)
    for arguments, message in (
        ({"keyslot": 0}, "already erased"),
        ({"keyslot": 1}, "only active keyslot 1"),
        ({"keyslot": 1, "old": "a"}, "doesn't contain the given old password"),
        ({"old": "b"}, "All the active keyslots match"),
        ({"old": "a"}, "No keyslots match"),
        ({}, "To erase keyslot"),
        ({"keyslot": -1}, "Invalid keyslot -1"),
    ):
        with pytest.raises(UsageError, match=message):
            header.erase_keys(last, **arguments)  # type: ignore[arg-type]
    assert len(header.erase_keys(last, keyslot=1, force=True)) == 2


def test_all_slots_full_is_refused() -> None:
    header = LuksHeader.parse(area())
    full = header._replace(slots=tuple(slot._replace(active=True, iterations=1000) for slot in header.slots))
    with pytest.raises(UsageError, match="all keyslots are in use"):
        full.add_key(area(), "a", "b")


def field(offset: int, value: bytes) -> bytes:
    return patched(area(), [(offset, value)])


def slot_field(slot: int, offset: int, value: int) -> bytes:
    return field(208 + 48 * slot + offset, struct.pack(">I", value))


def test_hostile_headers_are_refused() -> None:
    good = area()
    cases: list[tuple[bytes, type[Exception]]] = [
        (b"", FormatError),
        (good[:591], FormatError),
        (bytes(4096), FormatError),
        (good[:4096], CorruptImage),
        (good[:200000], CorruptImage),
        (field(6, b"\0\2"), UnsupportedFeature),
        (field(8, b"serpent\0"), UnsupportedFeature),
        (field(8, b"a" * 32), CorruptImage),
        (field(40, b"\xff\xfe\0"), CorruptImage),
        (field(40, b"ecb-plain64\0"), UnsupportedFeature),
        (field(72, b"sha3\x1b[31m\0"), UnsupportedFeature),
        (field(104, bytes(4)), CorruptImage),
        (field(108, struct.pack(">I", 0)), CorruptImage),
        (field(108, struct.pack(">I", 1 << 31)), CorruptImage),
        (field(108, struct.pack(">I", 63)), UnsupportedFeature),
        (field(164, bytes(4)), CorruptImage),
        (field(164, b"\xff" * 4), UnsupportedFeature),
        (slot_field(0, 0, 7), CorruptImage),
        (slot_field(0, 4, 0), CorruptImage),
        (slot_field(0, 4, 0xFFFFFFFF), UnsupportedFeature),
        (slot_field(0, 40, 0), CorruptImage),
        (slot_field(0, 40, 0xFFFFFFFF), CorruptImage),
        (slot_field(1, 40, 9), CorruptImage),
        (slot_field(0, 44, 0xFFFFFFFF), CorruptImage),
        (slot_field(0, 0, 0x0000DEAD), SecretError),
    ]
    for data, error in cases:
        with pytest.raises(error) as caught:
            LuksHeader.open(data, "a")
        assert str(caught.value).isprintable()


@given(st.integers(0, 591), st.binary(min_size=1, max_size=8))
def test_damaged_headers_raise_errors_of_ours(offset: int, value: bytes) -> None:
    data = patched(area()[:592], [(min(offset, 592 - len(value)), value)])
    try:
        header = LuksHeader.parse(data)
    except FormatError:
        return
    assert header.pack() == data or b"\0" in data[8:104]
    assert header.info()["slots"]


# --- against QEMU ------------------------------------------------------------------------------------------

SECRETS = ("--object", "secret,id=s,data=a", "--object", "secret,id=n,data=b")


def qemu(*arguments: str | Path) -> str:
    """Run qemu-img; its PBKDF2 calibration sometimes fails for no reason of ours and is then repeated."""
    for _ in range(60):
        done = subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, text=True, check=False)
        if "accurate CPU usage" not in done.stderr:
            break
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def encrypted(path: Path, plain: Path, options: str) -> tuple[int, int, list[int]]:
    """Make an encrypted qcow2 of *plain* with QEMU; returns header offset and length, host offsets of clusters."""
    qemu("create", "-q", *SECRETS, "-f", "qcow2", "-o", options, path, str(plain.stat().st_size))
    target = f"driver=qcow2,file.filename={path},encrypt.key-secret=s"
    qemu("convert", *SECRETS, "-n", "--image-opts", f"driver=raw,file.filename={plain}", "--target-image-opts", target)
    image = path.read_bytes()
    start = image.find(b"\x05\x37\xbe\x77\0\0\0\x10", 0, 4096)
    place = struct.unpack_from(">QQ", image, start + 8) if start >= 0 else (0, 0)
    (l1,) = struct.unpack_from(">Q", image, 40)
    (l2,) = struct.unpack_from(">Q", image, l1)
    entries = struct.unpack_from(f">{plain.stat().st_size // 65536}Q", image, l2 & 0xFFFFFFFFFFFE00)
    return (*place, [entry & 0xFFFFFFFFFFFE00 for entry in entries])


# QEMU measures for two seconds each time: all of them in long runs only.
LUKS = [
    "",
    ",encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.cipher-alg=aes-128",
    ",encrypt.cipher-alg=aes-192,encrypt.hash-alg=sha512",
    ",encrypt.cipher-alg=aes-128",
    ",encrypt.cipher-mode=cbc,encrypt.ivgen-alg=plain,encrypt.hash-alg=sha1",
    ",encrypt.ivgen-alg=essiv",
][: None if int(os.environ.get("QCOWLIB_LONG", "1")) > 1 else 2]


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("extra", LUKS)
def test_luks_clusters_agree_with_qemu_in_both_directions(tmp_path: Path, extra: str) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(random.Random(1).randbytes(3 * 65536))
    path = tmp_path / "q"
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1" + extra
    offset, length, hosts = encrypted(path, plain, options)
    image = bytearray(path.read_bytes())
    header = LuksHeader.parse(image[offset : offset + length])
    assert header.payload == length
    cipher = LuksHeader.open(image[offset : offset + length], "a")
    for index, host in enumerate(hosts):
        cluster = image[host : host + 65536]
        cipher.decrypt(cluster, host // 512)
        assert cluster == plain.read_bytes()[65536 * index :][:65536]

    # Now with a header and clusters of ours, and a second key.
    mode, _, rest = header.cipher_mode.partition("-")
    made, ours = LuksHeader.create(
        "a",
        cipher_alg=str(header.info()["cipher-alg"]),
        cipher_mode=mode,
        ivgen_alg=rest.partition(":")[0],
        hash_alg=header.hash,
        iter_time=0,
    )
    assert len(made) == length
    made = patched(made, LuksHeader.parse(made).add_key(made, "a", "b", iter_time=0, keyslot=6))
    image[offset : offset + length] = made
    for index, host in enumerate(hosts):
        cluster = bytearray(plain.read_bytes()[65536 * index :][:65536])
        ours.encrypt(cluster, host // 512)
        image[host : host + 65536] = cluster
    path.write_bytes(image)
    for secret in ("s", "n"):
        source = f"driver=qcow2,file.filename={path},encrypt.key-secret={secret}"
        qemu("convert", *SECRETS, "--image-opts", source, "-O", "raw", tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == plain.read_bytes()


@pytest.mark.real("qemu-img")
def test_legacy_aes_agrees_with_qemu(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(random.Random(2).randbytes(3 * 65536))
    _, _, hosts = encrypted(tmp_path / "q", plain, "encrypt.format=aes,encrypt.key-secret=s")
    image = (tmp_path / "q").read_bytes()
    cipher = legacy_aes("a")
    assert not cipher.host_sectors
    for index, host in enumerate(hosts):
        cluster = bytearray(image[host : host + 65536])
        cipher.decrypt(cluster, index * 128)
        assert cluster == plain.read_bytes()[65536 * index :][:65536]


@pytest.mark.real("qemu-img")
def test_luks_files_agree_with_qemu_in_both_directions(tmp_path: Path) -> None:
    data = random.Random(3).randbytes(200 * 512)
    (tmp_path / "plain").write_bytes(data)
    options = "key-secret=s,iter-time=1"
    qemu("convert", *SECRETS, "-f", "raw", "-O", "luks", "-o", options, tmp_path / "plain", tmp_path / "theirs")
    raw = (tmp_path / "theirs").read_bytes()
    payload = bytearray(raw[LuksHeader.parse(raw).payload :])
    LuksHeader.open(raw, "a", host_sectors=False).decrypt(payload, 0)
    assert payload == data

    made, cipher = LuksHeader.create("a", iter_time=0, host_sectors=False)
    buffer = bytearray(data)
    cipher.encrypt(buffer, 0)
    (tmp_path / "ours").write_bytes(made + buffer)
    source = f"driver=luks,file.filename={tmp_path / 'ours'},key-secret=s"
    qemu("convert", *SECRETS, "--image-opts", source, "-O", "raw", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data


@pytest.mark.real("qemu-img")
def test_qemu_and_we_change_each_others_key_slots(tmp_path: Path) -> None:
    path = tmp_path / "q"
    plain = tmp_path / "plain"
    plain.write_bytes(bytes(65536))
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1"
    offset, length, _ = encrypted(path, plain, options)
    target = ("--image-opts", f"driver=qcow2,file.filename={path},encrypt.key-secret=s")
    change = "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=1,encrypt.keyslot=3"
    qemu("amend", *SECRETS, *target, "-o", change)
    image = bytearray(path.read_bytes())
    part = bytes(image[offset : offset + length])
    assert same_cipher(LuksHeader.open(part, "b"), LuksHeader.open(part, "a"))
    image[offset : offset + length] = patched(part, LuksHeader.parse(part).erase_keys(part, old="a"))
    path.write_bytes(image)
    with pytest.raises(RuntimeError, match="Invalid password"):
        qemu("amend", *SECRETS, *target, "-o", change)
    other = ("--image-opts", f"driver=qcow2,file.filename={path},encrypt.key-secret=n")
    qemu("amend", *SECRETS, *other, "-o", "encrypt.state=active,encrypt.new-secret=s,encrypt.iter-time=1")
    qemu("amend", *SECRETS, *other, "-o", "encrypt.state=inactive,encrypt.old-secret=n")
    part = path.read_bytes()[offset : offset + length]
    assert [slot.active for slot in LuksHeader.parse(part).slots] == [True] + [False] * 7
    LuksHeader.open(part, "a")


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("extra", [",cipher-mode=cbc,ivgen-alg=essiv,hash-alg=sha512"])
def test_info_is_what_qemu_prints(tmp_path: Path, extra: str) -> None:
    qemu("create", "-q", *SECRETS, "-f", "luks", "-o", "key-secret=s,iter-time=1" + extra, tmp_path / "l", "1M")
    found = json.loads(qemu("info", "--output=json", tmp_path / "l"))
    assert LuksHeader.parse((tmp_path / "l").read_bytes()).info() == found["format-specific"]["data"]


def test_available_names_the_library() -> None:
    assert crypto.available() in ("libcrypto", "cryptography")
