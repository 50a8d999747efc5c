"""Measure how fast the scripts of this collection train on this machine.

    python benchmarks/throughput.py                               # all networks, in float32
    python benchmarks/throughput.py --precision float32 --precision mixed_bfloat16 \\
        --csv speed.csv --picture speed.png
    python benchmarks/throughput.py "4_Residual_Network/ResNet_keras.py --stack_n 3"
    python benchmarks/throughput.py "7_DenseNet/DenseNet_keras.py --recompute" \\
        --compare "python other_program.py"

A configuration is a script and its options in one argument. Each is trained on the synthetic data
set in a process of its own, by its own main(), in blocks of steps: one block from the input
pipeline, one on a single batch that stays in memory, and so on in turn; the rates are those of the
median step of each block. Nothing else should run on the machine.

--compare takes one configuration and a command that prints a line of JSON with images_per_s as its
last; the two run in turn, and the ratios are ours divided by theirs.
"""

import argparse
import contextlib
import csv
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

CONFIGURATIONS = [
    "1_Lecun_Network/LeNet_keras.py",
    "1_Lecun_Network/LeNet_dp_keras.py",
    "1_Lecun_Network/LeNet_dp_da_keras.py",
    "1_Lecun_Network/LeNet_dp_da_wd_keras.py",
    "2_Network_in_Network/Network_in_Network_keras.py",
    "2_Network_in_Network/Network_in_Network_bn_keras.py",
    "3_Vgg19_Network/Vgg19_keras.py --weights none",
    "4_Residual_Network/ResNet_keras.py --stack_n 3",
    "4_Residual_Network/ResNet_keras.py --stack_n 5",
    "4_Residual_Network/ResNet_keras.py --stack_n 18",
    "5_Wide_Residual_Network/Wide_ResNet_keras.py --depth 16 --width 8",
    "5_Wide_Residual_Network/Wide_ResNet_keras.py --depth 28 --width 10",
    "6_ResNeXt/ResNeXt_keras.py --batch_size 64",
    "7_DenseNet/DenseNet_keras.py",
    "8_SENet/SENet_keras.py --batch_size 64",
]
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
CIFAR_TRAINING_IMAGES, CIFAR_TEST_IMAGES = 50000, 10000


def locate(path):
    """Return the path of a script, which may be relative to the repository's folder."""
    return Path(path) if Path(path).exists() else Path(__file__).parents[1] / path


class Measured(Exception):
    """Leaves the script's main() when all has been timed."""


def in_new_process(function, *arguments):
    """Return function(*arguments) from a new process, whose memory and start are its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(function, *arguments).result()


def machine_limit(precision):
    """Return GFLOP/s of a matrix product and of a 3x3 convolution, the best of five each."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    import tensorflow as tf

    dtype = precision.removeprefix("mixed_")
    size, batch, channels = 3072, 64, 256
    matrix = tf.cast(tf.random.normal([size, size]), dtype)
    images = tf.cast(tf.random.normal([batch, 32, 32, channels]), dtype)
    kernel = tf.cast(tf.random.normal([3, 3, channels, channels]), dtype)
    limits = []
    for operation, flop in (
        (lambda: matrix @ matrix, 2 * size**3),
        (lambda: tf.nn.conv2d(images, kernel, 1, "SAME"), 2 * batch * 32**2 * 9 * channels**2),
    ):
        compiled = tf.function(lambda operation=operation: tf.reshape(operation(), [-1])[0])
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            compiled().numpy()
            seconds.append(time.perf_counter() - start)
        limits.append(flop / min(seconds[1:]) / 1e9)
    return limits


def multiply_adds(model):
    """Return the multiplications of one image's way through the convolutions and dense layers."""
    total = 0
    for layer in model.layers:
        if hasattr(layer, "layers"):
            total += multiply_adds(layer)
        elif hasattr(layer, "kernel"):
            total += math.prod(layer.kernel.shape) * math.prod(layer.output.shape[1:-1])
    return total


