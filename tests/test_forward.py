"""Each network computes what its paper says: all of it once more, in NumPy, from the same weights.

A wrong stride, padding or order, a missing shortcut, a group that sees another group's channels,
or pooling in the wrong place changes the probabilities.
"""

import json
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import LADDER, load
from keras import layers
from reference import (
    MEAN,
    RNG,
    VARIANCE,
    Weights,
    average_pool,
    build,
    layers_of,
    max_pool,
    randomize,
    relu,
    sigmoid,
    softmax,
    some_pixels,
    trainable,
)

vgg, densenet = load("Vgg19_keras"), load("DenseNet_keras")


def lenet(w, x):
    for _ in range(2):
        x = max_pool(relu(w.conv(x, padding=0)), 2)
    x = relu(w.dense(x.reshape(len(x), 400)))
    return softmax(w.dense(relu(w.dense(x))))


def network_in_network(w, x, bn):
    for block in range(3):
        for _ in range(3):
            x = w.conv(x)
            x = w.bn_relu(x) if bn else relu(x)
        if block < 2:
            x = max_pool(x, 3, 2, (0, 1))  # Caffe's: the last windows hang over the edge
    return softmax(x.mean((1, 2)))


def vgg19(w, x):
    for convolutions in (2, 2, 4, 4, 4):
        for _ in range(convolutions):
            x = relu(w.conv_bn(x))
        x = max_pool(x, 2)
    x = x.reshape(len(x), 512)
    for _ in range(2):
        x = w.bn_relu(w.dense(x))
    return softmax(w.bn(w.dense(x)))


def residual_network(w, x, blocks, wide):
    x = w.conv(x)
    for stage in range(3):
        for block in range(blocks):
            first, strides = stage == block == 0, 2 if stage > 0 and block == 0 else 1
            activated = w.bn_relu(x)
            if first and not wide:
                x = activated
            elif block == 0:
                x = w.conv(activated, strides)
            y = w.conv(activated, strides)
            x = x + w.conv(w.bn_relu(y))
    return w.head(w.bn_relu(x))


def resnext29(w, x, cardinality, se):
    x = relu(w.conv_bn(x))
    for stage in range(3):
        for block in range(3):
            strides = 2 if stage > 0 and block == 0 else 1
            y = relu(w.conv_bn(x))
            y = relu(w.conv_bn(y, strides, cardinality))
            y = w.conv_bn(y)
            if se:
                s = relu(w.dense(y.mean((1, 2))))
                y = y * sigmoid(w.dense(s))[:, None, None]
            x = relu(y + (w.conv_bn(x, strides) if block == 0 else x))
    return w.head(x)


def densenet_bc(w, x, layer_count):
    x = w.conv(x)
    for block in range(3):
        for _ in range(layer_count):
            y = w.conv(w.bn_relu(x))
            y = w.conv(w.bn_relu(y))
            x = np.concatenate([x, y], axis=3)
        if block < 2:
            x = average_pool(w.conv(w.bn_relu(x)), 2)
    return w.head(w.bn_relu(x))


