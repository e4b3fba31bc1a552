"""openpi-client's wire format: the same bytes as its own module, and nothing else is read."""

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clp_jax.errors import InputError
from clp_jax.serving import wire

DTYPES = ["?", "i1", "u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8", ">f4"]
ARRAYS = st.sampled_from(DTYPES).flatmap(lambda name: hnp.arrays(name, hnp.array_shapes(min_dims=0, min_side=0)))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.binary(), inner, max_size=4),
)
ARRAY_KEYS = [b"__ndarray__", b"__npgeneric__", b"data", b"dtype", b"shape"]
NEARLY_ARRAYS = st.fixed_dictionaries(
    {},
    optional={
        key: PLAIN | st.sampled_from(["<f4", "|O", "O", "<f4,<f4", "<M8[s]", "<c8", "|b1"]) | st.just([2, 3])
        for key in ARRAY_KEYS
    },
)


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("openpi_client.msgpack_numpy", reason="needs openpi_client")


@given(array=ARRAYS)
def test_array_travels_both_ways_as_in_openpi_client(theirs, array):
    message = wire.pack({"a": [array]})
    assert message == theirs.packb({"a": [array]})
    for read in (wire.unpack(message), theirs.unpackb(message)):
        (got,) = read["a"]
        assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes())


@pytest.mark.parametrize("scalar", [np.float32(1.5), np.int64(-3), np.uint8(7), np.bool_(True)])
def test_scalar_travels_both_ways_as_in_openpi_client(theirs, scalar):
    assert wire.pack(scalar) == theirs.packb(scalar)
    got = wire.unpack(theirs.packb(scalar))
    assert (got, got.dtype) == (scalar, scalar.dtype)


def read_or_complaint(message):
    try:
        return wire.unpack(message), ""
    except InputError as error:
        return None, str(error)


@given(st.binary(max_size=200) | (PLAIN | NEARLY_ARRAYS).map(msgpack.packb))
def test_any_bytes_are_read_or_refused_in_one_line(message):
    value, complaint = read_or_complaint(message)
    assert "\n" not in complaint
    assert not isinstance(value, np.ndarray) or value.dtype.kind in "biufUS"


def array_map(**changes):
    entries = {"__ndarray__": True, "data": bytes(8), "dtype": "<f4", "shape": [2]} | changes
    return msgpack.packb({key.encode(): value for key, value in entries.items()})


def scalar_map(value, dtype):
    return msgpack.packb({b"__npgeneric__": True, b"data": value, b"dtype": dtype})


REFUSED = {
    "objects": (array_map(dtype="|O"), "send bool, integers or floats"),
    "structure": (array_map(dtype="<f4,<f4"), "send bool, integers or floats"),
    "complex": (array_map(dtype="<c8", shape=[1]), "send bool, integers or floats"),
    "text of no characters": (array_map(dtype="<U2", data=b"\xff" * 8, shape=[1]), "no characters"),
    "half a pair": (array_map(dtype="<U2", data=b"\0\xd8\0\0" * 2, shape=[1]), "no characters"),
    "text of no length": (array_map(dtype="<U0", data=b"", shape=[1]), "send bool, integers or floats"),
    "text as a scalar": (scalar_map("a", "<U1"), "send bool, integers or floats"),
    "dtype is bytes": (array_map(dtype=b"<f4"), "send bool, integers or floats"),
    "too long": (array_map(shape=[2**20, 2**20, 2**20]), "is not 8 bytes long"),
    "negative": (array_map(shape=[-1, -2]), "something other than sizes"),
    "overflowing": (array_map(shape=[0, 2**62]), "something other than sizes"),
    "many axes": (array_map(shape=[1] * 9), "at most 8 axes"),
    "shape of bools": (array_map(shape=[True, 2]), "something other than sizes"),
    "no data": (array_map(data=None), "needs its bytes"),
    "bools of 2": (array_map(dtype="|b1", data=b"\2", shape=[1]), "other bytes than 0 and 1"),
    "scalar of another type": (scalar_map("1", "<f4"), "holds a str"),
    "scalar out of range": (scalar_map(256, "|u1"), "out of its range"),
    "bool for a number": (scalar_map(True, "<i4"), "holds a bool"),
    "extension": (msgpack.packb(msgpack.ExtType(5, b"x")), "extension (5)"),
    "deep": (b"\x91" * 5000 + b"\xc0", "no msgpack"),
    "long list": (msgpack.packb([0] * 2000), "no msgpack"),
    "many lists": (msgpack.packb([[[]] * 40] * 40), "more than 1024 lists"),
    "cut": (msgpack.packb({"a": [1, 2]})[:-1], "no msgpack"),
    "pickle": (b"\x80\x04\x95\x00", "no msgpack"),
    "a number for a key": (msgpack.packb({1: 2}), "no msgpack"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_message_that_is_not_what_it_says_is_refused(case):
    message, reason = REFUSED[case]
    with pytest.raises(InputError) as caught:
        wire.unpack(message)
    assert reason in str(caught.value)


@pytest.mark.parametrize("value", [np.array([object()]), np.array(["a"]), np.complex64(1), object(), {1, 2}])
def test_what_has_no_form_on_the_wire_is_not_sent(value):
    with pytest.raises(TypeError, match="cannot be sent"):
        wire.pack({"a": value})
