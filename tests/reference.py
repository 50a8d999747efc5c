"""The operations of convolutional networks in NumPy, to check what the networks compute."""

import re

import numpy as np
from conftest import load
from keras import layers

RNG = np.random.default_rng(0)
MEAN, VARIANCE = (100.0, 110.0, 120.0), (2500.0, 3600.0, 4900.0)


def build(script, options="", num_classes=10):
    """Build the network that a script trains with the options of a command line."""
    script = load(script)
    args = script.parse_args(options.split())
    return script.build_network(args, (32, 32, 3), num_classes, MEAN, VARIANCE)


def layers_of(model, kind):
    """The layers of one class in the order in which the script makes them.

    Their automatic names count them; model.layers has them in another order where paths meet.
    """
    found = [layer for layer in model.layers if type(layer) is kind]
    return sorted(found, key=lambda layer: int(re.search(r"\d*$", layer.name)[0] or 0))


def maps(model, kind):
    """The shapes of what the layers of one class, or the convolutions of one size, make."""
    found = layers_of(model, layers.Conv2D if isinstance(kind, int) else kind)
    if isinstance(kind, int):
        found = [layer for layer in found if layer.kernel_size == (kind, kind)]
    return [layer.output.shape[1:] for layer in found]


def trainable(model):
    """The number of trainable parameters."""
    return sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)


def kernels(model):
    """The kernels of all convolutions and fully connected layers."""
    return [variable for variable in model.trainable_variables if variable.name == "kernel"]


def randomize(model):
    """Give every variable, moving averages included, a value that no other has.

    Kernels keep the size of what flows through them, so that softmax has something to choose from.
    """
    rng = np.random.default_rng(1)
    for variable in model.variables:
        low, high = (0.5, 1.5) if variable.name in ("gamma", "moving_variance") else (-0.5, 0.5)
        if variable.name == "kernel":
            high = np.sqrt(6 / np.prod(variable.shape[:-1]))
            low = -high
        if variable.dtype == "float32":  # the others count steps
            variable.assign(rng.uniform(low, high, variable.shape))


def some_pixels(count=2):
    """Noise as (count, 32, 32, 3) images of whole numbers from 0 to 255."""
    return np.random.default_rng(2).integers(0, 256, (count, 32, 32, 3), np.uint8)


class Weights:
    """Operations with the weights of a network's layers, each used once, in order."""

    def __init__(self, model):
        kinds = layers.Conv2D, layers.BatchNormalization, layers.Dense
        self.unused = {kind: layers_of(model, kind)[::-1] for kind in kinds}

    def next(self, kind):
        return self.unused[kind].pop().get_weights()

    def conv(self, x, strides=1, padding=None):
        """A convolution; without padding given, as many pixels on all sides as its middle needs."""
        kernel, *bias = self.next(layers.Conv2D)
        return conv(x, kernel, strides, padding) + sum(bias)

    def bn(self, x):
        """Inference of batch normalisation."""
        gamma, beta, mean, variance = self.next(layers.BatchNormalization)
        return gamma * (x - mean) / np.sqrt(variance + 1e-5) + beta

    def bn_relu(self, x):
        return relu(self.bn(x))

    def conv_bn(self, x, strides=1, groups=1):
        """Convolutions of so many groups of channels, side by side, and batch normalisation."""
        parts = [self.conv(part, strides) for part in np.split(x, groups, 3)]
        return self.bn(np.concatenate(parts, 3))

    def dense(self, x):
        kernel, *bias = self.next(layers.Dense)
        return x @ kernel + sum(bias)

    def head(self, x):
        return softmax(self.dense(x.mean((1, 2))))


def relu(x):
    return np.maximum(x, 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    x = np.exp(x - x.max(1, keepdims=True))
    return x / x.sum(1, keepdims=True)


def windows(x, size, strides, edges=(0, 0), fill=0.0):
    """Yield for each position (i, j) in a window the pixels of all windows that lie there.

    edges are the numbers of pixels to add above and left of x, and below and right of it.
    """
    x = np.pad(x, ((0, 0), edges, edges, (0, 0)), constant_values=fill)
    end = (x.shape[1] - size) // strides * strides + 1
    for i in range(size):
        for j in range(size):
            yield x[:, i : i + end : strides, j : j + end : strides]


def conv(x, kernel, strides=1, padding=None):
    """A convolution as Torch has it, a kernel position at a time."""
    size = len(kernel)
    padding = size // 2 if padding is None else padding
    pixels = windows(x, size, strides, (padding, padding))
    return sum(p @ k for p, k in zip(pixels, kernel.reshape(-1, *kernel.shape[2:])))


def max_pool(x, size, strides=None, edges=(0, 0)):
    return np.max(list(windows(x, size, strides or size, edges, fill=-np.inf)), axis=0)


def average_pool(x, size):
    return np.mean(list(windows(x, size, size)), axis=0)
