#!/usr/bin/env python3
"""Compare the runs of ResNet.py: what each schedule reaches, as a table and a picture.

    python summary.py                                  # the runs below runs/
    python summary.py runs/htd --picture summary.png

A network and data set make one table: median, smallest and largest of the finished runs, of the
val_accuracy after the last epoch and of the best one on the way. That best one is chosen by these
images themselves, so it flatters; it is there because others print it. Unfinished runs are
listed and left out. Runs whose other options differ are not compared.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

SCHEDULERS = {"step": "step decay", "cos": "cosine", "tanh": "HTD"}
# Options in which runs of one comparison may differ.
FREE = {"scheduler", "count", "seed", "data_dir", "log_dir", "gpus", "resume"}


class MixedSettings(Exception):
    """Two runs cannot be compared; the message says which and why, in one line."""


def read_runs(runs):
    """Return {scheduler: [val_accuracy in %, one array per finished run]} and the unfinished.

    runs are the folders of runs of one network on one data set. The unfinished are lines that name
    the run and how far it is. Raises MixedSettings when two runs differ in more than FREE.
    """
    finished, unfinished, first = {}, [], None
    for run in runs:
        try:
            facts = json.loads((run / "args.json").read_text())
            args = dict(facts["options"])
        except (ValueError, TypeError, KeyError) as error:
            raise MixedSettings(f"{run}/args.json is damaged: move {run} elsewhere") from error
        args["class_names"] = facts.get("class_names")
        if not args.get("validation_split"):  # which the seed chooses from the images
            args["pixel_mean"] = facts.get("pixel_mean")
        if "epochs" not in args or args.get("scheduler") not in [*SCHEDULERS]:
            raise MixedSettings(f"{run} is no run of ResNet.py: move it elsewhere")
        first = first or (run, args)
        for key in sorted((args.keys() | first[1].keys()) - FREE):
            if (args.get(key) or None) != (first[1].get(key) or None):  # False may be left out
                values = f"{first[1].get(key)} in {first[0]} and {args.get(key)} in {run}"
                raise MixedSettings(f"{key} is {values}: compare runs of one setting only")
        log = run / "log.csv"
        rows = 0
        if log.exists() and log.stat().st_size:
            accuracy = np.genfromtxt(log, delimiter=",", names=True, ndmin=1)["val_accuracy"]
            rows = len(accuracy)
        if rows == args["epochs"] and (run / "model.keras").exists():
            finished.setdefault(args["scheduler"], []).append(100 * accuracy)
        else:
            unfinished.append(f"{run}: {rows} of {args['epochs']} epochs")
    return finished, unfinished


def spread(values):
    """Return "median (smallest to largest)" of numbers."""
    return f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table(finished):
    """Return the lines of a Markdown table of the finished runs."""
    lines = ["| schedule | runs | last epoch, % | best epoch, % |", "|---|---|---|---|"]
    for scheduler in SCHEDULERS:
        if runs := finished.get(scheduler):
            last, best = [run[-1] for run in runs], [run.max() for run in runs]
            lines.append(f"| {scheduler} | {len(runs)} | {spread(last)} | {spread(best)} |")
    return lines


def draw(results, path):
    """Draw the val_accuracy of {name: finished runs}: over the epochs, and after the last one."""
    figure = Figure(figsize=(10, 4 * len(results)), layout="constrained")
    grid = figure.subplots(len(results), 2, squeeze=False, width_ratios=(2, 1))
    for (name, finished), (curves, points) in zip(results.items(), grid):
        for place, scheduler in enumerate(SCHEDULERS):
            runs = np.array(finished.get(scheduler, []))
            if not len(runs):
                continue
            epochs = np.arange(1, runs.shape[1] + 1)
            curves.plot(epochs, runs.T, color=f"C{place}", linewidth=0.5, alpha=0.5)
            curves.plot(
                epochs, np.median(runs, axis=0), color=f"C{place}", label=SCHEDULERS[scheduler]
            )
            points.plot([place] * len(runs), runs[:, -1], "o", color=f"C{place}", alpha=0.5)
            points.hlines(np.median(runs[:, -1]), place - 0.3, place + 0.3, color=f"C{place}")
        curves.set(title=name.replace("_", ", "), xlabel="epoch", ylabel="val_accuracy, %")
        curves.legend(title="median")
        points.set(title="after the last epoch", xlim=(-0.6, len(SCHEDULERS) - 0.4))
        points.set_xticks(range(len(SCHEDULERS)), SCHEDULERS.values())
        for axes in (curves, points):
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: sys.exit(f"{parser.prog}: error: {message}")
    parser.add_argument("log_dir", nargs="?", type=Path, default=Path("runs"))
    parser.add_argument("--picture", type=Path, help="file for a picture, .png or .svg")
    args = parser.parse_args()
    experiments = {}
    for path in sorted(args.log_dir.glob("**/args.json")):
        run = path.parent
        experiments.setdefault(run.parent.name, []).append(run)  # as in ResNet-8_cifar10/2026-...
    if not experiments:
        parser.error(f"{args.log_dir} holds no runs: give the --log_dir of ResNet.py")
    results = {}
    try:
        for name, runs in experiments.items():
            results[name], unfinished = read_runs(runs)
            print("\n".join([name, "", *table(results[name]), ""]))
            if unfinished:
                print("\n".join(["Not finished, and not in the table:", *unfinished, ""]))
        if args.picture:
            draw(results, args.picture)
    except MixedSettings as error:
        parser.error(error)
    except (OSError, ValueError) as error:
        parser.error(f"{' '.join(str(error).split())}: cannot read or draw the runs")


if __name__ == "__main__":
    main()
