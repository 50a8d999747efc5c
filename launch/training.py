"""Less for TensorFlow to do around the layers: SGD, weight decay, and the way from step to step."""

import functools
import inspect
import math

import keras
import tensorflow as tf

SGD, Model, Callback = keras.optimizers.SGD, keras.Model, keras.callbacks.Callback
keras_update_step, keras_update_steps = SGD.update_step, SGD._backend_update_step
keras_regularization_losses = Model._get_regularization_losses
keras_fit = Model.fit


def update_step(self, gradient, variable, learning_rate):
    """One step of SGD with momentum, with or without Nesterov's, as one fused operation.

    Keras' own takes several for each variable, which adds up to much of the graph that TensorFlow
    has to build before the first step.
    """
    usual = type(self) is SGD and self.momentum and isinstance(variable, tf.Variable)
    if not usual or not isinstance(gradient, tf.Tensor):  # of an embedding: only some rows
        return keras_update_step(self, gradient, variable, learning_rate)
    tf.raw_ops.ResourceApplyKerasMomentum(
        var=variable.handle,
        accum=self.momentums[self._get_variable_index(variable)].value.handle,
        lr=tf.cast(learning_rate, variable.dtype),
        grad=tf.cast(gradient, variable.dtype),
        momentum=tf.cast(self.momentum, variable.dtype),
        use_nesterov=bool(self.nesterov),
    )


def update_steps(self, grads, trainable_variables, learning_rate):
    """Update all variables, for which the learning rate is read once."""
    keras_update_steps(self, grads, trainable_variables, tf.convert_to_tensor(learning_rate))


def regularization_losses(self):
    """Return weight decay as one loss, where Keras has one for each kernel: less to trace.

    It is the factor of keras.regularizers.L2 times the sum of squares. Other regularizers keep
    their losses, and so does everything that is no regularizer; outside of tf.function, where a
    script may look at them one by one, all do.
    """
    if tf.executing_eagerly() or not any(map(decays, self.trainable_weights)):
        return keras_regularization_losses(self)
    others, halves = [], {}
    for variable in self.trainable_weights:
        if decays(variable):
            kind = variable.regularizer.l2, variable.dtype
            halves.setdefault(kind, []).append(tf.nn.l2_loss(variable))
        elif variable.regularizer:
            others.append(variable.regularizer(variable))
    return others + [2 * factor * tf.add_n(terms) for (factor, _), terms in halves.items()]


def decays(variable):
    return type(variable.regularizer) is keras.regularizers.L2


MOST_STEPS = 30  # in one go
FEWEST_STEPS = 1000  # in a fit for which it is worth tracing the step anew
LARGEST_WORK = 2e6  # multiplications per example: a step takes milliseconds


@functools.wraps(keras_fit)
def fit(self, *args, **kwargs):
    """Train several steps in one go where a step takes about as long as the way to the next.

    Only training does: evaluation may be asked for a number of steps that is no multiple.
    """
    given = inspect.signature(keras_fit).bind(self, *args, **kwargs)
    given.apply_defaults()
    steps = steps_per_execution(self, given.arguments)
    if steps == 1:
        return keras_fit(self, *args, **kwargs)
    given.arguments["callbacks"] = [SeveralSteps(steps), given.arguments["callbacks"] or []]
    try:
        self.steps_per_execution, self.train_function = steps, None
        return keras_fit(*given.args, **given.kwargs)
    finally:
        self.steps_per_execution, self.train_function = 1, None


class SeveralSteps(Callback):
    """Has training, and nothing else, see a steps_per_execution of more than 1."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def on_train_begin(self, logs=None):
        self.model.steps_per_execution = 1

    def on_train_batch_begin(self, batch, logs=None):
        self.model.steps_per_execution = self.steps

    def on_train_batch_end(self, batch, logs=None):
        self.model.steps_per_execution = 1


def steps_per_execution(model, given):
    """Return how many steps to train in one go: 1, or a divisor of the steps of an epoch."""
    steps = given["steps_per_epoch"] or 0
    if not steps and isinstance(given["x"], tf.data.Dataset):
        steps = int(given["x"].cardinality())  # negative if it is not known
    if (
        steps * (given["epochs"] - given["initial_epoch"]) < FEWEST_STEPS
        or model.steps_per_execution != 1
        or model.run_eagerly
        or type(model).train_step is not Model.train_step
        or model.distribute_strategy.num_replicas_in_sync > 1
        or isinstance(given["callbacks"], keras.callbacks.CallbackList)
        or any(map(watches_steps, keras.tree.flatten(given["callbacks"] or [])))
        or work(model) > LARGEST_WORK
    ):
        return 1
    return max(n for n in range(1, MOST_STEPS + 1) if steps % n == 0)


def watches_steps(callback):
    """Whether a callback does something after certain steps, not only at the end of epochs."""
    hooks = "on_batch_begin", "on_batch_end", "on_train_batch_begin", "on_train_batch_end"
    methods = (getattr(getattr(callback, hook), "__func__", None) for hook in hooks)
    if all(method is getattr(Callback, hook) for method, hook in zip(methods, hooks)):
        return False
    if type(callback) is keras.callbacks.ModelCheckpoint:
        return callback.save_freq != "epoch"
    if type(callback) is keras.callbacks.TensorBoard:
        profiles = getattr(callback, "_should_trace", True)
        return callback.update_freq != "epoch" or callback.write_steps_per_second or profiles
    return type(callback) is not keras.callbacks.ProgbarLogger


def work(model):
    """Return how many multiplications a model takes per example, infinity if it is not known."""
    total = 0
    for layer in model.layers:
        if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense)):
            try:
                total += math.prod((*layer.kernel.shape, *layer.output.shape[1:-1]))
            except (AttributeError, ValueError, TypeError):  # of no graph, of several, of any size
                return math.inf
        elif layer.trainable_weights and not isinstance(layer, keras.layers.BatchNormalization):
            return math.inf
    return total


METHODS = [
    (SGD, "update_step", update_step),
    (SGD, "_backend_update_step", update_steps),
    (Model, "_get_regularization_losses", regularization_losses),
    (Model, "fit", fit),
]
