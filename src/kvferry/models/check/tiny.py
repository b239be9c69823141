"""A configuration of the same family, small enough to be tried out in a second."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from typing import Any

from transformers import PreTrainedConfig

from kvferry.models.support import field

VOCABULARY = 128
FIRST_SPECIAL = 96
"""Token ids of words lie below, those that mean something to the model are moved to here or above."""
WIDTH, HEADS, HEAD_DIM = 128, 4, 32
"""All towers get the same, so that whatever fits together in the large model does so here."""
WINDOW = 12
"""Of tokens; whatever begins to matter at a certain length does so within a small prompt."""
PATCH, IMAGE = 4, 16
_FIXED = {
    "image_grid_pinpoints": [[IMAGE, IMAGE], [IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE]],
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [1],
    "projector_patch_to_query_dict": {16: 4},
    "max_value_projector_patch_to_query_dict": 4,
}
LAYERS = 3

_LIMITS: tuple[tuple[int, str], ...] = (
    (HEADS, r"(\w+_)?(num_attention_heads|num_heads|n_heads?|attention_heads|num_query_heads)"),
    (HEAD_DIM, r"(global_|swa_|swa_v_|v_)?head_dim|attention_hidden_size|kv_channels|qk_(rope|nope)_head_dim"),
    (2 * HEAD_DIM, r"qk_head_dim"),
    (4 * WIDTH, r"merged_hidden_size"),
    (WIDTH, r"(\w+_)?(hidden_size|hidden_dim|hidden_channels|d_model|dim_model|model_dim|n_embd|projector_dim)"),
    (WIDTH, r"(\w+_)?(embed_dim|embedding_dim|embedding_size|proj_dim|projection_dim|projection_hidden_size)"),
    (WIDTH, r"dim|width|out_dim|output_dim|word_embed_dim|hidden_sizes?"),
    (
        96,
        r"(\w+_)?(intermediate_size|intermediate_dim|ffn_hidden_size|ffn_dim|mlp_dim)(_\w+)?|n_inner|d_ff|dim_ff|d_inner",
    ),
    (VOCABULARY, r"(\w+_)?vocab_size(_\w+)?"),
    (
        512,
        r"(\w+_)?max_position_embeddings|max_seq(uence)?_len(gth)?|seq_length|max_target_positions|n_positions|n_ctx",
    ),
    (WINDOW, r"(\w*sliding_|local_|attention_|swa_)?window(_size)?|attention_window_size|local_attention"),
    (WINDOW, r"attention_chunk_size|keep_window_size|index_topk|token_budget|floor_scale|log_scaling_n_floor"),
    (4, r"index_(block_size|topk_blocks|local_blocks)"),
    (4, r"(\w+_)?(num_experts|n_routed_experts|num_local_experts|moe_num_experts)"),
    (2, r"num_experts_per_tok(en)?|moe_k|top_k_experts|moe_topk|moe_top_k|num_selected_experts|experts_per_token"),
    (1, r"n_groups?|topk_group|num_expert_groups?|(n|num|moe_num)_shared_experts"),
    (1, r"first_k_dense_replace|num_dense_layers|moe_layer_start_index"),
    (2, r"(\w+_)?(num_hidden_layers|num_layers|n_layers?|decoder_layers|encoder_layers|depth)"),
    (16, r"(\w+_)?lora_rank|hidden_size_per_layer_input|linear_\w+_head_dim|mamba_d_\w+|ssm_state_size"),
    (HEAD_DIM, r"query_pre_attn_scalar"),
    (PATCH, r"patch_size"),
    (IMAGE, r"image_size|crop_size|max_image_size|min_image_size|image_seq_length|video_seq_length|image_seq_len"),
    (64, r"num_position_embeddings|num_patches|max_num_patches|position_embedding_size"),
    (8, r"pos_emb_(height|width)|posemb_grid_size"),
    (4, r"num_query_tokens|latent_query_num|resampler_(n|num)_latents|num_image_tokens"),
    (4, r"mm_tokens_per_image|vision_soft_tokens_per_image"),
)
_RULES = tuple((re.compile(names), limit) for limit, names in _LIMITS)
"""Whole numbers by the names that families give them, and what they are at most in a small model."""
_KEY_VALUE_HEADS = re.compile(r"(num|n)_(key_value|kv)_heads|num_kv_heads|multi_query_group_num")
_LAYER_NUMBERS = re.compile(r"\w*(layers|idxs|indices|indexes|layer_ids)")
_TOKEN_ID = re.compile(r"(\w+_)?(token_id|token_index|token_ids|_id|_idx)|\w+_token")


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of ``config`` with the same flags, kinds of layers and attention, and small numbers everywhere else."""
    small = copy.deepcopy(config)
    ids = _Ids(config)
    for part in walk(small):
        _shrink(part, ids)
        for name in ("_attn_implementation_internal", "_experts_implementation_internal"):
            if name in vars(part):
                setattr(part, name, None)
        part.name_or_path = ""
        vars(part).pop("quantization_config", None)
        part.dtype = None
    return small


