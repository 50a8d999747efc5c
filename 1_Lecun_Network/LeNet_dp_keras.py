#!/usr/bin/env python3
"""LeNet on CIFAR-10 with data preprocessing: second step of a ladder of four scripts.

Yann LeCun, Leon Bottou, Yoshua Bengio and Patrick Haffner: "Gradient-Based Learning Applied to
Document Recognition", 1998, http://yann.lecun.com/exdb/publis/pdf/lecun-98.pdf

    python LeNet_dp_keras.py                                # CIFAR-10, 200 epochs
    python LeNet_dp_keras.py --dataset synthetic --epochs 5    # no download
    python LeNet_dp_keras.py --resume runs/LeNet_dp_cifar10/2026-01-31_12-00-00

The lesson: every colour channel is normalised to mean 0 and standard deviation 1.

Reaches 59.76 % of the test images after 200 epochs, on JPEG-compressed copies of them. Needs
tensorflow, keras, numpy, matplotlib and tensorboard.
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


def parse_args():
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    return parse_shared_args(parser, batch_size=128, epochs=200)


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
    """Return the shuffled batches of all epochs from initial_epoch on as one tf.data.Dataset.

    images (n, 32, 32, 3) uint8 and labels (n,) int32 give n // batch_size batches an epoch,
    (batch_size, 32, 32, 3) uint8 and (batch_size,) int32. Everything random is a function of
    (seed, epoch, step): a resumed run sees what an uninterrupted one would have seen.
    """
    steps = len(images) // batch_size
    with tf.device("CPU"):  # the pipeline runs there; a copy on the GPU would be of no use
        images, labels = tf.constant(images), tf.constant(labels)

    def one_epoch(epoch):
        epoch_seed = tf.stack([tf.cast(seed, tf.int64), epoch])
        order = tf.random.experimental.stateless_shuffle(tf.range(len(images)), epoch_seed)
        order = tf.reshape(order[: steps * batch_size], [steps, batch_size])

        def one_step(step):
            return tf.gather(images, order[step]), tf.gather(labels, order[step])

        return tf.data.Dataset.range(steps).map(one_step, num_parallel_calls=os.cpu_count())

    return untuned(tf.data.Dataset.range(initial_epoch, epochs).flat_map(one_epoch).prefetch(4))


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


class NativeConv2D(layers.Conv2D):
    """A convolution in float32 where the processor only emulates the numbers asked for.

    Their products are exact in float32, so only the sums are rounded otherwise.
    """

    def convolution_op(self, inputs, kernel):
        dtype = "float32" if emulated(self.compute_dtype) else self.compute_dtype
        outputs = super().convolution_op(tf.cast(inputs, dtype), tf.cast(kernel, dtype))
        return tf.cast(outputs, self.compute_dtype)

    def call(self, inputs):
        outputs = self.convolution_op(inputs, self.kernel)
        if self.use_bias:
            outputs = add_bias(outputs, tf.convert_to_tensor(self.bias))
        return self.activation(outputs)


@tf.custom_gradient
def add_bias(x, bias):
    """Add (filters,) bias to (batch, height, width, filters) x; its gradient is a sum in float32.

    On CPUs that of tf.nn.bias_add adds up in bfloat16, where 256 + 1 is 256.
    """

    def gradient(upstream):
        total = tf.raw_ops.BiasAddGrad(out_backprop=tf.cast(upstream, tf.float32))
        return upstream, tf.cast(total, bias.dtype)

    return tf.nn.bias_add(x, bias), gradient


def lenet(num_classes=10, mean=(0, 0, 0), std=(1, 1, 1)):
    """LeNet-5 (1998, section II.B) with colour, ReLU, max pooling and softmax: 62,006 parameters.

    Takes (batch, 32, 32, 3) pixels from 0 to 255, whose mean and std are given per channel, and
    returns (batch, num_classes) probabilities.
    """
    weights = {"kernel_initializer": "he_normal"}
    inputs = layers.Input((32, 32, 3), name="image")
    x = normalize(inputs, mean, std)
    x = NativeConv2D(6, 5, activation="relu", name="conv1", **weights)(x)  # 28x28x6
    x = layers.MaxPooling2D(2, name="pool1")(x)  # 14x14x6
    x = NativeConv2D(16, 5, activation="relu", name="conv2", **weights)(x)  # 10x10x16
    x = layers.MaxPooling2D(2, name="pool2")(x)  # 5x5x16
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(120, activation="relu", name="dense1", **weights)(x)
    x = layers.Dense(84, activation="relu", name="dense2", **weights)(x)
    softmax = layers.Dense(
        num_classes, activation="softmax", dtype="float32", name="softmax", **weights
    )
    return keras.Model(inputs, softmax(x), name="LeNet_dp")


def build_network(args):
    """Return the network that the options describe."""
    return lenet(NUM_CLASSES[args.dataset], *STATISTICS[args.dataset])


# ----------------------------------------------------------------------------------------- training

STEPS_PER_EXECUTION = 30  # at most; a step takes milliseconds, so the time between two counts


def scheduler(epoch, epochs=200):
    """Return the learning rate of an epoch: 0.01, 0.005 from half of the epochs, 0.001 from 3/4."""
    if epoch < epochs // 2:
        return 0.01
    if epoch < 3 * epochs // 4:
        return 0.005
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
