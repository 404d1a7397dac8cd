"""A tiny random model of any causal language model type of the installed transformers library.

A configuration's own figures are read and shrunk by what their names say: widths, heads, ranks, experts, vocabularies,
depths. Figures that name layers (lists with one entry a layer, sets of layer numbers, periods) are cut to match, so
that at least two layers of each kind stay. What only one type needs stands in `FIGURES`, in this file and nowhere else.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

VOCABULARY, WIDTH, INNER, EXPERT_INNER = 128, 64, 96, 48
HEADS, GROUPS, HEAD, RANK, EXPERTS = 4, 2, 16, 16, 4
MOST_LAYERS = 8
NOISE = 0.1  # on biases and norm weights, which start as zeros and ones

# figure → size; a smaller default stays. The names are those of the library's configurations.
SIZES: dict[str, int] = {
    name: size
    for size, names in (
        (VOCABULARY, "vocab_size vocab_size_per_layer_input decoder_vocab_size audio_vocab_size unpadded_vocab_size"),
        (
            WIDTH,
            """hidden_size d_model n_embd embed_dim dim emb_dim embedding_size word_embed_proj_dim embedding_dim
            hidden_size_global input_embedding_size output_embedding_size backbone_hidden_size out_hidden_size lru_width
            attention_hidden_size dim_model_base input_size vision_output_dim adapter_in_dim adapter_out_dim
            adapter_input_size""",
        ),
        (
            INNER,
            """intermediate_size ffn_dim n_inner d_ff dff dim_ff d_inner ffn_hidden_size decoder_ffn_dim
            encoder_ffn_dim intermediate_size_mlp feed_forward_size mlp_dim dense_intermediate_size""",
        ),
        (
            EXPERT_INNER,
            """moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size
            shared_intermediate_size shared_experts_intermediate_size moe_shared_expert_intermediate_size""",
        ),
        (
            HEADS,
            """num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
            encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads
            linear_num_heads linear_num_value_heads index_n_heads num_mtp_heads""",
        ),
        (GROUPS, "linear_num_key_heads mamba_n_groups mamba_ngroups n_groups o_groups"),
        (
            HEAD,
            """head_dim kv_channels attention_head_dim v_head_dim d_kv dim_head d_head index_head_dim global_head_dim
            attention_head_size swa_head_dim swa_v_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim
            mamba_d_state state_size ssm_state_size mamba_d_head mamba_head_dim mamba_headdim rotary_dim""",
        ),
        (
            RANK,
            """q_lora_rank kv_lora_rank o_lora_rank gated_norm_rank laurel_rank hidden_size_per_layer_input
            adapter_rank hc_lowrank time_step_rank ple_embed_dim router_hidden_size mamba_dt_rank codebook_dim""",
        ),
        (8, "qk_nope_head_dim qk_rope_head_dim mamba_n_heads mamba_num_heads n_mamba_heads d_rel mamba_chunk_size"),
        (EXPERTS, """num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num"""),
        (
            2,
            """num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k n_group num_expert_group
            first_k_dense_replace num_dense_layers num_kv_shared_layers""",
        ),
        (1, "topk_group"),
    )
    for name in names.split()
}
GROUPED = (
    "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_query_groups num_global_key_value_heads"
)
DEPTHS = """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers
    num_encoder_layers depth num_blocks""".split()
PERIODS = """attn_layer_period expert_layer_period sliding_window_pattern _sliding_window_pattern decoder_sparse_step
    no_rope_layer_interval interleave_moe_layer_step moe_layer_interval global_attn_every_n_layers layer_group_size
    full_attention_interval""".split()
OFFSETS = ("attn_layer_offset", "expert_layer_offset")
LAYER_SETS = ("_layers", "_layer_ids", "_layers_indices", "_layer_indices")
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id", "cls_token_id")

MOE = {"num_experts_per_tok": 2}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 8,
}
ASSISTANT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
ALL_SHARED = ASSISTANT | {"num_hidden_layers": 4, "num_kv_shared_layers": 4}
BYTES = {"encoder_hash_byte_group_vocab": 64}
ROTARY_SECTIONS = {
    "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
}

# type → what its configuration needs beside the shrinking: figures without a default, or that must fit others
FIGURES: dict[str, dict[str, Any]] = {
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "big_bird": {"attention_type": "original_full"},  # the only one of a decoder
    "blt": BYTES,
    "cohere_compass_text": ROTARY_SECTIONS,
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": WIDTH},
    },
    "deepseek_v2": MOE,
    "dory": {  # a dictionary of it counts attention and MLPs as layers of their own
        "num_hidden_layers": 8,
        "n_input_layers": 2,
        "n_recurrent_layers": 4,
        "n_output_layers": 2,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"] * 2,
    },
    "dots1": MOE | {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 2},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma4_assistant": {"text_config": ALL_SHARED},
    "gemma4_unified_assistant": {"text_config": ALL_SHARED},
    "granitemoehybrid": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None, "H_cycles": 2, "L_cycles": 1},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": HEAD},
    "nemotron": {"num_key_value_heads": GROUPS},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "mlp", "moe"] * 2},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 6},  # the third and the sixth attend
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 48], "hash_seed": 0, "num_buckets": 4},
    "roc_bert": {"shape_vocab_size": 64, "shape_embed_dim": RANK, "pronunciation_embed_dim": RANK},
    "xlstm": {"qk_dim_factor": 1.0},  # at this width its state is rounded up to that
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "mamba_headdim": 16},
}


def model_types() -> tuple[str, ...]:
    """Every type that the installed library makes a causal language model of, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def tiny_config(kind: str) -> Any:
    """The configuration of a type with its figures shrunk."""
    from transformers import CONFIG_MAPPING

    own = CONFIG_MAPPING[kind]
    config = own.from_dict(_merged(shrunk(_defaults(own).to_dict()), FIGURES.get(kind, {})))
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "is_decoder"):
            part.is_decoder = True
    return config


