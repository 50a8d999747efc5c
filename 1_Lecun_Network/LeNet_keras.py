#!/usr/bin/env python3
"""LeNet on CIFAR-10: five layers, the first step of a ladder of four scripts.
Pixels are divided by 255 and nothing else is done to them: the baseline of the ladder.

Yann LeCun, Leon Bottou, Yoshua Bengio and Patrick Haffner: "Gradient-Based Learning Applied to
Document Recognition", 1998, http://yann.lecun.com/exdb/publis/pdf/lecun-98.pdf

    python LeNet_keras.py                                   # CIFAR-10, 200 epochs
    python LeNet_keras.py --dataset synthetic --epochs 5    # no download
    python LeNet_keras.py --resume runs/LeNet_cifar10/2026-01-31_12-00-00
"""

import argparse
import functools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # errors are raised all the same
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # off by default on older processors
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # leave memory to others

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from matplotlib.figure import Figure
from PIL import Image, ImageOps  # Pillow comes with matplotlib

# ------------------------------------------------------------------------------------------ network

WEIGHTS = {"kernel_initializer": "he_normal"}


def lenet(shape=(32, 32, 3), num_classes=10):
    """LeNet-5 (section II.B) with colour, ReLU, max pooling and softmax: 62,006 parameters.

    Takes (batch, *shape) pixels from 0 to 255 and returns (batch, num_classes) probabilities.
    """
    inputs = layers.Input(shape)
    x = layers.Rescaling(1 / 255)(inputs)
    x = layers.Conv2D(6, 5, activation="relu", **WEIGHTS)(x)  # 28x28x6
    x = layers.MaxPooling2D(2)(x)  # 14x14x6
    x = layers.Conv2D(16, 5, activation="relu", **WEIGHTS)(x)  # 10x10x16
    x = layers.MaxPooling2D(2)(x)  # 5x5x16
    x = layers.Flatten()(x)
    x = layers.Dense(120, activation="relu", **WEIGHTS)(x)
    x = layers.Dense(84, activation="relu", **WEIGHTS)(x)
    outputs = layers.Dense(num_classes, activation="softmax", dtype="float32", **WEIGHTS)(x)
    return keras.Model(inputs, outputs, name="LeNet")


def scheduler(epoch, epochs=200):
    """Return the learning rate of an epoch: 0.01, 0.005 from half of the epochs, 0.001 from 3/4."""
    return 0.01 if epoch / epochs < 1 / 2 else 0.005 if epoch / epochs < 3 / 4 else 0.001


def parse_args(argv=None):
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    return parse_shared_args(parser, argv, batch_size=128, epochs=200)


def build_network(args, shape, num_classes, mean, variance):
    """Return the network that the options describe."""
    return lenet(shape, num_classes)


# ---------------------------------------------- data (from here on, all scripts have the same text)


def load_data(dataset, data_dir=None, image_size=32):
    """Return (x_train, y_train), (x_test, y_test), class_names.

    Images are (n, height, width, 3) uint8 from 0 to 255, labels (n,) integers from 0. Without
    data_dir, CIFAR comes from keras.datasets, which downloads it once and checks the hash.
    """
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    names = names.split() if dataset == "cifar10" else []
    if dataset == "synthetic":
        print("Training on synthetic images: coloured patches made from a seed, no photographs.")
        return synthetic_images(5000, seed=1), synthetic_images(1000, seed=2), names
    if folder := data_dir and Path(data_dir):
        return read_cifar(dataset, folder, names) or read_pictures(folder, image_size)
    try:
        sets = getattr(keras.datasets, dataset).load_data()
    except Exception as error:  # Keras raises nothing more precise when a download fails
        fail(f"{error}: give the folder of the files with --data_dir, or try --dataset synthetic")
    return *((images, np.int32(labels.ravel())) for images, labels in sets), names