@pytest.mark.parametrize(
    "script, options, paper, facts",
    [
        *[(name, "", lenet, {}) for name in LADDER],
        ("Network_in_Network_keras", "", network_in_network, {"bn": False}),
        ("Network_in_Network_bn_keras", "", network_in_network, {"bn": True}),
        ("Vgg19_keras", "--imagenet none", vgg19, {}),
        ("ResNet_keras", "--stack_n 2", residual_network, {"blocks": 2, "wide": False}),
        ("ResNet", "--stack_n 2", residual_network, {"blocks": 2, "wide": False}),
        (
            "Wide_ResNet_keras",
            "--depth 16 --width 2 --dropout 0.3",
            residual_network,
            {"blocks": 2, "wide": True},
        ),
        (
            "ResNeXt_keras",
            "--cardinality 4 --base_width 3",
            resnext29,
            {"cardinality": 4, "se": False},
        ),
        ("DenseNet_keras", "--depth 16 --growth_rate 5", densenet_bc, {"layer_count": 2}),
        (
            "SENet_keras",
            "--cardinality 3 --base_width 4 --ratio 32",
            resnext29,
            {"cardinality": 3, "se": True},
        ),
    ],
)
def test_network_computes_what_the_paper_does(script, options, paper, facts):
    model = build(script, options, num_classes=7)
    randomize(model)
    pixels = some_pixels()
    # Scores of the size of 1, since softmax hides most of larger ones.
    features = keras.Model(model.input, model.layers[-1].input)(pixels)
    last = [v for v in model.trainable_variables if v.name in ("kernel", "gamma")][-1]
    last.assign(last / np.sqrt(np.mean(np.square(features))))
    normalized = (pixels - np.array(MEAN)) / np.sqrt(VARIANCE)
    if script == "Vgg19_keras":
        normalized = pixels - np.array(vgg.IMAGENET_MEAN)
    weights = Weights(model)
    expected = paper(weights, pixels / 255 if script == LADDER[0] else normalized, **facts)
    assert not any(weights.unused.values())
    assert expected.max() < 0.99 and np.abs(expected[0] - expected[1]).max() > 1e-3  # tells much
    np.testing.assert_allclose(model(pixels), expected, rtol=1e-3)


@pytest.fixture(scope="module")
def imagenet_file(tmp_path_factory):
    """A file in the layout of Keras' pretrained VGG19 without its top, of random weights."""
    path = tmp_path_factory.mktemp("weights") / "vgg19_notop.h5"
    model = keras.applications.VGG19(weights=None, include_top=False)
    randomize(model)
    model.save(path)
    return path, [layer for layer in model.layers if isinstance(layer, layers.Conv2D)]


def test_pretrained_convolutions_see_the_pixels_they_were_trained_on(imagenet_file):
    path, pretrained = imagenet_file
    model = build("Vgg19_keras", f"--imagenet {path}")  # MEAN and VARIANCE are not used
    convolutions = layers_of(model, layers.Conv2D)
    x = some_pixels()
    first = keras.Model(model.input, convolutions[0].output)(x)
    as_trained = keras.applications.vgg19.preprocess_input(x.astype("float32"))
    np.testing.assert_allclose(relu(first), pretrained[0](as_trained), rtol=1e-4, atol=1e-2)
    assert len(convolutions) == len(pretrained) == 16
    for ours, theirs in zip(convolutions[1:], pretrained[1:]):
        for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_file_of_pretrained_weights_may_have_the_top_layers(imagenet_file, monkeypatch):
    path, convolutions = imagenet_file
    pretrained = keras.Sequential([layers.Input((32, 32, 3)), *convolutions])

    def read_file(include_top, weights):
        if not include_top:
            raise ValueError("the file has other layers")
        return pretrained

    model = keras.models.clone_model(pretrained)
    monkeypatch.setattr(keras.applications, "VGG19", read_file)
    vgg.load_imagenet(model, str(path))
    for ours, theirs in zip(model.layers[1:], convolutions[1:], strict=True):
        np.testing.assert_array_equal(ours.get_weights()[0], theirs.get_weights()[0])


def test_resumed_vgg_reads_its_own_weights_only(monkeypatch, pictures, train_here):
    def small(shape, num_classes, mean, variance):
        assert mean == vgg.IMAGENET_MEAN
        inputs = layers.Input(shape)
        x = layers.Flatten()(layers.Rescaling(1 / 255)(inputs))
        return keras.Model(inputs, layers.Dense(num_classes, "softmax")(x), name="VGG19")

    read = []
    monkeypatch.setattr(vgg, "vgg19", small)
    monkeypatch.setattr(vgg, "load_imagenet", lambda model, weights: read.append(weights))
    run = train_here(vgg, "--data_dir", pictures(80), "-b", 20, "-e", 1)
    train_here(vgg, "--resume", run, "-e", 2)
    assert read == ["imagenet"]
    vgg.main(["--data_dir", pictures(80), "-b", 20, "-e", 1, "--weights", run / "model.keras"])
    assert read == ["imagenet"]


