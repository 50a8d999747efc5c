"""What users get wrong ends in one line that says so, and nothing of theirs is touched."""

import json
import os
import runpy
import shutil
import sys
import zipfile

import keras
import numpy as np
import pytest
from conftest import SCRIPTS, load, only_run, run


@pytest.fixture
def error_of(monkeypatch, tmp_path, capfd):
    """Run a script with options that cannot work in an empty folder; return its one line."""

    def error_of(name, *options):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(SCRIPTS[name]), *map(str, options)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(sys.argv[0], run_name="__main__")
        message = stop.value.code
        assert isinstance(message, str)  # sys.exit prints it on stderr and the status is 1
        assert "\n" not in message and message.startswith(f"{name}.py: error: ")
        return message.removeprefix(f"{name}.py: error: ")

    return error_of


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("ResNet_keras", ["--stack_n", 0], "--stack_n: 0 is not a whole number of at least 1"),
        ("ResNet_keras", ["--stack_n", "two"], "--stack_n: two is not a whole number"),
        (
            "Wide_ResNet_keras",
            ["--depth", 29],
            "--depth: 29 is not 6n+4, n at least 1: take 28 or 34",
        ),
        (
            "Wide_ResNet_keras",
            ["--depth", 4],
            "--depth: 4 is not 6n+4, n at least 1: take 10 or 16",
        ),
        ("Wide_ResNet_keras", ["--width", 0], "--width: 0 is not a whole number of at least 1"),
        ("Wide_ResNet_keras", ["--dropout", 1], "--dropout: 1 is not a number from 0 to less than"),
        ("Wide_ResNet_keras", ["--dropout", "nan"], "--dropout: nan is not a number from 0"),
        (
            "DenseNet_keras",
            ["--depth", 99],
            "--depth: 99 is not 6n+4, n at least 1: take 94 or 100",
        ),
        ("DenseNet_keras", ["--growth_rate", -1], "--growth_rate: -1 is not a whole number"),
        ("ResNeXt_keras", ["--cardinality", 0], "--cardinality: 0 is not a whole number"),
        ("ResNeXt_keras", ["--base_width", 1.5], "--base_width: 1.5 is not a whole number"),
        (
            "SENet_keras",
            ["--ratio", 20],
            "--ratio: 256 channels cannot be divided by 20: take 16 or 32",
        ),
        ("SENet_keras", ["--ratio", 999], "256 channels cannot be divided by 999: take 128 or 256"),
        ("SENet_keras", ["--cardinality", "x"], "--cardinality: x is not a whole number"),
        ("LeNet_keras", ["--batch_size", 0], "--batch_size: 0 is not a whole number"),
        ("LeNet_keras", ["--epochs", 0], "--epochs: 0 is not a whole number"),
        ("LeNet_keras", ["--dataset", "mnist"], "(choose from cifar10, cifar100, synthetic)"),
        ("LeNet_keras", ["--precision", "int8"], "(choose from float32, mixed_bfloat16"),
        ("LeNet_keras", ["--epoch", 3], "unrecognized arguments: --epoch 3"),
        ("LeNet_keras", ["--seed", -1], "--seed must be a whole number from 0"),
        ("LeNet_keras", ["--gpus", 3], "--batch_size 128 cannot be shared by --gpus 3"),
        (
            "LeNet_keras",
            ["--gpus", 2, "--precision", "mixed_float16"],
            "--precision mixed_float16 needs --gpus 1",
        ),
        ("LeNet_keras", ["--data_dir", "x", "--dataset", "synthetic"], "--data_dir is for cifar10"),
        ("LeNet_keras", ["--data_dir", "nowhere"], "nowhere/data_batch_1.bin is missing"),
        ("LeNet_keras", ["--resume", "nowhere"], "nowhere: not the folder of a run of this script"),
    ],
)
def test_option_that_cannot_be(error_of, tmp_path, name, options, message):
    assert message in error_of(name, *options).replace("'", "")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--batch_size", 5001], "--batch_size 5001 is more than the 5000 training images"),
        (["--gpus", 64], "--gpus 64: TensorFlow sees only CPU:0"),
        (["--log_dir", "file/runs"], "Not a directory): change --log_dir"),
    ],
)
def test_option_that_does_not_fit_this_machine(error_of, tmp_path, options, message):
    (tmp_path / "file").write_text("mine")
    assert message in error_of("LeNet_keras", "--dataset", "synthetic", *options)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_no_network_names_the_two_ways_on(tmp_path):
    nowhere = {"https_proxy": "http://127.0.0.1:9", "KERAS_HOME": str(tmp_path)}
    done = run("LeNet_keras", cwd=tmp_path, env=os.environ | nowhere)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.startswith("LeNet_keras.py: error: cannot download cifar10 (")
    assert "--data_dir" in message and "--dataset synthetic" in message
    assert not list(tmp_path.glob("runs"))


@pytest.mark.parametrize("name", ["Vgg19_keras.py", "Vgg_prediction.py"])
def test_no_network_for_imagenet_weights(name, tmp_path):
    nowhere = {"https_proxy": "http://127.0.0.1:9", "KERAS_HOME": str(tmp_path)}
    script = SCRIPTS["Vgg19_keras"].with_name(name)
    options = ["picture.png"] if "prediction" in name else ["--dataset", "synthetic"]
    done = run(script, *options, cwd=tmp_path, env=os.environ | nowhere)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"{name}: error: cannot download the ImageNet weights (")
    assert "--weights FILE" in message
    assert not list(tmp_path.glob("runs"))


