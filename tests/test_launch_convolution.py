"""launch/convolution.py: Keras' convolutions, faster, with the same results but for rounding."""

import importlib
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

sys.path.insert(0, str(Path(__file__).parents[1]))
faster = importlib.import_module("launch.cpu").faster
ways = importlib.import_module("launch.convolution")
processor = importlib.import_module("launch.processor")

RNG = np.random.default_rng(0)
EPSILON = {"bfloat16": 2**-8, "float16": 2**-11}


def numbers(*shape, dtype=tf.float32):
    return tf.cast(RNG.normal(size=shape), dtype)


def operations(layer, x):
    """Return the operations that layer makes of x, or those of its gradients."""
    return tf.function(layer).get_concrete_function(x).graph.get_operations()


def types(layer, x):
    return {operation.type for operation in operations(layer, x)}


def gradients_of(layer):
    """Return a function of x that computes the gradients of x and of layer's kernel."""

    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        return tape.gradient(y, [x, layer.kernel.value])

    return run


def with_gradients(layer, x, upstream=None):
    """Return layer(x) and the gradients of x and of the layer's variables."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
        loss = tf.reduce_sum(y**2) if upstream is None else y
    variables = [variable.value for variable in layer.trainable_weights]
    return [y, *tape.gradient(loss, [x, *variables], upstream)]


@pytest.fixture
def fast():
    with faster():
        yield


@pytest.fixture
def flags(monkeypatch):
    """Set what the processor can do."""

    def put(*names):
        for module in processor, ways:
            monkeypatch.setattr(module, "processor_flags", lambda: {"fpu", *names})

    return put


FAST = [
    # size, channels, filters, options
    (16, 64, 70, {"kernel_size": 3}),
    (4, 70, 64, {"kernel_size": 3, "activation": "relu"}),
    (8, 64, 64, {"kernel_size": 5}),
    (8, 128, 192, {"kernel_size": 3, "groups": 2, "use_bias": False}),
    (7, 6, 9, {"kernel_size": 1, "padding": "valid"}),
    (7, 6, 9, {"kernel_size": 1, "groups": 3}),
    (16, 64, 70, {"kernel_size": 1}),  # large: gradients in order
    (2, 6, 9, {"kernel_size": 3}),
    (2, 64, 64, {"kernel_size": 3, "groups": 2}),
]
DIRECT = [
    (10, 64, 64, {"kernel_size": 3, "strides": 2, "padding": "valid"}),
    (34, 64, 66, {"kernel_size": 3, "strides": 2, "padding": "valid"}),  # large
    (8, 64, 64, {"kernel_size": 3, "strides": 2}),
    (32, 64, 66, {"kernel_size": 3}),  # large: gradients in order
    (8, 64, 64, {"kernel_size": 3, "padding": "valid"}),
    (8, 64, 64, {"kernel_size": (3, 5)}),
    (8, 64, 64, {"kernel_size": 3, "dilation_rate": 2}),
    (8, 64, 64, {"kernel_size": 7}),
    (8, 3, 64, {"kernel_size": 3}),
    (8, 6, 9, {"kernel_size": 3, "strides": 2, "groups": 3}),
    (2, 64, 64, {"kernel_size": 5}),
    (8, 6, 9, {"kernel_size": 1, "strides": 2}),
]


@pytest.mark.parametrize(
    "size, channels, filters, options, direct",
    [(*case, False) for case in FAST] + [(*case, True) for case in DIRECT],
)
def test_convolution_is_keras_own(size, channels, filters, options, direct):
    options = {"padding": "same", "bias_initializer": "random_normal"} | options
    x = numbers(3, size, size, channels)
    layer = layers.Conv2D(filters, **options)
    layer.build(x.shape)
    expected = with_gradients(layer, x)
    with faster():
        results = with_gradients(layer, x)
        assert ("Conv2D" in types(layer, x)) == direct
    for ours, theirs in zip(results, expected):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.std(theirs))
    np.testing.assert_array_equal(layer(x), expected[0])  # Keras' own again


@pytest.mark.parametrize("strides", [1, 2])
def test_groups_have_the_gradients_of_a_block_diagonal_kernel(strides, fast):
    """Keras' own takes them through XLA, which is another reason to check by other means."""
    grouped = layers.Conv2D(12, 3, strides, "same", groups=3, use_bias=False)
    grouped.build((None, 8, 8, 6))
    x, kernel = numbers(2, 8, 8, 6), grouped.kernel.numpy()
    dense = np.zeros((3, 3, 6, 12), np.float32)
    for group in range(3):
        filters = slice(4 * group, 4 * group + 4)
        dense[:, :, 2 * group : 2 * group + 2, filters] = kernel[..., filters]
    dense = tf.Variable(dense)
    with tf.GradientTape() as tape:
        tape.watch(x)
        expected = tf.nn.conv2d(x, dense, strides, "SAME")
    upstream = numbers(*expected.shape)
    expected_dx, dense_dk = tape.gradient(expected, [x, dense], upstream)
    y, dx, dk = with_gradients(grouped, x, upstream)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(dx, expected_dx, atol=1e-5)
    for group in range(3):
        filters = slice(4 * group, 4 * group + 4)
        own = dense_dk[:, :, 2 * group : 2 * group + 2, filters]
        np.testing.assert_allclose(dk[..., filters], own, atol=1e-4)


