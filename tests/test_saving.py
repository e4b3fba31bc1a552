"""A step of a run has checksums of all that Orbax stored, which whoever reads it compares, or it does not exist."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.checkpoint import read_params, read_spec
from clp_jax.checkpoint.orbax.chunks import Span, stored_arrays
from clp_jax.checkpoint.verifying import verify
from clp_jax.errors import InputError
from clp_jax.plan import PrunePlan
from clp_jax.provenance import training_record
from clp_jax.training import Steps, TrainState, saving

RECORD = training_record(None, PrunePlan.of("pi0", {"llm": 2}, coupled=()), {"config": {}}, {}).to_json()
WIDE = 4096
"""Numbers that Orbax stores in a file, not in its index."""


def state_after(steps: int) -> TrainState:
    """A state with an average and moments, large enough that chunks have files."""
    draw = np.random.default_rng(steps).normal
    tree = lambda: {"llm": {name: jnp.asarray(draw(size=WIDE), jnp.float32) for name in "wv"}}  # noqa: E731
    return TrainState(jnp.asarray(steps, jnp.int32), tree(), (tree(),), tree())


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with step 0."""
    save(tmp_path / "run", state_after(1))
    return tmp_path / "run"


def save(run: Path, state: TrainState) -> None:
    steps = Steps(run, write_assets=lambda _: None)
    try:
        steps.save(state, RECORD)
        steps.wait()
    finally:
        steps.close()


def restore(run: Path, step: int = 0) -> TrainState:
    steps = Steps(run, write_assets=lambda _: None)
    try:
        return steps.restore(state_after(1), step)
    finally:
        steps.close()


def flip_a_bit(item: Path, name: str) -> None:
    (place,) = stored_arrays(read_spec(item.parent).path.parent / item.name)[name].chunks.values()
    assert isinstance(place, Span)
    with Path(place.file).open("r+b") as file:
        file.seek(place.offset + place.length // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


def test_an_untouched_step_passes(run):
    found = verify(read_spec(run / "0"), lambda size: None)
    assert (found.arrays, found.files) == (2 + 5, 1)  # clp.json
    np.testing.assert_array_equal(restore(run).params["llm"]["w"], state_after(1).params["llm"]["w"])


@pytest.mark.parametrize("item", ["params", "train_state"])
def test_a_flipped_bit_in_a_step_is_found_by_resume_and_verify(run, item):
    name = "params.llm.w.value"
    flip_a_bit(run / "0" / item, name)
    with pytest.raises(InputError, match=f"chunk 0 of {name} in .*/{item} holds other bytes"):
        restore(run)
    with pytest.raises(InputError, match=rf"1 of 7 arrays .*: ({item}: )?{name};"):
        verify(read_spec(run / "0"), lambda size: None)
    with pytest.raises(InputError, match=f"of {name} (holds other bytes|cannot be decoded)"):
        read_params(read_spec(run / "0", live=item == "train_state"))


def test_a_step_whose_train_state_is_gone_is_not_what_was_written(run):
    shutil.rmtree(run / "0" / "train_state")
    with pytest.raises(InputError, match=r"holds the parameters as they were written .* no run can be resumed"):
        verify(read_spec(run / "0"), lambda size: None)


def test_an_old_step_leaves_in_one_move_before_it_is_removed(run, monkeypatch):
    """A kill in the middle of its removal left half a step under its number."""
    with monkeypatch.context() as patch:
        patch.setattr(Steps, "_remove_old", lambda self: None)
        save(run, state_after(2))
    assert not (run / "0").exists()
    assert verify(read_spec(run / saving.DELETED / "0"), lambda size: None).arrays == 2 + 5
    save(run, state_after(3))
    assert [child.name for child in run.iterdir()] == ["2"]


def test_a_step_from_before_checksums_goes_on(run):
    (run / "0" / "clp-manifest.json").unlink()
    restore(run)


def test_a_step_whose_bytes_cannot_be_read_back_does_not_exist(run, monkeypatch):
    def fail(item):
        raise OSError(5, "Input/output error", str(item))

    monkeypatch.setattr(saving, "listed_with_checksums", fail)
    with pytest.raises(OSError, match="a step could not be saved, step 0 is whole"):
        save(run, state_after(2))
    assert [child.name for child in run.iterdir() if child.name.isdigit()] == ["0"]
    monkeypatch.undo()
    restore(run)
    save(run, state_after(2))
    assert verify(read_spec(run / "1"), lambda size: None).arrays == 7
