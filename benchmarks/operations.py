"""Print which operations of TensorFlow a script's training step spends its time in.

    python benchmarks/operations.py 4_Residual_Network/ResNet_keras.py --stack_n 3
    python benchmarks/operations.py 7_DenseNet/DenseNet_keras.py --precision mixed_bfloat16

What follows the script are its own options. Three steps on synthetic data are recorded by
TensorFlow's profiler after three others. Operations that need not wait for each other run at the
same time and share the processors, so that all times together are more than that of the step.
"""

import argparse
import collections
import importlib.util
import sys
import tempfile
import time
from pathlib import Path

STEPS = 3


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--top", type=int, default=15, help="how many operations to print (15)")
    parser.add_argument("script", type=Path)
    parser.add_argument("options", nargs=argparse.REMAINDER)
    own = parser.parse_args()
    spec = importlib.util.spec_from_file_location(own.script.stem, own.script)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    sys.argv = [own.script.name, "--dataset", "synthetic", *own.options]
    args = script.parse_args()
    script.keras.config.set_dtype_policy(args.precision)
    (images, labels), _ = script.load_data(args.dataset)
    batches = script.train_batches(images, labels, args.batch_size, args.seed, 0, 1)
    model = script.multi_gpu_model(lambda: script.build_network(args), args.gpus)
    ends = []
    note = script.keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter())
    )
    options = {"steps_per_epoch": STEPS, "shuffle": False, "verbose": 0, "callbacks": [note]}
    model.fit(batches, **options)
    with tempfile.TemporaryDirectory() as folder:
        script.tf.profiler.experimental.start(folder)
        model.fit(batches, **options)
        script.tf.profiler.experimental.stop()
        (recorded,) = Path(folder).glob("plugins/profile/*/*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(recorded.read_bytes())

    milliseconds, calls = collections.Counter(), collections.Counter()
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                # An operation's event is called "its name in the graph:its type".
                name, _, operation = plane.event_metadata[event.metadata_id].name.rpartition(":")
                if name and not name.endswith(":"):  # "Tracing::like this" is none
                    milliseconds[operation] += event.duration_ps / 1e9 / STEPS
                    calls[operation] += 1 / STEPS
    step = (ends[-1] - ends[-STEPS]) / (STEPS - 1)
    print(f"{model.name}, {args.precision}: {1000 * step:.1f} ms a step")
    for operation, time_spent in milliseconds.most_common(own.top):
        print(f"{time_spent:10.2f} ms {calls[operation]:6.0f} x {operation.lstrip('_')}")


if __name__ == "__main__":
    main()
