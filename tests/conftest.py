"""What the tests share: the scripts as modules, and as commands that a user types."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

# The scripts set these before they import TensorFlow; the tests import it first.
os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # what is promised bit for bit is promised for the CPU
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

ROOT = Path(__file__).parents[1]
LADDER = ["LeNet_keras", "LeNet_dp_keras", "LeNet_dp_da_keras", "LeNet_dp_da_wd_keras"]
PATHS = [*sorted(ROOT.glob("[1-8]_*/*_keras.py")), ROOT / "htd" / "ResNet.py"]
SCRIPTS = {path.stem: path for path in PATHS}


def load(script):
    """Import a script (a name, or the path of a copy) as a module."""
    path = Path(SCRIPTS.get(script, script))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def command(script, *options):
    """The command that runs a script (a name, or the path of a copy) with options."""
    return [sys.executable, str(SCRIPTS.get(script, script)), *map(str, options)]


def run(script, *options, cwd, **more):
    """Run a script to its end; return the finished process with its output as text."""
    return subprocess.run(
        command(script, *options), cwd=cwd, capture_output=True, text=True, timeout=300, **more
    )


def copy(name, folder, images=5000):
    """Copy a script into folder, alone, to train on so many synthetic images; return its path.

    A fifth as many are for testing.
    """
    few = SCRIPTS[name].read_text()
    for old, new in ((5000, images), (1000, images // 5)):
        assert f"return synthetic_images({old}," in few or f", synthetic_images({old}," in few
        few = few.replace(f"synthetic_images({old},", f"synthetic_images({new},")
    path = folder / SCRIPTS[name].name
    path.write_text(few)
    return path


def only_run(folder):
    """The one run's folder below folder/runs."""
    (found,) = folder.glob("runs/*/*")
    return found
