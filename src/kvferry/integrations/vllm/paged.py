"""vLLM's paged cache of one layer: a prompt's keys and values into its blocks and out of them.

A page is ``[blocks, kv_heads, block_size, 2 * head_dim]``, a token's key before its value. That is how vLLM 0.33 shows
the caches of FlashAttention, FlashInfer and Triton whatever their order in memory (NHD or HND: strides only). Keys are
stored with their rotation on both sides, M-RoPE's too, so that nothing is turned.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvferry.cache import LayerCache
from kvferry.errors import InputError, UnsupportedModelError
from kvferry.lazy import torch


def check_page(page: torch.Tensor, block_size: int, name: str) -> None:
    """Refuse what is not a page of keys and values in bfloat16.

    Raises
    ------
    UnsupportedModelError
        By the name of the layer, with what it has instead.
    """
    shape = list(page.shape)
    if page.dtype != torch.bfloat16:
        raise UnsupportedModelError(
            f"{name} keeps its cache in {page.dtype}, caches from bitstreams are bfloat16; serve with "
            "--dtype bfloat16 --kv-cache-dtype auto"
        )
    if page.ndim != 4 or shape[2] != block_size or shape[3] % 2:
        raise UnsupportedModelError(
            f"the cache of {name} is {shape}, not [blocks, kv_heads, {block_size}, 2 * head_dim]: of latent attention "
            "(MLA), of another vLLM, or of a backend that packs it otherwise; use FLASH_ATTN and the vLLM that "
            "docs/vllm.md names"
        )


def check_layer(page: torch.Tensor, layer: LayerCache, name: str) -> None:
    """Refuse a layer that has other heads or channels than its page; InputError by the layer's name."""
    heads, channels = page.shape[1], page.shape[3] // 2
    found = (layer.heads, layer.keys.shape[2], layer.values.shape[2])
    if found != (heads, channels, channels):
        raise InputError(
            f"{name} has {heads} heads of {channels} channels, the cache has {found[0]} of {found[1]} (keys) and "
            f"{found[2]} (values); it is of another model"
        )


def write(page: torch.Tensor, layer: LayerCache, blocks: Sequence[int], start: int, stop: int) -> None:
    """Put the prompt's tokens ``start`` to ``stop`` of a whole layer where ``blocks`` says; nothing else is touched.

    Parameters
    ----------
    page : bfloat16 ``[blocks, kv_heads, block_size, 2 * head_dim]``
    layer : LayerCache
        Of every token, ``[kv_heads, length, head_dim]``.
    blocks : sequence of int
        The request's blocks from its first token on.

    Raises
    ------
    InputError
        There are not so many blocks, or tokens.
    """
    if not 0 <= start <= stop <= layer.keys.shape[1]:
        raise InputError(f"tokens {start} to {stop} of a cache of {layer.keys.shape[1]}")
    rows, offsets = _slots(page, blocks, start, stop)
    tokens = torch.cat((layer.keys[:, start:stop], layer.values[:, start:stop]), dim=-1)
    page[rows, :, offsets] = tokens.transpose(0, 1).to(page)


def read(page: torch.Tensor, blocks: Sequence[int], length: int) -> LayerCache:
    """The first ``length`` tokens of a request as a whole layer, in memory of its own on the CPU."""
    rows, offsets = _slots(page, blocks, 0, length)
    tokens = page[rows, :, offsets].transpose(0, 1).cpu()
    keys, values = (half.contiguous() for half in tokens.chunk(2, dim=-1))
    return LayerCache(keys, values, torch.arange(length).expand(len(keys), -1).contiguous())


def _slots(page: torch.Tensor, blocks: Sequence[int], start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Block and offset of each token, int64 ``[stop - start]``."""
    size = page.shape[2]
    if stop > len(blocks) * size:
        raise InputError(f"{len(blocks)} blocks of {size} do not hold {stop} tokens")
    if blocks and not 0 <= min(blocks) <= max(blocks) < len(page):
        raise InputError(f"blocks {min(blocks)} to {max(blocks)} of a cache that has {len(page)}")
    index = torch.arange(start, stop)
    return torch.tensor(blocks, dtype=torch.long)[index // size].to(page.device), (index % size).to(page.device)
