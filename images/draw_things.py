"""Draw five things to try a trained network on, which are not in its data set.

python images/draw_things.py images/things    # airplane.png, automobile.png, ...
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 256


def scene(top, bottom, ground=None, horizon=0.7):
    """A sky from the colour top to bottom, and ground below the horizon."""
    share = np.linspace(0, 1, SIZE)[:, None, None]
    image = np.array(top) * (1 - share) + np.array(bottom) * share + np.zeros((1, SIZE, 1))
    if ground:
        image[int(horizon * SIZE) :] = ground
    image += np.random.default_rng(0).normal(0, 6, image.shape)
    image = Image.fromarray(np.uint8(image.clip(0, 255)))
    return image, ImageDraw.Draw(image)


def airplane():
    image, draw = scene((90, 150, 220), (190, 215, 240))
    grey, dark = (225, 228, 232), (150, 155, 165)
    draw.polygon([(120, 125), (165, 205), (185, 205), (160, 125)], fill=dark)  # wings
    draw.polygon([(125, 110), (150, 60), (165, 60), (160, 110)], fill=dark)
    draw.ellipse((30, 100, 225, 140), fill=grey)
    draw.polygon([(200, 115), (225, 65), (242, 65), (226, 120)], fill=grey)  # fin
    draw.rectangle((60, 112, 190, 117), fill=(70, 90, 130))  # windows
    return image


def automobile():
    image, draw = scene((170, 195, 215), (215, 220, 220), (105, 105, 108), 0.62)
    draw.polygon([(70, 120), (100, 75), (170, 75), (205, 120)], fill=(150, 20, 25))
    draw.polygon([(85, 117), (106, 84), (132, 84), (132, 117)], fill=(60, 80, 95))
    draw.polygon([(140, 117), (140, 84), (165, 84), (190, 117)], fill=(60, 80, 95))
    draw.rounded_rectangle((25, 115, 235, 172), 18, fill=(190, 30, 35))
    for x in (70, 188):
        draw.ellipse((x - 28, 146, x + 28, 202), fill=(25, 25, 28))
        draw.ellipse((x - 12, 162, x + 12, 186), fill=(160, 160, 165))
    return image


def frog():
    image, draw = scene((120, 95, 60), (90, 70, 45))
    green, dark = (95, 150, 50), (60, 105, 35)
    for x in (60, 196):  # hind legs
        draw.ellipse((x - 42, 130, x + 42, 215), fill=dark)
    draw.ellipse((60, 85, 196, 215), fill=green)
    for x in (92, 164):  # eyes
        draw.ellipse((x - 24, 60, x + 24, 108), fill=green)
        draw.ellipse((x - 12, 70, x + 12, 94), fill=(20, 20, 15))
    draw.arc((85, 95, 171, 150), 20, 160, fill=(40, 70, 25), width=5)
    return image


def ship():
    image, draw = scene((150, 185, 220), (215, 228, 238), (35, 75, 120), 0.68)
    draw.rectangle((95, 85, 175, 135), fill=(235, 235, 230))
    draw.rectangle((120, 45, 145, 85), fill=(200, 60, 40))
    for x in range(105, 170, 16):
        draw.rectangle((x, 100, x + 8, 110), fill=(60, 80, 110))
    draw.polygon([(20, 135), (240, 135), (205, 190), (50, 190)], fill=(45, 50, 60))
    return image


def truck():
    image, draw = scene((185, 205, 220), (220, 222, 222), (110, 108, 105), 0.7)
    draw.rectangle((20, 60, 160, 168), fill=(230, 225, 215))
    draw.polygon([(165, 95), (205, 95), (235, 130), (235, 168), (165, 168)], fill=(40, 80, 160))
    draw.polygon([(175, 102), (202, 102), (222, 128), (175, 128)], fill=(70, 95, 110))
    draw.rectangle((20, 165, 235, 178), fill=(60, 60, 65))
    for x in (55, 110, 200):
        draw.ellipse((x - 24, 155, x + 24, 203), fill=(25, 25, 28))
        draw.ellipse((x - 10, 169, x + 10, 189), fill=(150, 150, 155))
    return image


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (airplane, automobile, frog, ship, truck):
        draw().filter(ImageFilter.GaussianBlur(1)).save(folder / f"{draw.__name__}.png")


if __name__ == "__main__":
    main()
