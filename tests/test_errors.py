"""What users get wrong ends in one line that says so, and nothing of theirs is touched."""

import json
import os
import re
import shutil
import sys
import zipfile

import keras
import numpy as np
import pytest
from conftest import SCRIPTS, load, run


@pytest.fixture
def error_of(monkeypatch, tmp_path):
    """Run a script with options that cannot work in an empty folder; return its one line."""

    def error_of(script, *options):
        module = load(script) if isinstance(script, str) else script
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stop:
            module.main(list(options))
        message = stop.value.code
        assert isinstance(message, str)  # sys.exit prints it on stderr and the status is 1
        assert "\n" not in message and message.startswith("error: ")
        return message.removeprefix("error: ")

    return error_of


WHOLE = "is not a whole number from 1 to 2147483647"


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("ResNet_keras", ["--stack_n", 0], f"--stack_n 0 {WHOLE}"),
        ("ResNet_keras", ["--stack_n", "two"], "--stack_n: invalid int value: two"),
        ("Wide_ResNet_keras", ["--depth", 29], "--depth: 29 is not 6n+4: take 28 or 34"),
        ("Wide_ResNet_keras", ["--depth", 4], "--depth: 4 is not 6n+4: take 10 or 16"),
        ("Wide_ResNet_keras", ["--depth", "x"], "--depth: invalid depth value: x"),
        ("Wide_ResNet_keras", ["--width", 0], f"--width 0 {WHOLE}"),
        ("Wide_ResNet_keras", ["--dropout", 1], "--dropout: invalid fraction value: 1"),
        ("Wide_ResNet_keras", ["--dropout", "nan"], "--dropout: invalid fraction value: nan"),
        ("DenseNet_keras", ["--depth", 99], "--depth: 99 is not 6n+4: take 94 or 100"),
        ("DenseNet_keras", ["--depth", -2], "--depth: -2 is not 6n+4: take 10 or 16"),
        ("DenseNet_keras", ["--growth_rate", -1], f"--growth_rate -1 {WHOLE}"),
        ("ResNeXt_keras", ["--cardinality", 0], f"--cardinality 0 {WHOLE}"),
        ("ResNeXt_keras", ["--base_width", 1.5], "--base_width: invalid int value: 1.5"),
        ("SENet_keras", ["--ratio", 20], "--ratio: invalid choice: 20 (choose from 1, 2, 4, 8"),
        ("SENet_keras", ["--cardinality", "x"], "--cardinality: invalid int value: x"),
        ("ResNet", ["--count", 0], f"--count 0 {WHOLE}"),
        ("ResNet", ["--lower", 3], "--upper 3.0 must be more than --lower 3.0"),
        ("ResNet", ["--upper", "nan"], "--upper nan must be more than --lower -6.0"),
        ("ResNet", ["--lower=-inf"], "--upper 3.0 must be more than --lower -inf"),
        ("ResNet", ["--scheduler", "linear"], "(choose from step, cos, tanh)"),
        ("LeNet_keras", ["--batch_size", 0], f"--batch_size 0 {WHOLE}"),
        ("LeNet_keras", ["--epochs", 0], f"--epochs 0 {WHOLE}"),
        ("LeNet_keras", ["--epochs", 2**31], f"--epochs 2147483648 {WHOLE}"),
        ("LeNet_keras", ["--dataset", "mnist"], "(choose from cifar10, cifar100, synthetic)"),
        ("LeNet_keras", ["--precision", "int8"], "(choose from float32, mixed_bfloat16"),
        ("LeNet_keras", ["--epoch", 3], "unrecognized arguments: --epoch 3"),
        ("LeNet_keras", ["--seed", -1], "--seed -1 is not a whole number from 0 to 2147483647"),
        ("LeNet_keras", ["--gpus", 0], f"--gpus 0 {WHOLE}"),
        ("LeNet_keras", ["--gpus", 3], "--gpus 3 has to divide --batch_size"),
        (
            "LeNet_keras",
            ["--gpus", 2, "--precision", "mixed_float16"],
            "goes without mixed_float16",
        ),
        ("LeNet_keras", ["--data_dir", "nowhere"], "nowhere is no folder with CIFARs files"),
        ("LeNet_keras", ["--epochs", 10**20], f"--epochs {10**20} {WHOLE}"),
        ("LeNet_keras", ["--validation_split", 1], "invalid choice: 1.0 (choose from 0.0, 0.05, 0"),
        ("LeNet_keras", ["--validation_split", "nan"], "invalid choice: nan (choose from 0.0, 0."),
        ("LeNet_keras", ["--image_size", 31], "invalid choice: 31 (choose from 32, 48, 64, 96, 1"),
        ("LeNet_keras", ["--data_dir", ".", "-d", "synthetic"], "--data_dir is for cifar10"),
        ("LeNet_keras", ["--resume", "nowhere"], "nowhere is not the folder of a run"),
    ],
)
def test_option_that_cannot_be(error_of, tmp_path, name, options, message):
    assert message in error_of(name, *options).replace("'", "")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--batch_size", 5001], "--batch_size 5001 is more than the 5000 training images"),
        (["--gpus", 64], "--gpus 64: there are only cpu:0 here"),
        (["--log_dir", "file/runs"], "Not a directory: "),
    ],
)
def test_option_that_does_not_fit_this_machine(error_of, tmp_path, options, message):
    (tmp_path / "file").write_text("mine")
    assert message in error_of("LeNet_keras", "--dataset", "synthetic", *options)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "script, options, way_on",
    [
        (SCRIPTS["LeNet_keras"], [], ["--data_dir", "--dataset synthetic"]),
        pytest.param(
            *(SCRIPTS["Vgg19_keras"], ["--dataset", "synthetic"], ["--weights FILE"]),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(SCRIPTS["Vgg19_keras"].with_name("Vgg_prediction.py"), ["x.png"], ["--weights FILE"]),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: getattr(value, "stem", ""),
)
def test_no_network_names_the_ways_on(script, options, way_on, tmp_path):
    nowhere = {"https_proxy": "http://127.0.0.1:9", "KERAS_HOME": str(tmp_path / "home")}
    done = run(script, *options, cwd=tmp_path, env=os.environ | nowhere)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    assert "error: " in message and all(option in message for option in way_on)
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}


