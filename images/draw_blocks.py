"""Draw the block of each network, from its input down to its output, for the network's page.

python images/draw_blocks.py            # images/block_*.png
python images/draw_blocks.py resnext    # one of them

The background is transparent, and what stands on it is of a grey that shows on white and on black.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch

COLOURS = {
    "data": "#e3e3e3",
    "conv": "#a9cfe8",
    "norm": "#f9cfae",
    "pool": "#b9dfb4",
    "dense": "#cdbfe3",
    "drop": "#f2dd8f",
}
INK, GREY = "#1a1a1a", "#808080"
HIGH, STEP = 0.72, 1.15  # of a box, and from one to the next


def box(axes, x, y, kind, text, width=3.4):
    """A layer; x and y are its middle."""
    style = f"round,pad=0,rounding_size={HIGH / 4}"
    corner = (x - width / 2, y - HIGH / 2)
    patch = FancyBboxPatch(
        corner, width, HIGH, style, facecolor=COLOURS[kind], edgecolor=GREY, zorder=3
    )
    axes.add_patch(patch)
    axes.text(x, y, text, color=INK, ha="center", va="center", fontsize=10, zorder=4)


def sign(axes, x, y, text):
    """What two paths meet in: + or × or a word."""
    axes.add_patch(Circle((x, y), HIGH / 2, facecolor="white", edgecolor=GREY))
    size = 15 if len(text) == 1 else 7.5
    axes.text(x, y, text, color=INK, ha="center", va="center", fontsize=size)


def arrow(axes, *points):
    """A line along all points, with a head at the last."""
    axes.plot(*zip(*points[:-1], points[-2]), color=GREY, lw=1.4, solid_joinstyle="round")
    style = {"arrowstyle": "-|>", "color": GREY, "lw": 1.4, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=style)


def note(axes, x, y, text, align="left"):
    axes.text(x, y, text, color=GREY, ha=align, va="center", fontsize=9)


def chain(axes, x, y, layers, width=3.4):
    """Boxes from y downwards, each (kind, text, note at the arrow that leaves it); the last's y."""
    for i, (kind, text, *leaves) in enumerate(layers):
        box(axes, x, y, kind, text, width)
        if i < len(layers) - 1:
            arrow(axes, (x, y - HIGH / 2), (x, y - STEP + HIGH / 2))
            note(axes, x + 0.15, y - STEP / 2, *leaves or [""])
            y -= STEP
    return y


def branch(axes, x, layers, word, width=3.4, projection=""):
    """A residual block: layers from y = 0 downwards at x, and the shortcut to the right of them.

    The shortcut is the identity, which leaves above the first layer, or a box with the word
    projection, behind the first.
    """
    aside, top = x + width / 2 + 1.5, 0.9
    note(axes, x, top + 0.45, word, "center")
    arrow(axes, (x, top + 0.25), (x, HIGH / 2))
    last = chain(axes, x, 0, layers, width)
    end, fork = last - STEP, -STEP / 2 if projection else top - 0.2
    arrow(axes, (x, last - HIGH / 2), (x, end + HIGH / 2))
    arrow(axes, (x, fork), (aside, fork), (aside, end), (x + HIGH / 2, end))
    if projection:
        box(axes, aside, (fork + end) / 2, "conv", projection, 2.2)
    else:
        note(axes, aside + 0.2, (fork + end) / 2, "identity")
    sign(axes, x, end, "+")
    arrow(axes, (x, end - HIGH / 2), (x, end - 0.9))
    return end


def lenet(axes):
    layers = [
        ("data", "pixels / 255", "32x32x3"),
        ("conv", "5x5 convolution, 6; ReLU", "28x28x6"),
        ("pool", "2x2 max pooling", "14x14x6"),
        ("conv", "5x5 convolution, 16; ReLU", "10x10x16"),
        ("pool", "2x2 max pooling", "5x5x16, flattened: 400"),
        ("dense", "fully connected, 120; ReLU", "120"),
        ("dense", "fully connected, 84; ReLU", "84"),
        ("dense", "fully connected, 10; softmax"),
    ]
    last = chain(axes, 0, 0, layers, 4)
    arrow(axes, (0, last - HIGH / 2), (0, last - STEP))
    note(axes, 0.15, last - 0.8, "10 probabilities")
    return -2.2, 3.4, last - STEP, 0.6