def test_weights_that_do_not_fit(error_of, tmp_path):
    options = ["--dataset", "synthetic", "--weights", "vgg.h5"]
    assert "vgg.h5: there is no such file" in error_of("Vgg19_keras", *options)
    keras.Sequential([keras.layers.Input((8,)), keras.layers.Dense(3)]).save(tmp_path / "other.h5")
    for content in (b"", b"not a file of weights", (tmp_path / "other.h5").read_bytes()):
        (tmp_path / "vgg.h5").write_bytes(content)
        message = error_of("Vgg19_keras", *options)
        assert "vgg.h5 are not the ImageNet weights of Keras' VGG19" in message
        assert (tmp_path / "vgg.h5").read_bytes() == content
    assert not list(tmp_path.glob("runs"))


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """The folder of a run of LeNet that ended before its pictures were drawn."""
    folder = tmp_path_factory.mktemp("unfinished")
    done = run("LeNet_keras", "--dataset", "synthetic", "--epochs", 1, cwd=folder)
    assert done.returncode == 0, done.stderr
    (only_run(folder) / "model.keras").unlink()
    return only_run(folder)


def copied(run_folder, tmp_path):
    return shutil.copytree(run_folder, tmp_path / "run")


def test_resume_of_a_truncated_checkpoint(error_of, unfinished, tmp_path):
    folder = copied(unfinished, tmp_path)
    whole = (folder / "last.keras").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:-100]):
        (folder / "last.keras").write_bytes(damaged)
        assert "last.keras is damaged or of another network" in error_of(
            "LeNet_keras", "--resume", folder
        )
        assert (folder / "last.keras").read_bytes() == damaged


def test_resume_of_something_else(error_of, unfinished, tmp_path):
    folder = copied(unfinished, tmp_path)
    assert "not the folder of a run of this script" in error_of("ResNet_keras", "--resume", folder)
    assert "--epochs cannot change on the way: this run has 1" in error_of(
        "LeNet_keras", "--resume", folder, "--epochs", 2
    )
    options = json.loads((folder / "args.json").read_text())
    for text in ("", "[]", "{}", "{", json.dumps(options | {"script": "other.py"})):
        (folder / "args.json").write_text(text)
        assert "not the folder of a run of this script" in error_of(
            "LeNet_keras", "--resume", folder
        )
    for option, value in (("epochs", "many"), ("batch_size", -1), ("colour", "red"), ("epoch", 1)):
        (folder / "args.json").write_text(json.dumps(options | {option: value}))
        assert option in error_of("LeNet_keras", "--resume", folder)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r\r\n"])  # the last is CSVLogger's on Windows
def test_resume_keeps_the_rows_of_finished_epochs(unfinished, tmp_path, newline):
    script, folder = load("LeNet_keras"), copied(unfinished, tmp_path)
    header, row = (unfinished / "log.csv").read_text().split()
    (folder / "log.csv").write_text(newline.join([header, row, "1,0.5", ""]), newline="")
    model = script.multi_gpu_model(script.lenet, 1)
    assert script.resume(folder, model, 39) == 1
    assert (folder / "log.csv").read_text() == f"{header}\n{row}\n"
    (folder / "last.keras").unlink()
    assert script.resume(folder, model, 39) == 0
    assert (folder / "log.csv").read_text() == ""  # CSVLogger then writes a whole header


def test_checkpoint_cannot_run_code(unfinished, tmp_path):
    """The configuration inside last.keras is not even read: only its numbers are."""
    folder = copied(unfinished, tmp_path)
    with zipfile.ZipFile(unfinished / "last.keras") as old:
        parts = {name: old.read(name) for name in old.namelist()}
    parts["config.json"] = b'{"class_name": "Lambda", "config": {"function": "evil"}}'
    with zipfile.ZipFile(folder / "last.keras", "w") as new:
        for name, content in parts.items():
            new.writestr(name, content)
    script = load("LeNet_keras")
    model, expected = (script.multi_gpu_model(script.lenet, 1) for _ in range(2))
    assert script.resume(folder, model, 39) == script.resume(unfinished, expected, 39) == 1
    for a, b in zip(model.get_weights(), expected.get_weights()):
        np.testing.assert_array_equal(a, b)


def test_emulated_precisions_are_told_from_native_ones(monkeypatch, tmp_path):
    script, cpuinfo = load("ResNet_keras"), tmp_path / "cpuinfo"
    monkeypatch.setattr(script, "Path", lambda path: cpuinfo)
    for flags, expected in (
        ("avx512f avx512_vnni", ["bfloat16", "float16"]),
        ("avx512f avx512_bf16", ["float16"]),
        (None, ["float16"]),
    ):
        cpuinfo.unlink(missing_ok=True)
        if flags:
            cpuinfo.write_text(f"flags\t\t: fpu {flags}\n")
        script.processor_flags.cache_clear()
        names = ("float32", "bfloat16", "float16")
        assert [name for name in names if script.emulated(name)] == expected
    script.processor_flags.cache_clear()
    monkeypatch.setattr(script.tf.config, "list_physical_devices", lambda kind: [kind])
    assert not script.emulated("float16")
