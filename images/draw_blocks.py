"""Draw the networks and their blocks for the networks' pages, with English and with Chinese labels.

python images/draw_blocks.py                                  # all, in both languages
python images/draw_blocks.py --language zh                    # the Chinese ones
python images/draw_blocks.py block_resnext network_resnext    # two of them

The picture X is images/X.png in English and images/X.zh-CN.png in Chinese. All lengths are pixels
of a page, x to the right and y down; the files have twice as many, so that letters are sharp.
"""

import argparse
import re
import sys
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon
from matplotlib.path import Path as Curve
from PIL import Image  # Pillow comes with matplotlib

COLOURS = {
    "data": "#e3e3e3",
    "conv": "#a9cfe8",
    "norm": "#f9cfae",
    "pool": "#b9dfb4",
    "dense": "#cdbfe3",
    "drop": "#f2dd8f",
}
INK, GREY = "#1a1a1a", "#444444"
WIDE = 830  # a page
HIGH, STEP, ROUND = 32, 56, 14  # of a box; from one to the next; radius of a sign
PIXEL = 0.72  # points, in which Matplotlib counts letters and lines
THIN = {"color": GREY, "linewidth": 1.3 * PIXEL}
EDGE = {"edgecolor": GREY, "linewidth": 1.3 * PIXEL, "zorder": 3}

FONTS = "Noto Sans CJK SC", "WenQuanYi Micro Hei"  # the first that is there
# The words of the labels. "3x3, 64", C·d and the like have none.
CHINESE = {
    "[3x3, 64] has 64 filters of 3x3": "[3x3, 64] 是 64 个 3x3 卷积核",
    "10 probabilities": "10 个概率",
    "a dense block of three layers": "三层的稠密块",
    "a dense block, a dense layer and a transition are drawn below": "稠密块、稠密层和过渡层见下图",
    "and": "和",
    "as many maps as in ResNet, which has k = 1": "与 ResNet 的特征图一样多，即 k = 1",
    "average pooling": "平均池化",
    "batch norm": "批归一化",
    "blocks": "个块",
    "blocks, the first: stride 2": "个块\n第一个块步幅为 2",
    "boxes of maps: height and depth show their size, width their number": (
        "长方体：高和深表示特征图的大小，宽表示通道数"
    ),
    "channels": "个通道",
    "concatenation": "拼接",
    "convolution": "卷积",
    "dense block": "稠密块",
    "dense layer": "稠密层",
    "dropout": "dropout",
    "excitation": "激励",
    "figure 3c of the paper": "论文的图 3c",
    "first block of a stage": "每个阶段的第一个块",
    "first block of stages 2 and 3": "阶段 2 和阶段 3 的第一个块",
    "first: stride 2": "第一个块步幅为 2",
    "flattened": "展平",
    "fully connected": "全连接",
    "grouped": "分组的",
    "groups": "组",
    "here": "这里为",
    "identity": "恒等映射",
    "image": "图片",
    "image, mean subtracted": "减去均值\n的图片",
    "in the script": "脚本采用",
    "layers": "层",
    "maps": "张特征图",
    "max pooling": "最大池化",
    "mean of each map": "每张特征图取平均",
    "means": "个平均值",
    "mlpconv": "mlpconv",
    "new shape": "改变形状",
    "normalised image": "标准化\n的图片",
    "not drawn: batch norm behind each layer, ReLU behind each but the last": (
        "图中未画：每一层之后的批归一化，除最后一层外每一层之后的 ReLU"
    ),
    "not in the script": "脚本未采用",
    "one slice of a dense block": "稠密块里的一片",
    "one slice of a stage": "阶段里的一片",
    "only in the first block of a stage, else identity": (
        "只在每个阶段的\n第一个块中，\n其余为恒等映射"
    ),
    "only with --dropout": "仅当使用 --dropout",
    "pixels": "像素",
    "post-activation": "后激活",
    "pre-activation": "预激活",
    "--ratio": "--ratio",
    "ReLU": "ReLU",
    "ResNet": "ResNet",
    "ResNeXt": "ResNeXt",
    "sees": "输入",
    "sigmoid": "sigmoid",
    "softmax": "softmax",
    "softmax: 10 probabilities": "softmax\n10 个概率",
    "squeeze": "挤压",
    "stage": "阶段",
    "stages 1, 2, 3": "阶段 1、2、3",
    "stages of convolutions": "卷积的各个阶段",
    "stride": "步幅",
    "stride 2 in 3x3 and in the shortcut": "3x3 卷积和快捷连接的步幅为 2",
    "the block is drawn below": "块的结构见下图",
    "the filters of ResNet": "即 ResNet 的卷积核数",
    "the first block of the network": "网络的第一个块",
    "the k = 12 maps that a layer appends": "一层拼接上的 k = 12 张特征图",
    "times as many": "倍",
    "transition": "过渡层",
    "transition, between two dense blocks": "过渡层，在两个稠密块之间",
    "usual block": "通常的块",
    "weights from 0 to 1": "个 0 到 1 之间的权重",
    "WRN": "WRN",
}


