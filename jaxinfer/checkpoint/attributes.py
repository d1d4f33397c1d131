"""Classify the config.json attributes that a model's family does not read.

Such an attribute is *harmless* (`HARMLESS`: transformers itself ignores it at inference), *restricted to one value*
(`ONE_VALUE` here, `ConfigReader.require` in the families), *a label* (`is_label`: logged once), or unknown, and then
refused.
"""

import re
from collections.abc import Mapping
from typing import Any

_SPECIAL_TOKENS = """
    bos_token_id cls_token_id decoder_start_token_id eos_token_id forced_bos_token_id forced_decoder_ids
    forced_eos_token_id mask_token_id pad_token_id sep_token_id unk_token_id begin_suppress_tokens suppress_tokens
    bos_token eos_token pad_token unk_token image_token_index
"""
_GENERATION = """
    assistant_confidence_threshold assistant_lookbehind bad_words_ids diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size epsilon_cutoff eta_cutoff exponential_decay_length_penalty guidance_scale
    length_penalty max_length max_new_tokens min_length min_new_tokens min_p no_repeat_ngram_size
    num_assistant_tokens num_beam_groups num_beams num_return_sequences output_scores penalty_alpha prefix
    remove_invalid_values renormalize_logits repetition_penalty return_dict_in_generate stop_strings temperature
    token_healing top_k top_p typical_p use_cache
"""
_LABELS_AND_CLASSES = """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _experts_implementation _flash_attn_2_enabled _model_name_or_path _name_or_path _num_labels architectures
    auto_map chat_template finetuning_task id2label ignore_keys_at_rope_validation is_llama_config
    keys_to_ignore_at_inference label2id model_name_or_path model_type name_or_path num_labels padding_side
    problem_type task task_specific_params task_type tokenizer_class transformers.js_config transformers_version
    transformers_weights truncation_side trust_remote_code
"""
_IMPLEMENTATION = """
    attn_implementation bf16 cache_implementation chunk_size_feed_forward dtype ep_size flash_attn fp16 fp32
    flash_attn_version flash_attention fused_mlp is_decoder is_encoder_decoder load_in_4bit load_in_8bit
    model_parallel num_logits_to_keep output_attentions output_hidden_states output_past pretraining_tp return_dict
    tensor_parallel_degree tf_legacy_loss torch_compile torch_dtype torchscript
    unsloth_fixed unsloth_tiled_mlp use_bfloat16 use_flash_attention use_flash_attention_2 use_flash_attn
    use_fused_rms_norm use_fused_rope use_kernel use_liger_kernel use_sdpa use_xformers
"""
_TRAINING = """
    attention_dropout attention_probs_dropout_prob attn_pdrop aux_loss_alpha classif_dropout classifier_dropout
    dropout embd_pdrop gradient_checkpointing hidden_dropout hidden_dropout_prob ignore_index inference_mode
    init_method_std init_std initializer_factor initializer_range label_smoothing lora_alpha lora_dropout lora_r
    lora_rank loss_function loss_type neftune_noise_alpha num_mtp_layers num_nextn_predict_layers
    output_router_logits peft_config peft_type resid_pdrop router_aux_loss_coef router_jitter_noise
    router_z_loss_coef seed seq_aux summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj target_modules use_dora use_rslora
"""
_LENGTHS = """
    max_seq_len max_seq_length max_sequence_length model_max_length n_ctx seq_len seq_length
    tokenizer_model_max_length tokenizer_padding_side
"""
_QUANTISATION = "quantization_config compression_config quantization"
"""Read by `checkpoint.packed.declared`."""
HARMLESS = frozenset(
    f"{_SPECIAL_TOKENS} {_GENERATION} {_LABELS_AND_CLASSES} {_IMPLEMENTATION} {_TRAINING} {_LENGTHS} "
    f"{_QUANTISATION}".split()
)
"""Attributes that never change a forward pass at inference: special tokens, defaults of `generate`, names of classes
and labels, choices of implementation, training settings, and lengths of tokenizers and of training. A family that
needs one of them still reads it."""

ONE_VALUE: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (),
    "pruned_heads": ({},),
    "use_lora": (False,),
}
"""Attributes that may occur in the config.json of any family, each with the values that jaxinfer supports."""

_LABEL = re.compile(
    r"_.*|unsloth_.*|tokenizer_.*|dataset.*|train(ing)?_.*|wandb_.*|base_model.*|"
    r".*(_version|_hash|_commit|_url|_date|_author|_license|_name|_path)|"
    r".*(_token_ids?|_pdrop|_lr|_loss_coef|_loss_weight)|"
    r".*(dropout|layerdrop|drop_path|initializer|_init_std|gradient_).*|"
    r"author|authors|citation|comment|created|date|description|id|language|languages|library_name|license|metadata|"
    r"model_card|name|pipeline_tag|revision|source|tags|title|url|version"
)


def is_label(name: str) -> bool:
    """Return whether the name of an attribute that no family reads marks it as metadata of a tool or author."""
    return _LABEL.fullmatch(name) is not None


def json_equal(value: Any, other: Any) -> bool:
    """Return whether two JSON values are equal; unlike in Python, true and 1 are different."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other
