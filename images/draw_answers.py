"""Draw thirty test images of CIFAR-10 and what a network takes them for; mistakes are framed.

python images/draw_answers.py                         # images/answers.png and answers.zh-CN.png
python images/draw_answers.py --model runs/WRN-16-8_cifar10/2026-01-31_12-00-00
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import matplotlib
import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "4_Residual_Network"))
from ResNet_keras import load_data  # noqa: E402

NAMES = {
    "en": "airplane automobile bird cat deer dog frog horse ship truck".split(),
    "zh": "飞机 汽车 鸟 猫 鹿 狗 青蛙 马 船 卡车".split(),
}


def draw(path, images, labels, answers, names, mistake):
    """Draw images in three rows, each with the name of its answer, or a mistake with both names."""
    figure = Figure(figsize=(11, 4.3), layout="constrained")
    for axes, image, label, answer in zip(figure.subplots(3, 10).flat, images, labels, answers):
        axes.imshow(image, interpolation="bicubic")
        axes.set(xticks=[], yticks=[])
        right = answer == label
        text = names[answer] if right else mistake.format(names[answer], names[label])
        axes.set_xlabel(text, fontsize=11, color="black" if right else "#c00000")
        for spine in axes.spines.values():
            spine.set(visible=not right, color="#c00000", linewidth=3)
    figure.savefig(path, dpi=120)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model = ROOT / "trained" / "ResNet-20_cifar10"
    parser.add_argument("--model", type=Path, default=model, help="the folder of a run on CIFAR-10")
    parser.add_argument("--data_dir", help="as for the scripts; downloaded by default")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images")
    args = parser.parse_args(argv)
    _, (images, labels), _ = load_data("cifar10", args.data_dir)
    chosen = np.random.default_rng(args.seed).choice(len(images), 30, replace=False)
    images, labels = images[chosen], labels[chosen]
    network = keras.models.load_model(args.model / "model.keras")
    answers = network.predict(images, verbose=0).argmax(axis=-1)
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", "Noto Sans CJK SC", "WenQuanYi Micro Hei"]
    target = ROOT / "images"
    draw(target / "answers.png", images, labels, answers, NAMES["en"], "{}\n({})")
    draw(target / "answers.zh-CN.png", images, labels, answers, NAMES["zh"], "{}\n（{}）")


if __name__ == "__main__":
    main()
