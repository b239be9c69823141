"""lmms-eval with a compressed cache: ``lmms-eval --model kvferry --model_args pretrained=...,recipe=...``.

lmms-eval finds the model by the entry point ``lmms_eval.models`` of this package. Tried with lmms-eval 0.7.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """What lmms-eval registers; the model itself is imported when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("kvferry", simple_class_path="kvferry.integrations.lmms_eval_model.KVFerry")