def mlpconv(axes):
    blocks = [(192, 160, 96, "32x32x96"), (192, 192, 192, "16x16x192"), (192, 192, 10, "8x8x10")]
    ends = ["3x3 max pooling, 2 apart", "3x3 max pooling, 2 apart", "mean of each map, softmax"]
    for i, (first, second, third, shape) in enumerate(blocks):
        x, size = 4.4 * i, "3x3" if i == 2 else "5x5"
        note(axes, x, 1.2, f"mlpconv {i + 1}", "center")
        layers = [
            ("conv", f"{size} convolution, {first}", "ReLU"),
            ("conv", f"1x1 convolution, {second}", "ReLU"),
            ("conv", f"1x1 convolution, {third}", f"ReLU; {shape}"),
            ("pool", ends[i]),
        ]
        last = chain(axes, x, 0, layers + [("drop", "dropout, 0.5")] * (i < 2))
        if i < 2:
            arrow(axes, (x, last - HIGH / 2), (x, last - 0.7), (x + 2.2, last - 0.7),
                  (x + 2.2, 0.8), (x + 4.4, 0.8), (x + 4.4, HIGH / 2))  # fmt: skip
    arrow(axes, (0, 0.95), (0, HIGH / 2))
    return -1.9, 10.7, -5.5, 1.5


def vgg(axes):
    stages = [
        (2, 64, "32x32"),
        (2, 128, "16x16"),
        (4, 256, "8x8"),
        (4, 512, "4x4"),
        (4, 512, "2x2"),
    ]
    for i, (count, filters, size) in enumerate(stages):
        x = 3.5 * i
        note(axes, x, 0.75, size, "center")
        last = chain(axes, x, 0, [("conv", f"3x3, {filters}")] * count + [("pool", "max, 2x2")], 2)
        arrow(axes, (x, last - HIGH / 2), (x, last - 0.65), (x + 1.75, last - 0.65),
              (x + 1.75, 0.55), (x + 3.5, 0.55), (x + 3.5, HIGH / 2))  # fmt: skip
    ends = [("dense", "4096, dropout"), ("dense", "4096, dropout"), ("dense", "10, softmax")]
    arrow(axes, (-1.3, 0), (-1, 0))
    note(axes, 17.5, 0.75, "1x1x512", "center")
    chain(axes, 17.5, 0, ends, 2.6)
    return -1.4, 19, -5.6, 1.0


def residual(axes):
    layers = [("norm", "batch norm, ReLU"), ("conv", "3x3 convolution")] * 2
    branch(axes, 0, layers, "x, height x width x filters")
    layers[1] = ("conv", "3x3 convolution, stride 2")
    end = branch(axes, 7.6, layers, "x, of another shape", projection="1x1, stride 2")
    return -2.0, 12.2, end - 1, 1.7


def wide(axes):
    layers = [
        ("norm", "batch norm, ReLU"),
        ("conv", "3x3 convolution, k times the filters"),
        ("norm", "batch norm, ReLU"),
        ("drop", "dropout, if wanted"),
        ("conv", "3x3 convolution, k times the filters"),
    ]
    end = branch(axes, 0, layers, "x, height x width x k filters", width=5)
    return -2.8, 5.6, end - 1, 1.7


def resnext(axes):
    note(axes, 0, STEP * 0.75 + 0.5, "x, height x width x filters", "center")
    box(axes, 0, 0, "conv", "1x1 convolution, C d channels", 5)
    arrow(axes, (0, STEP * 0.75 + 0.3), (0, HIGH / 2))
    for x in (-3.3, -1.1, 3.3):
        arrow(axes, (0, -HIGH / 2), (x, -1.5 + HIGH / 2))
        box(axes, x, -1.5, "conv", "3x3, d", 1.6)
        arrow(axes, (x, -1.5 - HIGH / 2), (0, -3 + HIGH / 2))
    note(axes, 1.1, -1.5, "...  C groups", "center")
    box(axes, 0, -3, "data", "side by side", 5)
    box(axes, 0, -3 - STEP, "conv", "1x1 convolution, filters", 5)
    arrow(axes, (0, -3 - HIGH / 2), (0, -3 - STEP + HIGH / 2))
    end = -3 - 2 * STEP
    arrow(axes, (0, end + STEP - HIGH / 2), (0, end + HIGH / 2))
    top = STEP * 0.75
    arrow(axes, (0, top), (5, top), (5, end), (HIGH / 2, end))
    note(axes, 5.2, -2, "identity")
    sign(axes, 0, end, "+")
    arrow(axes, (0, end - HIGH / 2), (0, end - 0.9))
    note(axes, 0.2, end - 0.65, "ReLU")
    note(axes, -2.7, -0.62, "batch norm, ReLU", "right")
    note(axes, -2.7, -2.4, "batch norm, ReLU", "right")
    note(axes, -0.2, -3.58 - STEP, "batch norm", "right")
    return -5.3, 6.4, end - 1, 1.7


