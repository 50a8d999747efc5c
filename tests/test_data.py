"""Reading images and making batches of them."""

import json
import os
import pickle
import shutil
import tarfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, SCRIPTS, load
from keras.src.utils import file_utils
from PIL import Image

script = load("ResNet_keras")


@pytest.mark.parametrize("dataset, classes", [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_read_from_the_archive_where_the_page_says(
    dataset, classes, tmp_path, monkeypatch
):
    """Without a network: Keras unpacks what lies there. Only its hash is not ours to make."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, 60000)
    labels[:classes] = range(classes)
    pixels = np.zeros((60000, 3072), np.uint8)
    pixels[:, :1024] = np.arange(60000)[:, None] % 251  # red
    if dataset == "cifar10":
        folder, key, parts = "cifar-10-batches-py", b"labels", [*range(0, 60000, 10000)]
        names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    else:
        folder, key, parts, names = (
            "cifar-100-python",
            b"fine_labels",
            [0, 50000],
            ["train", "test"],
        )
    (tmp_path / folder).mkdir()
    for name, begin, end in zip(names, parts, [*parts[1:], 60000]):
        content = {b"data": pixels[begin:end], key: labels[begin:end].tolist()}
        (tmp_path / folder / name).write_bytes(pickle.dumps(content))
    home = tmp_path / "home"
    archive = home / "datasets" / f"{folder}-target_archive"
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(tmp_path / folder, folder)
    for page in ("your_own.md", "your_own.zh-CN.md"):
        assert f"{folder}-target_archive" in (ROOT / "doc" / page).read_text()

    monkeypatch.setenv("KERAS_HOME", str(home))
    monkeypatch.setattr(file_utils.config, "keras_home", lambda: str(home), raising=False)
    monkeypatch.setattr(file_utils, "validate_file", lambda *args, **options: True)
    monkeypatch.setattr(file_utils, "urlretrieve", None)  # no network is asked
    (x_train, y_train), (x_test, y_test), class_names = script.load_data(dataset)
    assert x_train.shape == (50000, 32, 32, 3) and x_test.shape == (10000, 32, 32, 3)
    assert x_train.dtype == x_test.dtype == np.uint8 and len(class_names) == classes
    np.testing.assert_array_equal(np.concatenate([y_train, y_test]), labels)
    assert y_train.dtype == y_test.dtype == np.int32
    np.testing.assert_array_equal(x_train[300], np.full((32, 32, 3), [300 % 251, 0, 0]))


def test_scripts_unpickle_nothing():
    for path in SCRIPTS.values():
        assert "pickle" not in path.read_text()


def paint(path, pixels):
    """Save pixels, or one colour, as a picture of their own size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.uint8(pixels)).save(path)


def test_own_pictures_are_read(pictures):
    """Those of 32x32 pixels as they are, in the order of their classes and names."""
    *sets, names = script.load_data("cifar10", pictures())
    assert names == [f"class_{i}" for i in range(10)]
    for seed, (images, labels) in enumerate(sets, start=1):
        assert images.dtype == np.uint8 and labels.dtype == np.int32
        expected, classes = script.synthetic_images(len(images), seed)
        order = np.argsort(classes, kind="stable")
        np.testing.assert_array_equal(labels, classes[order])
        np.testing.assert_array_equal(images, expected[order])


def test_pictures_that_are_nearly_black_are_refused(tmp_path, train_here):
    """A camera's 12 bits in files of 16: white is 4095 of 65535, and would be 16 of 255."""
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            Image.fromarray(np.full((32, 32), 4095, np.uint16)).save(folder / "1.png")
    with pytest.raises(SystemExit, match="^error: the brightest pixel is 15 of 255: .* 8 bits"):
        train_here("LeNet_keras", "--data_dir", tmp_path, "--batch_size", 2)


def test_data_set_that_is_unknown_is_no_other_one():
    with pytest.raises(SystemExit, match="^error: CIFAR10 is none of cifar10, cifar100 and "):
        script.load_data("CIFAR10")


def test_own_pictures_are_cropped_and_resized(tmp_path, train_here):
    wide = np.zeros((64, 96, 3))
    wide[:, 16:80] = np.linspace(0, 255, 64)[:, None, None]  # from black to white
    averages = wide[:, 16:80].reshape(32, 2, 32, 2, 3).mean((1, 3))
    grey = np.full((20, 20), 90)  # smaller than 32x32, and of one channel
    for part in ("train", "test"):
        paint(tmp_path / part / "a cat" / "1.png", wide)
        paint(tmp_path / part / "dog" / "2.PNG", wide.transpose(1, 0, 2))
        paint(tmp_path / part / "dog" / "3.jpg", grey)
        (tmp_path / part / "dog" / ".DS_Store").write_text("no picture")
        paint(tmp_path / part / "dog" / ".thumbnails" / "2.png", grey)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "notes.txt").write_text("beside the classes")
    (images, labels), test, names = script.load_data("cifar100", tmp_path)
    assert names == ["a cat", "dog"]
    np.testing.assert_array_equal(labels, [0, 1, 1])
    np.testing.assert_array_equal(images, test[0])
    np.testing.assert_allclose(images[0][2:-2, 2:-2], averages[2:-2, 2:-2], atol=2)
    np.testing.assert_allclose(
        images[1][2:-2, 2:-2], averages.transpose(1, 0, 2)[2:-2, 2:-2], atol=2
    )
    np.testing.assert_array_equal(images[2], np.full((32, 32, 3), 90))

    options = ["--data_dir", tmp_path, "--batch_size", 3, "--epochs", 1, "--image_size", 48]
    run = train_here("LeNet_keras", *options)
    assert json.loads((run / "args.json").read_text())["class_names"] == names
    model = keras.models.load_model(run / "model.keras")
    assert model.output_shape == (None, 2) and model.input_shape == (None, 48, 48, 3)


