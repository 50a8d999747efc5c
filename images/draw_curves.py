"""Draw the accuracy of runs over their epochs, on test and training images, from their log.csv.

python images/draw_curves.py images/lenet_ladder.png "pixels / 255=doc/results/LeNet_?.csv" \
    "+ preprocessing=doc/results/LeNet_dp_?.csv" \
    "+ augmentation=doc/results/LeNet_dp_da_?.csv" \
    "+ weight decay=doc/results/LeNet_dp_da_wd_?.csv"
python images/draw_curves.py images/resnet_depth.png \
    "plain, 20 layers=doc/results/plain-20_?.csv" \
    "plain, 44 layers=doc/results/plain-44_?.csv" \
    "with the addition, 20 layers=doc/results/residual-20_?.csv" \
    "with the addition, 44 layers=doc/results/residual-44_?.csv"

Several logs under one name are runs that differ in the seed: their median is drawn as a line, and
from the least to the greatest as a band. --language zh labels the axes in Chinese.
"""

import argparse
import glob

import matplotlib
import numpy as np
from matplotlib.figure import Figure

WORDS = {
    "en": ("test images, %", "training images, %", "epoch"),
    "zh": ("测试图片（%）", "训练图片（%）", "epoch"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", help="the picture")
    parser.add_argument("runs", nargs="+", metavar="NAME=LOGS", help="a pattern of log files")
    parser.add_argument("--language", choices=WORDS, default="en", help="of the axes")
    args = parser.parse_args()
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", "Noto Sans CJK SC", "WenQuanYi Micro Hei"]
    test, training, epoch = WORDS[args.language]
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for name, pattern in (run.split("=", 1) for run in args.runs):
        paths = sorted(glob.glob(pattern))
        if not paths:
            parser.error(f"there is no {pattern}")
        logs = [np.genfromtxt(path, delimiter=",", names=True, ndmin=1) for path in paths]
        for axes, column in zip(panels, ("val_accuracy", "accuracy")):
            curves = np.array([100 * log[column] for log in logs])
            epochs = logs[0]["epoch"] + 1
            (line,) = axes.plot(epochs, np.median(curves, axis=0), linewidth=1.5, label=name)
            band = curves.min(axis=0), curves.max(axis=0)
            axes.fill_between(epochs, *band, color=line.get_color(), alpha=0.25, linewidth=0)
    for axes, title in zip(panels, (test, training)):
        axes.set(title=title, xlabel=epoch)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(args.target, dpi=150)


if __name__ == "__main__":
    main()
