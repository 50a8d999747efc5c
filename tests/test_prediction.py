"""Vgg_prediction.py names pictures with any network of the collection, or VGG19 from a file."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import matplotlib.style
import numpy as np
import pytest
from conftest import ROOT, fork, load, run
from PIL import Image
from reference import RNG

SCRIPT = ROOT / "3_Vgg19_Network" / "Vgg_prediction.py"
prediction = load(SCRIPT)
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """The folder of a run, with a network that tells red, green and blue pictures apart."""
    folder = tmp_path_factory.mktemp("run")
    inputs = keras.layers.Input((32, 32, 3))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 25)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(10, activation="softmax")(x))
    kernel = np.zeros((3, 10))
    kernel[[0, 1, 2], [3, 6, 8]] = 1  # cat, frog, ship
    model.set_weights([kernel, np.linspace(0, 0.1, 10)])
    model.save(folder / "model.keras")
    (folder / "args.json").write_text(json.dumps({"class_names": CIFAR10}))
    return folder


def picture(path, colour, size=(90, 60)):
    Image.new("RGB", size, colour).save(path)
    return path


def top_five(output):
    """{picture: [(probability, class)]} as printed."""
    found, title = {}, None
    for line in output.splitlines():
        if line.startswith("  "):
            percent, name = line.split("%  ")
            found[title].append((float(percent), name))
        else:
            title = line
            found[title] = []
    return found


def test_pictures_are_named_printed_and_drawn(network, tmp_path):
    red, blue = picture(tmp_path / "red.png", "red"), picture(tmp_path / "blue.jpg", "blue")
    options = ["--model", network / "model.keras"]
    done = fork(SCRIPT, *options, red, blue, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = top_five(done.stdout)
    assert found["red.png"][0][1] == "cat" and found["blue.jpg"][0][1] == "ship"
    for title in ("red.png", "blue.jpg"):
        percents = [percent for percent, _ in found[title]]
        assert len(percents) == 5 and percents == sorted(percents, reverse=True)
    image = np.full((1, 32, 32, 3), (255, 0, 0), np.uint8)
    expected = keras.models.load_model(network / "model.keras").predict(image, verbose=0).max()
    assert found["red.png"][0][0] == pytest.approx(100 * expected, abs=0.01)
    drawn = Image.open(tmp_path / "predictions.png")
    assert drawn.width > 500 and drawn.height > 300

    before = (tmp_path / "predictions.png").read_bytes()
    assert fork(SCRIPT, *options, red, cwd=tmp_path).returncode == 0
    assert (tmp_path / "predictions.png").read_bytes() == before
    assert (tmp_path / "predictions_2.png").exists()


def test_what_is_no_picture_is_one_line_and_the_others_go_on(network, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    picture(tmp_path / "green.png", (0, 255, 0))
    (tmp_path / "half.png").write_bytes((tmp_path / "green.png").read_bytes()[:70])
    (tmp_path / "empty").mkdir()
    strange = os.fsencode(tmp_path) + b"/\xff\nblue.png"
    shutil.copy(picture(tmp_path / "blue.png", "blue"), strange)
    names = ["missing.png", "text.png", "green.png", "half.png", "empty", "*.jpg", strange]
    arguments = [sys.executable, SCRIPT, "--model", network, *names]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    begin = "Vgg_prediction.py: error: "
    unread = "cannot be read; save it as PNG or JPEG: "
    errors = done.stderr.splitlines()
    assert [line[: len(begin)] for line in errors] == [begin] * 5  # and nothing else
    missing, text, half, empty, pattern = (line.removeprefix(begin) for line in errors)
    assert missing == "missing.png is no file" and pattern == "*.jpg is no file"
    assert text.startswith(f"text.png {unread}") and half.startswith(f"half.png {unread}")
    assert empty == "empty has no pictures"
    found = top_five(done.stdout)
    assert found["green.png"][0][1] == "frog" and found["\ufffd\ufffdblue.png"][0][1] == "ship"
    nothing = fork(SCRIPT, "--model", network / "model.keras", "missing.png", cwd=tmp_path)
    assert nothing.returncode == 1 and not (tmp_path / "predictions_2.png").exists()


def test_folders_and_patterns_name_the_pictures_in_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.png", "c[1].png"):
        picture(tmp_path / name, "red")
    (tmp_path / ".hidden").touch()
    (tmp_path / "more").mkdir()
    names = ["a.png", "b.png", "c[1].png"]
    assert prediction.find_pictures(["."]) == list(map(Path, names))
    assert prediction.find_pictures(["*.png"]) == list(map(Path, names))
    assert prediction.find_pictures(["c[1].png", "?.png"]) == [
        Path("c[1].png"),
        *map(Path, names[:2]),
    ]
    assert prediction.find_pictures(["*.jpg", "more"]) == [Path("*.jpg"), Path("more")]


def test_name_that_the_terminal_lacks_letters_for(network, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    picture(tmp_path / "猫.png", "red")
    done = run(SCRIPT, "--model", network, "猫.png", "--csv", "t.csv", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("?.png\n"), done.stderr
    assert "猫.png" in (tmp_path / "t.csv").read_text("utf-8")


def test_table_has_a_row_for_each_picture(tmp_path):
    rankings = [[("cat", 0.5), ("a, b", 0.3), ("d", 0.1), ("e", 0.06), ("f", 0.04)], [("cat", 1.0)]]
    prediction.write_table(tmp_path / "t.csv", [Path("x.png"), Path("y.png")], rankings)
    first, second = csv.DictReader((tmp_path / "t.csv").open(encoding="utf-8-sig"))
    assert first["file"] == "x.png" and first["class_2"] == "a, b"
    assert [float(first[f"probability_{i}"]) for i in range(1, 6)] == [0.5, 0.3, 0.1, 0.06, 0.04]
    assert second["class_1"] == "cat" and second["class_5"] == second["probability_5"] == ""
    assert (tmp_path / "t.csv").read_bytes().startswith(b"\xef\xbb\xbf")  # Excel's sign of UTF-8
    with pytest.raises(prediction.UsageError, match="--csv .*nowhere.t.csv: No such file"):
        prediction.write_table(tmp_path / "nowhere" / "t.csv", [], [])


def test_network_is_a_run_or_its_file(network, tmp_path):
    """An unfinished run, too; what belongs to the other option is said."""
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    shutil.copy(network / "model.keras", unfinished / "last.keras")
    shutil.copy(network / "args.json", unfinished)
    for path in (network, network / "model.keras", unfinished, unfinished / "last.keras"):
        assert prediction.trained_network(str(path))[1][3] == "cat"
    (unfinished / "log.csv").touch()
    with pytest.raises(prediction.UsageError, match="run has no epoch yet"):
        prediction.trained_network(str(unfinished))


def test_run_that_is_trained_on_is_taken_as_far_as_it_is(network, tmp_path):
    for name in ("model.keras", "last.keras", "args.json"):
        shutil.copy(network / name.replace("last", "model"), tmp_path / name)
    (tmp_path / "model.keras").write_text("of fewer epochs")
    os.utime(tmp_path / "model.keras", (0, 0))
    assert prediction.trained_network(str(tmp_path))[1][3] == "cat"
    os.utime(tmp_path / "last.keras", (-9, -9))
    with pytest.raises(prediction.UsageError, match="model.keras is damaged"):
        prediction.trained_network(str(tmp_path))


def test_file_of_the_wrong_kind_names_the_option_for_it(network, tmp_path):
    with pytest.raises(prediction.UsageError, match="w.h5 is no .* did you mean --weights w.h5"):
        prediction.trained_network("w.h5")
    for path in (str(network), "model.keras"):
        with pytest.raises(prediction.UsageError, match="did you mean --model"):
            prediction.imagenet_network(path)
    with pytest.raises(prediction.UsageError, match="there is no such file"):
        prediction.trained_network(str(tmp_path))


@pytest.mark.parametrize("name", ["nowhere/names.png", "names.text"])
def test_picture_that_cannot_be_saved_leaves_the_table(name, network, tmp_path):
    picture(tmp_path / "red.png", "red")
    options = ["--model", network, "red.png", "--output", name, "--csv", "names.csv"]
    done = fork(SCRIPT, *options, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("Vgg_prediction.py: er")
    assert "cat" in (tmp_path / "names.csv").read_text() and "cat" in done.stdout


@pytest.mark.parametrize("name", ["nowhere/names.png", "names.text"])
def test_picture_that_cannot_be_saved(name, tmp_path):
    images = [np.zeros((32, 32, 3), np.uint8)]
    with pytest.raises(prediction.UsageError, match=f"--output .*{name}: .+"):
        prediction.draw(tmp_path / name, ["black"], images, [[("cat", 0.7), ("dog", 0.3)]])


def test_classes_of_one_name_have_bars_of_their_own(tmp_path, monkeypatch):
    figures, save = [], prediction.Figure.savefig
    monkeypatch.setattr(
        prediction.Figure,
        "savefig",
        lambda *args, **more: figures.append(save(*args, **more) or args[0]),
    )
    ranking = [("crane", 0.5), ("crane", 0.3), ("$cat^$", 0.2)]
    path = tmp_path / "p.png"
    (tmp_path / "hostile").write_text("text.usetex: True\nfont.family: no such font\n")
    with matplotlib.style.context(tmp_path / "hostile"):
        prediction.draw(path, ["$1_$2.png"], np.zeros((1, 9, 9, 3), np.uint8), [ranking])
    _, right = figures[0].axes
    assert [round(bar.get_width()) for bar in right.patches] == [50, 30, 20]
    assert len({bar.get_y() for bar in right.patches}) == 3
    assert [label.get_text() for label in right.get_yticklabels()] == ["crane", "crane", "$cat^$"]


@pytest.mark.parametrize("name", ["", ".", "result"])
def test_output_without_a_format_is_refused(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["Vgg_prediction.py", "cat.jpg", "--output", name])
    with pytest.raises(SystemExit, match="--output .*ends in .png"):
        prediction.parse_args()


def test_classes_of_cifar100_have_their_names():
    assert sorted(prediction.CIFAR100_NAMES) == prediction.CIFAR100_NAMES
    assert len(set(prediction.CIFAR100_NAMES)) == 100


@pytest.mark.parametrize("content", [b"", b"no network", None, 2])
def test_file_that_is_no_network(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.keras"
    if content is None:  # one that would run code
        inputs = keras.layers.Input((32, 32, 3))
        x = keras.layers.Lambda(lambda x: x + Path("evil").write_text("done"))(inputs)
        x = keras.layers.GlobalAveragePooling2D()(x)
        keras.Model(inputs, x).save(path)
    elif content == 2:  # outputs
        inputs = keras.layers.Input((32, 32, 3))
        x = keras.layers.GlobalAveragePooling2D()(inputs)
        keras.Model(inputs, [keras.layers.Dense(10)(x), keras.layers.Dense(10)(x)]).save(path)
    else:
        path.write_bytes(content)
    for file in tmp_path.glob("evil"):
        file.unlink()
    with pytest.raises(prediction.UsageError, match="damaged or no network"):
        prediction.trained_network(str(path))
    assert not (tmp_path / "evil").exists()
    with pytest.raises(prediction.UsageError, match="there is no such file"):
        prediction.trained_network(str(tmp_path / "elsewhere.keras"))


def test_network_without_args_has_numbers_for_names(network, tmp_path, capsys):
    shutil.copy(network / "model.keras", tmp_path)
    _, names = prediction.trained_network(str(tmp_path / "model.keras"))
    assert names == [f"class {i}" for i in range(10)]
    assert "classes have numbers only" in capsys.readouterr().err


@pytest.mark.parametrize(
    "facts, expected",
    [
        ({"class_names": [f"my {i}" for i in range(10)]}, "my 3"),
        ({"class_names": ["\u732b"] * 10}, "\u732b"),
        ({"class_names": ["too", "few"]}, "class 3"),
        ({"options": {}}, "class 3"),
        ([], "class 3"),
        ("", "class 3"),
    ],
)
def test_classes_are_those_of_the_run(facts, expected, network, tmp_path):
    shutil.copy(network / "model.keras", tmp_path)
    text = facts if isinstance(facts, str) else json.dumps(facts)
    (tmp_path / "args.json").write_text(text)
    _, names = prediction.trained_network(str(tmp_path / "model.keras"))
    assert len(names) == 10 and names[3] == expected


def test_run_on_cifar100_has_its_names(tmp_path):
    """Whose script counts the classes."""
    inputs = keras.layers.Input((32, 32, 3))
    x = keras.layers.GlobalAveragePooling2D()(inputs)
    keras.Model(inputs, keras.layers.Dense(100)(x)).save(tmp_path / "model.keras")
    facts = {"class_names": [str(label) for label in range(100)]}
    (tmp_path / "args.json").write_text(json.dumps(facts))
    _, names = prediction.trained_network(str(tmp_path))
    assert names[:2] + names[-1:] == ["apple", "aquarium_fish", "worm"]


@pytest.mark.slow
def test_imagenet_network_from_a_file(tmp_path):
    """VGG19 as Keras has it, with random weights: what it says is what Keras' own model says."""
    model = keras.applications.VGG19(weights=None)
    model.save(tmp_path / "vgg19.h5")
    pixels = RNG.integers(0, 256, (224, 224, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    names = tmp_path / "models" / "imagenet_class_index.json"
    names.parent.mkdir()
    index = {str(i): [f"n{i:08}", f"thing_{i}"] for i in range(1000)}
    names.write_text(json.dumps(index))
    # Keras takes the file of names from its folder if the hash is right; ours is another one.
    code = (
        "import runpy, sys, keras\n"
        f"keras.utils.get_file = lambda *a, **k: {str(names)!r}\n"
        "from keras.src.applications import imagenet_utils\n"
        "imagenet_utils.file_utils.get_file = keras.utils.get_file\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    arguments = [str(SCRIPT), "--weights", "vgg19.h5", "noise.png"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    row = model(keras.applications.vgg19.preprocess_input(pixels[None].astype("float32")))[0]
    expected = [f"thing_{i}" for i in np.argsort(row)[:-6:-1]]
    assert [name for _, name in top_five(done.stdout)["noise.png"]] == expected
