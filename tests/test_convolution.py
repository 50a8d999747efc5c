"""FastConv2D is Keras' convolution, and goes the fast way where there is one."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import load
from keras import layers
from reference import RNG

script = load("ResNet_keras")
EPSILON = {"bfloat16": 2**-8, "float16": 2**-11}


def numbers(*shape):
    return RNG.normal(size=shape)


def graph(layer, x):
    """Return the operations that layer makes of x."""
    return tf.function(layer).get_concrete_function(x).graph.get_operations()


def operations(layer, x):
    """Return the types of the operations that layer makes of x."""
    return {operation.type for operation in graph(layer, x)}


def gradients_of(layer):
    """Return a function of x that computes the gradients of x and of layer's kernel."""

    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        return tape.gradient(y, [x, layer.kernel.value])

    return run


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
    (8, 64, 64, {"kernel_size": 3, "strides": 2}),
    (32, 64, 66, {"kernel_size": 3}),  # large: gradients in order
    (32, 64, 66, {"kernel_size": 3, "strides": 2}),
    (8, 64, 64, {"kernel_size": 3, "padding": "valid"}),
    (8, 64, 64, {"kernel_size": (3, 5)}),
    (8, 64, 64, {"kernel_size": 3, "dilation_rate": 2}),
    (8, 64, 64, {"kernel_size": 7}),
    (8, 3, 64, {"kernel_size": 3}),
    (2, 64, 64, {"kernel_size": 5}),
    (8, 6, 9, {"kernel_size": 1, "strides": 2}),
]


@pytest.mark.parametrize(
    "size, channels, filters, options, direct",
    [(*case, False) for case in FAST] + [(*case, True) for case in DIRECT],
)
def test_fast_convolution_equals_the_stock_layer(size, channels, filters, options, direct):
    options = {"padding": "same", "bias_initializer": "random_normal"} | options
    x = tf.constant(numbers(3, size, size, channels), tf.float32)
    results = []
    stock = layers.Conv2D(filters, **options)
    ours = script.FastConv2D(filters, **options)
    for layer in (stock, ours):
        layer.build(x.shape)
        layer.set_weights(stock.get_weights())
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
            loss = tf.reduce_sum(y**2)
        results.append([y, *tape.gradient(loss, [x, *layer.trainable_weights])])
    for expected, result in zip(*results):
        np.testing.assert_allclose(result, expected, atol=1e-4 * np.std(expected))
    assert ("Conv2D" in operations(ours, x)) == direct


@pytest.mark.parametrize("r, size", [(3, 4), (3, 32), (5, 8)])
def test_winograd_rounds_little_more_than_the_direct_convolution(r, size):
    values = numbers(4, size, size, 64), numbers(r, r, 64, 48), numbers(4, size, size, 48)

    def run(convolve, dtype):
        x, kernel, upstream = (tf.constant(value, dtype) for value in values)
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = convolve(x, kernel)
        return [y, *tape.gradient(y, [x, kernel], upstream)]

    exact = run(lambda x, kernel: tf.nn.conv2d(x, kernel, 1, "SAME"), tf.float64)
    for a, b in zip(exact, run(script.winograd, tf.float32)):
        assert np.std(np.subtract(a, b)) < 1e-5 * np.std(a)