def chinese(label):
    """A label in Chinese: its words are those of CHINESE, its formulas stay."""
    formulas = re.findall(r"\$.*?\$", label)
    text = re.sub(r"\$.*?\$", "$", label)
    words = "|".join(re.escape(key) for key in sorted(CHINESE, key=len, reverse=True))
    words = rf"(?<!\w)({words})(?!\w)".replace(r"\ ", r"\s")  # a line may end between two words
    if missing := re.findall(r"[A-Za-z]{2,}", re.sub(words, "", text)):
        sys.exit(f"error: {label!r}: CHINESE has no {', '.join(missing)}")
    translated = re.sub(words, lambda found: CHINESE[re.sub(r"\s", " ", found[0])], text)
    translated = re.sub(r"[,;:]\n", "\n", translated)  # else lines would not look centred
    for mark, wide in zip(",;:", "，；："):
        translated = translated.replace(f"{mark} ", wide)
    return re.sub(r"\$", lambda _: formulas.pop(0), translated)


# ---------------- what drawings are made of


def write(axes, x, y, text, align="center", size=13, color=GREY, **options):
    options = {"va": "center", "linespacing": 1.25, "zorder": 5} | options
    axes.text(x, y, text, ha=align, color=color, fontsize=size * PIXEL, **options)


def title(axes, x, y, text, align="center"):
    write(axes, x, y, text, align, 14, INK, weight="bold")


def box(axes, x, y, kind, text, width=170, height=HIGH):
    """A layer; x and y are its middle. One that is not always there is dashed."""
    *optional, kind = kind.split()
    style = EDGE | {"facecolor": COLOURS[kind], "linestyle": "--" if optional else "-"}
    style["boxstyle"] = f"round,pad=0,rounding_size={min(7, width / 3)}"
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, **style))
    write(axes, x, y, text, size=14, color=INK)


def sign(axes, x, y, text):
    """What two paths meet in: + or ×."""
    axes.add_patch(Circle((x, y), ROUND, facecolor="white", **EDGE))
    write(axes, x, y, text, size=20, color=INK)


def arrow(axes, *points, color=GREY, curved=False):
    """A line along all points, with a head at the last; or a curve that the two within draw up."""
    codes = [Curve.MOVETO] + (len(points) - 1) * [Curve.CURVE4 if curved else Curve.LINETO]
    style = {"arrowstyle": "-|>", "mutation_scale": 16 * PIXEL, "joinstyle": "miter"}
    style |= {"color": color, "linewidth": 1.5 * PIXEL, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(path=Curve(points, codes), zorder=2, **style))


def bracket(axes, x, top, bottom, hook):
    """A line beside what belongs together, with two hooks towards it."""
    axes.plot((x + hook, x, x, x + hook), (top, top, bottom, bottom), **THIN)


