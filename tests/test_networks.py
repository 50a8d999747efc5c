"""The networks have the papers' parts, and the scripts are lessons in plain Keras."""

import ast
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import LADDER, SCRIPTS, load
from keras import layers
from reference import (
    RNG,
    build,
    kernels,
    layers_of,
    maps,
    randomize,
    trainable,
)

# ------------------------------------------------------------------- parameters and feature maps


def stages(count, *channels):
    """The feature maps of so many blocks in each of the three stages."""
    return [(size, size, n) for size, n in zip((32, 16, 8), channels) for _ in range(count)]


def resnet_maps(stack_n):
    """By class of layers, or by size of convolutions; those of 1x1 are the shortcuts."""
    return {
        3: [(32, 32, 16), *stages(2 * stack_n, 16, 32, 64)],
        1: [(16, 16, 32), (8, 8, 64)],
        layers.Add: stages(stack_n, 16, 32, 64),
        layers.GlobalAveragePooling2D: [(64,)],
        layers.Dense: [(10,)],
    }


def wide_resnet_maps(blocks, width):
    channels = 16 * width, 32 * width, 64 * width
    return {
        3: [(32, 32, 16), *stages(2 * blocks, *channels)],
        1: stages(1, *channels),
        layers.Add: stages(blocks, *channels),
    }


