"""launch/cpu.py: a script runs as if it had been started by itself."""

import contextlib
import os
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
LAUNCHER = ROOT / "launch" / "cpu.py"
ACTIVE = "launch/cpu.py: faster convolutions, batch normalisation and SGD for this processor.\n"


def start(*command, cwd, env=()):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "-1",
            "PYTHONDONTWRITEBYTECODE": "1",
            **dict(env),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


SCRIPTS = {
    "arguments": "import sys; print(sys.argv, sys.path[0], __file__, __name__, __package__)",
    "main": "import __main__, pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))))\n"
    "print(__main__.A is A)",
    "modules": "import sys\nprint([m for m in sys.modules if m.split('.')[0] == 'launch'])",
    "names": "import training, launch, convolution; print(training.MINE, launch.MINE)",
    "builtins": "print(__builtins__.open is open)",
    "status": "raise SystemExit(3)",
    "message": "import sys; sys.exit('error: no such thing')",
    "error": "def f():\n    return 1 / 0\n\nf()",
    "chained": "try:\n    {}['x']\nexcept KeyError as error:\n    raise ValueError('y') from error",
    "interrupt": "raise KeyboardInterrupt",
    "syntax": "print(1)\nprint(2))\n",
    "future": "def f(x: int): pass\nprint(f.__annotations__)",
    "latin": "# -*- coding: latin-1 -*-\nprint('\xe9')",
    "hook": "import sys\nsys.excepthook = lambda *error: print(error[0])\nraise ValueError",
    "atexit": "import atexit\nWORD = 'bye'\natexit.register(lambda: print(WORD))",
}


@pytest.fixture
def folder(tmp_path):
    """A folder with scripts and with modules that have the names of ours."""
    place = tmp_path / "some where"
    place.mkdir()
    for name, text in SCRIPTS.items():
        (place / f"{name}.py").write_text(text, "latin-1" if name == "latin" else "utf-8")
    for name in "training", "launch", "convolution", "normalization", "cpu":
        (place / f"{name}.py").write_text("MINE = True")
    return place


def test_scripts_run_as_if_started_by_themselves(folder, tmp_path):
    for name in SCRIPTS:
        for cwd, script in (tmp_path, f"some where/{name}.py"), (folder, f"{name}.py"):
            command = script, "--help", "-x", "--", "a b"
            alone, launched = start(*command, cwd=cwd), start(LAUNCHER, *command, cwd=cwd)
            assert launched.stdout == alone.stdout, name
            assert launched.stderr == alone.stderr, name
            assert launched.returncode == alone.returncode, name
    assert start(LAUNCHER, "names.py", cwd=folder).stdout == "True True\n"


def test_a_link_is_followed_to_the_folder_of_the_script(folder, tmp_path):
    (tmp_path / "link.py").symlink_to(folder / "names.py")
    assert start(LAUNCHER, "link.py", cwd=tmp_path).stdout == "True True\n"


def test_usage(tmp_path):
    nothing, asked = start(LAUNCHER, cwd=tmp_path), start(LAUNCHER, "--help", cwd=tmp_path)
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert nothing.stderr == "usage: python launch/cpu.py SCRIPT [OPTIONS]\n"
    assert (asked.returncode, asked.stderr) == (0, "")
    assert "python launch/cpu.py SCRIPT [OPTIONS]" in asked.stdout
    assert start(LAUNCHER, "--unknown", "x.py", cwd=tmp_path).returncode == 2


def test_what_is_no_script_is_said_in_one_line(folder):
    (folder / "bytes.bin").write_bytes(bytes(range(256)))
    (folder / "notes.txt").write_text("Not a script at all.")
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", "print(1)")
    for name, reason in [
        ("missing.py", "cannot read missing.py: No such file or directory"),
        (".", "cannot read .: Is a directory"),
        ("bytes.bin", "bytes.bin is not a Python script: "),
        ("notes.txt", "notes.txt is not a Python script: "),
        ("archive.zip", "archive.zip is not a Python script: "),
    ]:
        result = start(LAUNCHER, name, cwd=folder)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(f"launch/cpu.py: {reason}")
        assert result.stderr.count("\n") == 1, result.stderr