def brace(axes, left, right, y, text):
    """A line below what text is about."""
    axes.plot((left, left, right, right), (y - 6, y, y, y - 6), **THIN)
    write(axes, (left + right) / 2, y + 16, text, color=INK)


def chain(axes, x, y, layers, width=170):
    """Boxes from y downwards, each (kind, text, note at the arrow that leaves it); the last's y."""
    for i, (kind, text, *leaves) in enumerate(layers):
        box(axes, x, y, kind, text, width)
        if i < len(layers) - 1:
            arrow(axes, (x, y + HIGH / 2), (x, y + STEP - HIGH / 2))
            write(axes, x + 10, y + STEP / 2, *leaves or [""], "left")
            y += STEP
    return y


def leave(axes, x, y, *texts):
    """An arrow from y down to lines of text; the y below the last."""
    arrow(axes, (x, y), (x, y + 26))
    for text in texts:
        write(axes, x, y + 38, text, color=INK)
        y += 20
    return y + 34


# ---------------- whole networks


def volume(axes, x, y, kind, high, wide, slices=()):
    """Feature maps: as high and deep as they are large, as wide as they are many.

    Lines on the front stand at the widths in slices. Returns the left and the right end.
    """
    left, right, slant, rise = 0, wide, 0.17 * high, 0.11 * high
    front = [(left, 0), (right, 0), (right, high), (left, high)]
    above = [(left, 0), (right, 0), (right + slant, -rise), (left + slant, -rise)]
    side = [(right, 0), (right, high), (right + slant, high - rise), (right + slant, -rise)]
    corner, color = (x - (wide + slant) / 2, y - high / 2), np.array(to_rgb(COLOURS[kind]))
    style = EDGE | {"linewidth": PIXEL, "joinstyle": "round"}
    for face, shade in (front, color), (above, (1 + color) / 2), (side, 0.85 * color):
        axes.add_patch(Polygon(np.add(corner, face), facecolor=shade, **style))
    for place in slices:
        ends = np.add(corner, [(place, 0), (place, high)])
        axes.plot(*ends.T, color=GREY, linewidth=0.6 * PIXEL, zorder=3)
    return corner[0], corner[0] + wide + slant


def network(axes, columns, scale):
    """A network from left to right; the left end, the middle and the right end of each column.

    A column is (kind, size of the maps, number of maps, text, numbers of maps where to draw a
    line); the size is 0 for a vector. A map is scale wide.
    """
    pitch, y, ends = WIDE / len(columns), 104, []
    for i, (kind, size, count, text, *slices) in enumerate(columns):
        x, high = pitch * (i + 0.5), 4 * size + 4
        if size:
            places = [scale * number for number in slices]
            left, right = volume(axes, x, y, kind, high, max(scale * count, 2), places)
            write(axes, x, y - 0.61 * high - 10, f"{size}x{size}x{count}", color=INK)
        else:
            left, right = x - 25, x + 25
            box(axes, x, y, kind, f"{count}", 50)
        write(axes, x, 188, text, color=INK, va="top")
        if i:
            arrow(axes, (ends[-1][2] + 2, y), (left - 1, y))
        ends.append((left, x, right))
    return ends


def legend(axes, y, *texts):
    """Notes below a network; the size of the drawing."""
    for text in ("boxes of maps: height and depth show their size, width their number", *texts):
        write(axes, 12, y, text, "left")
        y += 20
    return WIDE, y - 6


SHAPE = "$h$ x $w$ x $c$"
IMAGE = ("data", 32, 3, "normalised\nimage")
HEAD = ("dense", 0, 10, "fully connected,\nsoftmax:\n10 probabilities")