def resnext_maps(cardinality):
    narrow, wide = (64 * cardinality * 2**stage for stage in range(3)), (256, 512, 1024)
    narrow = list(narrow)
    ones = []
    for size, channels, n in zip((32, 16, 8), narrow, wide):
        before = min(2 * size, 32)  # the 3x3 convolution has the stride, and the shortcut
        ones += [(before, before, channels), (size, size, n), (size, size, n)]
        ones += [(size, size, channels), (size, size, n)] * 2
    return {
        3: [
            (32, 32, 64),
            *[
                (*shape[:2], shape[2] // cardinality)
                for shape in stages(3, *narrow)
                for _ in range(cardinality)
            ],
        ],
        1: ones,
        layers.Concatenate: stages(3, *narrow),
        layers.Add: stages(3, *wide),
    }


def senet_maps(cardinality, ratio):
    squeezed = [
        [(1, 1, channels // ratio), (1, 1, channels)]
        for channels in (256, 512, 1024)
        for _ in range(3)
    ]
    return resnext_maps(cardinality) | {
        layers.Dense: [*sum(squeezed, []), (10,)],
        layers.Multiply: stages(3, 256, 512, 1024),
    }


def densenet_maps(layer_count, growth_rate):
    convolutions, concatenated, pooled = [(32, 32, 2 * growth_rate)], [], []
    channels = 2 * growth_rate
    for size in (32, 16, 8):
        for _ in range(layer_count):
            channels += growth_rate
            convolutions += [(size, size, 4 * growth_rate), (size, size, growth_rate)]
            concatenated.append((size, size, channels))
        if size > 8:
            channels //= 2
            convolutions.append((size, size, channels))
            pooled.append((size // 2, size // 2, channels))
    return {
        layers.Conv2D: convolutions,
        layers.Concatenate: concatenated,
        layers.AveragePooling2D: pooled,
        layers.GlobalAveragePooling2D: [(channels,)],
    }


LENET_MAPS = {
    layers.Conv2D: [(28, 28, 6), (10, 10, 16)],
    layers.MaxPooling2D: [(14, 14, 6), (5, 5, 16)],
    layers.Flatten: [(400,)],
    layers.Dense: [(120,), (84,), (10,)],
}
NIN_MAPS = {
    layers.MaxPooling2D: [(16, 16, 96), (8, 8, 192)],
    layers.GlobalAveragePooling2D: [(10,)],
    layers.Dense: [],
}
VGG_MAPS = {
    layers.MaxPooling2D: [(16, 16, 64), (8, 8, 128), (4, 4, 256), (2, 2, 512), (1, 1, 512)],
    layers.Dense: [(4096,), (4096,), (10,)],
}


@pytest.mark.parametrize(
    "script, options, name, parameters, shapes",
    [
        *[(name, "", name.removesuffix("_keras"), 62_006, LENET_MAPS) for name in LADDER],
        ("Network_in_Network_keras", "", "NiN", 966_986, NIN_MAPS),
        ("Network_in_Network_bn_keras", "", "NiN_bn", 969_822, NIN_MAPS),
        ("Vgg19_keras", "--imagenet none", "VGG19", 38_975_326, VGG_MAPS),
        ("ResNet_keras", "--stack_n 3", "ResNet-20", 272_282, resnet_maps(3)),
        ("ResNet_keras", "", "ResNet-32", 466_714, resnet_maps(5)),
        ("ResNet", "", "ResNet-50", 758_362, resnet_maps(8)),
        pytest.param(
            *("ResNet_keras", "--stack_n 18", "ResNet-110", 1_730_522, resnet_maps(18)),
            marks=pytest.mark.slow,
        ),
        (
            "Wide_ResNet_keras",
            "--depth 16 --width 8",
            "WRN-16-8",
            10_961_370,
            wide_resnet_maps(2, 8),
        ),
        ("Wide_ResNet_keras", "", "WRN-28-10", 36_479_194, wide_resnet_maps(4, 10)),
        ("ResNeXt_keras", "", "ResNeXt-29_4x64d", 17_562_442, resnext_maps(4)),
        ("ResNeXt_keras", "--cardinality 8", "ResNeXt-29_8x64d", 34_426_698, resnext_maps(8)),
        ("DenseNet_keras", "", "DenseNet-100x12", 769_162, densenet_maps(16, 12)),
        ("DenseNet_keras", "--growth_rate 24", "DenseNet-100x24", 3_020_506, densenet_maps(16, 24)),
        pytest.param(
            "DenseNet_keras",
            "--depth 160 --growth_rate 24",
            "DenseNet-160x24",
            6_831_466,
            densenet_maps(26, 24),
            marks=pytest.mark.slow,
        ),
        ("SENet_keras", "", "SE-ResNeXt-29_4x64d", 18_078_538, senet_maps(4, 16)),
    ],
    ids=lambda value: "" if isinstance(value, dict) else None,
)
def test_parameters_and_feature_maps(script, options, name, parameters, shapes):
    model = build(script, options)
    assert (model.name, trainable(model)) == (name, parameters)
    assert {kind: maps(model, kind) for kind in shapes} == shapes
    for layer in layers_of(model, layers.BatchNormalization):
        assert (layer.momentum, layer.epsilon) == (0.9, 1e-5)


# ---------------------------------------------------------------------------------------- weights

# The smallest network of each script: the number of its kernels, and its weight decay.
SMALL = [
    *[(name, "", 5, 1e-4 if name == LADDER[-1] else 0) for name in LADDER],
    ("Network_in_Network_keras", "", 9, 5e-5),
    ("Network_in_Network_bn_keras", "", 9, 5e-5),
    ("Vgg19_keras", "--imagenet none", 19, 1e-4),
    ("ResNet_keras", "--stack_n 1", 10, 1e-4),
    ("ResNet", "--stack_n 1", 10, 1e-4),
    ("Wide_ResNet_keras", "--depth 10 --width 1", 10, 2.5e-4),
    ("ResNeXt_keras", "--cardinality 2 --base_width 2", 41, 2.5e-4),
    ("DenseNet_keras", "--depth 10 --growth_rate 4", 10, 5e-5),
    ("DenseNet_keras", "--depth 10 --growth_rate 4 --recompute", 10, 5e-5),
    ("SENet_keras", "--cardinality 2 --base_width 2", 59, 2.5e-4),
]


@pytest.fixture(scope="module", params=SMALL, ids=lambda row: f"{row[0]} {row[1]}".strip())
def small(request):
    """A network in mixed precision for several devices, how many kernels it has, its weight decay.

    The strategy is one that has a single device.
    """
    script, options, count, decay = request.param
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        with tf.distribute.OneDeviceStrategy("cpu:0").scope():
            return build(script, options), count, decay
    finally:
        keras.config.set_dtype_policy(policy)


def test_weight_decay_is_on_every_kernel_and_nothing_else(small):
    model, count, decay = small
    randomize(model)
    assert len(kernels(model)) == count
    assert len(model.losses) == (count if decay else 0)
    squares = sum(np.square(kernel).sum() for kernel in kernels(model))
    np.testing.assert_allclose(sum(map(float, model.losses)), decay * squares, rtol=1e-5)


def test_weights_and_probabilities_are_float32_in_mixed_precision(small):
    model, *_ = small
    assert model.output.dtype == "float32"
    assert {layer.compute_dtype for layer in layers_of(model, layers.Conv2D)} == {"bfloat16"}
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}


def test_batch_normalization_sees_the_batches_of_all_devices(small):
    """Those inside the layers that DenseNet computes twice, too."""
    model, *_ = small
    every = [*model._flatten_layers(recursive=True)]
    found = [layer for layer in every if type(layer) is layers.BatchNormalization]
    assert all(layer.synchronized for layer in found)
    assert len(found) == sum("gamma" in variable.path for variable in model.variables)


def test_kernels_of_nin_without_batch_normalization_have_mean_0():
    first, *others = layers_of(build("Network_in_Network_keras"), layers.Conv2D)
    means = [np.abs(layer.get_weights()[0].mean(axis=(0, 1, 2))).max() for layer in others]
    assert max(means) < 1e-6 < np.abs(first.get_weights()[0].mean(axis=(0, 1, 2))).max()


@pytest.mark.parametrize("script", ["ResNeXt_keras", "SENet_keras"])
def test_blocks_of_resnext_begin_as_their_shortcuts(script):
    model = build(script, "--cardinality 2 --base_width 2")
    gammas = [layer.gamma.numpy() for layer in layers_of(model, layers.BatchNormalization)]
    # The branch has three, of which the last counts; the shortcut of a stage's first block has one.
    block = [1, 1, 0]
    assert [gamma.mean() for gamma in gammas] == [1, *(block + [1] + block + block) * 3]
    assert all(gamma.min() == gamma.max() for gamma in gammas)


# ------------------------------------------------------------------------------------------ parts


def source_of(model, layer):
    """The layer that makes what this one takes."""
    (found,) = [other for other in model.layers if other.output is layer.input]
    return found


def takers_of(model, layer):
    """The layers that take what this one makes."""
    return [
        other
        for other in model.layers
        if any(part is layer.output for part in tf.nest.flatten(other.input)) and other is not layer
    ]


# What dropout follows, from the nearest layer on.
BEFORE_DROPOUT = {
    "NiN": [layers.MaxPooling2D, layers.Conv2D],
    "NiN_bn": [layers.MaxPooling2D, layers.ReLU],
    "VGG19": [layers.ReLU, layers.BatchNormalization, layers.Dense],
}


def test_dropout_halves_what_trains(small):
    model, *_ = small
    dropouts = layers_of(model, layers.Dropout)
    assert [layer.rate for layer in dropouts] == [0.5, 0.5] * (model.name in BEFORE_DROPOUT)
    for layer in dropouts:
        for kind in BEFORE_DROPOUT[model.name]:
            layer = source_of(model, layer)
            assert type(layer) is kind


def test_wide_resnet_drops_between_the_convolutions_of_every_block():
    model = build("Wide_ResNet_keras", "--depth 16 --width 1 --dropout 0.3")
    dropouts = layers_of(model, layers.Dropout)
    assert [layer.rate for layer in dropouts] == [0.3] * 6
    additions = []
    for dropout in dropouts:
        layer = dropout
        for kind in (layers.ReLU, layers.BatchNormalization, layers.Conv2D):
            layer = source_of(model, layer)
            assert type(layer) is kind
        (convolution,) = takers_of(model, dropout)
        assert layer.kernel_size == convolution.kernel_size == (3, 3)
        additions += takers_of(model, convolution)
    assert additions == layers_of(model, layers.Add)
    assert not layers_of(build("Wide_ResNet_keras", "--depth 16 --width 1"), layers.Dropout)


@pytest.mark.parametrize(
    "script, function",
    [
        ("ResNet_keras", "conv"),
        ("ResNet", "conv"),
        ("Wide_ResNet_keras", "conv"),
        ("ResNeXt_keras", "conv"),
        ("SENet_keras", "conv"),
    ],
)
def test_strided_convolution_is_centred_on_the_pixels_of_the_shortcut(script, function):
    """As Torch has it: a 3x3 kernel that is its middle alone does what a 1x1 kernel does."""
    inputs, x = layers.Input((8, 8, 4)), RNG.normal(size=(2, 8, 8, 4))
    for size in (1, 3):
        model = keras.Model(inputs, getattr(load(script), function)(inputs, 4, size, 2))
        (kernel,) = kernels(model)
        kernel.assign(np.zeros(kernel.shape))
        kernel.value[size // 2, size // 2].assign(np.eye(4))
        np.testing.assert_allclose(model(x), x[:, ::2, ::2], rtol=1e-4)


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("script", ["ResNeXt_keras", "SENet_keras"])
def test_grouped_convolution_has_the_gradients_of_a_block_diagonal_one(script, strides):
    inputs = layers.Input((8, 8, 6))
    grouped = keras.Model(inputs, load(script).grouped_conv(inputs, 12, strides, groups=3))
    parts = [layer.kernel for layer in layers_of(grouped, layers.Conv2D)]
    dense = np.zeros((3, 3, 6, 12), np.float32)
    blocks = [
        (slice(None), slice(None), slice(2 * i, 2 * i + 2), slice(4 * i, 4 * i + 4))
        for i in range(3)
    ]
    for block, part in zip(blocks, parts, strict=True):
        dense[block] = part.numpy()
    x, dense = tf.constant(RNG.normal(size=(2, 8, 8, 6)), tf.float32), tf.Variable(dense)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        ours = grouped(x)
        expected = tf.nn.conv2d(x, dense, strides, [[0, 0], [1, 1], [1, 1], [0, 0]])
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    weights = tf.constant(RNG.normal(size=ours.shape), tf.float32)
    dx, *dk = tape.gradient(ours, [x, *(part.value for part in parts)], weights)
    expected_dx, expected_dk = tape.gradient(expected, [x, dense], weights)
    np.testing.assert_allclose(dx, expected_dx, atol=1e-5)
    for block, part in zip(blocks, dk, strict=True):
        np.testing.assert_allclose(part, expected_dk.numpy()[block], atol=1e-4)


# --------------------------------------------------------------------------------------- training


def test_pixels_are_normalised_by_the_mean_and_variance_of_the_training_images(monkeypatch):
    script, facts = load("ResNet_keras"), []

    def build_network(args, *given):
        facts.extend(given)
        raise KeyboardInterrupt

    few = script.synthetic_images(500, seed=1)
    monkeypatch.setattr(script, "synthetic_images", lambda count, seed: few)
    monkeypatch.setattr(script, "build_network", build_network)
    with pytest.raises(SystemExit):
        script.main(["--dataset", "synthetic"])
    shape, num_classes, mean, variance = facts
    assert (tuple(shape), num_classes) == ((32, 32, 3), 10)
    np.testing.assert_allclose(mean, few[0].mean((0, 1, 2)))
    np.testing.assert_allclose(variance, few[0].var((0, 1, 2)))


@pytest.mark.parametrize(
    "script, epochs, rates",
    [
        ("ResNet_keras", 200, {0: 0.1, 80: 0.1, 81: 0.01, 121: 0.01, 122: 0.001, 199: 0.001}),
        ("ResNet_keras", 30, {0: 0.1, 12: 0.1, 13: 0.01, 18: 0.01, 19: 0.001, 29: 0.001}),
        ("ResNet_keras", 2, {0: 0.1, 1: 0.01}),  # the first rate whatever the number of epochs
        ("LeNet_keras", 8, {0: 0.01, 3: 0.01, 4: 0.005, 5: 0.005, 6: 0.001, 7: 0.001}),
        *[(name, 200, {0: 0.01, 99: 0.01, 100: 0.005, 149: 0.005, 150: 0.001}) for name in LADDER],
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
    ],
)
def test_schedule_scales_with_the_epochs(script, epochs, rates):
    scheduler = load(script).scheduler
    assert {epoch: scheduler(epoch, epochs) for epoch in rates} == pytest.approx(rates, rel=1e-12)


# ---------------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_plain_keras(name):
    source = SCRIPTS[name].read_text()
    for node in ast.walk(ast.parse(source)):
        assert not isinstance(node, ast.ClassDef)  # nothing is derived from Keras' classes
        if isinstance(node, ast.Assign):  # nor are the methods of Keras' classes replaced
            targets = [ast.unparse(target) for target in node.targets]
            assert not [t for t in targets if t.startswith(("keras.", "layers.", "tf."))]
    for words in ("keras.src", "raw_ops", "custom_gradient"):
        assert words not in source
    assert not re.search(r"\._[a-z]", source)  # nothing private
    assert ("recompute_grad" in source) == (name == "DenseNet_keras")


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_can_be_read(name):
    """Lines of a length that can be read, functions that fit a screen or two, and reasons."""
    source = SCRIPTS[name].read_text()
    lines = source.splitlines()
    (banner,) = [i for i, line in enumerate(lines) if "from here on, all scripts" in line]
    assert banner < 220
    plumbing = [line for line in lines[banner + 1 :] if line.strip()]
    assert sum(map(len, plumbing)) / len(plumbing) < 60
    assert sum(line.lstrip().startswith("# ") for line in lines) > 10
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_decides_the_result_stands_above_the_banner(name):
    """Augmentation with its numbers, learning rates, optimizer and loss, once each."""
    lesson, plumbing = SCRIPTS[name].read_text().split("training (from here on")
    for words in ("def augment(", "def scheduler(", "def compile_model(", "keras.optimizers.SGD("):
        assert lesson.count(words) == 1 and words not in plumbing
    for words in ("loss=", "layers.", "tf.pad", "121", "flip"):
        assert words not in plumbing
