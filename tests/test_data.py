"""Reading images and making batches of them."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import load, only_run

script = load("ResNet_keras")
FILES = {
    "cifar10": ([f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"], 1),
    "cifar100": (["train.bin", "test.bin"], 2),
}


@pytest.fixture(scope="module", params=FILES)
def binary(request, tmp_path_factory):
    """A folder in the binary layout: (data set, folder, labels, pixels as written)."""
    names, label_bytes = FILES[request.param]
    folder, rng = tmp_path_factory.mktemp(request.param), np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60000, 3072), np.uint8)
    labels = rng.integers(0, script.NUM_CLASSES[request.param], (60000, 1), np.uint8)
    coarse = np.full((60000, label_bytes - 1), 200, np.uint8)
    records = np.concatenate([coarse, labels, pixels], axis=1)
    parts = np.split(records, [50000] if label_bytes == 2 else range(10000, 60000, 10000))
    for name, part in zip(names, parts):
        part.tofile(folder / name)
    return request.param, folder, labels, pixels


def test_binary_version_is_read(binary):
    dataset, folder, labels, pixels = binary
    (x_train, y_train), (x_test, y_test) = script.load_data(dataset, folder)
    assert x_train.shape == (50000, 32, 32, 3) and x_test.shape == (10000, 32, 32, 3)
    assert x_train.dtype == x_test.dtype == np.uint8
    assert y_train.dtype == y_test.dtype == np.int32
    np.testing.assert_array_equal(np.concatenate([y_train, y_test]), labels[:, 0])
    for image, record in ((x_train[12345], pixels[12345]), (x_test[7], pixels[50007])):
        for channel in range(3):
            plane = record[1024 * channel : 1024 * (channel + 1)]
            np.testing.assert_array_equal(image[:, :, channel].ravel(), plane)


def test_whole_run_on_a_binary_version(binary, tmp_path, monkeypatch):
    dataset, folder, *_ = binary
    options = ["--dataset", dataset, "--data_dir", str(folder), "--batch_size", "5000", "-e", "1"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["LeNet_keras.py", *options])
    load("LeNet_keras").main()
    run = only_run(tmp_path)
    model = keras.models.load_model(run / "model.keras")
    assert model.output_shape == (None, script.NUM_CLASSES[dataset])
    assert (run / "confusion.png").exists() and (run / "curves.png").exists()


def test_unusable_files_are_named(binary):
    dataset, folder, *_ = binary
    path = folder / FILES[dataset][0][0]
    whole = path.read_bytes()
    try:
        for damaged in (whole[:-1], whole[: len(whole) // 2], whole + b"\0", b""):
            path.write_bytes(damaged)
            with pytest.raises(script.UsageError, match=f"{path.name} has {len(damaged)} bytes"):
                script.load_data(dataset, folder)
        label = FILES[dataset][1] - 1
        path.write_bytes(whole[:label] + bytes([script.NUM_CLASSES[dataset]]) + whole[label + 1 :])
        with pytest.raises(script.UsageError, match=f"{path.name} has the label"):
            script.load_data(dataset, folder)
        path.unlink()
        with pytest.raises(script.UsageError, match=f"{path.name} is missing"):
            script.load_data(dataset, folder)
    finally:
        path.write_bytes(whole)


def test_synthetic_images_are_balanced_repeatable_and_disjoint():
    (x_train, y_train), (x_test, y_test) = script.load_data("synthetic")
    assert x_train.shape == (5000, 32, 32, 3) and x_train.dtype == np.uint8
    assert np.bincount(y_train, minlength=10).min() > 400
    assert np.bincount(y_test, minlength=10).min() > 60
    again = script.load_data("synthetic")
    np.testing.assert_array_equal(again[0][0], x_train)
    assert not {image.tobytes() for image in x_train} & {image.tobytes() for image in x_test}


def test_augmentation_shifts_and_mirrors():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 32, 32, 3), np.uint8)
    padded = script.pad(images)
    assert padded.shape == (3, 40, 40, 3) and padded.dtype == np.uint8
    np.testing.assert_array_equal(padded[0, 0, 0], images.mean((0, 1, 2)).round())
    chosen = np.tile(np.arange(3, dtype=np.int32), 2000)
    batch = script.augment(tf.constant(padded), tf.constant(chosen), tf.constant([1, 2])).numpy()
    assert batch.shape == (6000, 32, 32, 3) and batch.dtype == np.uint8
    for index in range(3):
        variants = {}
        for top in range(9):
            for left in range(9):
                crop = padded[index, top : top + 32, left : left + 32]
                variants[crop.tobytes()] = (top, left, False)
                variants[crop[:, ::-1].tobytes()] = (top, left, True)
        seen = [variants[image.tobytes()] for image in batch[chosen == index]]
        assert set(seen) == set(variants.values())  # all 9 x 9 x 2 of them, and no other
        assert 0.45 < np.mean([mirrored for *_, mirrored in seen]) < 0.55


@pytest.mark.parametrize(
    "name", ["ResNet_keras", "LeNet_keras", "LeNet_dp_da_keras", "Wide_ResNet_keras"]
)
def test_batches_are_a_function_of_seed_epoch_and_step(name):
    module = load(name)
    labels = np.arange(50, dtype=np.int32)
    images = np.zeros((50, 32, 32, 3), np.uint8) + (5 * labels[:, None, None, None]).astype("uint8")

    def batches(seed, initial_epoch):
        dataset = module.train_batches(images, labels, 8, seed, initial_epoch, 3)
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
