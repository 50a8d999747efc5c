#!/usr/bin/env python3
"""LeNet on CIFAR-10: five layers, the first step of a ladder of four scripts.
Pixels are divided by 255 and nothing else is done to them: the baseline of the ladder, with which
the collection of 2018 had 58.48% of the test images right.

Yann LeCun, Leon Bottou, Yoshua Bengio and Patrick Haffner: "Gradient-Based Learning Applied to
Document Recognition", 1998, http://yann.lecun.com/exdb/publis/pdf/lecun-98.pdf

    python LeNet_keras.py                                   # CIFAR-10, 200 epochs
    python LeNet_keras.py --dataset synthetic --epochs 5    # no download
    python LeNet_keras.py --resume runs/LeNet_cifar10/2026-01-31_12-00-00
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
import warnings
import zipfile
from pathlib import Path

# Keras and TensorFlow read these when they are imported.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
if os.environ["KERAS_BACKEND"] not in ("tensorflow", "jax"):
    sys.exit("error: KERAS_BACKEND has to be tensorflow or jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # errors are raised all the same
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # off by default on older processors
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # leave memory to others

import keras
import matplotlib.style
import numpy as np
import tensorflow as tf
from keras import layers
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from PIL import Image, ImageOps  # Pillow comes with matplotlib

# ---------------- network

# Of every convolution and fully connected layer: He's initialisation, made for ReLU.
KERNEL = {"kernel_initializer": "he_normal"}


def lenet(shape=(32, 32, 3), num_classes=10):
    """LeNet-5 (section II.B) with colour, ReLU, max pooling and softmax: 62,006 parameters.

    The paper's second convolution sees only some of the maps before it; here, as usual today, all.

    Takes (batch, *shape) pixels from 0 to 255 and returns (batch, num_classes) probabilities.
    """
    inputs = layers.Input(shape)
    x = layers.Rescaling(1 / 255)(inputs)
    x = layers.Conv2D(6, 5, activation="relu", **KERNEL)(x)  # 28x28x6
    x = layers.MaxPooling2D(2)(x)  # 14x14x6
    x = layers.Conv2D(16, 5, activation="relu", **KERNEL)(x)  # 10x10x16
    x = layers.MaxPooling2D(2)(x)  # 5x5x16
    x = layers.Flatten()(x)
    x = layers.Dense(120, activation="relu", **KERNEL)(x)
    x = layers.Dense(84, activation="relu", **KERNEL)(x)
    # The probabilities are float32 whatever --precision is.
    outputs = layers.Dense(num_classes, activation="softmax", dtype="float32", **KERNEL)(x)
    return keras.Model(inputs, outputs, name="LeNet")


# ---------------- recipe


def augment(images, seed):
    """Return the images as they are; from the third script on, they are shifted and flipped."""
    return images


def scheduler(epoch, epochs=200):
    """Return the learning rate of an epoch, counted from 0: that of the collection of 2018."""
    if epoch / epochs < 1 / 2:
        return 0.01
    if epoch / epochs < 3 / 4:
        return 0.005
    return 0.001


def compile_model(model):
    """Give the network its optimizer, whose learning rate scheduler() sets, and its loss."""
    model.compile(
        optimizer=keras.optimizers.SGD(momentum=0.9, nesterov=True),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )


def parse_args(argv=None):
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    return parse_shared_args(parser, argv, batch_size=128, epochs=200)


def build_network(args, shape, num_classes, mean, variance):
    """Return the network that the options describe."""
    return lenet(shape, num_classes)


# ---------------- training (from here on, all scripts have the same text)


def train(args):
    """Train a network as the options say, and leave its files in the folder of the run."""
    keras.utils.set_random_seed(args.seed)
    (x_train, y_train), validation, test, class_names = prepare_data(args)
    mean, variance = mean_and_variance(x_train)
    steps_per_epoch = len(x_train) // args.batch_size

    def build():
        return build_network(args, x_train.shape[1:], len(class_names), mean, variance)

    model = multi_gpu_model(build, args.gpus)
    if args.weights and not args.resume:
        load_pretrained(model, args.weights)
    # What a run that goes on has to share with the one that was begun:
    facts = {"network": model.name, "class_names": class_names, "pixel_mean": mean.tolist()}
    facts["optimizer"] = [type(model.optimizer).__name__, len(model.optimizer.variables)]
    run, epochs_done = start_run(args, model, facts, steps_per_epoch)
    devices = ", ".join(keras.distribution.list_devices()[: args.gpus])
    parameters = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    print(f"{model.name} on {devices}: {parameters:,} trainable parameters. Run: {run}")
    if "cpu" in devices and shutil.which("nvidia-smi"):
        packages = "'tensorflow[and-cuda]' or 'jax[cuda12]', on Windows in WSL2"
        print(f"No GPU in use: pip install {packages}", file=sys.stderr)

    def save_checkpoint(epoch, logs):
        if not np.isfinite(logs["loss"] + logs["val_loss"]):
            fail(f"no finite loss in epoch {epoch + 1}: lower the learning rates in scheduler()")
        # With float16, steps that overflow do not count; resume() reads the epoch off this.
        model.optimizer.iterations.assign((epoch + 1) * steps_per_epoch)
        save(model, run / "last.keras")

    options = tf.data.Options()
    options.autotune.enabled = False  # its thread holds up the end of every epoch
    batches = train_batches(x_train, y_train, args.batch_size, args.seed, epochs_done, args.epochs)
    validation_batches = tf.data.Dataset.from_tensor_slices(validation).batch(args.batch_size)
    model.fit(
        batches.with_options(options),
        validation_data=validation_batches.with_options(options),
        epochs=args.epochs,
        initial_epoch=epochs_done,
        steps_per_epoch=steps_per_epoch,
        shuffle=False,  # train_batches() has shuffled
        verbose=1 if hasattr(sys.stdout, "isatty") and sys.stdout.isatty() else 2,
        callbacks=[
            learning_rate_callback(args),
            keras.callbacks.TensorBoard(run, write_graph=False),
            keras.callbacks.CSVLogger(run / "log.csv", append=True),
            keras.callbacks.LambdaCallback(on_epoch_end=save_checkpoint),
        ],
    )
    keras.config.set_dtype_policy("float32")  # TensorFlow Lite and ONNX take no other
    trained = multi_gpu_model(build, gpus=1)
    trained.set_weights(model.get_weights())
    save(trained, run / "model.keras")  # before all that may fail
    probabilities = trained.predict(test[0], args.batch_size, verbose=0)
    accuracy = np.mean(probabilities.argmax(axis=-1) == test[1])
    epochs_done = int(model.optimizer.iterations.numpy()) // steps_per_epoch
    print(f"Run: {run}\nTest accuracy {accuracy:.4f} after epoch {epochs_done}.")
    draw(run, *test, probabilities, class_names)


def learning_rate_callback(args):
    """Return the callback that sets the learning rate of every epoch."""
    return keras.callbacks.LearningRateScheduler(lambda epoch: scheduler(epoch, args.epochs))


def train_batches(images, labels, batch_size, seed, first_epoch, epochs):
    """Return the batches of all epochs from first_epoch on.

    Each is a function of seed, epoch and step, so that a run goes on as if it had never stopped: no
    generator has a state that would be lost.
    """
    with tf.device("CPU"):  # where the pipeline runs
        images, labels = tf.constant(images), tf.constant(labels)

    def one_epoch(epoch):
        order = tf.random.experimental.stateless_shuffle(tf.range(len(images)), [seed, epoch])
        # The few images that are left over have their turn in other epochs.
        indices = tf.data.Dataset.from_tensor_slices(order).batch(batch_size, drop_remainder=True)

        def one_batch(step, indices):
            step_seed = tf.random.experimental.stateless_fold_in([seed, epoch], step)
            return augment(tf.gather(images, indices), step_seed), tf.gather(labels, indices)

        return indices.enumerate().map(one_batch, num_parallel_calls=os.cpu_count())

    last_epoch = max(epochs, first_epoch + 1)  # a finished run draws again; JAX looks at a batch
    return tf.data.Dataset.range(first_epoch, last_epoch).flat_map(one_epoch).prefetch(4)


def multi_gpu_model(build, gpus):
    """Return the network of build(), compiled: on one GPU, or on several that share every batch.

    It takes a function because mirrored weights have to be made in the scope of the strategy.
    """
    devices = keras.distribution.list_devices()
    strategy = tf.distribute.get_strategy()  # the usual one, whose scope changes nothing
    if gpus > len(devices):
        fail(f"--gpus {gpus}: there are only {', '.join(devices)} here")
    if gpus > 1 and keras.backend.backend() == "jax":
        parallel = keras.distribution.DataParallel(devices=devices[:gpus])
        keras.distribution.set_distribution(parallel)
    elif gpus > 1:
        strategy = tf.distribute.MirroredStrategy(devices[:gpus])
    with strategy.scope():
        model = build()
        compile_model(model)
        model.optimizer.build(model.trainable_variables)  # to load a checkpoint into
    return model


# ---------------- data


def prepare_data(args):
    """Return (images, labels) of training, validation and test, and the names of the classes."""
    training, test, class_names = load_data(args.dataset, args.data_dir, args.image_size)
    validation = test  # unless --validation_split: whoever compares settings needs that
    if args.validation_split:
        training, validation = hold_out(*training, args.validation_split, args.seed)
    for images, labels in (training, validation, test):
        if images.dtype != np.uint8 or labels.shape != images.shape[:1]:
            found = f"{images.dtype} {images.shape} and {labels.shape}"
            fail(f"images are uint8 (n, height, width, 3), 0 to 255, and labels (n,), not {found}")
        if labels.min() < 0 or labels.max() >= len(class_names):
            fail(f"labels are from 0 to {len(class_names) - 1}, for {len(class_names)} class names")
    brightest = training[0].max()
    if brightest < 64:  # 12 bits of 16, for example, or numbers from 0 to 1 cut off to uint8
        fail(f"the brightest pixel is {brightest} of 255: save the pictures with 8 bits, 0 to 255")
    for label, name in enumerate(class_names):
        if label not in training[1]:
            fail(f"the class {name} has too few images: none is left to train on")
    if len(training[1]) < args.batch_size:
        fail(f"--batch_size {args.batch_size} is more than the {len(training[1])} training images")
    for _, labels in (validation, test):
        if keras.backend.backend() == "jax" and len(labels) % args.gpus:
            fail(f"--gpus {args.gpus} has to divide the {len(labels)} images to test on, with JAX")
    return training, validation, test, [str(name) for name in class_names]


def load_data(dataset, data_dir=None, image_size=32):
    """Return (x_train, y_train), (x_test, y_test), class_names.

    Images are (n, height, width, 3) uint8 from 0 to 255, labels (n,) int32 from 0.
    """
    if data_dir:
        return read_pictures(Path(data_dir), image_size)
    if dataset == "synthetic":
        print("Training on synthetic images: coloured patches made from a seed, no photographs.")
        class_names = [f"pattern {i}" for i in range(10)]
        return synthetic_images(5000, seed=1), synthetic_images(1000, seed=2), class_names
    if dataset == "cifar10":
        class_names = "airplane automobile bird cat deer dog frog horse ship truck".split()
        module = keras.datasets.cifar10
    elif dataset == "cifar100":
        class_names = [str(label) for label in range(100)]
        module = keras.datasets.cifar100
    else:
        fail(f"{dataset} is none of cifar10, cifar100 and synthetic")
    try:
        (x_train, y_train), (x_test, y_test) = module.load_data()  # downloaded once, hash checked
    except Exception as error:  # Keras raises nothing more precise when a download fails
        fail(f"{error}. Without a network: --dataset synthetic, or see doc/your_own.md")
    return (x_train, np.int32(y_train.ravel())), (x_test, np.int32(y_test.ravel())), class_names


def read_pictures(folder, size=32):
    """Read train/CLASS/* and test/CLASS/*, or CLASS/* and hold a fifth out as test pictures."""
    has_parts = (folder / "train").is_dir() and (folder / "test").is_dir()
    class_names = subfolders(folder / "train" if has_parts else folder)
    if len(class_names) < 2:
        fail(f"{folder} is no folder with one of pictures per class; for CIFAR see doc/your_own.md")
    if all(re.search("(^|[_ -])(train|test|val)", name.lower()) for name in class_names):
        fail(f"{folder} has no classes but {', '.join(class_names)}: call them train and test")

    def read(part):
        if subfolders(part) != class_names:
            fail(f"{part} has the classes {subfolders(part)}, not {class_names}")
        images, labels = [], []
        for label, name in enumerate(class_names):
            paths = sorted((part / name).glob("[!.]*"))
            if not paths:
                fail(f"{part / name} has no pictures")
            print(f"{part.name}/{name}: {len(paths)} pictures")
            images += [read_picture(path, size) for path in paths]
            labels += [label] * len(paths)
        return np.stack(images), np.int32(labels)

    if has_parts:
        for name in {*subfolders(folder)} - {"train", "test"}:
            print(f"{folder / name} is not read: only train and test are.")
        return read(folder / "train"), read(folder / "test"), class_names
    # For every --seed the same fifth, as long as the pictures are the same.
    training, test = hold_out(*read(folder), 0.2, seed=0)
    return training, test, class_names


def subfolders(folder):
    """Return the names of the folders in a folder, which are those of the classes."""
    folders = sorted(path for path in folder.glob("[!.]*") if path.is_dir())
    names = [path.name for path in folders if not any(path.glob("*/*/args.json"))]  # of runs
    if "\\udc" in ascii(names):
        fail(f"a name in {folder} is not UTF-8: {ascii(names)}")
    return names


