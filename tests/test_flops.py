"""Counted work against products written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from dexportrait_jax.errors import UserError
from dexportrait_jax.flops import count


def arrays(*shapes):
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def test_matrix_products():
    work = count(jnp.matmul, *arrays((3, 5), (5, 7)))
    assert work.macs == 3 * 5 * 7 and work.flops == 2 * work.macs
    assert count(jnp.matmul, *arrays((2, 11, 3, 5), (2, 11, 5, 7))).macs == 22 * 3 * 5 * 7
    attention = count(
        lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k), *arrays(*[(2, 9, 4, 8)] * 2)
    )
    assert attention.macs == 2 * 4 * 9 * 9 * 8


def convolution(strides=(1, 1), padding="SAME", **options):
    def apply(inputs, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            inputs, kernel, strides, padding, dimension_numbers=numbers, **options
        )

    return apply


CONVOLUTIONS = {
    # 2 pictures of 8 x 12; padding counts like data
    "plain": (convolution(), (8, 12, 6), (3, 5, 6, 10), 2 * 96 * 15 * 6 * 10),
    "valid": (convolution(padding="VALID"), (8, 12, 6), (3, 5, 6, 10), 2 * 6 * 8 * 15 * 6 * 10),
    "strided": (convolution((2, 3)), (8, 12, 6), (3, 3, 6, 10), 2 * 4 * 4 * 9 * 6 * 10),
    # two groups: every output sees 3 of the 6 inputs
    "grouped": (convolution(feature_group_count=2), (8, 12, 6), (3, 3, 3, 10), 2 * 96 * 9 * 3 * 10),
    "depthwise": (convolution(feature_group_count=6), (8, 12, 6), (7, 7, 1, 6), 2 * 96 * 49 * 6),
    "dilated": (convolution(rhs_dilation=(2, 2)), (8, 12, 6), (3, 3, 6, 10), 2 * 96 * 9 * 6 * 10),
    # the window at every input position: what is put between inputs is no work
    "transposed": (
        lambda inputs, kernel: lax.conv_transpose(inputs, kernel, (2, 2), "SAME"),
        (8, 12, 6),
        (3, 3, 6, 10),
        2 * 96 * 9 * 6 * 10,
    ),
    "larger than its input": (convolution(), (1, 1, 6), (3, 3, 6, 10), 2 * 6 * 10),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_and_their_gradients(name):
    function, inputs, kernel, macs = CONVOLUTIONS[name]
    operands = arrays((2, *inputs), kernel)
    assert count(function, *operands).macs == macs

    def pulled_back(inputs, kernel):
        result, pull = jax.vjp(function, inputs, kernel)
        return pull(result)

    assert count(pulled_back, *operands).macs == 3 * macs


@pytest.mark.parametrize("transposed", [False, True])
def test_a_strided_convolution_counts_as_in_pytorch(transposed):
    from torch import empty, nn
    from torch.utils.flop_counter import FlopCounterMode

    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(6, 10, 3, stride=2, padding=1, bias=False, device="meta")
    with FlopCounterMode(display=False) as theirs:
        layer(empty(2, 6, 8, 12, device="meta", requires_grad=True)).sum().backward()
    function, inputs, kernel, _ = CONVOLUTIONS["transposed" if transposed else "strided"]
    function = function if transposed else convolution((2, 2), ((1, 1), (1, 1)))
    gradients = jax.value_and_grad(
        lambda *operands: jnp.sum(jnp.square(function(*operands))), (0, 1)
    )
    assert count(gradients, *arrays((2, *inputs), kernel)).flops == theirs.get_total_flops()


def test_gradients_of_a_matrix_product():
    def pulled_back(left, right):
        result, pull = jax.vjp(jnp.matmul, left, right)
        return pull(result)

    assert count(pulled_back, *arrays((3, 5), (5, 7))).macs == 3 * 105
    half = jax.value_and_grad(lambda left, right: jnp.sum(jnp.sin(left @ right)))
    assert count(half, *arrays((3, 5), (5, 7))).macs == 2 * 105  # no gradient of the right one


def test_loops():
    def scanned(state, matrices):
        return lax.scan(lambda state, matrix: (state @ matrix, None), state, matrices)[0]

    operands = arrays((3, 5), (6, 5, 5))
    assert count(scanned, *operands).macs == 6 * 75
    gradient = jax.value_and_grad(lambda *operands: jnp.sum(scanned(*operands)), argnums=(0, 1))
    assert count(gradient, *operands).macs == 3 * 6 * 75
    mapped = count(
        lambda rows, matrix: lax.map(lambda row: row @ matrix, rows), *arrays((4, 3, 5), (5, 7))
    )
    assert mapped.macs == 4 * 105
    fixed = count(lambda a: lax.fori_loop(0, 9, lambda _, b: b @ b, a), *arrays((5, 5)))
    assert fixed.macs == 9 * 125


def test_a_loop_of_unknown_length():
    def until_large(step):
        return lambda a: lax.while_loop(lambda a: jnp.sum(a) < 10, step, a)

    assert count(until_large(lambda a: a + 1), *arrays((5, 5))).macs == 0
    with pytest.raises(UserError, match="while loop .* lax.scan"):
        count(until_large(lambda a: a @ a), *arrays((5, 5)))


def test_conditionals_count_the_dearest_branch():
    def chosen(number, a):
        branches = [lambda a: a, lambda a: a @ a @ a, lambda a: a @ a]
        return lax.switch(number, branches, a)

    assert count(chosen, jnp.int32(0), *arrays((5, 5))).macs == 2 * 125


@jax.custom_vjp
def own_gradient(left, right):
    return left @ right


own_gradient.defvjp(
    lambda left, right: (left @ right, (left, right)),
    lambda kept, gradient: (gradient @ kept[1].T @ jnp.eye(5), jnp.zeros((5, 7))),
)


@jax.custom_jvp
def own_derivative(left, right):
    return left @ right


own_derivative.defjvp(lambda values, tangents: (values[0] @ values[1], tangents[0] @ values[1]))


@pytest.mark.parametrize("function", [jax.jit(jnp.matmul), own_gradient, own_derivative])
def test_calls(function):
    assert count(function, *arrays((3, 5), (5, 7))).macs == 105
    assert count(jax.jit(lambda a, b: function(a, b) + 1), *arrays((3, 5), (5, 7))).macs == 105


def test_what_no_result_needs_is_not_counted():
    def function(left, right):
        unused = jnp.sin(left @ right) @ right
        return left @ right, unused.shape

    assert count(function, *arrays((3, 5), (5, 5))).macs == 75


def test_the_gradient_that_a_function_brings_along():
    gradient = jax.value_and_grad(lambda left, right: jnp.sum(own_gradient(left, right)))
    assert count(gradient, *arrays((3, 5), (5, 7))).macs == 105 + 105 + 3 * 5 * 5


def test_what_is_computed_once_more():
    def layers(state, matrix):
        return jnp.sum(jnp.sin(jnp.sin(state @ matrix) @ matrix))

    operands = arrays((3, 5), (5, 5))
    plain = count(jax.value_and_grad(layers, argnums=(0, 1)), *operands)
    assert (plain.macs, plain.recomputed) == (3 * 2 * 75, 0)
    again = count(jax.value_and_grad(jax.checkpoint(layers), argnums=(0, 1)), *operands)
    assert (again.macs, again.recomputed) == (4 * 2 * 75, 2 * 75)
    assert count(jax.checkpoint(layers), *operands).recomputed == 0


def test_work_of_all_devices():
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    mesh = jax.sharding.Mesh(devices, ("data", "tensor"))
    rows, columns = PartitionSpec("data"), PartitionSpec(None, "tensor")
    split = jax.shard_map(
        jnp.matmul, mesh=mesh, in_specs=(rows, columns), out_specs=PartitionSpec("data", "tensor")
    )
    assert count(split, *arrays((6, 5), (5, 8))).macs == 6 * 5 * 8
    # The same rows on both devices of `tensor` are done twice.
    twice = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)
    assert count(twice, *arrays((6, 5), (5, 8))).macs == 2 * 6 * 5 * 8


def test_a_kernel_that_hides_its_work():
    def kernel(left, right, output):
        output[...] = left[...] @ right[...]

    from jax.experimental import pallas

    product = pallas.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((8, 8), jnp.float32))
    with pytest.raises(UserError, match="pallas_call"):
        count(product, *arrays((8, 8), (8, 8)))


def test_scopes():
    def network(left, right):
        with jax.named_scope("encoder"):
            hidden = jnp.sin(left @ right)
        with jax.named_scope("decoder"):
            hidden = jax.jit(lambda hidden: jnp.einsum("ij,jk->ik", hidden, right))(hidden)
            with jax.named_scope("head"):
                hidden = jax.checkpoint(lambda hidden: jnp.sin(hidden @ right))(hidden)
        return jnp.sum(hidden @ right)

    scopes = ("encoder", "decoder", "head")
    work = count(
        jax.value_and_grad(network, argnums=(0, 1)), *arrays((3, 5), (5, 5)), scopes=scopes
    )
    three = 3 * 75
    assert work.by_scope == {"encoder": three, "decoder": three, "head": three + 75, "": three}
    assert work.macs == 4 * three + 75 and work.recomputed == 75
    outer = count(network, *arrays((3, 5), (5, 5)), scopes=("decoder",))
    assert outer.by_scope == {"decoder": 2 * 75, "": 2 * 75}
