"""launch/training.py: SGD, weight decay and several steps in one go, with Keras' own results."""

import importlib
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

sys.path.insert(0, str(Path(__file__).parents[1]))
faster = importlib.import_module("launch.cpu").faster
training = importlib.import_module("launch.training")

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(40, 4, 4, 2)).astype("float32")
LABELS = RNG.integers(0, 3, 40)


def network(regularizer="l2"):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((4, 4, 2)),
            layers.Conv2D(4, 3, kernel_regularizer=regularizer, name="conv"),
            layers.Flatten(name="flatten"),
            layers.Dense(3, activation="softmax", kernel_regularizer=regularizer, name="dense"),
        ],
        name="network",
    )


def variables(dtype="float32"):
    rng = np.random.default_rng(1)
    shapes = {"kernel": (3, 3, 2, 4), "bias": (4,)}
    return [keras.Variable(rng.normal(size=shapes[n]), name=n, dtype=dtype) for n in shapes]


def several_steps(optimizer, dtype="float32"):
    """Return the names and values of an optimizer's variables, and of what it has trained."""
    trained, rng = variables(dtype), np.random.default_rng(2)
    for _ in range(7):
        gradients = [tf.constant(rng.normal(size=v.shape), dtype) for v in trained]
        optimizer.apply(gradients, trained)
    state = [*trained, *optimizer.variables]
    return [v.path for v in state], [v.numpy() for v in state]


def fused_updates(optimizer):
    """Return how many of two variables are updated by the fused operation in a graph."""
    trained = variables()
    optimizer.build(trained)
    gradients = [tf.ones(variable.shape) for variable in trained]
    graph = tf.function(lambda: optimizer.apply(gradients)).get_concrete_function().graph
    bodies = [graph, *(function.graph for function in graph._functions.values())]
    found = [op.type for body in bodies for op in body.get_operations()]
    return found.count("ResourceApplyKerasMomentum")


class Signed(keras.optimizers.SGD):
    """A user's own rule."""

    def assign_add(self, variable, value):
        super().assign_add(variable, keras.ops.sign(value) * 0.01)


OPTIMIZERS = [
    (lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True), True),
    (lambda: keras.optimizers.SGD(0.1, momentum=0.9), True),
    (lambda: keras.optimizers.SGD(0.1, 0.9, True, weight_decay=0.1), True),
    (lambda: keras.optimizers.SGD(0.1, 0.9, True, use_ema=True, ema_overwrite_frequency=4), True),
    (lambda: keras.optimizers.SGD(0.1, 0.9, True, clipnorm=0.1), True),
    (lambda: keras.optimizers.SGD(0.1, 0.9, True, global_clipnorm=0.1), True),
    (lambda: keras.optimizers.SGD(0.1, 0.9, True, gradient_accumulation_steps=3), True),
    (lambda: keras.optimizers.SGD(0.1, 0.9, True, loss_scale_factor=8.0), True),
    (
        lambda: keras.optimizers.SGD(
            keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5), 0.9, nesterov=True
        ),
        True,
    ),
    (lambda: keras.optimizers.SGD(0.1), False),
    (lambda: Signed(0.1, 0.9), False),
    (lambda: keras.optimizers.Adam(0.01), False),
]


@pytest.mark.parametrize("optimizer, fused", OPTIMIZERS)
def test_optimizers_are_keras_own(optimizer, fused):
    """Names and order of the variables, too, so that a checkpoint continues in the other."""
    expected_names, expected = several_steps(optimizer())
    with faster():
        names, results = several_steps(optimizer())
        assert fused_updates(optimizer()) == (2 if fused else 0)
    assert [name.split("/")[-1] for name in names] == [n.split("/")[-1] for n in expected_names]
    for ours, theirs in zip(results, expected):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float16", 1e-2)])
