"""What describes the stored arrays of a checkpoint is proven before it is believed."""

import json

import numpy as np
import pytest

from clp_jax.checkpoint import read_params, read_spec, rewrite, write_params
from clp_jax.errors import InputError
from clp_jax.outputs import MANIFEST

LEAF = "params.llm.layers.w"


@pytest.fixture
def step(tmp_path):
    values = np.random.default_rng(0).normal(size=(4, 30)).astype(np.float32)
    write_params(tmp_path / "step", {"llm": {"layers": {"w": values}}})
    return tmp_path / "step"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunks": [0, 30]}, "chunks is"),
        ({"chunks": [-1, 30]}, "chunks is"),
        ({"chunks": [None, 30]}, "chunks is"),
        ({"chunks": "x"}, "chunks is 'x'"),
        ({"chunks": [4]}, "different numbers of axes"),
        ({"chunks": [4, 2**40]}, "do not belong to an array"),
        ({"chunks": ...}, "it lacks 'chunks'"),
        ({"shape": [2**40, 2**40], "chunks": [1, 1]}, "do not belong to an array"),
        ({"shape": [4.0, 30]}, "shape is"),
        ({"compressor": ...}, "it lacks 'compressor'"),
        ({"compressor": "zstd"}, "compressor is 'zstd'"),
        ({"compressor": {"id": "blosc"}}, "not in C order with zstd"),
        ({"compressor": {"id": "zstd", "level": "high"}}, "not in C order with zstd"),
        ({"order": "F"}, "not in C order with zstd"),
        ({"dtype": "<U3"}, "no numbers"),
        ({"dtype": "ones"}, "damaged"),
        ({"dtype": 3}, "damaged"),
        ({"dimension_separator": 1}, "dimension_separator is 1"),
    ],
)
def test_a_description_of_an_array_that_none_has(step, change, message):
    file = step / "params" / LEAF / ".zarray"
    content = json.loads(file.read_text()) | change
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    with pytest.raises(InputError, match=message) as caught:
        read_spec(step)
    assert LEAF in str(caught.value) and "\n" not in str(caught.value)


def test_the_check_sum_is_looked_at_although_the_last_rows_go(step, tmp_path):
    (step / MANIFEST).unlink()  # which has a check sum of its own
    [chunk] = (step / "params" / LEAF).glob("0.*")
    content = bytearray(chunk.read_bytes())
    content[60] ^= 1  # in the first row, which stays
    chunk.write_bytes(content)
    with pytest.raises(InputError, match=r"chunk \(0, 0\) of .* cannot be decoded"):
        rewrite(read_spec(step), tmp_path / "out", take={"llm/layers/w": [0, 1]})
    with pytest.raises(InputError, match=r"chunk \(0, 0\) of .* cannot be decoded"):
        read_params(read_spec(step))
    assert not (tmp_path / "out").exists()


def test_a_pipe_in_a_checkpoint_is_not_waited_for(step):
    import os

    os.mkfifo(step / "params" / LEAF / "9.9")
    with pytest.raises(InputError, match=r"9\.9 is no regular file"):
        read_spec(step)
