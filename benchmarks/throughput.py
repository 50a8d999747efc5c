"""Run one script of the collection and print how fast it trained, as one line of JSON.

    python benchmarks/throughput.py 4_Residual_Network/ResNet_keras.py --stack_n 3 --epochs 2
    python benchmarks/throughput.py 1_Lecun_Network/LeNet_keras.py --epochs 20
    python benchmarks/throughput.py --steps 6 6_ResNeXt/ResNeXt_keras.py --batch_size 64

What follows the script are its own options; the data set is synthetic if they name none. The run's
folder is a temporary one. --steps N ends the training after N steps, for networks whose epochs
take minutes. images_per_s comes from the median time between the ends of two steps of an epoch;
overhead is the time of all epochs but the first, validation and checkpoints included, divided by
the time spent inside training and validation steps.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path


class EnoughSteps(Exception):
    """Leaves the training when it has been timed."""


def main():
    start = time.perf_counter()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=math.inf, help="end after so many steps")
    parser.add_argument("script", type=Path)
    parser.add_argument("options", nargs=argparse.REMAINDER)
    benchmark = parser.parse_args()
    path, options = benchmark.script, benchmark.options
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    stamps = {"begin": [], "steps": [], "inside": [], "end": [], "first": None}

    class TimedRunLog(script.RunLog):
        """Keeps the moments at which epochs begin and end and the time inside of steps."""

        def on_epoch_begin(self, epoch, logs=None):
            super().on_epoch_begin(epoch, logs)
            stamps["begin"].append(time.perf_counter())
            stamps["steps"].append([])
            stamps["inside"].append(0)

        def on_train_batch_begin(self, batch, logs=None):
            self.step_start = time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            super().on_train_batch_end(batch, logs)
            stamps["execution"] = self.model.steps_per_execution  # several steps in LeNet's
            now = time.perf_counter()
            stamps["first"] = stamps["first"] or now
            stamps["inside"][-1] += now - self.step_start
            stamps["steps"][-1].append(now)
            if sum(map(len, stamps["steps"])) >= benchmark.steps:
                raise EnoughSteps

        def on_test_batch_begin(self, batch, logs=None):
            self.step_start = time.perf_counter()

        def on_test_batch_end(self, batch, logs=None):
            stamps["inside"][-1] += time.perf_counter() - self.step_start

        def on_train_end(self, logs=None):
            super().on_train_end(logs)
            # What fit() does after the last epoch counts as part of that epoch.
            stamps["end"] = [*stamps["begin"][1:], time.perf_counter()]

    script.RunLog = TimedRunLog
    with tempfile.TemporaryDirectory() as log_dir, contextlib.redirect_stdout(sys.stderr):
        sys.argv = [str(path), "--dataset", "synthetic", *options, "--log_dir", log_dir]
        with contextlib.suppress(EnoughSteps):
            script.main()
        args = json.loads(next(Path(log_dir).glob("*/*/args.json")).read_text())

    intervals = [b - a for epoch in stamps["steps"] for a, b in zip(epoch, epoch[1:])]
    if not intervals:
        sys.exit("throughput.py: an epoch has a single step: choose a smaller --batch_size")
    step = statistics.median(intervals) / stamps["execution"]
    result = {
        "script": path.name,
        "options": options,
        "images_per_s": round(args["batch_size"] / step, 1),
        "first_step_s": round(stamps["first"] - start, 2),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    if stamps["end"] and args["epochs"] > 1:
        whole = sum(b - a for a, b in zip(stamps["begin"][1:], stamps["end"][1:]))
        result["overhead"] = round(whole / sum(stamps["inside"][1:]), 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
