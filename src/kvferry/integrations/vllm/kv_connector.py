"""vLLM's ``KVConnectorBase_V1``: prompts whose cache lies on a shelf are not computed. Experimental, for vLLM 0.33.

What cannot be used (another model's cache, one with evicted tokens, a broken file) is named in vLLM's log, and vLLM
computes the prompt itself. What breaks between the look and the load is reported as failed blocks, over which
``kv_load_failure_policy`` decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata
from vllm.logger import init_logger

from kvferry.cache import KVCache, Modality, PromptLayout, Role
from kvferry.errors import InputError, KVFerryError, UnsupportedModelError
from kvferry.integrations.vllm import paged
from kvferry.integrations.vllm.shelf import CacheShelf, needed
from kvferry.lazy import torch
from kvferry.recipe import Recipe, compress

logger = init_logger(__name__)


@dataclass(frozen=True)
class Load:
    """Tokens ``start`` to ``stop`` of a prompt that go into the request's ``blocks``."""

    token_ids: list[int]
    pictures: list[str]
    blocks: list[int]
    start: int
    stop: int


@dataclass(frozen=True)
class Save:
    """A finished request whose prompt is kept; ``spans`` are (offset, length) of its pictures."""

    request: str
    token_ids: list[int]
    pictures: list[str]
    spans: list[tuple[int, int]]
    blocks: list[int]


