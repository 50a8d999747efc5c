"""The operations of convolutional networks in NumPy, to check what the networks compute."""

import numpy as np

RNG = np.random.default_rng(0)


def trainable(model):
    """The number of trainable parameters."""
    return sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)


def randomize(model):
    """Give every variable, moving averages included, a value that no other has.

    Kernels keep the size of what flows through them, so that softmax has something to choose from.
    """
    for variable in model.variables:
        low, high = (0.5, 1.5) if variable.name in ("gamma", "moving_variance") else (-0.5, 0.5)
        if variable.name == "kernel":
            high = np.sqrt(6 / np.prod(variable.shape[:-1]))
            low = -high
        if variable.dtype == "float32":  # the others count steps
            variable.assign(RNG.uniform(low, high, variable.shape))


def relu(x):
    return np.maximum(x, 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    x = np.exp(x - x.max(1, keepdims=True))
    return x / x.sum(1, keepdims=True)


def bn(x, layer):
    """Inference of batch normalisation."""
    gamma, beta, mean, variance = layer.get_weights()
    return gamma * (x - mean) / np.sqrt(variance + 1e-5) + beta


def bn_relu(x, layer):
    return relu(bn(x, layer))


def edges(size, window, strides):
    """How many pixels TensorFlow adds before and after size for padding "same"."""
    total = max((-(-size // strides) - 1) * strides + window - size, 0)
    return total // 2, total - total // 2


def windows(x, size, strides, padding, fill=0.0):
    """Yield for each position (i, j) in a window the pixels of all windows that lie there."""
    edge = edges(x.shape[1], size, strides) if padding == "same" else (0, 0)
    x = np.pad(x, ((0, 0), edge, edge, (0, 0)), constant_values=fill)
    end = (x.shape[1] - size) // strides * strides + 1
    for i in range(size):
        for j in range(size):
            yield x[:, i : i + end : strides, j : j + end : strides]


def conv(x, kernel, strides=1, padding="same", groups=1):
    """A convolution, a kernel position at a time; a group sees its own slice of the channels."""
    parts = []
    for part, kernels in zip(np.split(x, groups, 3), np.split(kernel, groups, 3)):
        positions = kernels.reshape(-1, *kernels.shape[2:])
        pixels = windows(part, kernel.shape[0], strides, padding)
        parts.append(sum(p @ k for p, k in zip(pixels, positions)))
    return np.concatenate(parts, 3)


def max_pool(x, size, strides=None, padding="valid"):
    pixels = windows(x, size, strides or size, padding, fill=-np.inf)
    return np.max(list(pixels), axis=0)


def average_pool(x, size):
    return np.mean(list(windows(x, size, size, "valid")), axis=0)
