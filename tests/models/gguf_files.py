"""GGUF files of a small Llama with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
import transformers as tf

CONFIG = tf.LlamaConfig(
    vocab_size=17 + 256 + 2, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>",
    "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>",
    "<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>",
)  # fmt: skip
"""SmolLM2's first tokens."""
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def turned(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as llama.cpp wants them: it rotates neighbouring channels, Transformers two halves."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: tf.LlamaForCausalLM, kind: gguf.GGMLQuantizationType) -> Path:
    """The model and a byte-level tokenizer."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_vocab_size(CONFIG.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*SPECIAL, *bytes_to_unicode().values(), "ab", "cd"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 17 + [gguf.TokenType.NORMAL] * 258)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, weight in model.state_dict().items():
        name = name.removeprefix("model.").removesuffix(".weight")
        if name == "lm_head":
            continue
        layer = name.removeprefix("layers.").split(".", 1)
        if name.startswith("layers."):
            short = f"blk.{layer[0]}.{NAMES[layer[1]]}"
            heads = {"attn_q": CONFIG.num_attention_heads, "attn_k": CONFIG.num_key_value_heads}
            if NAMES[layer[1]] in heads:
                weight = turned(weight, heads[NAMES[layer[1]]])
        else:
            short = {"embed_tokens": "token_embd", "norm": "output_norm"}[name]
        data = weight.detach().float().numpy()
        if data.ndim == 2:
            writer.add_tensor(f"{short}.weight", gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{short}.weight", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def small_llama() -> tf.LlamaForCausalLM:
    """Weights that bfloat16 holds exactly, large enough that attention is far from even."""
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(CONFIG).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(weight.normal_(std=0.3).bfloat16().float())
    return model
