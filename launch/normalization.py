"""Keras' normalising layers by TensorFlow's fused operation, and as rows of numbers."""

import math

import keras
import tensorflow as tf

from .processor import emulated

BatchNormalization, Normalization = keras.layers.BatchNormalization, keras.layers.Normalization
keras_batch_normalization, keras_normalization = BatchNormalization.call, Normalization.call


def batch_normalization(self, inputs, training=None, mask=None):
    """The call of keras.layers.BatchNormalization for (batch, height, width, channels) inputs.

    Keras computes with a dozen elementwise operations what one fused operation does here, moving
    statistics included. It takes several times as long where channels are no multiple of 16, as in
    most of DenseNet's layers; there normalize_pixel_groups does it. Numbers that the processor
    would emulate are float32 on the way.
    """
    training = bool(training and self.trainable)
    if not fusible(self, inputs, training, mask):
        return keras_batch_normalization(self, inputs, training=training, mask=mask)
    x = tf.cast(inputs, "float32") if emulated(self.compute_dtype) else inputs
    moving_mean, moving_variance = map(
        tf.convert_to_tensor, (self.moving_mean, self.moving_variance)
    )
    scale = tf.convert_to_tensor(self.gamma) if self.scale else tf.ones_like(moving_mean)
    offset = tf.convert_to_tensor(self.beta) if self.center else tf.zeros_like(moving_mean)
    variables = scale, offset, moving_mean, moving_variance
    if pixels_per_group(x.shape) > 1:
        outputs, mean, variance = normalize_pixel_groups(x, *variables, self.epsilon, training)
    else:
        outputs, mean, variance = fused(x, *variables, self.epsilon, training)
    if training:
        old, new = self.momentum, 1 - self.momentum
        self.moving_mean.assign(moving_mean * old + mean * new)
        self.moving_variance.assign(moving_variance * old + variance * new)
    return tf.cast(outputs, self.compute_dtype)


def fusible(layer, inputs, training, mask):
    """Whether the fused operation computes what the layer does."""
    if not tf.is_tensor(inputs) or inputs.shape.rank != 4 or inputs.shape[-1] is None:
        return False
    if training and tf.distribute.get_strategy().num_replicas_in_sync > 1:
        return False  # averages over all replicas
    usual = layer.axis in (-1, 3) and mask is None and not getattr(layer, "renorm", False)
    numbers = ("float32", "bfloat16", "float16")
    return (
        usual
        and inputs.dtype == layer.compute_dtype
        and layer.compute_dtype in numbers
        and layer.variable_dtype == "float32"
    )


def fused(x, scale, offset, mean, variance, epsilon, training):
    """Return x normalised and, in training, the batch's mean and (biased) variance."""
    results = tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=scale,
        offset=offset,
        mean=mean,
        variance=variance,
        epsilon=epsilon,
        is_training=training,
    )
    return results.y, results.reserve_space_1, results.reserve_space_2


def pixels_per_group(shape):
    """Return how many pixels of a (batch, height, width, channels) map have 16n channels."""
    height, width, channels = shape[1:]
    pixels = 16 // math.gcd(channels, 16)
    return pixels if height and width and height * width % pixels == 0 else 1


