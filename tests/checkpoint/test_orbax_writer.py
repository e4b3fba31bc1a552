"""How chunks are encoded: which weights are shrunk, and that every reader decodes them."""

import contextlib

import ml_dtypes
import numpy as np
import pytest
import zstandard
from checkpoints import restore_as_openpi
from etils import epath

from clp_jax.checkpoint.orbax.writer import COMPRESSOR, ArrayForm, ItemWriter
from clp_jax.errors import InputError

COUNT = 2**18
NORMAL = np.random.default_rng(0).standard_normal(COUNT, np.float32)
WEIGHTS = {
    "random float32": NORMAL,
    "bfloat16": NORMAL.astype(ml_dtypes.bfloat16),
    "float32 that bfloat16 holds": NORMAL.astype(ml_dtypes.bfloat16).astype(np.float32),
}


def stored(values: np.ndarray, folder, **compressor) -> bytes:
    """The one chunk of an item that holds nothing but these values, which Orbax reads back."""
    form = ArrayForm(values.shape, values.shape, values.dtype, {**COMPRESSOR, **compressor})
    with ItemWriter(epath.Path(folder) / "params") as writer:
        writer.add("params.w", form)
        writer.write_chunk("params.w", (0,), np.split(values, 4))
    restored = restore_as_openpi(folder / "params", restore_type=np.ndarray)["w"]
    assert restored.dtype == values.dtype
    assert restored.tobytes() == values.tobytes()
    return (folder / "params" / "params.w" / "0").read_bytes()


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("random float32", 1, 1.001), ("bfloat16", 0.7, 0.8), ("float32 that bfloat16 holds", 0.45, 0.55)],
)
def test_what_exponents_and_zeros_save_is_saved(name, least, most, tmp_path):
    values = WEIGHTS[name]
    frame = stored(values, tmp_path)
    assert least <= len(frame) / values.nbytes <= most
    head = zstandard.get_frame_parameters(frame)
    assert head.has_checksum
    assert head.content_size == values.nbytes


def test_a_level_above_orbax_s_default_is_kept(tmp_path):
    values = np.tile(NORMAL[: 2**14], 16)  # repeats lie farther apart than what is searched by default
    assert len(stored(values, tmp_path / "19", level=19)) < 0.1 * values.nbytes
    assert len(stored(values, tmp_path / "1")) > 0.5 * values.nbytes


@pytest.mark.parametrize(("read_back", "refused"), [(True, True), (False, False)])
def test_a_chunk_that_is_read_back_holds_what_it_was_to_hold(tmp_path, read_back, refused):
    """The disk gave other bytes than it got, in a frame that is whole."""
    frame = zstandard.ZstdCompressor(1, write_checksum=True).compress((NORMAL + 1).tobytes())
    with ItemWriter(epath.Path(tmp_path) / "params", read_back=read_back) as writer:
        writer.add("params.w", ArrayForm(NORMAL.shape, NORMAL.shape, NORMAL.dtype))
        found = pytest.raises(InputError, match="does not read back") if refused else contextlib.nullcontext()
        with found, writer.open_chunk("params.w", (0,)) as file:
            file.holds(NORMAL)
            file.write(frame)
        writer.write_chunk("params.w", (0,), [NORMAL])  # and one that does


@pytest.mark.parametrize("place", [20, -1])
def test_a_chunk_that_the_disk_damages_is_not_taken_for_the_sources(tmp_path, monkeypatch, place):
    def damaged(self, name, index, path, expected):
        content = bytearray(path.read_bytes())
        content[place] ^= 255
        path.write_bytes(content)
        compare(self, name, index, path, expected)

    compare = ItemWriter._compare
    monkeypatch.setattr(ItemWriter, "_compare", damaged)
    with ItemWriter(epath.Path(tmp_path) / "params", read_back=True, allow_nonfinite=True) as writer:
        writer.add("params.w", ArrayForm(NORMAL.shape, NORMAL.shape, NORMAL.dtype))
        with pytest.raises(InputError, match="does not read back as it was written; check the disk"):
            writer.write_chunk("params.w", (0,), [NORMAL])
        monkeypatch.setattr(ItemWriter, "_compare", compare)
        writer.write_chunk("params.w", (0,), [NORMAL])