def test_class_folders_alone_are_divided_the_same_way_for_every_seed(tmp_path, capsys):
    """With --weights of a run with another seed, test pictures would have been trained on."""
    for label, name in enumerate(("cat", "dog")):
        for i in range(10 * (1 + label)):
            paint(tmp_path / name / f"{i}.png", np.full((32, 32, 3), 100 * label + i))
    sets = []
    for seed in ("1", "2"):
        args = script.parse_args(["--data_dir", str(tmp_path), "--seed", seed, "-b", "2"])
        train, _, *rest = script.prepare_data(args)
        sets.append((train, *rest))
    said = f"{tmp_path.name}/cat: 10 pictures\n{tmp_path.name}/dog: 20 pictures\n"
    assert capsys.readouterr().out == 2 * said
    for (x_train, y_train), (x_test, y_test), names in sets:
        assert names == ["cat", "dog"]
        assert np.bincount(y_train).tolist() == [8, 16] and np.bincount(y_test).tolist() == [2, 4]
        levels = [int(image[0, 0, 0]) for image in (*x_train, *x_test)]
        assert sorted(levels) == [*range(10), *range(100, 120)]
        assert [level // 100 for level in levels] == [*y_train, *y_test]
    np.testing.assert_array_equal(sets[0][1][0], sets[1][1][0])


def test_a_fraction_of_every_class_is_held_out():
    labels = np.repeat([0, 1, 2], [100, 50, 1])
    np.random.default_rng(1).shuffle(labels)
    images = np.arange(151) + 1000 * labels
    (kept, kept_labels), (held, held_labels) = script.hold_out(images, labels, 0.1, seed=3)
    assert sorted([*kept, *held]) == sorted(images)
    np.testing.assert_array_equal(kept // 1000, kept_labels)
    np.testing.assert_array_equal(held // 1000, held_labels)
    assert np.bincount(held_labels).tolist() == [10, 5, 1]  # at least one


def test_validation_split_is_shown_and_the_test_images_are_looked_at_once(
    pictures, train_here, monkeypatch
):
    module, seen, looked_at = load("LeNet_keras"), [], []
    fit, predict = keras.Model.fit, keras.Model.predict

    def spy(model, batches, validation_data, **options):
        seen.append([tuple(map(np.array, batch)) for batch in validation_data])
        seen.append([np.array(labels) for _, labels in batches.take(options["steps_per_epoch"])])
        return fit(model, batches, validation_data=validation_data, **options)

    def look(model, images, *more, **options):
        looked_at.append(images)
        return predict(model, images, *more, **options)

    monkeypatch.setattr(keras.Model, "fit", spy)
    monkeypatch.setattr(keras.Model, "predict", look)
    options = ["--data_dir", pictures(320), "--batch_size", 32, "--epochs", 1]
    train_here(module, *options, "--validation_split", 0.2)
    shown, trained_on = seen
    (x_train, y_train), (x_test, _), _ = module.load_data("cifar10", pictures(320))
    (predicted,) = looked_at  # for what is printed and drawn
    np.testing.assert_array_equal(predicted, x_test)
    expected = sum(max(1, round(0.2 * count)) for count in np.bincount(y_train))
    images = np.concatenate([x for x, _ in shown])
    assert len(images) == expected and sum(map(len, trained_on)) == (320 - expected) // 32 * 32
    known = {image.tobytes() for image in x_train}
    assert all(image.tobytes() in known for image in images)


ONE = np.full((9, 9), 128)


def move(*pairs):
    """What renames folders below a path."""
    return lambda path: [(path / old).rename(path / new) for old, new in pairs]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: shutil.rmtree(path / "test" / "cat"), ", not ['cat', 'dog']"),
        (lambda path: paint(path / "test/fox/1.png", ONE), ", not ['cat', 'dog']"),
        (lambda path: paint(path / "train/fox/1.png", ONE), ", not ['cat', 'dog', 'fox']"),
        (move(("test/cat", "test/Cat")), ", not ['cat', 'dog']"),
        (lambda path: [file.unlink() for file in path.glob("train/*/*")], "train/cat has no pict"),
        (lambda path: (path / "test/dog/1.png").unlink(), "test/dog has no pictures"),
        (lambda path: shutil.rmtree(path / "train" / "cat"), "is no folder with one of pictures"),
        (lambda path: shutil.rmtree(path / "test"), "is no folder with one of pictures per class"),
        (lambda path: (path / "train/cat/1.png").write_text("none"), "train/cat/1.png cannot be"),
        (lambda path: (path / "test/dog/2.jpg").write_bytes(b""), "test/dog/2.jpg cannot be"),
        (lambda path: (path / "test/dog/notes.txt").write_text("x"), "test/dog/notes.txt cannot"),
        (lambda path: paint(path / "train/dog/more/2.png", ONE), "train/dog/more cannot be read"),
        # Parts that are not called train and test would be two classes.
        (move(("train", "Train"), ("test", "Test")), "has no classes but Test, Train: call them"),
        (
            move(("train", "training"), ("test", "testing")),
            "has no classes but testing, training: call",
        ),
        (
            move(("train", "seg_train"), ("test", "seg_test")),
            "has no classes but seg_test, seg_train: call",
        ),
        (move(("test", "val")), "has no classes but train, val: call them train and test"),
        (
            move(("train", "train1"), ("test", "my test")),
            "has no classes but my test, train1: call",
        ),
    ],
)
def test_own_pictures_that_cannot_be_used(spoil, message, tmp_path):
    for place in ("train/cat", "train/dog", "test/cat", "test/dog"):
        paint(tmp_path / place / "1.png", ONE)
    script.load_data("cifar10", tmp_path)
    spoil(tmp_path)
    with pytest.raises(SystemExit) as stop:
        script.main(["--data_dir", str(tmp_path), "--log_dir", str(tmp_path / "runs")])
    assert message in stop.value.code and "\n" not in stop.value.code
    assert not (tmp_path / "runs").exists()


