"""What users get wrong ends in one line that says so, and nothing of theirs is touched."""

import json
import os
import shutil
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


COUNT = "invalid positive_int value: "


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("ResNet_keras", ["--stack_n", 0], f"--stack_n: {COUNT}0"),
        ("ResNet_keras", ["--stack_n", "two"], f"--stack_n: {COUNT}two"),
        ("Wide_ResNet_keras", ["--depth", 29], "--depth: 29 is no 6n+4: take 28 or 34"),
        ("Wide_ResNet_keras", ["--depth", 4], "--depth: 4 is no 6n+4: take 10 or 16"),
        ("Wide_ResNet_keras", ["--depth", "x"], "--depth: invalid six_n_plus_4 value: x"),
        ("Wide_ResNet_keras", ["--width", 0], f"--width: {COUNT}0"),
        ("Wide_ResNet_keras", ["--dropout", 1], "--dropout: invalid fraction value: 1"),
        ("Wide_ResNet_keras", ["--dropout", "nan"], "--dropout: invalid fraction value: nan"),
        ("DenseNet_keras", ["--depth", 99], "--depth: 99 is no 6n+4: take 94 or 100"),
        ("DenseNet_keras", ["--depth", -2], "--depth: -2 is no 6n+4: take 10 or 16"),
        ("DenseNet_keras", ["--growth_rate", -1], f"--growth_rate: {COUNT}-1"),
        ("ResNeXt_keras", ["--cardinality", 0], f"--cardinality: {COUNT}0"),
        ("ResNeXt_keras", ["--base_width", 1.5], f"--base_width: {COUNT}1.5"),
        ("SENet_keras", ["--ratio", 20], "--ratio: invalid choice: 20 (choose from 1, 2, 4, 8"),
        ("SENet_keras", ["--cardinality", "x"], f"--cardinality: {COUNT}x"),
        ("ResNet", ["--count", 0], f"--count: {COUNT}0"),
        ("ResNet", ["--lower", 3], "--upper 3.0 must be more than --lower 3.0"),
        ("ResNet", ["--upper", "nan"], "--upper nan must be more than --lower -6.0"),
        ("ResNet", ["--scheduler", "linear"], "(choose from step, cos, tanh)"),
        ("LeNet_keras", ["--batch_size", 0], f"--batch_size: {COUNT}0"),
        ("LeNet_keras", ["--epochs", 0], f"--epochs: {COUNT}0"),
        ("LeNet_keras", ["--dataset", "mnist"], "(choose from cifar10, cifar100, synthetic)"),
        ("LeNet_keras", ["--precision", "int8"], "(choose from float32, mixed_bfloat16"),
        ("LeNet_keras", ["--epoch_count", 3], "unrecognized arguments: --epoch_count 3"),
        ("LeNet_keras", ["--gpus", 0], f"--gpus: {COUNT}0"),
        ("LeNet_keras", ["--gpus", 3], "--gpus 3 does not divide --batch_size 128"),
        ("LeNet_keras", ["--gpus", 2, "--precision", "mixed_float16"], "mixed_float16 is for one"),
        ("LeNet_keras", ["--data_dir", "nowhere"], "nowhere is no folder with one of pictures"),
        ("LeNet_keras", ["--validation_split", 1], "--validation_split 1.0 is not a fraction"),
        ("LeNet_keras", ["--validation_split", 10], "--validation_split 10.0 is not a fraction"),
        ("LeNet_keras", ["--validation_split", "nan"], "--validation_split nan is not a fraction"),
        ("LeNet_keras", ["--image_size", 64], "--image_size is for your own pictures: those of"),
        ("LeNet_keras", ["--image_size", 64, "-d", "synthetic"], "--image_size is for your own"),
        ("LeNet_keras", ["--resume", "nowhere"], "nowhere is no runs folder with args.json"),
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
        (SCRIPTS["LeNet_keras"], [], ["--dataset synthetic", "doc/your_own.md"]),
        pytest.param(
            *(SCRIPTS["Vgg19_keras"], ["--dataset", "synthetic"], ["--imagenet FILE"]),
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
    script, options = load("Vgg19_keras"), ["--dataset", "synthetic", "--imagenet", "vgg.h5"]
    monkeypatch.setattr(script, "vgg19", lambda *args: keras.Sequential(name="VGG19"))
    assert "vgg.h5: there is no such file" in error_of(script, *options)
    keras.Sequential([keras.layers.Input((8,)), keras.layers.Dense(3)]).save(tmp_path / "other.h5")
    for content in (b"not a file of weights", (tmp_path / "other.h5").read_bytes()):
        (tmp_path / "vgg.h5").write_bytes(content)
        assert "vgg.h5 is not the file of Keras' VGG19" in error_of(script, *options)
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


@pytest.mark.parametrize("name", ["LeNet_keras", "LeNet_dp_da_keras", "ResNet_keras"])
def test_resume_of_a_run_of_another_script(refused, name):
    """Even if it is of the same architecture."""
    assert "has another network: LeNet_dp, not " in refused(name=name)


def test_resume_with_other_classes(refused, pictures, tmp_path):
    others = shutil.copytree(pictures(80), tmp_path / "others")
    for part in ("train", "test"):
        (others / part / "class_9").rename(others / part / "class_99")
    assert "has another class_names: [" in refused("--data_dir", others)


@pytest.mark.parametrize("change", ["add", "remove", "replace"])
def test_resume_with_other_pictures(refused, pictures, tmp_path, change):
    """An epoch would have another number of steps, and test pictures may have been trained on."""
    others = shutil.copytree(pictures(80), tmp_path / "others")
    first, second, *_ = (others / "train" / "class_1").glob("*.png")
    if change == "remove":
        first.unlink()
    else:
        shutil.copy(first, second if change == "replace" else first.with_name("more.png"))
    assert "has another pixel_mean: [" in refused("--data_dir", others, "-e", 3)


def test_resume_of_a_run_that_has_only_its_network(refused, copied):
    """As in trained/: its log would have been emptied."""
    (copied / "last.keras").rename(copied / "model.keras")
    assert refused("-e", 3) == f"--resume {copied} is no run's folder with args.json and last.keras"


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
    (tmp_path / "last.keras").touch()
    message = error_of("ResNet_keras", "--resume", tmp_path, "--stack_n", 2)
    assert f"--stack_n cannot change on the way: {tmp_path} has 1" in message


@pytest.mark.parametrize("text", ["", "{", "{}"])
def test_folder_of_something_else(refused, copied, text):
    (copied / "args.json").write_text(text)
    assert f"{copied} is no run's folder with args.json and last.keras" in refused()


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r\r\n"])  # the last is CSVLogger's on Windows
def test_resume_keeps_the_rows_of_finished_epochs(copied, newline):
    script = load("LeNet_dp_keras")
    header, *rows = (copied / "log.csv").read_text().split()
    assert len(rows) == 2
    (copied / "log.csv").write_text(newline.join([header, *rows, "2,0.5", ""]), newline="")
    model = script.multi_gpu_model(script.lenet, 1)
    kept = newline.join([header, *rows, ""])
    for _ in range(2):
        assert script.resume(copied, model, {}, 2) == 2
        assert (copied / "log.csv").read_bytes().decode() == kept
    (copied / "log.csv").write_text(kept + "2,0.", newline="")  # a disk was full
    assert script.resume(copied, model, {}, 2) == 2
    assert (copied / "log.csv").read_bytes().decode() == kept
    assert script.resume(copied, model, {}, 4) == 1
    assert (copied / "log.csv").read_bytes().decode() == newline.join([header, rows[0], ""])


def test_resume_with_another_optimizer(refused, copied, monkeypatch):
    """RMSprop's state looks like SGD's; Keras puts the one into the other without a word."""
    monkeypatch.setattr(keras.optimizers, "SGD", lambda **_: keras.optimizers.RMSprop())
    assert f"{copied} has another optimizer: ['SGD', 12], not ['RMSprop', 12]" in refused("-e", 3)


def test_resume_with_a_state_that_does_not_fit(refused, copied, monkeypatch):
    plain = keras.optimizers.SGD
    monkeypatch.setattr(keras.optimizers, "SGD", lambda **_: plain())  # without momentum
    assert f"{copied} has another optimizer: ['SGD', 12], not ['SGD', 2]" in refused("-e", 3)


def test_weights_of_another_network(error_of, finished, tmp_path):
    options = ["--dataset", "synthetic", "--weights"]
    message = error_of("LeNet_keras", *options, finished / "model.keras")
    assert message.endswith(" is a LeNet_dp of other layers than this LeNet")
    (tmp_path / "run").mkdir()
    (tmp_path / "file.keras").write_text("no network")
    with zipfile.ZipFile(tmp_path / "zip.keras", "w") as file:
        file.writestr("x", "y")
    for weights in ("nowhere", "run", "file.keras", "zip.keras"):
        message = error_of("LeNet_dp_keras", *options, weights)
        assert f"/{weights} is no run's model.keras or last.keras: " in message
    assert not (tmp_path / "runs").exists()


def spoil_configuration(source, target):
    """Copy a saved network, whose layers, if Keras made them of the file, would run code."""
    with zipfile.ZipFile(source) as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    evil = json.loads(parts["config.json"])
    for layer in evil["config"]["layers"]:
        layer |= {"module": "os", "class_name": "system", "registered_name": None}
    parts["config.json"] = json.dumps(evil).encode()
    with zipfile.ZipFile(target, "w") as file:
        for name, content in parts.items():
            file.writestr(name, content)


def test_weights_cannot_run_code(finished, tmp_path):
    """Of the configuration in the file, only the name and the number of layers are read."""
    spoil_configuration(finished / "model.keras", tmp_path / "evil.keras")
    script = load("LeNet_dp_keras")
    model = script.lenet()
    script.load_pretrained(model, tmp_path / "evil.keras")
    expected = keras.models.load_model(finished / "model.keras")
    for a, b in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_checkpoint_cannot_run_code(finished, copied):
    """The configuration inside last.keras is not even read: only its numbers are."""
    spoil_configuration(finished / "last.keras", copied / "last.keras")
    script = load("LeNet_dp_keras")
    model, expected = (script.multi_gpu_model(script.lenet, 1) for _ in range(2))
    assert script.resume(copied, model, {}, 2) == 2
    assert script.resume(finished, expected, {}, 2) == 2
    for a, b in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("backend", ["torch", "pytorch", "numpy"])
def test_backend_that_cannot_be_is_one_line(backend, tmp_path):
    """Before Keras is imported, which knows no pytorch and would look for torch."""
    env = os.environ | {"KERAS_BACKEND": backend}
    done = run("LeNet_keras", "--help", cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: KERAS_BACKEND has to be tensorflow or jax\n"
