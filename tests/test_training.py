"""Runs as users start them: alone in a folder, killed, interrupted, resumed, on two devices."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, SCRIPTS, command, load, only_run, run

# The least that makes a network learn the synthetic images.
SMALL = {"ResNet_keras": ["--stack_n", 1, "--epochs", 2]}
FILES = {"args.json", "log.csv", "train", "validation", "last.keras", "model.keras"}
PICTURES = {"curves.png", "confusion.png"}

EVALUATE = """
import keras, numpy
test = numpy.load("test.npz")
model = keras.models.load_model("model.keras")
print("evaluated", *model.evaluate(test["images"], test["labels"], verbose=0))
"""


def read_log(folder):
    return np.atleast_1d(np.genfromtxt(folder / "log.csv", delimiter=",", names=True))


def weights(path):
    return keras.models.load_model(path).get_weights()


def event_tags(folder):
    """The names of the scalars in TensorBoard's event files."""
    return {
        value.tag
        for path in map(str, folder.glob("events.*"))
        for event in tf.compat.v1.train.summary_iterator(path)
        for value in event.summary.value
    }


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_alone_in_a_folder_learns_and_leaves_a_usable_model(name, tmp_path):
    script = shutil.copy(SCRIPTS[name], tmp_path)
    options = SMALL.get(name, ["--epochs", 3])
    done = run(script, "--dataset", "synthetic", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no photographs" in done.stdout
    *_, result, last = done.stdout.splitlines()
    accuracy, loss = map(float, re.findall(r"(?:accuracy|loss) (\d+\.\d+)", result))
    assert accuracy > 0.5

    folder = only_run(tmp_path)
    assert last == f"Run: {folder}"
    assert {path.name for path in folder.iterdir()} == FILES | PICTURES
    log = read_log(folder)
    assert log.dtype.names == (
        *("epoch", "accuracy", "learning_rate", "loss", "seconds", "val_accuracy", "val_loss"),
    )
    np.testing.assert_array_equal(log["epoch"], range(options[-1]))
    assert log["val_accuracy"][-1] == pytest.approx(accuracy, abs=2e-3)
    tags = {"epoch_loss", "epoch_accuracy"}
    assert tags | {"epoch_learning_rate"} <= event_tags(folder / "train")
    assert tags <= event_tags(folder / "validation")
    for picture in PICTURES:
        assert tf.io.decode_png((folder / picture).read_bytes()).shape[0] > 100

    images, labels = load(name).load_data("synthetic")[1]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(folder / "model.keras", elsewhere)
    np.savez(elsewhere / "test.npz", images=images, labels=labels)
    fresh = subprocess.run(
        [sys.executable, "-c", EVALUATE], cwd=elsewhere, capture_output=True, text=True
    )
    assert "evaluated" in fresh.stdout, fresh.stderr
    evaluated_loss, evaluated_accuracy = map(float, fresh.stdout.split()[1:])
    assert evaluated_accuracy == pytest.approx(accuracy, abs=6e-5)
    assert evaluated_loss == pytest.approx(loss, abs=6e-5)

    again = run(script, "--resume", folder, cwd=tmp_path)
    assert again.returncode == 0 and "is finished" in again.stdout


def start_and_kill(arguments, cwd, moment):
    """Start a command; kill it as soon as moment(folder of its run) is true."""
    with open(cwd / "output.txt", "a") as output:
        process = subprocess.Popen(arguments, cwd=cwd, stdout=output, stderr=output)
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        found = list(cwd.glob("runs/*/*/args.json"))
        if found and moment(found[0].parent):
            break
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (cwd / "output.txt").read_text()


def rows(folder):
    """How many epochs log.csv has."""
    return (folder / "log.csv").read_text().count("\n") - 1 if (folder / "log.csv").exists() else -1


def after(epochs, seconds):
    """The moment some seconds after these epochs have ended."""
    since = []

    def moment(folder):
        if rows(folder) >= epochs:
            since.append(time.monotonic())
        return since and time.monotonic() - since[0] >= seconds

    return moment


def row_without_checkpoint(epochs):
    """The moment when the log has the row of an epoch whose checkpoint is not there yet."""
    return lambda folder: rows(folder) >= epochs


def saving(epochs):
    """The moment when the checkpoint of an epoch is half written."""
    return lambda folder: rows(folder) >= epochs and (folder / "writing.keras").exists()


def drawing(picture):
    """The moment when a picture has just been begun."""
    return lambda folder: (folder / picture).exists()


KILLS = {
    "LeNet_dp_da_wd_keras": (
        ["--epochs", 8],
        [
            lambda folder: True,  # before the first epoch
            after(0, 0.2),
            saving(1),
            after(2, 0.3),
            row_without_checkpoint(4),
            saving(5),
            after(6, 0.1),
            saving(8),
            drawing("curves.png"),
            drawing("confusion.png"),
        ],
    ),
    "ResNet_keras": (["--stack_n", 1, "--epochs", 3], [after(1, 1.0), saving(2)]),
}


@pytest.mark.parametrize("name", KILLS)
def test_killed_and_resumed_run_equals_an_uninterrupted_one(name, tmp_path):
    options, moments = KILLS[name]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    assert run(name, "--dataset", "synthetic", *options, cwd=whole).returncode == 0
    arguments = command(name, "--dataset", "synthetic", *options)
    for moment in moments:
        start_and_kill(arguments, broken, moment)
        folder = only_run(broken)
        assert not (folder / "model.keras").exists()
        arguments = command(name, "--resume", folder)
    done = subprocess.run(arguments, cwd=broken, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    expected, found = only_run(whole), only_run(broken)
    for a, b in zip(weights(expected / "model.keras"), weights(found / "model.keras")):
        np.testing.assert_array_equal(a, b)
    a, b = read_log(expected), read_log(found)
    for column in set(a.dtype.names) - {"seconds"}:
        np.testing.assert_array_equal(a[column], b[column])
    assert {path.name for path in found.iterdir()} == FILES | PICTURES


def test_ctrl_c_names_the_command_that_goes_on(tmp_path):
    arguments = command("LeNet_keras", "--dataset", "synthetic", "--epochs", 500)
    process = subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (found := list(tmp_path.glob("runs/*/*/last.keras"))):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - start < 10  # a second or two where nothing else runs
    assert process.returncode == 1 and "Traceback" not in errors
    message = errors.splitlines()[-1]
    resume = shlex.split(message.removeprefix("Interrupted. To go on: "))
    assert resume == ["python", arguments[1], "--resume", str(found[0].parent)]


def with_two_cpus(script, *options):
    """The command that runs a script where TensorFlow sees two logical CPU devices."""
    code = (
        "import runpy, sys, tensorflow as tf\n"
        "cpu = tf.config.list_physical_devices('CPU')[0]\n"
        "two = [tf.config.LogicalDeviceConfiguration()] * 2\n"
        "tf.config.set_logical_device_configuration(cpu, two)\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    return [sys.executable, "-c", code, *command(script, *options)[1:]]


@pytest.mark.parametrize(
    "name, options",
    [
        ("LeNet_dp_da_wd_keras", ["--batch_size", 1000]),
        # Batch normalisation at rate 0.1 multiplies rounding errors with every step.
        ("ResNet_keras", ["--stack_n", 1, "--batch_size", 5000]),
    ],
)
def test_two_devices_train_like_one(name, options, tmp_path):
    logs = []
    for gpus in (1, 2):
        cwd = tmp_path / str(gpus)
        cwd.mkdir()
        options = ["--dataset", "synthetic", "--epochs", 3, "--gpus", gpus, *options]
        arguments = with_two_cpus(name, *options)
        if gpus == 2:
            start_and_kill(arguments, cwd, lambda folder: (folder / "last.keras").exists())
            arguments = with_two_cpus(name, "--resume", only_run(cwd))
        done = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        keras.models.load_model(only_run(cwd) / "model.keras")
        logs.append(read_log(only_run(cwd)))
    np.testing.assert_allclose(logs[0]["loss"], logs[1]["loss"], rtol=0, atol=1e-5)


def test_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_epoch(monkeypatch, tmp_path):
    script = load("LeNet_keras")
    options = ["--dataset", "synthetic", "--epochs", "3"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["LeNet_keras.py", *options])
    monkeypatch.setattr(script, "scheduler", lambda epoch, epochs: 1e9 if epoch == 1 else 0.01)
    with pytest.raises(script.UsageError, match=r"the loss became (nan|inf) in epoch 2: "):
        script.main()
    folder = only_run(tmp_path)
    assert len(read_log(folder)) == 1
    model = script.multi_gpu_model(script.lenet, 1)
    assert script.resume(folder, model, 39) == 1
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


def test_help_states_defaults_and_the_readme_commands_exist():
    for name in SCRIPTS:
        text = subprocess.run(command(name, "--help"), capture_output=True, text=True).stdout
        for line in (
            "(default: 128)",
            "(default: 200)",
            "(default: cifar10)",
            "(default: float32)",
        ):
            assert line in text
    for script in re.findall(r"python (\S+_keras\.py)", (ROOT / "README.md").read_text()):
        assert (ROOT / script).exists()


def test_options_are_kept_with_the_run(tmp_path):
    run("LeNet_keras", "--dataset", "synthetic", "--epochs", 1, "--seed", 3, cwd=tmp_path)
    saved = json.loads((only_run(tmp_path) / "args.json").read_text())
    assert saved["script"] == "LeNet_keras.py" and saved["seed"] == 3 and saved["epochs"] == 1
