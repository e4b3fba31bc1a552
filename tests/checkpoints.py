"""Checkpoints for tests: the recorded ones, small ones saved by Orbax itself, and Orbax's view of any."""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from clp_jax import example, trees
from clp_jax.data import CalibrationData
from clp_jax.models.pi0.processing import CAMERAS
from clp_jax.plan import PrunePlan
from clp_jax.provenance import Record

RECORDED = Path(__file__).parent / "golden" / "ckpt"
RECORDED_STEPS = [
    "pi0_released",
    "pi05_released",
    "pi05_released_bf16",
    "pi0_fast_released",
    "pi0_trained/1",
    "pi05_trained/1",
    "pi0_lora_trained/1",
]
RECORD = Record(PrunePlan.of("toy", {"llm": 3}, {"llm": [0, 2]}), ()).to_json()
"""What a ``clp.json`` may say."""


def toy_params() -> dict:
    """Two stacks of three layers and an embedding; dtypes and ranks as in openpi."""
    random = np.random.default_rng(0)
    return {
        "llm": {
            "layers": {"w": random.normal(size=(3, 4, 5)).astype(np.float32), "scale": np.ones((3, 4), np.float32)},
            "embedder": random.normal(size=(70, 6)).astype(jax.numpy.bfloat16),
        },
        "img": {"kernel": random.normal(size=(2, 3)).astype(np.float32)},
    }


def write_example_data(file: Path, count: int) -> CalibrationData:
    """Writes so many observations of the embedded example, whose absent cameras are black, and returns them."""
    data = example.observations(count)
    absent = {}
    for camera in CAMERAS[1:]:
        absent[f"image/{camera}"] = np.zeros_like(data.arrays[f"image/{CAMERAS[0]}"])
        absent[f"image_mask/{camera}"] = np.zeros(len(data), bool)
    np.savez(file, **data.arrays, **absent)
    return data


def save_by_orbax(step: Path, params: dict, *, with_value: bool = False, **options) -> None:
    """Saves as openpi does; `options` are those of ``PyTreeCheckpointer`` (use_ocdbt)."""
    suffix = "/value" if with_value else ""
    tree = trees.unflatten({f"params/{path}{suffix}": leaf for path, leaf in trees.flatten(params).items()})
    with ocp.PyTreeCheckpointer(**options) as checkpointer:
        checkpointer.save(step / "params", tree)


def restore_as_openpi(params_folder: Path, *, restore_type: type) -> dict:
    """What openpi's reader gets: metadata first, then every leaf of "params" by explicit arguments."""
    sharding = None
    if restore_type is jax.Array:
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(params_folder)
        metadata = getattr(metadata, "item_metadata", metadata)  # what newer Orbax wraps it in
        item = {"params": metadata["params"]}
        args = ocp.ArrayRestoreArgs(sharding=sharding, restore_type=restore_type)
        restore_args = jax.tree.map(lambda _: args, item)
        restored = checkpointer.restore(params_folder, ocp.args.PyTreeRestore(item=item, restore_args=restore_args))
    return without_value(restored["params"])


def without_value(tree: dict) -> dict:
    return trees.unflatten({path.removesuffix("/value"): leaf for path, leaf in trees.flatten(tree).items()})


def assert_bit_equal(expected: dict, got: dict) -> None:
    expected, got = trees.flatten(expected), trees.flatten(got)
    assert expected.keys() == got.keys()
    for path, leaf in expected.items():
        a, b = np.asarray(leaf), np.asarray(got[path])
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        assert a.tobytes() == b.tobytes(), path
