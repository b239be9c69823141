"""Transformers' own keywords of loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kvferry import InputError, ModelError, UnsupportedModelError, load
from kvferry.models.options import NAMES, quantized


@pytest.mark.parametrize(
    ("options", "kind", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, InputError, r"takes no 'torch_dtype'; did you mean 'dtype'\?.*device_map"),
        ({"cache_dir": "x"}, InputError, ", ".join(NAMES)),
        ({"trust_remote_code": True}, UnsupportedModelError, "runs no code that comes with a checkpoint"),
        ({"device": "cpu", "device_map": "cpu"}, InputError, "pass one of them"),
        ({"revision": "main"}, InputError, "has no revision 'main'"),
        ({"min_pixels": 9, "max_pixels": 4}, InputError, "not 9 and 4"),
        ({"attn_implementation": "none_such"}, ModelError, "check attn_implementation"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, ModelError, "quantization_c"),
    ],
)
def test_refused(folder: Path, options: dict[str, Any], kind: type[Exception], expected: str) -> None:
    with pytest.raises(kind, match=expected):
        load(folder, **options)


def test_nobody_needs_trust(folder: Path) -> None:
    assert load(folder, trust_remote_code=False).layers == 2


def test_device_map_and_attention(folder: Path, picture: Image.Image) -> None:
    plain = load(folder, dtype="float32")
    other = load(folder, dtype=torch.float32, device_map={"": "cpu"}, attn_implementation="eager")
    assert other.fingerprint == plain.fingerprint
    assert other.model.model.visual.config._attn_implementation == "eager"
    first, second = (vlm.prefill([picture], "what?", recipe="snapkv@0.5").next_logits for vlm in (plain, other))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_pixels(folder: Path, picture: Image.Image) -> None:
    """Tokens are squares of 16 x 16 pixels."""
    plain, small = load(folder), load(folder, min_pixels=256, max_pixels=64 * 256)
    many, few = (int(vlm.prefill([picture], "what?").cache.layout.visual.sum()) for vlm in (plain, small))
    assert few <= 64 < many
    assert plain.prompt_fingerprint != small.prompt_fingerprint


def test_fewer_bits_are_another_model() -> None:
    four, eight = ({"quant_method": "bitsandbytes", "load_in_4bit": x} for x in (True, False))
    names = {quantized("abcd" * 4, x) for x in (None, four, eight)}
    assert len(names) == 3
    assert {len(name) for name in names} == {16}
