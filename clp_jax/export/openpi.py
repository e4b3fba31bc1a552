"""An inference checkpoint for openpi: one set of weights in one dtype, norm stats, nothing of the optimiser."""

import json
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from clp_jax.checkpoint import CheckpointSpec, LeafReader, read_params, read_spec, write_beside, write_stream
from clp_jax.checkpoint.orbax.spec import RECORD_FILE
from clp_jax.checkpoint.threads import run_in_threads
from clp_jax.errors import InputError
from clp_jax.export import reference
from clp_jax.export.result import Check, Options, same_bits
from clp_jax.export.weights import Weights
from clp_jax.models import family_of
from clp_jax.progress import in_megabytes, stage

LOAD = """In openpi's environment, with clp_jax installed (its `openpi_patches` reads the depth from the weights):

```console
$ python -m openpi_patches scripts/serve_policy.py policy:checkpoint --policy.config=CONFIG --policy.dir=THIS_FOLDER
$ python -m openpi_patches scripts/train.py CONFIG --exp-name=NAME --weight-loader.params-path=THIS_FOLDER/params
```

or in Python

```python
import openpi_patches
openpi_patches.install()
policy = policy_config.create_trained_policy(config.get_config("CONFIG"), "THIS_FOLDER")
```

`CONFIG` is the training config that the checkpoint was fine-tuned with."""


def write(weights: Weights, folder: Path, options: Options) -> None:
    """Writes ``params``, ``assets`` and ``clp.json`` into a folder that is being staged."""
    del options
    spec = weights.spec
    assert isinstance(spec, CheckpointSpec)
    write_stream(epath.Path(folder) / "params", weights.leaves, weights.parts, value_suffix=spec.value_suffix)
    write_beside(epath.Path(folder), assets=spec.assets, record=spec.plan_record)


def check(weights: Weights, folder: Path, options: Options) -> Check:
    """Reads the checkpoint back: every bit, then what the model answers beside the source's weights."""
    written = read_spec(folder)
    assert isinstance(written, CheckpointSpec)
    assert isinstance(weights.spec, CheckpointSpec)
    reader = LeafReader(written)

    def compare(path: str) -> Iterator[int]:
        read = reader.layers(path) if weights.stacked(path) else iter([reader.whole(path)])
        for expected, found in zip(weights.parts(path), read, strict=True):
            if not same_bits(expected, found):
                raise InputError(f"{path} does not read back as it was written; check the disk and export again.")
            yield found.nbytes

    with stage("reading back", total=None, unit="MB") as advance:
        run_in_threads([compare(path) for path in weights.leaves], in_megabytes(advance))
    record = json.loads((folder / RECORD_FILE).read_text()) if (folder / RECORD_FILE).exists() else None
    assert record == weights.spec.plan_record
    acts = family_of(weights.source).why_no_actions(weights.source) is None
    what = "sampled actions" if acts else "logits"
    what = f"{what} of the source's weights (its dtypes and adapters) and of the exported ones, float32 arithmetic"
    if not options.run:
        return Check(len(weights.leaves), None, what, "not asked for (--check bits)")
    if not weights.changes_values():
        return Check(len(weights.leaves), 0.0, f"{what}: the weights are the same")
    inputs = reference.example_inputs(weights.source, options.lengths)
    source = reference.run_model(weights.source, read_params(weights.spec), inputs)
    exported = reference.run_model(weights.architecture, read_params(written), inputs)
    return Check(len(weights.leaves), reference.largest_difference(source, exported), what)
