#!/usr/bin/env python3
"""Train with a Keras script on several machines at once, by MultiWorkerMirroredStrategy.

    python launch/machines.py --workers hostA:2222,hostB:2222 --index 0 SCRIPT [OPTIONS]

Type this on every machine, the same but for --index: its place in --workers, counted from 0. Where
a scheduler has set TF_CONFIG, leave both out. All GPUs of all machines share each batch (or the
processors, where there is no GPU). Worker 0 prints and writes the run's folder; the others have to
find the same images, and with --resume the run. doc/machines.md says when it pays.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import types
import xmlrpc.client
import xmlrpc.server

PATHS = {"data_dir", "log_dir", "resume", "weights"}  # may differ from machine to machine


def say(message):
    print(f"launch/machines.py: {message}", file=sys.stderr, flush=True)


def fail(message):
    """End with a line that says what is wrong and what to do."""
    sys.exit(f"launch/machines.py: {' '.join(message.split())}")


def parse_args():
    """Return (addresses of all workers, index of this one, script, its options)."""
    parser = argparse.ArgumentParser(
        usage="python launch/machines.py --workers A:PORT,B:PORT --index N SCRIPT [OPTIONS]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workers", help="HOST:PORT of every machine; the first is worker 0")
    parser.add_argument("--index", type=int, help="which of them this one is, counted from 0")
    parser.add_argument("script", metavar="SCRIPT", help="the script to train with")
    rest = parser.add_argument("options", metavar="OPTIONS", nargs="...", help="those of SCRIPT")
    rest.required = False
    parser.error = fail
    args = parser.parse_args()
    if args.workers:
        addresses, index = [text.strip() for text in args.workers.split(",")], args.index
    elif config := os.environ.get("TF_CONFIG"):
        addresses, index = read_tf_config(config)
    else:
        fail("--workers HOST:PORT,HOST:PORT and --index N are needed, or TF_CONFIG")
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 65536):
            fail(f"a worker is HOST:PORT, as in hostA:2222, not {address!r}")
    if len({*addresses}) < len(addresses):
        fail(f"two workers have one address: {', '.join(addresses)}")
    if index not in range(len(addresses)):
        fail(f"--index has to be from 0 to {len(addresses) - 1}, this machine's place in --workers")
    return addresses, index, args.script, args.options


def read_tf_config(text):
    """Return (addresses, index) from TF_CONFIG, where the chief, if there is one, is worker 0."""
    try:
        cluster, task = json.loads(text)["cluster"], json.loads(text)["task"]
        chief = cluster.get("chief", [])
        index = int(task["index"]) + {"chief": 0, "worker": len(chief)}[task["type"]]
        return [str(address) for address in (*chief, *cluster.get("worker", []))], index
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        fail(f"TF_CONFIG does not name the workers and which of them this one is: {error!r}")


def is_silent(address):
    """Whether nothing answers at an address."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return True
    return False


class Lost(OSError):
    """Another worker has ended. Scripts turn an OSError into a line that says how to go on."""


def compare(facts):
    """End, on all workers alike, if facts (a dictionary from each) are not the same."""
    for i, theirs in enumerate(facts):
        for name in facts[0].keys() | theirs.keys():
            if (value := theirs.get(name)) != (first := facts[0].get(name)):
                fail(f"{name} is {value} on worker {i} and {first} on worker 0: give all the same")


def fingerprint(model):
    """Return some digits of the network, with the mean of the images in it, and of its weights."""
    # The mean without its last digits, in which processors may differ.
    network = re.sub(r"\d\.\d{7,}", lambda text: f"{float(text[0]):.6f}", model.to_json())
    digest = hashlib.sha256(network.encode())
    for variable in [*model.weights, *model.optimizer.variables]:
        digest.update(bytes(variable.numpy()))
    return digest.hexdigest()[:8]