@pytest.mark.parametrize("exists", [False, True])
def test_wrong_file_of_pretrained_weights_ends_in_one_line(exists, tmp_path):
    path = tmp_path / "weights.h5"
    model = keras.Sequential([layers.Input((32, 32, 3)), layers.Conv2D(64, 3)])
    if exists:
        model.save(path)
    before = model.get_weights()
    with pytest.raises(SystemExit) as end:
        vgg.load_imagenet(model, str(path))
    assert end.value.code.startswith(f"error: --imagenet {path}") and "\n" not in end.value.code
    for a, b in zip(before, model.get_weights()):
        np.testing.assert_array_equal(a, b)


def classes(config):
    """Yield (module, class) of all objects in what json.loads() makes of a model's config.json."""
    for value in config.values() if isinstance(config, dict) else config:
        if isinstance(value, dict | list):
            yield from classes(value)
    if isinstance(config, dict) and "registered_name" in config:
        yield config["module"], config["registered_name"] or config["class_name"]


@pytest.mark.parametrize(
    "precision", ["float32", pytest.param("mixed_bfloat16", marks=pytest.mark.slow)]
)
def test_recomputed_bottlenecks_train_like_kept_ones(precision, tmp_path):
    images, labels = densenet.synthetic_images(64, seed=1)
    losses, models, policy = [], [], keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        for options in ("", " --recompute"):
            keras.utils.set_random_seed(0)
            network = build("DenseNet_keras", "--depth 10 --growth_rate 4" + options)
            models.append(densenet.multi_gpu_model(lambda network=network: network, 1))
            halves = (slice(0, 32), slice(32, 64)) * 2
            losses.append([models[-1].train_on_batch(images[h], labels[h])[0] for h in halves])
    finally:
        keras.config.set_dtype_policy(policy)
    tolerance = 1e-4 if precision == "float32" else 2e-2
    np.testing.assert_allclose(*losses, rtol=tolerance)
    kept, recomputed = models
    assert trainable(kept) == trainable(recomputed)
    for a, b in zip(kept.variables, recomputed.variables, strict=True):
        assert (a.name, a.shape) == (b.name, b.shape)
        if precision == "float32" and "moving" in a.name:
            np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4)

    # What a run saves is Keras' own, the interrupted run's file included.
    densenet.save(recomputed, tmp_path / "last.keras")
    trained = build("DenseNet_keras", "--depth 10 --growth_rate 4 --recompute")
    trained.set_weights(recomputed.get_weights())
    trained.save(tmp_path / "model.keras")
    for name in ("last.keras", "model.keras"):
        with zipfile.ZipFile(tmp_path / name) as file:
            found = set(classes(json.loads(file.read("config.json"))))
        assert {cls for module, cls in found if module == "keras.layers"} == {
            *("InputLayer", "Normalization", "Conv2D", "BatchNormalization", "ReLU"),
            *("Concatenate", "AveragePooling2D", "GlobalAveragePooling2D", "Dense"),
        }
        assert all(module.split(".")[0] == "keras" and ">" not in cls for module, cls in found)
        loaded = keras.models.load_model(tmp_path / name)
        expected = kept if precision == "float32" else recomputed
        np.testing.assert_allclose(loaded(images), expected(images), atol=tolerance)
        assert loaded.count_params() == kept.count_params()


def test_recomputed_bottleneck_is_one_for_xla_too():
    """Keras has XLA compile the training step on GPUs."""
    x = tf.constant(RNG.normal(size=(4, 8, 8, 6)), tf.float32)
    results = []
    for way in (densenet.bottleneck, densenet.recomputed_bottleneck):
        inputs = layers.Input(x.shape[1:])
        model = keras.Model(inputs, way(inputs, 3))
        randomize(model)

        @tf.function(jit_compile=way is not densenet.bottleneck)
        def step(x, model=model):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(model(x, training=True) ** 3)
            return loss, *tape.gradient(loss, [v.value for v in model.trainable_variables])

        results.append([*step(x), *model.non_trainable_variables])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
