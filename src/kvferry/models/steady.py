"""Arithmetic on a CPU whose result for a token does not depend on what else is computed with it.

Libraries of matrix products choose another order of summation for one row than for many, and another one again for a
longer sum; a token's logits then differ in their last bits by who shares the pass. Here they do not: weights are packed
once for oneDNN's float32 product, whose rows are each other's equals however many there are, and attention adds up in
blocks of keys that are the same for all. So a batch says what each of its sequences says alone, and a prompt read in
parts leaves the cache that it leaves in one.

It is also what makes a batch worth while where a CPU has no bfloat16 instructions (AVX-512 BF16, AMX): PyTorch's own
bfloat16 product reads one row at a time there, a tenth as fast as float32's for many rows. Inputs and outputs stay in
the model's dtype; in between, sums are float32, as in every bfloat16 product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel

KEYS = 128
"""Keys whose values are added up at once: MKL splits longer sums where it likes."""
ROWS = 4
"""Fewer rows than that are multiplied in another order."""
LOGITS = 1 << 22
"""Of one block of query rows: 16 MiB."""
MARK = "_kvferry_steady"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def steady(model: PreTrainedModel) -> bool:
    """Let ``model`` compute like that from now on, if it lies on a CPU; whether it does.

    Takes the memory of its linear layers in float32. Weights that change later are not noticed.
    """
    if is_steady(model):
        return True
    if model.device.type != "cpu" or model.dtype not in DTYPES or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    linears = [x for x in model.modules() if type(x) is torch.nn.Linear and x.weight.dtype in DTYPES]
    with torch.inference_mode():
        for linear in linears:
            vars(linear)["forward"] = _packed(linear)
    for module in model.modules():
        if module is model or isinstance(getattr(module, "layer_idx", None), int):
            setattr(module, MARK, True)
    return True


def is_steady(module: torch.nn.Module) -> bool:
    """Whether a model, or the attention module of one, was made :func:`steady`."""
    return bool(getattr(module, MARK, False))


def _packed(linear: torch.nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer's forward pass: float32 sums, rounded to the dtype of its weights."""
    dtype = linear.weight.dtype
    weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().float().contiguous(), None)
    bias = None if linear.bias is None else linear.bias.detach().float()
    multiply: Any = torch.ops.mkldnn._linear_pointwise

    def forward(input: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = multiply(input.float(), weight, bias, "none", [], "")
        return output.to(dtype)

    return forward


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    *,
    causal: bool = False,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention.

    Parameters
    ----------
    query : ``[b, query_heads, n, d]``
    key, value : ``[b, kv_heads, keys, d]``
    mask : bool or additive ``[b or 1, 1 or kv_heads or query_heads, n, keys]``, optional
    causal : bool
        Without a mask: the queries are the last tokens and see no later ones.
    softcap, sinks
        See :class:`kvferry.models.blockwise.Rule`.

    Returns
    -------
    ``[b, n, query_heads, d]`` in the dtype of ``query``.
    """
    (b, heads, n, d), (kv_heads, keys) = query.shape, key.shape[1:3]
    if short := -keys % KEYS:
        key, value = pad(key, (0, 0, 0, short)), pad(value, (0, 0, 0, short))
    q = (query.float() * scaling).view(b, kv_heads, heads // kv_heads, n, d)
    k = key.float().reshape(b * kv_heads, keys + short, -1)
    v = value.float().reshape(b * kv_heads, keys + short, -1)
    bias = _bias(mask, query, keys, causal)
    output = query.new_empty(b, n, heads, v.shape[-1])
    step = max(1, LOGITS // (b * heads * (keys + short)))
    for first in range(0, n, step):
        some = slice(first, first + step)
        out = _block(q[:, :, :, some], k, v, keys, None if bias is None else bias[:, :, some], softcap, sinks)
        output[:, some] = out.to(query.dtype)
    return output


def _block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: int,
    bias: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Some query rows, ``[b, kv_heads, group, r, d]`` -> float32 ``[b, r, query_heads, d]``."""
    b, kv_heads, group, r, d = q.shape
    rows = q.reshape(b * kv_heads, group * r, d)
    if group * r < ROWS:
        rows = pad(rows, (0, 0, 0, ROWS - group * r))
    logits = torch.bmm(rows, k.transpose(1, 2))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        wide = logits[:, : group * r].view(b, kv_heads, group, r, -1)
        wide[..., :keys] += _grouped(bias, kv_heads)
    logits[..., keys:] = float("-inf")
    if sinks is not None:
        extra = sinks.float().view(1, kv_heads, group, 1).expand(b, -1, -1, r).reshape(b * kv_heads, -1, 1)
        extra = pad(extra, (0, 0, 0, rows.shape[1] - group * r))
        shares = torch.cat([logits, extra], dim=-1).softmax(-1)[..., :-1]
    else:
        shares = logits.softmax(-1)
    total: torch.Tensor | None = None
    for first in range(0, k.shape[1], KEYS):
        part = torch.bmm(shares[..., first : first + KEYS], v[:, first : first + KEYS])
        total = part if total is None else total.add_(part)
    assert total is not None
    return total[:, : group * r].view(b, kv_heads, group, r, -1).permute(0, 3, 1, 2, 4).reshape(b, r, -1, v.shape[-1])


def _grouped(bias: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """``[b, 1 or kv_heads or query_heads, r, keys]`` as ``[b, 1 or kv_heads, 1 or group, r, keys]``."""
    if bias.shape[1] in (1, kv_heads):
        return bias[:, :, None]
    return bias.view(len(bias), kv_heads, -1, *bias.shape[2:])


def _bias(mask: torch.Tensor | None, query: torch.Tensor, keys: int, causal: bool) -> torch.Tensor | None:
    """What is added to the logits, float32."""
    if mask is None:
        if not causal or query.shape[2] == 1:
            return None
        n = query.shape[2]
        future = torch.arange(keys, device=query.device) > torch.arange(keys - n, keys, device=query.device)[:, None]
        return torch.zeros(n, keys, device=query.device).masked_fill_(future, float("-inf"))[None, None]
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))
    return mask.float()
