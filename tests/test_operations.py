"""Counts of traced programs against counts by hand and against the compiler's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import Mesh, PartitionSpec

from clp_jax.errors import InputError
from clp_jax.operations import H100, TPU, Operations, Product, count, count_operations

FLOAT32 = Product("float32", "DEFAULT")
HIGHEST = lax.Precision.HIGHEST


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


SQUARE = shape(4, 4)
ONE = 2 * 4 * 4 * 4
"""Operations of a product of two 4 x 4 matrices."""


def square(x):
    return x @ x


# Products.


def test_a_batched_product():
    found = count(lambda x, y: jnp.einsum("bhqd,bhkd->bhqk", x, y), shape(2, 3, 5, 8), shape(2, 3, 7, 8))
    assert found.products == {FLOAT32: 2 * (2 * 3) * 5 * 7 * 8}


def test_a_convolution():
    def patches(image, kernel):
        return lax.conv_general_dilated(
            image, kernel, (7, 7), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
        )

    found = count(patches, shape(2, 14, 14, 3), shape(7, 7, 3, 10), weights=[1])
    assert found.products == {("float32", "HIGHEST"): 2 * (2 * 2 * 2 * 10) * (7 * 7 * 3)}
    assert found.weight_bytes == 4 * 7 * 7 * 3 * 10


def test_a_grouped_convolution_multiplies_within_its_groups():
    def depthwise(image, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=6)

    assert count(depthwise, shape(1, 5, 5, 6), shape(3, 3, 1, 6)).flops == 2 * (5 * 5 * 6) * (3 * 3)


def test_products_of_every_kind_have_their_own_sum():
    def mixed(x, y):
        logits = jnp.einsum("ij,jk->ik", y, y, preferred_element_type=jnp.float32)
        return x @ x, jnp.dot(x, x, precision=HIGHEST), jnp.dot(x, x, precision=("high", "default")), logits

    found = count(mixed, SQUARE, shape(4, 4, dtype=jnp.bfloat16))
    names = [("float32", "DEFAULT"), ("float32", "HIGHEST"), ("float32", "HIGH"), ("bfloat16", "DEFAULT")]
    assert found.products == dict.fromkeys(names, ONE)
    assert (found.flops, found.passes) == (4 * ONE, (1 + 6 + 3 + 1) * ONE)


def test_operands_of_two_types_count_as_the_wider():
    found = count(lax.dot, SQUARE, shape(4, 4, dtype=jnp.bfloat16))
    assert found.products == {FLOAT32: ONE}


def test_the_default_precision_is_the_one_that_is_set():
    with jax.default_matmul_precision("highest"):
        assert set(count(square, SQUARE).products) == {("float32", "HIGHEST")}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (("float32", "DEFAULT"), 1),
        (("float32", "HIGH"), 3),
        (("float32", "HIGHEST"), 6),
        (("float32", "BF16_BF16_F32_X9"), 9),
        (("bfloat16", "DEFAULT"), 1),
        (("bfloat16", "HIGHEST"), 1),
        (("int8", "DEFAULT"), 1),
    ],
)
def test_passes_of_a_matrix_unit(kind, expected):
    assert TPU.passes({Product(*kind): 10}) == 10 * expected


@pytest.mark.parametrize("kind", [("float64", "DEFAULT"), ("float32", "TF32_TF32_F32")])
def test_products_without_a_rule_are_told(kind):
    with pytest.raises(InputError, match=f"{kind[0]} at precision {kind[1]}"):
        TPU.passes({Product(*kind): 10})


def test_float32_costs_an_h100_what_its_data_sheet_says():
    float32, tensorfloat32, parts = (
        H100.passes({Product("float32", name): 1e12}) for name in ("HIGHEST", "DEFAULT", "BF16_BF16_F32_X3")
    )
    assert float32 / 989.4e12 == pytest.approx(1 / 66.9)
    assert (tensorfloat32, parts) == (2e12, 3e12)


def test_an_algorithm_that_is_written_out_is_a_kind_of_its_own():
    algorithm = lax.DotAlgorithm(jnp.float32, jnp.float32, jnp.float32)
    (kind,) = count(lambda x: jnp.dot(x, x, precision=algorithm), SQUARE).products
    assert kind.precision.startswith("DotAlgorithm(")


# Loops, branches, calls.


def layers(w, x):
    def layer(x, w):
        return jnp.tanh(jnp.einsum("bd,df->bf", x, w)), None

    return lax.scan(layer, x, w)[0].sum()


def test_a_scan_is_as_long_as_it_is():
    found = count(layers, shape(3, 4, 4), shape(5, 4), weights=[0])
    assert found == Operations({FLOAT32: 3 * 2 * 5 * 4 * 4}, 3 * 4 * 4 * 4)


def test_a_gradient_through_a_scan_is_three_products_a_layer():
    """Forward, cotangent of the input, cotangent of the weight."""
    assert count(jax.grad(layers, (0, 1)), shape(3, 4, 4), shape(5, 4)).flops == 3 * 3 * 2 * 5 * 4 * 4


def test_rematerialisation_does_the_forward_pass_again():
    """All of a block but its last product, whose result the backward pass does not need."""

    def block(x, w):
        return jnp.tanh(x @ w) @ w, None

    def loss(body, w, x):
        return lax.scan(body, x, w)[0].sum()

    w, x = shape(3, 4, 4), SQUARE
    stored = count(jax.grad(functools.partial(loss, block)), w, x).flops
    again = count(jax.grad(functools.partial(loss, jax.checkpoint(block, prevent_cse=False))), w, x).flops
    assert (stored, again) == (3 * 6 * ONE, 3 * 7 * ONE)


def test_a_gradient_agrees_with_the_compiler():
    """Without loops, of which the compiler counts one round. It also counts sums and nonlinearities."""

    def block(x, w):
        return jax.nn.gelu(x @ w) @ w

    def loss(w, x):
        return block(block(x, w), w).sum()

    args = shape(64, 64), shape(128, 64)
    compiled = jax.jit(jax.grad(loss)).lower(*args).compile().cost_analysis()
    assert 0.85 < count(jax.grad(loss), *args).flops / compiled["flops"] < 1.0


def test_what_no_result_depends_on_is_not_counted():
    def wasteful(x):
        unused = square(x)
        return x @ x + 0 * x, jnp.sin(unused)

    assert count(lambda x: wasteful(x)[0], SQUARE).flops == ONE
    assert count(wasteful, SQUARE).flops == 2 * ONE


def test_constants_of_a_scan_choose_its_branches():
    flags = np.array([True, False, True, True, False])

    def run(x):
        return lax.scan(lambda x, flag: (lax.cond(flag, square, lambda x: x, x), None), x, flags)[0]

    assert count(run, SQUARE).flops == 3 * ONE


def test_a_branch_that_only_the_data_chooses_counts_as_the_dearest():
    def run(x):
        return lax.switch(x[0, 0].astype(int), [lambda x: x, square, lambda x: square(square(x))], x)

    assert count(run, SQUARE).flops == 2 * ONE


def test_what_only_one_branch_knows_is_not_known():
    def run(x):
        flag = lax.cond(x[0, 0] > 0, lambda: True, lambda: False)
        return lax.cond(flag, lambda x: square(square(x)), square, x)

    assert count(run, SQUARE).flops == 2 * ONE


def test_constants_of_a_loop_are_known_in_it_and_what_it_changes_is_not():
    def constant(x):
        never = jnp.arange(3)[1] > 5
        return lax.scan(lambda x, _: (lax.cond(never, square, lambda x: x, x), None), x, length=4)[0]

    def changing(x):
        def step(carry, _):
            x, flag = carry
            return (lax.cond(flag, square, lambda x: x, x), ~flag), None

        return lax.scan(step, (x, jnp.zeros((), bool)), length=4)[0]

    assert count(constant, SQUARE).flops == 0
    assert count(changing, SQUARE).flops == 4 * ONE


def rounds(first, last, x):
    return lax.while_loop(lambda s: s[0] < last, lambda s: (s[0] + 1, square(s[1])), (first, x))[1]


def test_a_while_loop_of_known_length_is_as_long_as_it_is():
    assert count(lambda x: rounds(jnp.int32(2), 7, x), SQUARE).flops == 5 * ONE
    assert count(lambda x: rounds(jnp.int32(7), 7, x), SQUARE).flops == 0
    assert count(lambda x: lax.fori_loop(0, 10, lambda _, x: square(x), x), SQUARE).flops == 10 * ONE


def test_a_while_loop_of_unknown_length_counts_once():
    assert count(rounds, shape(dtype=jnp.int32), shape(dtype=jnp.int32), SQUARE).flops == ONE


def test_an_endless_loop_is_told(monkeypatch):
    monkeypatch.setattr("clp_jax.operations.program._MOST_ROUNDS", 5)
    with pytest.raises(InputError, match="more than 5 rounds"):
        count(lambda x: rounds(jnp.int32(0), 9, x), SQUARE)


def custom_vjp(x):
    f = jax.custom_vjp(square)
    f.defvjp(lambda x: (square(x), x), lambda x, g: (g @ x,))
    return f(x)


def custom_jvp(x):
    f = jax.custom_jvp(square)
    f.defjvp(lambda primals, tangents: (square(*primals), tangents[0]))
    return f(x)


@pytest.mark.parametrize(
    "call", [jax.jit(square), jax.checkpoint(square), custom_jvp, custom_vjp, jax.jit(jax.jit(square))]
)
def test_calls_are_looked_into(call):
    found = count(call, SQUARE, weights=[0])
    assert found == Operations({FLOAT32: ONE}, 2 * 4 * 4 * 4)


def test_the_backward_pass_of_a_custom_derivative_counts():
    """Nothing but the value itself needs the forward product."""

    def loss(x):
        return custom_vjp(x).sum()

    assert count(jax.grad(loss), SQUARE).flops == ONE
    assert count(jax.value_and_grad(loss), SQUARE).flops == 2 * ONE


def test_every_device_of_a_shard_map_does_its_part():
    shard_map = getattr(jax, "shard_map", None)
    if shard_map is None:  # JAX 0.5
        from jax.experimental.shard_map import shard_map
    mesh, rows = Mesh(np.array(jax.devices()), ("rows",)), PartitionSpec("rows")
    split = shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)
    assert count(split, shape(16, 4), SQUARE).flops == 2 * 16 * 4 * 4


def test_sizes_may_be_symbolic():
    (b,) = export.symbolic_shape("b")
    scanned = count(layers, shape(3, 4, 4), shape(b, 4))
    assert scanned.flops == 3 * 2 * b * 4 * 4
    branches = count(lambda x: lax.cond(x[0, 0] > 0, square, lambda x: x, x @ x.T), shape(b, 4))
    assert branches.flops == 2 * b * b * 4 + 2 * b * b * b


def test_a_symbolic_size_decides_nothing():
    (b,) = export.symbolic_shape("b")
    found = count(
        lambda x: lax.cond(jnp.asarray(x.shape[0]) > 3, lambda x: x, lambda x: x @ jnp.ones((4, 4)), x), shape(b, 4)
    )
    assert found.flops == 2 * b * 4 * 4


def test_products_in_a_kernel_are_told():
    def solve(x, b):
        return lax.custom_linear_solve(lambda v: x @ v, b, lambda matvec, v: v, symmetric=True)

    with pytest.raises(InputError, match="inside custom_linear_solve cannot be counted"):
        count(solve, SQUARE, shape(4))


def test_a_small_reduction_is_no_call():
    """Its body, a program of scalars, is not mistaken for a program of its arrays."""

    def run(x):
        largest = lax.reduce(jnp.arange(4), jnp.int32(0), lax.bitwise_or, (0,))
        return lax.cond(largest == 3, square, lambda x: x, x)

    assert count(run, SQUARE).flops == ONE


# Parameters.


def test_parameters_count_in_the_dtype_in_which_they_are_used():
    def run(w, x):
        return x @ w.astype(jnp.bfloat16)

    found = count(run, SQUARE, shape(2, 4, dtype=jnp.bfloat16), weights=[0])
    assert found == Operations({Product("bfloat16", "DEFAULT"): 2 * 2 * 4 * 4}, 2 * 4 * 4)


def test_a_traced_program_counts_as_its_function_does():
    args = shape(3, 4, 4), shape(5, 4)
    assert count_operations(jax.jit(layers).trace(*args).jaxpr, [True, False]) == count(layers, *args, weights=[0])


def test_counting_inside_a_traced_function_computes_nothing_there():
    flags = np.array([True, False, True])

    def run(x):
        return lax.scan(lambda x, flag: (lax.cond(flag, square, lambda x: x, x), None), x, flags)[0]

    counted = []
    jax.make_jaxpr(lambda x: counted.append(count(run, SQUARE).flops))(1.0)
    assert counted == [2 * ONE]