class Standardized(layers.Conv2D):
    """Brings its kernel to mean 0 on the way, as a user's layer may."""

    def convolution_op(self, inputs, kernel):
        kernel = kernel - keras.ops.mean(kernel, axis=(0, 1, 2), keepdims=True)
        return super().convolution_op(inputs, kernel)


class Halved(layers.Conv2D):
    """Has a way of its own to convolve."""

    def convolution_op(self, inputs, kernel):
        return keras.ops.conv(inputs, kernel / 2, padding="same")


@pytest.mark.parametrize("kind, fast_way", [(Standardized, True), (Halved, False)])
def test_layers_of_users_keep_what_they_do(kind, fast_way):
    x, layer = numbers(2, 8, 8, 64), kind(64, 3, padding="same")
    layer.build(x.shape)
    expected = with_gradients(layer, x)
    with faster():
        results = with_gradients(layer, x)
        assert ("Conv2D" not in types(layer, x)) == fast_way
    for ours, theirs in zip(results, expected):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.std(theirs))


@pytest.mark.parametrize(
    "shape, options",
    [
        ((2, 8, 8, 64), {"dtype": "float64"}),
        ((2, 8, 8, 64), {"dilation_rate": 2}),
        ((2, 64, 8, 8), {"data_format": "channels_first"}),
        ((2, None, None, 64), {}),
    ],
)
def test_what_has_no_faster_way_is_left_to_keras(shape, options):
    layer = layers.Conv2D(64, 3, padding="same", use_bias=False, **options)
    layer.build(shape)
    spec = tf.TensorSpec(shape, layer.compute_dtype)
    expected = sorted(operation.type for operation in operations(layer, spec))
    with faster():
        assert sorted(operation.type for operation in operations(layer, spec)) == expected


def test_no_image_at_all_is_convolved(fast):
    assert layers.Conv2D(64, 3, padding="same")(tf.zeros((0, 8, 8, 64))).shape == (0, 8, 8, 64)


@pytest.mark.parametrize("size, channels, kernel_size", [(4, 64, 3), (16, 64, 1), (32, 64, 3)])
def test_second_derivatives_are_keras_own(size, channels, kernel_size):
    layer, x = (
        layers.Conv2D(channels, kernel_size, padding="same"),
        numbers(1, size, size, channels),
    )
    layer.build(x.shape)

    def penalty():
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(layer(x) ** 3)
            size = tf.reduce_sum(inner.gradient(loss, x) ** 2)
        return outer.gradient(size, layer.kernel.value)

    expected = penalty()
    with faster():
        np.testing.assert_allclose(penalty(), expected, atol=1e-4 * np.std(expected))


def direct(x, kernel):
    return tf.nn.conv2d(x, kernel, 1, "SAME")


def outputs_and_gradients(convolve, x, kernel, upstream, dtype=tf.float32):
    x, kernel, upstream = (tf.constant(value, dtype) for value in (x, kernel, upstream))
    with tf.GradientTape() as tape:
        tape.watch([x, kernel])
        y = convolve(x, kernel)
    return [y, *tape.gradient(y, [x, kernel], upstream)]


@pytest.mark.parametrize("r, size", [(3, 4), (3, 32), (5, 8)])
def test_winograd_rounds_little_more_than_the_direct_convolution(r, size):
    values = RNG.normal(size=(4, size, size, 64)), RNG.normal(size=(r, r, 64, 48))
    upstream = RNG.normal(size=(4, size, size, 48))

    exact = outputs_and_gradients(direct, *values, upstream, tf.float64)
    for a, b in zip(exact, outputs_and_gradients(ways.winograd, *values, upstream)):
        assert np.std(np.subtract(a, b)) < 1e-5 * np.std(a)


