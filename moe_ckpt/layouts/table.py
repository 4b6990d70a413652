"""The families of Mixture-of-Experts models, one row each.

Names cannot tell how a fused tensor is stored: the same names carry both orientations and both
orders of gate and up. So a model type must be in this table, and the shapes must agree with it.
`Family` says what the fields mean.
"""

from __future__ import annotations

from ..formats import UNQUANTIZED
from ..runtimes import SGLANG, TRANSFORMERS, TRTLLM, VLLM
from .family import INTERLEAVED, Family, Form

__all__ = ["CHECKS", "FAMILIES", "UNSUPPORTED", "find_family"]

SERVERS = (VLLM, SGLANG)

CHECKS = {
    "export": "output equals ModelOpt's export, byte for byte",
    "module": "output computes what transformers' experts compute",
    "source": "source code of the runtimes only",
}

GATE_UP_PROJ = ("gate_up_proj", "down_proj")
W1_W3_W2 = ("w1", "w3", "w2")
_MLP = Form("fused", "mlp.experts", GATE_UP_PROJ)

FAMILIES: tuple[Family, ...] = (
    Family(
        name="qwen_moe",
        model_types=("qwen2_moe", "qwen3_moe", "qwen3_next"),
        in_tensorrt_llm=("qwen2_moe", "qwen3_moe", "qwen3_next"),
        checked="export",
    ),
    Family(
        name="qwen3_5_moe",
        model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
        roots=("model.language_model.", "model."),
        in_tensorrt_llm=("qwen3_5_moe", "qwen3_5_moe_text"),
    ),
    Family(
        name="qwen4_exp",
        model_types=("qwen4_exp", "qwen4_exp_text"),
        roots=("model.language_model.", "model."),
        not_restorable=(".ngram_embedding.weight",),
    ),
    Family(
        name="qwen3_omni_moe",
        model_types=("qwen3_omni_moe", "qwen3_omni_moe_thinker"),
        roots=("thinker.model.", "model."),
        forms=(),
        prefixes=(
            ("thinker.model.language_model.", "thinker.model."),
            ("model.language_model.", "model."),
        ),
        not_restorable=("model.language_model.",),
    ),
    Family(
        name="qwen3_vl_moe",
        model_types=("qwen3_vl_moe", "qwen3_vl_moe_text"),
        roots=("model.language_model.", "model."),
        in_tensorrt_llm=("qwen3_vl_moe",),
        forms=(_MLP, Form("fused-transposed", "mlp.experts", GATE_UP_PROJ)),
        runtimes=SERVERS,
    ),
    Family(
        name="deepseek",
        model_types=("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "glm_moe_dsa"),
        in_tensorrt_llm=("deepseek_v3", "deepseek_v32", "kimi_k2", "glm_moe_dsa"),
        checked="export",
    ),
    Family(
        name="deepseek_v4",
        model_types=("deepseek_v4",),
        roots=("", "model."),
        forms=(),
        split="ffn.experts",
        projections=W1_W3_W2,
        not_restorable=(".mlp.", ".self_attn."),
        instead="runtimes read its experts as released, in FP4 of DeepSeek, and in NVFP4 only "
        "beside attention in FP8 blocks",
        runtimes=(),
        as_released=("mxfp4",),
    ),
    Family(
        name="kimi_k25",
        model_types=("kimi_k25",),
        roots=("language_model.model.",),
        in_tensorrt_llm=("kimi_k25",),
        forms=(),
        # The first three: what transformers writes with save_original_format and should not.
        prefixes=(
            ("language_model.model.blocks.", "language_model.model.layers."),
            ("vision_tower.encoder.patch_embed.", "vision_tower.patch_embed."),
            ("model.mm_projector.", "mm_projector."),
            ("model.language_model.", "language_model.model."),
        ),
        not_restorable=("model.language_model.",),
    ),
    Family(
        name="glm4_moe",
        model_types=("glm4_moe", "glm4_moe_lite"),
        in_tensorrt_llm=("glm4_moe",),
    ),
    Family(name="glm4v_moe", model_types=("glm4v_moe",), roots=("model.language_model.",)),
    Family(
        name="mlp_experts",
        model_types=(
            *("olmoe", "afmoe", "cohere2_moe", "hunyuan_v1_moe", "longcat_flash", "mellum"),
            "beam",
        ),
        in_tensorrt_llm=("afmoe", "hunyuan_v1_moe"),
    ),
    Family(
        name="flint",
        model_types=("flint",),
        renames=(("self_attn.sinks", "self_attn.softmax_offset"),),
        runtimes=(VLLM, TRANSFORMERS),
    ),
    Family(
        name="bailing_hybrid",
        model_types=("bailing_hybrid",),
        forms=(),
        not_restorable=(".self_attn.",),
        released_as=(
            "BailingMoeV2_5ForCausalLM",
            "BailingMoeV3ForCausalLM",
        ),
        renamed_in_transformers=True,
    ),
    Family(
        name="sarvam_moe",
        model_types=("sarvam_moe",),
        forms=(),
        not_restorable=(".self_attn.",),
        released_as=("SarvamMoEForCausalLM",),
        renamed_in_transformers=True,
    ),
    Family(name="sarvam_mla", model_types=("sarvam_mla",), released_as=("SarvamMLAForCausalLM",)),
    Family(
        name="dots3_note",
        model_types=("dots3_note",),
        forms=(),
        not_restorable=("model.language_model.",),
        released_as=("Dots3NoteForCausalLM",),
        renamed_in_transformers=True,
    ),
    Family(
        name="deepseek_ocr",
        model_types=("deepseek_ocr2", "unlimited_ocr"),
        forms=(),
        not_restorable=("model.language_model.",),
        released_as=(
            "DeepseekOCR2ForCausalLM",
            "UnlimitedOCRForCausalLM",
        ),
        renamed_in_transformers=True,
    ),
    Family(
        name="deepseek_vl_v2",
        model_types=("deepseek_vl_v2", "unlimited-ocr"),
        roots=("model.", "language.model."),
        forms=(),
        runtimes=SERVERS,
        in_transformers=False,
        checked="source",
    ),
    Family(
        name="ernie4_5_moe",
        model_types=("ernie4_5_moe",),
        renames=(("mlp.gate.moe_statics.", "mlp.moe_statics."),),
    ),
    Family(
        name="ernie4_5_vl_moe",
        model_types=("ernie4_5_vl_moe", "ernie4_5_moe_vl"),
        forms=(),
        widths=2,
        not_restorable=(".text_moe.", ".vision_moe.", "model.language_model."),
        built_as=("mlp.text_experts_gate", "mlp.vision_experts_gate"),
    ),
    Family(
        name="mimo_v2",
        model_types=("mimo_v2", "mimo_v2_flash"),
        uneven=("sink",),  # of layers with a window only
        renames=(("self_attn.sinks", "self_attn.attention_sink_bias"),),
    ),
    Family(
        name="laguna",
        model_types=("laguna",),
        in_tensorrt_llm=("laguna",),
        renames=(
            ("mlp.shared_experts.", "mlp.shared_expert."),
            ("mlp.gate.e_score_correction_bias", "mlp.experts.e_score_correction_bias"),
        ),
    ),
    Family(
        name="mlp_experts_transformers",
        model_types=("dots1", "solar_open"),
        runtimes=(TRANSFORMERS,),
    ),
    Family(
        name="flex_olmo",
        model_types=("flex_olmo",),
        runtimes=(VLLM, TRANSFORMERS),
    ),
    Family(
        name="remote_code",
        model_types=("bailing_moe", "bailing_moe_v2"),
        forms=(),
        runtimes=SERVERS,
        in_transformers=False,
        checked="source",
    ),
    Family(
        name="exaone_moe",
        model_types=("exaone_moe",),
        in_tensorrt_llm=("exaone_moe",),
        renames=(("mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias"),),
    ),
    Family(
        name="kolibri1",
        model_types=("kolibri1",),
        renames=(
            ("mlp.gate.e_score_correction_bias", "moe.router.expert_bias"),
            ("post_self_attn_layernorm.", "post_attn_norm."),
            ("post_mlp_layernorm.", "post_ffn_norm."),
        ),
        runtimes=(TRANSFORMERS,),
    ),
    Family(
        name="hy_v3",
        model_types=("hy_v3",),
        renames=(
            ("mlp.gate.", "mlp.router.gate."),
            ("mlp.e_score_correction_bias", "mlp.expert_bias"),
            ("mlp.shared_experts.", "mlp.shared_mlp."),
        ),
    ),
    Family(
        name="hy_v4",
        model_types=("hy_v4",),
        not_restorable=(".attn_hc.", ".ffn_hc.", ".self_attn.sinks", "model.hc_head."),
        runtimes=(VLLM,),
    ),
    Family(
        name="axk1",
        model_types=("axk1",),
        uneven=("post_mlp_layernorm",),
        renames=(("mlp.post_mlp_layernorm.", "post_mlp_layernorm."),),
        runtimes=(VLLM, TRANSFORMERS),
    ),
    Family(
        name="axk2",
        model_types=("axk2",),
        forms=(),
        not_restorable=("layernorm.mlp.fc", ".q_gate_proj."),
        runtimes=(TRANSFORMERS,),
    ),
    Family(
        name="glm5_next",
        model_types=("glm5_next",),
        roots=("model.language_model.",),
        forms=(),
        not_restorable=(".attn_hc.", ".ffn_hc.", ".forget_gate."),
    ),
    Family(
        name="hy_v4_vl",
        model_types=("hy_v4_vl",),
        not_restorable=("model.language_model.",),
        instead="transformers alone has the model, and reads its experts fused",
        runtimes=(),
    ),
    Family(name="mistral4", model_types=("mistral4",), runtimes=SERVERS),
    Family(
        name="mistral_large4",
        model_types=("mistral_large4",),
        roots=("",),
        forms=(),
        split="experts",
        projections=W1_W3_W2,
        not_restorable=("model.language_model.",),
        runtimes=(TRANSFORMERS,),
        renamed_in_transformers=True,
    ),
    Family(
        name="lara_mini",
        model_types=("lara_mini",),
        not_restorable=(".linear_attn.in_proj_qkv.",),
        instead="transformers alone has the model, and reads its experts fused",
        runtimes=(),
    ),
    Family(
        name="mixtral",
        model_types=("mixtral", "minimax_m2"),
        in_tensorrt_llm=("mixtral", "minimax_m2"),
        split="block_sparse_moe.experts",
        projections=W1_W3_W2,
        renames=(("mlp.", "block_sparse_moe."),),
        checked="export",
    ),
    Family(
        name="minimax",
        model_types=("minimax",),
        split="block_sparse_moe.experts",
        projections=W1_W3_W2,
        renames=(("mlp.", "block_sparse_moe."),),
        runtimes=(TRANSFORMERS,),
        instead="vLLM and SGLang have no class for it any more, and do not take transformers'",
    ),
    Family(
        name="phimoe",
        model_types=("phimoe",),
        split="block_sparse_moe.experts",
        projections=W1_W3_W2,
        released_as=("PhiMoEForCausalLM",),
        renames=(("mlp.router.", "block_sparse_moe.gate."), ("mlp.", "block_sparse_moe.")),
    ),
    Family(
        name="minimax_m3",
        model_types=("minimax_m3_vl", "minimax_m3"),
        roots=("language_model.model.", "model."),
        in_tensorrt_llm=("minimax_m3_vl", "minimax_m3"),
        forms=(),
        split="block_sparse_moe.experts",
        projections=W1_W3_W2,
        prefixes=(("model.language_model.", "language_model.model."),),
        not_restorable=("model.language_model.",),
    ),
    Family(
        name="kimi_linear",
        model_types=("kimi_linear",),
        in_tensorrt_llm=("kimi_linear",),
        forms=(),
        split="block_sparse_moe.experts",
        projections=W1_W3_W2,
        not_restorable=(".forget_gate.",),
    ),
    Family(
        name="kimi_k3",
        model_types=("kimi_k3",),
        roots=("language_model.model.",),
        forms=(),
        split="block_sparse_moe.experts",
        projections=W1_W3_W2,
        runtimes=SERVERS,
        in_transformers=False,
        checked="source",
    ),
    Family(
        name="lfm2_moe",
        model_types=("lfm2_moe",),
        split="feed_forward.experts",
        projections=W1_W3_W2,
        forms=(Form("fused", "feed_forward.experts", GATE_UP_PROJ),),
    ),
    Family(
        name="jamba",
        model_types=("jamba",),
        split="feed_forward.experts",
        forms=(Form("fused", "feed_forward.experts", GATE_UP_PROJ),),
        runtimes=(VLLM, TRANSFORMERS),
    ),
    Family(
        name="nemotron_h",
        model_types=("nemotron_h",),
        roots=("backbone.", "model."),
        in_tensorrt_llm=("nemotron_h",),
        split="mixer.experts",
        projections=("up_proj", "down_proj"),
        forms=(Form("stacked", "mixer.experts", ("up_proj", "down_proj")),),
        prefixes=(("model.", "backbone."),),
    ),
    Family(
        name="llama4",
        model_types=("llama4",),
        roots=("language_model.model.",),
        split="feed_forward.experts",
        forms=(Form("fused-transposed", "feed_forward.experts", GATE_UP_PROJ),),
        runtimes=(VLLM, SGLANG),
        fused_runtimes={"nvfp4": (VLLM, TRTLLM), "fp8-tensor": (VLLM, TRTLLM)},
        checked="export",
    ),
    Family(
        name="llama4_text",
        model_types=("llama4_text",),
        split="feed_forward.experts",
        forms=(Form("fused-transposed", "feed_forward.experts", GATE_UP_PROJ),),
        runtimes=(VLLM,),
        fused_runtimes={"nvfp4": (), "fp8-tensor": ()},
        instead="SGLang drops the experts of a text-only Llama 4 in any form",
        checked="export",
    ),
    Family(
        name="gpt_oss",
        model_types=("gpt_oss",),
        forms=(
            Form(
                "fused-transposed",
                "mlp.experts",
                GATE_UP_PROJ,
                order=INTERLEAVED,
                biases=("gate_up_proj_bias", "down_proj_bias"),
            ),
            # as it is released: MXFP4, in rows of output features
            Form(
                "fused",
                "mlp.experts",
                ("gate_up_proj_blocks", "down_proj_blocks"),
                order=INTERLEAVED,
                biases=("gate_up_proj_bias", "down_proj_bias"),
            ),
        ),
        fused_runtimes={
            "nvfp4": (),
            "fp8-tensor": (),
            UNQUANTIZED: (VLLM, SGLANG, TRANSFORMERS),
        },
        instead="no released runtime reads it quantized but as MXFP4, as it is released: they stop "
        "at the fused codes and scales of other formats; none reads it split",
        checked="export",
        runtimes=(),
    ),
    Family(
        name="openai_privacy_filter",
        model_types=("openai_privacy_filter",),
        roots=("",),
        forms=(
            Form(
                "fused-transposed",
                "mlp.experts",
                GATE_UP_PROJ,
                biases=("gate_up_proj_bias", "down_proj_bias"),
            ),
        ),
        instead="vLLM and transformers read it unquantized",
        runtimes=(),
    ),
    Family(
        name="aria",
        model_types=("aria",),
        roots=("language_model.model.",),
        forms=(
            Form("fused-transposed", "mlp.experts", ("fc1.weight", "fc2.weight")),
            Form("fused-transposed", "mlp.experts", GATE_UP_PROJ),
        ),
        prefixes=(
            ("model.language_model.", "language_model.model."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
            ("model.vision_tower.", "vision_tower."),
            ("lm_head.", "language_model.lm_head."),
        ),
        instead="vLLM and transformers read fc1 and fc2 of all experts, unquantized",
        runtimes=(),
    ),
    Family(
        name="gemma4",
        model_types=("gemma4", "gemma4_text"),
        roots=("model.language_model.", "model."),
        in_tensorrt_llm=("gemma4", "gemma4_text"),
        uneven=("self_attn.v_proj.",),  # those whose values are their keys
        split="experts",
        forms=(Form("fused", "experts", GATE_UP_PROJ),),
        runtimes=SERVERS,
    ),
    Family(
        name="diffusion_gemma",
        model_types=("diffusion_gemma",),
        uneven=("self_attn.v_proj.",),  # those whose values are their keys
        roots=("model.decoder.", "model.encoder.language_model."),
        split="experts",
        forms=(Form("fused", "experts", GATE_UP_PROJ),),
        runtimes=(VLLM,),
    ),
    Family(
        name="granitemoe",
        model_types=("granitemoe", "granitemoeshared", "granitemoehybrid"),
        split="block_sparse_moe.experts",
        forms=(
            Form("fused", "block_sparse_moe", ("input_linear.weight", "output_linear.weight")),
            Form("fused", "block_sparse_moe.experts", GATE_UP_PROJ),
        ),
        renames=(("block_sparse_moe.router.weight", "block_sparse_moe.router.layer.weight"),),
        runtimes=SERVERS,
    ),
    Family(
        name="granitemoe_swa",
        model_types=("granitemoe_swa",),
        split="block_sparse_moe.experts",
        forms=(Form("fused", "block_sparse_moe.experts", GATE_UP_PROJ),),
        runtimes=SERVERS,
    ),
    Family(
        name="jetmoe",
        model_types=("jetmoe",),
        forms=(Form("fused", "mlp", ("input_linear.weight", "output_linear.weight")),),
        instead="transformers alone has the model, and reads input_linear and output_linear",
        runtimes=(),
    ),
    Family(
        name="step3",
        model_types=("step3p5", "step3p7"),
        split="moe.experts",
        forms=(
            Form(
                "stacked",
                "moe",
                ("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
            ),
        ),
        renames=(("mlp.shared_experts.", "share_expert."),),
        prefixes=(("model.language_model.", "model."),),
        not_restorable=("model.language_model.",),
        runtimes=(VLLM,),
        instead="SGLang and TensorRT-LLM read its experts only stacked",
    ),
    Family(
        name="step3_text",
        model_types=("step3_text", "step3_vl", "step5", "step5_vl"),
        split="moe.experts",
        forms=(
            Form(
                "stacked",
                "moe",
                ("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
            ),
        ),
        runtimes=(),
        instead="runtimes read its experts only stacked, unquantized or in FP8",
        in_transformers=False,
        checked="source",
    ),
    Family(
        name="dbrx",
        model_types=("dbrx",),
        roots=("transformer.",),
        split="ffn.experts",
        projections=("w1", "v1", "w2"),
        forms=(Form("flat", "ffn.experts.mlp", ("w1", "v1", "w2")),),
        instead="SGLang reads w1, v1 and w2 of all experts, unquantized",
        runtimes=(),
    ),
    Family(
        name="zaya",
        model_types=("zaya",),
        uneven=("gate.router_states_scale",),
        instead="SGLang reads a linear_fc1 and a linear_fc2 for each expert, unquantized",
        runtimes=(),
    ),
    Family(
        name="inkling",
        model_types=("inkling_mm_model",),
        roots=("model.llm.",),
        forms=(
            Form(
                "fused",
                "mlp.experts",
                ("w13_weight", "w2_weight"),
                order=INTERLEAVED,
                order_flag="inference_moe_w13_interleaved",
            ),
        ),
        not_restorable=("model.language_model.",),
        instead="runtimes read its own NVFP4 form, w13_weight with scale and scale2",
        runtimes=(),
    ),
    Family(
        name="inkling2",
        model_types=("inkling2", "inkling2_loop"),
        uneven=("attention_input", "controllers", "message_gate"),
        roots=("model.llm.",),
        forms=(Form("fused", "mlp.experts", ("w13_weight", "w2_weight"), order=INTERLEAVED),),
        not_restorable=("model.language_model.",),
        instead="transformers alone has the model, and reads its experts fused",
        runtimes=(),
    ),
    Family(
        name="muse_spark",
        model_types=("muse_spark",),
        roots=("model.language_model.",),
        instead="runtimes read its experts fused, unquantized or in an NVFP4 form of its own",
        runtimes=(),
    ),
)

# Configurations of parts that transformers saves as models of their own, and the whole model.
_PARTS = {
    "aria_text": "aria",
    "deepseek_ocr2_text": "deepseek_ocr2",
    "diffusion_gemma_text": "diffusion_gemma",
    "dots3_note_text": "dots3_note",
    "dots3_note_vision_encoder": "dots3_note",
    "ernie4_5_vl_moe_text": "ernie4_5_vl_moe",
    "glm4v_moe_text": "glm4v_moe",
    "glm5_next_text": "glm5_next",
    "hy_v4_vl_text": "hy_v4_vl",
    "inkling_text": "inkling_mm_model",
    "inkling2_text": "inkling2",
    "inkling2_loop_text": "inkling2_loop",
    "minimax_m3_vl_text": "minimax_m3_vl",
    "mistral_large4_text": "mistral_large4",
    "muse_spark_text": "muse_spark",
    "qwen3_omni_moe_talker": "qwen3_omni_moe",
    "qwen3_omni_moe_talker_text": "qwen3_omni_moe",
    "qwen3_omni_moe_text": "qwen3_omni_moe",
    "unlimited_ocr_text": "unlimited_ocr",
}

# Model types that are known, and cannot be converted.
UNSUPPORTED: dict[str, str] = {
    **{
        part: f"it is a part of {whole}; start from the whole model"
        for part, whole in _PARTS.items()
    },
    "doge": "its experts are rows of two embeddings, down_embed and up_embed, and no matrices",
    "vitpose_backbone": "its experts are parts of a layer of a vision model, without a gate",
    "switch_transformers": "its experts are wi and wo without a gate; no runtime quantizes them",
    "nllb-moe": "its experts are fc1 and fc2 with biases; no runtime quantizes them",
}


def find_family(model_type: str) -> Family | None:
    """The row of a model type."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
