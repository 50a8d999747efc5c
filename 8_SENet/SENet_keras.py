#!/usr/bin/env python3
"""SE-ResNeXt-29 on CIFAR-10 and CIFAR-100: squeeze-and-excitation weights the channels.

Jie Hu, Li Shen, Samuel Albanie, Gang Sun and Enhua Wu: "Squeeze-and-Excitation Networks", 2017,
https://arxiv.org/abs/1709.01507
Saining Xie, Ross Girshick, Piotr Dollar, Zhuowen Tu and Kaiming He: "Aggregated Residual
Transformations for Deep Neural Networks", 2016, https://arxiv.org/abs/1611.05431

    python SENet_keras.py                                       # 4x64d, 18,078,538 parameters
    python SENet_keras.py --cardinality 8 --base_width 64 --dataset cifar100
    python SENet_keras.py --cardinality 2 --base_width 4 --dataset synthetic --epochs 2
    python SENet_keras.py --resume runs/SE-ResNeXt-29_4x64d_cifar10/2026-01-31_12-00-00

The paper has no result for this network on CIFAR; this script reaches 40.87 % of CIFAR-10's test
images after the first of its epochs, on JPEG-compressed copies of them. Needs tensorflow, keras,
numpy, matplotlib and tensorboard.
"""

import argparse
import functools
import gc
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path

# Read at import. What the user has set goes first, but for the backend: this is TensorFlow code.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # errors reach us as exceptions all the same
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # off by default before AVX-512 VNNI
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # leave the GPU's other users room

# Python would search all that TensorFlow has loaded for garbage again and again: a slow start.
gc.set_threshold(100_000)

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from matplotlib.figure import Figure

NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "synthetic": 10}
CLASS_NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
# Mean and standard deviation of the training images' red, green and blue, 0..255.
STATISTICS = {
    "cifar10": ((125.307, 122.95, 113.865), (62.9932, 62.0887, 66.7048)),
    "cifar100": ((129.304, 124.070, 112.434), (68.170, 65.392, 70.418)),
    "synthetic": ((128.003, 132.500, 128.455), (69.522, 71.572, 72.792)),
}

# ------------------------------------------------------------------------------------------ options


class UsageError(Exception):
    """What the user gave cannot be used; the message says why and what to do, in one line."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that states defaults and keeps the line breaks of the description."""


def positive_int(text):
    """The type of an option that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def ratio(text):
    """The type of an option that must divide 256, the channels of the first stage."""
    value = positive_int(text)
    below = min(2 ** (value.bit_length() - 1), 128)
    if 256 % value:
        raise argparse.ArgumentTypeError(
            f"256 channels cannot be divided by {value}: take {below} or {2 * below}"
        )
    return value


def parse_args():
    """Return the options of the command line, those of the network first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--cardinality", type=positive_int, default=4, help="groups of the 3x3 convolutions")
    add("--base_width", type=positive_int, default=64, help="channels a group, in the first stage")
    add("--ratio", type=ratio, default=16, help="channels a unit of the SE blocks' first layer")
    return parse_shared_args(parser, batch_size=128, epochs=300)


def parse_shared_args(parser, batch_size, epochs):
    """Add the options that every script has, with these defaults, and parse.

    With --resume RUN the options are those in RUN/args.json, read as a command line and so
    checked like one; only --data_dir and --gpus may differ from it.
    """
    add = parser.add_argument
    add("-b", "--batch_size", type=positive_int, default=batch_size, help="images a step")
    add("-e", "--epochs", type=positive_int, default=epochs, help="the schedule scales with it")
    add("-d", "--dataset", choices=NUM_CLASSES, default="cifar10", help="what to train on")
    add("--data_dir", type=os.path.abspath, help="folder with CIFAR's binary version")
    add("--log_dir", type=os.path.abspath, default="runs", help="folder for the runs' folders")
    add("--gpus", type=positive_int, default=1, help="how many GPUs share each batch")
    faster = "mixed_bfloat16 is faster on CPUs with AMX or AVX-512 BF16 and GPUs since Ampere"
    faster += ", mixed_float16 on GPUs since Volta"
    precisions = ("float32", "mixed_bfloat16", "mixed_float16")
    add("--precision", choices=precisions, default="float32", help=faster)
    add("--seed", type=int, default=0, help="of weights, shuffling and augmentation")
    add("--resume", type=os.path.abspath, metavar="RUN", help="folder of a run to go on with")
    parser.error = lambda message: sys.exit(f"{parser.prog}: error: {message}")
    parser.allow_abbrev = False

    args, saved = parser.parse_args(), {}
    if args.resume:
        try:
            saved = dict(json.loads(Path(args.resume, "args.json").read_text()))
            if saved.pop("script") != Path(__file__).name:
                raise ValueError
            given = [
                f"--{key}" if value is True else f"--{key}={value}"
                for key, value in saved.items()
                if value is not None and value is not False
            ]
        except (OSError, ValueError, TypeError, LookupError):
            parser.error(f"--resume {args.resume}: not the folder of a run of this script")
        args = parser.parse_args(given + sys.argv[1:])
    for key, value in saved.items():
        if getattr(args, key) != value and key not in ("data_dir", "gpus"):
            parser.error(f"--{key} cannot change on the way: this run has {value}")
    if not 0 <= args.seed < 2**32:
        parser.error("--seed must be a whole number from 0 to 4294967295")
    if args.data_dir and args.dataset == "synthetic":
        parser.error("--data_dir is for cifar10 and cifar100; synthetic reads no files")
    if args.batch_size % args.gpus:
        parser.error(f"--batch_size {args.batch_size} cannot be shared by --gpus {args.gpus}")
    if args.gpus > 1 and args.precision == "mixed_float16":
        # Keras' loss scaling looks for overflows among the gradients of the first GPU only.
        parser.error("--precision mixed_float16 needs --gpus 1 (Keras 3.15): try mixed_bfloat16")
    return args