def read_cifar(dataset, folder, class_names):
    """Read CIFAR's binary or Python version, in folder or in one in it; None if there is none."""
    names, key, offset = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"], b"labels", 0
    if dataset == "cifar100":
        names, key, offset = ["train", "test"], b"fine_labels", 1  # after the coarse label
    patterns = (f"{place}{names[0]}{kind}" for place in ("", "*/") for kind in (".bin", ""))
    found = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    if not found:
        return None
    images, labels = [], []
    for path in [found[0].with_name(name + found[0].suffix) for name in names]:
        try:
            if path.suffix:
                records = np.fromfile(path, np.uint8).reshape(-1, offset + 3073)
                part = {b"data": records[:, -3072:], key: records[:, offset]}
            else:
                part = ArraysOnly(path.open("rb"), encoding="bytes").load()
            labels.append(np.int32(part[key]).reshape(50000 if path.stem == "train" else 10000))
            images.append(part[b"data"].reshape(len(labels[-1]), 3, 32, 32).transpose(0, 2, 3, 1))
            if labels[-1].max() >= (len(class_names) or 100):
                raise ValueError(f"it has the label {labels[-1].max()}")
        except Exception as error:  # whatever a damaged file makes NumPy and pickle do
            fail(f"{path} is not the file of {dataset} that it should be: {error}")
    images, labels = np.concatenate(images), np.concatenate(labels)
    return (images[:50000], labels[:50000]), (images[50000:], labels[50000:]), class_names


class ArraysOnly(pickle.Unpickler):
    """Unpickles arrays of numbers; a file that asks for anything else, such as code, is refused."""

    def find_class(self, module, name):
        known = {"_reconstruct": lambda *_: np.empty(0), "ndarray": np.ndarray, "dtype": np.dtype}
        if module.split(".")[0] != "numpy" or name not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return known[name]


def read_pictures(folder, size=32):
    """Read train/CLASS/* and test/CLASS/*, or CLASS/* and test a fifth of it; see load_data."""
    parts = [folder / "train", folder / "test"] if (folder / "train").is_dir() else [folder]
    sets, names = [], sorted(path.name for path in parts[0].glob("[!.]*") if path.is_dir())
    if len(names) < 2:
        fail(f"--data_dir {folder} is no folder with CIFAR's files (tar xf unpacks) or two classes")
    print(f"{len(names)} classes: {', '.join(names)}")  # train and test, if misnamed, would be two
    for part in parts:
        files = [path for path in sorted(part.glob("[!.]*/**/*")) if path.is_file()]
        files = [path for path in files if "/." not in path.relative_to(part).as_posix()]
        classes = [path.relative_to(part).parts[0] for path in files]
        if odd := {*names} ^ {*classes}:
            fail(f"{part}/{min(odd)} has no pictures, or {parts[0]} has no such folder")
        images = np.stack([read_picture(path, size) for path in files])
        sets.append((images, np.int32([names.index(name) for name in classes])))
    return *(sets if sets[1:] else hold_out(*sets[0], 0.2, seed=0)), names


