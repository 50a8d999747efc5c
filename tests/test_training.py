"""Runs as users start them: alone in a folder, killed, interrupted, resumed, on two devices."""

import functools
import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import keras
import matplotlib.style
import numpy as np
import pytest
import tensorflow as tf
from conftest import (
    FRESH,
    LADDER,
    SCRIPTS,
    command,
    copy,
    finish,
    fork,
    kill_at,
    line,
    load,
    only_run,
    run,
    start,
    undrawn,
    use_jax,
)

# What makes a network learn the synthetic images in seconds or minutes: how many of them, for how
# many epochs, the accuracy to reach, of which 0.1 is guessing, and options.
SMALL = {
    "LeNet_dp_keras": (320, 3, 0.5, ["--batch_size", 16]),
    "LeNet_dp_da_keras": (320, 3, 0.5, ["--batch_size", 16]),
    "LeNet_dp_da_wd_keras": (320, 3, 0.5, ["--batch_size", 16]),
    "ResNet_keras": (320, 3, 0.4, ["--batch_size", 16, "--stack_n", 1]),
    "ResNet": (320, 3, 0.4, ["--batch_size", 16, "--stack_n", 1]),
    "Network_in_Network_keras": (1280, 4, 0.2, ["--batch_size", 64, "--seed", 1]),
    "Network_in_Network_bn_keras": (320, 1, 0.4, ["--batch_size", 8]),
    "Vgg19_keras": (1280, 2, 0.2, ["--batch_size", 16, "--imagenet", "none"]),
    "Wide_ResNet_keras": (320, 3, 0.35, ["--batch_size", 16, "--depth", 10, "--width", 1]),
    "DenseNet_keras": (320, 3, 0.5, ["--batch_size", 16, "--depth", 10]),
    "DenseNet_keras --recompute": (320, 3, 0.5, ["--batch_size", 16, "--depth", 10, "--recompute"]),
    "ResNeXt_keras": (320, 3, 0.5, ["--batch_size", 16, "--cardinality", 2, "--base_width", 4]),
    "SENet_keras": (320, 1, 0.4, ["--batch_size", 8, "--cardinality", 2, "--base_width", 4]),
}
FILES = {"args.json", "log.csv", "train", "validation", "last.keras", "model.keras"}
PICTURES = {"curves.png", "confusion.png", "mistakes.png"}

