"""Draw the accuracy of runs over their epochs, test and training, from their log.csv.

python images/draw_curves.py images/lenet_ladder.png doc/results/LeNet*.csv
python images/draw_curves.py images/resnet20.png doc/results/ResNet-20.csv
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def main():
    target, logs = sys.argv[1], sorted(sys.argv[2:], key=len)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for path in logs:
        log = np.atleast_1d(np.genfromtxt(path, delimiter=",", names=True))
        for axes, column in (left, "val_accuracy"), (right, "accuracy"):
            percent = 100 * log[column]
            label = f"{Path(path).stem}: {percent[-1]:.2f} %"
            axes.plot(log["epoch"] + 1, percent, label=label, linewidth=1.2)
    left.set(title="test images", xlabel="epoch", ylabel="accuracy in %")
    right.set(title="training images", xlabel="epoch")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(title="last epoch")
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main()