@functools.cache
def processor_flags():
    """Return the names of what the processor can do, on Linux; elsewhere nothing is known."""
    cpuinfo = Path("/proc/cpuinfo")
    return set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()


def emulated(dtype):
    """Whether the processor has no instructions for "bfloat16" or "float16", which makes it slow.

    With a GPU that does not matter. float16 counts as native to no processor, bfloat16 to all of
    which nothing is known.
    """
    if dtype == "float32" or tf.config.list_physical_devices("GPU"):
        return False
    flags = processor_flags()
    lacking = flags and flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})
    return dtype == "float16" or bool(lacking)


# --------------------------------------------------------------------------------------------- data


def load_data(dataset, data_dir=None):
    """Return (x_train, y_train), (x_test, y_test) of "cifar10", "cifar100" or "synthetic".

    Images are (n, 32, 32, 3) uint8, labels (n,) int32. Without data_dir the CIFAR data sets come
    from keras.datasets, which downloads once and checks the hash.
    Raises UsageError when the files cannot be had or are not what they should be.
    """
    if dataset == "synthetic":
        print("Training on synthetic images: coloured patches made from a seed, no photographs.")
        return synthetic_images(5000, seed=1), synthetic_images(1000, seed=2)
    if data_dir:
        return read_binary(dataset, data_dir)
    try:
        train, test = getattr(keras.datasets, dataset).load_data()
    except Exception as error:  # Keras raises nothing more precise when a download fails
        raise UsageError(
            f"cannot download {dataset} ({' '.join(str(error).split())}): give a folder with its "
            "binary version with --data_dir, or try --dataset synthetic"
        ) from error
    return tuple((images, labels.ravel().astype(np.int32)) for images, labels in (train, test))