# Loads and evaluates networks where nothing but Keras and NumPy is imported.
EVALUATE = """
import json, sys, keras, numpy
for model, images in map(json.loads, sys.stdin):
    model, test = keras.models.load_model(model), numpy.load(images)
    numpy.save(images + ".npy", model.predict(test["images"], verbose=0))
    print("evaluated", json.dumps(model.evaluate(test["images"], test["labels"], verbose=0)))
    sys.stdout.flush()
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


def printed(output):
    """The accuracy that a run has printed."""
    (result,) = re.findall(r"\nTest accuracy (\d\.\d{4}) after", output)
    return float(result)


@pytest.fixture(scope="session")
def plain_keras(tmp_path_factory):
    """Evaluate a saved network on images, in another process: accuracy, probabilities."""
    folder = tmp_path_factory.mktemp("plain_keras")
    process = subprocess.Popen(
        [sys.executable, "-c", EVALUATE],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(folder / "stderr.txt").open("w"),
        text=True,
    )

    def evaluate(path, images, labels):
        np.savez(folder / "test.npz", images=images, labels=labels)
        task = json.dumps([str(path), str(folder / "test.npz")])
        print(task, file=process.stdin, flush=True)
        for answer in process.stdout:
            if answer.startswith("evaluated "):
                _, accuracy = json.loads(answer.removeprefix("evaluated "))
                return accuracy, np.load(folder / "test.npz.npy")
        raise AssertionError((folder / "stderr.txt").read_text())

    yield evaluate
    process.kill()
    process.wait()


def classes_of(path):
    """(module, class, name under which it was registered) of every object in a saved network."""
    found = set()

    def visit(part):
        if (
            isinstance(part, dict)
            and part.get("class_name", "__keras_tensor__") != "__keras_tensor__"
        ):
            found.add((part["module"], part["class_name"], part["registered_name"]))
        for child in part.values() if isinstance(part, dict) else part:
            if isinstance(child, dict | list):
                visit(child)

    visit(json.loads(zipfile.ZipFile(path).read("config.json")))
    return found


@pytest.mark.parametrize("name", params(["LeNet_keras", *SMALL], slow=SMALL))
def test_script_alone_in_a_folder_learns_and_leaves_a_usable_model(
    name, pictures, plain_keras, tmp_path
):
    script = copy(name.split()[0], tmp_path)
    if name == "LeNet_keras":  # one begins where nothing is imported, with the images of a script
        origin, epochs, least = ("synthetic",), 3, 0.5
        done = run(script, "--dataset", "synthetic", "--epochs", epochs, cwd=tmp_path)
        assert "no photographs" in done.stdout
    else:
        images, epochs, least, options = SMALL[name]
        origin = ("cifar10", pictures(images))
        done = fork(script, "--data_dir", origin[1], "--epochs", epochs, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    accuracy = printed(done.stdout)
    assert accuracy > least

    folder = only_run(tmp_path)
    *_, where, result = done.stdout.splitlines()
    assert where == f"Run: {folder}" and result.endswith(f" after epoch {epochs}.")
    assert {path.name for path in folder.iterdir()} == FILES | PICTURES
    log = read_log(folder)
    assert log.dtype.names == (
        *("epoch", "accuracy", "learning_rate", "loss", "val_accuracy", "val_loss"),
    )
    np.testing.assert_array_equal(log["epoch"], range(epochs))
    assert log["val_accuracy"][-1] == pytest.approx(accuracy, abs=2e-3)
    tags = {"epoch_loss", "epoch_accuracy"}
    assert tags | {"epoch_learning_rate"} <= event_tags(folder / "train")
    assert tags <= event_tags(folder / "validation")
    for picture in PICTURES:
        assert tf.io.decode_png((folder / picture).read_bytes()).shape[0] > 100

    test = load(script).load_data(*origin)[1]
    for file in ("model.keras", "last.keras"):
        found = classes_of(folder / file)
        assert len(found) > 5 and {module.split(".")[0] for module, *_ in found} == {"keras"}
        assert all(registered in (None, own) for _, own, registered in found)
        evaluated, _ = plain_keras(folder / file, *test)
        assert evaluated == pytest.approx(accuracy, abs=6e-5)


def test_half_precision_leaves_a_model_in_float32(
    pictures, plain_keras, train_here, tmp_path, capfd
):
    script = load("ResNet_keras")
    options = ["--data_dir", pictures(80), "--epochs", 1, "-b", 20, "--stack_n", 1]
    folder = train_here(script, *options, "--precision", "mixed_bfloat16")
    images, labels = script.read_pictures(pictures())[1]
    evaluated, expected = plain_keras(folder / "model.keras", images, labels)
    assert evaluated == pytest.approx(printed(capfd.readouterr().out), abs=6e-5)
    half = keras.models.load_model(folder / "last.keras")
    assert {layer.compute_dtype for layer in half.layers} == {"bfloat16", "float32"}

    model = keras.models.load_model(folder / "model.keras")
    for layer in model.layers:
        assert layer.dtype_policy.name == layer.compute_dtype == "float32"
    flat = tf.lite.Interpreter(
        model_content=tf.lite.TFLiteConverter.from_keras_model(model).convert()
    )
    flat.allocate_tensors()
    for image, probabilities in zip(images, expected):
        flat.set_tensor(flat.get_input_details()[0]["index"], np.float32(image[None]))
        flat.invoke()
        found = flat.get_tensor(flat.get_output_details()[0]["index"])[0]
        np.testing.assert_allclose(found, probabilities, atol=1e-5)
        assert found.argmax() == probabilities.argmax()
    model.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(served.serve(np.float32(images)), expected, atol=1e-5)


def rows(folder):
    """How many epochs log.csv has; -1 before it has its first line."""
    log = folder / "log.csv"
    return log.read_text().count("\n") - 1 if log.exists() else -1


def kill_when(moment, seconds=0):
    """A killer: the run dies some seconds after moment(its folder) is true."""

    def kill(arguments, cwd, **more):
        process = start(arguments, cwd=cwd, **more)
        deadline = time.monotonic() + 200
        while not any(moment(path.parent) for path in cwd.glob("runs/*/*/args.json")):
            assert process.is_alive(), (cwd / "stderr.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        time.sleep(seconds)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL

    return kill


def saving(folder):
    """While a checkpoint is half written."""
    return rows(folder) >= 1 and (folder / "new.keras").exists()


TINY = {
    "Network_in_Network_keras": [],
    "Network_in_Network_bn_keras": [],
    "Vgg19_keras": ["--imagenet", "none"],
    "Wide_ResNet_keras": ["--depth", 10, "--width", 1, "--dropout", 0.3],
    "DenseNet_keras": ["--depth", 10],
    "ResNeXt_keras": ["--cardinality", 2, "--base_width", 4],
    "SENet_keras": ["--cardinality", 2, "--base_width", 4],
    "ResNet": ["--stack_n", 1, "--count", 2, "--per_step"],
}
KILLS = {
    "LeNet_dp_da_wd_keras": (
        ["--batch_size", 10, "--epochs", 8],
        [
            kill_at("log.csv"),  # before the first epoch
            kill_at("new.keras"),  # a row in the log, of an epoch that has no checkpoint
            kill_when(lambda folder: rows(folder) >= 1, 0.2),  # within an epoch
            kill_at("last.keras"),  # the checkpoint is written but not in its place
            kill_at("model.keras"),
        ],
    ),
    "LeNet_keras": (
        ["--batch_size", 10, "--epochs", 8],
        [
            kill_when(saving),
            kill_when(lambda folder: rows(folder) >= 4, 0.3),
            kill_at("new.json"),  # the options of the resumed run are to be written
            kill_at("args.json"),
            kill_at("new.keras"),
            kill_at("model.keras"),
        ],
    ),
    "ResNet_keras": (
        ["--batch_size", 10, "--stack_n", 1, "--epochs", 2],
        [kill_when(lambda folder: rows(folder) >= 1, 0.5), kill_at("last.keras")],
    ),
} | {
    # In the end log.csv has two rows, of which the second has no checkpoint.
    name: (["--batch_size", 40, "--epochs", 2, *options], [kill_at("new.keras", 3)])
    for name, options in TINY.items()
}
SLOW_KILLS = set(KILLS) - {"LeNet_dp_da_wd_keras"}


def one_at_a_time():
    """Let this process begin no operation beside another: wide networks round alike only then."""
    os.environ["TF_NUM_INTEROP_THREADS"] = "1"


@pytest.mark.parametrize("name", params(KILLS, slow=SLOW_KILLS))
def test_killed_and_resumed_run_equals_an_uninterrupted_one(name, pictures, tmp_path):
    """Dropout goes on where it stopped, too."""
    options, kills = KILLS[name]
    folders = whole, broken = tmp_path / "whole", tmp_path / "broken"
    script = copy(name, tmp_path)
    if name == LADDER[-1]:  # as others have
        text, flat = script.read_text(), "    x = layers.Flatten()(x)\n"
        more = "    x = layers.Dropout(0.3)(x)\n"
        assert text.count(flat) == 1
        script.write_text(text.replace(flat, more + flat))
    options = ["--data_dir", pictures(320 if len(kills) > 1 else 80), *options]
    arguments = line(script, *options)
    before = [one_at_a_time] if name in TINY else []
    for folder in folders:
        folder.mkdir()
    for kill in kills:
        kill(arguments, broken, before=before)
        folder = only_run(broken)
        assert not (folder / "model.keras").exists()
        arguments = line(script, "--resume", folder)
    for cwd, last in ((whole, line(script, *options)), (broken, arguments)):
        done = finish(start(last, cwd=cwd, before=[*before, undrawn]), cwd)
        assert done.returncode == 0, done.stderr
    assert_equal_runs(*map(only_run, folders))


def assert_equal_runs(expected, found):
    for a, b in zip(weights(expected / "model.keras"), weights(found / "model.keras"), strict=True):
        np.testing.assert_array_equal(a, b)
    a, b = read_log(expected), read_log(found)
    assert a.dtype.names == b.dtype.names
    for column in a.dtype.names:
        np.testing.assert_array_equal(a[column], b[column])
    assert {path.name for path in found.iterdir()} - PICTURES == FILES


LENET = ["--batch_size", "16"]


def test_finished_run_is_drawn_again_or_trained_on(pictures, train_here, tmp_path, capfd):
    script = load("LeNet_keras")
    folder = train_here(script, "--data_dir", pictures(), "--epochs", 1, *LENET)
    log, before = (folder / "log.csv").read_bytes(), weights(folder / "model.keras")
    for epochs in ([], ["--epochs", 1]):
        capfd.readouterr()
        script.main(["--resume", folder, *epochs])
        assert "after epoch 1." in capfd.readouterr().out
        assert (folder / "log.csv").read_bytes() == log
        for a, b in zip(before, weights(folder / "model.keras"), strict=True):
            np.testing.assert_array_equal(a, b)

    train_here(script, "--resume", folder, "--epochs", 3)
    np.testing.assert_array_equal(read_log(folder)["epoch"], range(3))
    assert json.loads((folder / "args.json").read_text())["options"]["epochs"] == 3
    moved = folder.rename(folder.with_name("a name of one's own"))
    train_here(script, "--resume", moved, "--epochs", 4, "--data_dir", pictures(), "--gpus", 1)
    np.testing.assert_array_equal(read_log(moved)["epoch"], range(4))


def test_run_that_was_killed_while_trained_on_is_resumed(pictures, train_here, tmp_path):
    """Its model.keras is still the one of fewer epochs, although it has the new ones."""
    options = ["--data_dir", pictures(), *LENET]
    script = copy("LeNet_keras", tmp_path)
    folder = train_here(script, *options, "--epochs", 1)
    kill_at("model.keras")(line(script, "--resume", folder, "--epochs", 2), tmp_path)
    train_here(script, "--resume", folder)
    for model, last in zip(weights(folder / "model.keras"), weights(folder / "last.keras")):
        np.testing.assert_array_equal(model, last)


def test_runs_begun_in_the_same_second_have_folders_of_their_own(tmp_path):
    """Two at a time, a hundred times: none ends with "File exists"."""
    new_folder = load("LeNet_keras").new_folder
    with ThreadPoolExecutor(4) as pool:
        folders = [*pool.map(new_folder, [tmp_path / "runs"] * 4)]
    assert len({*folders}) == 4 and all(folder.is_dir() for folder in folders)


USETEX = "text.usetex: True\nfont.family: no such font\nfigure.dpi: 3\naxes.prop_cycle: 3\n"


@pytest.mark.parametrize("name", ["cat", "\u732b", "$x^$"])
def test_figures_are_those_of_the_script_whatever_matplotlibrc_says(
    name, pictures, tmp_path, monkeypatch, recwarn
):
    """Without LaTeX, text.usetex ends in an error; no font has to have the letters of a name."""
    script = load("LeNet_keras")
    monkeypatch.setattr(script, "get_font_names", lambda: [])
    images, labels = script.synthetic_images(20, seed=1)
    (tmp_path / "log.csv").write_text("epoch,loss,learning_rate\n0,1.0,0.1\n")
    (tmp_path / "hostile").write_text(USETEX)
    sizes = []
    for style in ("default", tmp_path / "hostile"):
        with matplotlib.style.context(style):
            script.draw(tmp_path, images, labels, np.eye(10)[labels - 1], [name] * 10)
        sizes.append([tf.io.decode_png((tmp_path / p).read_bytes()).shape for p in PICTURES])
    assert sizes[0] == sizes[1]
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_network_is_saved_before_anything_that_may_fail(
    pictures, train_here, monkeypatch, tmp_path
):
    script = load("LeNet_keras")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "draw_curves", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        script.main(["--data_dir", pictures(80), "--epochs", 1, "-b", 20])
    folder = only_run(tmp_path)
    assert keras.models.load_model(folder / "model.keras")
    monkeypatch.undo()
    train_here(script, "--resume", folder)


@pytest.mark.filterwarnings("error:Skipping variable loading")
@pytest.mark.parametrize(
    "precision", params(["mixed_float16", "mixed_bfloat16"], slow=["mixed_bfloat16"])
)
def test_half_precision_is_resumed_at_the_right_epoch(precision, pictures, train_here, tmp_path):
    """Even where float16 gradients overflow and a step is skipped."""
    script, folders = copy("LeNet_dp_keras", tmp_path), [tmp_path / "whole", tmp_path / "broken"]
    options = ["--data_dir", pictures(), "--epochs", 2, *LENET, "--precision", precision]
    for folder in folders:
        folder.mkdir()
    kill_at("new.keras", 3)(line(script, *options), folders[1])
    train_here(script, *options, cwd=folders[0])
    train_here(script, "--resume", only_run(folders[1]), cwd=folders[1])
    assert_equal_runs(*map(only_run, folders))


def test_precision_cannot_change_on_the_way(pictures, train_here):
    """float16 has other optimizer variables: the epochs done would be forgotten without a word."""
    folder = train_here("LeNet_dp_keras", "--data_dir", pictures(), *LENET, "--epochs", 1)
    before = (folder / "log.csv").read_bytes()
    with pytest.raises(SystemExit, match="--precision cannot change on the way"):
        load("LeNet_dp_keras").main(
            ["--resume", folder, "--epochs", 2, "--precision", "mixed_float16"]
        )
    assert (folder / "log.csv").read_bytes() == before


def test_ctrl_c_names_the_way_on(tmp_path):
    process = subprocess.Popen(
        command("LeNet_keras", "--dataset", "synthetic", "--epochs", 5000, *LENET),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs, which the tests may be, ignore SIGINT and pass that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 200
    while not (found := [log for log in tmp_path.glob("runs/*/*/log.csv") if rows(log.parent) > 0]):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    interrupted = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - interrupted < 10  # a second or two where nothing else runs
    assert process.returncode == 1 and "Traceback" not in errors
    folder = found[0].parent
    assert errors.splitlines()[-1] == f"error: interrupted. To go on: --resume {folder}"
    epochs = rows(folder) + 2
    done = fork("LeNet_keras", "--resume", folder, "--epochs", epochs, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(read_log(folder)["epoch"], range(epochs))


def two_cpus():
    """Let TensorFlow see two logical CPUs in this process."""
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], two)


def run_on_one_and_two(folder, script, *options, before=(two_cpus, undrawn)):
    """Run a script on one CPU and on two; return the folders of the two runs."""
    lines = []
    for gpus in (1, 2):
        lines.append(line(script, *options, "--gpus", gpus, "--log_dir", folder / f"{gpus}/runs"))
    done = finish(start(*lines, cwd=folder, before=before), folder)
    assert done.returncode == 0, done.stderr
    assert re.findall(r" on (cpu:\d(?:, cpu:\d)*): ", done.stdout) == ["cpu:0", "cpu:0, cpu:1"]
    return [only_run(folder / gpus) for gpus in "12"]


@pytest.mark.parametrize(
    "name, options",
    [
        ("LeNet_dp_da_wd_keras", ["--epochs", 3, "--batch_size", 16]),
        pytest.param(
            *("ResNet_keras", ["--epochs", 2, "--batch_size", 40, "--stack_n", 1]),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_devices_train_like_one(name, options, pictures, tmp_path):
    runs = run_on_one_and_two(tmp_path, SCRIPTS[name], "--data_dir", pictures(80), *options)
    # The first step's losses agree to all digits. From then on the least rounding error can flip a
    # ReLU: one device with oneDNN on and off differs by as much as one device and two.
    one, two = (read_log(run)["loss"] for run in runs)
    np.testing.assert_allclose(one, two, rtol=1e-4)


@pytest.mark.parametrize("name", params(TINY, slow=TINY))
def test_two_devices_train_every_network(name, pictures, tmp_path):
    options = ["--data_dir", pictures(80), "--epochs", 1, "--batch_size", 40, *TINY[name]]
    if "--dropout" in options:
        options[options.index("--dropout") + 1] = 0
    runs = run_on_one_and_two(tmp_path, SCRIPTS[name], *options)
    one, two = (read_log(run)["loss"] for run in runs)
    # A device drops the units of its share that the other one drops of its own.
    dropout = name.startswith(("Network_in_Network", "Vgg"))
    np.testing.assert_allclose(one, two, rtol=0.2 if dropout else 1e-3)
    model = keras.models.load_model(runs[1] / "model.keras")
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


@pytest.mark.parametrize(
    "name",
    params(
        ["LeNet_dp_da_wd_keras", "Network_in_Network_bn_keras"],
        slow=["LeNet_dp_da_wd_keras", "Network_in_Network_bn_keras"],
    ),
)
def test_run_on_two_devices_resumes_where_it_was_killed(name, pictures, tmp_path):
    folders, script = [tmp_path / "whole", tmp_path / "broken"], SCRIPTS[name]
    options = ["--data_dir", pictures(80), "--epochs", 2, "--batch_size", 40, "--gpus", 2]
    whole, broken = (line(script, *options, "--log_dir", folder / "runs") for folder in folders)
    kill_at("new.keras", 3)(broken, tmp_path, before=[two_cpus])
    resume = line(script, "--resume", only_run(folders[1]))
    done = finish(start(whole, resume, cwd=tmp_path, before=[two_cpus]), tmp_path)
    assert done.returncode == 0, done.stderr
    assert_equal_runs(*map(only_run, folders))


@pytest.mark.parametrize("batch_size", [16, 320])  # 320: the only step of an epoch does it
def test_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_epoch(
    monkeypatch, pictures, tmp_path, train_here, batch_size
):
    script = load("LeNet_keras")
    options = ["--data_dir", pictures(), "--epochs", "3", "--batch_size", str(batch_size)]
    with monkeypatch.context() as patch:
        patch.setattr(script, "scheduler", lambda epoch, epochs: 1e30 if epoch == 1 else 0.01)
        with pytest.raises(SystemExit, match=r"^error: no finite loss in epoch 2\b.* lower the "):
            train_here(script, *options)
    folder = only_run(tmp_path)
    assert all(np.isfinite(weight).all() for weight in weights(folder / "last.keras"))
    assert not (folder / "model.keras").exists()
    train_here(script, "--resume", folder)
    log = read_log(folder)
    np.testing.assert_array_equal(log["epoch"], range(3))
    assert np.isfinite(log["loss"]).all()


def test_main_takes_a_list_and_arrays_of_ones_own(monkeypatch, tmp_path, capfd):
    """As in a notebook. The pictures are not square, and there are three classes."""
    script, rng = load("ResNet_keras"), np.random.default_rng(0)
    labels = np.arange(96, dtype=np.int32) % 3
    images = rng.integers(0, 60, (96, 24, 40, 3), np.uint8)
    images[np.arange(96), ..., labels] += 150
    sets = (images[:64], labels[:64]), (images[64:], labels[64:])
    monkeypatch.setattr(script, "load_data", lambda *_: (*sets, ["red", "green", "blue"]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["notebook", "--not", "ours"])
    script.main(["--stack_n", 1, "--epochs", 2, "-b", 8])
    assert printed(capfd.readouterr().out) > 0.5
    folder = only_run(tmp_path)
    model = keras.models.load_model(folder / "model.keras")
    assert model.input_shape == (None, 24, 40, 3) and model.output_shape == (None, 3)
    assert json.loads((folder / "args.json").read_text())["class_names"] == ["red", "green", "blue"]
    assert {path.name for path in folder.iterdir()} == FILES | PICTURES


@pytest.mark.parametrize("there", [True, False])
def test_gpu_that_is_not_seen_is_named_once(
    there, pictures, train_here, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("PATH", str(tmp_path))
    if there:
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    train_here("LeNet_keras", "--data_dir", pictures(80), "--epochs", 1, "-b", 20)
    line = "No GPU in use: pip install 'tensorflow[and-cuda]' or 'jax[cuda12]', on Windows in WSL2"
    assert capfd.readouterr().err.splitlines().count(line) == there


def test_full_disk_ends_in_one_line_that_names_the_way_on(
    monkeypatch, pictures, tmp_path, train_here
):
    script = load("LeNet_keras")
    replace, left = os.replace, ["args.json", "last.keras", "last.keras"]

    def full(source, target):
        if os.path.basename(target) not in left:
            raise OSError(28, "No space left on device")
        left.remove(os.path.basename(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    options = ["--data_dir", pictures(), "--epochs", "3", *LENET]
    with pytest.raises(SystemExit) as stop:
        train_here(script, *options)
    folder = only_run(tmp_path)
    message = "[Errno 28] No space left on device"
    assert stop.value.code == f"error: {message}. To go on: --resume {folder}"
    assert weights(folder / "last.keras") and rows(folder) == 2
    monkeypatch.undo()
    train_here(script, "--resume", folder)
    np.testing.assert_array_equal(read_log(folder)["epoch"], range(3))


def small_files():
    """Let this process write no file of more than 300 kB, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


