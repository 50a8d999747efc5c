"""launch/machines.py: two workers on this machine train as one process does with whole batches."""

import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zipfile

import keras
import numpy as np
import pytest
from conftest import ROOT, SCRIPTS, fork, only_run

sys.path.insert(0, str(ROOT))
read_tf_config = importlib.import_module("launch.machines").read_tf_config

LAUNCHER = ROOT / "launch" / "machines.py"
OPTIONS = "--dataset synthetic --batch_size 64 --epochs 2 --log_dir runs".split()


@pytest.fixture
def script(tmp_path):
    """A copy of LeNet with few images, in float64, and a process that can die in an epoch.

    It gets batch normalisation, which has to see the whole batch. The last of the batches to
    validate on has one image, so that a worker has none.
    """
    text = SCRIPTS["LeNet_dp_da_keras"].read_text().replace('"float32"', '"float64"')
    pooling = "    x = layers.MaxPooling2D(2)(x)  # 14x14x6\n"
    rate, die = "    if epoch / epochs < 1 / 2:", "os.kill(os.getpid(), 9)"
    several = "synchronized=tf.distribute.has_strategy()"
    for old, new in [
        ("\nKERNEL =", "\nkeras.config.set_floatx('float64')\nKERNEL ="),
        ("synthetic_images(5000, seed=1)", "synthetic_images(256, seed=1)"),
        ("synthetic_images(1000, seed=2)", "synthetic_images(65, seed=2)"),
        (pooling, f"{pooling}    x = layers.BatchNormalization({several})(x)\n"),
        (rate, f"    if str(epoch) == os.environ.get('DIE'):\n        {die}\n{rate}"),
    ]:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = tmp_path / "LeNet_dp_da_keras.py"
    path.write_text(text)
    return path


def address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def start(commands, cwd, environments=({}, {})):
    """Start the commands as workers; worker i writes to out_i and err_i."""
    processes = []
    (cwd / "temporary").mkdir(exist_ok=True)
    for i, (command, more) in enumerate(zip(commands, environments)):
        more = {"TMPDIR": str(cwd / "temporary"), **more}
        with open(cwd / f"out_{i}", "w") as out, open(cwd / f"err_{i}", "w") as err:
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=cwd,
                stdout=out,
                stderr=err,
                env={**os.environ, **more},
            )
        processes.append(process)
    return processes


def line(i, workers, *rest):
    return [sys.executable, LAUNCHER, "--workers", ",".join(workers), "--index", i, *rest]


def ends(processes, cwd):
    """Wait for all workers; return (exit status, what it says on stderr) of each."""
    found = []
    for i, process in enumerate(processes):
        status = process.wait(200)
        text = (cwd / f"err_{i}").read_text()
        assert "Traceback" not in text, text
        said = [line for line in text.splitlines() if line.startswith(("launch/", "error: "))]
        found.append((status, said))
    return found


def log(folder):
    return np.genfromtxt(folder / "log.csv", delimiter=",", names=True)


