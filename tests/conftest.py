"""What the tests share: the scripts as modules, as commands that a user types, and their data."""

import functools
import importlib.util
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# The scripts set these before they import TensorFlow; the tests import it first.
os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # what is promised bit for bit is promised for the CPU
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

ROOT = Path(__file__).parents[1]
LADDER = ["LeNet_keras", "LeNet_dp_keras", "LeNet_dp_da_keras", "LeNet_dp_da_wd_keras"]
PATHS = [*sorted(ROOT.glob("[1-8]_*/*_keras.py")), ROOT / "htd" / "ResNet.py"]
SCRIPTS = {path.stem: path for path in PATHS}

# Processes that are forked from one that has imported TensorFlow, which takes it five seconds.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["keras", "tensorflow", "matplotlib.figure"])
FRESH = multiprocessing.get_context("spawn")


def pytest_collection_modifyitems(items):
    """Begin with what takes long and alone, or one of the two processes waits at the end."""
    items.sort(key=lambda item: item.path.stem not in ("test_your_own", "test_machines"))


def load(script):
    """Import a script (a name, or the path of a copy) as a module."""
    path = Path(SCRIPTS.get(script, script))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def line(script, *options):
    """What a user types after "python" to run a script (a name, or the path of a copy)."""
    return [str(part) for part in (SCRIPTS.get(script, script), *options)]


def command(script, *options):
    """The command that runs a script with options."""
    return [sys.executable, *line(script, *options)]


def run(script, *options, cwd, **more):
    """Run a script to its end; return the finished process with its output as text."""
    return subprocess.run(
        command(script, *options), cwd=cwd, capture_output=True, text=True, timeout=300, **more
    )


def become(lines, cwd, before):
    """In a process of its own: call what is to be called before, then run the lines' scripts."""
    os.chdir(cwd)
    for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.path[:] = [path for path in sys.path if path not in ("", str(ROOT), str(ROOT / "tests"))]
    for call in before:
        call()
    for sys.argv in lines:
        runpy.run_path(sys.argv[0], run_name="__main__")


def start(*lines, cwd, before=(), context=FORK):
    """Start a process that runs scripts, one after the other."""
    process = context.Process(target=become, args=(lines, cwd, before))
    process.start()
    return process


def finish(process, cwd):
    """Wait for the end of what start started; return it as run does."""
    process.join(300)
    if process.is_alive():
        process.kill()
        pytest.fail("no end after 300 seconds")
    output = [(cwd / name).read_text() for name in ("stdout.txt", "stderr.txt")]
    return subprocess.CompletedProcess([], process.exitcode, *output)


def fork(script, *options, cwd, **more):
    """Run a script to its end as run does, in less time."""
    return finish(start(line(script, *options), cwd=cwd, **more), cwd)


def use_jax(cache):
    """Let this process, which has not imported Keras yet, train on one or two CPUs with JAX."""
    fast = "--xla_backend_optimization_level=0"  # to compile
    os.environ |= {
        "KERAS_BACKEND": "jax",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {fast}",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def undrawn():
    """Let this process draw no figures, which takes a run seconds."""
    from matplotlib.figure import Figure

    Figure.savefig = lambda *args, **options: None


def die_at(name, nth=1):
    """Kill this process when it opens a file of this name, or renames one to it, the nth time."""
    left = [nth]

    def hook(event, args):
        path = args[0] if event == "open" else args[1] if event == "os.rename" else ""
        if os.path.basename(str(path)) == name:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_at(name, nth=1):
    """A killer: the run dies when it touches the file of this name for the nth time."""

    def kill(arguments, cwd, before=(), **more):
        before = [*before, functools.partial(die_at, name, nth)]
        done = finish(start(arguments, cwd=cwd, before=before, **more), cwd)
        assert done.returncode == -signal.SIGKILL, done.stderr

    return kill


def copy(name, folder):
    """Copy a script into folder, alone; return its path."""
    return Path(shutil.copy(SCRIPTS[name], folder))


def only_run(folder):
    """The one run's folder below folder/runs."""
    (found,) = folder.glob("runs/*/*")
    return found


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Make folders of the synthetic classes' pictures: train/CLASS/*.png and test/CLASS/*.png."""
    from PIL import Image

    images_of = load("ResNet_keras").synthetic_images

    @functools.cache
    def make(train=320, test=64):
        folder = tmp_path_factory.mktemp(f"pictures_{train}_{test}")
        for seed, (part, count) in enumerate({"train": train, "test": test}.items(), start=1):
            for i, (image, label) in enumerate(zip(*images_of(count, seed))):
                path = folder / part / f"class_{label}" / f"{i:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)
            assert len(list((folder / part).iterdir())) == 10
        return folder

    return make


@pytest.fixture
def train_here(monkeypatch, tmp_path):
    """Make main of a script run in this process and in an empty folder, where it draws nothing."""
    import keras

    def main(script, *options, cwd=tmp_path):
        module = load(script) if isinstance(script, str | Path) else script
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(module, "draw", lambda *args: None)
        module.main(list(options))
        return only_run(cwd)

    yield main
    keras.config.set_dtype_policy("float32")