class Worker:
    """This machine's part in the training.

    It joins the others when the script sets its seed, that is, once its options are known to be
    good and before it touches a GPU. From there to the end of fit() the script is in the scope of
    the strategy. All workers run all of the script; the files of all but worker 0 are thrown away.
    """

    def __init__(self, addresses, index, script, folder):
        self.addresses, self.index, self.script, self.folder = addresses, index, script, folder
        self.options = self.store = self.met = None
        self.scope, self.exchanges = contextlib.ExitStack(), itertools.count()

    def take_part(self):
        """Put the calls of this class into Keras, which the script has just imported."""
        import keras
        from keras.src.backend.tensorflow import trainer

        from .cpu import OLDEST

        if tuple(map(int, keras.__version__.split(".")[:2])) < OLDEST["keras"]:
            oldest = ".".join(map(str, OLDEST["keras"]))
            fail(f"Keras {keras.__version__} does not sum metrics over machines: {oldest} does")
        reduce_per_replica = trainer.reduce_per_replica

        def reduce(values, strategy, reduction):
            """Take the mean of metrics, which have no axis for Keras to take it along."""
            if reduction != "auto":
                return reduce_per_replica(values, strategy, reduction)
            mean = functools.partial(strategy.reduce, "MEAN", axis=None)
            return keras.tree.map_structure(mean, values)

        trainer.reduce_per_replica = reduce
        # It would build by a batch what has been built, and has none: each worker has a part.
        trainer.TensorFlowTrainer._maybe_symbolic_build = lambda *args, **kwargs: None
        keras.utils.set_random_seed = self.join_before(keras.utils.set_random_seed)
        keras.Model.fit = self.together(keras.Model.fit)

    def take_options(self, parse_args):
        """Wrap argparse's parse_args: note the options; all but worker 0 write elsewhere."""

        @functools.wraps(parse_args)
        def parse(*args, **kwargs):
            self.options = options = parse_args(*args, **kwargs)
            if hasattr(options, "gpus"):
                options.gpus = 1  # for the script: it makes no strategy of its own
            if self.index and hasattr(options, "log_dir"):
                options.log_dir = self.folder
            run = getattr(options, "resume", None)
            if self.index and isinstance(run, (str, os.PathLike)) and os.path.isdir(run):
                copy = os.path.join(self.folder, "resumed")
                if os.fspath(run) != copy:  # a script may parse its options twice
                    events = shutil.ignore_patterns("*.tfevents.*")
                    shutil.copytree(run, copy, ignore=events, dirs_exist_ok=True)
                options.resume = type(run)(copy)
            return options

        return parse

    def join_before(self, set_random_seed):
        @functools.wraps(set_random_seed)
        def join(seed):
            if not self.store:
                self.join()
            return set_random_seed(seed)

        return join

    def join(self):
        """Wait for the others, see that they do the same, and enter the strategy's scope."""
        import keras
        import tensorflow as tf
        from tensorflow.python.eager import context

        if getattr(self.options, "precision", None) == "mixed_float16":
            fail("mixed_float16 is for one GPU: over several, its loss scale is not exact")
        with open(self.script, "rb") as file:
            facts = {"script": hashlib.sha256(file.read()).hexdigest()[:8]}
        facts |= {"Keras": keras.__version__, "TensorFlow": tf.__version__}
        facts |= {"--workers": ",".join(self.addresses)}
        facts |= {"the number of GPUs": len(tf.config.get_visible_devices("GPU"))}
        options = vars(self.options or argparse.Namespace()).items()
        facts |= {f"--{key}": str(value) for key, value in options if key not in PATHS}
        compare(self.meet(facts))
        self.met = True
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        # TensorFlow has taken this signal for itself, to no effect. The last epoch is on disk.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.store = context.context()
        replicas, batch_size = strategy.num_replicas_in_sync, getattr(self.options, "batch_size", 0)
        if batch_size % replicas:
            fail(f"--batch_size {batch_size} does not divide by the {replicas} replicas here")
        self.scope.enter_context(strategy.scope())
        who = "prints and writes" if self.index == 0 else "leaves that to worker 0"
        say(f"worker {self.index} of {len(self.addresses)}, {replicas} replicas in all; {who}.")
        if self.index:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def meet(self, facts):
        """Return the facts of all workers, once all have asked for those of this one.

        TensorFlow would wait for an hour without a word, share a port that is in use, and hang
        where an index is wrong.
        """
        address, found, asked = self.addresses[self.index], {self.index: facts}, set()

        def tell(index):
            asked.add(index)
            return {"--index": self.index, "facts": facts}

        try:
            port = int(address.rpartition(":")[2])
            server = xmlrpc.server.SimpleXMLRPCServer(("", port))
        except OSError as error:
            fail(f"worker {self.index} cannot have its port of {address}: {error.strerror}")
        server.register_function(tell)
        server.RequestHandlerClass.log_message = lambda *args: None
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        socket.setdefaulttimeout(5)
        beginning = time.monotonic()
        while missing := [(i, a) for i, a in self.others() if not {i} <= asked & found.keys()]:
            for i, other in missing:
                with contextlib.suppress(Exception):  # nobody is there yet, or another program
                    answer = xmlrpc.client.ServerProxy(f"http://{other}").tell(self.index)
                    found[i] = answer["facts"]
                    if answer["--index"] != i:
                        time.sleep(5)  # for the others to hear it, too
                        fail(f"worker {i} in --workers, {other}, has --index {answer['--index']}")
            if time.monotonic() - beginning > 60:
                say(f"waiting for {self.names(missing)}")
                beginning = time.monotonic()
            time.sleep(0.2)
        socket.setdefaulttimeout(None)
        server.shutdown()
        server.server_close()
        return [found[i] for i in sorted(found)]

    def names(self, workers):
        return ", ".join(f"worker {i} ({address})" for i, address in workers)

    def others(self):
        return [(i, address) for i, address in enumerate(self.addresses) if i != self.index]

    def together(self, keras_fit):
        """Wrap Model.fit: go through it with the others, then leave the strategy's scope."""

        @functools.wraps(keras_fit)
        def fit(model, *args, **kwargs):
            if not self.store:
                fail("workers meet at keras.utils.set_random_seed(), which was not called")
            if not (model.built and model.compiled):
                fail("fit() needs a network that has its keras.Input and is compiled")
            run = getattr(self.options, "resume", None)
            if run and self.index:
                self.options.resume = None  # a folder that will be gone
            with self.scope, self.noticing_losses():
                with model.distribute_strategy.scope():
                    if not model.optimizer.built:
                        model.optimizer.build(model.trainable_variables)
                facts = {"network, images or weights": fingerprint(model)}
                data = [*args[:1], kwargs.get("x"), kwargs.get("validation_data")]
                sizes = [int(d.cardinality()) for d in data if hasattr(d, "cardinality")]
                facts |= {"the number of steps": [kwargs.get("steps_per_epoch"), *sizes]}
                runs, facts = zip(*self.exchange([str(run), facts]))
                compare(facts)
                if run and self.index:  # in the message that says how to go on
                    self.options.resume = type(run)(runs[0])
                return keras_fit(model, *args, **kwargs)

        return fit

    def exchange(self, mine):
        """Return what all workers gave here, something that JSON can hold."""
        key, day = f"exchange {next(self.exchanges)}", 24 * 3600 * 1000
        self.store.set_config_key_value(f"{key}/{self.index}", json.dumps(mine))
        self.store.wait_at_barrier(key, day)
        keys = [f"{key}/{i}" for i in range(len(self.addresses))]
        found = [json.loads(self.store.get_config_key_value(k)) for k in keys]
        self.store.wait_at_barrier(f"{key} is read", day)  # one may end after this
        return found

    @contextlib.contextmanager
    def noticing_losses(self):
        """Turn TensorFlow's error after the loss of a worker into one line."""
        try:
            yield
        except Exception as error:
            tf, text = sys.modules["tensorflow"] if self.met else None, str(error)
            if not tf or not isinstance(error, tf.errors.OpError):
                raise
            said = {int(i) for i in re.findall(r"worker (\d+) has ended", text)}
            lost = [(i, a) for i, a in self.others() if i in said or is_silent(a)]
            if not lost and not re.search("Collective ops is aborted|[Cc]oordination", text):
                raise
            raise Lost(f"{self.names(lost) or 'another worker'} has ended") from None

    def leave(self):
        """Tell the others, which would wait for half a minute."""
        with contextlib.suppress(Exception):  # they are gone, or have never come
            self.store.report_error_to_cluster(1, f"worker {self.index} has ended")


def main():
    from .cpu import AfterImport, run

    addresses, index, script, options = parse_args()
    if os.environ.setdefault("KERAS_BACKEND", "tensorflow") != "tensorflow":
        fail(f"KERAS_BACKEND is {os.environ['KERAS_BACKEND']}: only tensorflow will do")
    task = {"type": "worker", "index": index}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(addresses, index, script, folder)
        sys.meta_path.insert(0, AfterImport("keras", worker.take_part))
        parser = argparse.ArgumentParser
        parser.parse_args = worker.take_options(parser.parse_args)
        try:
            with worker.noticing_losses():
                run(script, options)
                if worker.store:  # whoever leaves before the others stops them
                    with contextlib.ExitStack() if index else contextlib.suppress(Exception):
                        worker.exchange("done")
        except Lost as error:
            fail(str(error))
        except BaseException:
            worker.leave()
            raise


if __name__ == "__main__":
    package = types.ModuleType("__launch__")  # as in cpu.py
    package.__path__ = [os.path.dirname(os.path.abspath(__file__))]
    sys.modules["__launch__"] = package
    sys.exit(importlib.import_module("__launch__.machines").main())