@pytest.mark.slow
def test_weights_that_do_not_fit(error_of, tmp_path, monkeypatch):
    script, options = load("Vgg19_keras"), ["--dataset", "synthetic", "--weights", "vgg.h5"]
    monkeypatch.setattr(script, "vgg19", lambda *args: keras.Sequential(name="VGG19"))
    assert "vgg.h5: there is no such file" in error_of(script, *options)
    keras.Sequential([keras.layers.Input((8,)), keras.layers.Dense(3)]).save(tmp_path / "other.h5")
    for content in (b"not a file of weights", (tmp_path / "other.h5").read_bytes()):
        (tmp_path / "vgg.h5").write_bytes(content)
        message = error_of(script, *options)
        assert "vgg.h5 are not the ImageNet weights of Keras' VGG19" in message
        assert (tmp_path / "vgg.h5").read_bytes() == content
    assert not list(tmp_path.glob("runs"))


OPTIONS = ["--batch_size", 40, "--epochs", 2]


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """The folder of a run of LeNet_dp on 80 pictures, two epochs of two steps."""
    folder = tmp_path_factory.mktemp("finished")
    options = ["--data_dir", pictures(80), *OPTIONS, "--log_dir", folder]
    script = load("LeNet_dp_keras")
    script.draw = lambda *args: None
    script.main(options)
    return next(folder.glob("*/*"))


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of that folder, before its network was saved."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "model.keras").unlink()
    return tmp_path / "run"


@pytest.fixture
def refused(error_of, copied):
    """Resume the run; return the one line of its refusal, which changes none of its files."""

    def contents():
        return {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}

    def refused(*options, name="LeNet_dp_keras"):
        before = contents()
        message = error_of(name, "--resume", copied, *options)
        assert contents() == before
        return message

    return refused


def test_resume_of_a_truncated_checkpoint(refused, copied):
    whole = (copied / "last.keras").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:-100]):
        (copied / "last.keras").write_bytes(damaged)
        assert f"{copied}/last.keras is damaged, start a new run" in refused()


@pytest.mark.parametrize("name", ["LeNet_keras", "LeNet_dp_da_keras", "ResNet_keras"])
def test_resume_of_a_run_of_another_script(refused, name):
    """Even if it is of the same architecture."""
    assert "is of another network: LeNet_dp, not " in refused(name=name)


def test_resume_with_other_classes(refused, pictures, tmp_path):
    others = shutil.copytree(pictures(80), tmp_path / "others")
    for part in ("train", "test"):
        (others / part / "class_9").rename(others / part / "class_99")
    assert "is of another class_names: [" in refused("--data_dir", others)


def test_resume_with_other_pictures(refused, pictures, tmp_path):
    """An epoch would have another number of steps, and test pictures may have been trained on."""
    others = shutil.copytree(pictures(80), tmp_path / "others")
    added = next((others / "train" / "class_1").glob("*.png"))
    shutil.copy(added, added.with_name("more.png"))
    assert "is of another pixel_mean: [" in refused("--data_dir", others, "-e", 3)


def test_resume_of_a_run_that_has_only_its_network(refused, copied):
    """As in trained/: its log would have been emptied."""
    (copied / "last.keras").rename(copied / "model.keras")
    message = f"{copied} has no last.keras to go on with: start a new run with --weights {copied}"
    assert refused("-e", 3) == message


