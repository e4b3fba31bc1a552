"""Every key of a GR00T-N1.5's config.json and of Eagle's that clp_jax knows, and what it may say.

A key that changes what the model computes is read, must agree with the shapes, or must have the one value that is
implemented. What stands in neither list is refused: it may change the model in a way that nobody here knows of.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from clp_jax.errors import InputError
from clp_jax.limits import Limits, check_flag
from clp_jax.processing.conventions import LONGEST


class Section(NamedTuple):
    """Keys of one object of a JSON file.

    Attributes:
      read: keys that others than this table interpret.
      fixed: keys with the values that are implemented; the first is what a missing key means.
      ignored: keys that change nothing of what the model computes.
      numbers: limits of those of the keys that others interpret and no shape tells; None for what is true or false.
    """

    read: frozenset[str]
    fixed: Mapping[str, tuple[Any, ...]]
    ignored: frozenset[str]
    numbers: Mapping[str, Limits | None] = MappingProxyType({})

    def check(self, given: Mapping[str, Any], where: str) -> None:
        """Refuses unknown keys and values.

        Args:
          given: the object.
          where: it stands, for the error.

        Raises:
          InputError: naming every key that is unknown, or the first whose value is not implemented or no such number.
        """
        unknown = sorted(given.keys() - self.read - self.fixed.keys() - self.ignored)
        if unknown:
            raise InputError(
                f"{where} has keys that clp_jax does not know and that may change the model: {', '.join(unknown)}; "
                "remove those that you know to change nothing."
            )
        for key, values in self.fixed.items():
            value = given.get(key, values[0])
            if value is _MISSING or value not in values:
                allowed = " or ".join(repr(v) for v in values if v is not _MISSING)
                raise InputError(f"{where} says {key} = {_shown(value)}; clp_jax has only {allowed}.")
        for key, limits in self.numbers.items():
            if key in given:
                said = f"{where} says {key}"
                check_flag(given[key], said) if limits is None else limits.check(given[key], said)


_COUNT, _POSITIVE = Limits(1, whole=True), Limits(0, above=True)

_MISSING = "(missing)"
"""First of the values of a key whose default in upstream's code is not implemented."""


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _shown(value: Any) -> str:
    return "nothing" if value is _MISSING else repr(value)


_TRANSFORMERS = _keys(
    """_attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _name_or_path
    add_cross_attention architectures attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder is_encoder_decoder label2id
    length_penalty max_length max_position_embeddings min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp
    problem_type pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache attention_dropout"""
)
"""What transformers writes into every config.json, without a meaning for this model."""

CHECKPOINT = Section(
    _keys("action_head_cfg backbone_cfg action_dim action_horizon hidden_size"),
    {"model_type": ("gr00t_n1_5",)},
    _TRANSFORMERS | _keys("model_dtype compute_dtype"),
)

BACKBONE = Section(
    _keys("select_layer"),
    {"project_to_dim": (_MISSING, None), "reproject_vision": (False,)},
    _keys("eagle_path load_bf16 tune_llm tune_visual use_flash_attention"),
)

HEAD = Section(
    _keys(
        """diffusion_model_cfg vl_self_attention_cfg input_embedding_dim backbone_embedding_dim hidden_size max_seq_len
        action_dim max_action_dim max_state_dim action_horizon max_num_embodiments num_target_vision_tokens
        noise_beta_alpha noise_s num_timestep_buckets num_inference_timesteps"""
    ),
    {"add_pos_embed": (True,), "use_vlln": (True,), "noise_beta_beta": (1.0,), "expand_batch": (None,)},
    _TRANSFORMERS
    | _keys(
        """model_dtype model_type tune_projector tune_diffusion_model load_pretrained_det_decode_layer_path
        detection_coeff freeze_decode_layer"""
    ),
    {
        "action_horizon": Limits(1, most=LONGEST, whole=True),
        "num_inference_timesteps": _COUNT,
        "num_timestep_buckets": _COUNT,
        "noise_s": _POSITIVE,
        "noise_beta_alpha": _POSITIVE,
    },
)

_ATTENTION: dict[str, tuple[Any, ...]] = {
    "attention_bias": (True,),
    "activation_fn": ("gelu-approximate",),
    "positional_embeddings": (_MISSING, None),
}
_ATTENTION_READ = _keys("num_attention_heads attention_head_dim num_layers dropout final_dropout")
_ATTENTION_NUMBERS = {
    "num_attention_heads": _COUNT,
    "attention_head_dim": _COUNT,
    "dropout": Limits(0, 1),
    "final_dropout": None,
}
_ATTENTION_IGNORED = _keys("num_embeds_ada_norm max_num_positional_embeddings compute_dtype upcast_attention")

DIT = Section(
    _ATTENTION_READ | _keys("cross_attention_dim output_dim"),
    _ATTENTION
    | {
        "interleave_self_attention": (_MISSING, True),
        "norm_type": ("ada_norm",),
        "norm_elementwise_affine": (False,),
        "norm_eps": (1e-5,),
    },
    _ATTENTION_IGNORED,
    _ATTENTION_NUMBERS,
)

VL = Section(
    _ATTENTION_READ,
    _ATTENTION,
    _ATTENTION_IGNORED | _keys("output_dim interleave_self_attention"),
    _ATTENTION_NUMBERS,
)

EAGLE = Section(
    _keys("text_config vision_config image_token_index force_image_size"),
    {
        "model_type": ("eagle_2_5_vl",),
        "use_pixel_shuffle": (_MISSING, False),
        "mlp_connector_layers": (_MISSING, 1),
        "select_layer": (_MISSING, -1),
        "use_backbone_lora": (0,),
        "use_llm_lora": (0,),
        "pad2square": (False,),
    },
    _TRANSFORMERS
    | _keys(
        """downsample_ratio dynamic_image_size efficient_loss hidden_size keep_aspect_ratio loss_version
        max_dynamic_patch max_dynamic_tiles min_dynamic_patch min_dynamic_tiles mlp_checkpoint pre_feature_reduction
        ps_version template tie_word_embeddings use_thumbnail vocab_size"""
    ),
    {"image_token_index": Limits(0, whole=True)},
)

TEXT = Section(
    _keys(
        """hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size
        rms_norm_eps rope_theta"""
    ),
    {
        "model_type": ("qwen3",),
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_scaling": (None,),
        "use_sliding_window": (False,),
        "tie_word_embeddings": (_MISSING, True),
    },
    _TRANSFORMERS | _keys("sliding_window max_window_layers layer_types"),
    {"rms_norm_eps": _POSITIVE, "rope_theta": _POSITIVE},
)

VISION = Section(
    _keys("hidden_size num_hidden_layers num_attention_heads intermediate_size patch_size image_size"),
    {
        "model_type": ("siglip_vision_model",),
        "hidden_act": ("gelu_pytorch_tanh",),
        "layer_norm_eps": (1e-6,),
        "num_channels": (3,),
    },
    _TRANSFORMERS | _keys("drop_path_rate num_image_tokens tie_word_embeddings vision_use_head projection_dim"),
    {"num_attention_heads": _COUNT},
)