def stubs(folder, keras="3.15.1", tensorflow="2.21.0", gpus=()):
    """Put packages into folder that only say what they are."""
    (folder / "keras.py").write_text(
        f"import os\n__version__ = {keras!r}\nMARK = os.environ.get('MARK')\n"
        "class backend:\n    backend = lambda: os.environ.get('KERAS_BACKEND', 'tensorflow')"
    )
    (folder / "tensorflow.py").write_text(
        f"__version__ = {tensorflow!r}\n"
        f"class config:\n    get_visible_devices = lambda kind: {list(gpus)!r}"
    )
    (folder / "script.py").write_text(
        "import importlib.util, os\nos.environ['MARK'] = 'set before'\n"
        "assert importlib.util.find_spec('keras')\n"  # as TensorFlow does
        "import keras\nprint(keras.MARK)"
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"keras": "3.8.0"}, "keras 3.8.0 is older than 3.15: Keras is left as it is."),
        ({"tensorflow": "2.18.1"}, "tensorflow 2.18.1 is older than 2.21: Keras is left as it is."),
        ({"gpus": ["GPU:0"]}, "TensorFlow sees a GPU: Keras is left as it is."),
    ],
)
def test_why_nothing_is_changed_is_said_in_one_line(options, message, tmp_path):
    stubs(tmp_path, **options)
    result = start(LAUNCHER, "script.py", cwd=tmp_path)
    assert result.stderr == f"launch/cpu.py: {message}\n"
    assert (result.stdout, result.returncode) == ("set before\n", 0)


def test_another_backend_is_left_alone(tmp_path):
    stubs(tmp_path)
    result = start(LAUNCHER, "script.py", cwd=tmp_path, env={"KERAS_BACKEND": "jax"})
    assert result.stderr == "launch/cpu.py: KERAS_BACKEND is jax: Keras is left as it is.\n"
    assert (result.stdout, result.returncode) == ("set before\n", 0)
    (tmp_path / "own.py").write_text(
        "import os\nos.environ['KERAS_BACKEND'] = 'jax'\nimport keras\nprint(keras.MARK)"
    )
    result = start(LAUNCHER, "own.py", cwd=tmp_path)
    assert result.stderr == "launch/cpu.py: Keras runs on jax: Keras is left as it is.\n"
    assert (result.stdout, result.returncode) == ("None\n", 0)


def test_settings_of_the_user_stay(tmp_path):
    names = "KERAS_BACKEND", "TF_ENABLE_ONEDNN_OPTS", "TF_CPP_MIN_LOG_LEVEL"
    text = f"import gc, os\nprint(*map(os.environ.get, {names}), gc.get_threshold()[0])"
    (tmp_path / "script.py").write_text(text)
    alone = {key: value for key, value in os.environ.items() if key not in names}
    result = subprocess.run(
        [sys.executable, LAUNCHER, "script.py"],
        cwd=tmp_path,
        env=alone,
        capture_output=True,
        text=True,
    )
    assert result.stdout == "None 1 3 100000\n"  # the backend may be in keras.json
    env = {"KERAS_BACKEND": "tensorflow", "TF_ENABLE_ONEDNN_OPTS": "0", "TF_CPP_MIN_LOG_LEVEL": "1"}
    result = start(LAUNCHER, "script.py", cwd=tmp_path, env=env)
    assert result.stdout == "tensorflow 0 1 100000\n"


