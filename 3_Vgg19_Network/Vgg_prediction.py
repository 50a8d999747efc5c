#!/usr/bin/env python3
"""Name what is in pictures, with VGG19 trained on ImageNet or any network of this collection.

    python Vgg_prediction.py cat.jpg ship.png                     # the 1000 classes of ImageNet
    python Vgg_prediction.py --weights FILE.h5 cat.jpg            # the same, from a file you have
    python Vgg_prediction.py --model RUN *.jpg                    # the classes it was trained on
    python Vgg_prediction.py --model RUN --csv names.csv FOLDER   # all pictures in a folder

Prints the five likeliest classes of each picture with their probabilities, and saves one picture
with all of them. The exit status is 1 if a file was no picture. Needs tensorflow, keras, numpy and
matplotlib.
"""

import argparse
import csv
import glob
import json
import logging
import os
import sys
import warnings
from pathlib import Path

# Read at import. What the user has set goes first, but for the backend: this is TensorFlow code.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # errors reach us as exceptions all the same
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # off by default before AVX-512 VNNI
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # leave the GPU's other users room

# TensorFlow greets on stderr, whatever its log level is.
stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
os.dup2(nowhere, 2)
try:
    import keras
    import matplotlib.style
    import numpy as np
    from keras.applications import vgg19
    from matplotlib.figure import Figure
    from matplotlib.font_manager import get_font_names
    from PIL import Image, ImageOps  # Pillow comes with matplotlib
finally:
    os.dup2(stderr, 2)

# Those of CIFAR-100, whose runs have numbers instead.
CIFAR100_NAMES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
    crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
    keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
    mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain
    plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
    television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
""".split()
DRAWN = 50  # pictures in the figure: PNG viewers have limits, and so has patience


class UsageError(Exception):
    """What the user gave cannot be used; the message says why and what to do, in one line."""


def parse_args():
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("pictures", nargs="+", metavar="PICTURE", help="a file that Pillow reads, or a folder")
    network = parser.add_mutually_exclusive_group()
    network.add_argument("--model", metavar="RUN", help="a run's folder, or its model.keras")
    network.add_argument("--weights", default="imagenet", help="the .h5 file of Keras' VGG19")
    add("--output", default="predictions.png", help="the picture to save; never overwrites one")
    add("--csv", help="a table to save as well: file, five classes, five probabilities")
    parser.error = lambda message: sys.exit(f"{parser.prog}: error: {message}")
    args = parser.parse_args()
    if not Path(args.output).suffix:
        parser.error(f"--output {args.output}: a picture's name ends in .png or another format's")
    return args


def imagenet_network(weights):
    """Return VGG19 as trained on ImageNet, which takes what vgg19.preprocess_input makes.

    weights is "imagenet", which Keras downloads once (575 MB), or the path of that file.
    Raises UsageError when there is no such file or it is of another network.
    """
    if weights != "imagenet" and (os.path.isdir(weights) or weights.endswith(".keras")):
        raise UsageError(f"--weights {weights} is no .h5 file: did you mean --model {weights}?")
    if weights != "imagenet" and not os.path.isfile(weights):
        raise UsageError(f"--weights {weights}: there is no such file")
    try:
        return keras.applications.VGG19(weights=weights)
    except Exception as error:  # h5py, Keras and the download each raise their own
        if weights != "imagenet":
            raise UsageError(
                f"--weights {weights} is not the file of Keras' VGG19 with all its layers"
            ) from error
        raise UsageError(
            f"cannot download the ImageNet weights ({error}): give their .h5 file with "
            "--weights FILE, or a network of your own with --model"
        ) from error


def trained_network(path):
    """Return (network, names of its classes) of a run, or of a file that its script saved.

    An unfinished run is taken as far as it is. The names are those in args.json beside the file,
    which is loaded in Keras' safe mode, where it cannot run code.
    Raises UsageError when it cannot be used.
    """
    if path.endswith((".h5", ".hdf5")):
        raise UsageError(f"--model {path} is no .keras file: did you mean --weights {path}?")
    if os.path.isdir(path):
        log = Path(path, "log.csv")
        if log.exists() and log.stat().st_size == 0:
            raise UsageError(f"--model {path} has no epoch yet")
        # A run that is trained on has a last.keras that is newer than its model.keras.
        saved = [*Path(path).glob("model.keras"), *Path(path).glob("last.keras")]
        path = max(saved, key=os.path.getmtime, default=path)
    if not os.path.isfile(path):
        raise UsageError(f"--model {path}: there is no such file")
    try:
        model = keras.models.load_model(path, compile=False)
        _, height, width, channels = model.input_shape
        _, num_classes = model.output_shape
        if height != width or channels != 3 or type(num_classes) is not int:
            raise ValueError
    except Exception as error:  # zipfile, h5py and Keras each raise their own
        raise UsageError(
            f"--model {path} is damaged or no network that a script of this collection saved"
        ) from error
    try:
        facts = json.loads(Path(path).with_name("args.json").read_text())
        names = [one_line(name) for name in facts["class_names"]]
    except (OSError, ValueError, LookupError, TypeError):
        names = []
    if names == [str(label) for label in range(100)]:
        names = CIFAR100_NAMES
    if len(names) != num_classes:
        print(f"No names beside {path}: classes have numbers only.", file=sys.stderr)
        names = [f"class {i}" for i in range(num_classes)]
    return model, names


def find_pictures(arguments):
    """Return the files that arguments name: files, folders of them, and patterns like "*.jpg"."""
    found = []
    for argument in arguments:
        paths = [argument]
        if os.path.isdir(argument):
            paths = [path for path in sorted(Path(argument).glob("[!.]*")) if path.is_file()]
        elif not os.path.exists(argument) and glob.has_magic(argument):  # Windows leaves them
            paths = sorted(glob.glob(argument))
        found += paths or [argument]
    return list(map(Path, found))


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


def imagenet_names():
    """Return the names of ImageNet's classes, or their numbers where Keras cannot download them."""
    try:
        every = vgg19.decode_predictions(np.arange(1000)[None] * 1.0, top=1000)[0]
    except Exception as error:  # Keras raises nothing more precise when a download fails
        reason = " ".join(str(error).split())
        print(f"Cannot download the classes' names ({reason}): numbers instead.", file=sys.stderr)
        return [f"class {i}" for i in range(1000)]
    return [name for _, name, _ in reversed(every)]  # the scores above rise with the number


