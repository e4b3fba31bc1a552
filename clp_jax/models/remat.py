"""What the backward pass of a scanned block computes again instead of keeping it."""

from typing import Any

import flax.linen as nn
import jax

_POLICIES = {
    "all": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def rematerialised(block: Any, remat: str) -> Any:
    """A block class for a scan, or a function of a block.

    "all" keeps its input alone, "dots" also its products with weights, "none" all.
    """
    return block if remat == "none" else nn.remat(block, prevent_cse=False, policy=_POLICIES[remat])
