"""Run pruned checkpoints inside an installed openpi, with openpi's own scripts and functions.

openpi writes the depth of its towers into functions of its model files. ``install()`` replaces those functions in the
running process, so that a model is built as deep as the checkpoint whose weights it gets. Nothing is written to the
disk, nothing of clp_jax is imported, and ``uninstall()`` puts everything back.

Where the depth comes from, the first that says one:
  1. the weights that are being loaded (``policy_config.create_trained_policy``, JAX or PyTorch): their shapes;
  2. ``install(checkpoint=...)``, ``python -m openpi_patches --pruned ...`` or ``$OPENPI_PRUNED_CHECKPOINT``;
  3. the training config: its ``CheckpointWeightLoader``, or its ``pytorch_weight_path`` (``scripts/train.py``);
  4. openpi's own depth.

Known openpi: commit 15a9616 (2026-06-16). What install() did is verified by building an abstract model of depth 3.
"""

from openpi_patches.depths import Depths as Depths
from openpi_patches.depths import PatchError as PatchError
from openpi_patches.depths import depths_of_checkpoint as depths_of_checkpoint
from openpi_patches.patches import ENVIRONMENT as ENVIRONMENT
from openpi_patches.patches import install as install
from openpi_patches.patches import uninstall as uninstall
