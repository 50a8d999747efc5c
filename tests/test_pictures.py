"""What a person sees in a picture is what a network gets, whatever file it is in."""

import contextlib
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, load
from PIL import Image, features

scripts = [load("ResNet_keras"), load(ROOT / "3_Vgg19_Network" / "Vgg_prediction.py")]
read_picture = scripts[0].read_picture
SIDE = 64
# Of the quarters of a picture: above left, above right, below left, below right.
COLOURS = [(250, 250, 250), (200, 30, 30), (20, 20, 20), (30, 60, 200)]
GREYS = [(level,) * 3 for level in (250, 130, 20, 70)]
CENTRES = ((8, 8), (8, 24), (24, 8), (24, 24))


def quarters(colours):
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    half = SIDE // 2
    for (row, column), colour in zip(np.ndindex(2, 2), colours):
        image[half * row : half * (row + 1), half * column : half * (column + 1)] = colour
    return Image.fromarray(image)


def seen(path):
    """The colours in the middle of the quarters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = read_picture(path, 32)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    return np.array([image[centre] for centre in CENTRES])


def in_mode(mode):
    """(picture in a mode of Pillow, what is to be seen in its quarters)."""
    colours, greys = quarters(COLOURS), quarters(GREYS).convert("L")
    if mode == "1":
        return quarters([(255,) * 3, (0,) * 3] * 2).convert("1"), [(255,) * 3, (0,) * 3] * 2
    if mode in ("L", "LA", "La"):
        return greys.convert(mode) if mode != "La" else greys.convert("LA").convert("La"), GREYS
    if mode in ("I", "I;16", "I;16B"):
        values = np.asarray(greys, np.int32) * 257
        return Image.fromarray(values.astype("i4" if mode == "I" else "<u2")), GREYS
    if mode == "F":
        return Image.fromarray(np.asarray(greys, np.float32) / 255), GREYS
    if mode in ("P", "PA"):
        return colours.quantize(16).convert(mode), COLOURS
    if mode == "RGBa":
        return colours.convert("RGBA").convert("RGBa"), COLOURS
    return colours.convert(mode), COLOURS


MODES = "1 L LA I I;16 F P PA RGB RGBA RGBa RGBX CMYK YCbCr HSV LAB La".split()


def odd_files(folder):
    """Save a picture in every mode and format that Pillow writes: (path, what is to be seen)."""
    Image.init()
    for kind, mode in ((kind, mode) for kind in sorted(Image.SAVE) for mode in MODES):
        image, expected = in_mode(mode)
        path = folder / f"{mode.replace(';', '_')}.{kind.lower()}"
        try:
            image.save(path, kind)
        except Exception:  # not every format takes every mode, nor can it be read again
            path.unlink(missing_ok=True)
            continue
        if kind not in Image.OPEN:
            continue
        saved = Image.open(path).mode
        if mode[0] in "IF" and saved[0] not in "IF":
            continue  # Pillow has cut the numbers off at 255 when it saved them
        if expected == COLOURS and saved in ("L", "F"):  # Spider's pictures are grey
            expected = [[level] * 3 for level in (250, 81, 20, 66)]
        yield path, expected


def test_every_mode_and_format_looks_as_it_does_to_a_person(tmp_path):
    rng, read, refused = np.random.default_rng(0), 0, []
    for path, expected in odd_files(tmp_path):
        try:
            colours = seen(path)
        except OSError as error:
            assert str(error).startswith(f"{path} cannot be read; save it as PNG or JPEG: ")
            refused.append(path.name)
            continue
        # Formats without colours show their greys; palettes and JPEG are a little off.
        np.testing.assert_allclose(colours, expected, atol=26, err_msg=path.name)
        read += 1
        whole = path.read_bytes()
        ends_with_palette = path.name == "P.pcx"  # without it, the picture is grey for anybody
        for cut in rng.integers(1, len(whole), 0 if ends_with_palette else 3):
            short = path.with_name(f"short_{cut}_{path.name}")
            short.write_bytes(whole[:cut])
            with contextlib.suppress(OSError):
                assert np.abs(seen(short) - np.array(expected, int)).max() <= 26, short.name
    assert read > 60
    # What has no colours that Pillow knows, or needs programs of its own.
    assert not [name for name in refused if name.endswith((".png", ".jpeg", ".gif", ".bmp"))]


@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
def test_transparent_parts_are_white(kind, tmp_path):
    if kind == "webp" and not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    image = quarters(COLOURS).convert("RGBA")
    alpha = np.full((SIDE, SIDE), 255, np.uint8)
    alpha[: SIDE // 2, SIDE // 2 :] = 0  # red, but nobody sees it
    image.putalpha(Image.fromarray(alpha))
    options = {"exact": True, "lossless": True} if kind == "webp" else {}
    image.save(tmp_path / f"hole.{kind}", **options)
    np.testing.assert_allclose(seen(tmp_path / f"hole.{kind}")[1], 255, atol=3)
    image.putalpha(Image.fromarray(np.where(alpha == 0, 128, alpha).astype(np.uint8)))
    image.save(tmp_path / f"half.{kind}", **options)
    np.testing.assert_allclose(seen(tmp_path / f"half.{kind}")[1], (227, 142, 142), atol=3)


def test_transparent_colour_of_a_palette_is_white(tmp_path):
    image = quarters(COLOURS).quantize(8)
    hidden = image.getpixel((SIDE - 5, 5))
    for kind in ("png", "gif"):
        image.save(tmp_path / f"hole.{kind}", transparency=hidden)
        colours = seen(tmp_path / f"hole.{kind}")
        np.testing.assert_array_equal(colours[1], 255)
        np.testing.assert_allclose(colours[3], COLOURS[3], atol=10)


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp"])
def test_cameras_are_held_in_eight_ways(kind, tmp_path):
    flip = Image.Transpose
    stored = {
        **{1: None, 2: flip.FLIP_LEFT_RIGHT, 3: flip.ROTATE_180, 4: flip.FLIP_TOP_BOTTOM},
        **{5: flip.TRANSPOSE, 6: flip.ROTATE_90, 7: flip.TRANSVERSE, 8: flip.ROTATE_270},
    }
    for orientation, turn in stored.items():
        image = quarters(COLOURS)
        image = image.transpose(turn) if turn is not None else image
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{kind}"
        image.save(path, exif=exif)
        np.testing.assert_allclose(seen(path), COLOURS, atol=26, err_msg=path.name)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (20000, 3), (3, 20000), (33, 31), (2, 2)])
@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_any_size_is_seen(size, kind, tmp_path):
    Image.new("RGB", size, (30, 60, 200)).save(tmp_path / f"flat.{kind}", quality=95)
    for colour in seen(tmp_path / f"flat.{kind}"):
        np.testing.assert_allclose(colour, (30, 60, 200), atol=6)


@pytest.mark.parametrize(
    "values, expected",
    [
        (np.uint16(0), 0),
        (np.uint16(200), 1),  # a dark picture of 16 bits is dark
        (np.uint16(65535), 255),
        (np.float32(0.5), 127),
        (np.float32(1), 255),
        (np.float32(128), 128),
        (np.float32(65535), 255),
        (np.float32(-7), 0),
        (np.float32("nan"), 0),
        (np.int32(300), 1),
        (np.int32(32768), 127),
    ],
)
def test_numbers_of_more_than_eight_bits(values, expected, tmp_path):
    Image.fromarray(np.full((9, 9), values)).save(tmp_path / "grey.tiff")
    np.testing.assert_allclose(seen(tmp_path / "grey.tiff"), expected, atol=1)


@pytest.mark.parametrize(
    "name, content",
    [
        ("cat.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)),
        ("cat.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        ("cat.txt", b"no picture"),
        ("cat.jpg", b""),
        ("cat.pdf", b"%PDF-1.4"),
    ],
)
def test_what_is_no_picture_is_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OSError, match=f"{name} cannot be read; save it as PNG or JPEG: "):
        read_picture(tmp_path / name, 32)


def test_picture_that_is_too_large_is_refused(tmp_path):
    """200 megapixels of white take 25 kilobytes on disk, and would take 800 MB of memory."""
    Image.new("1", (20000, 10000), 1).save(tmp_path / "large.png")
    with pytest.raises(OSError, match="large.png cannot be read; .*exceeds limit"):
        read_picture(tmp_path / "large.png", 32)


def test_all_scripts_read_pictures_alike():
    texts = []
    for script in scripts:
        source = Path(script.__file__).read_text()
        start = source.index("def read_picture(")
        texts.append(source[start : source.index("\n\n\n", start)])
    assert texts[0] == texts[1]
