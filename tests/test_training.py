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
from conftest import ROOT, SCRIPTS, command, copy, load, only_run, run

# What makes a network learn the synthetic images in seconds: how many of them, for how many epochs,
# the accuracy to reach, of which 0.1 is guessing, and options.
SMALL = {
    "ResNet_keras": (1280, 3, 0.5, ["--batch_size", 32, "--stack_n", 1]),
    "ResNet": (1280, 3, 0.5, ["--batch_size", 32, "--stack_n", 1]),
    "Network_in_Network_keras": (1280, 4, 0.2, ["--batch_size", 64, "--seed", 1]),
    "Network_in_Network_bn_keras": (640, 4, 0.4, ["--batch_size", 16]),
    "Vgg19_keras": (640, 2, 0.2, ["--batch_size", 16, "--weights", "none"]),
    "Wide_ResNet_keras": (1280, 3, 0.5, ["--batch_size", 32, "--depth", 10, "--width", 1]),
    "DenseNet_keras": (640, 3, 0.5, ["--batch_size", 32, "--depth", 10]),
    "ResNeXt_keras": (320, 3, 0.5, ["--batch_size", 16, "--cardinality", 2, "--base_width", 4]),
    "SENet_keras": (320, 2, 0.3, ["--batch_size", 16, "--cardinality", 2, "--base_width", 4]),
}
# Other scripts that run contain all that these do, or learn in minutes rather than seconds.
SLOW_ALONE = ["LeNet_dp_keras", "LeNet_dp_da_keras", "ResNeXt_keras"]
SLOW_ALONE += ["Network_in_Network_keras", "Vgg19_keras"]
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


def params(names, slow):
    """Test parameters; the slow ones, whose text others test too, wait for pytest -m ''."""
    return [pytest.param(n, marks=[pytest.mark.slow] if n in slow else []) for n in names]


@pytest.mark.parametrize("name", params(SCRIPTS, slow=SLOW_ALONE))
def test_script_alone_in_a_folder_learns_and_leaves_a_usable_model(name, tmp_path):
    images, epochs, least, options = SMALL.get(name, (5000, 3, 0.5, []))
    script = copy(name, tmp_path, images)
    done = run(script, "--dataset", "synthetic", "--epochs", epochs, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no photographs" in done.stdout
    *_, where, result = done.stdout.splitlines()
    accuracy, loss = map(float, re.findall(r"(?:accuracy|loss) (\d+\.\d+)", result))
    assert accuracy > least

    folder = only_run(tmp_path)
    assert where == f"Run: {folder}"
    assert {path.name for path in folder.iterdir()} == FILES | PICTURES
    log = read_log(folder)
    assert log.dtype.names == (
        *("epoch", "accuracy", "learning_rate", "loss", "seconds", "val_accuracy", "val_loss"),
    )
    np.testing.assert_array_equal(log["epoch"], range(epochs))
    assert log["val_accuracy"][-1] == pytest.approx(accuracy, abs=2e-3)
    tags = {"epoch_loss", "epoch_accuracy"}
    assert tags | {"epoch_learning_rate"} <= event_tags(folder / "train")
    assert tags <= event_tags(folder / "validation")
    for picture in PICTURES:
        assert tf.io.decode_png((folder / picture).read_bytes()).shape[0] > 100

    images, labels = load(script).load_data("synthetic")[1]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(folder / "model.keras", elsewhere)
    np.savez(elsewhere / "test.npz", images=images, labels=labels)
    fresh = subprocess.run(
        [sys.executable, "-c", EVALUATE], cwd=elsewhere, capture_output=True, text=True, timeout=300
    )
    assert "evaluated" in fresh.stdout, fresh.stderr
    evaluated_loss, evaluated_accuracy = map(float, fresh.stdout.split()[1:])
    assert evaluated_accuracy == pytest.approx(accuracy, abs=6e-5)
    assert evaluated_loss == pytest.approx(loss, abs=6e-5)


def test_finished_run_is_left_alone(tmp_path):
    run("LeNet_keras", "--dataset", "synthetic", "--epochs", 1, cwd=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in only_run(tmp_path).rglob("*")}
    again = run("LeNet_keras", "--resume", only_run(tmp_path), cwd=tmp_path)
    assert again.returncode == 0 and "is finished" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in only_run(tmp_path).rglob("*")} == before