def read_picture(path, size):
    """Return the middle square of a picture as a person sees it, (size, size, 3) uint8."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))  # cameras note how they were held
        if image.mode[0] in "IF":  # more than 8 bits, which Pillow would cut off at 255
            values = np.nan_to_num(np.float64(image))
            top = 65535 if "16" in image.mode or values.max() > 255 else 255 ** (values.max() > 1)
            image = Image.fromarray(np.uint8((values * 255 / top).clip(0, 255)))
        image = image.convert("RGBA")
    except Exception as error:  # each of Pillow's formats has its own
        raise OSError(f"{path} cannot be read; save it as PNG or JPEG: {error}") from error
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))


def hold_out(images, labels, part, seed):
    """Return (images, labels) without a part of every class, chosen by the seed, and that part."""
    rng, held = np.random.default_rng(seed), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        held[rng.choice(members, max(1, round(part * len(members))), replace=False)] = True
    return (images[~held], labels[~held]), (images[held], labels[held])


def synthetic_images(count, seed):
    """Return images of ten classes and their labels: patterns of 4x4 patches under noise."""
    patterns = np.random.default_rng(0).integers(40, 216, (10, 4, 4, 3))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count, np.int32)
    images = patterns.repeat(8, axis=1).repeat(8, axis=2)[labels].astype(np.float32)
    images += rng.normal(0, 40, (count, 1, 1, 1)) + 40 * rng.standard_normal(images.shape)
    return images.clip(0, 255).astype(np.uint8), labels


def train_batches(images, labels, batch_size, seed, first_epoch, epochs):
    """Return the batches of all epochs from first_epoch on, each a function of seed and step."""
    with tf.device("CPU"):  # where the pipeline runs
        images, labels = tf.constant(images), tf.constant(labels)

    def one_epoch(epoch):
        order = tf.random.experimental.stateless_shuffle(tf.range(len(images)), [seed, epoch])
        batches = tf.data.Dataset.from_tensor_slices(order).batch(batch_size, drop_remainder=True)

        def one_step(step, chosen):
            return tf.gather(images, chosen), tf.gather(labels, chosen)

        return batches.enumerate().map(one_step, num_parallel_calls=os.cpu_count())

    return tf.data.Dataset.range(first_epoch, epochs).flat_map(one_epoch).prefetch(4)


def multi_gpu_model(build, gpus):
    """Return the compiled model that build() makes, on one GPU or mirrored on several."""
    names, strategy = keras.distribution.list_devices(), tf.distribute.get_strategy()
    if gpus > len(names):
        fail(f"--gpus {gpus}: there are only {', '.join(names)} here")
    if gpus > 1 and keras.backend.backend() == "jax":
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=names[:gpus]))
    elif gpus > 1:
        strategy = tf.distribute.MirroredStrategy(names[:gpus])
    with strategy.scope():
        model = build()
        optimizer = keras.optimizers.SGD(momentum=0.9, nesterov=True)  # its rate: scheduler()
        model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
        model.optimizer.build(model.trainable_variables)  # to load its state into
    return model


def save(model, run, steps_per_epoch, epoch, logs):
    """Save RUN/last.keras at the end of an epoch; a kill leaves the one before or the new one."""
    if not math.isfinite(logs["loss"] + logs["val_loss"]):
        fail(f"no finite loss in epoch {epoch + 1}; {run} keeps those before: lower the rates")
    # float16 skips steps whose gradients overflow; resume() reads the epoch off this count.
    model.optimizer.iterations.assign((epoch + 1) * steps_per_epoch)
    model.save(run / "new.keras")
    os.replace(run / "new.keras", run / "last.keras")


def begin_with(model, weights):
    """Take the weights of another run of this network, but for layers of another shape."""
    path = max(Path(weights).glob("[lm]*.keras"), default=weights)  # model.keras, else last.keras
    network = keras.Model(model.inputs, model.outputs)  # the same layers, without the optimizer
    try:
        saved = json.loads(zipfile.ZipFile(path).read("config.json"))["config"]
        if (saved["name"], len(saved["layers"])) != (model.name, len(model.layers)):
            raise ValueError(f"its {saved['name']} has other layers than this {model.name}")
        with warnings.catch_warnings(record=True, action="always") as caught:
            network.load_weights(path, skip_mismatch=True)  # numbers only: no code in it is run
    except Exception as error:  # zipfile, h5py and Keras each raise their own
        fail(f"--weights {path} cannot be loaded: {error!s:.200}")
    said = " ".join(str(warning.message) for warning in caught)
    for name in sorted({*re.findall(r"<\w+ name=([^,]+), built", said)}):
        print(f"The weights of {name} have another shape and begin anew.")


def resume(run, model, facts, steps_per_epoch):
    """Put what save() saved back into model; return how many epochs the run has."""
    saved, log, epochs_done = json.loads((run / "args.json").read_text()), run / "log.csv", 0
    for key, value in facts.items():
        if saved.get(key, value) != value:
            fail(f"--resume {run} is of another {key}: {saved[key]!s:.99}, not {value!s:.99}")
    if (run / "last.keras").exists():
        try:
            model.load_weights(run / "last.keras")  # numbers only: no code in the file is run
        except Exception as error:  # zipfile, h5py and Keras each raise their own
            fail(f"{run}/last.keras is damaged, start a new run: {error!r:.80}")
        epochs_done = int(model.optimizer.iterations.numpy()) // steps_per_epoch
        if not epochs_done:  # Keras leaves a state that does not fit, with a warning
            fail(f"{run}/last.keras is of another optimizer: start a new run with --weights {run}")
        for variable in model.non_trainable_variables:
            if variable.path.endswith("seed_generator_state"):  # dropout's: Keras does not save it
                variable.assign_add([0, epochs_done * steps_per_epoch])  # (seed, steps so far)
    elif (run / "model.keras").exists():
        fail(f"{run} has no last.keras to go on with: start a new run with --weights {run}")
    if log.exists():  # a kill before the checkpoint leaves a row too many
        rows = [row + b"\n" for row in log.read_bytes().split(b"\n")[:-1]][: 1 + epochs_done]
        if rows and (rows[0][:6] != b"epoch," or len({row.count(b",") for row in rows}) > 1):
            fail(f"{log} is damaged: delete it to go on without it")
        os.truncate(log, len(b"".join(rows)))
    return epochs_done


def start_run(args, facts):
    """Return the folder of the run, new unless it is resumed, with its options in args.json."""
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    run = Path(args.resume or Path(args.log_dir, f"{facts['network']}_{args.dataset}", now))
    run.mkdir(parents=True, exist_ok=bool(args.resume))
    (run / "new.json").write_text(json.dumps({**facts, "options": vars(args)}, indent=2) + "\n")
    os.replace(run / "new.json", run / "args.json")
    args.resume = str(run)  # for main()'s message
    return run


def draw(run, images, labels, probabilities, class_names):
    """Draw RUN/curves.png from RUN/log.csv; confusion.png and mistakes.png of the test images."""
    log = np.genfromtxt(run / "log.csv", delimiter=",", names=True, ndmin=1)
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3), ("loss", "accuracy", "learning_rate")):
        for column in (c for c in log.dtype.names if c.removeprefix("val_") == name):
            axes.plot(log["epoch"] + 1, log[column], label=column)
        axes.set(xlabel="epoch", title=name.replace("_", " "))
        axes.legend()
    axes.set_yscale("log")  # of the learning rate, drawn last
    figure.savefig(run / "curves.png", dpi=150)

    predicted, n = probabilities.argmax(axis=-1), probabilities.shape[-1]
    counts, names = tf.math.confusion_matrix(labels, predicted, n).numpy(), class_names or range(n)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted", ylabel="label", title="test images")
    figure.colorbar(axes.imshow(counts, cmap="Blues"))
    if n <= 20:
        axes.set_xticks(range(n), names, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(range(n), names, parse_math=False)
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if count > counts.max() / 2 else "black"
            axes.text(column, row, count, ha="center", va="center", color=colour, fontsize=8)
    figure.savefig(run / "confusion.png", dpi=150)

    sure, wrong = probabilities.max(axis=-1), np.flatnonzero(predicted != labels)
    figure = Figure(figsize=(12, 14), layout="constrained")
    figure.suptitle(f"{len(wrong)} mistakes in {len(labels)} test images, surest first")
    for place, i in enumerate(wrong[np.argsort(-sure[wrong])][:25], start=1):
        axes = figure.add_subplot(5, 5, place, xticks=[], yticks=[])
        title = f"{names[labels[i]]}, taken for\n{names[predicted[i]]} ({sure[i]:.1%})"
        axes.set_title(title, fontsize=10, parse_math=False)
        axes.imshow(images[i])
    figure.savefig(run / "mistakes.png", dpi=100)


def fail(message):
    """End with a line that says what is wrong and what to do."""
    sys.exit(f"error: {' '.join(message.split())}")


def parse_shared_args(parser, argv, batch_size, epochs):
    """Add the options of all scripts and parse; with --resume RUN, that run's are the defaults."""
    parser.formatter_class, parser.allow_abbrev = argparse.ArgumentDefaultsHelpFormatter, False
    parser.error = fail
    datasets = ("cifar10", "cifar100", "synthetic")
    sizes, parts = (32, 48, 64, 96, 128, 160, 192, 224), (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
    precisions = ("float32", "mixed_bfloat16", "mixed_float16")
    add, a_path = parser.add_argument, lambda text: os.path.abspath(os.path.expanduser(text))
    add("-b", "--batch_size", type=int, default=batch_size, help="images per step")
    add("-e", "--epochs", type=int, default=epochs, help="the schedule scales with it")
    add("-d", "--dataset", choices=datasets, default="cifar10", help="what to train on")
    add("--data_dir", type=a_path, help="folder with CIFAR's files, or with your own pictures")
    add("--log_dir", type=a_path, default="runs", help="folder for the runs' folders")
    add("--image_size", type=int, choices=sizes, default=32, help="of your own pictures")
    add("--validation_split", type=float, choices=parts, default=0.0, help="to validate on")
    add("--weights", type=os.path.expanduser, metavar="RUN", help="begin with those of this run")
    add("--gpus", type=int, default=1, help="how many GPUs share each batch")
    add("--precision", choices=precisions, default="float32", help="bfloat16: GPUs from Ampere on")
    add("--seed", type=int, default=0, help="of weights, shuffling and augmentation")
    add("--resume", type=a_path, metavar="RUN", help="folder of a run to go on with")
    argv, saved = sys.argv[1:] if argv is None else list(map(str, argv)), {}
    args = parser.parse_args(argv)
    if args.resume:
        run = args.resume.removesuffix(f"{os.sep}last.keras")
        try:
            saved = json.loads(Path(run, "args.json").read_text())
            saved, *_ = dict(saved["options"]), saved["network"], saved["class_names"]
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            fail(f"--resume {args.resume} is not the folder of a run")
        given = [(k, v) for k, v in saved.items() if v is not parser.get_default(k)]
        given = [f"--{k}" if v is True else f"--{k}={v}" for k, v in given]
        args = parser.parse_args([*given, *argv, "--resume", run])
    for key, value in vars(args).items():
        least = 0 if key == "seed" else 1
        if type(value) is int and not least <= value < 2**31:
            fail(f"--{key} {value} is not a whole number from {least} to {2**31 - 1}")
    for key in saved.keys() - {"epochs", "data_dir", "log_dir", "gpus", "resume"}:
        if getattr(args, key, "no option") != saved[key]:
            fail(f"--{key} cannot change on the way: {args.resume} has {saved[key]}")
    if args.batch_size % args.gpus or args.gpus > 1 and args.precision == "mixed_float16":
        fail(f"--gpus {args.gpus} has to divide --batch_size, and goes without mixed_float16")
    if args.data_dir and args.dataset == "synthetic":
        fail("--data_dir is for cifar10, cifar100 and your own pictures: synthetic reads no files")
    return args


def main(argv=None):
    """Train as the options say, those of the command line or a list like ["--epochs", "3"]."""
    args = parse_args(argv)
    keras.config.set_dtype_policy(args.precision)
    keras.config.set_image_data_format("channels_last")  # whatever ~/.keras/keras.json says
    if keras.backend.backend() == "jax":
        tf.config.set_visible_devices([], "GPU")  # it only feeds JAX
    elif keras.backend.backend() != "tensorflow":
        fail(f"KERAS_BACKEND={keras.backend.backend()}: only tensorflow and jax will do")
    try:
        train(args)
    except (KeyboardInterrupt, MemoryError, OSError, tf.errors.ResourceExhaustedError) as error:
        message = str(error) or "interrupted"
        if isinstance(error, (MemoryError, tf.errors.ResourceExhaustedError)):
            message = "out of memory: a new run with a smaller --batch_size needs less"
        if args.resume:
            start = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1] if argv is None else []
            quoted = subprocess.list2cmdline if os.name == "nt" else shlex.join
            message += f". To go on: {quoted([*start, '--resume', args.resume])}"
        fail(message)