def measure(configuration, precision, seconds, repeats, started, from_memory=True):
    """Train a configuration in blocks of so many seconds; return what the table shows of it.

    started is the time.time() at which its process was asked for. Without from_memory there are
    blocks from the pipeline only, which takes half the time.
    """
    path, *options = shlex.split(configuration)
    path = locate(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    if not hasattr(script, "multi_gpu_model"):
        raise RuntimeError("not a training script of this collection")
    build, train_batches = script.multi_gpu_model, script.train_batches
    stamps, result, arguments_of_pipeline = [], {}, []

    class Stamps(script.RunLog):
        """Keeps the ends of steps instead of a log and checkpoints."""

        def on_train_batch_end(self, batch, logs=None):
            super().on_train_batch_end(batch, logs)
            stamps.append(time.perf_counter())
            result.setdefault("first_step_s", time.time() - started)

        def on_epoch_end(self, epoch, logs=None):
            pass

    def kept_batches(*arguments):
        arguments_of_pipeline.extend(arguments)
        return train_batches(*arguments)

    def timed_model(*arguments):
        model = build(*arguments)
        fit = model.fit

        def timed_fit(pipeline, callbacks, **_):
            executed = model.steps_per_execution  # steps between two stamps
            images, labels = next(iter(pipeline))
            in_memory = script.tf.data.Dataset.from_tensors((images, labels)).repeat()

            def block(data, executions):
                stamps.clear()
                steps = executions * executed
                fit(data, steps_per_epoch=steps, verbose=0, shuffle=False, callbacks=callbacks)
                intervals = [after - before for before, after in zip(stamps, stamps[1:])]
                return len(images) * executed / statistics.median(intervals)

            rate = block(pipeline, 3)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            # Epochs of CIFAR's length, or the beginning of the next would weigh too much.
            x, y, *others = arguments_of_pipeline
            copies = CIFAR_TRAINING_IMAGES // len(x)
            x, y = (script.np.concatenate([values] * copies) for values in (x, y))
            pipeline = train_batches(x, y, *others)

            executions = max(3, 1 + round(seconds * rate / (len(images) * executed)))
            rates = [
                (
                    block(pipeline, executions),
                    block(in_memory, executions) if from_memory else math.nan,
                )
                for _ in range(repeats)
            ]
            with_pipeline, without = zip(*rates)
            variables = model.trainable_variables
            result.update(
                network=model.name,
                script=path.name,
                precision=precision,
                batch_size=len(images),
                parameters=sum(math.prod(variable.shape) for variable in variables),
                multiply_adds=multiply_adds(model),
                images_per_s=statistics.median(with_pipeline),
                slowest=min(with_pipeline),
                fastest=max(with_pipeline),
                in_memory=statistics.median(without),
                # Of the pairs of neighbouring blocks, since the machine's speed drifts.
                pipeline_cost=1 - statistics.median(a / b for a, b in rates),
                peak_rss_mb=peak // (2**20 if sys.platform == "darwin" else 1024),
            )
            raise Measured

        model.fit = timed_fit
        return model

    script.RunLog, script.multi_gpu_model, script.train_batches = Stamps, timed_model, kept_batches
    parse_args = script.parse_args

    def kept_args():
        args = parse_args()
        result["epochs"] = args.epochs
        return args

    script.parse_args = kept_args
    with tempfile.TemporaryDirectory() as log_dir, contextlib.redirect_stdout(sys.stderr):
        sys.argv = [path.name, "--dataset", "synthetic", "--precision", precision, *options]
        sys.argv += ["--log_dir", log_dir]
        try:
            script.main()
        except Measured:
            return result
        except (Exception, SystemExit) as error:  # of a class that the parent may not know
            raise RuntimeError((str(error) or type(error).__name__).splitlines()[0]) from None


def complete(row, limit):
    """Add to a row what follows from it: share of the limit in GFLOP/s, time of the training."""
    # A step takes the forward pass and two of its size backward, two operations a multiply-add.
    row["share_of_limit"] = 6 * row["multiply_adds"] * row["images_per_s"] / (1e9 * limit)
    images = CIFAR_TRAINING_IMAGES + CIFAR_TEST_IMAGES / 3
    row["training_hours"] = row["epochs"] * images / row["images_per_s"] / 3600
    return row


HEADER = (
    f"{'network':22} {'precision':14} {'batch':>5} {'parameters':>11} {'M mult-adds':>11} "
    f"{'images/s':>9} {'from..to':>17} {'in memory':>9} {'pipeline':>8} {'1st step':>8} "
    f"{'memory':>9} {'of limit':>8} {'training':>9}"
)


def line(row):
    """Return a row of the table as text."""
    spread = f"{row['slowest']:.1f}..{row['fastest']:.1f}"
    return (
        f"{row['network']:22} {row['precision']:14} {row['batch_size']:5} "
        f"{row['parameters']:11,} {row['multiply_adds'] / 1e6:11,.1f} "
        f"{row['images_per_s']:9,.1f} {spread:>17} {row['in_memory']:9,.1f} "
        f"{row['pipeline_cost']:8.1%} {row['first_step_s']:6.1f} s {row['peak_rss_mb']:6,} MB "
        f"{row['share_of_limit']:8.1%} {row['training_hours']:7.1f} h"
    )


def draw(rows, path):
    """Draw images/s and the share of the machine's limit as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.5 + 0.28 * len(rows)), layout="constrained")
    rates, shares = figure.subplots(1, 2, sharey=True)
    precisions = list(dict.fromkeys(row["precision"].removeprefix("mixed_") for row in rows))
    names = [row["network"] for row in rows]
    if len(precisions) > 1:
        names = [f"{row['network']}, {row['precision'].removeprefix('mixed_')}" for row in rows]
    colours = [f"C{PRECISIONS.index(row['precision'])}" for row in rows]
    places = range(len(rows))
    values = [row["images_per_s"] for row in rows]
    labels = [f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in values]
    rates.bar_label(rates.barh(places, values, color=colours), labels, padding=2)
    title = "training in " + " and ".join(precisions)
    rates.set(xscale="log", xlabel="images/s", title=title, yticks=places)
    rates.set_yticklabels(names)
    rates.set_xlim(min(1, min(values) / 2), 4 * max(values))
    values = [100 * row["share_of_limit"] for row in rows]
    shares.bar_label(shares.barh(places, values, color=colours), fmt="{:.0f}", padding=2)
    shares.set(xlabel="%", title="share of the best matrix product or convolution")
    shares.set_xlim(right=1.15 * max(values))
    rates.invert_yaxis()
    figure.savefig(path, dpi=120)


def compare(configuration, precision, seconds, repeats, command):
    """Run a configuration and a command in turn; print every pair and the medians' ratios."""
    ratios = {"images_per_s": [], "first_step_s": [], "peak_rss_mb": []}
    for _ in range(repeats):
        ours = in_new_process(measure, configuration, precision, seconds, 1, time.time(), False)
        try:
            done = subprocess.run(shlex.split(command), stdout=subprocess.PIPE, text=True)
            theirs = json.loads(done.stdout.splitlines()[-1])
            pairs = {key: (ours[key], float(theirs[key])) for key in ratios if key in theirs}
            if done.returncode or "images_per_s" not in pairs:
                raise ValueError
        except (OSError, ValueError, LookupError, TypeError):
            sys.exit(f"throughput.py: error: {command}: prints no JSON line with images_per_s")
        for key, (a, b) in pairs.items():
            ratios[key].append(a / b)
        print(", ".join(f"{key} {a:.2f} : {b:.2f}" for key, (a, b) in pairs.items()), flush=True)
    for key, values in ratios.items():
        if values:
            median, low, high = statistics.median(values), min(values), max(values)
            print(f"{key}: ours / theirs {median:.3f} ({low:.3f} to {high:.3f})")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: sys.exit(f"{parser.prog}: error: {message}")
    add = parser.add_argument
    add("configurations", nargs="*", metavar="CONFIGURATION", help="all networks if none is given")
    add("--precision", action="append", choices=PRECISIONS, help="float32 unless given")
    add("--seconds", type=float, default=5, help="of a block, at least two steps (5)")
    add("--repeats", type=int, default=3, help="pairs of blocks, or of runs to compare (3)")
    add("--csv", type=Path, help="file for the table, with all digits")
    add("--picture", type=Path, help="file for a picture of it, .png or .svg")
    add("--compare", metavar="COMMAND", help="a program to be in turn with")
    args = parser.parse_args()
    precisions = args.precision or ["float32"]
    configurations = args.configurations or CONFIGURATIONS
    if args.repeats < 1 or args.seconds <= 0:
        parser.error("--repeats and --seconds must be more than 0")
    for configuration in configurations:
        if not locate(shlex.split(configuration)[0]).is_file():
            parser.error(f"{configuration}: there is no such script")
    if args.compare:
        if len(configurations) != 1 or len(precisions) != 1:
            parser.error("--compare needs one configuration and one precision")
        try:
            compare(*configurations, *precisions, args.seconds, args.repeats, args.compare)
        except (RuntimeError, OSError) as error:
            sys.exit(f"throughput.py: error: {configurations[0]}: {error}")
        return

    limits = {}
    for precision in precisions:
        product, convolution = in_new_process(machine_limit, precision)
        limits[precision] = max(product, convolution)
        print(f"{platform.machine()}, {os.cpu_count()} processors, {precision}: ", end="")
        print(f"matrix product {product:,.0f} GFLOP/s, 3x3 convolution {convolution:,.0f} GFLOP/s")
    print(HEADER)
    rows, failed = [], False
    for configuration in configurations:
        for precision in precisions:
            try:
                row = in_new_process(
                    measure, configuration, precision, args.seconds, args.repeats, time.time()
                )
            except (RuntimeError, OSError) as error:  # BrokenProcessPool, out of memory, is one
                print(f"throughput.py: error: {configuration}: {error}", file=sys.stderr)
                failed = True
                continue
            rows.append(complete(row, limits[precision]))
            print(line(row), flush=True)
    if args.csv and rows:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    if args.picture and rows:
        draw(rows, args.picture)
    sys.exit(failed)


if __name__ == "__main__":
    main()