# Kills the process when it opens a file of this name, or renames one to it, for the nth time.
KILL_AT = """
import os, runpy, signal, sys
name, left = sys.argv[1], [int(sys.argv[2])]
def hook(event, args):
    path = args[0] if event == "open" else args[1] if event == "os.rename" else ""
    if os.path.basename(str(path)) == name:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def kill_at(name, nth=1):
    """A killer: the run dies when it touches the file of this name for the nth time."""

    def kill(arguments, cwd):
        arguments = [sys.executable, "-c", KILL_AT, name, str(nth), *arguments[1:]]
        done = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=300)
        assert done.returncode == -signal.SIGKILL, done.stderr

    return kill


def rows(folder):
    """How many epochs log.csv has; -1 before it has its first line."""
    log = folder / "log.csv"
    return log.read_text().count("\n") - 1 if log.exists() else -1


def kill_when(moment, seconds=0):
    """A killer: the run dies some seconds after moment(its folder) is true."""

    def kill(arguments, cwd):
        with open(cwd / "output.txt", "a") as output:
            process = subprocess.Popen(arguments, cwd=cwd, stdout=output, stderr=output)
        deadline = time.monotonic() + 200
        while not any(moment(path.parent) for path in cwd.glob("runs/*/*/args.json")):
            assert process.poll() is None, (cwd / "output.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        time.sleep(seconds)
        process.kill()
        assert process.wait() == -signal.SIGKILL

    return kill


def saving(folder):
    """While a checkpoint is half written."""
    return rows(folder) >= 1 and (folder / "writing.keras").exists()


KILLS = {
    "LeNet_dp_da_wd_keras": (
        5000,
        ["--epochs", 12],
        [
            kill_at("log.csv"),  # before the first epoch
            kill_when(lambda folder: rows(folder) >= 1, 0.2),  # within an epoch
            kill_at("writing.keras"),  # the log has a row of which there is no checkpoint
            kill_at("last.keras", 2),  # the checkpoint is written but not in its place
            kill_at("confusion.png"),
            kill_at("writing.keras"),  # the trained network is to be saved
        ],
    ),
    "LeNet_keras": (
        5000,
        ["--epochs", 12],
        [
            kill_when(saving),
            kill_when(lambda folder: rows(folder) >= 4, 0.3),
            kill_at("curves.png"),
            kill_at("model.keras"),
        ],
    ),
    "ResNet_keras": (
        2560,
        ["--stack_n", 1, "--epochs", 2],
        [kill_when(lambda folder: rows(folder) >= 1, 0.5), kill_at("last.keras")],
    ),
}


@pytest.mark.parametrize("name", params(KILLS, slow=["ResNet_keras", "LeNet_keras"]))
def test_killed_and_resumed_run_equals_an_uninterrupted_one(name, tmp_path):
    images, options, kills = KILLS[name]
    script = copy(name, tmp_path, images)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    assert run(script, "--dataset", "synthetic", *options, cwd=whole).returncode == 0
    arguments = command(script, "--dataset", "synthetic", *options)
    for kill in kills:
        kill(arguments, broken)
        folder = only_run(broken)
        assert not (folder / "model.keras").exists()
        arguments = command(script, "--resume", folder)
    done = subprocess.run(arguments, cwd=broken, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    assert_equal_runs(only_run(whole), only_run(broken))


def assert_equal_runs(expected, found):
    for a, b in zip(weights(expected / "model.keras"), weights(found / "model.keras")):
        np.testing.assert_array_equal(a, b)
    a, b = read_log(expected), read_log(found)
    for column in set(a.dtype.names) - {"seconds"}:
        np.testing.assert_array_equal(a[column], b[column])
    assert {path.name for path in found.iterdir()} == FILES | PICTURES


TINY = {
    "Network_in_Network_keras": [],
    "Network_in_Network_bn_keras": [],
    "Vgg19_keras": ["--weights", "none"],
    "Wide_ResNet_keras": ["--depth", 10, "--width", 1, "--dropout", 0.3],
    "DenseNet_keras": ["--depth", 10],
    "ResNeXt_keras": ["--cardinality", 2, "--base_width", 4],
    "SENet_keras": ["--cardinality", 2, "--base_width", 4],
    "ResNet": ["--stack_n", 1, "--count", 2, "--per_step"],
}


@pytest.mark.parametrize("name", params(TINY, slow=set(TINY) - {"ResNet", "Wide_ResNet_keras"}))
def test_killed_and_resumed_network_equals_an_uninterrupted_one(name, tmp_path, monkeypatch):
    """Dropout goes on where it stopped, too. Only the run to be killed needs its own process."""
    script = copy(name, tmp_path, images=64)
    arguments = command(script, "--dataset", "synthetic", "-b", 32, "--epochs", 2, *TINY[name])
    folders = [tmp_path / "whole", tmp_path / "broken"]
    for folder in folders:
        folder.mkdir()
    kill_at("writing.keras", 2)(arguments, folders[1])
    assert rows(only_run(folders[1])) == 2  # of which the second has no checkpoint
    resume = [*arguments[1:2], "--resume", str(only_run(folders[1]))]
    for folder, argv in zip(folders, (arguments[1:], resume)):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", argv)
        load(script).main()
    assert_equal_runs(*map(only_run, folders))


def test_ctrl_c_names_the_command_that_goes_on(tmp_path):
    arguments = command("LeNet_keras", "--dataset", "synthetic", "--epochs", 500)
    process = subprocess.Popen(
        arguments,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs, which the tests may be, ignore SIGINT and pass that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 200
    while not (found := list(tmp_path.glob("runs/*/*/last.keras"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - start < 10  # a second or two where nothing else runs
    assert process.returncode == 1 and "Traceback" not in errors
    message = errors.splitlines()[-1]
    resume = shlex.split(message.removeprefix("Interrupted. To go on: "))
    assert resume == ["python", arguments[1], "--resume", str(found[0].parent)]


def with_two_cpus(*lines):
    """The command that runs scripts, each line one, where TensorFlow sees two logical CPUs."""
    code = (
        "import json, runpy, sys, tensorflow as tf\n"
        "cpu = tf.config.list_physical_devices('CPU')[0]\n"
        "two = [tf.config.LogicalDeviceConfiguration()] * 2\n"
        "tf.config.set_logical_device_configuration(cpu, two)\n"
        "for sys.argv in json.loads(sys.argv[1]):\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    return [sys.executable, "-c", code, json.dumps([line[1:] for line in lines])]


def run_on_one_and_two(folder, script, *options):
    """Run a script on one CPU and on two; return the folders of the two runs."""
    lines = []
    for gpus in (1, 2):
        where = ["--gpus", gpus, "--log_dir", folder / str(gpus) / "runs"]
        lines.append(command(script, "--dataset", "synthetic", *options, *where))
    done = subprocess.run(with_two_cpus(*lines), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert re.findall(r" on (CPU:.*)\n", done.stdout) == ["CPU:0", "CPU:0, CPU:1"]
    return [only_run(folder / gpus) for gpus in "12"]


@pytest.mark.parametrize(
    "name, options",
    [
        ("LeNet_dp_da_wd_keras", ["--epochs", 3, "--batch_size", 1000]),
        ("ResNet_keras", ["--epochs", 2, "--batch_size", 500, "--stack_n", 1]),
    ],
)
def test_two_devices_train_like_one(name, options, tmp_path):
    script = copy(name, tmp_path, images=1500 if name == "ResNet_keras" else 5000)
    runs = run_on_one_and_two(tmp_path, script, *options)
    # The first step's losses agree to all digits. From then on the least rounding error can flip a
    # ReLU: one device with oneDNN on and off differs by as much as one device and two.
    one, two = (read_log(run)["loss"] for run in runs)
    np.testing.assert_allclose(one, two, rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    params(TINY, slow=set(TINY) - {"DenseNet_keras"}),
)
def test_two_devices_train_every_network(name, tmp_path):
    script = copy(name, tmp_path, images=64)
    options = ["--epochs", 1, "--batch_size", 32, *map(str, TINY[name])]
    if "--dropout" in options:
        options[options.index("--dropout") + 1] = "0"
    runs = run_on_one_and_two(tmp_path, script, *options)
    one, two = (read_log(run)["loss"] for run in runs)
    # A device drops the units of its share that the other one drops of its own.
    dropout = name.startswith(("Network_in_Network", "Vgg"))
    np.testing.assert_allclose(one, two, rtol=0.2 if dropout else 1e-3)
    model = keras.models.load_model(runs[1] / "model.keras")
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


@pytest.mark.slow
def test_run_on_two_devices_resumes_where_it_was_killed(tmp_path):
    folders, runs = [tmp_path / "whole", tmp_path / "broken"], []
    script = copy("Network_in_Network_bn_keras", tmp_path, images=64)
    options = ["--dataset", "synthetic", "--epochs", 2, "--batch_size", 32, "--gpus", 2]
    for folder in folders:
        folder.mkdir()
        arguments = with_two_cpus(command(script, *options))
        if folder == folders[1]:
            kill_when(lambda folder: (folder / "last.keras").exists())(arguments, folder)
            arguments = with_two_cpus(command(script, "--resume", only_run(folder)))
        done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        runs.append(only_run(folder))
    assert_equal_runs(*runs)


@pytest.mark.parametrize("batch_size", [128, 5000])  # 5000: the only step of an epoch does it
def test_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_epoch(
    monkeypatch, tmp_path, batch_size
):
    script = load("LeNet_keras")
    options = ["--dataset", "synthetic", "--epochs", "3", "--batch_size", str(batch_size)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["LeNet_keras.py", *options])
    monkeypatch.setattr(script, "scheduler", lambda epoch, epochs: 1e30 if epoch == 1 else 0.01)
    with pytest.raises(script.UsageError, match=r"the loss became (nan|inf) in epoch 2: "):
        script.main()
    folder = only_run(tmp_path)
    assert len(read_log(folder)) == 1
    model = script.multi_gpu_model(script.lenet, 1)
    assert script.resume(folder, model, 5000 // batch_size) == 1
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


def test_float16_run_whose_gradients_overflow_resumes_at_the_right_epoch(tmp_path):
    options = ["--dataset", "synthetic", "--epochs", 2, "--precision", "mixed_float16"]
    script = copy("LeNet_dp_keras", tmp_path, images=1280)
    kill_at("writing.keras", 2)(command(script, *options), tmp_path)
    done = run(script, "--resume", only_run(tmp_path), cwd=tmp_path)
    assert "Epoch 2/2" in done.stdout and "Epoch 1/2" not in done.stdout, done.stderr
    assert "Warning: this processor has no float16: float32 is faster.\n" in done.stderr
    np.testing.assert_array_equal(read_log(only_run(tmp_path))["epoch"], range(2))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_states_the_defaults(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [SCRIPTS[name].name, "--help"])
    with pytest.raises(SystemExit):
        load(name).parse_args()
    text = capsys.readouterr().out
    batch_size = "64" if name == "DenseNet_keras" else "128"
    epochs = "300" if name in ("ResNeXt_keras", "DenseNet_keras", "SENet_keras") else "200"
    for default in (batch_size, epochs, "cifar10", "runs", "float32", "0"):
        assert f"(default: {default})" in text


def test_commands_in_the_readme_name_scripts_that_exist():
    commands = re.findall(r"python (\S+\.py)", (ROOT / "README.md").read_text())
    assert len(commands) >= 5
    for script in commands:
        assert (ROOT / script).exists()


def test_options_are_kept_with_the_run(tmp_path):
    run("LeNet_keras", "--dataset", "synthetic", "--epochs", 1, "--seed", 3, cwd=tmp_path)
    saved = json.loads((only_run(tmp_path) / "args.json").read_text())
    assert saved["script"] == "LeNet_keras.py" and saved["seed"] == 3 and saved["epochs"] == 1