def test_parts_that_are_not_read_are_named(tmp_path, capsys):
    for place in ("train/cat", "train/dog", "test/cat", "test/dog", "val/cat", "val/dog"):
        paint(tmp_path / place / "1.png", ONE)
    script.load_data("cifar10", tmp_path)
    assert f"{tmp_path}/val is not read: only train and test are.\n" in capsys.readouterr().out


def test_runs_among_the_class_folders_are_no_class(tmp_path, monkeypatch):
    """Those of --data_dir . the time before."""
    for place in ("cat", "dog"):
        for i in range(5):
            paint(tmp_path / place / f"{i}.png", ONE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "draw", lambda *args: None)
    for _ in range(2):
        script.main(["--data_dir", ".", "-b", 2, "-n", 1, "-e", 1])
    assert len([*tmp_path.glob(f"runs/ResNet-8_{tmp_path.name}/*/model.keras")]) == 2


def test_jax_needs_equal_shares_of_all_batches_to_test_on(monkeypatch):
    """13 pictures in batches of 8 are 8 and 5, which two devices cannot share."""
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    sets = script.synthetic_images(100, 1), script.synthetic_images(13, 2)
    monkeypatch.setattr(script, "load_data", lambda *_: (*sets, [str(i) for i in range(10)]))
    args = script.parse_args(["--gpus", "2", "-b", "8"])
    with pytest.raises(SystemExit, match="^error: --gpus 2 has to divide the 13 images to test on"):
        script.prepare_data(args)
    assert script.prepare_data(script.parse_args(["-b", "8"]))


