"""The code on doc/your_own.md runs as it stands there, in both languages."""

import json
import pickle
import re
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import ROOT, SCRIPTS, copy, load

PAGES = [ROOT / "doc" / name for name in ("your_own.md", "your_own.zh-CN.md")]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs(page, pictures, tmp_path):
    if page != PAGES[0]:
        assert blocks(page) == blocks(PAGES[0])
        return
    script = load(copy("ResNet_keras", tmp_path))
    shutil.copytree(pictures(80), tmp_path / "my_pictures")
    (images, _), _, names = script.load_data("cifar10", pictures(80))
    network = script.residual_network(3, num_classes=10, mean=100.0, variance=2500.0)
    (tmp_path / "my_run").mkdir()
    network.save(tmp_path / "my_run" / "model.keras")
    (tmp_path / "my_run" / "args.json").write_text(json.dumps({"class_names": names}))
    keras.utils.save_img(tmp_path / "cat.jpg", images[0].repeat(3, 0).repeat(3, 1), scale=False)
    after = """
assert heat.shape == (32, 32) and 0 <= heat.min() and heat.max() <= 1
expected = model.predict(np.array(image)[None], verbose=0)[0]
np.testing.assert_allclose(probabilities, expected, atol=1e-6)
flat = tf.lite.Interpreter("model.tflite")
flat.allocate_tensors()
flat.set_tensor(flat.get_input_details()[0]["index"], np.float32(image)[None])
flat.invoke()
found = flat.get_tensor(flat.get_output_details()[0]["index"])[0]
np.testing.assert_allclose(found, expected, atol=1e-4)
np.testing.assert_allclose(served.serve(np.float32(image)[None])[0], expected, atol=1e-4)
np.testing.assert_allclose(older.predict(np.array(image)[None], verbose=0)[0], expected, atol=1e-6)
assert keras.models.load_model("mine.keras").output_shape == (None, 10)
"""
    (tmp_path / "page.py").write_text("\n".join([*blocks(page), after]))
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (name,) = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("class_")}
    assert name in names


@pytest.mark.parametrize("folder", ["cifar-10-batches-py", "cifar-100-python"])
def test_unpacked_folder_of_cifar_becomes_class_folders(folder, tmp_path):
    """With few images, in the layout of CIFAR's Python version."""
    text = PAGES[0].read_text()
    (block,) = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    assert f"```py\n{block}```" in PAGES[1].read_text()
    ten = folder == "cifar-10-batches-py"
    names, key = (b"label_names", b"labels") if ten else (b"fine_label_names", b"fine_labels")
    files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if ten else ["train", "test"]
    (tmp_path / folder).mkdir()
    script, expected = load("ResNet_keras"), []
    for seed, name in enumerate(files):
        images, labels = script.synthetic_images(40, seed)
        expected.append((images, labels % 2))
        data = images.transpose(0, 3, 1, 2).reshape(40, 3072)
        content = {b"data": data, key: (labels % 2).tolist()}
        (tmp_path / folder / name).write_bytes(pickle.dumps(content))
    meta = "batches.meta" if ten else "meta"
    (tmp_path / folder / meta).write_bytes(pickle.dumps({names: [b"cat", b"dog"]}))
    block = block.replace(
        'Path("cifar-10-batches-py"), Path("cifar10")', f'Path("{folder}"), Path("p")'
    )
    (tmp_path / "page.py").write_text(block)
    subprocess.run([sys.executable, "page.py"], cwd=tmp_path, check=True, timeout=100)
    *sets, class_names = script.read_pictures(tmp_path / "p")
    assert class_names == ["cat", "dog"]
    for (images, labels), parts in zip(sets, (expected[:-1], expected[-1:])):
        x, y = (np.concatenate(arrays) for arrays in zip(*parts))
        order = np.argsort(y, kind="stable")
        np.testing.assert_array_equal(labels, y[order])
        np.testing.assert_array_equal(images, x[order])


def test_every_option_on_the_pages_is_one():
    known = set(re.findall(r'"(--[a-z_]+)"', SCRIPTS["ResNet_keras"].read_text()))
    for page in PAGES:
        ours = re.sub(r"python -m .*", "", page.read_text())  # tf2onnx has options of its own
        assert set(re.findall(r"--[a-z_]+", ours)) <= known | {"--model", "--csv"}
