"""The changes on doc/copy_and_change.md do to a copy of a script what the page says."""

import json
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, SCRIPTS, load, only_run

PAGES = [ROOT / "doc" / name for name in ("copy_and_change.md", "copy_and_change.zh-CN.md")]


def blocks(page, kind):
    return re.findall(rf"```{kind}\n(.*?)```", page.read_text(), re.DOTALL)


ARRAYS, SCHEDULE, OPTIMIZER, SHIFT, CUTOUT, STAGES, CALLBACK = blocks(PAGES[0], "diff")


@pytest.fixture
def change(tmp_path, monkeypatch):
    """Apply diffs to a copy of a script, each where it fits once; return the copy as a module."""

    def apply(name, *diffs):
        text = SCRIPTS[name].read_text()
        for diff in diffs:
            old, new = (
                "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] in signs)
                for signs in (" -", " +")
            )
            assert text.count(old) == 1
            text = text.replace(old, new)
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.chdir(tmp_path)
        module = load(tmp_path / f"{name}.py")
        monkeypatch.setattr(module, "draw", lambda *args: None)
        return module

    return apply


def test_both_languages_have_the_same_code():
    for kind in ("diff", "python"):
        assert blocks(PAGES[0], kind) == blocks(PAGES[1], kind)


def test_arrays_of_ones_own(change, tmp_path):
    script = change("LeNet_dp_da_wd_keras", ARRAYS)
    images, labels = script.synthetic_images(100, seed=0)
    np.savez(tmp_path / "my_arrays.npz", images=images, labels=labels % 3)
    script.main(["--epochs", 1, "--batch_size", 20])
    run = only_run(tmp_path)
    assert json.loads((run / "args.json").read_text())["class_names"] == ["cat", "dog", "fox"]
    assert keras.models.load_model(run / "model.keras").output_shape == (None, 3)


def test_another_optimizer(change, pictures, tmp_path):
    script = change("ResNet_keras", SCHEDULE, OPTIMIZER)
    script.main(["--stack_n", 1, "--data_dir", pictures(80), "--epochs", 2, "--batch_size", 20])
    run = only_run(tmp_path)
    rates = np.genfromtxt(run / "log.csv", delimiter=",", names=True)["learning_rate"]
    np.testing.assert_allclose(rates, [0.001, 0.0005], rtol=1e-6)
    optimizer = keras.models.load_model(run / "last.keras").optimizer
    assert isinstance(optimizer, keras.optimizers.AdamW) and optimizer.iterations == 8


def test_smaller_shifts(change):
    script = change("ResNet_keras", SHIFT)
    images = np.zeros((2000, 9, 9, 3), np.uint8)
    images[:, 4, 4] = 200
    shifted = script.augment(tf.constant(images), tf.constant([3, 4], tf.int64)).numpy()
    assert {*map(tuple, np.argwhere(shifted[..., 0] == 200)[:, 1:])} == {
        (row, column) for row in range(2, 7) for column in range(2, 7)
    }


def test_cutout(change):
    script = change("ResNet_keras", CUTOUT)
    seed = tf.constant([3, 4], tf.int64)
    cut = script.augment(tf.zeros([64, 32, 32, 3], tf.uint8), seed).numpy()
    assert cut.shape == (64, 32, 32, 3) and set(np.unique(cut)) == {0, 121}
    areas = (cut[:, 4:-4, 4:-4] == 121)[..., 0].sum((1, 2))  # without the border of shifted images
    assert 4 * 4 <= areas.min() < areas.max() == 16 * 16  # less at the border
    images, labels = np.full((64, 32, 32, 3), 9, np.uint8), np.zeros(64, np.int32)
    first, again = (next(iter(script.train_batches(images, labels, 64, 0, 0, 1))) for _ in "12")
    assert 49 * 64 <= (first[0].numpy() == 121).all(axis=-1).sum() < 32 * 32 * 64
    np.testing.assert_array_equal(first[0], again[0])


def test_another_input_size(change):
    script = change("ResNet_keras", STAGES)
    model = script.residual_network(1, shape=(64, 64, 3))
    (pooling,) = [x for x in model.layers if isinstance(x, keras.layers.GlobalAveragePooling2D)]
    assert pooling.input.shape == (None, 8, 8, 128)


def test_stop_when_nothing_improves(change, pictures, tmp_path, monkeypatch):
    script = change("LeNet_dp_da_wd_keras", CALLBACK.replace("patience=20", "patience=1"))
    monkeypatch.setattr(script, "scheduler", lambda epoch, epochs: 0.0)  # nothing improves
    script.main(["--data_dir", pictures(80), "--epochs", 9, "--batch_size", 20])
    assert len((only_run(tmp_path) / "log.csv").read_text().splitlines()) == 3


def test_notebook(change):
    script = change("ResNet_keras")
    made = []
    script.train = lambda args: made.append(script.load_data(args.dataset)[0][0].shape)
    code = "\n".join(blocks(PAGES[0], "python")).replace("import ResNet_keras", "")
    exec(code, {"ResNet_keras": script})
    assert made == [(5000, 32, 32, 3), (500, 32, 32, 3)]