def read_binary(dataset, data_dir):
    """Read the binary version of CIFAR-10 or CIFAR-100 as load_data does.

    A record is the label (CIFAR-100: the coarse and the fine label, a byte each), then 32x32 bytes
    of red, of green and of blue. The pickled version is not read: unpickling runs a file's code.
    """
    if dataset == "cifar10":
        records = {f"data_batch_{i}.bin": 10000 for i in range(1, 6)} | {"test_batch.bin": 10000}
        label_bytes = 1
    else:
        records = {"train.bin": 50000, "test.bin": 10000}
        label_bytes = 2
    images, labels = [], []
    for name, count in records.items():
        path = Path(data_dir, name)
        if not path.is_file():
            raise UsageError(f"{path} is missing: --data_dir needs {', '.join(records)}")
        size, right_size = path.stat().st_size, count * (label_bytes + 3072)
        if size != right_size:
            raise UsageError(f"{path} has {size} bytes instead of {right_size}: get it again")
        data = np.fromfile(path, np.uint8).reshape(count, -1)
        labels.append(data[:, label_bytes - 1].astype(np.int32))
        if labels[-1].max() >= NUM_CLASSES[dataset]:
            raise UsageError(f"{path} has the label {labels[-1].max()}: not a file of {dataset}")
        images.append(data[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    images, labels = np.concatenate(images), np.concatenate(labels)
    return (images[:50000], labels[:50000]), (images[50000:], labels[50000:])


def synthetic_images(count, seed):
    """Return count images of ten classes and their labels, shaped as load_data says.

    A class is a pattern of 4x4 coloured patches. Images show it shifted, mirrored, brighter or
    darker and under noise, so that a network has something to learn.
    """
    patterns = np.random.default_rng(0).integers(40, 216, (10, 4, 4, 3)).astype(np.float32)
    patterns = patterns.repeat(8, axis=1).repeat(8, axis=2)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count, np.int32)
    shift = rng.integers(-4, 5, (2, count, 1)) + np.arange(32)
    shift[1, ::2] = shift[1, ::2, ::-1]
    rows, columns = shift % 32
    brightness = rng.normal(0, 40, count)
    images = np.empty((count, 32, 32, 3), np.uint8)
    for index in range(count):  # all at once would take ten times the memory, and longer
        image = patterns[labels[index], rows[index, :, None], columns[index]]
        image += brightness[index]
        image += 40 * rng.standard_normal(image.shape, np.float32)
        images[index] = image.clip(0, 255)
    return images, labels


def train_batches(images, labels, batch_size, seed, initial_epoch, epochs):
    """Return the augmented batches of all epochs from initial_epoch on as one tf.data.Dataset.

    images (n, 32, 32, 3) uint8 and labels (n,) int32 give n // batch_size batches an epoch,
    (batch_size, 32, 32, 3) uint8 and (batch_size,) int32. Everything random is a function of
    (seed, epoch, step): a resumed run sees what an uninterrupted one would have seen.
    """
    steps = len(images) // batch_size
    with tf.device("CPU"):  # the pipeline runs there; a copy on the GPU would be of no use
        padded, labels = tf.constant(pad(images)), tf.constant(labels)

    def one_epoch(epoch):
        epoch_seed = tf.stack([tf.cast(seed, tf.int64), epoch])
        order = tf.random.experimental.stateless_shuffle(tf.range(len(images)), epoch_seed)
        order = tf.reshape(order[: steps * batch_size], [steps, batch_size])

        def one_step(step):
            step_seed = tf.random.experimental.stateless_fold_in(epoch_seed, step)
            return augment(padded, order[step], step_seed), tf.gather(labels, order[step])

        return tf.data.Dataset.range(steps).map(one_step, num_parallel_calls=os.cpu_count())

    return untuned(tf.data.Dataset.range(initial_epoch, epochs).flat_map(one_epoch).prefetch(4))


def pad(images):
    """Return (n, 32, 32, 3) uint8 images framed by 4 pixels of their mean colour."""
    padded = np.empty((len(images), 40, 40, 3), np.uint8)
    padded[:] = images.mean(axis=(0, 1, 2)).round()  # close to 0 once it is normalised
    padded[:, 4:36, 4:36] = images
    return padded


def augment(padded, chosen, seed):
    """Crop the chosen images at random places and mirror half of them.

    padded is (n, 40, 40, 3) uint8, chosen holds (batch,) indices, seed is a stateless seed (2,);
    returns (batch, 32, 32, 3) uint8. Rows are gathered for the whole batch at once; images cut at
    the same columns and mirrored alike, of which there are 9 x 2 kinds, are then cut together.
    """
    batch_size = chosen.shape[0]
    variant = tf.random.stateless_uniform([batch_size], seed, 0, 9 * 9 * 2, tf.int32)
    top, kind = variant // 18, variant % 18
    rows = (40 * chosen + top)[:, None] + tf.range(32)
    images = tf.gather(tf.reshape(padded, [-1, 40, 3]), rows)
    crops = []
    for index, group in enumerate(tf.dynamic_partition(images, kind, 18)):
        left, mirrored = index // 2, index % 2 == 1
        crop = tf.reshape(group[:, :, left : left + 32], [-1, 32, 3])
        if mirrored:  # as (rows, 32, 3), for which tf.reverse is three times as fast
            crop = tf.reverse(crop, [1])
        crops.append(tf.reshape(crop, [-1, 32, 32, 3]))
    places = tf.dynamic_partition(tf.range(batch_size), kind, 18)
    return tf.ensure_shape(tf.dynamic_stitch(places, crops), [batch_size, 32, 32, 3])


def untuned(dataset):
    """Return dataset without the autotuner, whose thread makes the end of every epoch wait.

    Deleting an iterator joins that thread, which sleeps for up to a minute at a time.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


# ------------------------------------------------------------------------------------------ network


def normalize(x, mean, std):
    """Bring (batch, 32, 32, 3) pixels to mean 0 and standard deviation 1 in every channel.

    They are normalised as rows of 96 numbers, since vectors of 3 are slow to broadcast.
    """
    x = layers.Reshape((32, 96), name="rows")(x)
    mean, variance = np.tile(mean, 32), np.tile(np.square(std), 32)
    x = layers.Normalization(mean=mean, variance=variance, name="normalization")(x)
    return layers.Reshape((32, 32, 3), name="pixels")(x)


class FusedBatchNormalization(layers.BatchNormalization):
    """Batch normalisation of (batch, height, width, channels) by TensorFlow's one fused operation.

    Same variables and results as the Keras layer it derives from, which computes them with a
    dozen elementwise operations; but the moving variance is that of unbiased variances.
    """

    def call(self, inputs, training=False):
        if training and tf.distribute.get_strategy().num_replicas_in_sync > 1:
            return super().call(inputs, training=training)  # can average over several GPUs
        training = bool(training and self.trainable)
        x = tf.cast(inputs, "float32") if emulated(self.compute_dtype) else inputs
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=self.gamma,
            offset=self.beta,
            mean=self.moving_mean,
            variance=self.moving_variance,
            epsilon=self.epsilon,
            exponential_avg_factor=1 - self.momentum,
            is_training=training,
        )
        if training:
            self.moving_mean.assign(mean)
            self.moving_variance.assign(variance)
        return tf.cast(outputs, self.compute_dtype)


class Network(keras.Model):
    """A model whose weight decay is one loss, where Keras has one for each kernel: less to trace.

    It is the factor of keras.regularizers.L2 times the sum of squares; losses of add_loss and
    activity_regularizer are left out. With any other regularizer all losses are Keras' own.
    """

    @property
    def losses(self):
        kernels = [v for v in self.trainable_variables if v.regularizer]
        if not all(isinstance(v.regularizer, keras.regularizers.L2) for v in kernels):
            return super().losses
        factors = {v.regularizer.l2 for v in kernels}
        halves = {f: [tf.nn.l2_loss(v) for v in kernels if v.regularizer.l2 == f] for f in factors}
        return [2 * factor * tf.add_n(terms) for factor, terms in halves.items()]


WEIGHTS = {"kernel_initializer": "he_normal", "kernel_regularizer": keras.regularizers.L2(5e-4)}


def conv_bn(x, filters, kernel_size, strides, name, groups=1, gamma="ones"):
    """A convolution, without bias, since the batch normalisation that follows has one."""
    options = {"padding": "same", "groups": groups, "use_bias": False, "name": name}
    x = FastConv2D(filters, kernel_size, strides, **options, **WEIGHTS)(x)
    options = {"gamma_initializer": gamma, "synchronized": True, "name": name + "_bn"}
    return FusedBatchNormalization(momentum=0.9, epsilon=1e-5, **options)(x)


def conv_bn_relu(x, filters, kernel_size, strides, name, groups=1):
    """A convolution, batch normalisation and ReLU."""
    x = conv_bn(x, filters, kernel_size, strides, name, groups)
    return layers.ReLU(name=name + "_relu")(x)


def squeeze_excite(x, ratio, name):
    """Weight each channel of (batch, height, width, channels) by a number from 0 to 1 (section 3).

    Squeeze: its mean over the image. Excite: two small fully connected layers, the first with
    channels / ratio units, make the weights of all channels out of the means of all.
    """
    channels = x.shape[-1]
    options = {"use_bias": False, **WEIGHTS}
    s = layers.GlobalAveragePooling2D(keepdims=True, name=name + "_squeeze")(x)
    s = layers.Dense(channels // ratio, activation="relu", name=name + "_reduce", **options)(s)
    s = layers.Dense(channels, activation="sigmoid", name=name + "_excite", **options)(s)
    return layers.Multiply(name=name + "_scale")([x, s])


def se_resnext_block(x, cardinality, group_width, filters, strides, ratio, name):
    """A block of ResNeXt whose branch is weighted by squeeze_excite before the addition (figure 3).

    From (batch, height, width, channels) to (batch, height/strides, width/strides, filters).
    The bottleneck is cardinality * group_width wide. The shortcut is the identity, or a 1x1
    convolution where the shape changes. The last ReLU comes after the addition.
    """
    bottleneck = cardinality * group_width
    y = conv_bn_relu(x, bottleneck, 1, 1, name + "_conv1")
    y = conv_bn_relu(y, bottleneck, 3, strides, name + "_conv2", groups=cardinality)
    # From 0, so that a block begins as its shortcut: from 1, nine of them add up to features so
    # large that the first steps at a rate of 0.1 throw the weights far off (Goyal et al. 2017,
    # "Accurate, Large Minibatch SGD", section 5.1).
    y = conv_bn(y, filters, 1, 1, name + "_conv3", gamma="zeros")
    y = squeeze_excite(y, ratio, name)
    if strides != 1 or x.shape[-1] != filters:
        x = conv_bn(x, filters, 1, strides, name + "_shortcut")
    x = layers.Add(name=name + "_add")([x, y])
    return layers.ReLU(name=name + "_relu")(x)


def se_resnext(cardinality, base_width, ratio=16, num_classes=10, mean=(0, 0, 0), std=(1, 1, 1)):
    """ResNeXt-29 (section 5.3 of its paper) with squeeze and excitation (section 3.3).

    The 3x3 convolutions have cardinality groups, which are base_width channels wide in the first
    stage and twice as wide in each later one.

    Takes (batch, 32, 32, 3) pixels from 0 to 255, whose mean and std are given per channel, and
    returns (batch, num_classes) probabilities.
    """
    inputs = layers.Input((32, 32, 3), name="image")
    x = normalize(inputs, mean, std)
    x = conv_bn_relu(x, 64, 3, 1, "conv0")
    for stage, filters in enumerate((256, 512, 1024), start=1):
        for block in (1, 2, 3):
            # 32x32x256, then 16x16x512 and 8x8x1024.
            strides = 2 if stage > 1 and block == 1 else 1
            group_width, name = base_width * filters // 256, f"stage{stage}_block{block}"
            x = se_resnext_block(x, cardinality, group_width, filters, strides, ratio, name)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    softmax = layers.Dense(
        num_classes, activation="softmax", dtype="float32", name="softmax", **WEIGHTS
    )
    name = f"SE-ResNeXt-29_{cardinality}x{base_width}d"
    return Network(inputs, softmax(x), name=name)


def build_network(args):
    """Return the network that the options describe."""
    options = (args.cardinality, args.base_width, args.ratio)
    return se_resnext(*options, NUM_CLASSES[args.dataset], *STATISTICS[args.dataset])


# -------------------------------------------------------------------------------- fast convolutions


class FastConv2D(layers.Conv2D):
    """A convolution by matrix products, on CPUs, where they are the faster way.

    Same variables as the Keras layer it derives from, and its results but for rounding. Groups of
    channels, whose kernels are slow on CPUs, are convolutions of their own there. Numbers that
    the processor would emulate are float32 on the way, in which their products are exact.
    """

    def convolution_op(self, inputs, kernel):
        usual = self.dilation_rate == (1, 1) and self.data_format == "channels_last"
        usual = usual and None not in tuple(inputs.shape)[1:3]
        if not usual or tf.config.list_physical_devices("GPU"):
            return super().convolution_op(inputs, kernel)
        dtype = "float32" if emulated(self.compute_dtype) else self.compute_dtype
        x, kernel = tf.cast(inputs, dtype), tf.cast(kernel, dtype)
        if self.groups == 1:
            outputs = self.convolve(x, kernel)
        else:
            pairs = zip(tf.split(x, self.groups, axis=-1), tf.split(kernel, self.groups, axis=-1))
            outputs = tf.concat([self.convolve(*pair) for pair in pairs], axis=-1)
        return tf.cast(outputs, self.compute_dtype)

    def convolve(self, x, kernel):
        height, width, channels, filters = kernel.shape
        size, dtype, usual = x.shape[1], x.dtype, self.strides == (1, 1) and height == width
        map_size = math.prod(x.shape[1:3]) // math.prod(self.strides) * filters
        large = min(channels, filters) >= 64 and map_size >= 2**14
        if usual and height == 1 and dtype == tf.float32:
            return pointwise_in_order(x, kernel) if large else pointwise(x, kernel)
        usual = usual and self.padding == "same" and size == x.shape[2]
        if usual and height == 3 and size == 2:
            return conv2d_2x2(x, kernel)
        least_channels = least_channels_for_winograd(height, size, dtype)
        if usual and size % 4 == 0 and min(channels, filters) >= least_channels:
            return winograd(x, kernel)
        convolution = conv2d_in_order if large else tf.nn.conv2d
        return convolution(x, kernel, self.strides, self.padding.upper())


def conv2d_in_order(x, kernel, strides, padding):
    """tf.nn.conv2d, whose gradients are found one after the other.

    For large maps of many channels they are no faster at the same time, and take more memory.
    """
    options = {"strides": [1, *strides, 1], "padding": padding}

    @tf.custom_gradient
    def convolve(x, kernel):
        def gradient(upstream):
            kernel_gradient = tf.raw_ops.Conv2DBackpropFilter(
                input=x, filter_sizes=kernel.shape, out_backprop=upstream, **options
            )
            with tf.control_dependencies([kernel_gradient]):
                upstream = tf.identity(upstream)
            x_gradient = tf.raw_ops.Conv2DBackpropInput(
                input_sizes=tf.shape(x), filter=kernel, out_backprop=upstream, **options
            )
            return x_gradient, kernel_gradient

        return tf.nn.conv2d(x, kernel, **options), gradient

    return convolve(x, kernel)


def pointwise(x, kernel):
    """A 1x1 convolution as a matrix product."""
    products = tf.reshape(x, [-1, x.shape[-1]]) @ tf.reshape(kernel, kernel.shape[2:])
    return tf.reshape(products, [-1, *x.shape[1:3], kernel.shape[-1]])


@tf.custom_gradient
def pointwise_in_order(x, kernel):
    """A 1x1 convolution as a matrix product, whose gradients are found as in conv2d_in_order."""

    def gradient(upstream):
        rows = tf.reshape(upstream, [-1, upstream.shape[-1]])
        kernel_gradient = tf.matmul(tf.reshape(x, [-1, x.shape[-1]]), rows, transpose_a=True)
        with tf.control_dependencies([kernel_gradient]):
            upstream = tf.identity(upstream)
        x_gradient = pointwise(upstream, tf.transpose(kernel, [0, 1, 3, 2]))
        return x_gradient, tf.reshape(kernel_gradient, kernel.shape)

    return pointwise(x, kernel), gradient


def conv2d_2x2(x, kernel):
    """A 3x3 convolution of maps of 2x2 pixels, padding "same", as four matrix products.

    Each output sees all four pixels, through four of the kernel's nine parts; a kernel that slides
    over the padded map mostly multiplies zeros.
    """
    channels, filters = kernel.shape[2:]
    parts = [[4, 5, 7, 8], [3, 4, 6, 7], [1, 2, 4, 5], [0, 1, 3, 4]]  # for each output and pixel
    matrices = tf.gather(tf.reshape(kernel, [9, channels, filters]), parts)
    matrices = tf.reshape(matrices, [4, 4 * channels, filters])
    outputs = tf.reshape(x, [1, -1, 4 * channels]) @ matrices
    return tf.reshape(tf.transpose(outputs, [1, 0, 2]), [-1, 2, 2, filters])


# Besides infinity, for each size of kernel.
WINOGRAD_POINTS = {3: (0, 1, -1, 2, -2), 5: (0, 1, -1, 2, -2, 0.5, -0.5)}


def least_channels_for_winograd(r, size, dtype):
    """Return from how many channels on Winograd's way is faster for an r x r kernel (measured).

    To take tiles to points and back costs more than the products save where channels are few for
    the size of the map. In bfloat16 the products compete with instructions that are twice as fast
    as those of float32 (AVX-512 BF16), or many times (AMX).
    """
    if r not in WINOGRAD_POINTS or "amx_bf16" in processor_flags() and dtype == tf.bfloat16:
        return math.inf
    if dtype == tf.bfloat16:
        return {3: max(128, 16 * size), 5: max(96, 6 * size)}[r]
    return max(64, 4 * size)


@tf.custom_gradient
def winograd(x, kernel):
    """Convolve x with kernel, stride 1 and padding "same", in fewer multiplications.

    x is (batch, size, size, channels), size a multiple of 4; kernel is (r, r, channels, filters),
    r 3 or 5; returns (batch, size, size, filters). The map is cut into overlapping tiles
    of a = r + 3 pixels a side, each for 4x4 outputs. Convolving is multiplying polynomials, and
    for polynomials that are known by their values at a * a points that is one product a point:
    36 for each channel and filter where 4x4 outputs of a 3x3 kernel take 144, 64 instead of 400
    for 5x5. All tiles' values at a point times the kernel's are a matrix product. Rounding errors
    are larger than those of tf.nn.conv2d: up to 1e-5 of the outputs' standard deviation (rms).
    bfloat16 is float32 on the way, and with 3x3 kernels only the gradients take it, since oneDNN's
    convolution is faster.

    Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015,
    https://arxiv.org/abs/1509.09308, section 4: F(4x4, r x r).
    """

    def gradient(upstream):
        return winograd_gradient(x, kernel, upstream)

    if x.dtype == tf.bfloat16 and kernel.shape[0] == 3:
        return tf.nn.conv2d(x, kernel, 1, "SAME"), gradient
    return winograd_outputs(x, kernel), gradient


# Traced and optimised once for all layers of a shape, since it stays a function in the graph.
function_in_graph = tf.function(autograph=False, experimental_attributes={"_noinline": True})


@function_in_graph
def winograd_outputs(x, kernel):
    inputs, kernels, outputs = winograd_matrices(x.shape[1], kernel.shape[0])
    values, results = kernel_to_points(kernel, kernels), []
    for part in tf.split(x, winograd_parts(x, kernel)):
        with tf.control_dependencies(results[-1:]):
            part = to_points(tf.identity(part), inputs)
        results.append(tf.cast(from_points(part @ values, outputs), x.dtype))
    return tf.concat(results, axis=0)


@function_in_graph
def winograd_gradient(x, kernel, upstream):
    inputs, kernels, outputs = winograd_matrices(x.shape[1], kernel.shape[0])
    values, x_gradients, kernel_gradient = kernel_to_points(kernel, kernels), [], 0
    parts = winograd_parts(x, kernel)
    for part, upstream_part in zip(tf.split(x, parts), tf.split(upstream, parts)):
        with tf.control_dependencies([*x_gradients[-1:], kernel_gradient] if x_gradients else []):
            part, upstream_part = tf.identity(part), tf.identity(upstream_part)
        upstream_part = to_points(upstream_part, outputs)
        x_gradient = tf.matmul(upstream_part, values, transpose_b=True)
        x_gradients.append(tf.cast(from_points(x_gradient, inputs), x.dtype))
        kernel_gradient += tf.matmul(to_points(part, inputs), upstream_part, transpose_a=True)
    kernel_gradient = tf.reshape(kernel_gradient, [values.shape[0], -1])
    kernel_gradient = tf.matmul(kernels, kernel_gradient, transpose_a=True)
    kernel_gradient = tf.cast(tf.reshape(kernel_gradient, kernel.shape), kernel.dtype)
    return tf.concat(x_gradients, axis=0), kernel_gradient


def winograd_parts(x, kernel):
    """Return how many images to take at a time: with all at once the values take much memory.

    Where the batch's size is not known, as in evaluation, it is all of them.
    """
    if x.shape[0] is None:
        return [-1]
    points = (x.shape[1] // 4 * (kernel.shape[0] + 3)) ** 2
    at_once = max(2e6, math.prod(kernel.shape))  # values, of 4 bytes
    parts = math.ceil(x.shape[0] * points * max(kernel.shape[2:]) / at_once)
    return [len(part) for part in np.array_split(range(x.shape[0]), min(parts, x.shape[0]))]


def kernel_to_points(kernel, matrix):
    """From (r, r, channels, filters) to the values at all points, (a * a, channels, filters)."""
    r, _, channels, filters = kernel.shape
    values = matrix @ tf.cast(tf.reshape(kernel, [r * r, channels * filters]), tf.float32)
    return tf.reshape(values, [-1, channels, filters])


def winograd_matrices(size, r):
    """Return what takes a row of pixels, an r x r kernel and a row of outputs to their values.

    float32 matrices of (a * size/4, size), (a * a, r * r) and (a * size/4, size), a = r + 3: the
    paper's B^T for all tiles of a row, G for both sides of the kernel, and A for all tiles.
    """
    points, tiles = np.array(WINOGRAD_POINTS[r]), size // 4
    a = len(points) + 1  # at infinity the value of a polynomial is its highest coefficient
    others = [np.delete(points, i) for i in range(a - 1)]
    values = {k: np.vstack([np.vander(points, k, True), np.eye(k)[-1]]) for k in (r, 4)}
    kernels = values[r] / np.array([*map(np.prod, points[:, None] - others), 1])[:, None]
    pixels = np.zeros((a, a))
    for i, roots in enumerate([*others, points]):
        pixels[i, : len(roots) + 1] = np.poly(roots)[::-1]

    inputs, outputs = np.zeros((a, tiles, size + r - 1)), np.zeros((a, tiles, size))
    for tile in range(tiles):
        inputs[:, tile, 4 * tile : 4 * tile + a] = pixels
        outputs[:, tile, 4 * tile : 4 * tile + 4] = values[4]
    inputs = inputs[:, :, r // 2 : -(r // 2)]  # beyond the edges the map is 0
    inputs, outputs = (np.reshape(rows, (a * tiles, size)) for rows in (inputs, outputs))
    return [tf.constant(m, tf.float32) for m in (inputs, np.kron(kernels, kernels), outputs)]


def to_points(x, matrix):
    """From (batch, size, size, channels) to (a * a, batch * tiles, channels): matrix x matrix^T."""
    size, channels, tiles = matrix.shape[1], x.shape[-1], matrix.shape[1] // 4
    a = matrix.shape[0] // tiles
    x = matrix @ tf.cast(tf.reshape(x, [-1, size, size * channels]), tf.float32)
    x = matrix @ tf.reshape(x, [-1, size, channels])
    x = tf.transpose(tf.reshape(x, [-1, a, tiles, a, tiles * channels]), [1, 3, 0, 2, 4])
    return tf.reshape(x, [a * a, -1, channels])


def from_points(x, matrix):
    """The transpose of to_points: from (a * a, batch * tiles, channels) to the maps again."""
    size, channels, tiles = matrix.shape[1], x.shape[-1], matrix.shape[1] // 4
    a = matrix.shape[0] // tiles
    x = tf.transpose(tf.reshape(x, [a, a, -1, tiles, tiles * channels]), [2, 0, 3, 1, 4])
    x = tf.matmul(matrix, tf.reshape(x, [-1, a * tiles, channels]), transpose_a=True)
    x = tf.matmul(matrix, tf.reshape(x, [-1, a * tiles, size * channels]), transpose_a=True)
    return tf.reshape(x, [-1, size, size, channels])


# ----------------------------------------------------------------------------------------- training

STEPS_PER_EXECUTION = 1  # at most; more only help where a step takes milliseconds, as LeNet's


def scheduler(epoch, epochs=300):
    """Return the learning rate of an epoch.

    0.1, 0.01 from epoch 150 of 300, 0.001 from epoch 225.
    """
    if epoch < 150 * epochs // 300:
        return 0.1
    if epoch < 225 * epochs // 300:
        return 0.01
    return 0.001


@keras.saving.register_keras_serializable()  # for clone_model
class FusedSGD(keras.optimizers.SGD):
    """SGD with Nesterov momentum by TensorFlow's one fused operation for each variable.

    Keras' own takes several, which adds up to much of the graph that TensorFlow has to build
    before the first step.
    """

    def update_step(self, gradient, variable, learning_rate):
        tf.raw_ops.ResourceApplyKerasMomentum(
            var=variable.handle,
            accum=self.momentums[self._get_variable_index(variable)].value.handle,
            lr=tf.cast(learning_rate, variable.dtype),
            grad=gradient,
            momentum=tf.cast(self.momentum, variable.dtype),
            use_nesterov=True,
        )

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        # The rate is read once, not for each variable.
        rate = tf.convert_to_tensor(learning_rate)
        super()._backend_update_step(grads, trainable_variables, rate)


def multi_gpu_model(build, gpus):
    """Return the compiled model that build() makes, on one GPU or mirrored on several.

    Each GPU gets its share of every batch. Without a GPU, TensorFlow's logical CPU devices count.
    Raises UsageError when there are fewer devices than asked for.
    """
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    names = [device.name.removeprefix("/device:") for device in devices]
    if gpus > len(names):
        raise UsageError(f"--gpus {gpus}: TensorFlow sees only {', '.join(names)} here")
    strategy = tf.distribute.get_strategy()
    if gpus > 1:
        strategy = tf.distribute.MirroredStrategy(names[:gpus])
    with strategy.scope():
        model = build()
        model.compile(
            FusedSGD(momentum=0.9, nesterov=True),  # scheduler() sets the rate
            loss="sparse_categorical_crossentropy",
            metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        )
        # Variables that appear in the first step would have it traced a second time.
        model.optimizer.build(model.trainable_variables)
    print(f"{model.name} on {', '.join(names[:gpus])}")
    return model


class RunLog(keras.callbacks.CSVLogger):
    """Writes RUN/log.csv and then RUN/last.keras after every epoch; stops at a loss of NaN."""

    def __init__(self, run, steps_per_epoch):
        super().__init__(run / "log.csv", append=True)
        self.run, self.steps_per_epoch = run, steps_per_epoch

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch, self.start = epoch, time.perf_counter()

    def stop_unless_finite(self, loss):
        if not math.isfinite(loss):
            raise UsageError(
                f"the loss became {loss} in epoch {self.epoch + 1}: {self.run} keeps what the "
                "epochs before it reached; lower the rates in scheduler() or change --seed"
            )

    def on_train_batch_end(self, batch, logs=None):
        self.stop_unless_finite(logs["loss"])

    def on_epoch_end(self, epoch, logs=None):
        self.stop_unless_finite(logs["val_loss"])  # the last step may have spoilt the weights
        super().on_epoch_end(epoch, logs | {"seconds": time.perf_counter() - self.start})
        # float16 skips steps whose gradients overflow; resume() reads the epoch off this count.
        self.model.optimizer.iterations.assign((epoch + 1) * self.steps_per_epoch)
        # A process killed while it saves must leave the last whole checkpoint behind.
        self.model.save(self.run / "writing.keras")
        os.replace(self.run / "writing.keras", self.run / "last.keras")


def new_run(args, name):
    """Make the folder of a new run, with args.json in it, and return it."""
    folder = Path(args.log_dir, f"{name}_{args.dataset}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            run = folder / time.strftime("%Y-%m-%d_%H-%M-%S")
            try:
                run.mkdir()
                break
            except FileExistsError:  # another run began in this second
                time.sleep(0.1)
    except OSError as error:
        raise UsageError(f"cannot make {folder} ({error.strerror}): change --log_dir") from error
    options = {key: value for key, value in vars(args).items() if key != "resume"}
    saved = json.dumps({"script": Path(__file__).name} | options, indent=2)
    (run / "writing.json").write_text(saved + "\n")
    os.replace(run / "writing.json", run / "args.json")
    return run


def resume(run, model, steps_per_epoch):
    """Put the state that a run has saved into model; return how many epochs it has behind it.

    Only numbers are read from last.keras: the network is this script's, and no code in the file
    is run. Raises UsageError when the file is damaged or of another network.
    """
    epochs_done, log = 0, run / "log.csv"
    if (run / "last.keras").exists():
        try:
            model.load_weights(run / "last.keras")
        except Exception as error:  # zipfile, h5py and Keras each raise their own
            raise UsageError(
                f"{run}/last.keras is damaged or of another network: start a new run"
            ) from error
        epochs_done = int(model.optimizer.iterations.numpy()) // steps_per_epoch
        for layer in model.layers:
            if isinstance(layer, layers.Dropout):  # its state, (seed, steps so far), is not saved
                state = layer.seed_generator.state
                state.assign(state + [0, epochs_done * steps_per_epoch])
    if log.exists():  # a kill between log.csv and last.keras leaves a row too many
        # split() also takes away the empty lines that CSVLogger leaves on Windows.
        rows = log.read_bytes().split()[: 1 + epochs_done if epochs_done else 0]
        (run / "writing.csv").write_bytes(b"".join(row + b"\n" for row in rows))
        os.replace(run / "writing.csv", log)
    return epochs_done


def stock_layer(layer):
    """Return a new layer of the Keras class that layer has or derives from."""
    stock = next(c for c in type(layer).__mro__ if c.__module__.startswith("keras."))
    config = layer.get_config()
    config.pop("synchronized", None)  # for several GPUs; Keras refuses it on other backends
    return stock.from_config(config)


def stock_model(model):
    """Return a copy of model that keras.models.load_model loads without this script."""
    clone = keras.models.clone_model(model, clone_function=stock_layer)
    stock = keras.Model(clone.inputs, clone.outputs, name=model.name)
    stock.set_weights(model.get_weights())
    stock.compile("sgd", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return stock


def draw_curves(run):
    """Draw RUN/log.csv: loss and accuracy of training and test, and the learning rate."""
    log = np.atleast_1d(np.genfromtxt(run / "log.csv", delimiter=",", names=True))
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3), ("loss", "accuracy", "learning_rate")):
        axes.plot(log["epoch"] + 1, log[name], label="training")
        if f"val_{name}" in log.dtype.names:
            axes.plot(log["epoch"] + 1, log[f"val_{name}"], label="test")
            axes.legend()
        axes.set(xlabel="epoch", title=name.replace("_", " "))
        axes.grid(alpha=0.3)
    axes.set_yscale("log")  # of the last, the learning rate
    figure.savefig(run / "curves.png", dpi=150)


def draw_confusion(run, labels, predicted, dataset):
    """Draw RUN/confusion.png: how many test images of each class were taken for which."""
    num_classes = NUM_CLASSES[dataset]
    counts = tf.math.confusion_matrix(labels, predicted, num_classes).numpy()
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(counts, cmap="Blues"), ax=axes)
    axes.set(xlabel="predicted", ylabel="label", title="test images")
    if num_classes == 10:
        if dataset == "cifar10":
            axes.set_xticks(range(num_classes), CLASS_NAMES, rotation=45, ha="right")
            axes.set_yticks(range(num_classes), CLASS_NAMES)
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if count > counts.max() / 2 else "black"
            axes.text(column, row, count, ha="center", va="center", color=colour, fontsize=8)
    figure.savefig(run / "confusion.png", dpi=150)


def main():
    args = parse_args()
    if args.resume and Path(args.resume, "model.keras").exists():
        print(f"{args.resume} is finished: there is nothing to go on with.")
        return
    keras.utils.set_random_seed(args.seed)
    keras.config.set_dtype_policy(args.precision)
    keras.config.set_image_data_format("channels_last")  # whatever ~/.keras/keras.json says
    if emulated(keras.config.dtype_policy().compute_dtype):
        slow = f"Warning: this processor has no {args.precision.removeprefix('mixed_')}: "
        print(slow + "float32 is faster.", file=sys.stderr)
    (x_train, y_train), (x_test, y_test) = load_data(args.dataset, args.data_dir)
    steps_per_epoch = len(x_train) // args.batch_size
    if not steps_per_epoch:
        too_many = f"--batch_size {args.batch_size} is more than the {len(x_train)} training images"
        raise UsageError(too_many)

    model = multi_gpu_model(lambda: build_network(args), args.gpus)
    if args.gpus == 1:  # a mirrored model fails with more than one, as of Keras 3.15
        fitting = (n for n in range(1, STEPS_PER_EXECUTION + 1) if steps_per_epoch % n == 0)
        model.steps_per_execution = max(fitting)
    run = Path(args.resume) if args.resume else new_run(args, model.name)
    try:
        epochs_done = resume(run, model, steps_per_epoch) if args.resume else 0
        parameters = sum(math.prod(v.shape) for v in model.trainable_variables)
        print(f"{parameters:,} trainable parameters. Run: {run}")
        train = train_batches(
            x_train, y_train, args.batch_size, args.seed, epochs_done, args.epochs
        )
        test = untuned(tf.data.Dataset.from_tensor_slices((x_test, y_test)).batch(args.batch_size))
        if epochs_done < args.epochs:  # a run may have been killed while it drew
            model.fit(
                train,
                validation_data=test,
                epochs=args.epochs,
                initial_epoch=epochs_done,
                steps_per_epoch=steps_per_epoch,
                shuffle=False,
                verbose=1 if sys.stdout.isatty() else 2,
                callbacks=[
                    keras.callbacks.LearningRateScheduler(
                        lambda epoch: scheduler(epoch, args.epochs)
                    ),
                    keras.callbacks.TensorBoard(run, write_graph=False),
                    RunLog(run, steps_per_epoch),
                ],
            )
        loss, accuracy = model.evaluate(test, verbose=0)
        predicted = model.predict(test, verbose=0).argmax(axis=-1)
        draw_curves(run)
        draw_confusion(run, y_test, predicted, args.dataset)
        stock_model(model).save(run / "writing.keras")
        os.replace(run / "writing.keras", run / "model.keras")  # last: it marks a finished run
    except KeyboardInterrupt:
        command = shlex.join(["python", sys.argv[0], "--resume", str(run)])
        sys.exit(f"Interrupted. To go on: {command}")
    except OSError as error:  # a full disk, for one
        raise UsageError(f"{error}; mend that and go on with --resume {run}") from error
    print(f"Run: {run}")
    print(f"Test accuracy {accuracy:.4f}, loss {loss:.4f} after epoch {args.epochs}.")


if __name__ == "__main__":
    try:
        main()
    except tf.errors.ResourceExhaustedError:
        sys.exit(f"{Path(__file__).name}: error: out of memory: lower --batch_size")
    except (UsageError, OSError) as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted.")
