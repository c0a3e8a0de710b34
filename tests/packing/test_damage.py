"""Blocks that are damaged, of another version or impossible are refused with the name of the tensor."""

from __future__ import annotations

import zlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tdpass.errors import InvalidModelError
from tdpass.packing import Header, pack, read_header, unpack
from tdpass.packing.header import VERSION, sealed
from tdpass.packing.positions import Learning
from tdpass.packing.values import Kind


@pytest.fixture(scope="module")
def tensor() -> Tensor:
    torch.manual_seed(0)
    return torch.where(
        torch.rand(60, 90) < 0.05, torch.randn(60, 90).sign() * torch.randint(1, 5, (60, 90)) * 0.3, 0.0
    )


@pytest.fixture(scope="module")
def block(tensor: Tensor) -> bytes:
    packed = pack(tensor)
    assert packed is not None
    return packed


def resealed(block: bytes) -> bytes:
    return block[:-4] + zlib.crc32(block[:-4]).to_bytes(4, "little")


def test_a_known_block_still_decodes() -> None:
    expected = torch.zeros(8, 16)
    expected[1, 3], expected[1, 9], expected[6, 3], expected[7, 15] = 0.25, -0.75, 0.5, 0.25
    assert torch.equal(unpack(bytes.fromhex(KNOWN)), expected)
    assert pack(expected) == bytes.fromhex(KNOWN)


KNOWN = "010c02081004030003000000803e96ab4b8bf5b902232592b7394293"


@pytest.mark.parametrize("bit", [0, 7])
def test_flipped_bits_are_refused(block: bytes, bit: int) -> None:
    for place in range(0, len(block), 3):
        with pytest.raises(InvalidModelError, match=r"'fc\.weight'"):
            unpack(block[:place] + bytes([block[place] ^ 1 << bit]) + block[place + 1 :], "fc.weight")


def test_cut_and_lengthened_blocks_are_refused(block: bytes) -> None:
    for broken in (*(block[:length] for length in range(0, len(block), 3)), block + b"\0", b"\0" + block):
        with pytest.raises(InvalidModelError, match=r"'fc\.weight'"):
            unpack(broken, "fc.weight")


def test_damage_under_a_valid_checksum_never_gives_another_tensor(block: bytes, tensor: Tensor) -> None:
    for place in range(len(block) - 6):
        try:
            found = unpack(resealed(block[:place] + bytes([block[place] ^ 16]) + block[place + 1 :]), "w")
        except InvalidModelError:
            continue
        assert torch.equal(found, tensor), place


def test_another_version_is_refused(block: bytes) -> None:
    with pytest.raises(InvalidModelError, match=f"'w'.*version 9.*version {VERSION}"):
        unpack(resealed(b"\x09" + block[1:]), "w")


SOUND = Header(torch.float32, (10, 10), 4, 4, kind=Kind.TABLE, alphabet=4)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (Header(torch.float32, (1 << 20, 1 << 20), 0), "elements"),
        (Header(torch.float32, (1 << 40,), 1 << 39, 1), "elements"),
        (Header(torch.float32, (0, 1 << 60), 0), "elements"),
        (Header(torch.float32, (1,) * 40, 0), "axes"),
        (Header(torch.float32, (1 << 70,), 0), "runs on"),
        (replace(SOUND, survivors=101), "survivors"),
        (replace(SOUND, levels=5), "levels"),
        (replace(SOUND, alphabet=1 << 20), "alphabet"),
        (replace(SOUND, alphabet=0), "alphabet"),
        (replace(SOUND, alphabet=1000), "its values take 4000 bytes"),
        (replace(SOUND, kind=Kind.RAW), "alphabet"),
        (replace(SOUND, prior=200), "rates"),
        (replace(SOUND, learning=Learning(15, 15)), "rates"),
        (replace(SOUND, kind=Kind.MULTIPLES, grouped=True, scales=5), "scales"),
        (replace(SOUND, grouped=True), "scales"),
    ],
)
def test_impossible_headers_are_refused_before_anything_is_allocated(header: Header, reason: str) -> None:
    with pytest.raises(InvalidModelError, match=f"'w'.*{reason}"):
        unpack(sealed(header.to_bytes() + bytes(64), b""), "w")


def test_unknown_kinds_and_headers_that_are_cut_off_are_refused() -> None:
    whole = SOUND.to_bytes()
    for body in (
        whole[:1] + bytes([whole[1] | 7 << 2]) + whole[2:] + bytes(64),
        *(whole[:length] for length in range(2, len(whole))),
    ):
        with pytest.raises(InvalidModelError, match="'w'"):
            read_header(sealed(body, b""), "w")


def test_a_stream_that_is_no_whole_words_or_gives_other_counts_is_refused() -> None:
    body = SOUND.to_bytes() + bytes(16)
    for stream in (b"abc", b"abcd", b"\xff" * 8):
        with pytest.raises(InvalidModelError, match="'w'"):
            unpack(sealed(body + stream, b""), "w")
