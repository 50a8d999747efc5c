"""Under launch/cpu.py the scripts train the same networks, and leave and take the same files."""

import contextlib
import importlib
import sys
import zipfile

import keras
import numpy as np
import pytest
from conftest import ROOT, SCRIPTS, fork, load, only_run, run

sys.path.insert(0, str(ROOT))
faster = importlib.import_module("launch.cpu").faster

# Small, but wide enough for the faster ways to be taken.
OPTIONS = {
    "Vgg19_keras": ["--imagenet", "none"],
    "ResNet_keras": ["--stack_n", "1"],
    "ResNet": ["--stack_n", "1"],
    "Wide_ResNet_keras": ["--depth", "10", "--width", "4", "--dropout", "0.3"],
    "ResNeXt_keras": ["--cardinality", "2", "--base_width", "8"],
    "DenseNet_keras": ["--depth", "10"],
    "SENet_keras": ["--cardinality", "2", "--base_width", "8"],
}
# The others are made of the same layers, or wait for pytest -m ''.
QUICK = {"LeNet_dp_da_wd_keras"}
NAMES = [pytest.param(n, marks=[pytest.mark.slow] if n not in QUICK else []) for n in SCRIPTS]


def compiled(name):
    """Return a script's module and its network, the same at every call."""
    module = load(name)
    args = module.parse_args(OPTIONS.get(name, []))
    keras.utils.set_random_seed(0)

    def build():
        return module.build_network(args, (32, 32, 3), 10, [120.0] * 3, [4000.0] * 3)

    model = module.multi_gpu_model(build, 1)
    model.optimizer.learning_rate = 0.001
    return module, model


@pytest.mark.parametrize("name", NAMES)
def test_steps_plain_and_launched_differ_by_rounding_and_continue_each_other(name, tmp_path):
    starts, losses, states = {}, {}, {}
    for way in ("plain", "launched"):
        with faster() if way == "launched" else contextlib.nullcontext():
            module, model = compiled(name)
            starts[way] = values(model)
            losses[way] = model.train_on_batch(*module.synthetic_images(8, seed=1))[0]
            states[way] = values(model)
            model.save(tmp_path / f"{way}.keras")
    assert_same_step(starts["plain"], losses, states)
    saved_states = dict(states)
    for way, other in (("plain", "launched"), ("launched", "plain")):
        with faster() if way == "launched" else contextlib.nullcontext():
            module, model = compiled(name)
            model.load_weights(tmp_path / f"{other}.keras")
            for found, saved in zip(values(model), saved_states[other]):
                np.testing.assert_array_equal(found, saved)
            model.load_weights(tmp_path / "plain.keras")
            starts[way] = values(model)
            losses[way] = model.train_on_batch(*module.synthetic_images(8, seed=2))[0]
            states[way] = values(model)
    assert_same_step(starts["plain"], losses, states)


def values(model):
    """The values of a model's and its optimizer's variables, but for those that are not saved."""
    every = [*model.variables, *model.optimizer.variables]
    return [variable.numpy() for variable in every if "seed_generator" not in variable.path]


def assert_same_step(start, losses, states):
    """All variables together change alike: rounding errors are small beside the step."""
    np.testing.assert_allclose(losses["launched"], losses["plain"], rtol=1e-5)
    difference, size = 0.0, 0.0
    for before, plain, launched in zip(start, states["plain"], states["launched"]):
        if before.dtype == np.float32:
            difference += np.sum(np.square(plain - launched, dtype=np.float64))
            size += np.sum(np.square(plain - before, dtype=np.float64))
        else:
            np.testing.assert_array_equal(plain, launched)
    assert size > 0 and difference < 1e-4 * size


@pytest.mark.slow
def test_run_goes_on_without_the_launcher(tmp_path):
    launcher, script = ROOT / "launch" / "cpu.py", SCRIPTS["LeNet_dp_da_wd_keras"]
    logs = []
    for ways in ({2: "plain"}, {1: "launched", 2: "plain"}):
        folder = tmp_path / str(len(ways))
        folder.mkdir()
        options = ["--dataset", "synthetic", "-b", "500"]
        for epochs, way in ways.items():
            if way == "launched":
                done = run(launcher, script, *options, "--epochs", epochs, cwd=folder)
                assert "launch/cpu.py: faster" in done.stderr
            else:
                done = fork(script, *options, "--epochs", epochs, cwd=folder)
            assert done.returncode == 0, done.stderr
            options = ["--resume", only_run(folder)]
        logs.append(np.genfromtxt(only_run(folder) / "log.csv", delimiter=",", names=True))
    for column in logs[0].dtype.names:
        np.testing.assert_allclose(logs[1][column], logs[0][column], rtol=0.02, atol=0.02)
    config = zipfile.ZipFile(only_run(folder) / "last.keras").read("config.json").decode()
    assert "launch" not in config
