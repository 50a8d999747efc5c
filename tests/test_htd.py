"""The three schedules are the paper's, and their comparison compares only what can be compared."""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import ROOT, copy, load

resnet = load("ResNet")
summary = load(ROOT / "htd" / "summary.py")


@pytest.mark.parametrize(
    "name, rates",
    [
        ("step", [0.1, 0.1, 0.01, 0.001]),
        ("cos", [0.1, 0.05 + 0.05 / math.sqrt(2), 0.05, 0]),
        # (1 - tanh x) / 2 is 1 / (1 + exp(2x)), here at L = -6, at -3.75, -1.5 and at U = 3
        ("tanh", [0.1 / (1 + math.exp(2 * x)) for x in (-6, -3.75, -1.5, 3)]),
    ],
)
def test_schedule_is_the_papers(name, rates):
    for progress, rate in zip((0, 1 / 4, 1 / 2, 1), rates):
        assert resnet.scheduler(name, progress) == pytest.approx(rate, abs=1e-12)


def test_rate_steps_where_resnets_does():
    rates = [resnet.scheduler("step", epoch / 200) for epoch in (80, 81, 121, 122)]
    assert rates == [0.1, 0.01, 0.01, 0.001]


def test_bounds_of_the_tangent_are_options():
    assert resnet.scheduler("tanh", 0.5, lower=-2, upper=2) == pytest.approx(0.05)
    assert resnet.scheduler("tanh", 1, lower=-2, upper=2) == pytest.approx(0.1 / (1 + math.exp(4)))


@pytest.mark.parametrize("per_step", [False, True])
def test_rate_changes_every_epoch_or_every_step(per_step):
    args = argparse.Namespace(scheduler="cos", lower=-6, upper=3, epochs=2, per_step=per_step)
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(momentum=0.9, nesterov=True), "mse")
    used = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: used.append(float(model.optimizer.learning_rate))
    )
    history = model.fit(
        np.ones((8, 3)),
        np.ones(8),
        batch_size=2,
        epochs=2,
        verbose=0,
        callbacks=[resnet.learning_rate_callback(args), note],
    )
    at = range(8) if per_step else [0, 0, 0, 0, 4, 4, 4, 4]
    expected = [0.05 * (1 + math.cos(math.pi * step / 8)) for step in at]
    np.testing.assert_allclose(used, expected, rtol=1e-6)
    np.testing.assert_allclose(history.history["learning_rate"], [used[3], used[7]])


def test_learning_rate_of_every_step_needs_tensorflow(monkeypatch):
    """JAX takes it over at the end of an epoch only."""
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    assert not resnet.parse_args([]).per_step
    with pytest.raises(SystemExit, match="^error: --per_step needs KERAS_BACKEND=tensorflow"):
        resnet.parse_args(["--per_step"])


def make_run(folder, scheduler, count, accuracies, epochs=3, **options):
    run = folder / f"{scheduler}_{count}" / "ResNet-8_cifar10" / "2026-01-31_12-00-00"
    run.mkdir(parents=True)
    options |= {"scheduler": scheduler, "count": count, "seed": count - 1, "epochs": epochs}
    facts = {"network": "ResNet-8", "class_names": [], "options": options}
    (run / "args.json").write_text(json.dumps(facts))
    rows = [f"{epoch},{accuracy}" for epoch, accuracy in enumerate(accuracies)]
    (run / "log.csv").write_text("\n".join(["epoch,val_accuracy", *rows]) + "\n")
    if len(accuracies) == epochs:
        (run / "model.keras").touch()
    return run


def summarize(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["summary.py", *map(str, options)])
    summary.main()


