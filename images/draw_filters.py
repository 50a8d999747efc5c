"""Draw the six filters of the first convolution of the four trained LeNets, each as 5x5 colours.

python images/draw_filters.py images/lenet_filters.png
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from matplotlib.figure import Figure

NETWORKS = ("LeNet", "LeNet_dp", "LeNet_dp_da", "LeNet_dp_da_wd")


def main():
    trained = Path(__file__).parents[1] / "trained"
    figure = Figure(figsize=(11, 2.1), layout="constrained")
    for part, name in zip(figure.subfigures(1, 4, wspace=0.06), NETWORKS):
        network = keras.models.load_model(trained / f"{name}_cifar10" / "model.keras")
        layer = next(each for each in network.layers if isinstance(each, keras.layers.Conv2D))
        kernel = layer.get_weights()[0]  # (5, 5, 3, 6)
        part.suptitle(name, fontsize=11)
        for axes, weights in zip(part.subplots(2, 3).flat, np.moveaxis(kernel, -1, 0)):
            # 0 is grey, the largest weight of the filter a full colour.
            axes.imshow(0.5 + 0.5 * weights / abs(weights).max(), interpolation="nearest")
            axes.set_axis_off()
    figure.savefig(sys.argv[1], dpi=150)


if __name__ == "__main__":
    main()
