"""Both connectors against vLLM's own base classes, where it is installed; configurations and requests are stand-ins.

Without a GPU: `pip download --no-deps vllm==0.33.0`, unpack it, and put the folder (and what it imports) on PYTHONPATH.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import pytest
import torch

from kvferry.cache import KVCache
from kvferry.integrations import vllm as ours
from kvferry.recipe import compress, decompress
from tests.helpers import cache

KV = "vllm.distributed.kv_transfer.kv_connector.v1.base"
EC = "vllm.distributed.ec_transfer.ec_connector.base"
BLOCK = 4
BLOCKS = [9, 3, 17, 0, 5, 12, 8, 1, 14]


def base(module: str, name: str) -> type:
    found: type = getattr(pytest.importorskip(module, reason="vLLM is not installed", exc_type=ImportError), name)
    return found


@pytest.mark.parametrize(
    ("connector", "module", "name"),
    [("KVFerryConnector", KV, "KVConnectorBase_V1"), ("KVFerryECConnector", EC, "ECConnectorBase")],
)
def test_every_method_is_vllms(connector: str, module: str, name: str) -> None:
    theirs = base(module, name)
    mine = getattr(ours, connector)
    assert issubclass(mine, theirs)
    assert not mine.__abstractmethods__
    for method, written in vars(mine).items():
        if callable(written) and not method.startswith("_") and hasattr(theirs, method):
            wanted, given = (list(inspect.signature(x).parameters) for x in (getattr(theirs, method), written))
            assert given == wanted, f"{connector}.{method}"


@pytest.fixture
def made() -> KVCache:
    return cache(layers=3, heads=2, dim=8)


def connectors(folder: Path, made: KVCache) -> tuple[Any, Any]:
    """The scheduler's half and the worker's."""
    base(KV, "KVConnectorBase_V1")
    extra = {"folder": str(folder), "fingerprint": made.fingerprint}
    transfer = Namespace(kv_connector_extra_config=extra, is_kv_consumer=True, is_kv_producer=True)
    config = Namespace(
        kv_transfer_config=transfer, parallel_config=Namespace(), model_config=Namespace(uses_mrope=False)
    )
    spec = type("FullAttentionSpec", (), {"block_size": BLOCK})()
    groups = Namespace(kv_cache_groups=[Namespace(kv_cache_spec=spec)])
    one, two = (ours.KVFerryConnector(config, None, groups) for _ in range(2))
    return one, two


def pages_of(worker: Any, layers: int) -> dict[str, torch.Tensor]:
    """Poisoned ones."""
    pages = {f"model.layers.{i}.self_attn.attn": torch.full((20, 2, BLOCK, 16), torch.nan) for i in (2, 0, 1)[:layers]}
    pages = {name: page.bfloat16() for name, page in pages.items()}
    worker.register_kv_caches(pages)
    return pages


def slot(pages: dict[str, torch.Tensor], layer: int, token: int) -> torch.Tensor:
    return pages[f"model.layers.{layer}.self_attn.attn"][BLOCKS[token // BLOCK], :, token % BLOCK]


def test_a_cache_lands_in_its_blocks(tmp_path: Path, made: KVCache) -> None:
    scheduler, worker = connectors(tmp_path, made)
    pages = pages_of(worker, 3)
    ids = made.layout.token_ids.tolist()
    request = Namespace(request_id="r", prompt_token_ids=ids, mm_features=[], num_computed_tokens=len(ids))
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    scheduler.update_state_after_alloc(request, None, 0)
    path = ours.CacheShelf(tmp_path, made.fingerprint).put(compress(made, "full|int8"))
    more, later = scheduler.get_num_new_matched_tokens(request, BLOCK)
    assert more > 0
    assert more % BLOCK == 0
    assert BLOCK + more < len(ids), "the last token is vLLM's own, to have logits"
    assert not later

    def load() -> None:
        scheduler.update_state_after_alloc(request, Namespace(get_block_ids=lambda: (BLOCKS,)), more)
        worker.bind_connector_metadata(scheduler.build_connector_meta(None))
        worker.start_load_kv(None)

    load()
    assert not worker.get_block_ids_with_load_errors()
    wanted = decompress(path.read_bytes())
    for i, layer in enumerate(wanted.layers):
        for token in range(BLOCK, BLOCK + more):
            assert torch.equal(slot(pages, i, token), torch.cat((layer.keys[:, token], layer.values[:, token]), -1))
        assert slot(pages, i, 0).isnan().all(), "a block that was there already was written"
    worker.clear_connector_metadata()

    path.write_bytes(path.read_bytes()[:-9])
    assert scheduler.get_num_new_matched_tokens(request, BLOCK) in ((more, False), (0, False))
    load()
    assert worker.get_block_ids_with_load_errors() == set(BLOCKS[1 : 1 + more // BLOCK])
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)


def test_a_prompt_is_saved_and_found(tmp_path: Path, made: KVCache) -> None:
    scheduler, worker = connectors(tmp_path, made)
    pages = pages_of(worker, 3)
    for i, layer in enumerate(made.layers):
        for token in range(made.length):
            slot(pages, i, token)[:] = torch.cat((layer.keys[:, token], layer.values[:, token]), -1)
    ids = made.layout.token_ids.tolist()
    request = Namespace(request_id="r", prompt_token_ids=ids, mm_features=[], num_computed_tokens=len(ids))
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    scheduler.update_state_after_alloc(request, Namespace(get_block_ids=lambda: (BLOCKS,)), 0)
    scheduler.request_finished(request, BLOCKS)
    worker.bind_connector_metadata(scheduler.build_connector_meta(None))
    worker.get_transfer_results({"r"})
    saved = ours.CacheShelf(tmp_path, made.fingerprint).get(ids)
    assert saved is not None
    for one, other in zip(saved, made, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
