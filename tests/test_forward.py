"""Each network computes what its paper says: all of it once more, in NumPy, from the same weights.

A wrong stride, padding or order, a missing shortcut, a group that sees another group's channels,
or pooling in the wrong place changes the probabilities.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import load
from keras import layers
from reference import (
    RNG,
    average_pool,
    bn,
    bn_relu,
    conv,
    max_pool,
    randomize,
    relu,
    sigmoid,
    softmax,
    trainable,
)

MEAN, STD = (100, 110, 120), (50, 60, 70)
nin, nin_bn = load("Network_in_Network_keras"), load("Network_in_Network_bn_keras")
vgg, wrn = load("Vgg19_keras"), load("Wide_ResNet_keras")
resnext, densenet, senet = load("ResNeXt_keras"), load("DenseNet_keras"), load("SENet_keras")


class Weights:
    """A network's layers and kernels by name, and the parts that several papers share."""

    def __init__(self, model):
        self.layer = {layer.name: layer for layer in model.layers}

    def __getitem__(self, name):
        return self.layer[name].get_weights()

    def conv(self, x, name, strides=1, groups=1):
        kernel, *bias = self[name]
        return conv(x, kernel, strides, groups=groups) + (bias[0] if bias else 0)

    def bn(self, x, name):
        return bn(x, self.layer[name + "_bn"])

    def bn_relu(self, x, name):
        return bn_relu(x, self.layer[name + "_bn"])

    def conv_bn(self, x, name, strides=1, groups=1):
        return self.bn(self.conv(x, name, strides, groups), name)

    def dense(self, x, name):
        kernel, *bias = self[name]
        return x @ kernel + (bias[0] if bias else 0)

    def head(self, x):
        return softmax(self.dense(x.mean((1, 2)), "softmax"))


def network_in_network(w, x, bn):
    for block in (1, 2, 3):
        for i in (1, 2, 3):
            name = f"block{block}_conv{i}"
            x = w.conv(x, name)
            x = w.bn_relu(x, name) if bn else relu(x)
        if block < 3:
            x = max_pool(x, 3, 2, "same")
    return softmax(x.mean((1, 2)))


def vgg19(w, x):
    for block, convolutions in enumerate((2, 2, 4, 4, 4), start=1):
        for i in range(convolutions):
            x = relu(w.conv_bn(x, f"block{block}_conv{i + 1}"))
        x = max_pool(x, 2)
    x = x.reshape(len(x), 512)
    for name in ("fc1", "fc2"):
        x = w.bn_relu(w.dense(x, name), name)
    return softmax(w.bn(w.dense(x, "scores"), "scores"))


def wide_residual_network(w, x, blocks):
    x = w.conv(x, "conv0")
    for stage in (1, 2, 3):
        for block in range(1, blocks + 1):
            name, strides = f"stage{stage}_block{block}", 2 if stage > 1 and block == 1 else 1
            activated = w.bn_relu(x, name + "_1")
            if block == 1:
                x = w.conv(activated, name + "_shortcut", strides)
            y = w.conv(activated, name + "_conv1", strides)
            x = x + w.conv(w.bn_relu(y, name + "_2"), name + "_conv2")
    return w.head(w.bn_relu(x, "final"))


def resnext29(w, x, cardinality, se):
    x = relu(w.conv_bn(x, "conv0"))
    for stage in (1, 2, 3):
        for block in (1, 2, 3):
            name, strides = f"stage{stage}_block{block}", 2 if stage > 1 and block == 1 else 1
            y = relu(w.conv_bn(x, name + "_conv1"))
            y = relu(w.conv_bn(y, name + "_conv2", strides, cardinality))
            y = w.conv_bn(y, name + "_conv3")
            if se:
                s = relu(w.dense(y.mean((1, 2)), name + "_reduce"))
                y = y * sigmoid(w.dense(s, name + "_excite"))[:, None, None]
            x = relu(y + (w.conv_bn(x, name + "_shortcut", strides) if block == 1 else x))
    return w.head(x)


def densenet_bc(w, x, layer_count):
    x = w.conv(x, "conv0")
    for block in (1, 2, 3):
        for i in range(1, layer_count + 1):
            name = f"block{block}_layer{i}"
            y = w.conv(w.bn_relu(x, name + "_1"), name + "_conv1")
            y = w.conv(w.bn_relu(y, name + "_2"), name + "_conv2")
            x = np.concatenate([x, y], axis=3)
        if block < 3:
            name = f"transition{block}"
            x = average_pool(w.conv(w.bn_relu(x, name), name + "_conv"), 2)
    return w.head(w.bn_relu(x, "final"))