def read_picture(path, size):
    """Return the middle square of a picture as a person sees it, (size, size, 3) uint8."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))  # cameras note how they were held
        if image.mode.startswith(("I", "F")):  # more than 8 bits, which Pillow would cut off
            values = np.nan_to_num(np.float64(image))
            white = 255 if values.max() > 1 else 1  # as far as one picture tells
            if image.mode.startswith("I;16") or values.max() > 255:
                white = 65535
            image = Image.fromarray(np.uint8((values / white * 255).clip(0, 255)))
        image = image.convert("RGBA")
    except Exception as error:  # each of Pillow's formats has its own
        raise OSError(f"{path} cannot be read; save it as PNG or JPEG: {error}") from error
    background = Image.new("RGBA", image.size, "white")  # of what is transparent
    image = Image.alpha_composite(background, image).convert("RGB")
    return np.asarray(ImageOps.fit(image, (size, size)))  # bicubic


def hold_out(images, labels, fraction, seed):
    """Return the images and labels without a fraction of every class, and that fraction."""
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = max(1, round(fraction * len(members)))
        held_out[rng.choice(members, count, replace=False)] = True
    return (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])


def mean_and_variance(images):
    """Return those of each colour channel of uint8 images, without a copy in float."""
    mean = images.mean(axis=(0, 1, 2))
    mean_square = np.square(images, dtype=np.uint16).mean(axis=(0, 1, 2))  # at most 255 * 255
    return mean, np.maximum(mean_square - mean**2, 1)  # a channel may be constant


def synthetic_images(count, seed):
    """Return images of ten classes and their labels: patterns of 4x4 patches under noise."""
    patterns = np.random.default_rng(0).integers(40, 216, (10, 4, 4, 3))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count, np.int32)
    images = patterns.repeat(8, axis=1).repeat(8, axis=2)[labels].astype(np.float32)
    images += rng.normal(0, 40, (count, 1, 1, 1))  # one brightness for each image
    images += rng.normal(0, 40, images.shape)
    return images.clip(0, 255).astype(np.uint8), labels


# ---------------- runs


def start_run(args, model, facts, steps_per_epoch):
    """Return the folder of the run, and how many epochs it has: 0 unless it is resumed."""
    if args.resume:
        run = Path(args.resume)
        epochs_done = resume(run, model, facts, steps_per_epoch)
    else:
        data = Path(args.data_dir or args.dataset).name
        run = new_folder(Path(args.log_dir, f"{model.name}_{data}"))
        epochs_done = 0
        save(model, run / "last.keras")  # --resume needs no --weights
    new = run / "new.json"
    new.write_text(json.dumps({**facts, "options": vars(args)}, indent=2) + "\n")
    os.replace(new, run / "args.json")
    args.resume = str(run)  # from here on, the run exists: a message can say how to go on
    return run, epochs_done


def new_folder(parent):
    """Make and return a folder in parent that is named after the time."""
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = parent / time.strftime("%Y-%m-%d_%H-%M-%S")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:  # another run was begun in the same second
            time.sleep(1)


def resume(run, model, facts, steps_per_epoch):
    """Load RUN/last.keras into the model, and return how many epochs the run has."""
    saved = json.loads((run / "args.json").read_text())
    for key, value in facts.items():
        if saved.get(key) != value:
            fail(f"--resume {run} has another {key}: {saved.get(key)}, not {value}")
    model.load_weights(run / "last.keras")  # numbers only, with the state of the optimizer
    steps_done = int(model.optimizer.iterations.numpy())
    for variable in model.non_trainable_variables:
        if variable.path.endswith("seed_generator_state"):  # dropout's, which Keras does not save
            variable.assign([variable.numpy()[0], steps_done])  # (seed, steps so far)
    epochs_done = steps_done // steps_per_epoch
    log = run / "log.csv"
    if log.exists():  # a kill between log and checkpoint leaves a row too many
        rows = log.read_bytes().split(b"\n")[:-1]
        os.truncate(log, sum(len(row) + 1 for row in rows[: 1 + epochs_done]))
    return epochs_done


def load_pretrained(model, path):
    """Take the weights of another run of this network; layers of another shape begin anew.

    Of the file, only names and numbers are read: it cannot run code.
    """
    try:
        saved = json.loads(zipfile.ZipFile(path).read("config.json"))["config"]
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        fail(f"--weights {path} is no run's model.keras or last.keras: {error}")
    if (saved["name"], len(saved["layers"])) != (model.name, len(model.layers)):
        fail(f"--weights {path} is a {saved['name']} of other layers than this {model.name}")
    before = [layer.get_weights() for layer in model.layers]
    without_optimizer = keras.Model(model.inputs, model.outputs)  # the same layers
    with warnings.catch_warnings(action="ignore"):  # Keras' are long, and not all of them true
        without_optimizer.load_weights(path, skip_mismatch=True)
    for layer, old in zip(model.layers, before):
        if old and all(map(np.array_equal, old, layer.get_weights())):
            print(f"The weights of {layer.name} have another shape and begin anew.")


def save(model, path):
    """Save a model so that a kill leaves the file that was there, or the new one, whole."""
    new = path.with_name("new.keras")
    model.save(new)
    os.replace(new, path)


def draw(run, images, labels, probabilities, class_names):
    """Draw the pictures of a run, whatever the user's matplotlibrc says."""
    chinese = ["Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei"]
    chinese += ["Microsoft YaHei", "SimHei", "Hiragino Sans GB", "Heiti TC"]
    fonts = ["DejaVu Sans", *(name for name in chinese if name in get_font_names())]
    style = matplotlib.style.context(["default", {"font.family": fonts}])
    with style, warnings.catch_warnings(action="ignore"):
        draw_curves(run)
        draw_confusion(run, labels, probabilities, class_names)
        draw_mistakes(run, images, labels, probabilities, class_names)