def test_summary_takes_medians_and_leaves_unfinished_runs_out(monkeypatch, tmp_path, capsys):
    for count, last in enumerate((0.7, 0.5, 0.6), start=1):
        make_run(tmp_path, "tanh", count, [0.1, last + 0.05, last], data_dir=f"/{count}")
    make_run(tmp_path, "cos", 1, [0.2, 0.3, 0.4])
    half = make_run(tmp_path, "cos", 2, [0.2, 0.99])
    begun = make_run(tmp_path, "step", 1, [])
    (begun / "log.csv").unlink()
    summarize(monkeypatch, tmp_path, "--picture", tmp_path / "summary.png")
    out = capsys.readouterr().out
    assert "| tanh | 3 | 60.00 (50.00 to 70.00) | 65.00 (55.00 to 75.00) |\n" in out
    assert "| cos | 1 | 40.00 (40.00 to 40.00) | 40.00 (40.00 to 40.00) |\n" in out
    assert "| step" not in out
    assert f"{half}: 2 of 3 epochs\n" in out and f"{begun}: 0 of 3 epochs\n" in out
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_summary_refuses_runs_of_different_settings(monkeypatch, tmp_path):
    make_run(tmp_path, "tanh", 1, [0.1, 0.2, 0.3], batch_size=128)
    other = make_run(tmp_path, "cos", 1, [0.1, 0.2, 0.3], batch_size=64)
    with pytest.raises(SystemExit, match=r"batch_size is 64 in .*cos_1/.* and 128 in .*tanh_1/"):
        summarize(monkeypatch, tmp_path)
    shutil.rmtree(other)
    other = make_run(tmp_path, "cos", 2, [0.1, 0.2, 0.3], batch_size=128, per_step=False)
    facts = json.loads((other / "args.json").read_text())
    for key, value in ("class_names", ["cat", "dog"]), ("pixel_mean", [9, 8, 7]):
        (other / "args.json").write_text(json.dumps({**facts, key: value}))
        with pytest.raises(
            SystemExit, match=f"{key} is {re.escape(str(value))} in .*cos_2/.* and "
        ):
            summarize(monkeypatch, tmp_path)
    shutil.rmtree(other)
    run = make_run(tmp_path, "step", 1, [0.1, 0.2, 0.3], batch_size=128)
    for options in ({"epochs": 3}, {"scheduler": ["step"], "epochs": 3}, {"scheduler": "linear"}):
        (run / "args.json").write_text(json.dumps({"options": options}))
        with pytest.raises(SystemExit, match="step_1/.* is no run of ResNet.py"):
            summarize(monkeypatch, tmp_path)
    for text in ("{}", '{"options": 3}', ""):
        (run / "args.json").write_text(text)
        with pytest.raises(SystemExit, match="step_1/.*/args.json is damaged: move .*elsewhere$"):
            summarize(monkeypatch, tmp_path)
    with pytest.raises(SystemExit, match="holds no runs"):
        summarize(monkeypatch, tmp_path / "elsewhere")


def test_summary_compares_runs_whose_seeds_chose_what_to_validate_on(monkeypatch, tmp_path, capsys):
    for count in (1, 2):
        run = make_run(tmp_path, "cos", count, [0.1, 0.2, 0.3], validation_split=0.1)
        facts = json.loads((run / "args.json").read_text())
        (run / "args.json").write_text(json.dumps({**facts, "pixel_mean": [count]}))
    summarize(monkeypatch, tmp_path)
    assert "| cos | 2 | 30.00" in capsys.readouterr().out