@pytest.mark.parametrize("kill", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_workers_train_as_one_process_even_after_a_kill(script, kill, tmp_path):
    workers = [address(), address()]
    commands = [line(i, workers, script, *OPTIONS) for i in range(2)]
    if kill:
        processes = start(commands, tmp_path, [{}, {"DIE": "1"}])
        (status, said), (killed, _) = ends(processes, tmp_path)
        assert (status, killed) == (1, -signal.SIGKILL)
        way_on = f"To go on: --resume {only_run(tmp_path)}"
        assert said[1:] == [f"error: worker 1 ({workers[1]}) has ended. {way_on}"]
        commands = [line(i, workers, script, "--resume", only_run(tmp_path)) for i in range(2)]
    for i, (status, said) in enumerate(ends(start(commands, tmp_path), tmp_path)):
        who = "leaves that to worker 0" if i else "prints and writes"
        assert said == [f"launch/machines.py: worker {i} of 2, 2 replicas in all; {who}."]
        assert status == 0
    assert (tmp_path / "out_1").read_text() == ""
    left = [path for path in (tmp_path / "temporary").iterdir() if path.is_dir()]
    assert len(left) == kill  # a worker that is killed cannot clear up

    alone = tmp_path / "alone"
    alone.mkdir()
    assert fork(script, *OPTIONS, cwd=alone).returncode == 0
    ours, theirs = only_run(tmp_path), only_run(alone)
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    assert log(ours).dtype == log(theirs).dtype
    for name in log(theirs).dtype.names:
        np.testing.assert_allclose(log(ours)[name], log(theirs)[name], rtol=1e-9)
    options = [json.loads((folder / "args.json").read_text()) for folder in (ours, theirs)]
    assert options[0]["options"]["resume"] == (str(ours) if kill else None)
    for found in options:
        del found["options"]["log_dir"], found["options"]["resume"]
    assert options[0] == options[1]
    configs = [
        re.sub(r'"shared_object_id": \d+', "", str(zipfile.ZipFile(file).read("config.json")))
        for file in (ours / "model.keras", theirs / "model.keras")
    ]
    assert configs[0] == configs[1]
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3))
    predictions = [
        keras.models.load_model(f / "model.keras").predict(images, verbose=0)
        for f in (ours, theirs)
    ]
    np.testing.assert_allclose(*predictions, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_is_stopped_stops_the_others(script, sent, victim, tmp_path):
    workers = [address(), address()]
    options = [*OPTIONS, "--epochs", "2000"]
    processes = start([line(i, workers, script, *options) for i in range(2)], tmp_path)
    while "Epoch 3/" not in (tmp_path / "out_0").read_text():
        assert processes[0].poll() is None
        time.sleep(0.2)
    processes[victim].send_signal(sent)
    begun = time.monotonic()
    found = ends(processes, tmp_path)
    assert time.monotonic() - begun < 30
    run = only_run(tmp_path)
    for i, (status, said) in enumerate(found):
        if i == victim and sent == signal.SIGTERM:
            assert (status, len(said)) == (-signal.SIGTERM, 1)
        else:
            reason = (
                "interrupted" if i == victim else f"worker {victim} ({workers[victim]}) has ended"
            )
            assert said[1].startswith(f"error: {reason}. To go on: ")
            assert (status, said[1].split()[-2:]) == (1, ["--resume", str(run)])
    assert len(log(run)) >= 2 and keras.models.load_model(run / "last.keras")


def test_workers_that_do_not_do_the_same_end_before_they_begin(script, tmp_path):
    workers = [address(), address()]
    own = [[], ["--seed", "3"]]
    commands = [line(i, workers, script, *OPTIONS, *own[i]) for i in range(2)]
    for status, said in ends(start(commands, tmp_path), tmp_path):
        assert status == 1
        assert said == [
            "launch/machines.py: --seed is 3 on worker 1 and 0 on worker 0: give all the same"
        ]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "words, config, reason",
    [
        ("x.py", "", "--workers HOST:PORT,HOST:PORT and --index N are needed, or TF_CONFIG"),
        ("--workers a:1,b:1 --index 2 x.py", "", "--index has to be from 0 to 1"),
        ("--workers a:1,b:1 --index -1 x.py", "", "--index has to be from 0 to 1"),
        ("--workers a:1,b:1 x.py", "", "--index has to be from 0 to 1"),
        ("--workers a:1,b --index 0 x.py", "", "a worker is HOST:PORT, as in hostA:2222, not 'b'"),
        ("--workers a:1,a:1 --index 0 x.py", "", "two workers have one address: a:1, a:1"),
        ("--workers a:1,b:1 --index 0", "", "the following arguments are required: SCRIPT"),
        ("--workers a:1,b:1 --index 0 x.py", "", "cannot read x.py: No such file or directory"),
        ("x.py", "{", "TF_CONFIG does not name the workers and which of them this one is"),
        ("x.py", '{"cluster": {"worker": []}, "task": 1}', "TF_CONFIG does not name the workers"),
    ],
)
def test_what_is_wrong_with_the_command_is_said_in_one_line(words, config, reason, tmp_path):
    done = subprocess.run(
        [sys.executable, LAUNCHER, *words.split()],
        cwd=tmp_path,
        env={**os.environ, "TF_CONFIG": config},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr.startswith(f"launch/machines.py: {reason}")
    assert done.returncode and done.stderr.count("\n") == 1 and not done.stdout


def test_the_chief_of_tf_config_is_worker_0():
    cluster = {"chief": ["a:1"], "worker": ["b:1", "c:1"]}
    for kind, index, place in ("chief", 0, 0), ("worker", 0, 1), ("worker", 1, 2):
        text = json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})
        assert read_tf_config(text) == (["a:1", "b:1", "c:1"], place)
