"""Load a model by name: a folder, a model that ships with the project, or a Hub id."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from kvferry.checkpoint import find_checkpoint, hub_gguf
from kvferry.errors import InputError, ModelError
from kvferry.models.check.families import class_for
from kvferry.models.fingerprint import folder_fingerprint
from kvferry.models.gguf import folder_of
from kvferry.models.grown import folder_of_grown, is_grown, language_of
from kvferry.models.options import check_names, check_placed, quantized, weights_options, with_pixels
from kvferry.models.support import check_kind, visual_token_ids
from kvferry.models.vlm import VLM
from kvferry.pictures.familiar import TrainingPictures

_UNAVAILABLE = (OSError, ValueError, ImportError, TypeError, KeyError, AttributeError)
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_OTHERS = ["original/*", "consolidated*"]


def load(
    name: str | Path,
    *,
    device: Any = None,
    dtype: Any = "auto",
    device_map: Any = None,
    revision: str | None = None,
    quantization_config: Any = None,
    attn_implementation: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    **unknown: Any,
) -> VLM:
    """Load a model with its tokenizer and image processor.

    Parameters
    ----------
    name : str or path
        A local folder, a shipped model such as ``testbed/edge``, ``smollm2``, or a Hub id. A GGUF file, or a folder
        with one, is written once as an ordinary model folder (:func:`kvferry.models.gguf.folder_of`).
    device : str or torch.device, optional
        Such as ``cuda`` or ``cuda:1``; by default the CPU.
    dtype : "auto", str or torch.dtype
        ``auto`` takes the checkpoint's own.
    device_map, quantization_config, attn_implementation : optional
        As Transformers' ``from_pretrained`` takes them. The attention of the language model stays kvferry's own, which
        gives what SDPA gives; a vision tower's is the one that is named. A model in fewer bits has a fingerprint of its
        own.
    revision : str, optional
        Branch, tag or commit of a model on the Hub.
    min_pixels, max_pixels : int, optional
        Of the size that pictures are scaled to, for the Qwen-VL families.

    Raises
    ------
    InputError
        A keyword that does not exist, or does not fit the others.
    ModelError
        Not a model folder, an unknown name, no network, or a device that is not here.
    UnsupportedModelError
        A family that cannot be served.
    """
    check_names(unknown)
    options = weights_options(device, device_map, quantization_config, attn_implementation)
    where = _device(device)
    folder = find_folder(str(name), revision)
    try:
        config = AutoConfig.from_pretrained(folder)
        check_kind(class_for(config), config)
        kind = AutoModelForImageTextToText if visual_token_ids(config) else AutoModelForCausalLM
        model, loaded = kind.from_pretrained(folder, dtype=_dtype(dtype), output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = model if {"device_map", "quantization_config"} & set(options) else model.to(where)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        advice = f"check {', '.join(options)}" if options else "check that the folder is a complete model"
        raise ModelError(f"{name} cannot be loaded ({reason}); {advice}") from error
    check_placed(model)
    if loaded["missing_keys"]:
        missing = f"{len(loaded['missing_keys'])} weights are missing, such as {min(loaded['missing_keys'])}"
        raise ModelError(f"{name} cannot be loaded ({missing}); check that the folder is a complete model")
    processor, image_processor = _processors(folder, tokenizer) if visual_token_ids(config) else (None, None)
    return VLM(
        model,
        tokenizer,
        processor,
        with_pixels(image_processor, min_pixels, max_pixels),
        name=str(name),
        fingerprint=quantized(folder_fingerprint(folder, config), quantization_config),
        training=TrainingPictures.of(folder),
    )


def find_folder(name: str, revision: str | None = None) -> Path:
    """The folder that a name stands for; a Hub id is downloaded first, a GGUF file unpacked."""
    if (here := find_checkpoint(name)) is not None:
        if revision is not None:
            raise InputError(f"{name} lies here and has no revision {revision!r}; leave revision out")
        if is_grown(here):
            return folder_of_grown(here, find_folder(language_of(here)))
        return here if here.is_dir() else folder_of(here)
    if in_repository := hub_gguf(name):
        return folder_of(_download(*in_repository, revision=revision))
    folder = _download(name, revision=revision)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{name} on the Hub has no config.json; if it holds GGUF files, name one: {name}/FILE.gguf")
    return folder


def config_folder(name: str) -> Path:
    """Like :func:`find_folder`, but of a Hub id only the configuration is fetched."""
    if find_checkpoint(name) is not None or hub_gguf(name):
        return find_folder(name)
    return _download(name, "config.json").parent


def _download(name: str, file: str | None = None, revision: str | None = None) -> Path:
    """A repository's folder, or one file of it."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if file:
            return Path(hf_hub_download(name, file, revision=revision))
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES, ignore_patterns=_OTHERS))
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{name} is not a folder here and the Hugging Face Hub cannot be reached; check the name or the network"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{name} is neither a folder nor a model on the Hub ({reason}); check the name") from None


def _device(device: Any) -> torch.device:
    """A device that holds tensors here and now."""
    try:
        found = torch.device("cpu" if device is None else device)
        usable = not torch.empty(1, device=found).is_meta
    except (RuntimeError, TypeError, AssertionError):  # the last one: built without it
        usable = False
    if not usable:
        raise ModelError(f"this machine has no device {str(device)!r} for a model; use {', '.join(_devices())}")
    return found


def _devices() -> list[str]:
    """Those that a model can lie on here."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator else 0
    return ["cpu", *(f"{accelerator}:{index}" for index in range(count))]


def _dtype(dtype: Any) -> Any:
    if not isinstance(dtype, str) or dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"{dtype!r} is not a dtype for a model; use auto, float32, bfloat16 or float16")
    return found


def _processors(folder: Path, tokenizer: Any) -> tuple[Any, Any]:
    """Processor and image processor; either is None where it is not needed or this machine cannot make it.

    For the Qwen-VL families the image processor is enough. (Without torchvision their processors refuse to load, for
    want of a video processor.)
    """
    processor = image_processor = None
    try:
        image_processor = AutoImageProcessor.from_pretrained(folder)
    except _UNAVAILABLE:
        with suppress(*_UNAVAILABLE):
            image_processor = _pil_image_processor(folder)
    if not hasattr(image_processor, "merge_size") or not tokenizer.chat_template:
        with suppress(*_UNAVAILABLE):
            processor = AutoProcessor.from_pretrained(folder)
    return (processor if hasattr(processor, "image_processor") else None), image_processor


def _pil_image_processor(folder: Path) -> Any:
    """The PIL form of a checkpoint's image processor; older Transformers want torchvision to find it by itself."""
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    kind = str(settings["image_processor_type"]).removesuffix("Fast").removesuffix("Pil") + "Pil"
    return getattr(transformers, kind).from_pretrained(folder)
