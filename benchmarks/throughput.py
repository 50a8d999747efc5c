#!/usr/bin/env python3
"""Training speed of the scripts, plain and under launch/cpu.py, each in a process of its own.

    python benchmarks/throughput.py                                    # all networks: hours
    python benchmarks/throughput.py "4_Residual_Network/ResNet_keras.py --stack_n 3"
    python benchmarks/throughput.py "SCRIPT OPTIONS" --with COMMAND    # a third program, in turn

All programs run in turn, --repeats times; the table has the medians. COMMAND is a program whose
last line is JSON with images_per_s. The data are synthetic unless the options name others.
"""

import argparse
import csv
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIGURATIONS = [
    "1_Lecun_Network/LeNet_dp_da_wd_keras.py",
    "2_Network_in_Network/Network_in_Network_keras.py",
    "2_Network_in_Network/Network_in_Network_bn_keras.py",
    "3_Vgg19_Network/Vgg19_keras.py --imagenet none",
    "4_Residual_Network/ResNet_keras.py --stack_n 3",
    "4_Residual_Network/ResNet_keras.py --stack_n 5",
    "4_Residual_Network/ResNet_keras.py --stack_n 18",
    "5_Wide_Residual_Network/Wide_ResNet_keras.py --depth 16 --width 8",
    "5_Wide_Residual_Network/Wide_ResNet_keras.py --depth 28 --width 10",
    "6_ResNeXt/ResNeXt_keras.py --batch_size 64",
    "7_DenseNet/DenseNet_keras.py",
    "8_SENet/SENet_keras.py --batch_size 64",
]
FIGURES = ("images_per_s", "first_step_s", "peak_rss_mb")


def figures(command):
    """Return the JSON on the last line a program prints, or raise RuntimeError with a reason."""
    environment = os.environ | {"STARTED": str(time.time())}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    try:
        row = json.loads(done.stdout.splitlines()[-1])
        row["images_per_s"] = float(row["images_per_s"])
        if done.returncode:
            raise ValueError("it failed afterwards")
    except (ValueError, LookupError, TypeError):
        reason = (done.stderr.strip() or "it prints no JSON with images_per_s").splitlines()[-1]
        raise RuntimeError(reason) from None
    return row


def commands(configuration, precision, seconds, third):
    """Return {name: command} of the programs to be in turn."""
    script, *options = shlex.split(configuration)
    script = script if Path(script).exists() else str(ROOT / script)
    if not any(option.startswith(("--dataset", "-d", "--data_dir")) for option in options):
        options += ["--dataset", "synthetic"]
    steps = [str(ROOT / "benchmarks" / "steps.py"), "--seconds", str(seconds), "--repeats", "1"]
    steps += [script, *options, "--precision", precision]
    programs = {"plain": [sys.executable, *steps]}
    programs["launched"] = [sys.executable, str(ROOT / "launch" / "cpu.py"), *steps]
    return programs | ({"third": shlex.split(third)} if third else {})


def measure(programs, repeats):
    """Run the programs in turn; return a row of the table with the medians of their figures."""
    runs = [{name: figures(command) for name, command in programs.items()} for _ in range(repeats)]
    row = {key: value for key, value in runs[0]["plain"].items() if key not in FIGURES}
    row["pipeline_cost"] = statistics.median(run["plain"]["pipeline_cost"] for run in runs)
    for name in programs:
        for figure in FIGURES:
            values = [run[name][figure] for run in runs if figure in run[name]]
            row[f"{name}_{figure}"] = statistics.median(values) if values else None
    for name in ("launched", "third"):
        if name in programs:
            ratios = [run[name]["images_per_s"] / run["plain"]["images_per_s"] for run in runs]
            row[f"{name}_to_plain"] = statistics.median(ratios)
            row[f"{name}_to_plain_range"] = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return row


HEADER = (
    f"{'network':22} {'precision':14} {'batch':>5} {'parameters':>11} {'M mult-adds':>11} "
    f"{'plain images/s':>14} {'launch/cpu.py':>13} {'ratio':>6} {'third':>9} {'ratio':>6} "
    f"{'pipeline':>8} {'1st step':>8} {'memory':>9}"
)


def line(row):
    """Return a row of the table as text."""
    third = row.get("third_images_per_s")
    third = f"{third:9,.1f} {row['third_to_plain']:6.2f}" if third else " " * 16
    return (
        f"{row['network']:22} {row['precision']:14} {row['batch_size']:5} {row['parameters']:11,} "
        f"{row['multiply_adds'] / 1e6:11,.1f} {row['plain_images_per_s']:14,.1f} "
        f"{row['launched_images_per_s']:13,.1f} {row['launched_to_plain']:6.2f} {third} "
        f"{row['pipeline_cost']:8.1%} {row['plain_first_step_s']:6.1f} s "
        f"{row['plain_peak_rss_mb']:6,} MB"
    )


def draw(rows, path):
    """Draw how many times as fast every network trains under launch/cpu.py, as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['network']}, {row['precision'].removeprefix('mixed_')}" for row in rows]
    ratios = [row["launched_to_plain"] for row in rows]
    bars = axes.barh(names, ratios)
    axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xlabel="images/s under launch/cpu.py : plain", xlim=(0, 1.15 * max([1, *ratios])))
    axes.invert_yaxis()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    precisions = ("float32", "mixed_bfloat16", "mixed_float16")
    add = parser.add_argument
    add("configurations", nargs="*", metavar="CONFIGURATION", help="all networks if none is given")
    add("--precision", action="append", choices=precisions, help="float32 unless given")
    add("--seconds", type=float, default=5, help="of training a figure, at least one step (5)")
    add("--repeats", type=int, default=3, help="how often all programs run in turn (3)")
    add("--with", dest="third", metavar="COMMAND", help="a program to be in turn with")
    add("--csv", type=Path, help="file for the table, with all digits")
    add("--picture", type=Path, help="file for a picture of it, .png or .svg")
    args = parser.parse_args()
    for path in filter(None, (args.csv, args.picture)):
        if not path.absolute().parent.is_dir():
            parser.error(f"{path} is in no folder that there is")
    if any("--precision" in configuration for configuration in args.configurations):
        parser.error("--precision is no part of a configuration, but an option of this program")
    if args.repeats < 1:
        parser.error("--repeats has to be at least 1")
    print(HEADER)
    rows, failed = [], False
    for configuration in args.configurations or CONFIGURATIONS:
        for precision in args.precision or ["float32"]:
            programs = commands(configuration, precision, args.seconds, args.third)
            try:
                row = measure(programs, args.repeats) | {"precision": precision}
            except (RuntimeError, OSError) as error:
                print(f"throughput.py: error: {configuration}: {error}", file=sys.stderr)
                failed = True
                continue
            rows.append(row)
            print(line(row), flush=True)
    if args.csv and rows:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    if args.picture and rows:
        draw(rows, args.picture)
    sys.exit(failed)


if __name__ == "__main__":
    main()