def network_residual(axes):
    stage = "stage {}:\nn blocks, the\nfirst: stride 2"
    columns = [
        IMAGE,
        ("conv", 32, 16, "3x3 convolution"),
        ("conv", 32, 16, "stage 1:\nn blocks"),
        ("conv", 16, 32, stage.format(2)),
        ("conv", 8, 64, stage.format(3)),
        ("pool", 0, 64, "batch norm,\nReLU,\nmean of\neach map"),
        HEAD,
    ]
    ends = network(axes, columns, 1.1)
    note = "the block is drawn below; ResNet-20: n = 3, ResNet-32: n = 5"
    brace(axes, ends[2][1] - 50, ends[4][1] + 50, 254, note)
    return legend(axes, 304)


def network_wide(axes):
    """WRN-16-8; lines show how many maps ResNet has."""
    stage = "stage {}:\n2 blocks, the\nfirst: stride 2"
    columns = [
        IMAGE,
        ("conv", 32, 16, "3x3 convolution"),
        ("conv", 32, 128, "stage 1:\n2 blocks", *range(16, 128, 16)),
        ("conv", 16, 256, stage.format(2), *range(32, 256, 32)),
        ("conv", 8, 512, stage.format(3), *range(64, 512, 64)),
        ("pool", 0, 512, "batch norm,\nReLU,\nmean of\neach map"),
        HEAD,
    ]
    ends = network(axes, columns, 0.16)
    note = "the block is drawn below; WRN-16-8: k = 8; 16k, 32k and 64k maps"
    brace(axes, ends[2][1] - 50, ends[4][1] + 50, 254, note)
    return legend(axes, 304, "one slice of a stage: as many maps as in ResNet, which has k = 1")


def network_resnext(axes, notes=("$C$ = 4, $d$ = 64", "$C$ = 4, $d$ = 128", "$C$ = 4, $d$ = 256")):
    stage = "stage {}:\n3 blocks,\n{}"
    columns = [
        IMAGE,
        ("conv", 32, 64, "3x3 convolution,\nbatch norm,\nReLU"),
        ("conv", 32, 256, stage.format(1, notes[0])),
        ("conv", 16, 512, stage.format(2, notes[1]) + ",\nfirst: stride 2"),
        ("conv", 8, 1024, stage.format(3, notes[2]) + ",\nfirst: stride 2"),
        ("pool", 0, 1024, "mean of\neach map"),
        HEAD,
    ]
    ends = network(axes, columns, 0.075)
    brace(axes, ends[2][1] - 50, ends[4][1] + 50, 268, "the block is drawn below")
    return legend(axes, 316)


def network_squeeze(axes):
    return network_resnext(axes, ("$c/r$ = 256/16", "$c/r$ = 512/16", "$c/r$ = 1024/16"))


