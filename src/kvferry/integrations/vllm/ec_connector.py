"""vLLM's ``ECConnectorBase``: pictures whose embeddings lie on a shelf are not encoded. Experimental, for vLLM 0.33.

Edges put there what mode ``embeds`` ships (bf16, int8, int4, ...). A file that is broken or of another vision tower is
named in vLLM's log, and vLLM encodes the picture itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorMetadata
from vllm.logger import init_logger

from kvferry.errors import InputError, KVFerryError, UnsupportedModelError
from kvferry.integrations.vllm.shelf import EmbedsShelf, needed
from kvferry.lazy import torch

logger = init_logger(__name__)


@dataclass
class Wanted(ECConnectorMetadata):
    """Visual tokens of each picture to load, by its identifier."""

    tokens: dict[str, int] = field(default_factory=dict)


class KVFerryECConnector(ECConnectorBase):
    """Fills vLLM's encoder cache with visual embeddings; consumes only.

    Its ``ec_connector_extra_config``:

    folder : str
        Of the shelf; see :class:`~kvferry.integrations.vllm.shelf.EmbedsShelf`.
    vision_fingerprint : str
        Of the vision tower, as ``kvferry.load(...).vision_fingerprint`` says.

    Raises
    ------
    UnsupportedModelError
        vLLM runs the model in other than bfloat16, or the model feeds its vision tower into several layers.
    InputError
        An option is missing, or vLLM is to produce embeddings.
    """

    def __init__(self, vllm_config: Any, role: Any) -> None:
        super().__init__(vllm_config, role)
        config, extra = vllm_config.model_config, vllm_config.ec_transfer_config.ec_connector_extra_config
        if self.is_producer:
            raise InputError("kvferry's edges write visual embeddings, vLLM reads them; give ec_role ec_consumer")
        if config.dtype != torch.bfloat16:
            raise UnsupportedModelError(f"embeddings are bfloat16, the model runs in {config.dtype}; --dtype bfloat16")
        vision = getattr(config.hf_config, "vision_config", None)
        merge = getattr(vision, "spatial_merge_size", None)
        if merge is None or getattr(vision, "deepstack_visual_indexes", None):
            raise UnsupportedModelError(
                f"{config.hf_config.model_type} has no patch grid, or feeds its vision tower into several layers, "
                "which one embedding per token does not hold; leave --ec-transfer-config out"
            )
        folder, fingerprint = Path(needed(extra, "folder")), needed(extra, "vision_fingerprint")
        self._shelf = EmbedsShelf(folder, fingerprint, int(config.get_hidden_size()), int(merge))
        self._known: dict[str, tuple[tuple[int, int], bool]] = {}
        self._wanted = Wanted()

    # In the scheduler

    def has_cache_item(self, identifier: str) -> bool:
        """Whether a picture's embeddings are there and whole; a file is read once as long as it stays the same."""
        path = self._shelf.path(identifier)
        try:
            stat = path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            if self._known.get(path.name, (None, False))[0] != stamp:
                if len(self._known) >= 4096:
                    self._known.clear()
                self._known[path.name] = (stamp, False)
                self._known[path.name] = (stamp, self._shelf.get(identifier) is not None)
            return self._known[path.name][1]
        except FileNotFoundError:
            return False
        except (KVFerryError, OSError) as error:
            logger.error("kvferry refuses visual embeddings, vLLM encodes the picture: %s", error)
            return False

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        """Order the load of a request's picture where it is there."""
        identifier = str(request.mm_features[index].identifier)
        if self.has_cache_item(identifier):
            self._wanted.tokens[identifier] = int(request.get_num_encoder_embeds(index))

    def build_connector_meta(self, scheduler_output: Any) -> Wanted:
        """This step's orders; the next step's start empty."""
        del scheduler_output
        wanted, self._wanted = self._wanted, Wanted()
        return wanted

    # In the worker

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        """Put this step's embeddings, ``[tokens, hidden]``, into the encoder cache.

        Raises
        ------
        KVFerryError
            What was whole a moment ago is not any more, or is of another picture: the step cannot be done.
        """
        from vllm.platforms import current_platform

        del kwargs
        for identifier, tokens in self._get_connector_metadata().tokens.items():
            if identifier in encoder_cache:
                continue
            picture = self._shelf.get(identifier)
            if picture is None:
                raise InputError(f"the embeddings of {identifier} were removed from {self._shelf.folder} just now")
            if len(picture.embeds) != tokens:
                raise InputError(
                    f"the embeddings of {identifier} are {len(picture.embeds)} tokens, its prompt has {tokens}: they "
                    "are of another picture or size; give each picture an identifier of its own"
                )
            encoder_cache[identifier] = picture.embeds.to(current_platform.device_type)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        """Nothing: the constructor refuses to produce."""