def test_names_of_classes_may_sound_like_parts(tmp_path):
    for names in (("valid", "invalid"), ("trained", "untrained"), ("train", "bus", "tram")):
        folder = tmp_path / names[0]
        for name in names:
            paint(folder / name / "1.png", ONE)
            paint(folder / name / "2.png", ONE)
        assert script.load_data("cifar10", folder)[2] == sorted(names)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda x, y: (x / 255, y),
            "images are uint8 .n, height, width, 3., 0 to 255, .* not float64 .200, 32, ",
        ),
        (
            lambda x, y: (x, y[:, None]),
            "and labels .n,., not uint8 .200, 32, 32, 3. and .200, 1.",
        ),  # as keras.datasets has them
        (lambda x, y: (x, y + 1), "labels are from 0 to 9, for 10 class names"),
        (lambda x, y: (x, y - 1), "labels are from 0 to 9, for 10 class names"),
    ],
)
@pytest.mark.parametrize("part", [0, 1])
def test_arrays_of_ones_own_that_would_train_to_nonsense(part, spoil, message, monkeypatch):
    sets = [script.synthetic_images(200, seed) for seed in (1, 2)]
    sets[part] = spoil(*sets[part])
    monkeypatch.setattr(script, "load_data", lambda *_: (*sets, [str(i) for i in range(10)]))
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        script.main([])