def train_all(folder, *options):
    """Run run_training.sh of a folder with the Python of the tests."""
    (folder / "bin").mkdir(exist_ok=True)
    if not (folder / "bin" / "python").exists():
        (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (folder / "bin" / "python").chmod(0o755)
    return subprocess.run(
        ["bash", "run_training.sh", *map(str, options)],
        cwd=folder,
        env=os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("option", ["--dataset", "-d", "--scheduler=cos", "-c2", "-n5", "--resume"])
def test_options_that_the_experiment_sets_itself_are_refused(tmp_path, option):
    shutil.copy(ROOT / "htd" / "run_training.sh", tmp_path)
    done = train_all(tmp_path, option, "x")
    assert done.returncode == 1 and f"not {option.split('=')[0]} but --stack_n" in done.stderr


def test_each_count_has_a_seed_of_its_own_with_which_it_goes_on(tmp_path):
    options = ["--scheduler", "cos", "--count", "2", "--seed", "5"]
    args = resnet.parse_args(options)
    assert args.seed == 6
    (tmp_path / "last.keras").touch()
    (tmp_path / "args.json").write_text(json.dumps({"options": vars(args)}))
    resumed = resnet.parse_args(["--scheduler", "cos", "--count", "2", "--resume", str(tmp_path)])
    assert resumed.seed == 6


def test_experiment_goes_on_where_it_was_stopped(tmp_path):
    """With a ResNet.py that notes its options, and is killed in the middle of its third run."""
    for name in ("run_training.sh", "summary.py"):
        shutil.copy(ROOT / "htd" / name, tmp_path)
    (tmp_path / "ResNet.py").write_text(
        """
import json, os, pathlib, signal, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open("calls.txt", "a") as file:
    print(*sys.argv[1:], file=file)
run = pathlib.Path(options["--log_dir"], f"ResNet-8_{options['--dataset']}", "2026-01-31_12-00-00")
assert ("--resume" in options) == run.exists() and ("--seed" in options) != run.exists()
assert options.get("--resume", run) in (run, f"{run}/")
run.mkdir(parents=True, exist_ok=True)
facts = {"options": {"scheduler": options["--scheduler"], "epochs": 1}}
(run / "args.json").write_text(json.dumps(facts))
if len(open("calls.txt").readlines()) == 3:
    os.kill(os.getpid(), signal.SIGKILL)
(run / "log.csv").write_text("epoch,val_accuracy\\n0,0.5\\n")
(run / "model.keras").touch()
"""
    )
    options = "--datasets", "cifar10", "--runs=2", "--stack_n", 1, "--epochs", 1
    stopped = train_all(tmp_path, *options)
    assert stopped.returncode != 0 and "|" not in stopped.stdout
    done = train_all(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    order = [tuple(call.split()[i] for i in (5, 9, 7)) for call in calls]
    schedulers = ("step", "cos", "tanh", "tanh", "step", "cos", "tanh")
    counts = "1111222"
    assert order == [(name, "cifar10", count) for name, count in zip(schedulers, counts)]
    assert all(call.endswith("--epochs 1") for call in calls)
    assert [i for i, call in enumerate(calls) if "--resume" in call] == [3]
    assert "| tanh | 2 | 50.00 (50.00 to 50.00) |" in done.stdout
    assert (tmp_path / "runs" / "htd" / "summary.png").exists()


@pytest.mark.slow
def test_experiment_with_real_training(tmp_path, pictures):
    """Stopped in the second run; each has a seed of its own, with which it goes on."""
    copy("ResNet", tmp_path)
    for name in ("run_training.sh", "summary.py"):
        shutil.copy(ROOT / "htd" / name, tmp_path)
    options = ["--datasets", "cifar10", "--stack_n", 1, "--epochs", 2, "--runs", 2, "-b", 40]
    shutil.copytree(pictures(80), tmp_path / "my pictures")
    options += ["--schedulers", "tanh", "--data_dir", "my pictures/", "--seed", 7]
    done = train_all(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    runs = {path.parents[1].name: path for path in tmp_path.glob("runs/htd/*/ResNet-8_*/*")}
    assert sorted(runs) == ["tanh_1", "tanh_2"]
    log = (runs["tanh_2"] / "log.csv").read_bytes()
    (runs["tanh_2"] / "model.keras").unlink()  # as if it had been stopped
    done = train_all(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    assert "| tanh | 2 | " in done.stdout and (runs["tanh_2"] / "model.keras").exists()
    assert (runs["tanh_2"] / "log.csv").read_bytes() == log
    assert (runs["tanh_1"] / "log.csv").read_bytes() != log  # the count is a seed
