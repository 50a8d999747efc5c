#!/usr/bin/env python3
"""Time the training steps of a Keras script, instead of having it train to its end.

    python benchmarks/steps.py 4_Residual_Network/ResNet_keras.py --stack_n 3 --dataset synthetic
    python launch/cpu.py benchmarks/steps.py 4_Residual_Network/ResNet_keras.py --dataset synthetic
    python benchmarks/steps.py --operations 15 7_DenseNet/DenseNet_keras.py --dataset synthetic

The script, one of this collection or another that takes --log_dir and gives fit a tf.data.Dataset
of batches, runs as it is until it calls fit, which trains some epochs
of a few steps each, on the batches of the script and in turn on one batch that stays in memory,
and ends the process. Prints one line of JSON (medians), or the operations of TensorFlow in which
a step spends its time; those that run at the same time share the processors.
"""

import argparse
import collections
import json
import math
import os
import resource
import runpy
import statistics
import sys
import tempfile
import time
from pathlib import Path

# As the scripts of this collection set them, which import Keras after this program.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import keras
import tensorflow as tf

LONGEST_EPOCH = 390  # steps: those of CIFAR in batches of 128


def multiply_adds(model):
    """Return the multiplications of one image's way through the convolutions and dense layers."""
    total = 0
    for layer in model.layers:
        if hasattr(layer, "layers"):
            total += multiply_adds(layer)
        elif hasattr(layer, "kernel"):
            total += math.prod(layer.kernel.shape) * math.prod(layer.output.shape[1:-1])
    return total


def seconds_per_step(fit, model, batches, steps):
    """Train two epochs of so many steps; return how long a step of the second took."""
    ends = []

    def note(epoch, logs):
        ends.append(time.perf_counter())
        model.stop_training = epoch == 1

    callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=note)]
    options = {"steps_per_epoch": steps, "shuffle": False, "verbose": 0, "callbacks": callbacks}
    # A launcher may look at the length of a training.
    fit(model, batches.repeat(), epochs=1000, **options)
    return (ends[1] - ends[0]) / steps


def measure(fit, model, batches, seconds, repeats, started):
    """Return the figures of a model's training as a dictionary."""
    batch, together = next(iter(batches)), model.steps_per_execution
    in_memory = tf.data.Dataset.from_tensors(batch).repeat()
    fit(model, batches, steps_per_epoch=together, shuffle=False, verbose=0)
    first_step = time.time() - started
    guess = seconds_per_step(fit, model, batches, together)
    longest = max(1, LONGEST_EPOCH // together)
    steps = together * min(max(1, round(seconds / guess / together)), longest)
    if steps > 30 and together == 1:  # so many, or a divisor, launch/cpu.py may do in one go
        steps -= steps % 30
    pairs = [
        [seconds_per_step(fit, model, data, steps) for data in (batches, in_memory)]
        for _ in range(repeats)
    ]
    batch_size = len(batch[1])
    return {
        "network": model.name,
        "batch_size": batch_size,
        "parameters": sum(math.prod(variable.shape) for variable in model.trainable_variables),
        "multiply_adds": multiply_adds(model),
        "images_per_s": batch_size / statistics.median(pair[0] for pair in pairs),
        # Of neighbours, since the speed of machines drifts.
        "pipeline_cost": 1 - statistics.median(alone / fed for fed, alone in pairs),
        "first_step_s": first_step,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def profile(fit, model, batches, top, steps=3):
    """Print the operations that take most of the time of a training step."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    options = {"steps_per_epoch": steps, "shuffle": False, "verbose": 0}
    fit(model, batches, **options)
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        fit(model, batches, **options)
        tf.profiler.experimental.stop()
        (recorded,) = Path(folder).glob("plugins/profile/*/*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(recorded.read_bytes())
    milliseconds, calls = collections.Counter(), collections.Counter()
    for plane in space.planes:
        for event in (event for line in plane.lines for event in line.events):
            # An operation's event is called "its name in the graph:its type".
            name, _, operation = plane.event_metadata[event.metadata_id].name.rpartition(":")
            if name and not name.endswith(":"):  # "Tracing::like this" is none
                milliseconds[operation] += event.duration_ps / 1e9 / steps
                calls[operation] += 1 / steps
    for operation, spent in milliseconds.most_common(top):
        print(f"{spent:10.2f} ms {calls[operation]:6.0f} x {operation.lstrip('_')}")


def main():
    started = float(os.environ.get("STARTED", time.time()))  # when the process was asked for
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seconds", type=float, default=5, help="of training a figure, at least one step (5)")
    add("--repeats", type=int, default=3, help="how often to measure in turn (3)")
    add("--operations", type=int, metavar="N", help="print the N dearest operations instead")
    add("script")
    add("options", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    fit, stdout = keras.Model.fit, sys.stdout

    def timed(model, x, *_, **__):
        sys.stdout = stdout
        if not isinstance(x, tf.data.Dataset):
            sys.exit("steps.py: error: the script gives fit no tf.data.Dataset")
        if args.operations:
            profile(fit, model, x, args.operations)
        else:
            print(json.dumps(measure(fit, model, x, args.seconds, args.repeats, started)))
        sys.stdout.flush()
        sys.exit()

    keras.Model.fit = timed
    with tempfile.TemporaryDirectory() as runs:
        sys.argv = [args.script, *args.options, "--log_dir", runs]
        sys.path[0] = str(Path(args.script).parent)
        sys.stdout = sys.stderr
        runpy.run_path(args.script, run_name="__main__")


if __name__ == "__main__":
    main()
