"""launch/normalization.py: Keras' normalising layers, faster, with the same results and state."""

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
processor = importlib.import_module("launch.processor")

RNG = np.random.default_rng(0)


def types(layer, x, **options):
    function = tf.function(lambda x: layer(x, **options))
    return [
        operation.type for operation in function.get_concrete_function(x).graph.get_operations()
    ]


def built(shape, **options):
    """Return a BatchNormalization for such inputs, with a state that no other has."""
    layer = layers.BatchNormalization(**options)
    layer.build(shape)
    rng = np.random.default_rng(1)
    layer.set_weights([rng.uniform(0.5, 2, weight.shape) for weight in layer.weights])
    return layer


def step(layer, x, training=True, **options):
    """Return layer(x), the gradients of x and of what trains, and the state afterwards."""
    upstream = tf.cast(np.random.default_rng(2).normal(size=x.shape), x.dtype)

    @tf.function
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.nn.relu(layer(x, training=training, **options))
        return y, tape.gradient(y, [x, *(v.value for v in layer.trainable_weights)], upstream)

    y, gradients = run(x)
    return [y, *gradients, *layer.get_weights()]


CASES = [
    # shape, options, kind of operation
    ((4, 6, 6, 32), {"momentum": 0.9, "epsilon": 1e-5}, "fused"),
    ((4, 6, 6, 32), {"center": False}, "fused"),
    ((4, 6, 6, 32), {"scale": False, "axis": 3}, "fused"),
    ((4, 6, 6, 32), {"synchronized": True}, "fused"),
    ((4, 8, 8, 36), {}, "groups"),  # of 4 pixels
    ((4, 8, 8, 52), {"epsilon": 1e-5, "momentum": 0.9}, "groups"),
    ((3, 4, 8, 3), {"center": False, "scale": False}, "groups"),  # of 16 pixels
    ((4, 7, 7, 36), {}, "fused"),  # 49 pixels make no groups
    ((4, 6, 6, 32), {"axis": 1}, "keras"),
    ((4, 6, 6, 32), {"dtype": "float64"}, "keras"),
    ((4, 6, 6, 32), {"renorm": True}, "keras"),
    ((40, 32), {}, "keras"),
    ((4, 5, 6, 6, 16), {}, "keras"),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape, options, kind", CASES)
def test_batch_normalization_is_keras_own(shape, options, kind, training):
    """Outputs, gradients and moving statistics, whose variance is that of biased variances."""
    results, dtype = [], options.get("dtype", "float32")
    x = tf.constant(RNG.normal(size=shape, loc=2, scale=3), dtype)
    results.append(step(built(shape, **options), x, training))
    with faster():
        layer = built(shape, **options)
        found = types(layer, x, training=training).count("FusedBatchNormV3")
        results.append(step(built(shape, **options), x, training))
    assert found == {"keras": 0, "fused": 1, "groups": 2 if training else 1}[kind]
    for theirs, ours in zip(*results):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * (1 + np.std(theirs)))


def test_frozen_layers_and_masks_are_keras_own():
    x = tf.constant(RNG.normal(size=(4, 8, 8, 32)), tf.float32)
    mask = tf.constant(RNG.integers(0, 2, (4, 8, 8)), tf.bool)

    def steps():
        frozen = built(x.shape)
        frozen.trainable = False
        return [*step(frozen, x), *step(built(x.shape), x, mask=mask)]

    expected = steps()
    with faster():
        for ours, theirs in zip(steps(), expected):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [64, 52])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("native", [True, False])
def test_half_precision_is_rounded_once(dtype, native, channels, monkeypatch):
    flags = {"fpu", "avx512_bf16"} if native else {"fpu"}
    monkeypatch.setattr(processor, "processor_flags", lambda: flags)
    x = tf.cast(RNG.normal(size=(4, 8, 8, channels)), dtype)
    expected = step(built(x.shape), tf.cast(x, tf.float32))
    with faster():
        layer = built(x.shape, dtype=f"mixed_{dtype}")
        results = step(layer, x)
        graph = tf.function(layer).get_concrete_function(x).graph
    assert results[0].dtype == results[1].dtype == dtype
    work = [op for op in graph.get_operations() if op.type == "FusedBatchNormV3"]
    half = native and dtype == "bfloat16"
    assert [op.get_attr("T") for op in work] == [tf.bfloat16 if half else tf.float32]
    error = {"bfloat16": 2**-8, "float16": 2**-11}[dtype] * (2 if half else 1)
    for ours, exact in zip(results, expected):
        ours, exact = (tf.cast(values, tf.float64) for values in (ours, exact))
        assert np.std(ours - exact) < error * max(1, np.std(exact))


def penalty(channels):
    """Return the gradient of the squared norm of a gradient."""
    x = tf.constant(np.random.default_rng(3).normal(size=(2, 4, 4, channels)), tf.float32)
    layer = built(x.shape)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            loss = tf.reduce_sum(layer(x, training=True) ** 3)
        size = tf.reduce_sum(inner.gradient(loss, x) ** 2)
    return outer.gradient(size, x)


def test_second_derivatives_are_keras_own_or_refused():
    """Those of pixel groups would be wrong: mean and variance are constants in the gradient."""
    expected = penalty(16)
    with faster():
        np.testing.assert_allclose(penalty(16), expected, atol=1e-3 * np.std(expected))
        with pytest.raises(LookupError, match="without launch/cpu.py"):
            penalty(12)


@pytest.mark.parametrize(
    "shape, options",
    [
        ((4, 32, 32, 3), {"mean": [100, 120, 130], "variance": [50, 0, 3]}),
        ((4, 32, 30, 1), {"mean": [100], "variance": [50]}),
        ((4, 32, 32, 3), {"mean": 100, "variance": 50}),
        ((4, 32, 32, 3), {"mean": [100, 120, 130], "variance": [50, 1, 3], "invert": True}),
        (
            (4, 32, 32, 3),
            {"mean": [100, 120, 130], "variance": [5, 1, 3], "dtype": "mixed_bfloat16"},
        ),
        ((4, 5, 3), {"mean": [100, 120, 130], "variance": [50, 1, 3]}),
        ((4, 3, 8, 8), {"axis": 1, "mean": [100, 120, 130], "variance": [50, 1, 3]}),
    ],
)
def test_pixels_are_normalized_to_the_same_bits(shape, options):
    pixels = tf.constant(RNG.integers(0, 256, shape), tf.uint8)
    layer = layers.Normalization(**options)
    expected = layer(pixels)
    with faster():
        ours = layer(pixels)
        inputs = keras.Input(shape[1:])
        model = keras.Model(inputs, layer(inputs))
        assert model.output.shape == (None, *shape[1:])
        np.testing.assert_array_equal(model(pixels), expected)
    assert ours.dtype == expected.dtype
    np.testing.assert_array_equal(ours, expected)


def test_pixels_of_rows_are_found():
    layer = layers.Normalization(mean=[1, 2, 3], variance=[1, 2, 3])
    layer.build((None, 8, 8, 3))
    with faster():
        assert "Tile" in types(layer, tf.TensorSpec((None, 8, 8, 3)))


def test_adapted_statistics_are_used():
    images = RNG.normal(size=(100, 4, 4, 3)).astype("float32")
    with faster():
        layer = layers.Normalization()
        layer.adapt(images)
        np.testing.assert_allclose(np.std(layer(images), axis=(0, 1, 2)), [1, 1, 1], rtol=1e-3)