def test_steps_of_other_numbers_are_keras_own(dtype, tolerance):
    sgd = {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True}
    _, expected = several_steps(keras.optimizers.SGD(**sgd), dtype)
    with faster():
        _, results = several_steps(keras.optimizers.SGD(**sgd), dtype)
    for ours, theirs in zip(results, expected):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_embeddings_keep_their_sparse_updates():
    def run():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([layers.Embedding(50, 4), layers.Flatten(), layers.Dense(3)])
        model.compile(keras.optimizers.SGD(0.1, 0.9, True), "mse")
        model.fit(LABELS[:, None], IMAGES[:, 0, 0, :1], epochs=2, shuffle=False, verbose=0)
        return model.get_weights()

    expected = run()
    with faster():
        for ours, theirs in zip(run(), expected):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_learning_rate_is_read_once_a_step():
    model = network()
    optimizer = keras.optimizers.SGD(0.1, 0.9, True)
    optimizer.build(model.trainable_variables)
    gradients = [tf.ones(variable.shape) for variable in model.trainable_variables]
    with faster():
        graph = tf.function(lambda: optimizer.apply(gradients)).get_concrete_function().graph
    reads = [op for op in graph.get_operations() if op.type == "ReadVariableOp"]
    assert [op.get_attr("dtype") for op in reads].count(tf.float32) == 1
    before = model.get_weights()
    with faster():
        optimizer.learning_rate = 0.5
        optimizer.apply(gradients)
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_allclose(new, old - 1.9 * 0.5, rtol=1e-5)


class WithLoss(layers.Layer):
    def call(self, inputs):
        self.add_loss(keras.ops.mean(inputs**2))
        return inputs


def test_weight_decay_is_one_loss_and_all_others_stay(monkeypatch):
    l2 = keras.regularizers.L2
    inputs = keras.Input((4, 4, 2))
    x = WithLoss()(inputs)
    x = layers.Conv2D(4, 1, kernel_regularizer=l2(5e-4), name="first")(x)
    x = layers.Conv2D(4, 1, kernel_regularizer=l2(5e-4), dtype="mixed_bfloat16")(x)
    x = layers.Conv2D(4, 1, kernel_regularizer=l2(0.25), bias_regularizer="l1")(x)
    x = layers.Conv2D(4, 1, kernel_regularizer=keras.regularizers.L1L2(0.1, 0.2))(x)
    model = keras.Model(inputs, layers.Conv2D(2, 1, activity_regularizer=l2(0.5))(x))
    model.layers[4].bias.assign([1, 2, 3, 4])
    kernels = [v.value for v in model.trainable_variables]

    def losses():
        with tf.GradientTape() as tape:
            model(IMAGES)
            terms = model.losses
            loss = tf.add_n([tf.cast(term, tf.float32) for term in terms])
        return terms, loss, tape.gradient(loss, kernels, unconnected_gradients="zero")

    for trainable in True, False:
        model.get_layer("first").trainable = trainable
        results = []
        for merged in True, False:
            with monkeypatch.context() as patch:
                if merged:
                    name = "_get_regularization_losses"
                    patch.setattr(keras.Model, name, training.regularization_losses)
                terms, loss, gradients = tf.function(losses)()
                assert len(model.losses) == 6 + trainable  # eagerly, one by one
            results.append([loss, *gradients])
            assert len(terms) == (6 if merged else 6 + trainable)
        for ours, theirs in zip(*results):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.fixture
def small_fits(monkeypatch):
    monkeypatch.setattr(training, "FEWEST_STEPS", 8)


def dataset():
    return tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).batch(4, drop_remainder=True)