def test_winograd_is_traced_once_for_all_layers_of_a_shape():
    """Each tracing costs a tenth of a second before the first step, in ResNet-110 36 times."""
    x, kernel = numbers(3, 12, 12, 64), numbers(3, 3, 64, 64)

    @tf.function
    def gradient_through_three_layers(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = x
            for _ in range(3):
                y = ways.winograd(y, kernel)
        return tape.gradient(y, x)

    functions = ways.winograd_outputs, ways.winograd_gradient
    before = [function.experimental_get_tracing_count() for function in functions]
    gradient_through_three_layers(x)
    after = [function.experimental_get_tracing_count() for function in functions]
    assert after == [count + 1 for count in before]


def test_winograd_takes_a_few_images_at_a_time():
    x, kernel = tf.zeros((128, 32, 32, 128)), tf.zeros((3, 3, 128, 128))
    parts = ways.winograd_parts(x, kernel)
    assert sum(parts) == 128 and max(parts) * 48**2 * 128 < 2.5e6
    assert ways.winograd_parts(x[:1], tf.zeros((3, 3, 128, 1024))) == [1]

    x, kernel = numbers(16, 32, 32, 128), numbers(3, 3, 128, 128)
    parts = ways.winograd_parts(x, kernel)
    assert len(parts) > 2
    graph = ways.winograd_outputs.get_concrete_function(x, kernel).graph
    waiting = [op for op in graph.get_operations() if op.type == "Identity" and op.control_inputs]
    assert len(waiting) == len(parts) - 1
    upstream = numbers(*x.shape)
    both = [outputs_and_gradients(way, x, kernel, upstream) for way in (ways.winograd, direct)]
    for ours, exact in zip(*both):
        assert np.std(ours - exact) < 1e-5 * np.std(exact)


def test_gradients_of_large_maps_are_found_one_after_the_other(fast):
    def waiting(size, channels, kernel_size):
        layer = layers.Conv2D(channels, kernel_size, padding="same", use_bias=False)
        layer.build((2, size, size, channels))
        return [
            before.type
            for operation in operations(gradients_of(layer), tf.zeros((2, size, size, channels)))
            if operation.type == "Identity"
            for before in operation.control_inputs
            if before.type != "NoOp"  # those of tf.function itself
        ]

    assert waiting(32, 64, 3) == ["Conv2DBackpropFilter"]
    assert waiting(32, 64, 1) == ["MatMul"]
    assert waiting(32, 16, 3) == waiting(8, 64, 1) == []


@pytest.mark.parametrize("r", [3, 5])
def test_bfloat16_by_winograd_is_rounded_once(r, fast, flags):
    flags("avx512_bf16")
    x, upstream = (numbers(2, 8, 8, 128, dtype=tf.bfloat16) for _ in range(2))
    kernel = numbers(r, r, 128, 128, dtype=tf.bfloat16)
    options = {"padding": "same", "use_bias": False}
    half = layers.Conv2D(128, r, dtype="mixed_bfloat16", **options)
    exact = layers.Conv2D(128, r, dtype="float64", **options)
    results = []
    for layer in half, exact:
        layer.build(x.shape)
        layer.set_weights([tf.cast(kernel, tf.float32)])
        inputs = tf.cast(x, layer.compute_dtype)
        values = with_gradients(layer, inputs, tf.cast(upstream, layer.compute_dtype))
        assert values[0].dtype == layer.compute_dtype
        results.append([tf.cast(value, tf.float32) for value in values])
    assert ("Conv2D" in types(half, x)) == (r == 3)  # TensorFlow's own, not ours to check
    for ours, exact in list(zip(*results))[1 if r == 3 else 0 :]:
        assert np.std(ours - exact) < EPSILON["bfloat16"] * np.std(exact)


def test_winograd_matrices_are_the_papers():
    """Section 4.3 of the paper prints those of F(4x4, 3x3), the points in the same order."""
    pixels = [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
    kernel = (
        np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
    )
    output = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
    inputs, kernels, outputs = (m.numpy() for m in ways.winograd_matrices(12, 3))
    np.testing.assert_allclose(inputs.reshape(6, 3, 12)[:, 1, 3:9], pixels)
    np.testing.assert_allclose(kernels, np.kron(kernel, kernel), rtol=1e-6)
    np.testing.assert_allclose(outputs.reshape(6, 3, 12)[:, 1, 4:8], np.transpose(output))


def test_half_precision_takes_the_faster_way(fast, flags):
    for filters, kernel_size, names, directly in [
        (64, 3, ["avx512_bf16"], "forward and back"),
        (128, 3, ["avx512_bf16"], "forward"),
        (128, 5, ["avx512_bf16"], ""),
        (128, 5, ["avx512_bf16", "amx_bf16"], "forward and back"),
    ]:
        flags(*names)
        layer = layers.Conv2D(filters, kernel_size, padding="same", dtype="mixed_bfloat16")
        maps = tf.zeros((2, 8, 8, filters), tf.bfloat16)
        assert ("Conv2D" in types(layer, maps)) == ("forward" in directly)
        assert ("Conv2DBackpropFilter" in types(gradients_of(layer), maps)) == ("back" in directly)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("options", [{}, {"dilation_rate": 2}, {"strides": 2}])
def test_emulated_numbers_are_float32_on_the_way(dtype, options, fast, flags):
    flags()
    results, x = [], numbers(4, 8, 8, 64, dtype=dtype)
    kernel = tf.cast(numbers(3, 3, 64, 6, dtype=dtype), tf.float32)
    for policy in f"mixed_{dtype}", "float32":
        layer = layers.Conv2D(6, 3, use_bias=False, dtype=policy, **options)
        layer.build(x.shape)
        layer.set_weights([kernel])
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(tf.cast(x, layer.compute_dtype))
            assert y.dtype == layer.compute_dtype
            y = tf.cast(y, dtype)
        upstream = tf.cast(np.random.default_rng(1).normal(size=y.shape), dtype)
        results.append([y, *tape.gradient(y, [x, layer.kernel.value], upstream)])
        work = [op for op in operations(layer, x) if op.type == "Conv2D"]
        assert {op.get_attr("T") for op in work} == {tf.float32}
    for half, exact in zip(*results):
        half, exact = (tf.cast(values, tf.float64) for values in (half, exact))
        assert np.std(half - exact) < EPSILON[dtype] * np.std(exact)


def test_emulated_is_what_the_processor_lacks(flags):
    flags()
    assert processor.emulated("bfloat16") and processor.emulated("float16")
    flags("avx512_bf16")
    assert not processor.emulated("bfloat16") and processor.emulated("float16")
    assert not processor.emulated("float32") and not processor.emulated("float64")


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "float64"])
def test_gradient_of_a_bias_is_the_whole_sum(policy, fast):
    layer = layers.Conv2D(6, 5, activation="relu", dtype=policy)
    layer.build((4, 32, 32, 3))
    layer.bias.assign([1, 2, 3, 4, -1, -2])
    with tf.GradientTape() as tape:
        y = layer(tf.zeros((4, 32, 32, 3)))
        loss = tf.reduce_sum(tf.cast(y, tf.float64)) * 1.0000000001
    np.testing.assert_array_equal(tf.cast(y[0, 0, 0], tf.float32), [1, 2, 3, 4, 0, 0])
    factor = 1.0000000001 if policy == "float64" else 1
    expected = [factor * 4 * 28 * 28] * 4 + [0, 0]
    np.testing.assert_allclose(tape.gradient(loss, layer.bias.value), expected, rtol=1e-12)


def test_channels_first_has_its_bias(fast):
    layer = layers.Conv2D(6, 3, data_format="channels_first", bias_initializer="ones")
    np.testing.assert_array_equal(layer(tf.zeros((1, 3, 8, 8))), tf.ones((1, 6, 6, 6)))


def test_large_convolutions_train_on_matrix_products(fast):
    """The batch's size is not known when Keras builds the network."""
    inputs = keras.Input((8, 8, 64))
    layer = layers.Conv2D(64, 3, padding="same")
    model = keras.Model(inputs, layer(inputs))
    assert model.output.shape == (None, 8, 8, 64)
    unknown = tf.TensorSpec((None, 8, 8, 64))
    assert "Conv2D" not in types(model, unknown)
    assert model.predict(np.zeros((5, 8, 8, 64)), batch_size=2, verbose=0).shape == (5, 8, 8, 64)