@pytest.mark.parametrize(
    "option, value, saved",
    [
        *[("batch_size", 20, 40), ("seed", 5, 0), ("dataset", "cifar100", "cifar10")],
        ("weights", "elsewhere", None),
    ],
)
def test_options_that_cannot_change_on_the_way(refused, option, value, saved):
    assert f"--{option} cannot change on the way: " in (message := refused(f"--{option}", value))
    assert message.endswith(f" has {saved}")


def test_size_of_the_network_cannot_change_on_the_way(error_of, tmp_path):
    facts = {"network": "ResNet-8", "class_names": [], "options": {"stack_n": 1}}
    (tmp_path / "args.json").write_text(json.dumps(facts))
    message = error_of("ResNet_keras", "--resume", tmp_path, "--stack_n", 2)
    assert f"--stack_n cannot change on the way: {tmp_path} has 1" in message


NOTHING = [
    *("", "{", "[]", "{}", "null", "3", '"options"', '[{"options": {}}]'),
    *(f'{{"options": {value}}}' for value in ("null", "[]", "[1]", "3", '"seed"', '{"a": {')),
    '{"options": {}}',
    "[" * 100_000,
    '{"options": ' * 100_000,
    '{"network": "LeNet_dp", "options": {}}',
    '{"network": null, "class_names": null, "options": {"seed": 0}}',
    b"\xff\xfe\x00",
]


