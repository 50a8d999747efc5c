"""Draw the accuracy of runs over their epochs, test and training, from their log.csv.

python images/draw_curves.py images/lenet_ladder.png doc/results/LeNet*.csv
python images/draw_curves.py images/resnet20.png "30 epochs=doc/results/ResNet-20.csv" \
    "200 epochs=trained/ResNet-20_cifar10/log.csv"
python images/draw_curves.py --share images/networks.png LeNet=doc/results/LeNet_{1,2,3}.csv ...
"""

import argparse
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="the picture")
    parser.add_argument("logs", nargs="+", metavar="[NAME=]LOG", help="what each run left")
    parser.add_argument("--share", action="store_true", help="of its epochs, so that all end alike")
    args = parser.parse_args()
    networks = {}  # runs that differ in the seed, x_1.csv, x_2.csv and so on, have one colour
    for argument in args.logs:
        name, _, path = argument.rpartition("=")
        *_, folder, run, file = Path(path).absolute().with_suffix("").parts
        if not name:
            name = f"{folder} {run}" if file == "log" else re.sub(r"_\d+$", "", file)
            if name == file and name.replace("_", " ") in networks:
                parser.error(f"several logs are called {name}: give NAME={path}")
        log = np.genfromtxt(path, delimiter=",", names=True, ndmin=1)
        networks.setdefault(name.replace("_", " "), []).append(log)
    order = sorted(
        networks, key=lambda name: -np.median([log["val_accuracy"][-1] for log in networks[name]])
    )
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = zip(
        figure.subplots(1, 2, sharey=True), ("test", "training"), ("val_accuracy", "accuracy")
    )
    for axes, title, column in panels:
        for number, name in enumerate(order):
            ends = [100 * log[column][-1] for log in networks[name]]
            label = f"{name}: {np.median(ends):.2f} %"
            label += f" ({min(ends):.2f} to {max(ends):.2f})" if ends[1:] else ""
            for log in networks[name]:
                epochs = log["epoch"] + 1
                x = 100 * epochs / epochs[-1] if args.share else epochs
                style = "- -- : -.".split()[number // 10 % 4]  # there are ten colours
                axes.plot(x, 100 * log[column], style, color=f"C{number}", linewidth=1.2)
            axes.lines[-1].set_label(label + (f", {epochs[-1]:.0f} epochs" if args.share else ""))
        axes.set(title=f"{title} images", xlabel="% of its epochs" if args.share else "epoch")
        axes.set(ylabel="accuracy in %" if column.startswith("val") else "")
        axes.grid(alpha=0.3)
        axes.legend(title="last epoch", fontsize=8)
    figure.savefig(args.target, dpi=120)


if __name__ == "__main__":
    main()
