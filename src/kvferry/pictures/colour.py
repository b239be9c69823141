"""Modes, depths, opacity and colour spaces to opaque 8-bit sRGB."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from kvferry.errors import InputError
from kvferry.pictures.header import UNREADABLE

GROUND = (255, 255, 255)
"""What shows through transparency."""
_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_SPACES = {"GRAY": ("L",), "RGB ": ("L", "RGB"), "CMYK": ("CMYK",)}
"""Which modes a profile of each colour space belongs to; viewers ignore one that does not fit."""
_SRGB_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_SRGB_WHITES = np.array([0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06])
"""White, red, green and blue as PNG's cHRM lists them."""


def shown(image: Image.Image, name: str = "the picture") -> Image.Image:
    """A new picture of mode RGB and of the same size, with the colours that a viewer shows.

    Raises
    ------
    InputError
        It cannot be decoded, or nothing says what its numbers look like (modes I and F, signed TIFFs).
    """
    depth = _depth(image)  # a decoded picture has forgotten
    drawn = _drawn(image)
    try:
        image.load()
        _check_meaning(image, name)
        colour, alpha = _parts(image, depth)
        pixels = _srgb(colour, image)
        if alpha is None and drawn is not None:
            alpha = Image.new("L", image.size, 255)
        if alpha is None:
            return _fresh(pixels)
        if drawn is not None:
            within = Image.new("L", image.size, 0)
            within.paste(255, drawn)
            alpha = Image.composite(alpha, within, within)
        ground = Image.new("RGB", image.size, GROUND)
        ground.paste(pixels, mask=alpha)
        return ground
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"{name} cannot be decoded ({error}); it may be cut off, pass an intact image file") from None


def _fresh(image: Image.Image) -> Image.Image:
    """The pixels alone: what a picture carries besides may be private, and Pillow writes comments by itself."""
    copy = Image.new("RGB", image.size)
    copy.paste(image)
    return copy


def _depth(image: Image.Image) -> str:
    """Pillow's name of how the file stores its numbers, of a picture that is not decoded yet."""
    tile = getattr(image, "tile", None)
    args = tile[0][3] if tile else ""
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _drawn(image: Image.Image) -> tuple[int, int, int, int] | None:
    """Where a GIF draws, if that is not everywhere: viewers leave the rest transparent, Pillow fills it."""
    drawn = getattr(image, "dispose_extent", None)
    if image.format != "GIF" or drawn is None or image.tell():
        return None
    x0, y0, x1, y1 = drawn
    return None if (x0, y0, x1, y1) == (0, 0, *image.size) else (x0, y0, x1, y1)


def _check_meaning(image: Image.Image, name: str) -> None:
    tags: Any = getattr(image, "tag_v2", {})
    signed = any(form == 2 for form in tags.get(339, ())) if image.format == "TIFF" else False
    whole = image.mode == "I" and image.format in ("PNG", "PPM")
    if signed or image.mode == "F" or (image.mode == "I" and not whole):
        raise InputError(
            f"{name} holds {'signed numbers' if signed else f'numbers of mode {image.mode}'}, and nothing says which "
            "of them is black and which white; pass 8 or 16 bits (mode L or I;16, dtype uint8 or uint16), or a float "
            "array from 0 to 1"
        )


def _parts(image: Image.Image, depth: str) -> tuple[Image.Image, Image.Image | None]:
    """Colour (mode L, RGB, CMYK or I;16) and opacity (mode L, None if all is opaque)."""
    key = image.info.get("transparency")
    if image.mode in _SIXTEEN or image.mode == "I":
        return _sixteen(image, key)
    if image.mode == "LAB":
        return image, None
    if image.mode in _WITH_ALPHA or (key is not None and image.mode in ("1", "L", "P", "RGB")):
        if image.mode in ("La", "RGBa"):
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        elif image.mode in ("L", "RGB"):
            image = _keyed(image, key, depth)
        grey = image.mode in ("1", "L", "LA")
        rgba = image.convert("RGBA")
        return rgba.getchannel("R") if grey else rgba.convert("RGB"), rgba.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


def _keyed(image: Image.Image, key: Any, depth: str) -> Image.Image:
    """A PNG's transparent colour in the depth that Pillow decodes to: 2 and 4 bits are widened, 16 narrowed."""
    wider = {"L;2": 85, "L;4": 17}.get(depth, 1)
    if wider > 1:
        key = key * wider
    elif isinstance(key, tuple) and depth.startswith("RGB;16"):
        key = tuple(x >> 8 for x in key)
    copy = image.copy()
    copy.info = {**image.info, "transparency": key}
    return copy


