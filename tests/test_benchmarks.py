"""The benchmark counts right and prints what it promises, whatever the speed."""

import csv
import json
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, load

STEPS = ROOT / "benchmarks" / "steps.py"
steps = load(STEPS)
throughput = load(ROOT / "benchmarks" / "throughput.py")
SCRIPT = "1_Lecun_Network/LeNet_dp_keras.py"


def program(*arguments, cwd):
    arguments = [sys.executable, *map(str, arguments)]
    return subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_multiply_adds():
    lenet = load("LeNet_keras").lenet()
    # conv1, conv2, and three dense layers
    by_hand = 28**2 * 6 * 75 + 10**2 * 16 * 150 + 400 * 120 + 120 * 84 + 84 * 10
    assert steps.multiply_adds(lenet) == by_hand
    inputs = keras.layers.Input((32, 32, 256))
    grouped = load("ResNeXt_keras").grouped_conv(inputs, 256, 1, groups=4)
    # 256 channels, each made of the 64 of its group
    assert steps.multiply_adds(keras.Model(inputs, grouped)) == 32**2 * 256 * 9 * 64


def tiny_model(together=1):
    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", steps_per_execution=together)
    return model


def test_cost_of_slow_batches_is_seen():
    def slow(*batch):
        time.sleep(0.05)
        return batch

    x = np.zeros((200, 4, 2), np.float32), np.zeros((200, 4, 1), np.float32)
    batches = tf.data.Dataset.from_tensor_slices(x)
    batches = batches.map(lambda *xy: tf.numpy_function(slow, xy, [tf.float32] * 2))
    batches = batches.map(lambda x, y: (tf.ensure_shape(x, (4, 2)), tf.ensure_shape(y, (4, 1))))
    row = steps.measure(keras.Model.fit, tiny_model(), batches, 0.2, 1, time.time())
    assert 0.5 < row["pipeline_cost"] < 1 and 10 < row["images_per_s"] < 80


@pytest.mark.parametrize("together, seconds, done", [(1, 1, 390), (32, 0.36, 352), (500, 9, 500)])
def test_steps_done_are_the_steps_counted(monkeypatch, together, seconds, done):
    """fit does whole executions, of several steps each."""
    counts = []

    def note(fit, model, batches, count):
        counts.append(count)
        return 0.001

    monkeypatch.setattr(steps, "seconds_per_step", note)
    x = np.zeros((500, 4, 2), np.float32), np.zeros((500, 4, 1), np.float32)
    batches = tf.data.Dataset.from_tensor_slices(x).repeat()
    steps.measure(keras.Model.fit, tiny_model(together), batches, seconds, 2, 0)
    assert counts == [together] + [done] * 4


@pytest.mark.slow
def test_table_csv_and_picture(tmp_path):
    options = ["--seconds", "0.2", "--repeats", "1", "--csv", "speed.csv", "--picture", "speed.png"]
    done = program(
        STEPS.with_name("throughput.py"), *options, SCRIPT, f"{SCRIPT} -b 0", cwd=tmp_path
    )
    assert done.returncode == 1  # of the second configuration, which does not spoil the first
    assert f"error: {SCRIPT} -b 0: " in done.stderr and "--batch_size 0" in done.stderr
    (row,) = csv.DictReader((tmp_path / "speed.csv").open())
    assert row["network"] == "LeNet_dp" and row["parameters"] == "62006"
    plain, launched = (float(row[f"{name}_images_per_s"]) for name in ("plain", "launched"))
    assert plain > 0 and float(row["launched_to_plain"]) == pytest.approx(launched / plain)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert len(done.stdout.splitlines()) == 2  # the header, one row
    assert {path.name for path in tmp_path.iterdir()} == {"speed.csv", "speed.png"}  # no runs


@pytest.mark.slow
def test_operations_of_a_step(tmp_path):
    done = program(STEPS, "--operations", 8, ROOT / SCRIPT, "--dataset", "synthetic", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 8 and "Conv2DBackpropFilter" in done.stdout


def test_programs_take_turns_and_the_table_has_medians(monkeypatch):
    rates = iter([2, 4, 1, 4, 6, 3, 3, 6, 9])
    order = []

    def figures(command):
        order.append(command)
        row = {"images_per_s": next(rates), "network": "N", "pipeline_cost": 0.1}
        return row | ({"peak_rss_mb": 7} if command == "b" else {})

    monkeypatch.setattr(throughput, "figures", figures)
    row = throughput.measure({"plain": "a", "launched": "b", "third": "c"}, repeats=3)
    assert order == ["a", "b", "c"] * 3
    assert [row[f"{name}_images_per_s"] for name in ("plain", "launched", "third")] == [3, 6, 3]
    assert row["launched_to_plain"] == 2 and row["launched_to_plain_range"] == "1.50 to 2.00"
    assert row["third_to_plain"] == 0.75 and row["third_to_plain_range"] == "0.50 to 3.00"
    assert row["launched_peak_rss_mb"] == 7 and row["plain_peak_rss_mb"] is None


def test_program_without_figures_is_named(tmp_path):
    peer = tmp_path / "peer.py"
    for text, message in (
        (f"print('starting'); print({json.dumps({'images_per_s': 2})!r})", None),
        ("print('no figures')", "it prints no JSON with images_per_s"),
        ("import sys; sys.exit('error: no such network')", "error: no such network"),
        ("import sys; print('{\"images_per_s\": 2}'); sys.exit('killed')", "killed"),
    ):
        peer.write_text(text)
        if message is None:
            assert throughput.figures([sys.executable, str(peer)])["images_per_s"] == 2
            continue
        with pytest.raises(RuntimeError, match=message):
            throughput.figures([sys.executable, str(peer)])
