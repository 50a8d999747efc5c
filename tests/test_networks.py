"""The networks are the papers'."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import LADDER, load
from keras import layers
from reference import RNG, bn_relu, conv, max_pool, randomize, softmax, trainable

resnet = load("ResNet_keras")


@pytest.mark.parametrize(
    "stack_n, name, parameters",
    [
        (3, "ResNet-20", 272_282),
        (5, "ResNet-32", 466_714),
        (8, "ResNet-50", 758_362),
        (18, "ResNet-110", 1_730_522),
    ],
)
def test_resnet_parameters_and_depth(stack_n, name, parameters):
    model = resnet.residual_network(stack_n)
    assert (model.name, trainable(model)) == (name, parameters)
    weighted = [
        layer
        for layer in model.layers
        if isinstance(layer, layers.Conv2D | layers.Dense) and "shortcut" not in layer.name
    ]
    assert len(weighted) == 6 * stack_n + 2


def test_resnet_layers_and_feature_maps():
    model = resnet.residual_network(3, num_classes=100)
    shapes = {layer.name: layer.output.shape[1:] for layer in model.layers}
    assert shapes["conv0"] == (32, 32, 16)
    for stage, shape in (1, (32, 32, 16)), (2, (16, 16, 32)), (3, (8, 8, 64)):
        for block in (1, 2, 3):
            for part in ("conv1", "2_bn", "2_relu", "conv2", "add"):
                assert shapes[f"stage{stage}_block{block}_{part}"] == shape
    assert shapes["final_relu"] == (8, 8, 64)
    assert shapes["pool"] == (64,)
    assert shapes["softmax"] == (100,)
    shortcuts = [name for name in shapes if name.endswith("shortcut")]
    assert shortcuts == ["stage2_block1_shortcut", "stage3_block1_shortcut"]


@pytest.mark.parametrize("filters, strides, first", [(4, 1, False), (6, 2, False), (4, 1, True)])
def test_residual_block_is_full_preactivation(filters, strides, first):
    inputs = layers.Input((8, 8, 4))
    block = keras.Model(inputs, resnet.residual_block(inputs, filters, strides, "b", first))
    randomize(block)
    layer = {layer.name: layer for layer in block.layers}
    kernel = {name: layer[name].get_weights()[0] for name in layer if "_conv" in name}

    x = RNG.normal(size=(2, 8, 8, 4)).astype("float32")
    activated = bn_relu(x, layer["b_1_bn"])
    shortcut = activated if first else x
    if strides == 2:
        shortcut = conv(activated, layer["b_shortcut"].get_weights()[0], 2)
    y = conv(activated, kernel["b_conv1"], strides)
    y = conv(bn_relu(y, layer["b_2_bn"]), kernel["b_conv2"])
    np.testing.assert_allclose(block(x), shortcut + y, atol=1e-4)


def test_resnet_ends_in_bn_relu_mean_and_softmax():
    model = resnet.residual_network(1)
    randomize(model)
    layer = {layer.name: layer for layer in model.layers}
    features = keras.Model(model.input, layer["stage3_block1_add"].output)
    x = RNG.integers(0, 256, (2, 32, 32, 3))
    pooled = bn_relu(np.array(features(x)), layer["final_bn"]).mean(axis=(1, 2))
    kernel, bias = layer["softmax"].get_weights()
    np.testing.assert_allclose(model(x), softmax(pooled @ kernel + bias), atol=1e-4)


def test_weight_decay_is_on_every_kernel():
    model = resnet.residual_network(1)
    kernels = [v.numpy() for v in model.trainable_variables if v.name == "kernel"]
    decay = 1e-4 * sum(np.square(kernel).sum() for kernel in kernels)
    np.testing.assert_allclose(sum(map(float, model.losses)), decay, rtol=1e-5)
    assert len(kernels) == 10


@pytest.mark.parametrize("name", LADDER)
def test_lenet_parameters_and_feature_maps(name):
    model = load(name).lenet()
    assert trainable(model) == 62_006
    shapes = {layer.name: layer.output.shape[1:] for layer in model.layers}
    expected = {
        "conv1": (28, 28, 6),
        "pool1": (14, 14, 6),
        "conv2": (10, 10, 16),
        "pool2": (5, 5, 16),
        "flatten": (400,),
        "dense1": (120,),
        "dense2": (84,),
        "softmax": (10,),
    }
    assert expected.items() <= shapes.items()
    assert list(shapes)[-8:] == list(expected)
    assert len(model.losses) == (5 if name == LADDER[-1] else 0)


@pytest.mark.parametrize("name, scale", [("LeNet_keras", 255), ("LeNet_dp_keras", 1)])
def test_lenet_computes_what_the_paper_does(name, scale):
    model = load(name).lenet()
    randomize(model)
    weights = [weight.numpy() for weight in model.trainable_variables]
    pixels = RNG.integers(0, 256, (2, 32, 32, 3))
    x = pixels / scale
    for kernel, bias in (weights[0:2], weights[2:4]):
        x = np.maximum(conv(x, kernel, padding="valid") + bias, 0)
        x = max_pool(x, 2)
    x = x.reshape(2, 400)
    x = np.maximum(x @ weights[4] + weights[5], 0)
    x = np.maximum(x @ weights[6] + weights[7], 0)
    np.testing.assert_allclose(model(pixels), softmax(x @ weights[8] + weights[9]), atol=1e-3)


def test_pixels_are_normalised_per_channel():
    mean, std = resnet.STATISTICS["cifar10"]
    inputs = layers.Input((32, 32, 3))
    model = keras.Model(inputs, resnet.normalize(inputs, mean, std))
    pixels = RNG.integers(0, 256, (2, 32, 32, 3), np.uint8)
    np.testing.assert_allclose(model(pixels), (pixels - np.array(mean)) / std, atol=1e-5)


def test_synthetic_statistics_are_those_of_the_images():
    images, _ = resnet.load_data("synthetic")[0]
    mean, std = resnet.STATISTICS["synthetic"]
    np.testing.assert_allclose(images.mean((0, 1, 2)), mean, atol=1e-2)
    np.testing.assert_allclose(images.std((0, 1, 2)), std, atol=1e-2)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "name, channels", [("ResNet_keras", 6), ("DenseNet_keras", 16), ("DenseNet_keras", 6)]
)
def test_fused_batch_normalization_equals_the_stock_layer(name, channels, frozen):
    options = {"momentum": 0.9, "epsilon": 1e-5}
    ours = load(name).FusedBatchNormalization(**options)
    stock = layers.BatchNormalization(**options)
    x = tf.constant(RNG.normal(2, 3, (4, 8, 8, channels)).astype("float32"))
    results = []
    for layer in (ours, stock):
        layer.build(x.shape)
        layer.trainable = not frozen
        weights = np.linspace(1, 2, channels), np.arange(channels)
        layer.set_weights([*weights, np.ones(channels), np.full(channels, 4)])
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(y**3)
        gradients = tape.gradient(loss, [x, *layer.trainable_weights])
        if layer is stock and not frozen:  # it averages the biased variance of the 256 numbers
            layer.moving_variance.assign(3.6 + (layer.moving_variance - 3.6) * 256 / 255)
        results.append([y, *gradients, *layer.weights, layer(x, training=False)])
    for a, b in zip(*results):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3)


def test_fused_sgd_equals_keras_sgd():
    results = []
    for optimizer in (resnet.FusedSGD, keras.optimizers.SGD):
        optimizer = optimizer(0.5, momentum=0.9, nesterov=True)
        variables = [keras.Variable(np.linspace(-1, 1, 6)), keras.Variable(3.0)]
        optimizer.build(variables)
        for step in range(5):
            optimizer.learning_rate = 0.5 / (step + 1)  # as scheduler() changes it
            optimizer.apply([v * v + step for v in variables])
        results.append([*variables, *optimizer.variables])
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_xla_computes_the_same_steps():
    """Keras has XLA compile the training step on GPUs, so XLA must know our operations."""
    images = RNG.integers(0, 256, (32, 32, 32, 3), np.uint8)
    labels = np.arange(32) % 10
    results = []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(0)
        model = resnet.multi_gpu_model(lambda: resnet.residual_network(1), 1)
        model.jit_compile = jit_compile
        model.optimizer.learning_rate = 0.01
        losses = model.fit(images, labels, batch_size=16, epochs=2, verbose=0, shuffle=False)
        results.append([np.array(losses.history["loss"]), *model.variables])
    for a, b in zip(*results):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name, epochs, rates",
    [
        ("ResNet_keras", 200, {0: 0.1, 80: 0.1, 81: 0.01, 121: 0.01, 122: 0.001, 199: 0.001}),
        ("ResNet_keras", 30, {0: 0.1, 11: 0.1, 12: 0.01, 17: 0.01, 18: 0.001, 29: 0.001}),
        ("LeNet_keras", 200, {0: 0.01, 99: 0.01, 100: 0.005, 149: 0.005, 150: 0.001}),
        ("Network_in_Network_keras", 200, {0: 0.01, 80: 0.01, 81: 0.005, 140: 0.005, 141: 0.001}),
        (
            "Network_in_Network_bn_keras",
            200,
            {0: 0.05, 60: 0.05, 61: 0.01, 120: 0.01, 121: 0.002, 160: 0.002, 161: 0.0004},
        ),
        ("Vgg19_keras", 200, {0: 0.1, 79: 0.1, 80: 0.01, 159: 0.01, 160: 0.001}),
        (
            "Wide_ResNet_keras",
            200,
            {0: 0.1, 59: 0.1, 60: 0.02, 119: 0.02, 120: 0.004, 159: 0.004, 160: 0.0008},
        ),
        *[
            (name, 300, {0: 0.1, 149: 0.1, 150: 0.01, 224: 0.01, 225: 0.001, 299: 0.001})
            for name in ("ResNeXt_keras", "DenseNet_keras", "SENet_keras")
        ],
        ("LeNet_keras", 8, {0: 0.01, 3: 0.01, 4: 0.005, 5: 0.005, 6: 0.001, 7: 0.001}),
    ],
)
def test_schedule_scales_with_the_epochs(name, epochs, rates):
    script = load(name)
    assert {epoch: script.scheduler(epoch, epochs) for epoch in rates} == rates