def prepare_data(args):
    """Return (images, labels) of training, validation and test, class_names, num_classes."""
    train, test, names = load_data(args.dataset, args.data_dir, args.image_size)
    num_classes, validation = len(names) or int(train[1].max()) + 1, test
    if args.validation_split:
        train, validation = hold_out(*train, args.validation_split, args.seed)
    if train[0].dtype != np.uint8 or args.image_size not in (32, train[0].shape[1]):
        fail("images are uint8, and --image_size is for pictures: those of CIFAR are 32x32")
    if not {*test[1]} <= {*train[1]} == {*range(num_classes)} or num_classes < 2:
        fail("labels count from 0, and every class is in the training images")
    if len(train[0]) < args.batch_size:
        fail(f"--batch_size {args.batch_size} is more than the {len(train[0])} training images")
    if keras.backend.backend() == "jax" and math.gcd(len(validation[0]), len(test[0])) % args.gpus:
        fail(f"--gpus {args.gpus}: with JAX, it has to divide the number of test images")
    return train, validation, test, names, num_classes


def train(args):
    """Train a network as the options say and leave its run's folder behind."""
    keras.utils.set_random_seed(args.seed)
    (x_train, y_train), validation, test, class_names, num_classes = prepare_data(args)
    steps_per_epoch, options = len(x_train) // args.batch_size, tf.data.Options()
    options.autotune.enabled = False  # its thread holds up the end of every epoch
    slices = tf.data.Dataset.from_tensor_slices
    validation_batches = slices(validation).batch(args.batch_size).with_options(options)
    test_batches = slices(test).batch(args.batch_size).with_options(options)
    sample = x_train[:: 1 + x_train.size // 30_720_000].astype(np.float64)  # in 0.5 GB at most
    mean, variance = sample.mean((0, 1, 2)), sample.var((0, 1, 2))
    build = functools.partial(build_network, args, sample.shape[1:], num_classes, mean, variance)
    with keras.StatelessScope(initialize_variables=False):  # takes no memory
        parameters = sum(math.prod(variable.shape) for variable in build().trainable_variables)
    if parameters > 2e9:
        fail(f"a network of {parameters:,} parameters takes more memory than machines have")
    model, epochs_done = multi_gpu_model(build, args.gpus), 0
    facts = {"network": model.name, "class_names": class_names}
    facts |= {"pixel_mean": mean.round(3).tolist(), "optimizer": type(model.optimizer).__name__}
    if args.resume:
        epochs_done = resume(Path(args.resume), model, facts, steps_per_epoch)
        newest = max(Path(args.resume).glob("*.keras"), key=os.path.getmtime, default=Path())
        if epochs_done + (newest.name == "model.keras") > args.epochs:  # finished: one more
            fail(f"{args.resume} has its {epochs_done} epochs: to train on, give --epochs more")
    if args.weights and not epochs_done:
        begin_with(model, args.weights)
    run = start_run(args, facts)
    devices = ", ".join(keras.distribution.list_devices()[: args.gpus])
    print(f"{model.name} on {devices}: {parameters:,} trainable parameters. Run: {run}")
    if "gpu" not in devices.lower() and shutil.which("nvidia-smi"):
        wheel = "jax[cuda12]" if keras.backend.backend() == "jax" else "tensorflow[and-cuda]"
        print(f"No GPU in use: pip install '{wheel}' (Linux, WSL)", file=sys.stderr)
    batches = train_batches(x_train, y_train, args.batch_size, args.seed, epochs_done, args.epochs)
    save_this = functools.partial(save, model, run, steps_per_epoch)
    model.fit(
        batches.with_options(options),
        validation_data=validation_batches,
        epochs=args.epochs,
        initial_epoch=epochs_done,
        steps_per_epoch=steps_per_epoch,
        shuffle=False,
        verbose=1 if sys.stdout.isatty() else 2,
        callbacks=[
            keras.callbacks.LearningRateScheduler(lambda epoch: scheduler(epoch, args.epochs)),
            keras.callbacks.TensorBoard(run, write_graph=False),
            keras.callbacks.CSVLogger(run / "log.csv", append=True),
            keras.callbacks.LambdaCallback(on_epoch_end=save_this),
        ],
    )
    keras.config.set_dtype_policy("float32")  # TensorFlow Lite and ONNX take no other
    trained = multi_gpu_model(build, gpus=1)
    trained.set_weights(model.get_weights())
    loss, accuracy, *_ = trained.evaluate(test_batches, verbose=0)
    epochs_done = int(model.optimizer.iterations.numpy()) // steps_per_epoch
    draw(run, *test, trained.predict(test_batches, verbose=0), class_names)
    trained.save(run / "new.keras")
    os.replace(run / "new.keras", run / "model.keras")  # last: it marks a finished run
    print(f"Run: {run}\nTest accuracy {accuracy:.4f}, loss {loss:.4f} after epoch {epochs_done}.")


if __name__ == "__main__":
    main()