@pytest.mark.parametrize("options", [[], ["--validation_split", "0.2"]])
def test_class_with_too_few_pictures_is_named(options, tmp_path):
    """One picture is the test picture; two are none to train with when one is held out, too."""
    for i in range(10):
        paint(tmp_path / "dog" / f"{i}.png", ONE)
    for i in range(1 + len(options) // 2):
        paint(tmp_path / "rare" / f"{i}.png", ONE)
    with pytest.raises(SystemExit, match="^error: the class rare has too few images: none is left"):
        script.main(["--data_dir", tmp_path, "--log_dir", tmp_path / "runs", "-b", 2, *options])


def test_class_whose_name_is_no_text_is_refused_before_it_is_trained_on(tmp_path):
    for name in (b"/dog", b"/ca\xff"):
        os.makedirs(os.fsencode(tmp_path) + name)
        paint(tmp_path / os.fsdecode(name[1:]) / "1.png", ONE)
    with pytest.raises(SystemExit, match=r"is not UTF-8: .'ca\\udcff', 'dog'.$"):
        script.load_data("cifar10", tmp_path)


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_1.bin", "train", "a.tar.gz", ""])
def test_files_of_cifar_name_the_page_that_says_where_they_go(name, tmp_path):
    if name:
        (tmp_path / name).write_bytes(b"no picture")
    folder = tmp_path / name if name == "a.tar.gz" else tmp_path
    with pytest.raises(SystemExit, match="no folder with one of .*for CIFAR see doc/your_own.md"):
        script.load_data("cifar10", folder)


@pytest.mark.parametrize("channels", [[0, 7, 250], [0, 0, 0]])
def test_empty_channels_are_normalised_to_numbers(channels):
    images = np.full((4, 8, 8, 3), channels, np.uint8)
    images[..., 1] += np.arange(4, dtype=np.uint8)[:, None, None]
    mean, variance = script.mean_and_variance(images)
    np.testing.assert_allclose(mean, [channels[0], channels[1] + 1.5, channels[2]])
    np.testing.assert_allclose(variance, [1, 1.25, 1])


def test_synthetic_images_are_balanced_repeatable_and_disjoint():
    (x_train, y_train), (x_test, y_test), _ = script.load_data("synthetic")
    assert x_train.shape == (5000, 32, 32, 3) and x_train.dtype == np.uint8
    assert x_test.shape == (1000, 32, 32, 3) and y_test.dtype == np.int32
    assert np.bincount(y_train, minlength=10).min() > 400
    assert np.bincount(y_test, minlength=10).min() > 60
    again = script.load_data("synthetic")
    np.testing.assert_array_equal(again[0][0], x_train)
    assert not {image.tobytes() for image in x_train} & {image.tobytes() for image in x_test}


@pytest.mark.parametrize(
    "name, border",
    [
        ("ResNet_keras", {"constant_values": 121}),
        ("LeNet_dp_da_keras", {"constant_values": 121}),
        ("Wide_ResNet_keras", {"mode": "reflect"}),
    ],
)
def test_augmentation_shifts_and_flips(name, border):
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    padded = np.pad(images, [(0, 0), (4, 4), (4, 4), (0, 0)], **border)
    labels = np.arange(3).repeat(2000)
    ((batch, order),) = load(name).train_batches(images[labels], labels, 6000, 0, 0, 1)
    assert batch.shape == (6000, 32, 32, 3) and batch.dtype == tf.uint8
    for label, one in enumerate(padded):
        augmented = batch.numpy()[order == label]
        variants = {}
        for top, left in np.ndindex(9, 9):
            crop = one[top : top + 32, left : left + 32]
            variants[crop.tobytes()] = (top, left, False)
            variants[crop[:, ::-1].tobytes()] = (top, left, True)
        seen = [variants[image.tobytes()] for image in augmented]
        assert set(seen) == set(variants.values())  # all 9 x 9 x 2 of them, and no other
        assert 0.45 < np.mean([flipped for *_, flipped in seen]) < 0.55


@pytest.mark.parametrize(
    "name", ["ResNet_keras", "LeNet_keras", "LeNet_dp_da_keras", "Wide_ResNet_keras"]
)
def test_batches_are_a_function_of_seed_epoch_and_step(name):
    labels = np.arange(50, dtype=np.int32)
    images = np.zeros((50, 32, 32, 3), np.uint8) + (5 * labels[:, None, None, None]).astype("uint8")

    def batches(seed, first_epoch):
        dataset = load(name).train_batches(images, labels, 8, seed, first_epoch, 3)
        return [(x.numpy(), y.numpy()) for x, y in dataset]

    whole, resumed, other = batches(7, 0), batches(7, 1), batches(8, 0)
    assert len(whole) == 18 and len(resumed) == 12
    for (x, y), (x_resumed, y_resumed) in zip(whole[6:], resumed):
        np.testing.assert_array_equal(x, x_resumed)
        np.testing.assert_array_equal(y, y_resumed)
    orders = [np.concatenate([y for _, y in part]) for part in (whole[:6], whole[6:12], other[:6])]
    for order in orders:
        assert len(set(order)) == 48  # no image twice in an epoch
    assert not np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[0], orders[2])
    for x, y in whole:
        np.testing.assert_array_equal(x[:, 16, 16, 0], 5 * y)  # images keep their labels
