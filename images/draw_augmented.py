"""Draw one training image of CIFAR-10 and sixteen of the ways in which augment() shows it.

python images/draw_augmented.py images/augmented.png
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1] / "4_Residual_Network"))
from ResNet_keras import augment, load_data  # noqa: E402


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", help="the picture")
    parser.add_argument("--data_dir", help="as for the scripts; downloaded by default")
    parser.add_argument("--label", type=int, default=7, help="the class, 0 to 9; 7 is a horse")
    parser.add_argument("--number", type=int, default=0, help="of the image within its class")
    args = parser.parse_args(argv)
    (images, labels), _, _ = load_data("cifar10", args.data_dir)
    image = images[labels == args.label][args.number]
    variants = augment(np.repeat(image[None], 16, axis=0), seed=np.array([0, 0])).numpy()
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 4), wspace=0.04)
    grid = [left.subplots(), *right.subplots(2, 8).flat]
    for axes, shown in zip(grid, [image, *variants]):
        axes.imshow(shown, interpolation="nearest")
        axes.set_axis_off()
    figure.savefig(args.target, dpi=150)


if __name__ == "__main__":
    main()