def _sixteen(image: Image.Image, key: Any) -> tuple[Image.Image, Image.Image | None]:
    numbers = np.asarray(image).clip(0, 65535).astype(np.uint16)
    alpha = None if key is None else Image.fromarray(np.where(numbers == key, np.uint8(0), np.uint8(255)))
    tags: Any = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    if tuple(tags.get(258, ())) == (12,):
        numbers = (numbers.astype(np.uint32) * 65535 // 4095).astype(np.uint16)
    if tags.get(262) == 0:  # MinIsWhite, which Pillow turns round for 8 bits only
        numbers = 65535 - numbers
    return Image.fromarray(numbers), alpha


def _srgb(colour: Image.Image, source: Image.Image) -> Image.Image:
    """By the profile, or for a PNG what stands for one; of mode RGB."""
    profile = source.info.get("icc_profile")
    if colour.mode == "LAB":
        return _transformed(colour, ImageCms.createProfile("LAB"), "LAB")
    if profile:
        converted = _by_profile(colour, profile)
        if converted is not None:
            return converted
    elif source.format == "PNG" and "srgb" not in source.info:
        converted = _by_gamma(colour, source.info)
        if converted is not None:
            return converted
    return _eight(colour).convert("RGB")


def _eight(colour: Image.Image) -> Image.Image:
    if colour.mode != "I;16":
        return colour
    return Image.fromarray(((np.asarray(colour) + np.uint32(128)) // 257).astype(np.uint8))


def _by_profile(colour: Image.Image, data: bytes) -> Image.Image | None:
    """None where a viewer would ignore the profile: it is broken, of another kind of picture, or sRGB itself."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        space = str(profile.profile.xcolor_space)
        mode = "L" if colour.mode == "I;16" else colour.mode
        if mode not in _SPACES.get(space, ()):
            return None
        if space == "RGB ":
            return None if is_srgb(data) else _transformed(_eight(colour).convert("RGB"), profile, "RGB")
        return _transformed(_eight(colour), profile, mode)
    except (ImageCms.PyCMSError, *UNREADABLE):
        return None


def _transformed(colour: Image.Image, profile: Any, mode: str) -> Image.Image:
    srgb = ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(profile, srgb, mode, "RGB", ImageCms.Intent.PERCEPTUAL)
    done = transform.apply(colour)
    return done


def is_srgb(data: bytes) -> bool:
    """Whether an ICC profile is one of RGB pictures that changes no colour by more than a rounding error.

    Raises
    ------
    PyCMSError
        It is none.
    """
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(9, 81, 3)
    profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
    if str(profile.profile.xcolor_space) != "RGB ":
        return False
    moved = np.asarray(_transformed(Image.fromarray(cube), profile, "RGB"))
    return bool(np.abs(moved.astype(int) - cube).max() <= 2)


def _by_gamma(colour: Image.Image, info: dict[Any, Any]) -> Image.Image | None:
    """A PNG with gAMA, and cHRM beside it, but no profile. None where they say sRGB, or nothing that can be used."""
    gamma, points = info.get("gamma"), info.get("chromaticity")
    if not gamma or not 0.05 < gamma < 20:
        return None
    matrix = None if points is None or colour.mode != "RGB" else _to_srgb_primaries(np.array(points))
    straight = abs(gamma * 2.2 - 1) < 0.05
    if straight and matrix is None:
        return None
    levels = np.linspace(0, 1, 65536 if colour.mode == "I;16" else 256, dtype=np.float32)
    light, pixels = _decoded(levels) if straight else levels ** (1 / gamma), np.asarray(colour)
    if matrix is None:
        return Image.fromarray(_encoded(light)[pixels]).convert("RGB")
    turn = matrix.T.astype(np.float32)
    rows = [_encoded((light[part] @ turn).clip(0, 1)) for part in np.array_split(pixels, -(-len(pixels) // 64))]
    return Image.fromarray(np.concatenate(rows))


def _to_srgb_primaries(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    """Linear light in these primaries to linear sRGB, ``[3, 3]``; None where they are sRGB's or cannot be."""
    if len(points) != 8 or not np.isfinite(points).all() or np.abs(points - _SRGB_WHITES).max() < 0.01:
        return None
    white, primaries = points[:2], points[2:].reshape(3, 2)
    if min(white[1], *primaries[:, 1]) <= 0:
        return None
    columns = np.stack([[x / y, 1, (1 - x - y) / y] for x, y in primaries], 1)
    light = np.array([white[0] / white[1], 1, (1 - white.sum()) / white[1]])
    try:
        to_xyz = columns * np.linalg.solve(columns, light)
    except np.linalg.LinAlgError:
        return None
    # both whites are white: no adaptation but that of the channels' sum
    back = np.linalg.inv(_SRGB_TO_XYZ) @ to_xyz
    matrix: npt.NDArray[np.float64] = back / back.sum(1, keepdims=True)
    return matrix


def _decoded(numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """sRGB in 0..1 to linear light."""
    low, high = numbers / 12.92, ((numbers + 0.055) / 1.055) ** 2.4
    return np.where(numbers <= 0.04045, low, high).astype(np.float32)


def _encoded(light: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Linear light to sRGB in 256 levels."""
    low, high = light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055
    return np.asarray((np.where(light <= 0.0031308, low, high) * 255).round(), np.uint8)
