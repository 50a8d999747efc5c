#!/usr/bin/env python3
"""Time the exchanges of several machines, on each of which this is started by launch/machines.py.

python launch/machines.py --workers A:2222,B:2222 --index 0 benchmarks/exchange.py

Worker 0 prints how long the mean over all workers of so many float32 takes (median of three).
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf


def exchanges(strategy, size, count):
    """Return a function that takes the mean of an array over all workers, count times in turn."""
    with strategy.scope():
        array = tf.Variable(tf.ones([size]))

    def of_one_worker():
        mean = array.read_value()
        for _ in range(count):
            mean = tf.distribute.get_replica_context().all_reduce("MEAN", mean)
        return tf.reduce_sum(mean)

    return tf.function(lambda: strategy.run(of_one_worker), autograph=False)


def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    keras.utils.set_random_seed(0)  # where the workers meet
    for size in (1, 1_000, 100_000, 1_000_000, 10_000_000):
        count, times = 20 if size < 1e6 else 4, []
        exchange = exchanges(tf.distribute.get_strategy(), size, count)
        exchange()
        for _ in range(3):
            begun = time.perf_counter()
            exchange()
            times.append((time.perf_counter() - begun) / count)
        print(f"{size:,} floats: {1000 * statistics.median(times):.1f} ms", flush=True)


if __name__ == "__main__":
    main()