def network_dense(axes):
    """DenseNet-BC 100x12; lines show what each layer appends."""
    columns, maps, layers, k = [IMAGE, ("conv", 32, 24, "3x3\nconvolution")], 24, 16, 12
    for block, size in enumerate((32, 16, 8), 1):
        appended = range(maps, maps + layers * k, k)
        maps += layers * k
        columns.append(("conv", size, maps, f"dense\nblock {block}:\n{layers} layers", *appended))
        if block < 3:
            maps //= 2
            columns.append(("pool", size // 2, maps, "transition"))
    columns.append(("pool", 0, maps, "batch norm,\nReLU,\nmean of\neach map"))
    columns.append(("dense", 0, 10, "fully\nconnected,\nsoftmax: 10\nprobabilities"))
    ends = network(axes, columns, 0.2)
    note = "a dense block, a dense layer and a transition are drawn below"
    brace(axes, ends[2][1] - 42, ends[6][1] + 42, 254, note)
    return legend(axes, 304, "one slice of a dense block: the k = 12 maps that a layer appends")


def block_vgg(axes):
    stages = [(2, 64, 32), (2, 128, 16), (4, 256, 8), (4, 512, 4), (4, 512, 2)]
    columns = [("data", 32, 3, "image,\nmean\nsubtracted")]
    columns += [("conv", size, maps, f"{n} x\n[3x3, {maps}]") for n, maps, size in stages]
    columns += [("pool", 0, 512, "flattened")]
    columns += 2 * [("dense", 0, 4096, "dropout 0.5")]
    columns += [("dense", 0, 10, "softmax")]
    ends = network(axes, columns, 0.08)
    for (*_, right), (left, *_) in zip(ends[1:6], ends[2:7]):
        box(axes, (right + left) / 2 - 5, 104, "pool", "", 10)
    note = "stages of convolutions: [3x3, 64] has 64 filters of 3x3"
    brace(axes, ends[1][1] - 36, ends[5][1] + 36, 240, note)
    brace(axes, ends[7][1] - 36, ends[9][1] + 36, 240, "fully connected: 10 probabilities")
    box(axes, 18, 290, "pool", "", 10, 16)
    write(axes, 30, 290, "2x2 max pooling, stride 2", "left")
    note = "not drawn: batch norm behind each layer, ReLU behind each but the last"
    return legend(axes, 310, note)


def block_lenet(axes):
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
    write(axes, 150, 12, "image", color=INK)
    arrow(axes, (150, 24), (150, 50))
    last = chain(axes, 150, 66, layers, 230)
    return 330, leave(axes, 150, last + HIGH / 2, "10 probabilities")


def block_mlpconv(axes):
    blocks = [(5, 192, 160, 96, 32), (5, 192, 192, 192, 16), (3, 192, 192, 10, 8)]
    pooling, top, pitch = "3x3 max pooling, stride 2", 82, 278
    for i, (window, first, second, third, size) in enumerate(blocks):
        x = 132 + pitch * i
        title(axes, x, 12, f"mlpconv {i + 1}")
        layers = [
            ("conv", f"{window}x{window} convolution, {first}", "ReLU"),
            ("conv", f"1x1 convolution, {second}", "ReLU"),
            ("conv", f"1x1 convolution, {third}", f"ReLU; {size}x{size}x{third}"),
        ]
        if i < 2:
            layers.append(("pool", pooling, f"{size // 2}x{size // 2}x{third}"))
            layers.append(("drop", "dropout 0.5"))
        else:
            layers.append(("pool", "mean of each map", "10"))
            layers.append(("data", "softmax"))
        bottom = chain(axes, x, top, layers, 215) + HIGH / 2
        if i < 2:
            lane, right = x + pitch / 2, x + pitch
            arrow(axes, (x, bottom), (x, bottom + 18), (lane, bottom + 18), (lane, 44),
                  (right, 44), (right, top - HIGH / 2))  # fmt: skip
    write(axes, 122, 46, "normalised\nimage, 32x32x3", "right", color=INK)
    arrow(axes, (132, 30), (132, top - HIGH / 2))
    return WIDE, leave(axes, x, bottom, "10 probabilities")


# ---------------- blocks


def branch(axes, x, y, layers, into, *out, width=170, projection="", after=""):
    """A block: layers from y downwards and a shortcut on their right; the y below all.

    The shortcut is the identity, which leaves above the first layer, or a convolution with the text
    projection, behind the first. A last layer, behind the addition, is named after.
    """
    write(axes, x, y - 72, into, color=INK)
    arrow(axes, (x, y - 60), (x, y - HIGH / 2))
    last = chain(axes, x, y, layers, width)
    meet, edge = last + STEP - 4, x + width / 2
    arrow(axes, (x, last + HIGH / 2), (x, meet - ROUND))
    fork = y + STEP / 2 - 4 if projection else y - 36
    aside = edge + (79 if projection else 22)
    arrow(axes, (x, fork), (aside, fork), (aside, meet), (x + ROUND, meet))
    if projection:
        box(axes, aside, (fork + meet) / 2, "conv", projection, 130, 50)
        write(axes, edge + 12, fork - 11, "$a$", color=INK)
    else:
        write(axes, aside, fork - 11, "identity", "right")
    sign(axes, x, meet, "+")
    if after:
        arrow(axes, (x, meet + ROUND), (x, meet + STEP - 4 - HIGH / 2))
        box(axes, x, meet + STEP - 4, "norm", after, width)
        meet += STEP - 4 + HIGH / 2 - ROUND
    return leave(axes, x, meet + ROUND, *out)


def block_residual(axes):
    conv, norm = ("conv", "3x3 convolution"), ("norm", "batch norm, ReLU")
    into, top = f"$x$: {SHAPE}", 140
    title(axes, 106, 14, "post-activation, 2015")
    write(axes, 106, 36, "not in the script")
    layers, formula = [conv, norm, conv, ("norm", "batch norm")], r"$y = \mathrm{ReLU}(x + F(x))$"
    bottom = branch(axes, 95, top, layers, into, formula, SHAPE, after="ReLU")
    title(axes, 351, 14, "pre-activation, 2016")
    write(axes, 351, 36, "in the script: usual block")
    branch(axes, 340, top, [norm, conv, norm, conv], into, "$y = x + F(x)$", SHAPE)
    title(axes, 653, 14, "pre-activation, new shape")
    write(axes, 653, 36, "in the script: first block of stages 2 and 3")
    layers = [norm, ("conv", "3x3 convolution, stride 2"), norm, conv]
    out, projection = ("$y = W_s a + F(x)$", "$h/2$ x $w/2$ x $2c$"), "1x1 convolution,\nstride 2"
    branch(axes, 582, top, layers, into, *out, width=196, projection=projection)
    note = "the first block of the network: $y = a + F(x)$"
    write(axes, 256, bottom - 14, note, "left")
    return WIDE, bottom


def block_wide(axes):
    norm, conv = ("norm", "batch norm, ReLU"), ("conv", "3x3 convolution, $k \\cdot f$")
    layers, top = [norm, conv, norm, ("optional drop", "dropout, only with --dropout"), conv], 116
    title(axes, 146, 14, "usual block")
    out = "$y = x + F(x)$", "$h$ x $w$ x $k \\cdot f$"
    branch(axes, 135, top, layers, "$x$: $h$ x $w$ x $k \\cdot f$", *out, width=240)
    title(axes, 530, 14, "first block of a stage")
    layers[1] = ("conv", "3x3 convolution, $k \\cdot f$, stride $s$")
    out = "$y = W_s a + F(x)$", r"$h/s$ x $w/s$ x $k \cdot f$"
    projection = "1x1 convolution,\n$k \\cdot f$, stride $s$"
    bottom = branch(axes, 455, top, layers, f"$x$: {SHAPE}", *out, width=240, projection=projection)
    note = "stages 1, 2, 3: $f$ = 16, 32, 64, the filters of ResNet; here $k$ times as many"
    write(axes, 14, bottom + 12, note + "; $s$ = 1, 2, 2", "left")
    return 734, bottom + 28


def around(axes, x, aside, fork, meet):
    """The shortcut of ResNeXt's block, and what follows; the y below."""
    middle, beside = (fork + meet) / 2, x + (ROUND if aside > x else -ROUND)
    arrow(axes, (x, fork), (aside, fork), (aside, meet), (beside, meet))
    box(axes, aside, middle, "optional conv", "1x1 convolution,\nbatch norm", 130, 50)
    note = "only in the first\nblock of a stage,\nelse identity"
    write(axes, aside + 9, middle - 60, note, "left")
    sign(axes, x, meet, "+")
    arrow(axes, (x, meet + ROUND), (x, meet + STEP - 4 - HIGH / 2))
    box(axes, x, meet + STEP - 4, "norm", "ReLU")
    return meet + STEP - 4 + HIGH / 2


def block_resnext(axes):
    x, width, top = 320, 420, 88
    write(axes, x, 12, f"$x$: {SHAPE}", color=INK)
    arrow(axes, (x, 24), (x, top - HIGH / 2))
    layers = [("conv", "1x1 convolution, $C \\cdot d$"), ("norm", "batch norm, ReLU")]
    split = chain(axes, x, top, layers, width) + HIGH / 2
    for group in x - 157, x - 52, x + 157:
        box(axes, group, split + 44, "conv", "3x3, $d$", 84)
        for y in split, split + 60:
            arrow(axes, (group, y), (group, y + 28))
            write(axes, group + 10, y + 12, "$d$", "left")
    write(axes, x + 52, split + 44, "·  ·  ·", size=20, color=INK)
    edge = x - width / 2 - 12
    bracket(axes, edge, split + 4, split + 104 + HIGH / 2, 6)
    write(axes, edge - 8, split + 62, "$C$ groups:\nfigure 3c\nof the paper", "right")
    layers = [
        ("data", "concatenation, $C \\cdot d$"),
        ("norm", "batch norm, ReLU"),
        ("conv", "1x1 convolution, $f$"),
        ("norm", "batch norm"),
    ]
    last = chain(axes, x, split + 104, layers, width)
    meet = last + STEP - 4
    arrow(axes, (x, last + HIGH / 2), (x, meet - ROUND))
    bottom = around(axes, x, x + width / 2 + 84, 44, meet)
    bottom = leave(axes, x, bottom, r"$y = \mathrm{ReLU}(x + F(x))$") + 14
    note = "4x64d, stages 1, 2, 3: $C$ = 4; $d$ = 64, 128, 256; $f$ = 256, 512, 1024"
    write(axes, 14, bottom, note, "left")
    note = "first block of stages 2 and 3: stride 2 in 3x3 and in the shortcut"
    write(axes, 14, bottom + 20, note, "left")
    return 744, bottom + 36


def block_squeeze(axes):
    x, y, side, width = 260, 98, 540, 270
    write(axes, x, 12, "$x$", color=INK)
    arrow(axes, (x, 24), (x, y - 25))
    box(axes, x, y, "conv", "ResNeXt:\n1x1, grouped 3x3, 1x1", 200, 50)
    times = y + 310
    arrow(axes, (x, y + 25), (x, times - ROUND))
    write(axes, x + 10, y + 150, f"$u$: {SHAPE}", "left", color=INK)
    layers = [
        ("pool", "mean of each map", "$z$: $c$ means"),
        ("dense", "fully connected, $c/r$; ReLU", "$r$ = 16, --ratio"),
        ("dense", "fully connected, $c$; sigmoid"),
    ]
    arrow(axes, (x, y + 50), (side, y + 50), (side, y + 92 - HIGH / 2))
    last = chain(axes, side, y + 92, layers, width)
    arrow(axes, (side, last + HIGH / 2), (side, times), (x + ROUND, times))
    write(axes, side + 10, last + 40, "$s$: $c$ weights from 0 to 1", "left", color=INK)
    formula = r"$s = \mathrm{sigmoid}(W_2 \mathrm{ReLU}(W_1 z))$"
    write(axes, side + 10, last + 62, formula, "left", color=INK)
    edge = side + width / 2 + 10
    for top, bottom, name in (y + 92, y + 92, "squeeze"), (y + 148, last, "excitation"):
        bracket(axes, edge, top - HIGH / 2, bottom + HIGH / 2, -6)
        title(axes, edge + 8, (top + bottom) / 2, name, "left")
    sign(axes, x, times, "×")
    meet = times + STEP - 4
    arrow(axes, (x, times + ROUND), (x, meet - ROUND))
    bottom = around(axes, x, 80, 44, meet)
    return 790, leave(axes, x, bottom, r"$y = \mathrm{ReLU}(x + s \cdot u)$")


def row(axes, x, y, into, layers, out):
    """Boxes from left to right, each (kind, text, width), between what goes in and comes out."""
    write(axes, x - 30, y, into, "right", color=INK)
    for kind, text, width in layers:
        arrow(axes, (x - 24, y), (x, y))
        box(axes, x + width / 2, y, kind, text, width)
        x += width + 24
    arrow(axes, (x - 24, y), (x, y))
    write(axes, x + 6, y, out, "left", color=INK)


def block_dense(axes):
    title(axes, 12, 14, "a dense block of three layers", "left")
    formula = r"$x_l = H_l([x_0, x_1, \ldots, x_{l-1}])$"
    write(axes, 12, 40, formula, "left", 14, INK)
    y, pitch, half = 226, 100, 19
    arcs = "#1a1a1a", "#1f6fa8", "#b04a0f"  # of x_0, x_1, x_2
    for i in range(4):
        x, into = 46 + 2 * pitch * i, 46 + 2 * pitch * i + pitch
        box(axes, x, y, "data", f"$x_{i}$", 2 * half, 2 * half)
        write(axes, x, y + 36, "$k$ channels" if i else "$c$ channels")
        arrow(axes, (x + half, y), (into - (30 if i < 3 else 58), y), color=(*arcs, GREY)[i])
        if i == 3:
            box(axes, into, y, "data", "concatenation", 116, 2 * half)
            write(axes, into, y + 56, "$c + 3k$", color=INK)
        else:
            box(axes, into, y, "conv", f"$H_{i + 1}$", 60, 2 * half)
            arrow(axes, (into + 30, y), (x + 2 * pitch - half, y))
            write(axes, into, y + 56, "sees " + ("$c$", "$c + k$", "$c + 2k$")[i], color=INK)
        for source in range(i):
            start, end = 46 + 2 * pitch * source, into + 9 * (i - 1) - 18 * source
            rise = y - half - 0.29 * (end - start)
            points = (start, y - half), (start, rise), (end, rise), (end, y - half)
            arrow(axes, *points, color=arcs[source], curved=True)
    norm = ("norm", "batch norm, ReLU", 138)
    title(axes, 12, 318, "dense layer $H_l$", "left")
    first, second = ("conv", "1x1 convolution, $4k$", 154), ("conv", "3x3 convolution, $k$", 144)
    row(axes, 108, 350, "$c + (l-1)k$", [norm, first, norm, second], "$x_l$: $k$")
    title(axes, 12, 398, "transition, between two dense blocks", "left")
    layers = [norm, ("conv", "1x1 convolution, $c/2$", 166), ("pool", "2x2 average pooling", 164)]
    row(axes, 108, 430, SHAPE, layers, "$h/2$ x $w/2$ x $c/2$")
    return WIDE, 458


DRAWINGS = {
    f.__name__: f
    for f in (
        block_lenet,
        block_mlpconv,
        block_vgg,
        network_residual,
        block_residual,
        network_wide,
        block_wide,
        network_resnext,
        block_resnext,
        network_dense,
        block_dense,
        network_squeeze,
        block_squeeze,
    )
}


def draw(name, language):
    """Draw a picture into the folder of this file."""
    font = "DejaVu Sans"
    if language == "zh":
        there = [font for font in FONTS if font in get_font_names()]
        if not there:
            sys.exit(f"error: Chinese labels need one of the fonts {', '.join(FONTS)}")
        font = there[0]
    with matplotlib.style.context(["default", {"font.family": font}]):
        figure = Figure(facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1), aspect="equal")
        axes.axis("off")
        width, height = DRAWINGS[name](axes)
        axes.set(xlim=(0, width), ylim=(height, 0))
        figure.set_size_inches(width / 100, height / 100)
        if language == "zh":
            for text in axes.texts:
                text.set_text(chinese(text.get_text()))
        path = Path(__file__).parent / (name + (".zh-CN.png" if language == "zh" else ".png"))
        figure.savefig(path, dpi=200)
    with Image.open(path) as image:
        image.convert("RGB").quantize(64).save(path, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--language", choices=("en", "zh"), help="only that one")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(DRAWINGS))
    args = parser.parse_args()
    if unknown := set(args.names) - set(DRAWINGS):
        parser.error(f"there is no {', '.join(unknown)}")
    for name in args.names or DRAWINGS:
        for language in [args.language] if args.language else ["en", "zh"]:
            draw(name, language)


if __name__ == "__main__":
    main()
