"""A model's digest: a cache is only ever resumed on the model that made it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import google_crc32c
import torch
from transformers import PreTrainedModel

from kvferry.models.support import visual_token_ids

_FIELDS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "rope_parameters", "layer_types", "sliding_window",
)  # fmt: skip
_BY_LAYER = ("num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window")
_HOW_LOADED = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "_attn_implementation")
_CHUNK = 1 << 24
_DIGITS = 32
"""128 bits of SHA-256. No two models meet by chance before there are some 2**64 of them, and finding a second one for a
given digest takes 2**128 tries; against forged weights the CRCs that go in would be the weak point, not this."""

_known: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()


def folder_fingerprint(folder: Path, config: Any) -> str:
    """Digest of a checkpoint's weight files and of the configuration that shapes its cache."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    digest = _start(config)
    for path in files:
        digest.update(f"{path.stat().st_size}:{_file_crc(path):08x}\n".encode())
    return digest.hexdigest()[:_DIGITS]


def fingerprint_of(model: PreTrainedModel) -> str:
    """Digest of a model in memory, from its weights. Computed once per object: do not train it meanwhile."""
    if model not in _known:
        digest = _start(model.config)
        for name, tensor in sorted(model.state_dict().items()):
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            digest.update(f"{name}:{list(tensor.shape)}:{google_crc32c.value(data.tobytes()):08x}\n".encode())
        _known[model] = digest.hexdigest()[:_DIGITS]
    return _known[model]


def vision_fingerprint(model: PreTrainedModel) -> str:
    """Digest of the vision tower and the projector: two models that share it see a picture alike.

    Weights are compared in bfloat16, so that one checkpoint has one digest whatever it was loaded in.
    """
    vision = getattr(model.config, "vision_config", None)
    facts = {key: value for key, value in (vision.to_dict() if vision else {}).items() if key not in _HOW_LOADED}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if "language_model." in name or name.startswith("lm_head."):
            continue
        data = tensor.detach().to("cpu", torch.bfloat16).contiguous().flatten().view(torch.uint8).numpy()
        digest.update(f"{name}:{list(tensor.shape)}:{google_crc32c.value(data.tobytes()):08x}\n".encode())
    return digest.hexdigest()


def prompt_fingerprint(config: Any, tokenizer: Any, processor: Any, image_processor: Any) -> str:
    """Digest of what turns words and pictures into tokens: two models that share it count and place them alike."""
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    facts = {
        "tokenizer": {key: value for key, value in words.items() if key not in ("padding", "truncation")},
        "template": [getattr(source, "chat_template", None) for source in (processor, tokenizer)],
        "pictures": image_processor.to_dict() if image_processor is not None else None,
        "visual": sorted((token, int(kind)) for token, kind in visual_token_ids(config).items()),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _start(config: Any) -> hashlib._Hash:
    text = config.get_text_config(decoder=True)
    facts = {name: _fact(text, name) for name in _FIELDS}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())


def _fact(config: Any, name: str) -> Any:
    """One field; a list where layers differ in it."""
    if name in _BY_LAYER and getattr(config, "is_heterogeneous", False):
        return [getattr(own, name, None) for own in config.per_layer_config]
    return getattr(config, name, None)


def _file_crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = google_crc32c.extend(crc, chunk)
    return int(crc)
