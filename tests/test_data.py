"""Reading images and making batches of them."""

import io
import json
import os
import pickle
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import load
from PIL import Image

script = load("ResNet_keras")
FILES = {
    "cifar10": ([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"], 1, 10),
    "cifar100": (["train", "test"], 2, 100),
}


class Python2Pickler(pickle._Pickler):
    """Pickles as Python 2 did, by which CIFAR's files were written: all strings are bytes."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_text(self, value):
        value = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_text


def python_version(records, dataset):
    """One file's content in the layout of the Python version, of the same file's binary version."""
    label_bytes = FILES[dataset][1]
    content = {b"batch_label": b"training batch", b"data": records[:, label_bytes:]}
    names = [b"labels"] if label_bytes == 1 else [b"coarse_labels", b"fine_labels"]
    content |= {name: records[:, i].tolist() for i, name in enumerate(names)}
    content[b"filenames"] = [b"%d.png" % i for i in range(len(records))]
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray")


KINDS = [(dataset, kind) for dataset in FILES for kind in (".bin", "")]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def cifar(request, tmp_path_factory):
    """A folder as it is unpacked: (data set, folder, its files, records as in the binary one)."""
    dataset, kind = request.param
    names, label_bytes, classes = FILES[dataset]
    folder, rng = tmp_path_factory.mktemp("cifar") / "unpacked", np.random.default_rng(0)
    folder.mkdir()
    records = rng.integers(0, 256, (60000, label_bytes + 3072), np.uint8)
    records[:, : label_bytes - 1] = 200  # the coarse label
    records[:, label_bytes - 1] %= classes
    paths = [folder / (name + kind) for name in names]
    parts = np.split(records, [50000] if label_bytes == 2 else range(10000, 60000, 10000))
    for path, part in zip(paths, parts):
        path.write_bytes(part.tobytes() if kind else python_version(part, dataset))
    return dataset, folder, paths, records


@pytest.mark.parametrize("above", [False, True])
def test_binary_and_python_version_are_read(cifar, above):
    dataset, folder, _, records = cifar
    label_bytes, classes = FILES[dataset][1:]
    (x_train, y_train), (x_test, y_test), names = script.load_data(
        dataset, folder.parent if above else folder
    )
    assert x_train.shape == (50000, 32, 32, 3) and x_test.shape == (10000, 32, 32, 3)
    assert x_train.dtype == x_test.dtype == np.uint8
    assert y_train.dtype == y_test.dtype == np.int32
    assert len(names) == (10 if dataset == "cifar10" else 0)
    np.testing.assert_array_equal(np.concatenate([y_train, y_test]), records[:, label_bytes - 1])
    for image, record in ((x_train[12345], records[12345]), (x_test[7], records[50007])):
        planes = record[label_bytes:].reshape(3, 32, 32)
        np.testing.assert_array_equal(image, planes.transpose(1, 2, 0))


@pytest.mark.parametrize("cifar", [("cifar10", ".bin"), ("cifar100", "")], indirect=True, ids=str)
def test_whole_run_on_it(cifar, train_here, monkeypatch):
    """On the first 2000 images, once all have been read."""
    dataset, folder, *_ = cifar
    module = load("LeNet_keras")

    def few(*args):
        *sets, names = script.load_data(*args)
        return *((images[:2000], labels[:2000]) for images, labels in sets), names

    monkeypatch.setattr(module, "load_data", few)
    options = ["--dataset", dataset, "--data_dir", folder, "--batch_size", 200, "-e", 1]
    run = train_here(module, *options)
    model = keras.models.load_model(run / "model.keras")
    assert model.output_shape == (None, FILES[dataset][2])


def test_unusable_files_are_named(cifar):
    dataset, folder, (path, *_), records = cifar
    label_bytes, classes = FILES[dataset][1:]
    whole = path.read_bytes()
    part = records[: 50000 if label_bytes == 2 else 10000].copy()
    part[5, label_bytes - 1] = classes
    bad_label = part.tobytes() if path.suffix else python_version(part, dataset)
    part[5] = 0
    short = part[:-1].tobytes() if path.suffix else python_version(part[:-1], dataset)
    try:
        for damaged in (whole[: len(whole) // 2], whole[:-3072], b"", short, bad_label):
            path.write_bytes(damaged)
            with pytest.raises(SystemExit) as stop:
                script.load_data(dataset, folder)
            message = stop.value.code
            assert message.startswith(f"error: {path} is not the file of {dataset} that it should")
            assert "\n" not in message
            assert (damaged != bad_label) or message.endswith(f"it has the label {classes}")
        path.unlink()
        with pytest.raises(
            SystemExit, match=f"^error: --data_dir {folder} is no folder with CIFAR"
        ):
            script.load_data(dataset, folder)
        path.write_bytes(whole)
        last = folder / FILES[dataset][0][-1]
        last = last.with_name(last.name + path.suffix)
        away = last.rename(folder / "elsewhere")
        with pytest.raises(SystemExit, match=f"^error: {last} .*No such file"):
            script.load_data(dataset, folder)
        away.rename(last)
    finally:
        path.write_bytes(whole)


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call, asked",
    [
        (Call(os.system, "touch evil"), f"{os.system.__module__}.system"),
        (Call(np.save, "evil", 1), "numpy.save"),
        (Call(np.lib.format.open_memmap, "evil", "w+", "u1", (1,)), "open_memmap"),
        (Call(eval, "open('evil', 'w')"), "eval"),
        (Call(getattr, np.ndarray, "tofile"), "getattr"),
    ],
)
def test_pickle_that_asks_for_code_is_refused(call, asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for protocol in range(6):
        (tmp_path / "data_batch_1").write_bytes(pickle.dumps(call, protocol))
        with pytest.raises(SystemExit, match=f"data_batch_1 is not .*: it asks for .*{asked}$"):
            script.load_data("cifar10", tmp_path)
        assert os.listdir(tmp_path) == ["data_batch_1"]


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


def test_own_pictures_are_cropped_and_resized(tmp_path, train_here):
    wide = np.zeros((64, 96, 3))
    wide[:, 16:80] = np.linspace(0, 255, 64)[:, None, None]  # from black to white
    averages = wide[:, 16:80].reshape(32, 2, 32, 2, 3).mean((1, 3))
    grey = np.full((20, 20), 90)  # smaller than 32x32, and of one channel
    for part in ("train", "test"):
        paint(tmp_path / part / "a cat" / "1.png", wide)
        paint(tmp_path / part / "dog" / "2.PNG", wide.transpose(1, 0, 2))
        paint(tmp_path / part / "dog" / "more" / "3.jpg", grey)
        (tmp_path / part / "dog" / ".DS_Store").write_text("no picture")
        paint(tmp_path / part / "dog" / ".thumbnails" / "2.png", grey)
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
        train, _, *rest, _ = script.prepare_data(args)
        sets.append((train, *rest))
    assert capsys.readouterr().out == 2 * "2 classes: cat, dog\n"
    for (x_train, y_train), (x_test, y_test), names in sets:
        assert names == ["cat", "dog"]
        assert np.bincount(y_train).tolist() == [8, 16] and np.bincount(y_test).tolist() == [2, 4]
        levels = [int(image[0, 0, 0]) for image in (*x_train, *x_test)]
        assert sorted(levels) == [*range(10), *range(100, 120)]
        assert [level // 100 for level in levels] == [*y_train, *y_test]
    np.testing.assert_array_equal(sets[0][1][0], sets[1][1][0])


def test_a_part_of_every_class_is_held_out():
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
    fit = keras.Model.fit

    def spy(model, batches, validation_data, **options):
        seen.append([tuple(map(np.array, batch)) for batch in validation_data])
        seen.append([np.array(labels) for _, labels in batches.take(options["steps_per_epoch"])])
        return fit(model, batches, validation_data=validation_data, **options)

    monkeypatch.setattr(keras.Model, "fit", spy)
    for name in ("evaluate", "predict"):
        usual = getattr(keras.Model, name)

        def look(model, *batches, usual=usual, **options):  # fit gives evaluate() them as x
            for data in batches:
                looked_at.append(np.concatenate([x for x, _ in data.as_numpy_iterator()]))
            return usual(model, *batches, **options)

        monkeypatch.setattr(keras.Model, name, look)
    options = ["--data_dir", pictures(320), "--batch_size", 32, "--epochs", 1]
    train_here(module, *options, "--validation_split", 0.2)
    shown, trained_on = seen
    (x_train, y_train), (x_test, _), _ = module.load_data("cifar10", pictures(320))
    for images in looked_at[-2:]:  # evaluated for what is printed, predicted for what is drawn
        np.testing.assert_array_equal(images, x_test)
    expected = sum(max(1, round(0.2 * count)) for count in np.bincount(y_train))
    images = np.concatenate([x for x, _ in shown])
    assert len(images) == expected and sum(map(len, trained_on)) == (320 - expected) // 32 * 32
    known = {image.tobytes() for image in x_train}
    assert all(image.tobytes() in known for image in images)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: shutil.rmtree(path / "test" / "cat"), "test/cat has no pictures, or "),
        (lambda path: shutil.rmtree(path / "test"), "test/cat has no pictures, or "),
        (lambda path: paint(path / "test/fox/1.png", np.zeros((9, 9))), "test/fox has no pictures"),
        (lambda path: (path / "train/fox").mkdir(), "train/fox has no pictures, or "),
        (lambda path: [file.unlink() for file in path.glob("train/*/*")], "train/cat has no pict"),
        (lambda path: shutil.rmtree(path / "train" / "cat"), " or two classes"),
        (lambda path: (path / "train/cat/1.png").write_text("none"), "train/cat/1.png cannot be"),
        (lambda path: (path / "test/dog/2.jpg").write_bytes(b""), "test/dog/2.jpg cannot be"),
        (lambda path: (path / "test/dog/notes.txt").write_text("x"), "test/dog/notes.txt cannot"),
    ],
)
def test_own_pictures_that_cannot_be_used(spoil, message, tmp_path):
    for place in ("train/cat", "train/dog", "test/cat", "test/dog"):
        paint(tmp_path / place / "1.png", np.zeros((9, 9)))
    script.load_data("cifar10", tmp_path)
    spoil(tmp_path)
    with pytest.raises(SystemExit) as stop:
        script.main(["--data_dir", str(tmp_path), "--log_dir", str(tmp_path / "runs")])
    assert message in stop.value.code and "\n" not in stop.value.code
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "nowhere"])
def test_archive_that_is_not_unpacked(name, tmp_path):
    if name != "nowhere":
        (tmp_path / name).write_bytes(b"no folder")
    with pytest.raises(SystemExit, match=f"{name} is no folder with CIFAR's files .tar xf unpacks"):
        script.load_data("cifar10", tmp_path / name)


def test_size_is_for_own_pictures(cifar):
    dataset, folder, *_ = cifar
    for options in (["--data_dir", folder, "--dataset", dataset], ["--dataset", "synthetic"]):
        args = script.parse_args([*map(str, options), "--image_size", "64"])
        with pytest.raises(
            SystemExit, match="--image_size is for pictures: those of CIFAR are 32x32"
        ):
            script.prepare_data(args)


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
def test_augmentation_shifts_and_mirrors(name, border):
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
        assert 0.45 < np.mean([mirrored for *_, mirrored in seen]) < 0.55


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
