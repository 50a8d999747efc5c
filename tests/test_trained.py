"""trained/: finished runs, whose networks are those of the scripts and know things when drawn."""

import csv
import json

import keras
import numpy as np
import pytest
from conftest import ROOT, fork, load

RUNS = sorted(path for path in (ROOT / "trained").iterdir() if path.is_dir())
FILES = {"args.json", "log.csv", "model.keras", "curves.png", "confusion.png"}
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def script_of(run):
    """The script that made a run, as a module, and its options."""
    facts = json.loads((run / "args.json").read_text())
    name = "ResNet_keras" if "stack_n" in facts["options"] else f"{facts['network']}_keras"
    module = load(name)
    options = [f"--{key}={value}" for key, value in facts["options"].items()]
    return module, module.parse_args(options), facts


def test_the_ladder_and_a_resnet_are_there():
    networks = "LeNet", "LeNet_dp", "LeNet_dp_da", "LeNet_dp_da_wd", "ResNet-20"
    assert [run.name for run in RUNS] == [f"{network}_cifar10" for network in networks]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_trained_run_is_whole_and_names_no_place(run):
    _, args, facts = script_of(run)
    assert {path.name for path in run.iterdir()} == FILES
    assert not {"data_dir", "log_dir", "resume"} & facts["options"].keys()
    assert facts["class_names"] == CLASSES and f"{facts['network']}_cifar10" == run.name
    rows = np.genfromtxt(run / "log.csv", delimiter=",", names=True)
    assert [*rows["epoch"]] == [*range(len(rows))] and np.isfinite(rows["val_loss"]).all()
    unfinished = ROOT / "doc" / "results" / "unfinished" / run.name / "log.csv"
    if unfinished.exists():  # as doc/results says of it
        assert unfinished.read_bytes() == (run / "log.csv").read_bytes()
    else:
        assert len(rows) == args.epochs
    ladder = ROOT / "doc" / "results" / f"{facts['network']}_1.csv"
    assert not ladder.exists() or ladder.read_bytes() == (run / "log.csv").read_bytes()


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_trained_network_is_that_of_its_script(run):
    module, args, facts = script_of(run)
    keras.utils.set_random_seed(0)
    fresh = module.build_network(args, (32, 32, 3), 10, [0.0] * 3, [1.0] * 3)
    before = [weights.copy() for weights in fresh.get_weights()]
    module.load_pretrained(fresh, run / "model.keras")
    trained = keras.models.load_model(run / "model.keras")
    for old, new, expected in zip(before, fresh.get_weights(), trained.get_weights()):
        np.testing.assert_array_equal(new, expected)
        assert old.ndim < 2 or not np.array_equal(old, new)


def test_a_trained_network_knows_what_is_drawn(tmp_path):
    programs = ROOT / "images" / "draw_things.py", ROOT / "3_Vgg19_Network" / "Vgg_prediction.py"
    model = ["--model", ROOT / "trained" / "ResNet-20_cifar10", "--csv", "names.csv"]
    for command in ([programs[0], "things"], [programs[1], *model, "things"]):
        done = fork(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    rows = [*csv.reader((tmp_path / "names.csv").read_text().splitlines())][1:]
    assert len(rows) == 5
    for file, name, *_ in rows:
        assert file.endswith(f"{name}.png")