def test_checkpoint_that_cannot_be_written_ends_in_one_line(pictures, tmp_path):
    options = ["--data_dir", pictures(80), "--epochs", 1, *LENET]
    done = fork("LeNet_keras", *options, cwd=tmp_path, before=[small_files])
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert not (only_run(tmp_path) / "last.keras").exists()


@pytest.mark.parametrize(
    "error",
    [
        tf.errors.ResourceExhaustedError(None, None, "OOM when allocating\ntensor"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."),  # JAX
        MemoryError("Unable to allocate 3.5 GiB for an array"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_is_one_line(monkeypatch, pictures, train_here, error):
    def full(*args, **more):
        raise error

    monkeypatch.setattr(keras.Model, "fit", full)
    with pytest.raises(
        SystemExit,
        match=r"\Aerror: out of memory: a new run with a smaller --batch_size .*: --resume .*\Z",
    ):
        train_here("LeNet_keras", "--data_dir", pictures(), "--epochs", 1)


def test_other_errors_keep_their_traceback(monkeypatch, pictures, train_here):
    monkeypatch.setattr(keras.Model, "fit", lambda *args, **more: {}["a bug of one's own"])
    with pytest.raises(KeyError, match="a bug of one's own"):
        train_here("LeNet_keras", "--data_dir", pictures(), "--epochs", 1)


@pytest.mark.parametrize("floatx", ["float64", "float16"])
def test_settings_of_keras_count_for_nothing_and_stay(floatx, pictures, train_here, monkeypatch):
    """Those of ~/.keras/keras.json, or of a notebook; after an error as well."""
    script = load("LeNet_dp_keras")
    epsilon = keras.config.epsilon()
    keras.config.set_floatx(floatx)
    keras.config.set_image_data_format("channels_first")
    keras.config.set_dtype_policy("mixed_float16")
    try:
        folder = train_here(script, "--data_dir", pictures(80), "--epochs", 1, "-b", 20)
        assert {weight.dtype for weight in weights(folder / "model.keras")} == {np.dtype("float32")}
        assert keras.config.dtype_policy().name == "mixed_float16"
        monkeypatch.setattr(keras.Model, "fit", lambda *args, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            script.main(["--data_dir", pictures(80), "--epochs", 1, "-b", 20])
        assert keras.config.dtype_policy().name == "mixed_float16"
        assert keras.config.epsilon() == epsilon
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_image_data_format("channels_last")


class Tee:
    """What notebooks and loggers put in the place of standard output."""

    def __init__(self, stream):
        self.write, self.flush = stream.write, stream.flush


@pytest.mark.parametrize("closed", [False, True])
def test_standard_output_need_be_no_terminal(closed, pictures, train_here, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdout", None if closed else Tee(sys.stdout))
    folder = train_here("LeNet_keras", "--data_dir", pictures(80), "--epochs", 1, "-b", 20)
    monkeypatch.undo()
    assert (folder / "model.keras").exists()
    said = capfd.readouterr()
    assert "Test accuracy" in (said.err if closed else said.out)


ON_JAX = {
    "LeNet_dp_da_wd_keras": [],
    "ResNet_keras": ["--stack_n", 1],
    "Wide_ResNet_keras": TINY["Wide_ResNet_keras"],
}
# The gradient of a sample whose true class has a probability of about 1e-12.
GRADIENT = """
import glob, runpy, keras, numpy
script = runpy.run_path(glob.glob("*_keras.py")[0])
def train(args):
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras.layers.Dense(2, "softmax")(inputs))
    script["compile_model"](model)
    model.optimizer.learning_rate = 1.0
    model.optimizer.momentum = 0.0
    model.set_weights([numpy.float32([[0, 27.631], [0, 0]]), numpy.zeros(2)])
    model.train_on_batch(numpy.float32([[1, 0]]), numpy.int32([0]))
    numpy.save("gradient.npy", model.get_weights()[0])
script["main"].__globals__["train"] = train
script["main"](["--dataset", "synthetic"])
"""
PREDICT = """
import glob, keras, numpy
images, found = numpy.load("images.npy"), {}
for path in glob.glob("**/model.keras", recursive=True):
    found[path] = keras.models.load_model(path).predict(images, verbose=0)
numpy.savez("predicted.npz", **found)
"""
# Goes on with the run whose script's path and folder it is given.
RESUME = """
import glob, runpy, sys
script, folder = sys.argv[1:]
sys.argv = [script, "--resume", *glob.glob(folder + "/runs/*/*"), "--epochs", "2"]
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture
def three_classes(pictures, tmp_path):
    """A folder with three of the classes' pictures."""
    for part in ("train", "test"):
        for name in ("class_2", "class_5", "class_7"):
            shutil.copytree(pictures(80) / part / name, tmp_path / "three" / part / name)
    return tmp_path / "three"


@pytest.mark.parametrize("name", params(["LeNet_dp_da_wd_keras", "ResNet_keras"], ["ResNet_keras"]))
def test_run_begins_with_the_weights_of_another(
    name, pictures, three_classes, train_here, tmp_path, capfd
):
    """With other classes, all layers but the last fit; a resumed run needs that file no more."""
    script = load(name)
    options = ["--batch_size", 8, "--epochs", 1]
    run = train_here(script, "--data_dir", pictures(80), *options)
    trained = keras.models.load_model(run / "model.keras")
    for file in ("model.keras", "last.keras"):
        args = script.parse_args(list(map(str, options)))
        model = script.build_network(args, (32, 32, 3), 3, 0.0, 1.0)
        last = model.layers[-1].name
        capfd.readouterr()
        script.load_pretrained(model, run / file)
        said = f"The weights of {last} have another shape and begin anew.\n"
        assert capfd.readouterr().out == said
        for layer, other in zip(model.layers, trained.layers):
            if layer.name != last:
                for a, b in zip(layer.get_weights(), other.get_weights(), strict=True):
                    np.testing.assert_array_equal(a, b)

    folders = whole, broken = tmp_path / "whole", tmp_path / "broken"
    pretrained = shutil.copy(run / "model.keras", tmp_path / "pretrained.keras")
    options += ["--data_dir", three_classes, "--weights", pretrained]
    lines = [line(script.__file__, *options, "--log_dir", folder / "runs") for folder in folders]
    for folder in folders:
        folder.mkdir()
    kill_at("log.csv")(lines[1], broken)
    done = finish(start(lines[0], cwd=whole, before=[undrawn]), whole)
    assert done.returncode == 0, done.stderr
    os.unlink(pretrained)
    train_here(script, "--resume", only_run(broken), cwd=broken)
    assert_equal_runs(only_run(whole), only_run(broken))


@pytest.mark.parametrize("name", params(ON_JAX, slow=["ResNet_keras", "Wide_ResNet_keras"]))
def test_on_jax(name, pictures, plain_keras, tmp_path, train_here):
    """A run is resumed, two devices do what one does, and networks change sides."""
    pytest.importorskip("jax")
    script, options = copy(name, tmp_path), ["--data_dir", pictures(80), "-b", 40, *ON_JAX[name]]
    on_tensorflow = train_here(script, *options, "--epochs", 2) / "model.keras"
    images, labels = load(script).read_pictures(pictures(80))[1]
    np.save(tmp_path / "images.npy", images)
    (tmp_path / "predict.py").write_text(PREDICT)
    (tmp_path / "gradient.py").write_text(GRADIENT)
    runpy.run_path(str(tmp_path / "gradient.py"))
    on_tensorflow_side = np.load("gradient.npy")
    np.testing.assert_allclose(on_tensorflow_side[0], [1, 26.631], rtol=1e-3)
    (tmp_path / "resume.py").write_text(RESUME)

    # (1) a run that is resumed, (2) one of both epochs, drawn again, (3) the same on two devices
    folders = resumed, whole, two = [tmp_path / place for place in ("resumed", "whole", "two")]
    steps = [
        line(script, *options, "--log_dir", resumed / "runs", "--epochs", 1),
        ["resume.py", str(script), str(resumed)],
        line(script, *options, "--log_dir", whole / "runs", "--epochs", 2),
        ["resume.py", str(script), str(whole)],
        ["predict.py"],
        ["gradient.py"],
        line(script, *options, "--log_dir", two / "runs", "--epochs", 2, "--gpus", 2),
    ]
    before = [functools.partial(use_jax, str(tmp_path / "cache")), undrawn]
    done = finish(start(*steps, cwd=tmp_path, before=before, context=FRESH), tmp_path)
    assert done.returncode == 0, done.stderr
    devices = re.findall(r" on (cpu:\d(?:, cpu:\d)*): ", done.stdout)
    assert devices == [*["cpu:0"] * 4, "cpu:0, cpu:1"]
    np.testing.assert_allclose(np.load("gradient.npy"), on_tensorflow_side, rtol=1e-5)
    resumed, whole, two = map(only_run, folders)
    assert_equal_runs(whole, resumed)
    np.testing.assert_allclose(read_log(whole)["loss"], read_log(two)["loss"], rtol=1e-3)

    for model in (on_tensorflow, whole / "model.keras"):
        _, expected = plain_keras(model, images, labels)
        found = np.load(tmp_path / "predicted.npz")[str(model.relative_to(tmp_path))]
        np.testing.assert_allclose(found, expected, atol=1e-4)