NETWORKS = {
    "NiN": (
        lambda: nin.network_in_network(10, MEAN, STD),
        lambda w, x: network_in_network(w, x, bn=False),
    ),
    "NiN_bn": (
        lambda: nin_bn.network_in_network_bn(10, MEAN, STD),
        lambda w, x: network_in_network(w, x, bn=True),
    ),
    "VGG19": (lambda: vgg.vgg19(10, MEAN, STD), vgg19),
    "WRN-16-2": (
        lambda: wrn.wide_residual_network(16, 2, 0.3, 10, MEAN, STD),
        lambda w, x: wide_residual_network(w, x, blocks=2),
    ),
    "DenseNet-16x5": (
        lambda: densenet.densenet(16, 5, num_classes=10, mean=MEAN, std=STD),
        lambda w, x: densenet_bc(w, x, layer_count=2),
    ),
    "ResNeXt-29_4x3d": (
        lambda: resnext.resnext(4, 3, 10, MEAN, STD),
        lambda w, x: resnext29(w, x, cardinality=4, se=False),
    ),
    "SE-ResNeXt-29_3x4d": (
        lambda: senet.se_resnext(3, 4, 32, 10, MEAN, STD),
        lambda w, x: resnext29(w, x, cardinality=3, se=True),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_network_computes_what_the_paper_does(name):
    build, paper = NETWORKS[name]
    model = build()
    assert model.name == name
    randomize(model)
    pixels = RNG.integers(0, 256, (2, 32, 32, 3))
    # Scores of the size of 1, since softmax hides most of larger ones.
    features = keras.Model(model.input, model.layers[-1].input)(pixels)
    last = [v for v in model.trainable_variables if v.name in ("kernel", "gamma")][-1]
    last.assign(last / np.sqrt(np.mean(np.square(features))))
    expected = paper(Weights(model), (pixels - np.array(MEAN)) / np.array(STD))
    assert expected.max() < 0.99 and np.abs(expected[0] - expected[1]).max() > 1e-3  # tells much
    np.testing.assert_allclose(model(pixels), expected, rtol=1e-3)


@pytest.mark.parametrize(
    "build, parameters",
    [
        (lambda: nin.network_in_network(), 966_986),
        (lambda: nin_bn.network_in_network_bn(), 969_822),
        (lambda: vgg.vgg19(), 38_975_326),
        (lambda: wrn.wide_residual_network(16, 8), 10_961_370),
        (lambda: wrn.wide_residual_network(28, 10), 36_479_194),
        (lambda: densenet.densenet(100, 12), 769_162),
        (lambda: densenet.densenet(100, 24), 3_020_506),
        (lambda: densenet.densenet(160, 24), 6_831_466),
        (lambda: resnext.resnext(4, 64), 17_562_442),
        (lambda: resnext.resnext(8, 64), 34_426_698),
        (lambda: senet.se_resnext(4, 64), 18_078_538),
    ],
)
def test_trainable_parameters(build, parameters):
    assert trainable(build()) == parameters


@pytest.mark.parametrize(
    "build, shapes",
    [
        (
            lambda: nin.network_in_network(100),
            {"pool1": (16, 16, 96), "pool2": (8, 8, 192), "block3_conv3": (8, 8, 100)},
        ),
        (
            lambda: nin_bn.network_in_network_bn(100),
            {"pool1": (16, 16, 96), "pool2": (8, 8, 192), "block3_conv3_relu": (8, 8, 100)},
        ),
        (
            lambda: vgg.vgg19(100),
            {
                "block1_pool": (16, 16, 64),
                "block2_pool": (8, 8, 128),
                "block3_pool": (4, 4, 256),
                "block4_pool": (2, 2, 512),
                "block5_pool": (1, 1, 512),
                "scores": (100,),
            },
        ),
        (
            lambda: wrn.wide_residual_network(28, 10),
            {
                "conv0": (32, 32, 16),
                "stage1_block4_add": (32, 32, 160),
                "stage2_block4_add": (16, 16, 320),
                "stage3_block4_add": (8, 8, 640),
            },
        ),
        (
            lambda: densenet.densenet(100, 12),
            {
                "conv0": (32, 32, 24),
                "block1_layer16_conv1": (32, 32, 48),
                "block1_layer16_concat": (32, 32, 216),
                "transition1_pool": (16, 16, 108),
                "block2_layer16_concat": (16, 16, 300),
                "transition2_pool": (8, 8, 150),
                "block3_layer16_concat": (8, 8, 342),
                "final_relu": (8, 8, 342),
            },
        ),
        (
            lambda: resnext.resnext(8, 64),
            {
                "stage1_block1_conv2": (32, 32, 512),
                "stage1_block3_relu": (32, 32, 256),
                "stage2_block1_conv1": (32, 32, 1024),
                "stage2_block3_relu": (16, 16, 512),
                "stage3_block3_conv2": (8, 8, 2048),
                "stage3_block3_relu": (8, 8, 1024),
            },
        ),
        (
            lambda: senet.se_resnext(4, 64),
            {
                "stage2_block1_reduce": (1, 1, 32),
                "stage2_block1_excite": (1, 1, 512),
                "stage2_block1_scale": (16, 16, 512),
                "stage3_block3_relu": (8, 8, 1024),
            },
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else "",
)
def test_feature_maps(build, shapes):
    model = build()
    assert {name: model.get_layer(name).output.shape[1:] for name in shapes} == shapes
    # Shortcuts with weights stand where the shape changes, and nowhere else.
    shortcuts = [layer.name for layer in model.layers if layer.name.endswith("shortcut")]
    if "stage1_block1_conv1" in (layer.name for layer in model.layers):
        assert shortcuts == [f"stage{stage}_block1_shortcut" for stage in (1, 2, 3)]


@pytest.mark.parametrize(
    "build, decay, kernels",
    [
        (lambda: nin.network_in_network(), 1e-4, 9),
        (lambda: nin_bn.network_in_network_bn(), 1e-4, 9),
        (lambda: vgg.vgg19(), 1e-4, 19),
        (lambda: wrn.wide_residual_network(10, 1), 5e-4, 10),
        (lambda: densenet.densenet(10, 4), 1e-4, 10),
        (lambda: resnext.resnext(2, 2), 5e-4, 32),
        (lambda: senet.se_resnext(2, 2), 5e-4, 50),
    ],
)
def test_weight_decay_is_on_every_kernel(build, decay, kernels):
    model = build()
    values = [v.numpy() for v in model.trainable_variables if v.name == "kernel"]
    assert len(values) == kernels
    expected = decay * sum(np.square(kernel).sum() for kernel in values)
    np.testing.assert_allclose(sum(map(float, model.losses)), expected, rtol=1e-5)


def test_kernels_of_nin_without_batch_normalization_have_mean_0():
    for layer in nin.network_in_network().layers:
        if isinstance(layer, layers.Conv2D):
            means = layer.get_weights()[0].mean(axis=(0, 1, 2))
            assert (np.abs(means).max() < 1e-6) == (layer.name != "block1_conv1")


@pytest.mark.parametrize("strides", [1, 2])
def test_grouped_convolution_has_the_gradients_of_a_block_diagonal_one(strides):
    grouped = resnext.FastConv2D(12, 3, strides, "same", groups=3, use_bias=False)
    grouped.build((None, 8, 8, 6))
    assert grouped.kernel.shape == (3, 3, 2, 12)
    x = tf.constant(RNG.normal(size=(2, 8, 8, 6)).astype("float32"))
    kernel = grouped.kernel.numpy()
    dense = np.zeros((3, 3, 6, 12), np.float32)
    for group in range(3):
        filters = slice(4 * group, 4 * group + 4)
        dense[:, :, 2 * group : 2 * group + 2, filters] = kernel[..., filters]
    dense = tf.Variable(dense)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        ours = grouped(x)
        expected = tf.nn.conv2d(x, dense, strides, "SAME")
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    weights = tf.constant(RNG.normal(size=ours.shape).astype("float32"))
    dx, dk = tape.gradient(ours, [x, grouped.kernel.value], weights)
    expected_dx, dense_dk = tape.gradient(expected, [x, dense], weights)
    np.testing.assert_allclose(dx, expected_dx, atol=1e-5)
    for group in range(3):
        filters = slice(4 * group, 4 * group + 4)
        own = dense_dk[:, :, 2 * group : 2 * group + 2, filters]
        np.testing.assert_allclose(dk[..., filters], own, atol=1e-4)


def test_grouped_convolution_is_exported_as_the_stock_layer():
    model = resnext.resnext(3, 2)
    randomize(model)
    stock = resnext.stock_model(model)
    layer = stock.get_layer("stage1_block1_conv2")
    assert type(layer) is layers.Conv2D and layer.groups == 3
    x = RNG.integers(0, 256, (2, 32, 32, 3))
    # Before the softmax, which with such weights is 0 or 1 whatever the groups do.
    ours, theirs = (
        keras.Model(network.input, network.get_layer("pool").output)(x)
        for network in (model, stock)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max())


@pytest.mark.parametrize("name, dropouts", [("NiN", 2), ("NiN_bn", 2), ("VGG19", 2)])
def test_dropout_halves_what_trains(name, dropouts):
    model = NETWORKS[name][0]()
    found = [layer for layer in model.layers if isinstance(layer, layers.Dropout)]
    assert [layer.rate for layer in found] == [0.5] * dropouts


def test_wide_resnet_drops_between_the_convolutions_of_every_block():
    model = wrn.wide_residual_network(16, 1, 0.3)
    for layer in model.layers:
        if isinstance(layer, layers.Dropout):
            assert layer.rate == 0.3
            assert layer.input is model.get_layer(layer.name[:-8] + "_2_relu").output
            assert model.get_layer(layer.name[:-8] + "_conv2").input is layer.output
    assert sum(isinstance(layer, layers.Dropout) for layer in model.layers) == 6
    assert not any("dropout" in layer.name for layer in wrn.wide_residual_network(16, 1).layers)


def test_wide_resnet_pads_with_reflections():
    images = RNG.integers(0, 256, (2, 32, 32, 3), np.uint8)
    padded = wrn.pad(images)
    assert padded.shape == (2, 40, 40, 3) and padded.dtype == np.uint8
    np.testing.assert_array_equal(padded[:, 4:36, 4:36], images)
    np.testing.assert_array_equal(padded[:, :4, 4:36], images[:, 4:0:-1])
    np.testing.assert_array_equal(padded[:, 4:36, 36:], images[:, :, 30:26:-1])


@pytest.fixture(scope="module")
def imagenet_file(tmp_path_factory):
    """A file in the layout of Keras' pretrained VGG19 without its top, of random weights."""
    path = tmp_path_factory.mktemp("weights") / "vgg19_notop.h5"
    model = keras.applications.VGG19(weights=None, include_top=False)
    randomize(model)
    model.save(path)
    return path, model


def test_pretrained_convolutions_see_the_pixels_they_were_trained_on(imagenet_file):
    path, pretrained = imagenet_file
    model = vgg.vgg19(10, vgg.IMAGENET_MEAN)
    vgg.load_pretrained(model, str(path))
    x = RNG.integers(0, 256, (2, 32, 32, 3))
    expected = pretrained.get_layer("block1_conv1")(
        keras.applications.vgg19.preprocess_input(x.astype("float32"))
    )
    first = keras.Model(model.input, model.get_layer("block1_conv1").output)(x)
    np.testing.assert_allclose(relu(first.numpy()), expected, rtol=1e-4, atol=1e-2)
    for block, convolutions in enumerate((2, 2, 4, 4, 4), start=1):
        for i in range(1 + (block == 1), convolutions + 1):
            name = f"block{block}_conv{i}"
            for ours, theirs in zip(
                model.get_layer(name).get_weights(), pretrained.get_layer(name).get_weights()
            ):
                np.testing.assert_array_equal(ours, theirs)


def test_file_of_pretrained_weights_may_have_the_top_layers(imagenet_file, monkeypatch):
    path, pretrained = imagenet_file

    def read_file(include_top, weights):
        if not include_top:
            raise ValueError("the file has other layers")
        return pretrained

    model = vgg.vgg19(10, vgg.IMAGENET_MEAN)
    monkeypatch.setattr(keras.applications, "VGG19", read_file)
    vgg.load_pretrained(model, str(path))
    for name in "block1_conv2", "block5_conv4":
        np.testing.assert_array_equal(
            model.get_layer(name).get_weights()[0], pretrained.get_layer(name).get_weights()[0]
        )


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_recomputed_bottlenecks_train_like_kept_ones(precision, tmp_path):
    images, labels = densenet.synthetic_images(64, seed=1)
    results, keras_policy = [], keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        for recompute in (False, True):
            keras.utils.set_random_seed(0)
            network = densenet.densenet(10, 4, recompute=recompute, mean=MEAN, std=STD)
            model = densenet.multi_gpu_model(lambda network=network: network, 1)
            losses = model.fit(images, labels, batch_size=32, epochs=2, verbose=0).history["loss"]
            # A part's variables come in the order of its layers in both.
            results.append(
                (losses, {"/".join(v.path.split("/")[-2:]): v.numpy() for v in model.variables})
            )
    finally:
        keras.config.set_dtype_policy(keras_policy)
    tolerance = 1e-4 if precision == "float32" else 2e-2
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=tolerance)
    stock = densenet.stock_model(model)
    stock.save(tmp_path / "model.keras")
    assert trainable(stock) == trainable(densenet.densenet(10, 4))
    np.testing.assert_allclose(
        keras.models.load_model(tmp_path / "model.keras").predict(images, verbose=0),
        model.predict(images, verbose=0),
        atol=tolerance,
    )
    if precision == "float32":
        plain, recomputed = (variables for _, variables in results)
        for name, value in plain.items():
            if "moving" in name:
                np.testing.assert_allclose(recomputed[name], value, rtol=1e-2, atol=1e-3)
