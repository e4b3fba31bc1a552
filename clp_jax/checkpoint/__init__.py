"""openpi checkpoints: read, write, cut to fewer layers. The only code that touches checkpoint files.

An openpi checkpoint is an Orbax PyTree checkpoint: zarr arrays, compressed with zstd, in an OCDBT database, with leaf
names joined by dots below "params" and, if openpi's own training wrote it, a trailing "value". Paths in this package
leave out both: ``PaliGemma/llm/layers/attn/q_einsum/w``.
"""

from clp_jax.checkpoint.rewriting import RewriteReport as RewriteReport
from clp_jax.checkpoint.rewriting import rewrite as rewrite
from clp_jax.checkpoint.spec import CheckpointSpec as CheckpointSpec
from clp_jax.checkpoint.spec import fingerprint as fingerprint
from clp_jax.checkpoint.spec import read_spec as read_spec
from clp_jax.checkpoint.staging import staged as staged
from clp_jax.checkpoint.values import LeafReader as LeafReader
from clp_jax.checkpoint.values import copy_files as copy_files
from clp_jax.checkpoint.values import read_params as read_params
from clp_jax.checkpoint.values import write_beside as write_beside
from clp_jax.checkpoint.values import write_params as write_params
from clp_jax.checkpoint.values import write_stream as write_stream
