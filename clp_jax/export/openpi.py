"""An inference checkpoint for openpi: one set of weights in one dtype, norm stats, nothing of the optimiser."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from clp_jax.checkpoint import CheckpointSpec, read_params, read_spec, write_beside
from clp_jax.checkpoint.manifest import list_files
from clp_jax.checkpoint.orbax.chunks import stored_arrays
from clp_jax.checkpoint.orbax.params import files_beside, put_parts
from clp_jax.checkpoint.orbax.slicing import columns
from clp_jax.checkpoint.orbax.spec import RECORD_FILE, translated
from clp_jax.checkpoint.orbax.writer import ItemWriter
from clp_jax.checkpoint.threads import run_in_threads
from clp_jax.export import reference
from clp_jax.export.result import Check, Options
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
    """Writes ``params``, ``assets`` and ``clp.json`` into a folder that is being staged, and reads every chunk back."""
    del options
    spec = weights.spec
    assert isinstance(spec, CheckpointSpec)
    with (
        ItemWriter(epath.Path(folder) / "params", read_back=True) as writer,
        stage("writing and reading back", total=None, unit="MB") as advance,
    ):
        jobs = sorted(_jobs(weights, spec, writer), key=lambda job: job[0], reverse=True)
        run_in_threads([job for _, job in jobs], in_megabytes(advance))
    write_beside(epath.Path(folder), assets=spec.assets, record=spec.plan_record)
    list_files(epath.Path(folder), files_beside(epath.Path(folder)))


def _jobs(weights: Weights, spec: CheckpointSpec, writer: ItemWriter) -> Iterator[tuple[int, Iterator[int]]]:
    """What is to be written: bytes to handle, and what yields the size of each chunk once that is done."""
    with translated(spec.path):
        arrays = stored_arrays(spec.path)
    for path, leaf in weights.leaves.items():
        name = spec.stored_name(path)
        if path in weights.changed:
            yield leaf.size * leaf.dtype.itemsize, put_parts(writer, name, leaf, weights.parts(path))
        else:
            yield from ((column.work, column.copy()) for column in columns(arrays[name], None, writer))


def check(weights: Weights, folder: Path, options: Options) -> Check:
    """Compares what the model answers with what it answers from the source's weights."""
    written = read_spec(folder)
    assert isinstance(written, CheckpointSpec)
    assert isinstance(weights.spec, CheckpointSpec)
    record = json.loads((folder / RECORD_FILE).read_text()) if (folder / RECORD_FILE).exists() else None
    assert record == weights.spec.plan_record
    acts = family_of(weights.source).why_no_actions(weights.source) is None
    what = "sampled actions" if acts else "logits"
    what = f"{what} of the source's weights (its dtypes and adapters) and of the exported ones, float32 arithmetic"
    found = functools.partial(Check, len(weights.leaves), by="chunk by chunk by CRC-32")
    if not options.run:
        return found(None, what, "not asked for (--check bits)")
    if not weights.changed:
        return found(0.0, f"{what}: the weights are the same")
    inputs = reference.example_inputs(weights.source, options.lengths)
    source = reference.run_model(weights.source, read_params(weights.spec), inputs)
    exported = reference.run_model(weights.architecture, read_params(written), inputs)
    return found(reference.largest_difference(source, exported), what)