def walk(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The configuration and all those inside it."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from walk(value)


class _Ids:
    """Moves token ids that mean something into the small vocabulary, one to one."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self._known: dict[int, int] = {}
        for part in walk(config):
            for name, value in sorted(vars(part).items()):
                if _TOKEN_ID.fullmatch(name):
                    for one in value if isinstance(value, list | tuple) else [value]:
                        if isinstance(one, int) and not isinstance(one, bool):
                            self.small(one)

    def small(self, token: int) -> int:
        """The new id."""
        if 0 <= token < 4 or token < 0:
            return token
        return self._known.setdefault(token, FIRST_SPECIAL + len(self._known) % (VOCABULARY - FIRST_SPECIAL))


def _shrink(config: PreTrainedConfig, ids: _Ids) -> None:
    fields = dict(vars(config))
    aliases = {real: alias for alias, real in config.attribute_map.items()}
    heads, head = _field(config, "num_attention_heads"), _head_dim(config)
    few = _number({"num_attention_heads"}, heads) if heads else HEADS
    count = _field(config, "num_hidden_layers") or 0
    kept = _kept_layers(config, fields)
    for name, value in fields.items():
        called, new = {name, aliases.get(name, name)}, value
        if kept and "num_hidden_layers" in called:
            new = len(kept)
        elif name in _FIXED:
            new = value if value is None else _FIXED[name]
        elif name == "vision_feature_layers" and isinstance(value, list | tuple):
            new = type(value)(max(min(x, 1), -2) for x in value)
        elif kept and _is_indices(name, value, count):
            new = type(value)(kept.index(x) for x in value if x in kept)
        elif kept and isinstance(value, list | tuple) and len(value) == count:
            new = type(value)(value[i] for i in kept)
        elif any(map(_KEY_VALUE_HEADS.fullmatch, called)) and isinstance(value, int):
            new = few if value == heads else min(value, 2)
        elif any(map(_TOKEN_ID.fullmatch, called)) and _is_ids(value):
            new = [ids.small(x) for x in value] if isinstance(value, list) else ids.small(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            new = _number(called, value)
        elif name in ("image_size", "patch_size") and isinstance(value, list | tuple):
            new = type(value)(_number(called, x) for x in value)
        elif name == "rope_parameters" and isinstance(value, dict):
            default = {"mrope_section": _own_sections(config)} if "rope_theta" in value else {}
            new = _rope(default | value, head)
        elif called & {"head_dim", "num_key_value_heads"} and value is None and heads:
            new = head if "head_dim" in called else few
        if new is not value:
            setattr(config, name, new)


def _head_dim(config: PreTrainedConfig) -> int:
    """Channels of a head in the small model."""
    width, heads, own = (_field(config, name) for name in ("hidden_size", "num_attention_heads", "head_dim"))
    if own:
        return min(own, HEAD_DIM)
    return min(width, WIDTH) // _number({"num_attention_heads"}, heads) if width and heads else HEAD_DIM


def _field(config: PreTrainedConfig, name: str) -> int | None:
    """A whole number, if that is what the field holds."""
    value = field(config, name)
    return value if isinstance(value, int) else None


def _is_ids(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(x, int) and not isinstance(x, bool) for x in values)


def _number(called: set[str], value: int) -> int:
    for pattern, limit in _RULES:
        if any(map(pattern.fullmatch, called)):
            return 2 if (value, limit) == (3, HEADS) else min(value, limit)  # widths are no multiples of three
    return value


def _kept_layers(config: PreTrainedConfig, fields: dict[str, Any]) -> list[int]:
    """Layers that show every kind of layer the model has, in its order; at least :data:`LAYERS` where there are."""
    count = _field(config, "num_hidden_layers")
    if not count:
        return []
    features: list[list[str]] = []
    for name, value in fields.items():
        if _is_indices(name, value, count):
            features.append([str(layer in value) for layer in range(count)])
        elif isinstance(value, list | tuple) and len(value) == count and len(set(map(repr, value))) < 5:
            features.append([repr(x) for x in value])
    kinds: list[tuple[str, ...]] = [tuple(feature[layer] for feature in features) for layer in range(count)]
    first = [layer for layer, kind in enumerate(kinds) if kinds.index(kind) == layer]
    rest = [layer for layer in range(count) if layer not in first]
    return sorted([*first, *rest[: max(0, LAYERS - len(first))]])


def _is_indices(name: str, value: Any, layers: int) -> bool:
    """Whether a list names layers by their number."""
    if not _LAYER_NUMBERS.fullmatch(name) or not isinstance(value, list | tuple) or not _is_ids(list(value)):
        return False
    return list(value) == sorted(set(value)) and value[0] >= 0 and value[-1] < layers


def _rope(parameters: dict[str, Any], head: int) -> dict[str, Any]:
    """Rotary parameters for heads of ``head`` channels."""
    small = dict(parameters)
    turned = int(head * parameters.get("partial_rotary_factor", 1.0)) // 2
    for name, value in parameters.items():
        if isinstance(value, dict):
            small[name] = _rope(value, head)
        elif name == "original_max_position_embeddings":
            small[name] = WINDOW if "llama_4_scaling_beta" in parameters else min(value, 512)
        elif name == "mrope_section" and value:
            small[name] = _sections(value, turned)
        elif name == "mrope_section":
            del small[name]
        elif name in ("short_factor", "long_factor") and value:
            small[name] = [value[i * len(value) // turned] for i in range(turned)]
    return small


def _sections(value: list[int], turned: int) -> list[int]:
    """M-RoPE's sections for small heads, in nearly the same shares."""
    small = [max(1, round(x * turned / sum(value))) for x in value]
    small[-1] += turned - sum(small)
    return small


def _own_sections(config: PreTrainedConfig) -> list[int]:
    """M-RoPE's sections that a family's code takes where the configuration names none."""
    with suppress(ImportError, OSError):
        code = import_module(type(config).__module__.replace("configuration_", "modeling_"))
        found = re.search(r"""["']mrope_section["'], \[([\d, ]+)\]""", inspect.getsource(code))
        return [int(x) for x in found[1].split(",")] if found else []
    return []