TRAINING = """
import sys
import keras, numpy as np, tensorflow as tf
from keras import layers

def network():
    inputs = keras.Input((8, 8, 3))
    x = layers.Normalization(mean=[1, 2, 3], variance=[4, 5, 6])(inputs)
    x = layers.Conv2D(64, 1, kernel_regularizer="l2")(x)
    x = layers.ReLU()(layers.BatchNormalization(synchronized=True)(x))
    x = layers.Conv2D(64, 3, padding="same", kernel_regularizer="l2")(x)
    x = layers.Conv2D(8, 3, 2, use_bias=False)(layers.ZeroPadding2D(1)(x))
    parts = [layers.Conv2D(6, 3)(part) for part in keras.ops.split(x, 2, axis=-1)]
    x = layers.BatchNormalization(synchronized=True)(layers.Concatenate()(parts))
    model = keras.Model(inputs, layers.Dense(3, activation="softmax")(layers.Flatten()(x)))
    sgd = keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True)
    model.compile(sgd, "sparse_categorical_crossentropy")
    sgd.build(model.trainable_variables)
    return model

def train(begin, end, strategy=tf.distribute.get_strategy()):
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = network()
    if begin:
        model.load_weights(begin + ".keras")
    rng = np.random.default_rng(0)
    x, y = rng.normal(2, 3, (32, 8, 8, 3)), rng.integers(0, 3, 32)
    model.fit(x, y, batch_size=16, epochs=1, shuffle=False, verbose=0)
    model.save(end + ".keras")
    return [variable.numpy() for variable in (*model.variables, *model.optimizer.variables)]

if __name__ == "__main__":
    if sys.argv[1] == "mirrored":
        halves = [tf.config.LogicalDeviceConfiguration()] * 2
        cpu, = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, halves)
        train("", "mirrored", tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))
    else:
        for pair in sys.argv[1:]:
            train(*pair.split(":"))
    print(layers.Conv2D.call.__module__)
"""


def state(path):
    model = keras.models.load_model(path)
    return [variable.numpy() for variable in (*model.variables, *model.optimizer.variables)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a step leads to, alone (a) or launched (b), and another step after it, as states."""
    script = tmp_path_factory.mktemp("training") / "script.py"
    script.write_text(TRAINING)
    with contextlib.chdir(script.parent):
        train = runpy.run_path(str(script))["train"]
        states = {"a": train("", "a")}
        launched = start(LAUNCHER, "script.py", ":b", "a:ab", cwd=script.parent)
        states["aa"], states["ba"] = train("a", "aa"), train("b", "ba")
    for name in "b", "ab":
        states[name] = state(script.with_name(f"{name}.keras"))
    return script.parent, launched, states


def test_the_faster_ways_are_taken_and_announced(trained):
    _, launched, _ = trained
    assert (launched.returncode, launched.stdout) == (0, "__launch__.convolution\n")
    assert launched.stderr.count(ACTIVE) == launched.stderr.count("launch/cpu.py") == 1


def test_saved_files_are_those_of_plain_keras(trained):
    folder, configs = trained[0], []
    for name in "a", "b":
        with zipfile.ZipFile(folder / f"{name}.keras") as file:
            configs.append(
                re.sub(r'"shared_object_id": \d+', "", file.read("config.json").decode())
            )
    assert configs[0] == configs[1]


def test_training_differs_by_rounding_only_and_goes_on_from_either(trained):
    states = trained[2]
    for one, other in ("a", "b"), ("aa", "ab"), ("aa", "ba"):
        for ours, theirs in zip(states[one], states[other]):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    assert any(np.abs(new - old).max() > 0.01 for old, new in zip(states["a"], states["aa"]))


@pytest.mark.slow
def test_mirrored_replicas_train_like_one_device(trained):
    """Each update is made once, and batch normalisation averages over all replicas."""
    folder, _, states = trained
    result = start(LAUNCHER, "script.py", "mirrored", cwd=folder)
    assert (result.returncode, result.stdout) == (0, "__launch__.convolution\n"), result.stderr
    for ours, theirs in zip(state(folder / "mirrored.keras"), states["a"]):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