@dataclass
class Orders(KVConnectorMetadata):
    """What the scheduler tells the worker for one step."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)


class KVFerryConnector(KVConnectorBase_V1):
    """Fills vLLM's paged cache from bitstreams, and writes prompts' caches as such.

    Its ``kv_connector_extra_config``:

    folder : str
        Of the shelf; see :class:`~kvferry.integrations.vllm.shelf.CacheShelf`.
    fingerprint : str
        Of the model, as ``kvferry.load(...).fingerprint`` says.
    recipe : str, optional
        How a producer writes: any that keeps all tokens. ``full|bf16`` unless it is given.

    Raises
    ------
    UnsupportedModelError
        The model's cache is split over devices or layer groups, quantized, or not of full attention.
    InputError, RecipeError
        An option is missing, or the recipe drops tokens.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check_setup(vllm_config, kv_cache_config)
        extra = self._kv_transfer_config.kv_connector_extra_config
        self._shelf = CacheShelf(Path(needed(extra, "folder")), needed(extra, "fingerprint"))
        self._recipe = whole_recipe(str(extra.get("recipe", "full|bf16")))
        self._block_size = int(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)
        self._mrope = bool(vllm_config.model_config.uses_mrope)
        self._known: dict[str, tuple[tuple[int, int], int]] = {}
        self._starts: dict[str, int] = {}
        self._orders = Orders()
        self._pages: list[tuple[str, torch.Tensor]] = []
        self._failed: set[int] = set()

    # In the scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens on the shelf beyond those that vLLM has, in whole blocks; the last of a prompt is always computed."""
        self._starts[request.request_id] = num_computed_tokens
        if not self._kv_transfer_config.is_kv_consumer or not plain(request):
            return 0, False
        there = self._length(list(request.prompt_token_ids), pictures_of(request))
        most = min(there, len(request.prompt_token_ids) - 1)
        return max(most - most % self._block_size - num_computed_tokens, 0), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Order the load that :meth:`get_num_new_matched_tokens` promised."""
        start = self._starts.pop(request.request_id, 0)
        if num_external_tokens:
            ids, pictures = list(request.prompt_token_ids), pictures_of(request)
            held = list(blocks.get_block_ids()[0])
            self._orders.loads.append(Load(ids, pictures, held, start, start + num_external_tokens))

    def build_connector_meta(self, scheduler_output: Any) -> Orders:
        """This step's orders; the next step's start empty."""
        del scheduler_output
        orders, self._orders = self._orders, Orders()
        return orders

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Keep a finished prompt's blocks for one step more where it is to be saved."""
        self._starts.pop(request.request_id, None)
        if not self._kv_transfer_config.is_kv_producer or not plain(request):
            return False, None
        ids, pictures = list(request.prompt_token_ids), pictures_of(request)
        computed = min(int(request.num_computed_tokens), len(block_ids) * self._block_size)
        if len(ids) < 2 or computed < len(ids) or self._shelf.path(ids, pictures).exists():
            return False, None
        if pictures and self._mrope:
            logger.warning_once("kvferry saves no prompts with pictures under M-RoPE: vLLM does not say their places")
            return False, None
        spans = [(int(x.mm_position.offset), int(x.mm_position.length)) for x in request.mm_features]
        self._orders.saves.append(Save(request.request_id, ids, pictures, spans, list(block_ids)))
        return True, None

    def _length(self, ids: list[int], pictures: list[str]) -> int:
        """As the shelf says; a file is read once as long as it stays the same."""
        path = self._shelf.path(ids, pictures)
        try:
            stat = path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            if self._known.get(path.name, (None, 0))[0] != stamp:
                if len(self._known) >= 4096:
                    self._known.clear()
                self._known[path.name] = (stamp, 0)  # what is refused now is refused until the file changes
                self._known[path.name] = (stamp, self._shelf.length(ids, pictures))
            return self._known[path.name][1]
        except FileNotFoundError:
            return 0
        except (KVFerryError, OSError) as error:
            logger.error("kvferry refuses a cache, vLLM computes the prompt: %s", error)
            return 0

    # In the worker

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Look at the pages of all layers once; UnsupportedModelError where they are not keys and values in bf16."""
        self._pages = pages_of(kv_caches, self._block_size)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Fill the blocks of this step's requests; on return they are filled, or known to have failed."""
        del forward_context, kwargs
        for load in self._get_connector_metadata().loads:
            try:
                self._load(load)
            except (KVFerryError, OSError) as error:
                logger.error("kvferry cannot load a cache that was there: %s", error)
                first, last = load.start // self._block_size, -(-load.stop // self._block_size)
                self._failed.update(load.blocks[first:last])

    def _load(self, load: Load) -> None:
        cache = self._shelf.get(load.token_ids, load.pictures)
        if len(cache.layers) != len(self._pages):
            raise InputError(f"the cache has {len(cache.layers)} layers, the model {len(self._pages)}")
        for layer, (name, page) in zip(cache, self._pages, strict=True):
            paged.check_layer(page, layer, name)
        for layer, (_, page) in zip(cache, self._pages, strict=True):
            paged.write(page, layer, load.blocks, load.start, load.stop)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is left to wait for."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: a prompt is saved when its request is finished, since it may be computed in several steps."""

    def wait_for_save(self) -> None:
        """Nothing is left to wait for."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Save what the scheduler ordered; all of it is done on return, so that its blocks may go."""
        del finished_req_ids
        saves = self._get_connector_metadata().saves if self.has_connector_metadata() else []
        for save in saves:
            try:
                self._save(save)
            except (KVFerryError, OSError) as error:
                logger.error("kvferry cannot save a cache: %s", error)
        return {save.request for save in saves} or None, None

    def _save(self, save: Save) -> None:
        length = len(save.token_ids) - 1  # the last token is fed again on resuming
        layers = tuple(paged.read(page, save.blocks, length) for _, page in self._pages)
        cache = KVCache(layers, layout_of(save.token_ids, save.spans), length, self._shelf.fingerprint)
        self._shelf.put(compress(cache, self._recipe), save.pictures)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that failed since the last call."""
        failed, self._failed = self._failed, set()
        return failed


def check_setup(vllm_config: Any, kv_cache_config: Any) -> None:
    """Refuse what the connector would do wrongly; UnsupportedModelError by the name of it."""
    parallel = vllm_config.parallel_config
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, name, 1) != 1:
            raise UnsupportedModelError(f"{name}={getattr(parallel, name)}: caches go to one device; leave it at 1")
    groups = kv_cache_config.kv_cache_groups
    kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
    if len(groups) != 1 or kinds != ["FullAttentionSpec"]:
        raise UnsupportedModelError(
            f"the model's cache is of {len(groups)} groups ({', '.join(kinds)}); only one of full attention can be "
            "filled: not latent attention (MLA), state spaces, or windows of their own"
        )


def whole_recipe(text: str) -> Recipe:
    """A recipe that keeps all tokens; InputError for others."""
    recipe = Recipe.parse(text)
    if not str(recipe).startswith("full|"):
        raise InputError(f"{text} drops tokens, which vLLM's cache cannot hold; write with full|..., as full|int8")
    return recipe


def plain(request: Any) -> bool:
    """Whether the prompt is token ids and pictures for the model itself: no embeddings, no LoRA, no salt."""
    others = ("lora_request", "prompt_embeds", "cache_salt")
    return bool(request.prompt_token_ids) and not any(getattr(request, x, None) is not None for x in others)


def pictures_of(request: Any) -> list[str]:
    """vLLM's identifiers of a prompt's pictures, in prompt order."""
    return [str(feature.identifier) for feature in request.mm_features]


def pages_of(kv_caches: Mapping[str, torch.Tensor], block_size: int) -> list[tuple[str, torch.Tensor]]:
    """Names and pages by layer number; UnsupportedModelError where layers share caches or are not of attention."""
    numbered = {}
    for name, page in kv_caches.items():
        if not isinstance(page, torch.Tensor):
            raise UnsupportedModelError(f"{name} keeps {type(page).__name__}, not keys and values")
        paged.check_page(page, block_size, name)
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        if len(numbers) != 1:
            raise UnsupportedModelError(f"{name} does not say which layer it is; kvferry cannot place its cache")
        numbered[numbers[0]] = (name, page)
    if sorted(numbered) != list(range(len(kv_caches))):
        raise UnsupportedModelError(f"layers {sorted(numbered)} have caches; kvferry fills models where each has one")
    return [numbered[index] for index in range(len(numbered))]


def layout_of(token_ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> PromptLayout:
    """The layout of a prompt with positions that count its tokens; all of it is context."""
    ids = np.asarray(token_ids, dtype=np.int32)
    modality = np.full(len(ids), Modality.TEXT, dtype=np.uint8)
    for offset, length in spans:
        modality[offset : offset + length] = Modality.IMAGE
    places = np.arange(len(ids), dtype=np.int32)[None]
    return PromptLayout(ids, modality, np.full_like(modality, Role.CONTEXT), places)
