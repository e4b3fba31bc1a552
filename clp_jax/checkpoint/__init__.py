"""openpi checkpoints: read, write, cut to fewer layers. The only code that touches checkpoint files.

An openpi checkpoint is an Orbax PyTree checkpoint: zarr arrays, compressed with zstd, in an OCDBT database, with leaf
names joined by dots below "params" and, if openpi's own training wrote it, a trailing "value". Paths in this package
leave out both: ``PaliGemma/llm/layers/attn/q_einsum/w``.
"""

from typing import TYPE_CHECKING

from clp_jax.lazy import importer
from clp_jax.outputs import staged

if TYPE_CHECKING:
    from clp_jax.checkpoint.opening import Spec, fingerprint, read_spec
    from clp_jax.checkpoint.orbax.params import (
        LeafReader,
        copy_files,
        read_params,
        write_beside,
        write_params,
    )
    from clp_jax.checkpoint.orbax.slicing import RewriteReport, rewrite
    from clp_jax.checkpoint.orbax.spec import CheckpointSpec
    from clp_jax.checkpoint.safetensors.folder import FolderSpec, stored_shapes

_HOME = {
    "RewriteReport": "orbax.slicing",
    "rewrite": "orbax.slicing",
    "CheckpointSpec": "orbax.spec",
    "FolderSpec": "safetensors.folder",
    "Spec": "opening",
    "stored_shapes": "safetensors.folder",
    "fingerprint": "opening",
    "read_spec": "opening",
    "LeafReader": "orbax.params",
    "copy_files": "orbax.params",
    "read_params": "orbax.params",
    "write_beside": "orbax.params",
    "write_params": "orbax.params",
}

__all__ = ["staged", *_HOME]  # noqa: PLE0604 - names of the table above

# Who only stages an output (`clp evaluate --server`) needs no JAX.
__getattr__ = importer(__name__, _HOME)
