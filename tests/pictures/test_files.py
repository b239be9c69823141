"""What leaves a device shows the same picture, upright, and says nothing of who took it, where, when and with what."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from kvferry.errors import InputError
from kvferry.pictures import file_of, jpeg_of, open_picture
from tests.pictures.made import display_p3, grey_profile, png
from tests.pictures.test_read import corners, saved, stored

pytestmark = pytest.mark.filterwarnings("ignore:Image appears to be a malformed MPO")

SECRETS = (
    b"Exif", b"eXIf", b"EXIF", b"GPS", b"http://ns.adobe.com", b"xmpmeta", b"XMP", b"Photoshop", b"8BIM", b"MPF",
    b"a maker", b"a secret", b"serial", b"JFXX", b"Comment", b"tEXt", b"iTXt", b"zTXt", b"tIME", b"MAKR", b"ftypmp42",
)  # fmt: skip


def exif(orientation: int = 1) -> bytes:
    """A phone's: maker, orientation, a comment, a place and a thumbnail's worth of bytes."""
    block = Image.Exif()
    block[0x010F], block[0x0112], block[0x9286] = "a maker", orientation, "a secret"
    block.get_ifd(0x8825).update({1: "N", 2: (52.0, 31.0, 12.0), 3: "E", 4: (13.0, 24.0, 36.0)})
    return block.tobytes()


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf xmp:CreatorTool="a secret"/></x:xmpmeta>'


def photograph(orientation: int = 1, **options: Any) -> bytes:
    """A JPEG as phones write them, with a comment, IPTC, a thumbnail in JFXX, and a film behind its end."""
    options = {"quality": 90, "exif": exif(orientation), "xmp": XMP, "comment": b"a secret", **options}
    data = saved(stored(corners(), orientation), "JPEG", **options)
    iptc = b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0\0\0\0\x0a\x1c\x02\x78\0\x08a secret"
    film = b"\0\0\0\x18ftypmp42" + b"a secret" * 8
    more = b"".join(
        struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body
        for marker, body in ((0xED, iptc), (0xE0, b"JFXX\0\x10" + data[:400]), (0xE2, b"MPF\0" + bytes(40)))
    )
    return data[:2] + more + data[2:] + film


def secrets(data: bytes) -> list[bytes]:
    """What should not be there: bytes, and whatever Pillow finds."""
    image = Image.open(io.BytesIO(data))
    image.load()
    found = [word for word in SECRETS if word in data]
    found += [str(tag).encode() for tag in image.getexif()]
    private = {"exif", "xmp", "comment", "photoshop", "mp", "mpoffset", "XML:com.adobe.xmp"} & {*map(str, image.info)}
    return found + [str(key).encode() for key in private] + [x.encode() for x in getattr(image, "text", {})]


def away(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], *, exact: bool = False) -> None:
    """Everywhere the same, or in the middle of each quarter nearly so: JPEG smears where colours meet."""
    assert found.shape == wanted.shape
    apart = np.abs(found.astype(int) - wanted)
    assert (apart if exact else apart[4::8, 8::16]).max() <= (3 if exact else 14)


def written(folder: Path, data: bytes) -> Path:
    path = folder / "picture"
    path.write_bytes(data)
    return path


def test_a_jpeg_keeps_its_pixels_and_loses_its_words(tmp_path: Path) -> None:
    for options in (
        {}, {"progressive": True}, {"subsampling": 0, "restart_marker_rows": 1}, {"icc_profile": display_p3()},
    ):  # fmt: skip
        data = photograph(**options)
        assert secrets(data)
        path = written(tmp_path, data)
        sent = file_of(path)
        assert secrets(sent) == []
        assert (np.asarray(open_picture(sent)) == np.asarray(open_picture(path))).all()
        assert len(sent) < len(data) - 800
        assert sent.endswith(b"\xff\xd9")
    assert Image.open(io.BytesIO(sent)).info["icc_profile"] != display_p3()  # the same colours, without its words
    for mode in ("L", "CMYK"):
        path = written(tmp_path, saved(corners().convert(mode), "JPEG", exif=exif(), comment=b"a secret"))
        assert secrets(file_of(path)) == []
        assert (np.asarray(open_picture(file_of(path))) == np.asarray(open_picture(path))).all()


def test_a_motion_photo_is_one_picture(tmp_path: Path) -> None:
    second = corners().rotate(180)
    path = written(tmp_path, saved(corners(), "MPO", save_all=True, append_images=[second], exif=exif()))
    with Image.open(path) as image:
        assert image.format == "MPO"
    sent = file_of(path)
    assert secrets(sent) == []
    assert sent.count(b"\xff\xd8\xff") == 1
    assert (np.asarray(open_picture(sent)) == np.asarray(open_picture(path))).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_leaves_is_upright(orientation: int, tmp_path: Path) -> None:
    image = stored(corners(), orientation)
    for data, quality, exact in (
        (photograph(orientation), 0, orientation == 1),
        (photograph(orientation), 90, False),
        (photograph(orientation, subsampling=0), 0, True),
        (saved(image.convert("L"), "JPEG", exif=exif(orientation)), 0, True),
        (saved(image, "PNG", exif=exif(orientation)), 0, True),
        (saved(image, "PNG", exif=exif(orientation)), 90, False),
        (png(image, after=[(b"eXIf", exif(orientation)[6:])]), 0, True),
        (saved(image, "WEBP", lossless=True, exif=exif(orientation), xmp=XMP), 0, orientation == 1),
        (saved(image, "TIFF", tiffinfo={0x0112: orientation, 270: "a secret"}), 0, False),
    ):
        path = written(tmp_path, data)
        sent = file_of(path, quality)
        assert secrets(sent) == []
        crossed = np.asarray(Image.open(io.BytesIO(sent)).convert("RGB"))  # whatever a reader makes of tags
        away(crossed, np.asarray(open_picture(path)), exact=exact)


def test_turning_a_jpeg_costs_next_to_nothing(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 20, (96, 160, 3)) + np.linspace(40, 200, 160)[:, None]
    image = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
    for sampling in (0, 2):
        data = saved(image, "JPEG", quality=80, subsampling=sampling, exif=exif(6))
        sent = file_of(written(tmp_path, data))
        error = np.asarray(open_picture(sent)).astype(float) - np.asarray(open_picture(data))
        assert 10 * np.log10(255**2 / (error**2).mean()) > 38
        assert len(sent) < len(data) * 1.02


def test_a_png_keeps_its_pixels_and_loses_its_words(tmp_path: Path) -> None:
    words = [
        (b"tEXt", b"Comment\0a secret"), (b"zTXt", b"Comment\0\0" + zlib.compress(b"a secret")), (b"eXIf", exif()[6:]),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP), (b"tIME", struct.pack(">HBBBBB", 2026, 11, 29, 9, 30, 0)),
        (b"prVt", b"a secret"),
    ]  # fmt: skip
    colours = [
        [], [(b"gAMA", struct.pack(">I", 100_000))], [(b"sRGB", b"\0")],
        [(b"iCCP", b"a secret\0\0" + zlib.compress(display_p3()))],
        [(b"gAMA", struct.pack(">I", 100_000)), (b"sRGB", b"\0")],
    ]  # fmt: skip
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    colours.append([(b"iCCP", b"sRGB\0\0" + zlib.compress(srgb)), (b"gAMA", struct.pack(">I", 100_000))])
    for colour in colours:
        for around in ({"before": [*colour, *words]}, {"before": colour, "after": words}):
            data = png(corners(), clear=(40, 180, 60), **around) + b"a secret"
            path = written(tmp_path, data)
            sent = file_of(path)
            assert secrets(sent) == []
            assert (np.asarray(open_picture(sent)) == np.asarray(open_picture(path))).all()
    grey = png(np.full((4, 4), 55, np.uint8), kind=0, before=[(b"iCCP", b"x\0\0" + zlib.compress(grey_profile(1.0)))])
    assert abs(int(np.asarray(open_picture(file_of(written(tmp_path, grey))))[0, 0, 0]) - 128) <= 2


def test_animations_send_what_is_seen_first(tmp_path: Path) -> None:
    blue = Image.new("RGB", corners().size, (0, 0, 255))
    for form, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("GIF", {})):
        path = written(tmp_path, saved(corners(), form, save_all=True, append_images=[blue], **options))
        sent = file_of(path)
        assert getattr(Image.open(io.BytesIO(sent)), "n_frames", 1) == 1
        away(np.asarray(open_picture(sent)), np.asarray(corners()), exact=form == "PNG")


def test_a_webp_keeps_its_pixels_and_loses_its_words(tmp_path: Path) -> None:
    for image, options in (
        (corners(), {"quality": 80}), (corners(), {"lossless": True, "icc_profile": display_p3()}),
        (Image.merge("RGBA", [*corners().split(), corners().convert("L")]), {"quality": 80}),
    ):  # fmt: skip
        path = written(tmp_path, saved(image, "WEBP", exif=exif(), xmp=XMP, **options) + b"a secret")
        sent = file_of(path)
        assert secrets(sent) == []
        assert (np.asarray(open_picture(sent)) == np.asarray(open_picture(path))).all()


def test_metadata_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    turned = stored(corners(), 6)
    for data in (photograph(6), saved(turned, "PNG", exif=exif(6)), saved(turned, "WEBP", exif=exif(6))):
        path = written(tmp_path, data)
        assert file_of(path, keep_metadata=True) == data
        smaller = file_of(path, 90, keep_metadata=True)
        kept = Image.open(io.BytesIO(smaller)).getexif()
        assert kept[0x010F] == "a maker"
        assert kept.get_ifd(0x8825)[2] == (52.0, 31.0, 12.0)
        assert kept[0x0112] == 1
        away(np.asarray(open_picture(smaller)), np.asarray(open_picture(path)))
    assert secrets(file_of(Image.open(path))) == []
    assert b"a maker" in file_of(Image.open(path), keep_metadata=True)


def test_pictures_in_memory_and_other_files(tmp_path: Path) -> None:
    held = Image.open(io.BytesIO(photograph(6)))
    assert secrets(file_of(held)) == []
    assert Image.open(io.BytesIO(file_of(held))).size == corners().size
    away(np.asarray(open_picture(file_of(np.asarray(corners())))), np.asarray(corners()))
    for form in ("GIF", "BMP", "TIFF", "AVIF"):
        sent = file_of(written(tmp_path, saved(corners(), form)))
        assert Image.open(io.BytesIO(sent)).format == "JPEG"
    assert len(jpeg_of(corners(), 30)) < len(jpeg_of(corners(), 95))


def test_what_cannot_be_sent_is_refused(tmp_path: Path) -> None:
    for data in (photograph()[:700], png(corners())[:70], saved(corners(), "WEBP")[:60], b"words"):
        with pytest.raises(InputError, match=r"cannot be (decoded|read)|not an image"):
            file_of(written(tmp_path, data))
    with pytest.raises(InputError, match="no picture at"):
        file_of(tmp_path / "none.jpg")
