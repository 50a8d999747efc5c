"""Draw the accuracy of runs over their epochs, test and training, from their log.csv.

python images/draw_curves.py images/lenet_ladder.png doc/results/LeNet*.csv
python images/draw_curves.py images/resnet20.png doc/results/ResNet-20.csv
python images/draw_curves.py --share images/networks.png doc/results/LeNet.csv ...
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="the picture")
    parser.add_argument("logs", type=Path, nargs="+", help="what each run left")
    parser.add_argument("--share", action="store_true", help="of its epochs, so that all end alike")
    args = parser.parse_args()
    logs = {}
    for path in args.logs:
        name = path.stem if path.stem != "log" else f"{path.parent.parent.name} {path.parent.name}"
        logs[name] = np.genfromtxt(path, delimiter=",", names=True, ndmin=1)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = zip(
        figure.subplots(1, 2, sharey=True), ("test", "training"), ("val_accuracy", "accuracy")
    )
    for axes, title, column in panels:
        for name, log in sorted(logs.items(), key=lambda item: -item[1]["val_accuracy"][-1]):
            epochs, percent = log["epoch"] + 1, 100 * log[column]
            x = 100 * epochs / len(epochs) if args.share else epochs
            label = f"{name.replace('_', ' ')}: {percent[-1]:.2f} %"
            label += f", {len(epochs)} epochs" if args.share else ""
            axes.plot(x, percent, label=label, linewidth=1.2)
        axes.set(title=f"{title} images", xlabel="% of its epochs" if args.share else "epoch")
        axes.set(ylabel="accuracy in %" if column.startswith("val") else "")
        axes.grid(alpha=0.3)
        axes.legend(title="last epoch", fontsize=8)
    figure.savefig(args.target, dpi=120)


if __name__ == "__main__":
    main()
