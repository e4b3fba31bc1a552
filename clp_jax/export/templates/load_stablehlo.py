"""Run this exported model with jax, flatbuffers, safetensors and numpy; no model code is needed.

`sample_actions = load()`, then `sample_actions(**inputs)` takes the arrays that signature.json names and returns
actions. Run the file to compare with the recorded actions of the model that it was made from.
"""

import json
import sys
from pathlib import Path

import jax.export  # which needs flatbuffers
import numpy as np
from safetensors.flax import load_file

HERE = Path(__file__).resolve().parent


def load(folder=HERE):
    """The program and its weights as a function of named inputs."""
    program = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
    signature = json.loads((folder / "signature.json").read_text())
    if program.nr_devices != 1:  # how an old JAX misreads a newer program
        raise RuntimeError(f"made with JAX {signature['exported_by']['jax']}, which JAX {jax.__version__} cannot read")
    names = list(signature["inputs"])
    weights = load_file(folder / "model.safetensors")
    run = jax.jit(program.call)

    def sample_actions(**inputs):
        if sorted(inputs) != sorted(names):
            raise TypeError(f"the inputs are {names}, not {sorted(inputs)}")
        return run(weights, inputs)

    return sample_actions


def largest_difference(folder=HERE):
    """max |program - recorded| over the recorded actions."""
    with np.load(folder / "check.npz") as archive:
        arrays = dict(archive)
    expected = arrays.pop("actions")
    with jax.default_matmul_precision("highest"):
        actions = load(folder)(**arrays)
    return float(np.abs(np.asarray(actions, np.float32) - expected).max())


if __name__ == "__main__":
    difference = largest_difference()
    if "--json" in sys.argv:
        print(json.dumps({"largest_difference": difference}))
    else:
        print(f"largest difference of the actions from the model exported: {difference:.1e}")
    sys.exit(not difference <= json.loads((HERE / "signature.json").read_text())["tolerance"])
