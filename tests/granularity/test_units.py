"""Units are found: the axes over which one output neuron collects its inputs."""

import itertools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from helpers.marking import core

import stablegrad as sg
from stablegrad._trees import leaf_names
from stablegrad.granularity._groups import group
from stablegrad.granularity._units import unit_axes

KEY = jax.random.key(0)
ROUNDING = 1e-6  # Of a float32 sum in another order.


def is_shape(x):
    return isinstance(x, tuple) and all(isinstance(n, int) for n in x)


def axes_by_name(tree, **rules):
    return dict(zip(leaf_names(tree), unit_axes(tree, **rules), strict=True))


def shaped(tree):
    """A tree of shapes as one of parameters."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=is_shape,
    )


def initialised(module, *args):
    return jax.eval_shape(module.init, KEY, *args)["params"]


def filled(tree):
    """Numbers for a tree of shapes; initialisers take long to compile."""
    draw = np.random.default_rng(0).standard_normal
    return jax.tree.map(lambda x: jnp.asarray(draw(x.shape), x.dtype), tree)


def assert_units_are_what_feeds_each_output(layer, weight, axes):
    """`layer(weight)` is linear in `weight`: a slope of zero is no connection."""
    slopes = np.asarray(jax.jit(jax.jacobian(layer))(weight))
    slopes = slopes.reshape(-1, *weight.shape)
    squares = np.square(np.asarray(weight))
    incoming = np.where(slopes != 0, squares[None], 0.0)
    expected = np.sqrt(incoming.reshape(len(slopes), -1).sum(1))
    np.testing.assert_allclose(
        np.sqrt(squares.sum(axes)).ravel(), expected, rtol=ROUNDING
    )


LAYERS = {
    "dense": (nn.Dense(5), (3,)),
    "dense without bias": (nn.Dense(5, use_bias=False), (3,)),
    "dense general, two outputs": (nn.DenseGeneral((2, 4)), (3,)),
    "dense general, two inputs": (nn.DenseGeneral(5, axis=(-2, -1)), (2, 3)),
    "dense general, two and two": (nn.DenseGeneral((3, 4), axis=(-2, -1)), (2, 3)),
    "dense general, batched": (nn.DenseGeneral((2, 4), batch_dims=(0,)), (5, 3)),
    "convolution 1-d": (nn.Conv(5, (2,), padding="VALID"), (1, 2, 3)),
    "convolution 2-d": (nn.Conv(5, (2, 3), padding="VALID"), (1, 2, 3, 3)),
    "convolution 3-d": (nn.Conv(5, (2, 1, 2), padding="VALID"), (1, 2, 1, 2, 3)),
    "convolution 1-d without bias": (
        nn.Conv(5, (2,), padding="VALID", use_bias=False, name="Conv_0"),
        (1, 2, 3),
    ),
    "convolution 2-d without bias": (
        nn.Conv(5, (2, 3), padding="VALID", use_bias=False),
        (1, 2, 3, 3),
    ),
    "convolution 3-d without bias": (
        nn.Conv(5, (2, 1, 2), padding="VALID", use_bias=False),
        (1, 2, 1, 2, 3),
    ),
    "grouped convolution": (
        nn.Conv(6, (2,), padding="VALID", feature_group_count=2),
        (1, 2, 4),
    ),
    "einsum": (nn.Einsum((3, 2, 4), "...a,abc->...bc"), (3,)),
}


@pytest.mark.parametrize(
    "layer",
    core(
        LAYERS,
        "dense",
        "dense general, two and two",
        "convolution 2-d",
        "grouped convolution",
    ),
)
def test_a_unit_of_a_linen_layer_is_what_feeds_one_output(layer):
    module, shape = LAYERS[layer]
    x = jnp.ones(shape)
    params = filled(initialised(module, x))
    # As a submodule has it: a layer by itself has no name.
    axes = axes_by_name({module.name or "layer": params})
    name = f"{module.name or 'layer'}.kernel"

    def run(kernel):
        return module.apply({"params": {**params, "kernel": kernel}}, x)

    assert_units_are_what_feeds_each_output(run, params["kernel"], axes[name])


NNX_LAYERS = {
    "linear": (lambda r: nnx.Linear(3, 5, rngs=r), (3,)),
    "linear without bias": (lambda r: nnx.Linear(3, 5, use_bias=False, rngs=r), (3,)),
    "linear general, out": (lambda r: nnx.LinearGeneral(3, (2, 4), rngs=r), (3,)),
    "linear general, in": (
        lambda r: nnx.LinearGeneral((2, 3), 5, axis=(-2, -1), rngs=r),
        (2, 3),
    ),
    "convolution 1-d": (
        lambda r: nnx.Conv(3, 5, (2,), padding="VALID", rngs=r),
        (1, 2, 3),
    ),
    "convolution 2-d": (
        lambda r: nnx.Conv(3, 5, (2, 3), padding="VALID", use_bias=False, rngs=r),
        (1, 2, 3, 3),
    ),
    "convolution 3-d": (
        lambda r: nnx.Conv(3, 5, (2, 1, 2), padding="VALID", rngs=r),
        (1, 2, 1, 2, 3),
    ),
    "einsum": (
        lambda r: nnx.Einsum("...a,abc->...bc", (3, 2, 4), (2, 4), rngs=r),
        (3,),
    ),
}


@pytest.mark.parametrize("layer", core(NNX_LAYERS, "linear", "linear general, in"))
def test_a_unit_of_an_nnx_layer_is_what_feeds_one_output(layer):
    build, shape = NNX_LAYERS[layer]
    module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    x = jnp.ones(shape)
    assert_nnx_units(module, x, axes_by_name(nnx.state(module))["kernel"])


def assert_nnx_units(module, x, axes):
    graph, state = nnx.split(module)
    plain = filled(nnx.to_pure_dict(state))

    def run(kernel):
        nnx.replace_by_pure_dict(state, {**plain, "kernel": kernel})
        return nnx.merge(graph, state)(x)

    assert_units_are_what_feeds_each_output(run, plain["kernel"], axes)


@pytest.mark.slow
@pytest.mark.parametrize("use_bias", core([True, False], True))
@pytest.mark.parametrize(
    "heads, features, width", core([(2, 4, 5), (4, 4, 4)], (4, 4, 4))
)
def test_a_unit_of_linen_attention_feeds_one_feature_of_one_head(
    heads, features, width, use_bias
):
    attention = nn.MultiHeadAttention(
        heads, qkv_features=heads * features, use_bias=use_bias
    )
    x = jnp.ones((1, width))
    params = filled(initialised(attention, x))
    axes = axes_by_name(params)
    for name in ("query", "key", "value", "out"):

        def run(kernel, name=name):
            changed = {**params, name: {**params[name], "kernel": kernel}}
            _, kept = attention.apply(
                {"params": changed}, x, capture_intermediates=True
            )
            return kept["intermediates"][name]["__call__"][0]

        kernel = params[name]["kernel"]
        assert_units_are_what_feeds_each_output(run, kernel, axes[f"{name}.kernel"])


@pytest.mark.parametrize("use_bias", core([True, False], True))
def test_a_unit_of_nnx_attention_feeds_one_feature_of_one_head(use_bias):
    attention = nnx.eval_shape(
        lambda: nnx.MultiHeadAttention(
            2, 5, qkv_features=8, use_bias=use_bias, decode=False, rngs=nnx.Rngs(0)
        )
    )
    axes = axes_by_name(nnx.state(attention))
    for name in ("query", "key", "value", "out"):
        x = jnp.ones((2, 4) if name == "out" else (5,))
        assert_nnx_units(getattr(attention, name), x, axes[f"{name}.kernel"])


@pytest.mark.slow
def test_a_unit_of_an_embedding_is_a_row():
    linen = initialised(nn.Embed(7, 3), jnp.zeros(2, jnp.int32))
    assert unit_axes(linen) == ((1,),)
    assert unit_axes(nnx.state(nnx.Embed(7, 3, rngs=nnx.Rngs(0)))) == ((1,),)


def test_gains_and_biases_are_one_unit_of_any_rank():
    x = jnp.ones((2, 4))
    for module in (
        nn.LayerNorm(),
        nn.RMSNorm(),
        nn.GroupNorm(2),
        nn.BatchNorm(use_running_average=True),
    ):
        assert set(unit_axes(initialised(module, x))) == {(0,)}
    assert axes_by_name(initialised(nn.DenseGeneral((2, 3)), x))["bias"] == (0, 1)


# Stacks of layers.


class Block(nn.Module):
    """A transformer block with everything that a stack may hold."""

    width: int = 4
    heads: int = 2
    use_bias: bool = True

    @nn.compact
    def __call__(self, x, _=None):
        gain = self.param("gamma", nn.initializers.ones, (self.width,))
        normed = nn.RMSNorm()(x)
        x = x + nn.MultiHeadAttention(self.heads, use_bias=self.use_bias)(normed)
        hidden = nn.Dense(6, use_bias=self.use_bias)(nn.LayerNorm()(x))
        images = nn.Conv(3, (3, 3), use_bias=self.use_bias)(hidden[..., None])
        x = x + nn.Dense(self.width, use_bias=self.use_bias)(jnp.mean(images, -1))
        return x * jnp.broadcast_to(gain, x.shape), None


def scanned(block, layers, **settings):
    stack = nn.scan(
        block, variable_axes={"params": 0}, split_rngs={"params": True}, length=layers
    )
    return stack(**settings)


def shifted(tree, layers=1):
    """The axes of an unstacked tree as its stack must have them."""
    return tuple(tuple(a + layers for a in axes) for axes in unit_axes(tree))


@pytest.mark.slow
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(
    "layers, width, heads", [(3, 4, 2), (4, 4, 2), (2, 4, 2), (4, 4, 4), (6, 6, 3)]
)
def test_a_linen_scan_counts_layer_by_layer(layers, width, heads, use_bias):
    settings = {"width": width, "heads": heads, "use_bias": use_bias}
    x = jnp.ones((1, 5, width))
    one = initialised(Block(**settings), x)
    many = initialised(scanned(Block, layers, **settings), x)
    assert unit_axes({"layers": many}) == shifted(one)
    assert unit_axes(many) == shifted(one)


def test_a_scan_leaves_the_rest_of_a_model_alone():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(11, 4)(tokens)
            x, _ = scanned(Block, 4, use_bias=False)(x, None)
            x = nn.Conv(4, (3,), name="mixing_conv", use_bias=False)(x)
            return nn.Dense(11, use_bias=False)(nn.LayerNorm()(x))

    params = initialised(Model(), jnp.zeros((1, 5), jnp.int32))
    axes = axes_by_name(params)
    assert axes["Dense_0.kernel"] == (0,)
    assert axes["Embed_0.embedding"] == (1,)
    assert axes["LayerNorm_0.scale"] == (0,)
    assert axes["mixing_conv.kernel"] == (0, 1)
    one = initialised(Block(use_bias=False), jnp.ones((1, 5, 4)))
    (stack,) = [name for name in params if name.startswith("Scan")]
    assert unit_axes(params[stack]) == shifted(one)
    names = [f"{stack}.{name}" for name in leaf_names(one)]
    assert tuple(axes[name] for name in names) == shifted(one)


def test_nested_scans_count_layer_by_layer():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return nn.Dense(4, use_bias=False)(nn.LayerNorm()(x)), None

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            x, _ = scanned(Inner, 2)(x, None)
            return nn.Dense(4, use_bias=False)(nn.LayerNorm()(x)), None

    params = initialised(scanned(Outer, 3), jnp.ones((1, 4)))
    axes = axes_by_name(params)
    assert axes["Dense_0.kernel"] == axes["LayerNorm_0.scale"] == (1,)
    (inner,) = [name for name in params if name.startswith("Scan")]
    assert axes[f"{inner}.Dense_0.kernel"] == axes[f"{inner}.LayerNorm_0.bias"] == (2,)


def test_members_of_an_ensemble_count_one_by_one():
    block, x = Block(use_bias=False), jnp.ones((1, 5, 4))
    keys = jax.random.split(KEY, 3)
    members = jax.eval_shape(jax.vmap(block.init, in_axes=(0, None)), keys, x)
    assert unit_axes(members["params"]) == shifted(initialised(block, x))


class NnxBlock(nnx.Module):
    def __init__(self, rngs, use_bias=True):
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            2, 4, use_bias=use_bias, decode=False, rngs=rngs
        )
        self.up = nnx.Linear(4, 6, use_bias=use_bias, rngs=rngs)
        self.gamma = nnx.Param(jnp.ones(4))
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


def nnx_by_vmap(use_bias):
    build = nnx.split_rngs(splits=4)(
        nnx.vmap(lambda rngs: NnxBlock(rngs, use_bias), in_axes=0, out_axes=0)
    )
    return build(nnx.Rngs(0))


def nnx_by_scan(use_bias):
    build = nnx.split_rngs(splits=4)(
        nnx.scan(lambda rngs: NnxBlock(rngs, use_bias), in_axes=(0,), out_axes=0)
    )
    return build(nnx.Rngs(0))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("build", [nnx_by_vmap, nnx_by_scan])
def test_an_nnx_stack_counts_layer_by_layer(build, use_bias):
    one = nnx.eval_shape(lambda: NnxBlock(nnx.Rngs(0), use_bias))
    many = nnx.eval_shape(lambda: build(use_bias))
    assert unit_axes(nnx.state(many)) == shifted(nnx.state(one))


def test_variables_and_plain_arrays_of_nnx_have_the_same_units():
    model = nnx.eval_shape(lambda: nnx_by_vmap(use_bias=False))
    params = nnx.state(model, nnx.Param)
    plain = nnx.to_pure_dict(params)
    assert unit_axes(params) == unit_axes(plain)
    assert axes_by_name(params) == axes_by_name(plain)
    seen = []
    unit_axes(params, axis=lambda path, leaf: seen.append(path))
    unit_axes(plain, axis=lambda path, leaf: seen.append(path))
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]


def test_attention_without_bias_tells_its_own_layers():
    attention, x = nn.MultiHeadAttention(2, use_bias=False), jnp.ones((1, 4))
    keys = jax.random.split(KEY, 3)
    many = jax.eval_shape(jax.vmap(attention.init, in_axes=(0, None)), keys, x)
    assert unit_axes(many["params"]) == shifted(initialised(attention, x))


def test_projections_named_as_in_attention_may_be_plain_matrices():
    names = ("query", "key", "value", "out")
    stack = {name: {"kernel": (3, 4, 4)} for name in names}
    tree = shaped({"layers": {"norm": {"scale": (3, 4)}, **stack}})
    assert set(unit_axes(tree)) == {(1,)}
    single = shaped({name: {"kernel": (4, 4)} for name in names})
    assert set(unit_axes(single)) == {(0,)}
    heads = {"value": {"kernel": (4, 2, 2)}, "out": {"kernel": (2, 2, 4)}}
    mixed = axes_by_name(shaped({"query": {"kernel": (4, 8)}, **heads}))
    assert mixed == {"query.kernel": (0,), "value.kernel": (0,), "out.kernel": (0, 1)}
    assert unit_axes({"value": {"w": 1.0}, "out": {"w": 1.0}}) == ((), ())


def test_a_stack_ends_where_leaves_begin_with_another_size():
    stack = {"norm": {"scale": (3, 4)}}
    beside = shaped({"layers": stack, "a": {"gamma": (3, 4)}, "b": {"gamma": (5,)}})
    assert axes_by_name(beside)["a.gamma"] == (0,)
    within = shaped({"layers": {**stack, "a": {"gamma": (3, 4)}}, "b": {"gamma": (5,)}})
    assert axes_by_name(within)["layers.a.gamma"] == (1,)


def test_a_matrix_is_never_a_stack_of_vectors():
    tree = shaped({"layers": {"scale": (3, 4)}, "head": {"kernel": (3, 7)}})
    assert axes_by_name(tree)["head.kernel"] == (0,)


def test_the_name_of_a_convolution_settles_equal_sizes():
    tree = shaped({"conv": {"kernel": (3, 2, 3, 4), "bias": (3, 4)}})
    assert unit_axes(tree) == ((1,), (1, 2))


def stacks_of_every_size():
    """Models of stacked or single layers, with the axes of each leaf of one layer."""
    single = {"layers": (), "head": {"kernel": (5, 7)}}
    for layers, a, b, c in itertools.product((1, 2, 3), repeat=4):
        for with_norm, stack in itertools.product((False, True), repeat=2):
            for kernel, bias, fan_in in (
                ((a, b), (b,), (0,)),
                ((a, b, c), (b, c), (0,)),
                ((a, b, c), (c,), (0, 1)),
                ((a, b, b, c), (c,), (0, 1, 2)),
            ):
                block = {"proj": {"kernel": kernel, "bias": bias}}
                truth = {"proj.kernel": fan_in, "proj.bias": tuple(range(len(bias)))}
                if with_norm:
                    block["norm"] = {"scale": (a,)}
                    truth["norm.scale"] = (0,)
                lead = (layers,) if stack else ()
                block = jax.tree.map(
                    lambda shape, lead=lead: (*lead, *shape), block, is_leaf=is_shape
                )
                truth = {
                    f"layers.{name}": tuple(i + stack for i in axes)
                    for name, axes in truth.items()
                }
                yield shaped({**single, "layers": block}), truth


def test_equal_sizes_may_leave_a_unit_open_but_never_make_it_wrong():
    told = asked = 0
    for tree, truth in stacks_of_every_size():
        asked += 1
        try:
            found = axes_by_name(tree)
        except ValueError:
            continue
        told += 1
        shapes = dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))
        for name, axes in truth.items():
            shape = shapes[name].shape
            wide = [{i for i in which if shape[i] > 1} for which in (axes, found[name])]
            assert wide[0] == wide[1], (name, tree)
    assert told > 0.8 * asked


# What is not a layer of Flax.


def test_a_tree_of_any_kind_has_units():
    w, b = jnp.ones((3, 4)), jnp.ones(4)
    assert unit_axes([w, (b, {"deep": w})]) == ((0,), (0,), (0,))
    assert unit_axes({"linear": {"w": w, "b": b}}) == ((0,), (0,))
    assert unit_axes({"b": w, "n": jnp.arange(6)}) == ((0,),)
    assert unit_axes(w) == ((0,),)
    assert unit_axes({"w": w, "b": w}) == ((0, 1), (0,))
    assert unit_axes({"scale": 2.0}) == unit_axes(2.0) == ((),)
    assert unit_axes({}) == ()


def test_the_keys_of_a_flat_dictionary_are_names():
    nested = initialised(scanned(Block, 4), jnp.ones((1, 5, 4)))
    for separator in "/.":
        flat = flatten_dict({"layers": nested}, sep=separator)
        assert unit_axes(flat) == unit_axes({"layers": nested})


def test_layers_of_equinox_put_outputs_first():
    def build(key):
        conv, rnn = eqx.nn.Conv2d(1, 3, 2, key=key), eqx.nn.GRUCell(2, 3, key=key)
        linears = [eqx.nn.Linear(4, n, use_bias=n > 2, key=key) for n in (2, 4, 3)]
        norm, rows = eqx.nn.LayerNorm(4), eqx.nn.Embedding(7, 3, key=key)
        return eqx.filter([conv, rnn, linears, norm, rows], eqx.is_inexact_array)

    assert unit_axes(jax.eval_shape(build, KEY)) == (
        *((1, 2, 3), (0, 1, 2)),
        *((1,), (1,), (0,), (0,)),
        *((1,), (1,), (0,), (1,), (0,)),
        *((0,), (0,)),
        (1,),
    )


@pytest.mark.parametrize("use_bias", [True, False])
def test_an_equinox_stack_counts_layer_by_layer(use_bias):
    def build(key):
        linear = eqx.nn.Linear(3, 4, use_bias=use_bias, key=key)
        return eqx.filter([linear, eqx.nn.LayerNorm(4)], eqx.is_inexact_array)

    many = jax.eval_shape(eqx.filter_vmap(build), jax.random.split(KEY, 5))
    assert unit_axes(many) == shifted(jax.eval_shape(build, KEY))


def test_a_weight_whose_bias_says_so_puts_outputs_last():
    assert unit_axes({"weight": jnp.ones((3, 4)), "bias": jnp.ones(4)})[1] == (0,)


def test_a_table_of_rows_and_a_vector_need_no_rule():
    params = shaped({"pos_embedding": (1, 9, 4), "cls": (1, 1, 4)})
    assert axes_by_name(params) == {"pos_embedding": (2,), "cls": (0, 1, 2)}


# Rules given by the user.


def test_an_axis_holds_for_every_leaf_that_is_not_a_vector():
    tree = shaped({"a": (3, 4), "b": (5,), "c": (2, 3, 4)})
    assert unit_axes(tree, axis=-1) == ((1,), (0,), (2,))
    assert unit_axes(tree, axis=(1, 0)) == ((0, 1), (0,), (0, 1))


def test_a_function_gives_some_axes_and_leaves_the_rest_to_be_inferred():
    tree = shaped({"proj": {"kernel": (2, 3, 4)}, "dense": {"kernel": (3, 4)}})

    def axis(path, leaf):
        assert len(leaf.shape) == 2 + (path[0].key == "proj")
        return (-2, 0) if path[0].key == "proj" else None

    assert axes_by_name(tree, axis=axis)["proj.kernel"] == (0, 1)
    assert axes_by_name(tree, axis=axis)["dense.kernel"] == (0,)


def test_declared_layers_never_enter_a_unit():
    stack = {"kernel": (3, 3, 5), "bias": (3, 5), "gamma": (3, 4), "slope": (3,)}
    tree = shaped({"layers": {"a": stack}, "head": {"kernel": (5, 2)}})
    for stacked in ("layers", lambda path, leaf: path[0].key == "layers"):
        axes = unit_axes(tree, stacked=stacked)
        assert axes == ((0,), (1,), (1,), (1,), ())
    axes = axes_by_name(tree, axis=0, stacked="layers")
    assert axes["layers.a.kernel"] == (1,)
    assert axes["head.kernel"] == (0,)
    assert axes["layers.a.bias"] == (1,)


def test_undeclared_layers_are_none_once_some_are_declared():
    tree = shaped({"a": {"scale": (3, 4)}, "b": {"scale": (3, 4)}})
    assert unit_axes(tree, stacked="b") == ((0, 1), (1,))
    assert unit_axes(tree, stacked=lambda path, leaf: False) == ((0, 1), (0, 1))


def test_a_function_may_count_nested_layers():
    tree = shaped({"kernel": (2, 2, 2, 2), "bias": (2, 2, 2)})
    assert unit_axes(tree, stacked=lambda path, leaf: 2) == ((2,), (2,))


# Errors.

OPEN = {
    "rank 3": ({"proj": {"kernel": (3, 4, 5)}}, [(0, 1), (0,), (1,)]),
    "rank 3, all inputs 1": ({"proj": {"kernel": (1, 1, 5)}}, [(0, 1), (0,), (1,)]),
    "rank 3, no attention": ({"out": {"kernel": (3, 4, 5)}}, [(0, 1), (0,), (1,)]),
    "rank 3, plain": ({"w": (3, 4, 5)}, [(0, 1), (0,), (1,)]),
    "rank 3, Equinox": ({"proj": {"weight": (3, 4, 5)}}, [(1, 2), (2,)]),
    "rank 3, in a list": ([{"layer": [{"w": (3, 4, 5)}]}], [(0, 1), (0,), (1,)]),
    "stacked rank 3": (
        {"layers": {"norm": {"scale": (2, 4)}, "proj": {"kernel": (2, 3, 4, 5)}}},
        [(1, 2), (1,), (2,)],
    ),
    "a bias that fits no layer": (
        {"conv": {"kernel": (3, 3, 4, 5), "bias": (4,)}},
        [(0, 1, 2), (0,), (1, 2)],
    ),
}


@pytest.mark.parametrize("case", OPEN)
def test_an_open_unit_is_an_error_with_every_reading_and_a_remedy_that_works(case):
    shapes, readings = OPEN[case]
    tree = shaped(shapes)
    said, remedies = complaint(tree)
    assert said == readings
    assert readings[0] in unit_axes(tree, axis=remedies["axis"])


def complaint(tree, **rules):
    """What the error for a tree says: the readings, and the code of the remedies."""
    with pytest.raises(ValueError, match="cannot tell the unit axes of `") as caught:
        unit_axes(tree, **rules)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    said = [eval(line.split(", if it")[0]) for line in lines if ", if it is (" in line]
    code = [line.removesuffix(", or").split(" for ")[0].split("=", 1) for line in lines]
    return said, {words[0]: eval(words[1]) for words in code if len(words) == 2}


def test_equal_sizes_are_settled_by_saying_what_is_stacked():
    tree = shaped({"layers": {"proj": {"kernel": (3, 3, 5), "bias": (3, 5)}}})
    said, remedies = complaint(tree)
    assert said == [(0, 1), (1,)]
    with pytest.raises(ValueError, match=r"it is \(out, out\)\n.* \(layers, out\)"):
        unit_axes(tree)
    assert remedies["stacked"](None, None) is False
    assert unit_axes(tree, stacked=remedies["stacked"]) == ((0, 1), (0,))
    assert unit_axes(tree, stacked="layers") == ((1,), (1,))


def test_a_name_that_the_bias_contradicts_settles_nothing():
    tree = shaped({"conv": {"kernel": (2, 2, 3, 5), "bias": (2, 3, 5)}})
    assert complaint(tree)[0] == [(0, 1, 2), (1, 2)]


def test_an_open_unit_of_declared_layers_is_one_of_a_single_layer():
    tree = shaped({"layers": {"proj": {"kernel": (2, 3, 4, 5)}}})
    said, remedies = complaint(tree, stacked="layers")
    assert said == [(0, 1), (0,)]
    assert set(remedies) == {"axis"}
    assert unit_axes(tree, axis=remedies["axis"], stacked="layers") == ((1, 2),)


def test_an_error_names_the_parameter_its_shape_and_the_stack():
    tree = shaped({"layers": {"0": {"proj": {"kernel": (3, 4, 5)}}}})
    with pytest.raises(ValueError) as caught:
        unit_axes(tree)
    for said in (
        "`layers.0.proj.kernel`, shape (3, 4, 5)",
        "(0, 1), if it is (in, in, out)",
        "(0,), if it is (in, out, out)",
        "(1,), if it is (layers, in, out)",
        "== \"['layers']['0']['proj']['kernel']\" else None",
        'stacked="layers" for all below it',
    ):
        assert said in str(caught.value)


@pytest.mark.parametrize("wrong", [2, -3, (0, 0), (0, -2), 0.5, "0", (0, None)])
def test_an_axis_that_a_leaf_lacks_is_an_error(wrong):
    with pytest.raises(ValueError, match="`axis` must be different axes of `a.w`"):
        unit_axes(shaped({"a": {"w": (3, 4)}}), axis=wrong)


@pytest.mark.parametrize("wrong", ["haed", "head.w", ["head"], 3])
def test_a_name_to_exclude_that_is_in_no_path_is_an_error(wrong):
    tree = shaped({"head": {"w": (3, 4)}})
    with pytest.raises(ValueError, match="`exclude` must be part of the path to some"):
        group(sg.units(exclude=wrong), tree)
    assert group(sg.units(exclude="head"), tree).count == 0
    assert group(sg.units(exclude="head"), {}).count == 0  # All leaves are masked.


@pytest.mark.parametrize("wrong", ["layer", "w", 0.5, True])
def test_a_stack_that_no_path_leads_to_is_an_error(wrong):
    with pytest.raises(ValueError, match="`stacked` must be part of the path to some"):
        unit_axes(shaped({"layers": {"w": (3, 4)}}), stacked=wrong)
