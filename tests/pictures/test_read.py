"""Every picture is read as a viewer shows it: pixels are compared with colours that were put in, or it is refused."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile, TiffImagePlugin

from kvferry.errors import InputError
from kvferry.pictures import open_picture
from tests.pictures.made import display_p3, grey_profile, png

CORNERS = np.array([[[200, 30, 40], [40, 180, 60]], [[30, 60, 220], [240, 220, 50]]], np.uint8)
"""Red, green / blue, yellow."""


def corners(size: int = 8) -> Image.Image:
    """Four quarters in four colours, of odd sides so that none is like another when turned."""
    return Image.fromarray(CORNERS.repeat(size, 0).repeat(2 * size, 1))


def pixels(picture: Any) -> np.ndarray[Any, Any]:
    image = open_picture(picture)
    assert image.mode == "RGB"
    assert image.info == {}
    return np.asarray(image).astype(int)


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def stored(upright: Image.Image, orientation: int) -> Image.Image:
    """How a phone stores an upright picture under this orientation: EXIF 2.3 says where the stored 0th row and 0th
    column are seen. 6: the row is the right side, the column the top."""
    seen = np.asarray(upright)
    turned = {
        1: seen, 2: seen[:, ::-1], 3: seen[::-1, ::-1], 4: seen[::-1],
        5: seen.swapaxes(0, 1), 6: np.rot90(seen, 1), 7: seen[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(seen, -1),
    }  # fmt: skip
    return Image.fromarray(np.ascontiguousarray(turned[orientation]))


def exif(orientation: int) -> bytes:
    """As a phone writes it: the tag among others."""
    block = Image.Exif()
    block[0x010F] = "a maker"
    block[0x0112] = orientation
    return block.tobytes()


def xmp(orientation: int) -> bytes:
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_from_every_orientation(orientation: int, tmp_path: Path) -> None:
    seen, image = corners(), stored(corners(), orientation)
    (tmp_path / "late.png").write_bytes(png(image, after=[(b"eXIf", exif(orientation)[6:])]))
    ways: dict[str, Any] = {
        "JPEG": saved(image, "JPEG", quality=95, subsampling=0, exif=exif(orientation)),
        "JPEG, XMP": saved(image, "JPEG", quality=95, subsampling=0, xmp=xmp(orientation)),
        "PNG": saved(image, "PNG", exif=exif(orientation)),
        "PNG, behind the pixels": tmp_path / "late.png",
        "WebP": saved(image, "WEBP", lossless=True, exif=exif(orientation)),
        "WebP, XMP": saved(image, "WEBP", lossless=True, xmp=xmp(orientation)),
        "TIFF": saved(image, "TIFF", tiffinfo={0x0112: orientation}),
        "AVIF": saved(image, "AVIF", quality=100, subsampling="4:4:4", exif=exif(orientation)),
        "PIL, lazy": Image.open(io.BytesIO(saved(image, "PNG", exif=exif(orientation)))),
        "PIL, converted": Image.open(io.BytesIO(saved(image, "PNG", exif=exif(orientation)))).convert("RGBA"),
    }
    held = image.copy()
    held.getexif()[0x0112] = orientation
    ways["PIL, in memory"] = held
    for way, picture in ways.items():
        if way.startswith("PIL"):
            before = picture.size
        found = pixels(picture)
        assert found.shape == np.asarray(seen).shape, way
        assert np.abs(found - np.asarray(seen)).max() <= (14 if way in ("JPEG", "JPEG, XMP", "AVIF") else 0), way
        if way.startswith("PIL"):
            assert picture.size == before  # the caller's picture stays as it is


@pytest.mark.parametrize(
    "block", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0" + bytes(range(64)), exif(9)]
)
def test_a_broken_exif_block_is_ignored_as_viewers_do(block: bytes) -> None:
    image = corners()
    image.info["exif"] = block
    assert (pixels(image) == np.asarray(corners())).all()


RAMP = np.arange(256, dtype=np.uint8).reshape(2, 128)


def grey(levels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.repeat(np.asarray(levels).astype(int)[..., None], 3, -1)


def test_sixteen_bits_of_grey() -> None:
    wide = RAMP.astype(np.uint16) * 257
    image = Image.fromarray(wide)
    assert image.mode == "I;16"
    big = Image.frombytes("I;16B", (128, 2), wide.astype(">u2").tobytes())
    for way, picture in {
        "in memory": image,
        "big-endian": big,
        "PNG": saved(image, "PNG"),
        "TIFF": saved(image, "TIFF"),
        "TIFF, big-endian": saved(big, "TIFF"),
        "PGM": b"P5 128 2 65535\n" + wide.astype(">u2").tobytes(),
        "array": wide,
        "array, big-endian": wide.astype(">u2"),
        "converted, so that nothing else is known": Image.open(io.BytesIO(saved(image, "PNG"))).copy(),
    }.items():
        assert (pixels(picture) == grey(RAMP)).all(), way
    black_is_high = saved(image, "TIFF", tiffinfo={262: 0})
    found = pixels(black_is_high)
    assert TiffImagePlugin.TiffImageFile(io.BytesIO(black_is_high)).tag_v2[262] == 0
    assert (found == grey(255 - RAMP)).all()
    dim = Image.fromarray(np.full((4, 4), 300, np.uint16))
    assert (pixels(dim) == 1).all()  # dark stays dark


def test_colour_in_sixteen_bits() -> None:
    wide = np.asarray(corners()).astype(">u2") * 257
    opaque = np.concatenate([wide, np.full_like(wide[..., :1], 65535)], -1)
    half = np.concatenate([wide, np.full_like(wide[..., :1], 32768)], -1)
    seen = np.asarray(corners()).astype(int)
    assert (pixels(png(wide, depth=16, kind=2)) == seen).all()
    assert (pixels(png(opaque, depth=16, kind=6)) == seen).all()
    assert np.abs(pixels(png(half, depth=16, kind=6)) - (seen * 128 + 255 * 127) / 255).max() <= 1
    grey_half = np.stack([np.full((4, 4), 51 * 257), np.full((4, 4), 32768)], -1).astype(">u2")
    assert np.abs(pixels(png(grey_half, depth=16, kind=4)) - (51 * 128 + 255 * 127) / 255).max() <= 1


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr", "HSV"]
)
def test_modes_in_memory(mode: str) -> None:
    levels = {"1": RAMP > 127, "L": RAMP, "LA": RAMP, "La": RAMP}.get(mode)
    if levels is not None:
        image = Image.fromarray((levels.astype(np.uint8) * 255) if mode == "1" else RAMP)
        steps = {"La": ("LA", "La"), "LA": ("LA",), "1": ("1",)}.get(mode, ())
        wanted = grey((levels * 255) if mode == "1" else levels)
    else:
        image = corners()
        steps = {"RGBa": ("RGBA", "RGBa"), "PA": ("P", "PA")}.get(mode, (mode,))
        wanted = np.asarray(corners()).astype(int)
    for step in steps:
        image = image.quantize(4) if step == "P" else image.convert(step)
    assert image.mode == mode
    assert np.abs(pixels(image) - wanted).max() <= (4 if mode in ("YCbCr", "HSV") else 0)


def test_lab() -> None:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.buildTransform(srgb, lab, "RGB", "LAB").apply(corners())
    assert np.abs(pixels(image) - np.asarray(corners())).max() <= 3
    assert np.abs(pixels(saved(image, "TIFF")) - np.asarray(corners())).max() <= 3
    white = Image.new("LAB", (4, 4), (255, 128, 128))
    assert np.abs(pixels(white) - 255).max() <= 1


def test_cmyk_as_photoshop_writes_it() -> None:
    image = corners().convert("CMYK")
    assert np.abs(pixels(saved(image, "JPEG", quality=95)) - np.asarray(corners())).max() <= 12
    assert (pixels(saved(image, "TIFF")) == np.asarray(corners())).all()
    ink = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    assert np.abs(pixels(saved(ink, "JPEG", quality=95)) - [255, 0, 0]).max() <= 4


def test_what_shows_through_is_white() -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert (pixels(clear) == 255).all()
    half = Image.new("RGBA", (4, 4), (100, 0, 200, 128))
    assert np.abs(pixels(half) - [177, 127, 227]).max() <= 1
    assert np.abs(pixels(half.convert("RGBa")) - [177, 127, 227]).max() <= 1
    assert np.abs(pixels(saved(half, "WEBP", lossless=True)) - [177, 127, 227]).max() <= 1
    assert (pixels(Image.new("LA", (4, 4), (0, 0))) == 255).all()
    assert np.abs(pixels(Image.new("La", (4, 4), (50, 128))) - 177).max() <= 1
    assert (pixels(np.zeros((4, 4, 4), np.uint8)) == 255).all()


def test_transparent_colours_and_palettes() -> None:
    index = (np.arange(16).reshape(4, 4) % 3).astype(np.uint8)
    palette = Image.fromarray(index)
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    solid = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]])
    assert (pixels(palette) == solid[index]).all()
    without_green = solid.copy()
    without_green[1] = 255
    assert (pixels(saved(palette, "PNG", transparency=1)) == without_green[index]).all()
    assert (pixels(saved(palette, "GIF", transparency=1)) == without_green[index]).all()
    halves = saved(palette, "PNG", transparency=bytes([255, 128, 0]))
    wanted = np.array([[255, 0, 0], [127, 255, 127], [255, 255, 255]])
    assert np.abs(pixels(halves) - wanted[index]).max() <= 1
    for depth, key in ((1, 0), (2, 1), (4, 5), (8, 85), (16, 85 * 257)):  # one grey of each depth is clear
        top = 2**depth - 1
        levels = np.array([[0, key], [key, top]])
        found = pixels(png(levels.astype(">u2" if depth == 16 else np.uint8), depth=depth, kind=0, clear=(key,)))
        wanted = np.where(levels == key, 255, levels * 255 // top)
        assert (found == grey(wanted)).all(), depth
    colours = np.array([[[10, 20, 30], [40, 50, 60]]], np.uint8)
    wanted = np.array([[[255, 255, 255], [40, 50, 60]]])
    assert (pixels(png(colours, depth=8, kind=2, clear=(10, 20, 30))) == wanted).all()
    assert (pixels(png(colours.astype(">u2") * 257, depth=16, kind=2, clear=(2570, 5140, 7710))) == wanted).all()


def test_the_first_frame_that_a_viewer_shows() -> None:
    first, second = Image.new("RGB", (8, 6), (250, 10, 10)), Image.new("RGB", (8, 6), (10, 10, 250))
    for form, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        data = saved(first, form, save_all=True, append_images=[second], **options)
        assert (pixels(data) == [250, 10, 10]).all(), form
    hidden = saved(
        Image.new("RGB", (8, 6), (0, 255, 0)), "PNG", save_all=True, default_image=True, append_images=[first, second]
    )
    assert (pixels(hidden) == [250, 10, 10]).all()  # the default image is for programs that know no APNG
    at_second = Image.open(io.BytesIO(saved(first, "GIF", save_all=True, append_images=[second])))
    at_second.seek(1)
    assert (pixels(at_second) == [10, 10, 250]).all()


def test_a_gif_whose_first_frame_does_not_cover_its_screen() -> None:
    body = saved(Image.new("P", (4, 4), 1), "GIF")
    wide = body[:6] + struct.pack("<HH", 8, 4) + body[10:]
    start = wide.index(b",")
    assert struct.unpack_from("<HHHH", wide, start + 1) == (0, 0, 4, 4)
    found = pixels(wide)
    assert found.shape == (4, 8, 3)
    assert (found[:, 4:] == 255).all()
    assert (found[:, :4] == pixels(body)).all()


def test_profiles_are_followed_as_viewers_do() -> None:
    # Display P3's (234, 51, 35) is what sRGB calls pure red: the primaries of both, by hand with the P3 matrix
    phone = Image.new("RGB", (4, 4), (234, 51, 35))
    for form in ("JPEG", "PNG", "WEBP", "TIFF"):
        options = {"quality": 100} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
        found = pixels(saved(phone, form, icc_profile=display_p3(), **options))
        assert np.abs(found - [255, 0, 0]).max() <= 4, form
    assert np.abs(pixels(saved(phone.convert("RGBA"), "PNG", icc_profile=display_p3())) - [255, 0, 0]).max() <= 2
    held = phone.copy()
    held.info["icc_profile"] = display_p3()
    assert np.abs(pixels(held) - [255, 0, 0]).max() <= 2
    same = saved(corners(), "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    assert (pixels(same) == np.asarray(corners())).all()
    linear = saved(Image.new("L", (4, 4), 55), "PNG", icc_profile=grey_profile(1.0))
    assert np.abs(pixels(linear) - 128).max() <= 2  # 55 / 255 of the light is sRGB's middle grey
    for broken in (b"no profile", display_p3()[:200], grey_profile(1.0)):  # the last is none of a colour picture
        assert (pixels(saved(corners(), "PNG", icc_profile=broken)) == np.asarray(corners())).all()


def test_gamma_and_primaries_of_a_png() -> None:
    levels = np.full((4, 4), 55, np.uint8)
    linear = (b"gAMA", struct.pack(">I", 100_000))
    assert np.abs(pixels(png(levels, depth=8, kind=0, before=[linear])) - 128).max() <= 1
    assert np.abs(pixels(png(levels.astype(">u2") * 257, depth=16, kind=0, before=[linear])) - 128).max() <= 1
    usual = (b"gAMA", struct.pack(">I", 45_455))
    assert (pixels(png(levels, depth=8, kind=0, before=[usual])) == 55).all()
    assert (pixels(png(levels, depth=8, kind=0, before=[(b"sRGB", b"\0"), linear])) == 55).all()
    p3 = (b"cHRM", struct.pack(">8I", 31_270, 32_900, 68_000, 32_000, 26_500, 69_000, 15_000, 6_000))
    red = np.full((4, 4, 3), (234, 51, 35), np.uint8)
    assert np.abs(pixels(png(red, depth=8, kind=2, before=[usual, p3])) - [255, 0, 0]).max() <= 3
    assert np.abs(pixels(png(np.full((4, 4, 3), 90, np.uint8), depth=8, kind=2, before=[usual, p3])) - 90).max() <= 1


def test_whose_looks_nothing_defines_are_refused() -> None:
    for picture in (
        Image.new("F", (4, 4), 0.5), Image.new("I", (4, 4), 300), saved(Image.new("F", (4, 4), 0.5), "TIFF"),
        saved(Image.new("I", (4, 4), 300), "TIFF"),
    ):  # fmt: skip
        with pytest.raises(InputError, match="nothing says which of them is black"):
            open_picture(picture)


def test_arrays() -> None:
    seen = np.asarray(corners())
    for way, array in {
        "uint8": seen, "uint16": seen.astype(np.uint16) * 257, "float": seen / 255,
        "half": (seen / 255).astype(np.float16),
        "tensor": torch.from_numpy(seen.copy()), "float tensor": torch.from_numpy(seen / 255),
        "opaque": np.dstack([seen, np.full(seen.shape[:2], 255, np.uint8)]), "Fortran order": np.asfortranarray(seen),
    }.items():  # fmt: skip
        assert (pixels(array) == seen).all(), way
    assert (pixels(np.eye(4, dtype=bool)) == grey(np.eye(4) * 255)).all()
    assert (pixels(RAMP[..., None]) == grey(RAMP)).all()
    assert pixels(np.ones((2, 2, 3)))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 40, 50), np.uint8), "channels first"),
        (np.zeros((1, 40, 50), np.uint8), "channels first"),
        (torch.zeros(3, 40, 50), "channels first"),
        (np.zeros((2, 40, 50, 3), np.uint8), "one picture at a time"),
        (np.zeros((8, 4, 5), np.uint8), "shape"),
        (np.zeros((0, 4, 3), np.uint8), "shape"),
        (np.zeros(7, np.uint8), "shape"),
        (np.full((2, 2, 3), 255.0), "divide by 255"),
        (np.full((2, 2, 3), np.nan), "divide by 255"),
        (np.zeros((2, 2, 3), np.int64), "int64"),
        (np.zeros((2, 2, 3), np.complex64), "complex64"),
        (np.array([["a", "b"]]), "is not a picture"),
        (torch.zeros(2, 2, 3, dtype=torch.bfloat16), "cannot be read"),
        (torch.zeros(2, 2, 3, requires_grad=True), "cannot be read"),
        (None, "NoneType"),
        (7, "int"),
    ],
)
def test_what_is_no_picture(array: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_picture(array)


def test_small_and_long_pictures() -> None:
    assert pixels(Image.new("RGB", (1, 1), (1, 2, 3))).tolist() == [[[1, 2, 3]]]
    assert open_picture(Image.new("RGB", (400, 2))).size == (400, 2)
    for picture, message in (
        (Image.new("RGB", (402, 2)), "200 times longer than wide"), (Image.new("L", (1, 201)), "200 times"),
        (Image.new("RGB", (0, 4)), "empty"), (np.zeros((2, 500), np.uint8), "200 times"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            open_picture(picture)


def test_bombs_are_refused_before_they_unfold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb, huge = tmp_path / "bomb.png", tmp_path / "huge.png"
    Image.new("1", (12_000, 9_000)).save(bomb)
    huge.write_bytes(png(np.zeros((1, 1), np.uint8), depth=8, kind=0, says=(60_000, 60_000)))
    with pytest.warns(Image.DecompressionBombWarning):
        lazy = Image.open(bomb)

    def never(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    for picture in (bomb, huge, bomb.read_bytes(), lazy):
        with pytest.raises(InputError, match=r"too large.*scale it down"):
            open_picture(picture)


def test_files(tmp_path: Path) -> None:
    words, cut, script = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"
    words.write_text("no picture at all")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    script.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    for form in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"):
        data = saved(noise, form)
        assert pixels(data).shape == (64, 64, 3)
        cut.write_bytes(data[: len(data) // 2])
        with pytest.raises(InputError, match=r"cannot be (decoded|read)|not an image"):
            open_picture(cut)
    for path, message in (
        (words, "not an image"), (script, "not an image"), (tmp_path, "cannot be read"),
        (tmp_path / "none.png", "no picture at"), (Path("/dev/zero"), "cannot be read"), ("a\0b", "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            open_picture(path)
    gone = Image.open(io.BytesIO(saved(noise, "PNG")))
    gone.close()
    with pytest.raises(InputError, match="cannot be decoded"):
        open_picture(gone)