class Watch(keras.callbacks.Callback):
    """Notes what a callback can see."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        steps = int(self.model.optimizer.iterations.numpy())
        # A number of steps that is no multiple of those that training takes at a time.
        three = self.model.evaluate(dataset(), steps=3, verbose=0)
        self.seen.append((epoch, self.params["steps"], steps, three, logs["val_loss"]))


def fit_with_a_watch(*more):
    model, watch = network(), Watch()
    model.compile(keras.optimizers.SGD(0.1, 0.9, True), "sparse_categorical_crossentropy")
    validation = tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).batch(7)
    losses = model.fit(
        dataset().repeat(),
        steps_per_epoch=12,
        epochs=3,
        validation_data=validation,
        validation_steps=5,
        verbose=0,
        callbacks=[watch, *more],
    ).history["loss"]
    assert model.steps_per_execution == 1
    steps = [model.evaluate(validation, steps=n, verbose=0) for n in (1, 5)]
    model.fit(dataset(), steps_per_epoch=5, verbose=0)  # too few
    assert int(model.optimizer.iterations.numpy()) == 3 * 12 + 5
    return [*losses, *steps, *model.get_weights(), *np.ravel(watch.seen)]


def test_several_steps_in_one_go_change_nothing(small_fits, tmp_path, monkeypatch):
    expected, taken = fit_with_a_watch(), []

    class Counted(training.SeveralSteps):
        def on_train_batch_end(self, batch, logs=None):
            taken.append(self.steps)
            super().on_train_batch_end(batch, logs)

    monkeypatch.setattr(training, "SeveralSteps", Counted)
    with faster():
        results = fit_with_a_watch(keras.callbacks.TensorBoard(tmp_path, profile_batch=0))
    assert taken == [12] * 3
    for ours, theirs in zip(results, expected):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def given(**options):
    return {
        "x": dataset(),
        "steps_per_epoch": 10,
        "epochs": 3,
        "initial_epoch": 0,
        "callbacks": [],
    } | options


@pytest.mark.parametrize(
    "options, steps",
    [
        ({}, 10),
        ({"steps_per_epoch": None}, 10),  # as many as the data set has
        ({"steps_per_epoch": 90}, 30),
        ({"steps_per_epoch": 31}, 1),
        ({"initial_epoch": 3}, 1),
        ({"steps_per_epoch": None, "x": dataset().repeat()}, 1),
        ({"steps_per_epoch": None, "x": IMAGES}, 1),
        ({"callbacks": [keras.callbacks.CSVLogger("x"), keras.callbacks.EarlyStopping()]}, 10),
        ({"callbacks": keras.callbacks.LearningRateScheduler(lambda epoch: 0.1)}, 10),
        ({"callbacks": [keras.callbacks.ModelCheckpoint("x.keras")]}, 10),
        ({"callbacks": [keras.callbacks.ModelCheckpoint("x.keras", save_freq=5)]}, 1),
        ({"callbacks": [keras.callbacks.TerminateOnNaN()]}, 1),
        ({"callbacks": [keras.callbacks.LambdaCallback(on_train_batch_end=print)]}, 1),
        ({"callbacks": [keras.callbacks.LambdaCallback(on_epoch_end=print)]}, 10),
        ({"callbacks": [keras.callbacks.TensorBoard(update_freq="batch")]}, 1),
        ({"callbacks": keras.callbacks.CallbackList([])}, 1),
    ],
)
def test_several_steps_only_where_nobody_watches(options, steps, small_fits):
    model = network()
    model.compile("sgd", "sparse_categorical_crossentropy")
    assert training.steps_per_execution(model, given(**options)) == steps


def test_several_steps_only_where_a_step_is_short(small_fits, monkeypatch):
    def steps(model, **options):
        model.compile("sgd", "sparse_categorical_crossentropy", **options)
        return training.steps_per_execution(model, given())

    model = network()
    assert training.work(model) == 3 * 3 * 2 * 4 * 2 * 2 + 16 * 3
    assert steps(model) == 10
    assert steps(model, steps_per_execution=5) == steps(model, run_eagerly=True) == 1
    monkeypatch.setattr(training, "LARGEST_WORK", 300)
    assert steps(model) == 1
    monkeypatch.setattr(training, "LARGEST_WORK", 1e12)
    inputs = keras.Input((5, 2))
    assert steps(keras.Model(inputs, layers.Dense(3)(inputs))) == 10
    assert steps(keras.Model(inputs, layers.LSTM(3)(inputs))) == 1  # as much again for each of 5

    class Own(keras.Model):
        def train_step(self, data):
            return super().train_step(data)

    assert steps(Own(inputs, layers.Dense(3)(inputs))) == 1
    assert steps(keras.Sequential([layers.Dense(3)])) == 1  # not built
