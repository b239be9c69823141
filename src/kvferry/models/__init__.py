"""Models: load, prefill with evidence, resume from a cache. The only floor that imports transformers."""

from kvferry.models.compressing import Report, SequenceReport, compressing
from kvferry.models.decoding import Decoding
from kvferry.models.embeds import VisualEmbeds
from kvferry.models.layout import layout_of
from kvferry.models.load import load
from kvferry.models.prefill import prefill_inputs
from kvferry.models.pruning import Pruning, prefill_flops
from kvferry.models.resume import Continuation, Decoder, continue_from
from kvferry.models.tower_pruning import TowerPruning
from kvferry.models.vlm import VLM

__all__ = [
    "VLM", "Continuation", "Decoder", "Decoding", "Pruning", "Report", "SequenceReport", "TowerPruning",
    "VisualEmbeds", "compressing", "continue_from", "layout_of", "load", "prefill_flops", "prefill_inputs",
]  # fmt: skip