def draw(path, titles, images, rankings):
    """Save images (height, width, 3) uint8 beside the bars of their [(name, probability)].

    In Matplotlib's defaults, whatever the user's matplotlibrc says, and with Chinese letters if a
    font that has them is installed. Raises UsageError when the picture cannot be saved.
    """
    chinese = ["Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei"]
    chinese += ["Microsoft YaHei", "SimHei", "Hiragino Sans GB", "Heiti TC"]
    fonts = ["DejaVu Sans", *(name for name in chinese if name in get_font_names())]
    with matplotlib.style.context(["default", {"font.family": fonts}]):
        figure = Figure(figsize=(8, 1 + 2 * len(images)), layout="constrained")
        grid = figure.subplots(len(images), 2, squeeze=False, width_ratios=(1, 2))
        for (left, right), title, image, ranking in zip(grid, titles, images, rankings):
            left.imshow(image)
            left.set_title(title, fontsize=9, parse_math=False)  # a file's name may have a $
            left.axis("off")
            names, probabilities = zip(*ranking)
            bars = right.barh(range(len(names)), [100 * p for p in probabilities])
            right.set_yticks(range(len(names)), names, parse_math=False)  # two are called crane
            right.bar_label(bars, fmt="%.1f%%", padding=3, fontsize=8)
            right.set(xlim=(0, 115), xticks=(0, 25, 50, 75, 100))
            right.invert_yaxis()
        grid[-1, 1].set_xlabel("probability in %")
        try:
            figure.savefig(path, dpi=100)
        except (OSError, ValueError) as error:  # no such folder, or no format for pictures
            raise UsageError(f"--output {path}: {' '.join(str(error).split())}") from error


def write_table(path, pictures, rankings):
    """Save a table with a row for each picture: file, five names, five probabilities."""
    places = range(1, 6)
    header = ["file", *(f"class_{i}" for i in places), *(f"probability_{i}" for i in places)]
    try:
        with open(path, "x", newline="", encoding="utf-8-sig") as file:  # for Excel
            writer = csv.writer(file)
            writer.writerow(header)
            for picture, ranking in zip(pictures, rankings):
                names, probabilities = zip(*(ranking + [("", "")] * 4)[:5])
                writer.writerow([one_line(str(picture)), *names, *probabilities])
    except OSError as error:
        raise UsageError(f"--csv {path}: {error.strerror}") from error


def one_line(text):
    """Return text that a terminal and a file can take, whatever is in the name of a file."""
    text = os.fsencode(text).decode(errors="replace")  # names need not be UTF-8
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def unused(path):
    """Return path, or where there is such a file, path with the next free number."""
    path = Path(path)
    numbered, number = path, 1
    while numbered.exists():
        number += 1
        numbered = path.with_stem(f"{path.stem}_{number}")
    return numbered


def main():
    """Name all pictures; return the exit status."""
    args = parse_args()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # Windows' code pages lack letters
    keras.config.set_floatx("float32")  # whatever ~/.keras/keras.json says
    keras.config.set_image_data_format("channels_last")
    failed = 0
    if args.model:
        model, names = trained_network(args.model)
    else:
        model, names = imagenet_network(args.weights), None
    pictures, images = [], []
    for path in find_pictures(args.pictures):
        try:
            if path.is_dir() or not path.exists():
                raise OSError(f"{path} " + ("has no pictures" if path.is_dir() else "is no file"))
            images.append(read_picture(path, model.input_shape[1]))
            pictures.append(path)
        except OSError as error:
            complain(error)
            failed = 1
    if not images:
        sys.exit(1)

    pixels = np.stack(images)
    if not args.model:
        pixels = vgg19.preprocess_input(pixels.astype(np.float32))
    probabilities = model.predict(pixels, batch_size=8, verbose=0)
    names = names or imagenet_names()
    rankings = []
    titles = [one_line(path.name) for path in pictures]
    for title, row in zip(titles, probabilities):
        rankings.append([(names[i], float(row[i])) for i in row.argsort()[:-6:-1]])
        print(title)
        for name, probability in rankings[-1]:
            print(f"  {100 * probability:6.2f}%  {name}")
    if args.csv:
        table = unused(args.csv)
        write_table(table, pictures, rankings)
        print(f"{table}: the same as a table.")
    output = unused(args.output)
    draw(output, titles[:DRAWN], images[:DRAWN], rankings[:DRAWN])
    shown = f"the first {DRAWN} pictures" if len(images) > DRAWN else "all pictures"
    print(f"{output}: {shown}.")
    return failed


def complain(error):
    """Say in one line on stderr what is wrong."""
    print(
        f"{Path(__file__).name}: error: {one_line(' '.join(str(error).split()))}", file=sys.stderr
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of Pillow, about what is odd in a picture
    logging.disable()
    try:
        sys.exit(main())
    except (UsageError, OSError, MemoryError) as error:
        complain(str(error) or "out of memory: give fewer pictures at a time")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit("Interrupted.")
