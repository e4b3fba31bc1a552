"""What is computed in float32 where activations are bfloat16: scores, softmax and norms of every model.

Outputs of whole models cannot show it: in bfloat16 they differ by more between two compilers. So each part is run by
itself, uncompiled (a compiler may leave roundings out), on numbers that are exact in bfloat16, and must be the part's
own float32 result, rounded once. Scores lie near 128, where bfloat16 goes in steps of 1 and a softmax of rounded
scores is far from that of the real ones.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.models.groot import qwen
from clp_jax.models.groot import transformer as groot
from clp_jax.models.groot.architecture import QwenSizes
from clp_jax.models.layers.attention import _attend, rotate
from clp_jax.models.layers.siglip import Siglip, SiglipSizes
from clp_jax.models.pi0 import gemma
from clp_jax.models.pi0.architecture import GemmaSizes
from clp_jax.models.smolvla import decoder

B, T, S, HEADS, SIZE = 2, 5, 7, 2, 16
WIDTH = HEADS * SIZE
BF16 = jnp.bfloat16

WEIGHTS = 2**-7
"""Of the largest value: the weights of a softmax are rounded to bfloat16, and so is what they add up to."""


def drawn(seed, shape, mean, spread):
    """Normal numbers that bfloat16 holds exactly."""
    values = np.random.default_rng(seed).standard_normal(shape) * spread + mean
    return jnp.asarray(values, BF16)


QUERIES = drawn(0, (B, T, HEADS, SIZE), 8.0, 0.5)
KEYS = drawn(1, (B, S, HEADS, SIZE), 4.0, 0.05)
VALUES = drawn(2, (B, S, HEADS, SIZE), 0.0, 1.0)
EVERYTHING = jnp.ones((B, T, S), bool)


def attended(queries, keys=KEYS, values=VALUES, mask=np.ones((1, 1, 1), bool)):
    """softmax(q k / sqrt(size)) v in float64 [b, t, heads, size]."""
    q, k, v = (np.asarray(x, np.float64) for x in (queries, keys, values))
    scores = np.where(mask[:, None], np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(axis=-1, keepdims=True), v)


def assert_rounded_once(found, exact):
    """Of a softmax: within what the rounding of its weights and of the result can do."""
    assert found.dtype == BF16
    difference = np.abs(np.asarray(found, np.float64).reshape(exact.shape) - exact).max()
    assert difference < WEIGHTS * np.abs(np.asarray(VALUES, np.float64)).max()


def identity(*shape):
    """A map that changes nothing, in the shape of a parameter."""
    return jnp.eye(WIDTH, dtype=jnp.float32).reshape(shape)


def test_the_scores_tell_rounded_from_exact():
    """The rest of this file would notice."""
    rounded = np.asarray(jnp.einsum("btnh,bsnh->bnts", QUERIES, KEYS) / 4, np.float64)
    exact = np.einsum("btnh,bsnh->bnts", *(np.asarray(x, np.float64) for x in (QUERIES, KEYS))) / 4
    assert exact.min() > 100 and np.ptp(exact, axis=-1).max() < 8
    assert np.abs(rounded - exact).max() > 0.4


def gemma_attention(queries, keys, values, positions, *, float32_queries):
    """Of a layer whose maps change nothing."""
    sizes = GemmaSizes(WIDTH, 1, 1, HEADS, 1, SIZE)
    params = {
        "q_einsum": {"w": identity(WIDTH, HEADS, SIZE).transpose(1, 0, 2)},
        "kv_einsum": {"w": jnp.zeros((2, 1, WIDTH, SIZE))},
        "attn_vec_einsum": {"w": identity(HEADS, SIZE, WIDTH)},
    }
    mask = jnp.ones((B, queries.shape[1], keys.shape[1]), bool)
    x = queries.reshape(B, -1, WIDTH)
    return gemma.Attention((sizes,), float32_queries).apply({"params": params}, 0, x, keys, values, positions, mask)


def shared(x):
    """One key head for all query heads, for the reference."""
    return np.asarray(x, np.float32).repeat(HEADS, axis=2)


@pytest.mark.slow
@pytest.mark.parametrize("float32_queries", [False, True])
def test_gemma_attention(float32_queries):
    keys, values = KEYS[:, :, :1], VALUES[:, :, :1]
    positions = jnp.zeros((B, T), jnp.int32)
    found = gemma_attention(QUERIES, keys, values, positions, float32_queries=float32_queries)
    assert_rounded_once(found, attended(QUERIES, shared(keys), shared(values)))


@pytest.mark.slow
@pytest.mark.parametrize("float32_queries", [False, True])
def test_pi0_rounds_its_rotated_queries_and_pi0_fast_does_not(float32_queries):
    """Among many keys of all directions some are nearly equally good, and the rounding decides."""
    queries = drawn(5, (B, 32, HEADS, SIZE), 0.0, 8.0)
    keys, values = drawn(6, (B, 16, 1, SIZE), 0.0, 4.0), drawn(7, (B, 16, 1, SIZE), 0.0, 1.0)
    positions = jnp.broadcast_to(jnp.arange(32) * 3, (B, 32))
    rotated = rotate(queries, positions)
    kinds = {
        kind: attended(x, shared(keys), shared(values)) for kind, x in ((True, rotated), (False, rotated.astype(BF16)))
    }
    assert np.abs(kinds[True] - kinds[False]).max() > 0.06
    found = gemma_attention(queries, keys, values, positions, float32_queries=float32_queries)
    assert_rounded_once(found, kinds[float32_queries])


@pytest.mark.parametrize("blind_read_nothing", [False, True])
def test_the_order_of_the_axes_of_logits_changes_nothing(blind_read_nothing):
    """Which is another one on CPU, where tests run, than elsewhere."""
    q, keys, values = (
        drawn(seed, shape, 0.0, 1.0).astype(jnp.float32)
        for seed, shape in ((8, (2, 5, 2, 3, 4)), (9, (2, 7, 2, 4)), (10, (2, 7, 2, 4)))
    )
    mask = np.random.default_rng(0).random((2, 5, 7)) < 0.5
    mask[0, 1] = False
    read = {
        order: _attend(
            *(q, keys, values, jnp.asarray(mask)),
            order=order,
            masked=-1e30,
            scale=0.5,
            blind_read_nothing=blind_read_nothing,
        )
        for order in ("BKTGS", "BKGTS")
    }
    np.testing.assert_allclose(read["BKTGS"], read["BKGTS"], rtol=0, atol=1e-6)
    of_blind = 0.0 if blind_read_nothing else np.asarray(values[0]).mean(axis=0)[:, None]
    np.testing.assert_allclose(read["BKTGS"][0, 1], np.broadcast_to(of_blind, (2, 3, 4)), atol=1e-6)
    alone = jax.nn.softmax(jnp.where(mask[1, 2], 0.5 * keys[1, :, 1] @ q[1, 2, 1, 2], -jnp.inf)) @ values[1, :, 1]
    np.testing.assert_allclose(read["BKTGS"][1, 2, 1, 2], alone, atol=1e-6)


def test_smolvla_attention():
    assert_rounded_once(decoder.attend(QUERIES, KEYS, VALUES, EVERYTHING), attended(QUERIES))


def test_groot_attention():
    """Of the action head's transformers."""
    dense = {"kernel": identity(WIDTH, WIDTH), "bias": jnp.zeros(WIDTH)}
    module = groot.Attention(WIDTH, HEADS, "bfloat16")
    params = dict.fromkeys(("q", "k", "v", "out"), dense)
    found = module.apply({"params": params}, QUERIES.reshape(B, T, WIDTH), (KEYS, VALUES))
    assert_rounded_once(found, attended(QUERIES))