def test_winograd_is_traced_once_for_all_layers_of_a_shape():
    """Each tracing costs a tenth of a second before the first step, in ResNet-110 36 times."""
    x, kernel = numbers(3, 12, 12, 64), numbers(3, 3, 64, 64)
    x, kernel = tf.constant(x, tf.float32), tf.constant(kernel, tf.float32)

    @tf.function
    def gradient_through_three_layers(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = x
            for _ in range(3):
                y = script.winograd(y, kernel)
        return tape.gradient(y, x)

    functions = script.winograd_outputs, script.winograd_gradient
    before = [function.experimental_get_tracing_count() for function in functions]
    gradient_through_three_layers(x)
    after = [function.experimental_get_tracing_count() for function in functions]
    assert after == [count + 1 for count in before]


def test_winograd_takes_a_few_images_at_a_time():
    x, kernel = tf.zeros((128, 32, 32, 128)), tf.zeros((3, 3, 128, 128))
    parts = script.winograd_parts(x, kernel)
    assert sum(parts) == 128 and max(parts) * 48**2 * 128 < 2.5e6
    assert script.winograd_parts(x[:1], tf.zeros((3, 3, 128, 1024))) == [1]

    x, kernel = numbers(16, 32, 32, 128), numbers(3, 3, 128, 128)
    x, kernel = tf.constant(x, tf.float32), tf.constant(kernel, tf.float32)
    parts = script.winograd_parts(x, kernel)
    assert len(parts) > 2
    graph = script.winograd_outputs.get_concrete_function(x, kernel).graph
    waiting = [op for op in graph.get_operations() if op.type == "Identity" and op.control_inputs]
    assert len(waiting) == len(parts) - 1
    upstream = tf.constant(numbers(*x.shape), tf.float32)

    def with_gradients(convolve):
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = convolve(x, kernel)
        return [y, *tape.gradient(y, [x, kernel], upstream)]

    direct = with_gradients(lambda x, kernel: tf.nn.conv2d(x, kernel, 1, "SAME"))
    for ours, exact in zip(with_gradients(script.winograd), direct):
        assert np.std(ours - exact) < 1e-5 * np.std(exact)


def test_gradients_of_large_maps_are_found_one_after_the_other():
    def waiting(size, channels, kernel_size):
        layer = script.FastConv2D(channels, kernel_size, padding="same")
        layer.build((2, size, size, channels))

        @tf.function
        def gradients(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x)
            return tape.gradient(y, [x, *layer.trainable_weights])

        graph = gradients.get_concrete_function(tf.zeros((2, size, size, channels))).graph
        return [
            before.type
            for operation in graph.get_operations()
            if operation.type == "Identity"
            for before in operation.control_inputs
            if before.type != "NoOp"  # those of tf.function itself
        ]

    assert waiting(32, 64, 3) == ["Conv2DBackpropFilter"]
    assert waiting(32, 64, 1) == ["MatMul"]
    assert waiting(32, 16, 3) == waiting(8, 64, 1) == []


@pytest.mark.parametrize("r", [3, 5])
def test_bfloat16_by_winograd_is_rounded_once(r, monkeypatch):
    monkeypatch.setattr(script, "emulated", lambda name: False)
    monkeypatch.setattr(script, "processor_flags", lambda: {"avx512_bf16"})
    x = tf.cast(numbers(2, 8, 8, 128), tf.bfloat16)
    upstream = tf.cast(numbers(2, 8, 8, 128), tf.bfloat16)
    kernel = tf.cast(numbers(r, r, 128, 128), tf.bfloat16)
    options = {"padding": "same", "use_bias": False}
    half = script.FastConv2D(128, r, dtype="mixed_bfloat16", **options)
    exact = layers.Conv2D(128, r, **options)
    results = []
    for layer in half, exact:
        layer.build(x.shape)
        layer.set_weights([tf.cast(kernel, tf.float32)])
        with tf.GradientTape() as tape:
            inputs = tf.cast(x, layer.compute_dtype)
            tape.watch(inputs)
            y = layer(inputs)
        assert y.dtype == layer.compute_dtype
        gradients = tape.gradient(y, [inputs, *layer.trainable_weights], tf.cast(upstream, y.dtype))
        results.append([tf.cast(values, tf.float32) for values in (y, *gradients)])
    assert ("Conv2D" in operations(half, x)) == (r == 3)  # TensorFlow's own, not ours to check
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
    inputs, kernels, outputs = (m.numpy() for m in script.winograd_matrices(12, 3))
    np.testing.assert_allclose(inputs.reshape(6, 3, 12)[:, 1, 3:9], pixels)
    np.testing.assert_allclose(kernels, np.kron(kernel, kernel), rtol=1e-6)
    np.testing.assert_allclose(outputs.reshape(6, 3, 12)[:, 1, 4:8], np.transpose(output))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "name, layer, options",
    [
        ("ResNet_keras", "FastConv2D", {"filters": 6, "kernel_size": 3, "use_bias": False}),
        ("LeNet_keras", "NativeConv2D", {"filters": 6, "kernel_size": 5, "use_bias": False}),
        ("ResNet_keras", "FusedBatchNormalization", {}),
        ("DenseNet_keras", "FusedBatchNormalization", {}),  # of 52 channels, as groups of pixels
    ],
)
def test_emulated_numbers_are_float32_on_the_way(name, layer, options, dtype, monkeypatch):
    script = load(name)
    monkeypatch.setattr(script, "emulated", lambda name: name != "float32")
    x = tf.cast(numbers(4, 8, 8, 52 if name == "DenseNet_keras" else 64), dtype)
    results = []
    for policy in f"mixed_{dtype}", "float32":
        ours = getattr(script, layer)(**options, dtype=policy)
        ours.build(x.shape)
        rng = np.random.default_rng(0)
        values = [tf.cast(rng.uniform(0, 1, w.shape), dtype) for w in ours.weights]
        ours.set_weights([tf.cast(value, tf.float32) for value in values])
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = ours(tf.cast(x, ours.compute_dtype), training=True)
            assert y.dtype == ours.compute_dtype
            y = tf.cast(y, dtype)
        upstream = tf.cast(np.random.default_rng(1).normal(size=y.shape), dtype)
        results.append([y, *tape.gradient(y, [x, *ours.trainable_weights], upstream)])
        work = [op for op in graph(ours, x) if op.type in ("Conv2D", "FusedBatchNormV3")]
        assert {op.get_attr("T") for op in work} == {tf.float32}
    for half, exact in zip(*results):
        half, exact = (tf.cast(values, tf.float64) for values in (half, exact))
        assert np.std(half - exact) < EPSILON[dtype] * np.std(exact)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize(
    "name, layer",
    [("LeNet_keras", "NativeConv2D"), ("Network_in_Network_keras", "BiasedConv2D")],
)
def test_gradient_of_a_bias_is_the_whole_sum(name, layer, policy):
    ours = getattr(load(name), layer)(6, 5, activation="relu", dtype=policy)
    ours.build((4, 32, 32, 3))
    ours.bias.assign([1, 2, 3, 4, -1, -2])
    with tf.GradientTape() as tape:
        y = ours(tf.zeros((4, 32, 32, 3)))
        loss = tf.reduce_sum(tf.cast(y, tf.float32))
    np.testing.assert_array_equal(tf.cast(y[0, 0, 0], tf.float32), [1, 2, 3, 4, 0, 0])
    np.testing.assert_array_equal(tape.gradient(loss, ours.bias), [4 * 28 * 28] * 4 + [0, 0])