def draw_curves(run):
    """Draw RUN/curves.png from RUN/log.csv."""
    log = np.genfromtxt(run / "log.csv", delimiter=",", names=True, ndmin=1)
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3), ("loss", "accuracy", "learning_rate")):
        for column in (name, f"val_{name}"):
            if column in log.dtype.names:
                axes.plot(log["epoch"] + 1, log[column], label=column)
        axes.set(xlabel="epoch", title=name.replace("_", " "))
        if name == "learning_rate":
            axes.set_yscale("log")
        axes.legend()
    figure.savefig(run / "curves.png", dpi=150)


def draw_confusion(run, labels, probabilities, class_names):
    """Draw RUN/confusion.png: how often each class was taken for which."""
    n = len(class_names)
    counts = tf.math.confusion_matrix(labels, probabilities.argmax(axis=-1), n).numpy()
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted", ylabel="label", title="test images")
    figure.colorbar(axes.imshow(counts, cmap="Blues"))
    if n <= 20:
        axes.set_xticks(range(n), class_names, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(range(n), class_names, parse_math=False)
        for (row, column), number in np.ndenumerate(counts):
            colour = "white" if number > counts.max() / 2 else "black"
            axes.text(column, row, number, ha="center", va="center", color=colour, fontsize=8)
    figure.savefig(run / "confusion.png", dpi=150)


def draw_mistakes(run, images, labels, probabilities, class_names):
    """Draw RUN/mistakes.png: the 25 wrong answers that the network was surest of."""
    predicted = probabilities.argmax(axis=-1)
    confidence = probabilities.max(axis=-1)
    wrong = np.flatnonzero(predicted != labels)
    surest = wrong[np.argsort(-confidence[wrong])][:25]
    figure = Figure(figsize=(12, 14), layout="constrained")
    figure.suptitle(f"{len(wrong)} mistakes in {len(labels)} test images, surest first")
    for place, i in enumerate(surest, start=1):
        axes = figure.add_subplot(5, 5, place, xticks=[], yticks=[])
        title = f"{class_names[labels[i]]}, taken for\n{class_names[predicted[i]]}"
        axes.set_title(f"{title} ({confidence[i]:.1%})", fontsize=10, parse_math=False)
        axes.imshow(images[i])
    figure.savefig(run / "mistakes.png", dpi=100)


# ---------------- command line


def fail(message):
    """End with a line that says what is wrong and what to do."""
    sys.exit(f"error: {' '.join(message.split())}")


def way_on(args):
    """Return what a message adds once there is a run to go on with."""
    return f". To go on: --resume {args.resume}" if args.resume else ""


def positive_int(text):
    """The type of an option that counts something: a whole number from 1 on."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def absolute_path(text):
    """The type of an option that names a file or folder."""
    return os.path.abspath(os.path.expanduser(text))


def parse_shared_args(parser, argv, batch_size, epochs):
    """Add the options of all scripts and parse; with --resume RUN, that run's are the defaults."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.error = fail  # in one line
    add = parser.add_argument
    datasets = ("cifar10", "cifar100", "synthetic")
    precisions = ("float32", "mixed_bfloat16", "mixed_float16")
    add("-b", "--batch_size", type=positive_int, default=batch_size, help="images per step")
    add("-e", "--epochs", type=positive_int, default=epochs, help="the schedule scales with it")
    add("-d", "--dataset", choices=datasets, default="cifar10", help="what to train on")
    add("--data_dir", type=absolute_path, help="folder of your own pictures: CLASS/*.jpg")
    add("--log_dir", type=absolute_path, default="runs", help="folder for the runs' folders")
    add("--image_size", type=positive_int, default=32, help="of your own pictures")
    add("--validation_split", type=float, default=0.0, help="fraction of the training images")
    add("--weights", type=absolute_path, metavar="FILE", help="begin with a run's model.keras")
    add("--gpus", type=positive_int, default=1, help="how many GPUs share each batch")
    add("--precision", choices=precisions, default="float32", help="bfloat16: GPUs from Ampere on")
    add("--seed", type=int, default=0, help="of weights, shuffling and augmentation")
    add("--resume", type=absolute_path, metavar="RUN", help="folder of a run to go on with")
    if argv is not None:
        argv = [str(word) for word in argv]  # a notebook may give numbers
    args = parser.parse_args(argv)
    if args.resume:
        try:
            saved = json.loads(Path(args.resume, "args.json").read_text())["options"]
            Path(args.resume, "last.keras").stat()
        except (OSError, ValueError, KeyError):
            fail(f"--resume {args.resume} is no run's folder with args.json and last.keras")
        parser.set_defaults(**saved)
        args = parser.parse_args(argv)
        for key in saved.keys() - {"epochs", "data_dir", "log_dir", "gpus", "resume"}:
            if getattr(args, key) != saved[key]:
                fail(f"--{key} cannot change on the way: {args.resume} has {saved[key]}")
    if args.batch_size % args.gpus:
        fail(f"--gpus {args.gpus} does not divide --batch_size {args.batch_size}")
    if args.gpus > 1 and args.precision == "mixed_float16":
        fail("mixed_float16 is for one GPU: Keras looks for overflows on one only")
    if not 0 <= args.validation_split < 1:
        fail(f"--validation_split {args.validation_split} is not a fraction, such as 0.1")
    if args.image_size != 32 and not args.data_dir:
        fail("--image_size is for your own pictures: those of CIFAR are 32x32")
    return args


def main(argv=None):
    """Train as the options say, those of the command line or a list like ["--epochs", "3"]."""
    args = parse_args(argv)
    sys.stdout = sys.stdout or sys.stderr  # which may be closed
    if keras.backend.backend() == "jax":
        tf.config.set_visible_devices([], "GPU")  # TensorFlow only feeds JAX
    policy = keras.config.dtype_policy()
    epsilon = keras.config.epsilon()
    keras.config.set_floatx("float32")  # whatever ~/.keras/keras.json says
    keras.config.set_image_data_format("channels_last")
    keras.config.set_dtype_policy(args.precision)
    # With JAX, Keras cuts probabilities off at epsilon, below which they would have no gradient.
    keras.config.set_epsilon(1e-37)
    try:
        train(args)
    except (KeyboardInterrupt, OSError, UnicodeError) as error:  # a folder, its name, the disk
        fail(f"{str(error) or 'interrupted'}{way_on(args)}")
    except Exception as error:
        if not re.search("resource_?exhausted|memoryerror", repr(error).lower()):
            raise
        less = "a new run with a smaller --batch_size or --image_size needs less"
        fail(f"out of memory: {less}{way_on(args)}")
    finally:  # for a notebook, which goes on
        keras.config.set_dtype_policy(policy)
        keras.config.set_epsilon(epsilon)
        keras.distribution.set_distribution(None)


if __name__ == "__main__":
    main()
