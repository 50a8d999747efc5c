"""Keras' Conv2D by matrix products and other ways that are faster on processors."""

import math

import keras
import numpy as np
import tensorflow as tf

from .processor import emulated, processor_flags

Conv2D = keras.layers.Conv2D
keras_convolution_op, keras_call = Conv2D.convolution_op, Conv2D.call


def convolution_op(self, inputs, kernel):
    """The convolution_op of keras.layers.Conv2D: its results but for rounding.

    Groups of channels, whose kernels are slow on processors, are convolutions of their own. Numbers
    that the processor would emulate are float32 on the way, in which their products are exact.
    """
    numbers = ("float32", "bfloat16", "float16")
    if not tf.is_tensor(inputs) or self.compute_dtype not in numbers:
        return keras_convolution_op(self, inputs, kernel)
    dtype = "float32" if emulated(self.compute_dtype) else self.compute_dtype
    x, kernel = tf.cast(inputs, dtype), tf.cast(kernel, dtype)
    known = x.shape.rank == 4 and None not in (*x.shape[1:], *kernel.shape)
    if not known or self.dilation_rate != (1, 1) or self.data_format != "channels_last":
        return tf.cast(keras_convolution_op(self, x, kernel), self.compute_dtype)
    options, groups = (self.strides, self.padding), x.shape[-1] // kernel.shape[2]
    if groups == 1:
        outputs = convolve(x, kernel, *options)
    else:
        pairs = zip(tf.split(x, groups, axis=-1), tf.split(kernel, groups, axis=-1))
        outputs = tf.concat([convolve(*pair, *options) for pair in pairs], axis=-1)
    return tf.cast(outputs, self.compute_dtype)


def convolve(x, kernel, strides, padding):
    """Convolve (batch, height, width, channels) x by the way that is fastest for its shape.

    kernel is (height, width, channels, filters); padding is "same" or "valid".
    """
    height, width, channels, filters = kernel.shape
    size, dtype, usual = x.shape[1], x.dtype, strides == (1, 1) and height == width
    map_size = math.prod(x.shape[1:3]) // math.prod(strides) * filters
    large = min(channels, filters) >= 64 and map_size >= 2**14
    if usual and height == 1 and dtype == tf.float32:
        return pointwise_in_order(x, kernel) if large else pointwise(x, kernel)
    usual = usual and padding == "same" and size == x.shape[2]
    if usual and height == 3 and size == 2:
        return conv2d_2x2(x, kernel)
    least_channels = least_channels_for_winograd(height, size, dtype)
    if usual and size % 4 == 0 and min(channels, filters) >= least_channels:
        return winograd(x, kernel)
    convolution = conv2d_in_order if large else tf.nn.conv2d
    return convolution(x, kernel, strides, padding.upper())


def call(self, inputs):
    """The call of keras.layers.Conv2D, whose bias gets its right gradient in bfloat16, too."""
    if not (self.use_bias and self.data_format == "channels_last" and tf.is_tensor(inputs)):
        return keras_call(self, inputs)
    outputs, bias = self.convolution_op(inputs, self.kernel), tf.convert_to_tensor(self.bias)
    add = add_bias if outputs.dtype == bias.dtype else keras.ops.add
    outputs = add(outputs, bias)
    return outputs if self.activation is None else self.activation(outputs)


@tf.custom_gradient
def add_bias(x, bias):
    """Add (filters,) bias to (batch, height, width, filters) x; its gradient is a sum in float32.

    In bfloat16, where 256 + 1 is 256, it would end long before all pixels are counted.
    """

    def gradient(upstream):
        dtype = tf.float64 if bias.dtype == tf.float64 else tf.float32
        total = tf.raw_ops.BiasAddGrad(out_backprop=tf.cast(upstream, dtype))
        return upstream, tf.cast(total, bias.dtype)

    return tf.nn.bias_add(x, bias), gradient


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
    if not x.shape[0]:
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


METHODS = [(Conv2D, "convolution_op", convolution_op), (Conv2D, "call", call)]
