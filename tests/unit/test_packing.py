import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teachercache.pipeline.codecs.quantizer import pack, packed_width, unpack


@given(bits=st.integers(1, 8), width=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
def test_pack_is_a_little_endian_bit_stream_without_gaps(bits: int, width: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (3, 2, width), dtype=np.uint8)
    packed = pack(torch.from_numpy(codes), bits)
    code_bits = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    expected = np.packbits(code_bits.reshape(3, 2, width * bits), axis=-1, bitorder="little")
    assert packed.shape[-1] == packed_width(width, bits) == -(-width * bits // 8)
    np.testing.assert_array_equal(packed.numpy(), expected)
    np.testing.assert_array_equal(unpack(packed, bits, width).numpy(), codes)


def test_two_4_bit_codes_share_a_byte_with_the_first_in_the_low_half() -> None:
    assert pack(torch.tensor([0x1, 0x2, 0x3], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_no_tokens(bits: int) -> None:
    packed = pack(torch.zeros(0, 4, 16, dtype=torch.uint8), bits)
    assert packed.shape == (0, 4, 2 * bits)
    assert unpack(packed, bits, 16).shape == (0, 4, 16)