def test_groot_language_model_attention():
    """Its queries and keys are normalised, which the norm itself does here; at position 0 nothing is rotated."""
    sizes = QwenSizes(WIDTH, 1, 1, HEADS, HEADS, SIZE, rope_theta=1e4, eps=1e-6)
    scale = {"q_norm": jnp.full(SIZE, 8.0), "k_norm": jnp.full(SIZE, 4.0)}
    params = {name: {"scale": values} for name, values in scale.items()}
    params |= {name: {"kernel": identity(WIDTH, WIDTH)} for name in "qkvo"}
    x = QUERIES.reshape(B, T, WIDTH)
    seen = np.tril(np.ones((T, T), bool))[None].repeat(B, axis=0)
    found, _ = qwen.Attention(sizes, "bfloat16", "flash").apply(
        {"params": params}, x, jnp.zeros((B, T), jnp.int32), jnp.asarray(seen)
    )
    q, k = (qwen.RMSNorm(1e-6).apply({"params": params[name]}, QUERIES) for name in scale)
    exact = attended(q, k, QUERIES, seen)
    assert np.abs(np.asarray(found, np.float64).reshape(exact.shape) - exact).max() < WEIGHTS * np.abs(exact).max()


def gemma_norm(x):
    return gemma.RMSNorm().apply({"params": {"scale": jnp.zeros(x.shape[-1])}}, x, None)[0]


def smolvla_norm(x):
    return decoder.rms_norm(x, jnp.ones(x.shape[-1]), 1e-6)


def groot_language_norm(x):
    return qwen.RMSNorm(1e-6).apply({"params": {"scale": jnp.ones(x.shape[-1])}}, x)


@pytest.mark.parametrize("norm", [gemma_norm, smolvla_norm, groot_language_norm])
def test_norms(norm):
    x = drawn(3, (B, T, 96), 1.0, 3.0)
    np.testing.assert_array_equal(norm(x), norm(x.astype(jnp.float32)).astype(BF16))


@pytest.mark.slow
def test_siglip_patches_and_positions():
    sizes = SiglipSizes(width=8, depth=1, mlp_dim=4, num_heads=1, patch_size=4, num_tokens=4)
    images = drawn(4, (B, 8, 8, 3), 0.0, 0.5)
    params = Siglip(sizes, None, "float32").init(jax.random.key(0), images)
    ours, exact = (
        Siglip(sizes, None, dtype).apply(params, images, capture=True)[1][0] for dtype in ("bfloat16", "float32")
    )
    np.testing.assert_array_equal(ours, exact.astype(BF16))
