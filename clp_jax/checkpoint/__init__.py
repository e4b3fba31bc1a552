"""openpi checkpoints: read, write, cut to fewer layers. The only code that touches checkpoint files.

An openpi checkpoint is an Orbax PyTree checkpoint: zarr arrays, compressed with zstd, in an OCDBT database, with leaf
names joined by dots below "params" and, if openpi's own training wrote it, a trailing "value". Paths in this package
leave out both: ``PaliGemma/llm/layers/attn/q_einsum/w``.
"""

from typing import TYPE_CHECKING

from clp_jax.checkpoint.staging import staged
from clp_jax.lazy import importer

if TYPE_CHECKING:
    from clp_jax.checkpoint.opening import Spec, fingerprint, read_spec
    from clp_jax.checkpoint.rewriting import RewriteReport, rewrite
    from clp_jax.checkpoint.safetensors_folder import FolderSpec
    from clp_jax.checkpoint.spec import CheckpointSpec
    from clp_jax.checkpoint.values import LeafReader, copy_files, read_params, write_beside, write_params, write_stream

_HOME = {
    "RewriteReport": "rewriting",
    "rewrite": "rewriting",
    "CheckpointSpec": "spec",
    "FolderSpec": "safetensors_folder",
    "Spec": "opening",
    "fingerprint": "opening",
    "read_spec": "opening",
    "LeafReader": "values",
    "copy_files": "values",
    "read_params": "values",
    "write_beside": "values",
    "write_params": "values",
    "write_stream": "values",
}

__all__ = ["staged", *_HOME]  # noqa: PLE0604 - names of the table above

# Who only stages an output (`clp evaluate --server`) needs no JAX.
__getattr__ = importer(__name__, _HOME)
