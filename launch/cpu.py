#!/usr/bin/env python3
"""Run a Keras script with faster ways behind Keras' own layers, for processors without a GPU.

    python launch/cpu.py SCRIPT [OPTIONS]

SCRIPT runs as `python SCRIPT [OPTIONS]` would run it, with the same results but for rounding; what
it saves are the same files. Convolutions, batch normalisation and SGD take the ways of the modules
beside this one. With a GPU, another backend than TensorFlow or older versions, Keras is left as it
is.
"""

import builtins
import contextlib
import gc
import importlib.util
import os
import sys
import traceback
import types

LAUNCHER = f"launch/{os.path.basename(sys.argv[0])}"
OLDEST = {"keras": (3, 15), "tensorflow": (2, 21)}  # whose methods are known here


def say(message):
    print(f"{LAUNCHER}: {message}", file=sys.stderr)


def faster_ways():
    """Return (class of Keras, name of a method, the faster method) for all that is replaced.

    Where one does not apply, it calls the method that was there when this was called first.
    """
    from . import convolution, normalization, training

    return [*convolution.METHODS, *normalization.METHODS, *training.METHODS]


@contextlib.contextmanager
def faster():
    """Put the faster ways behind Keras' layers, and take them away again at the end."""
    ways = faster_ways()
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in ways]
    for owner, name, method in ways:
        setattr(owner, name, method)
    try:
        yield
    finally:
        for owner, name, method in before:
            if method is None:  # inherited
                delattr(owner, name)
            else:
                setattr(owner, name, method)


def replace():
    """Put the faster ways behind Keras, which has just been imported, and say so."""
    import keras

    if keras.backend.backend() != "tensorflow":
        return say(f"Keras runs on {keras.backend.backend()}: Keras is left as it is.")
    import tensorflow as tf

    for package in (keras, tf):
        name, version = package.__name__.split(".")[0], package.__version__
        if tuple(map(int, version.split(".")[:2])) < OLDEST[name]:
            needed = ".".join(map(str, OLDEST[name]))
            return say(f"{name} {version} is older than {needed}: Keras is left as it is.")
    if tf.config.get_visible_devices("GPU"):
        return say("TensorFlow sees a GPU: Keras is left as it is.")
    try:
        ways = faster_ways()
    except AttributeError as error:  # a method of Keras that a later version does not have
        return say(f"keras {keras.__version__} is newer than what is known: {error}")
    for owner, name, method in ways:
        setattr(owner, name, method)
    say("faster convolutions, batch normalisation and SGD for this processor.")


class AfterImport:
    """Calls what follows as soon as the script has imported a package.

    Not before: a script may have settings to make that count when Keras or TensorFlow is imported,
    and one that only prints its help need not wait for them.
    """

    def __init__(self, package, follow):
        self.package, self.follow, self.looking = package, follow, False

    def find_spec(self, name, path=None, target=None):
        if name != self.package or self.looking:
            return None
        self.looking = True  # for the finders after this one
        spec = importlib.util.find_spec(name)
        self.looking = False
        if spec:
            execute = spec.loader.exec_module

            def exec_module(module):
                sys.meta_path.remove(self)
                execute(module)
                self.follow()

            spec.loader.exec_module = exec_module
        return spec


def prepare():
    """Set what is read when Keras and TensorFlow are imported, unless the user has set it."""
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    if backend != "tensorflow":
        return say(f"KERAS_BACKEND is {backend}: Keras is left as it is.")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # errors reach us as exceptions all the same
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # off by default before AVX-512 VNNI
    # Python would search all that TensorFlow has loaded for garbage again and again: a slow start.
    gc.set_threshold(100_000)
    sys.meta_path.insert(0, AfterImport("keras", replace))


def compiled(script):
    """Return the code of a script, or exit with one line that says why there is none."""
    try:
        with open(script, "rb") as file:
            return compile(file.read(), os.path.abspath(script), "exec", dont_inherit=True)
    except OSError as error:
        say(f"cannot read {script}: {error.strerror}")
    except (SyntaxError, ValueError) as error:  # ValueError: bytes that are no text
        if script.endswith(".py") and isinstance(error, SyntaxError):
            traceback.print_exception(SyntaxError, error, None)
            sys.exit(1)
        say(f"{script} is not a Python script: {error}")
    sys.exit(2)


def run(script, options):
    """Run a script as `python script options` does: its exit, its exceptions are the process's."""
    code, path = compiled(script), os.path.abspath(script)
    main = types.ModuleType("__main__")
    main.__file__, main.__builtins__ = path, builtins
    sys.modules["__main__"] = main
    sys.argv[:] = [script, *options]
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        sys.path[0] = os.path.dirname(os.path.realpath(script))

    def without_launcher(kind, error, trace):
        shown = trace
        while shown and shown.tb_frame.f_code.co_filename != path:
            shown = shown.tb_next
        sys.__excepthook__(kind, error.with_traceback(shown or trace), shown or trace)

    sys.excepthook = without_launcher
    exec(code, main.__dict__)


def main():
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        return print(__doc__.strip())
    if not arguments or arguments[0].startswith("-"):
        print("usage: python launch/cpu.py SCRIPT [OPTIONS]", file=sys.stderr)
        return 2
    prepare()
    return run(arguments[0], arguments[1:])


if __name__ == "__main__":
    # The modules beside this one under a name that no import in a script means: it may have a
    # training.py or a folder launch of its own.
    package = types.ModuleType("__launch__")
    package.__path__ = [os.path.dirname(os.path.abspath(__file__))]
    sys.modules["__launch__"] = package
    sys.exit(importlib.import_module("__launch__.cpu").main())