def tiny_model(kind: str, seed: int = 0) -> nn.Module:
    """A float32 model of a type in evaluation mode: random weights that are large enough to be seen in the logits.

    Raises what the library raises where it cannot build one.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = tiny_config(kind)
    made: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    parts = [getattr(config, name, None) for name in config.sub_configs]
    config = next((part for part in (config, *parts) if isinstance(part, made.config_class)), config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = made._from_config(config, attn_implementation="eager", dtype=torch.float32)
        model = model.eval().requires_grad_(False)
        for parameter in model.parameters():
            _make_visible(parameter)
    return model


def _defaults(own: Any) -> Any:
    """A configuration of all defaults; of what it is made of where these do not fit each other."""
    try:
        return own()
    except (ValueError, StrictDataclassError):
        return own(**{name: {} | ASSISTANT for name in own.sub_configs if name == "text_config"})


def _make_visible(parameter: torch.Tensor) -> None:
    """Matrices with rows of length about one, noise on vectors."""
    if parameter.ndim == 1:
        parameter.add_(NOISE * torch.randn_like(parameter))
    elif parameter.ndim > 1:
        wanted = min(parameter.shape[-2:]) ** -0.5
        if not 0.5 * wanted < float(parameter.std()) < 2 * wanted:
            parameter.normal_(0, wanted)


def _merged(figures: dict[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(figures)
    for key, value in others.items():
        merged[key] = (
            _merged(merged[key], value) if isinstance(value, Mapping) and isinstance(merged.get(key), dict) else value
        )
    return merged


def shrunk(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a configuration, and of those within it, at tiny size."""
    depth = _depth(figures)
    kept = _kept_layers(figures, depth) if depth else []
    small = {key: _figure(key, value, figures, depth, kept) for key, value in figures.items()}
    if {"qk_nope_head_dim", "qk_rope_head_dim"} <= small.keys() and "qk_head_dim" in small:
        small["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    if figures.get("qk_rope_head_dim") is not None and figures.get("head_dim") == figures["qk_rope_head_dim"]:
        small["head_dim"] = small["qk_rope_head_dim"]
    vocabulary = small.get("vocab_size")
    for token in TOKENS:
        if isinstance(small.get(token), int) and isinstance(vocabulary, int) and small[token] >= vocabulary:
            small[token] = 0
    return small


def _depth(figures: Mapping[str, Any]) -> int:
    return next((figures[name] for name in DEPTHS if isinstance(figures.get(name), int)), 0)


def _kept_layers(figures: Mapping[str, Any], depth: int) -> list[int]:
    """Two layers of each kind, in their order; four of a model that tells kinds by periods, two of any other."""
    kinds = [
        repr([value[layer] for value in figures.values() if _is_per_layer(value, depth)])
        + repr([layer in value for name, value in figures.items() if _is_layer_set(name, value, depth)])
        + repr([_by_layer(value).get(layer) for value in figures.values() if _is_by_layer(value)])
        for layer in range(depth)
    ]
    kept = sorted(layer for layer, kind in enumerate(kinds) if kinds[:layer].count(kind) < 2)
    periodic = any(figures.get(name) for name in (*PERIODS, "first_k_dense_replace", "num_dense_layers"))
    wanted = min(depth, 4 if periodic else 2)
    rest = [layer for layer in range(depth) if layer not in kept]
    return sorted((kept + rest[: max(wanted - len(kept), 0)])[:MOST_LAYERS])


def _is_per_layer(value: Any, depth: int) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == depth > 2


def _is_by_layer(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(str(key).isdigit() and isinstance(entry, Mapping) for key, entry in value.items())


def _by_layer(value: Mapping[Any, Any]) -> dict[int, Any]:
    return {int(key): entry for key, entry in value.items()}


def _is_layer_set(name: str, value: Any, depth: int) -> bool:
    """Ascending layer numbers."""
    if not name.endswith(LAYER_SETS) or not isinstance(value, (list, tuple)) or not value:
        return False
    return all(isinstance(one, int) for one in value) and list(value) == sorted(set(value)) and value[-1] < depth


def _figure(name: str, value: Any, figures: Mapping[str, Any], depth: int, kept: Sequence[int]) -> Any:
    if isinstance(value, Mapping):
        if _is_by_layer(value):
            entries = _by_layer(value)
            return {place: shrunk(entries[layer]) for place, layer in enumerate(kept) if layer in entries}
        return shrunk(value) if "model_type" in value else dict(value)
    if _is_layer_set(name, value, depth):
        return [kept.index(layer) for layer in value if layer in kept]
    if _is_per_layer(value, depth):
        return [_figure(name, value[layer], figures, 0, ()) for layer in kept]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if name in DEPTHS:
        return len(kept) if value == depth else min(value, 2)
    if name in PERIODS:
        return min(value, 2)
    if name in OFFSETS:
        return min(value, 1)
    if name in GROUPED.split():
        heads = next((figures[one] for one in ("num_attention_heads", "n_heads") if one in figures), None)
        return HEADS if value == heads else min(value, GROUPS)
    return min(value, SIZES.get(name, value))
