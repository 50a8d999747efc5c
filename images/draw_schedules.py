"""Draw the learning rates of htd/ResNet.py over 200 epochs, in English and in Chinese.

python images/draw_schedules.py     # images/htd_schedules.png and htd_schedules.zh-CN.png
"""

import runpy
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

WORDS = {
    "": ("learning rate", "the same on a logarithmic scale", "step decay", "cosine"),
    ".zh-CN": ("学习率", "同样的曲线（对数坐标）", "阶梯衰减", "余弦"),
}


def main():
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", "Noto Sans CJK SC", "WenQuanYi Micro Hei"]
    root = Path(__file__).parents[1]
    scheduler = runpy.run_path(str(root / "htd" / "ResNet.py"))["scheduler"]
    epochs = np.arange(200)
    for language, (title, title_of_logarithm, step, cosine) in WORDS.items():
        figure = Figure(figsize=(10, 4), layout="constrained")
        linear, logarithmic = figure.subplots(1, 2)
        for name, label in (("step", step), ("cos", cosine), ("tanh", "HTD(−6, 3)")):
            rates = [scheduler(name, epoch / 200) for epoch in epochs]
            for axes in (linear, logarithmic):
                axes.step(epochs + 1, rates, where="mid", label=label)
        linear.set(title=title)
        logarithmic.set(yscale="log", title=title_of_logarithm)
        for axes in (linear, logarithmic):
            axes.set(xlabel="epoch")
            axes.grid(alpha=0.3)
            axes.legend()
        figure.savefig(root / "images" / f"htd_schedules{language}.png", dpi=150)


if __name__ == "__main__":
    main()