def normalize_pixel_groups(x, scale, offset, mean, variance, epsilon, training):
    """Normalise (batch, height, width, channels) as groups of pixels with 16n channels.

    Neighbouring pixels lie next to each other in memory, so 4 of 36 channels can be seen as one
    of 144. In training the fused operation finds the statistics of the 144, which combine into
    those of the 36; the rest follows, and so does its gradient (Ioffe and Szegedy 2015, section 3).
    Returns x normalised and, in training, the batch's mean and (biased) variance.
    """
    height, width, channels = x.shape[1:]
    pixels = pixels_per_group(x.shape)
    grouped = [-1, height * width // pixels, 1, pixels * channels]
    zeros = tf.zeros([pixels * channels])

    def of_groups(*vectors):
        return tf.unstack(tf.tile(tf.stack(vectors), [1, pixels]))

    def sum_of_pixels(vector):
        return tf.reduce_sum(tf.reshape(vector, [pixels, channels]), axis=0)

    def normalized(x, scale, offset, mean, variance):
        groups = fused(tf.reshape(x, grouped), scale, offset, mean, variance, epsilon, False)[0]
        return tf.reshape(groups, tf.shape(x))

    if not training:
        return normalized(x, *of_groups(scale, offset, mean, variance)), mean, variance

    mean, variance = moments_of_pixel_groups(tf.reshape(tf.stop_gradient(x), grouped), pixels)

    @tf.custom_gradient
    def normalize(x, scale, offset):
        vectors = of_groups(scale, offset, mean, variance)

        def gradient(upstream):
            # Mean and variance count as constants here, which a second derivative would believe.
            no_second = "Second derivatives of this layer need a run without launch/cpu.py."
            inputs = tf.raw_ops.PreventGradient(input=x, message=no_second)
            scaled, scale_gradient, offset_gradient, *_ = tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=tf.reshape(upstream, grouped),
                x=tf.reshape(inputs, grouped),
                scale=vectors[0],
                reserve_space_1=vectors[2],
                reserve_space_2=vectors[3],
                reserve_space_3=zeros,
                epsilon=epsilon,
                is_training=False,
            )
            scale_gradient = sum_of_pixels(scale_gradient)
            offset_gradient = sum_of_pixels(offset_gradient)
            # What mean and variance add to the gradient is linear in x.
            inverse = tf.math.rsqrt(variance + epsilon)
            weight = -scale * inverse / tf.cast(tf.size(x) // channels, tf.float32)
            slope = weight * inverse * scale_gradient
            constant = weight * offset_gradient - slope * mean
            unit = zeros + (1 - epsilon)
            linear = normalized(inputs, *of_groups(slope, constant), zeros, unit)
            return tf.reshape(scaled, tf.shape(x)) + linear, scale_gradient, offset_gradient

        return normalized(x, *vectors), gradient

    return normalize(x, scale, offset), mean, variance


def moments_of_pixel_groups(x, pixels):
    """Return the mean and variance of (batch, groups, 1, pixels * channels) x, each (channels,)."""
    zeros = tf.zeros(x.shape[-1:])
    _, means, variances = fused(x, zeros, zeros, zeros, zeros, epsilon=1, training=True)
    means, variances = (tf.reshape(values, [pixels, -1]) for values in (means, variances))
    mean = tf.reduce_mean(means, axis=0)
    return mean, tf.reduce_mean(variances + tf.square(means - mean), axis=0)


def normalization(self, inputs):
    """The call of keras.layers.Normalization for images, (batch, height, width, channels).

    They are normalised as rows of width * channels numbers, since vectors of 3 are slow to
    broadcast: the same results, a third of the time.
    """
    shape = inputs.shape if tf.is_tensor(inputs) else tf.TensorShape(None)
    usual = shape.rank == 4 and None not in tuple(shape[1:]) and shape[-1] < 16
    if not usual or self.invert or self.mean is None or self.mean.shape != (1, 1, 1, shape[-1]):
        return keras_normalization(self, inputs)
    _, height, width, channels = shape
    mean, variance = (
        tf.tile(tf.reshape(tf.cast(v, self.compute_dtype), [channels]), [width])
        for v in (self.mean, self.variance)
    )
    deviation = tf.maximum(tf.sqrt(variance), tf.cast(keras.config.epsilon(), self.compute_dtype))
    rows = tf.reshape(tf.cast(inputs, self.compute_dtype), [-1, height, width * channels])
    return tf.reshape((rows - mean) / deviation, tf.shape(inputs))


METHODS = [
    (BatchNormalization, "call", batch_normalization),
    (Normalization, "call", normalization),
]
