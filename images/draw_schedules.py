"""Draw the learning rates of htd/ResNet.py over 200 epochs.

python images/draw_schedules.py images/htd_schedules.png
"""

import runpy
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def main():
    path = Path(__file__).parents[1] / "htd" / "ResNet.py"
    scheduler = runpy.run_path(str(path))["scheduler"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    linear, logarithmic = figure.subplots(1, 2)
    labels = {"step": "step decay", "cos": "cosine", "tanh": "HTD(-6, 3)"}
    epochs = np.arange(200)
    for name, label in labels.items():
        rates = [scheduler(name, epoch / 200) for epoch in epochs]
        for axes in (linear, logarithmic):
            axes.step(epochs + 1, rates, where="mid", label=label)
    logarithmic.set(yscale="log", title="the same on a logarithmic scale")
    linear.set(title="learning rate", ylabel="learning rate")
    for axes in (linear, logarithmic):
        axes.set(xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(sys.argv[1], dpi=120)


if __name__ == "__main__":
    main()
