"""Parameters and floating-point operations of a model, counted from its sizes.

One multiply-add is two operations. Counted are the matrix products (projections, attention, feed-forward, embeddings of
patches, heads); norms, activations and softmax are left out, below one per cent at full size.
"""

import math

from clp_jax import cka
from clp_jax.models import Architecture, GemmaSizes, SiglipSizes, abstract_params
from clp_jax.trees import flatten


def parameter_count(architecture: Architecture) -> int:
    """Parameters of the model.

    >>> from clp_jax.models import PI0
    >>> parameter_count(PI0)
    3238048528
    """
    return sum(math.prod(leaf.shape) for leaf in flatten(abstract_params(architecture)).values())


def gemma_flops(sizes: GemmaSizes, queries: int, keys: int, *, skip_dead: bool = False) -> int:
    """One expert's blocks on ``queries`` tokens of one observation that attend to ``keys`` tokens.

    With ``skip_dead`` the last block ends with its keys and values.
    """
    keys_and_values = 4 * queries * sizes.width * sizes.num_kv_heads * sizes.head_dim
    projections = 4 * queries * sizes.width * sizes.num_heads * sizes.head_dim
    attention = 4 * queries * keys * sizes.num_heads * sizes.head_dim
    feed_forward = 6 * queries * sizes.width * sizes.mlp_dim
    whole_blocks = sizes.depth - 1 if skip_dead and sizes.depth else sizes.depth
    return sizes.depth * keys_and_values + whole_blocks * (projections + attention + feed_forward)


def siglip_flops(sizes: SiglipSizes, output_width: int) -> int:
    """The encoder on one image."""
    n, d = sizes.num_tokens, sizes.width
    stem = 2 * n * sizes.patch_size**2 * 3 * d
    block = 8 * n * d * d + 4 * n * n * d + 4 * n * d * sizes.mlp_dim
    return stem + sizes.depth * block + 2 * n * d * output_width


def forward_flops(
    architecture: Architecture, *, cameras: int, prompt: int, horizon: int, action_samples: int = 1
) -> int:
    """One forward pass on one observation, prefix and suffix together, as in training.

    Args:
      architecture: of the model.
      cameras: images of an observation.
      prompt: prompt tokens, padding included.
      horizon: actions of a chunk.
      action_samples: draws of noise and time that share the pass over the prefix.
    """
    a = architecture
    prefix = cameras * a.vision.num_tokens + prompt
    suffix = 0 if a.action is None else horizon + (a.kind == "pi0")
    images = cameras * siglip_flops(a.vision, a.vlm.width)
    if a.action is None:
        return images + gemma_flops(a.vlm, prefix, prefix) + 2 * (prompt - 1) * a.vlm.width * a.vocab_size
    once = images + gemma_flops(a.vlm, prefix, prefix, skip_dead=a.skip_dead is not False)
    return once + action_samples * (gemma_flops(a.action, suffix, prefix + suffix) + suffix_head_flops(a, horizon))


def sample_flops(architecture: Architecture, *, cameras: int, prompt: int, horizon: int, num_steps: int = 10) -> int:
    """Sampling one action chunk: the prefix once, then ``num_steps`` passes of the action expert."""
    a = architecture
    assert a.action is not None
    prefix, suffix = cameras * a.vision.num_tokens + prompt, horizon + (a.kind == "pi0")
    once = cameras * siglip_flops(a.vision, a.vlm.width)
    once += gemma_flops(a.vlm, prefix, prefix, skip_dead=a.skip_dead is not False)
    return once + num_steps * (gemma_flops(a.action, suffix, prefix + suffix) + suffix_head_flops(a, horizon))


def suffix_head_flops(architecture: Architecture, horizon: int) -> int:
    """Action and time projections of one observation."""
    assert architecture.action is not None and architecture.action_dim is not None
    width = architecture.action.width
    in_and_out = 4 * horizon * architecture.action_dim * width
    if architecture.kind == "pi05":
        return in_and_out + 4 * width * width
    return in_and_out + 2 * horizon * 3 * width * width + 2 * architecture.action_dim * width


def analysis_flops(
    architecture: Architecture, *, cameras: int, prompt: int, horizon: int, group_size: int, max_samples: int
) -> int:
    """What similarity statistics add to the forward pass of one observation (VLM and action tower, both scales)."""
    a = architecture
    towers = [(a.vlm, cameras * a.vision.num_tokens + prompt)]
    if a.action is not None:
        towers.append((a.action, horizon + (a.kind == "pi0")))
    total = 0
    for sizes, tokens in towers:
        layers, samples = sizes.depth + 1, min(group_size * tokens, max_samples)
        total += 2 * cka.gram_flops(layers, samples, sizes.width)
        total += 2 * samples * layers * layers * sizes.width
    return total // group_size