def dense(axes):
    layers = [
        ("norm", "batch norm, ReLU"),
        ("conv", "1x1 convolution, 4k"),
        ("norm", "batch norm, ReLU"),
        ("conv", "3x3 convolution, k"),
    ]
    note(axes, 0, 1.85, "dense layer, n times in a block", "center")
    note(axes, 0, 1.35, "x, c channels", "center")
    arrow(axes, (0, 1.15), (0, HIGH / 2))
    last = chain(axes, 0, 0, layers)
    end = last - STEP
    arrow(axes, (0, last - HIGH / 2), (0, end + HIGH / 2))
    note(axes, 0.15, last - STEP / 2, "k new channels")
    arrow(axes, (0, 0.7), (3.1, 0.7), (3.1, end), (HIGH / 2, end))
    note(axes, 3.3, -2, "all c of x")
    sign(axes, 0, end, "join")
    arrow(axes, (0, end - HIGH / 2), (0, end - 0.9))
    note(axes, 0.2, end - 0.65, "c + k channels")
    layers = [
        ("norm", "batch norm, ReLU"),
        ("conv", "1x1 convolution, c / 2"),
        ("pool", "2x2 average pooling"),
    ]
    note(axes, 7.5, 1.85, "transition, between two blocks", "center")
    note(axes, 7.5, 1.35, "height x width x c", "center")
    arrow(axes, (7.5, 1.15), (7.5, HIGH / 2))
    last = chain(axes, 7.5, 0, layers)
    arrow(axes, (7.5, last - HIGH / 2), (7.5, last - 0.95))
    note(axes, 7.65, last - 0.7, "height/2 x width/2 x c/2")
    return -2.2, 10.6, end - 1, 2.1


def squeeze(axes):
    note(axes, 0, 1.35, "x", "center")
    arrow(axes, (0, 1.15), (0, HIGH / 2))
    box(axes, 0, 0, "conv", "1x1, grouped 3x3, 1x1 (ResNeXt)", 4.6)
    arrow(axes, (0, -HIGH / 2), (0, -6.4 + HIGH / 2))
    note(axes, -0.2, -3.2, "height x width x c", "right")
    layers = [
        ("pool", "squeeze: mean of each channel", "c"),
        ("dense", "fully connected, ReLU", "c / 16"),
        ("dense", "fully connected, sigmoid", "c"),
    ]
    arrow(axes, (0, -1.1), (4, -1.1), (4, -2 + HIGH / 2))
    last = chain(axes, 4, -2, layers, 4.2)
    note(axes, 4.15, last - 0.8, "c weights from 0 to 1")
    arrow(axes, (4, last - HIGH / 2), (4, -6.4), (HIGH / 2, -6.4))
    sign(axes, 0, -6.4, "×")
    arrow(axes, (0, -6.4 - HIGH / 2), (0, -7.6 + HIGH / 2))
    sign(axes, 0, -7.6, "+")
    arrow(axes, (0, 0.85), (-3.4, 0.85), (-3.4, -7.6), (-HIGH / 2, -7.6))
    note(axes, -3.6, -3.2, "identity", "right")
    arrow(axes, (0, -7.6 - HIGH / 2), (0, -8.6))
    note(axes, 0.2, -8.3, "ReLU")
    return -5.0, 6.9, -8.7, 1.6


BLOCKS = {f.__name__: f for f in (lenet, mlpconv, vgg, residual, wide, resnext, dense, squeeze)}


def main():
    for name in sys.argv[1:] or BLOCKS:
        figure = Figure()
        axes = figure.add_axes((0, 0, 1, 1), aspect="equal")
        axes.axis("off")
        left, right, bottom, top = BLOCKS[name](axes)
        axes.set(xlim=(left, right), ylim=(bottom, top))
        figure.set_size_inches(0.62 * (right - left), 0.62 * (top - bottom))
        path = Path(__file__).parent / f"block_{name}.png"
        figure.savefig(path, dpi=110, transparent=True)


if __name__ == "__main__":
    main()