def test_fast_convolution_leaves_gpus_alone_and_half_precision_where_it_is_faster(monkeypatch):
    x = tf.zeros((2, 8, 8, 64))
    monkeypatch.setattr(script, "emulated", lambda name: False)
    half = {"padding": "same", "dtype": "mixed_bfloat16"}
    for filters, kernel_size, flags, directly in [
        (64, 3, {"avx512_bf16"}, "forward and back"),
        (128, 3, {"avx512_bf16"}, "forward"),
        (128, 5, {"avx512_bf16"}, ""),
        (128, 5, {"avx512_bf16", "amx_bf16"}, "forward and back"),
    ]:
        monkeypatch.setattr(script, "processor_flags", lambda flags=flags: flags)
        layer = script.FastConv2D(filters, kernel_size, **half)
        maps = tf.zeros((2, 8, 8, filters), tf.bfloat16)
        assert ("Conv2D" in operations(layer, maps)) == ("forward" in directly)
        backward = operations(gradients_of(layer), maps)
        assert ("Conv2DBackpropFilter" in backward) == ("back" in directly)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda device_type: [device_type])
    for options in {"kernel_size": 3}, {"kernel_size": 1}, {"kernel_size": 3, "groups": 4}:
        layer = script.FastConv2D(64, padding="same", **options)
        assert operations(layer, x).isdisjoint({"MatMul", "BatchMatMulV2", "Split"})


def test_wide_resnet_trains_on_matrix_products():
    """The batch's size is not known when Keras builds the network."""
    network = load("Wide_ResNet_keras").wide_residual_network(10, 8)
    layer = network.get_layer("stage1_block1_conv2")
    assert network.output.shape == (None, 10)
    assert "Conv2D" not in operations(layer, tf.zeros((2, 32, 32, 128)))


def test_weight_decay_is_keras_own():
    """The sum over all kernels that decay, with its gradients; what is frozen does not count."""
    l2 = keras.regularizers.L2
    inputs = keras.Input((8, 8, 4))
    x = script.FastConv2D(4, 3, kernel_regularizer=l2(5e-4), name="first")(inputs)
    x = script.FastConv2D(4, 3, kernel_regularizer=l2(5e-4), dtype="mixed_bfloat16")(x)
    x = script.FastConv2D(4, 1, kernel_regularizer=l2(0.25))(x)
    outputs = keras.layers.Conv2D(2, 1)(x)
    ours, stock = script.Network(inputs, outputs), keras.Model(inputs, outputs)
    for trainable in True, False:
        ours.get_layer("first").trainable = trainable
        kernels = [layer.kernel.value for layer in ours.layers[1:]]
        results = []
        for model in ours, stock:
            with tf.GradientTape() as tape:
                loss = tf.add_n(model.losses)
            results.append([loss, *tape.gradient(loss, kernels, unconnected_gradients="zero")])
        for joined, one_by_one in zip(*results):
            np.testing.assert_allclose(joined, one_by_one, rtol=1e-6)
    assert len(ours.losses) == 2 and ours.losses[0].dtype == tf.float32
    assert not script.Network(inputs, inputs).losses
    l1 = script.FastConv2D(4, 1, kernel_regularizer="l1")
    assert len(script.Network(inputs, l1(x)).losses) == 3  # Keras' own, one for each that learns
