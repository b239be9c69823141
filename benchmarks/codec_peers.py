"""What others make of the same keys and values, where their packages are installed; else nothing.

Each pair of functions packs and unpacks one tensor ``[1, kv_heads, kept, head_dim]`` in BF16. Transformers' quantized
caches are used through their own layers. None of them writes bytes that could be sent: they keep tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch

Pair = tuple[str, Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]


def peers() -> Iterator[Pair]:
    """Name, pack, unpack."""
    if find_spec("optimum") and find_spec("optimum.quanto"):
        yield from _quanto()
    if find_spec("hqq"):
        yield from _hqq()
    if find_spec("torchao"):
        yield from _torchao()


def _quanto() -> Iterator[Pair]:
    """In groups of 64 along a token's channels, as ``QuantizedCache(backend="quanto")`` does."""
    from transformers.cache_utils import QuantoQuantizedLayer

    for bits in (4, 2):
        layer = QuantoQuantizedLayer(nbits=bits)
        yield f"transformers quanto int{bits}", lambda x, layer=layer: layer._quantize(x, 0), layer._dequantize


def _hqq() -> Iterator[Pair]:
    """HQQ's quantizer with the settings of ``HQQQuantizedLayer``, whose own ``_quantize`` moves to a GPU."""
    from hqq.core.quantize import Quantizer

    for bits in (8, 4):
        pack: Callable[[torch.Tensor], Any] = lambda x, bits=bits: Quantizer.quantize(  # noqa: E731
            x, nbits=bits, axis=0, group_size=64, device="cpu", compute_dtype=x.dtype
        )
        yield f"hqq int{bits}", pack, lambda packed: Quantizer.dequantize(*packed)


def _torchao() -> Iterator[Pair]:
    """Symmetric INT8 with one scale per token; no narrower format is packed by these functions."""
    from torchao.quantization import quant_primitives as ao

    def pack(x: torch.Tensor) -> Any:
        block = (1, 1, 1, x.shape[-1])
        scale, zero = ao.choose_qparams_affine(x, ao.MappingType.SYMMETRIC, block, torch.int8)
        return ao.quantize_affine(x, block, scale, zero, torch.int8), block, scale, zero

    def unpack(packed: Any) -> torch.Tensor:
        numbers, block, scale, zero = packed
        return ao.dequantize_affine(numbers, block, scale, zero, torch.int8, output_dtype=torch.bfloat16)

    yield "torchao int8", pack, unpack