@pytest.mark.parametrize("text", NOTHING)
def test_args_that_are_no_ones(refused, copied, pictures, text):
    (copied / "args.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert str(copied) in refused("--data_dir", pictures(80), *OPTIONS)


@pytest.mark.parametrize(
    "option, value",
    [
        ("epochs", "many"),
        ("epochs", None),
        ("epochs", 1.5),
        ("epochs", True),
        ("batch_size", -1),
        ("batch_size", [40]),
        ("batch_size", {"a": {"b": 40}}),
        ("seed", False),
        ("gpus", 0),
        ("dataset", "mnist"),
        ("dataset", ["cifar10"]),
        ("precision", None),
        ("precision", "float64"),
        ("data_dir", {}),
        ("data_dir", "/nowhere"),
        ("colour", "red"),
        ("colour", True),
        ("colour", None),
        ("epoch", 1),
        ("stack_n", 1),
    ],
)
def test_option_in_args_that_cannot_be(refused, copied, option, value):
    saved = json.loads((copied / "args.json").read_text())
    saved["options"][option] = value
    (copied / "args.json").write_text(json.dumps(saved))
    assert option in refused()


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r\r\n"])  # the last is CSVLogger's on Windows
def test_resume_keeps_the_rows_of_finished_epochs(copied, newline):
    script = load("LeNet_dp_keras")
    header, *rows = (copied / "log.csv").read_text().split()
    assert len(rows) == 2
    (copied / "log.csv").write_text(newline.join([header, *rows, "2,0.5", ""]), newline="")
    model = script.multi_gpu_model(script.lenet, 1)
    assert script.resume(copied, model, {}, 2) == 2
    kept = newline.join([header, *rows, ""])
    assert (copied / "log.csv").read_bytes().decode() == kept
    assert script.resume(copied, model, {}, 2) == 2
    assert (copied / "log.csv").read_bytes().decode() == kept
    (copied / "last.keras").unlink()
    assert script.resume(copied, model, {}, 2) == 0
    assert (
        copied / "log.csv"
    ).read_bytes().decode() == header + newline  # below which CSVLogger goes on


@pytest.mark.parametrize(
    "text",
    [
        "epoch,loss\n0\n1,0.5\n",
        "epoch,loss\n0,0.5\n1\n",
        "step,loss\n0,0.5\n1,0.4\n",
        "0,0.5\n1,0.4\n",
        "\xff\xfe\n",
    ],
)
def test_resume_with_a_damaged_log(refused, copied, text):
    """Before it trains, not when the curves are drawn."""
    (copied / "log.csv").write_text(text, encoding="latin-1")
    assert f"{copied}/log.csv is damaged: delete it to go on without it" in refused("-e", 3)


@pytest.mark.parametrize("text", ["", "epoch", "epoch,loss\n0", "\xff\xfe"])
def test_resume_drops_half_rows(copied, text):
    """So that CSVLogger begins a row of its own."""
    (copied / "log.csv").write_text(text, encoding="latin-1")
    script = load("LeNet_dp_keras")
    assert script.resume(copied, script.multi_gpu_model(script.lenet, 1), {}, 2) == 2
    assert (copied / "log.csv").read_text() == text[: text.rfind("\n") + 1]


def test_resume_with_another_optimizer(refused, copied, monkeypatch):
    """RMSprop's state looks like SGD's; Keras puts the one into the other without a word."""
    monkeypatch.setattr(keras.optimizers, "SGD", lambda **_: keras.optimizers.RMSprop())
    assert f"{copied} is of another optimizer: SGD, not RMSprop" in refused("-e", 3)


def test_resume_with_a_state_that_does_not_fit(refused, monkeypatch):
    plain = keras.optimizers.SGD
    monkeypatch.setattr(keras.optimizers, "SGD", lambda **_: plain())  # without momentum
    assert "last.keras is of another optimizer: start a new run" in refused("-e", 3)


def test_resume_takes_the_checkpoint_for_its_run(refused, copied):
    whole = (copied / "last.keras").read_bytes()
    (copied / "last.keras").write_bytes(whole[:-100])
    message = refused("--resume", copied / "last.keras")
    assert message.startswith(f"{copied}/last.keras is damaged")


@pytest.mark.parametrize(
    "name, options",
    [
        ("Wide_ResNet_keras", ["--width", 1_000_000]),
        ("Wide_ResNet_keras", ["--width", 300]),
        ("ResNeXt_keras", ["--base_width", 100_000]),
        ("SENet_keras", ["--base_width", 100_000]),
        ("DenseNet_keras", ["--growth_rate", 10_000]),
    ],
)
def test_network_that_fits_nowhere_is_not_built(error_of, name, options):
    message = error_of(name, "--dataset", "synthetic", *options)
    assert re.match(r"a network of [\d,]{13,} parameters takes more memory than machines", message)


def test_weights_of_another_network(error_of, finished, tmp_path):
    options = ["--dataset", "synthetic", "--weights"]
    for weights in (finished, finished / "model.keras"):
        message = error_of("LeNet_keras", *options, weights)
        assert message.endswith(": its LeNet_dp has other layers than this LeNet")
    (tmp_path / "run").mkdir()
    (tmp_path / "file.keras").write_text("no network")
    for weights in ("nowhere", "run", "file.keras"):
        message = error_of("LeNet_dp_keras", *options, weights)
        assert message.startswith(f"--weights {weights}") and " cannot be loaded: " in message
    assert not (tmp_path / "runs").exists()


def test_command_that_goes_on_can_be_pasted_on_windows(monkeypatch):
    script = load("LeNet_keras")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:

        def train(args):
            args.resume = r"C:\my runs\LeNet"
            patch.setattr(os, "name", "nt")
            raise KeyboardInterrupt

        patch.setattr(script, "train", train)
        patch.setattr(sys, "argv", ["LeNet_keras.py"])
        patch.setattr(sys, "orig_argv", [r"C:\Python 3\python.exe", "LeNet_keras.py"])
        script.main()
    command = r'"C:\Python 3\python.exe" LeNet_keras.py --resume "C:\my runs\LeNet"'
    assert stop.value.code == f"error: interrupted. To go on: {command}"


def test_weights_of_a_run_are_those_of_its_last_epoch_until_it_is_finished(finished, copied):
    script = load("LeNet_dp_keras")
    for folder, file in (copied, "last.keras"), (finished, "model.keras"):
        (folder / "new.keras").write_text("half written")
        model = script.lenet()
        script.begin_with(model, str(folder))
        expected = keras.models.load_model(folder / file).get_weights()
        for a, b in zip(model.get_weights(), expected, strict=True):
            np.testing.assert_array_equal(a, b)
        (folder / "new.keras").unlink()


def test_weights_cannot_run_code(finished, tmp_path):
    """Of the configuration in the file, only the name and the number of layers are read."""
    with zipfile.ZipFile(finished / "model.keras") as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    evil = json.loads(parts["config.json"])
    for layer in evil["config"]["layers"]:
        layer |= {"module": "os", "class_name": "system", "registered_name": None}
    parts["config.json"] = json.dumps(evil).encode()
    with zipfile.ZipFile(tmp_path / "evil.keras", "w") as file:
        for name, content in parts.items():
            file.writestr(name, content)
    script = load("LeNet_dp_keras")
    model = script.lenet()
    script.begin_with(model, str(tmp_path / "evil.keras"))
    expected = keras.models.load_model(finished / "model.keras")
    for a, b in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_checkpoint_cannot_run_code(finished, copied):
    """The configuration inside last.keras is not even read: only its numbers are."""
    with zipfile.ZipFile(finished / "last.keras") as old:
        parts = {name: old.read(name) for name in old.namelist()}
    parts["config.json"] = b'{"class_name": "Lambda", "config": {"function": "evil"}}'
    with zipfile.ZipFile(copied / "last.keras", "w") as new:
        for name, content in parts.items():
            new.writestr(name, content)
    script = load("LeNet_dp_keras")
    model, expected = (script.multi_gpu_model(script.lenet, 1) for _ in range(2))
    assert script.resume(copied, model, {}, 2) == 2
    assert script.resume(finished, expected, {}, 2) == 2
    for a, b in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
