"""The programs in images/ draw the pictures that are there."""

import shutil
import subprocess
import sys

from conftest import ROOT, load
from matplotlib.figure import Figure
from PIL import Image

IMAGES = ROOT / "images"


def run(*command):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)


def test_networks_are_drawn(tmp_path):
    shutil.copy(IMAGES / "draw_blocks.py", tmp_path)
    done = run(tmp_path / "draw_blocks.py", "--language", "en")
    assert done.returncode == 0, done.stderr
    drawn = {path.name: Image.open(path).size for path in tmp_path.glob("*.png")}
    there = {path.name for pattern in ("block_*", "network_*") for path in IMAGES.glob(pattern)}
    assert drawn.keys() == {name for name in there if "zh-CN" not in name}
    for name, size in drawn.items():
        assert Image.open(IMAGES / name).size == size, name
        assert Image.open(IMAGES / name.replace(".png", ".zh-CN.png")).size == size, name


def test_every_label_has_chinese():
    drawings = load(IMAGES / "draw_blocks.py")
    for draw in drawings.DRAWINGS.values():
        axes = Figure().add_subplot()
        draw(axes)
        for text in axes.texts:
            drawings.chinese(text.get_text())


def test_curves_are_drawn(tmp_path):
    for run_number, last in enumerate((0.5, 0.6, 0.7), start=1):
        rows = f"epoch,accuracy,val_accuracy\n0,0.3,0.2\n1,0.8,{last}\n"
        (tmp_path / f"x_{run_number}.csv").write_text(rows)
    target = tmp_path / "curves.png"
    program = IMAGES / "draw_curves.py"
    done = run(program, target, f"x={tmp_path}/x_?.csv", f"y={tmp_path}/x_1.csv")
    assert done.returncode == 0, done.stderr
    assert Image.open(target).size == (1650, 720)
    done = run(program, target, f"z={tmp_path}/z.csv")
    assert done.returncode and f"there is no {tmp_path}/z.csv" in done.stderr
