"""The families of Mixture-of-Experts models, one row each.

Names cannot tell how a fused tensor is stored: the same names carry both orientations and both
orders of gate and up. So a model type must be in this table, and the shapes must agree with it.

Stored forms:

    split   one matrix per expert and projection: gate [I, H], up [I, H], down [H, I]
    fused   one tensor for all experts: gate_up [E, 2I, H] with gate in the first I rows,
            down [E, H, I]
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FAMILIES", "UNSUPPORTED", "Family", "find_family"]

GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
W1_W3_W2 = ("w1", "w3", "w2")
GATE_UP_PROJ = ("gate_up_proj", "down_proj")
INPUT_OUTPUT_LINEAR = ("input_linear.weight", "output_linear.weight")

VLLM, SGLANG, TRANSFORMERS = "vLLM", "SGLang", "transformers"


@dataclass(frozen=True, slots=True)
class Family:
    """One way to store experts.

    ``split``: path from the layer to the experts, of the per-expert form, which is the
        form that is written: ``{layer}.{split}.{e}.{projection}.weight``.
    ``projections``: the names of gate, up and down in that form.
    ``fused``: (path, gate_up leaf, down leaf) of each fused form that can be read.
    ``renames``: what transformers 5 calls tensors of layers with fused experts, and what loaders
        call them; prefixes of the path below the layer, the first that fits is applied.
    ``not_restorable``: parts of names that only transformers 5 writes and this table cannot
        turn back; a checkpoint that has them is refused.
    ``either_orientation``: files with both orientations exist under the same names, so the
        shapes alone decide and a square matrix cannot be told.
    ``loaders``: which have the model and read the split form.
    """

    name: str
    model_types: tuple[str, ...]
    split: str
    projections: tuple[str, str, str] = GATE_UP_DOWN
    fused: tuple[tuple[str, str, str], ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    not_restorable: tuple[str, ...] = ()
    either_orientation: bool = False
    loaders: tuple[str, ...] = (VLLM, SGLANG, TRANSFORMERS)


_MLP_FUSED = (("mlp.experts", *GATE_UP_PROJ),)

FAMILIES: tuple[Family, ...] = (
    Family(
        name="qwen_moe",
        model_types=("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"),
        split="mlp.experts",
        fused=_MLP_FUSED,
    ),
    Family(
        name="qwen4_exp",
        model_types=("qwen4_exp", "qwen4_exp_text"),
        split="mlp.experts",
        fused=_MLP_FUSED,
        not_restorable=(".ngram_embedding.weight",),
    ),
    Family(
        name="qwen3_omni_moe",
        model_types=("qwen3_omni_moe", "qwen3_omni_moe_thinker"),
        split="mlp.experts",
        not_restorable=("model.language_model.",),
    ),
    Family(
        name="qwen3_vl_moe",
        model_types=("qwen3_vl_moe", "qwen3_vl_moe_text"),
        split="mlp.experts",
        fused=_MLP_FUSED,
        either_orientation=True,
        loaders=(VLLM, SGLANG),
    ),
    Family(
        name="deepseek",
        model_types=("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "glm_moe_dsa"),
        split="mlp.experts",
        fused=_MLP_FUSED,
    ),
    Family(
        name="kimi_k25",
        model_types=("kimi_k25",),
        split="mlp.experts",
        not_restorable=("model.language_model.",),
    ),
    Family(
        name="glm4_moe",
        model_types=("glm4_moe", "glm4_moe_lite", "glm4v_moe"),
        split="mlp.experts",
        fused=_MLP_FUSED,
    ),
    Family(
        name="mlp_experts",
        model_types=("olmoe", "afmoe", "cohere2_moe", "hunyuan_v1_moe", "longcat_flash"),
        split="mlp.experts",
        fused=_MLP_FUSED,
    ),
    Family(
        name="ernie4_5_moe",
        model_types=("ernie4_5_moe",),
        split="mlp.experts",
        fused=_MLP_FUSED,
        renames=(("mlp.gate.moe_statics.", "mlp.moe_statics."),),
    ),
    Family(
        name="mimo_v2",
        model_types=("mimo_v2", "mimo_v2_flash"),
        split="mlp.experts",
        fused=_MLP_FUSED,
        renames=(("self_attn.sinks", "self_attn.attention_sink_bias"),),
    ),
    Family(
        name="laguna",
        model_types=("laguna",),
        split="mlp.experts",
        fused=_MLP_FUSED,
        renames=(
            ("mlp.shared_experts.", "mlp.shared_expert."),
            ("mlp.gate.e_score_correction_bias", "mlp.experts.e_score_correction_bias"),
        ),
    ),
    Family(
        name="mlp_experts_transformers",
        model_types=("flex_olmo", "dots1", "mellum", "solar_open"),
        split="mlp.experts",
        fused=_MLP_FUSED,
        loaders=(TRANSFORMERS,),
    ),
    Family(
        name="remote_code",
        model_types=("bailing_moe", "bailing_moe_v2"),
        split="mlp.experts",
        loaders=(VLLM, SGLANG),
    ),
    Family(
        name="exaone_moe",
        model_types=("exaone_moe",),
        split="mlp.experts",
        fused=_MLP_FUSED,
        renames=(("mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias"),),
    ),
    Family(
        name="hy_v3",
        model_types=("hy_v3",),
        split="mlp.experts",
        fused=_MLP_FUSED,
        renames=(
            ("mlp.gate.", "mlp.router.gate."),
            ("mlp.e_score_correction_bias", "mlp.expert_bias"),
            ("mlp.shared_experts.", "mlp.shared_mlp."),
        ),
    ),
    Family(
        name="hy_v4",
        model_types=("hy_v4",),
        split="mlp.experts",
        fused=_MLP_FUSED,
        not_restorable=(".attn_hc.", ".ffn_hc.", ".self_attn.sinks", "model.hc_head."),
        loaders=(VLLM, SGLANG),
    ),
    Family(
        name="axk1",
        model_types=("axk1",),
        split="mlp.experts",
        fused=_MLP_FUSED,
        renames=(("mlp.post_mlp_layernorm.", "post_mlp_layernorm."),),
        loaders=(VLLM, TRANSFORMERS),
    ),
    Family(
        name="axk2",
        model_types=("axk2",),
        split="mlp.experts",
        not_restorable=("layernorm.mlp.fc", ".q_gate_proj."),
        loaders=(TRANSFORMERS,),
    ),
    Family(
        name="glm5_next",
        model_types=("glm5_next",),
        split="mlp.experts",
        not_restorable=(".attn_hc.", ".ffn_hc.", ".forget_gate."),
    ),
    Family(
        name="mistral4",
        model_types=("mistral4",),
        split="mlp.experts",
        fused=_MLP_FUSED,
        loaders=(VLLM,),
    ),
    Family(
        name="mixtral",
        model_types=("mixtral", "minimax", "minimax_m2"),
        split="block_sparse_moe.experts",
        projections=W1_W3_W2,
        fused=_MLP_FUSED,
        renames=(("mlp.", "block_sparse_moe."),),
    ),
    Family(
        name="phimoe",
        model_types=("phimoe",),
        split="block_sparse_moe.experts",
        projections=W1_W3_W2,
        fused=_MLP_FUSED,
        renames=(("mlp.router.", "block_sparse_moe.gate."), ("mlp.", "block_sparse_moe.")),
    ),
    Family(
        name="minimax_m3",
        model_types=("minimax_m3_vl", "minimax_m3"),
        split="block_sparse_moe.experts",
        projections=W1_W3_W2,
        not_restorable=("model.language_model.",),
    ),
    Family(
        name="kimi_linear",
        model_types=("kimi_linear",),
        split="block_sparse_moe.experts",
        projections=W1_W3_W2,
        not_restorable=(".forget_gate.",),
    ),
    Family(
        name="lfm2_moe",
        model_types=("lfm2_moe",),
        split="feed_forward.experts",
        projections=W1_W3_W2,
        fused=(("feed_forward.experts", *GATE_UP_PROJ),),
    ),
    Family(
        name="jamba",
        model_types=("jamba",),
        split="feed_forward.experts",
        fused=(("feed_forward.experts", *GATE_UP_PROJ),),
        loaders=(VLLM, TRANSFORMERS),
    ),
    Family(
        name="gemma4",
        model_types=("gemma4", "gemma4_text", "diffusion_gemma"),
        split="experts",
        fused=(("experts", *GATE_UP_PROJ),),
        loaders=(VLLM, SGLANG),
    ),
    Family(
        name="granitemoe",
        model_types=("granitemoe", "granitemoeshared", "granitemoehybrid"),
        split="block_sparse_moe.experts",
        fused=(
            ("block_sparse_moe", *INPUT_OUTPUT_LINEAR),
            ("block_sparse_moe.experts", *GATE_UP_PROJ),
        ),
        renames=(("block_sparse_moe.router.weight", "block_sparse_moe.router.layer.weight"),),
        loaders=(VLLM, SGLANG),
    ),
    Family(
        name="granitemoe_swa",
        model_types=("granitemoe_swa",),
        split="block_sparse_moe.experts",
        fused=(("block_sparse_moe.experts", *GATE_UP_PROJ),),
        loaders=(VLLM, SGLANG),
    ),
)

# Model types whose experts this version knows, and does not convert.
UNSUPPORTED: dict[str, str] = {
    "gpt_oss": "gate and up interleaved, [E, H, 2I], with biases",
    "openai_privacy_filter": "[E, H, 2I] with biases",
    "llama4": "transposed, [E, H, 2I]",
    "llama4_text": "transposed, [E, H, 2I]",
    "aria": "transposed fc1 [E, H, 2I] and fc2 [E, I, H]",
    "dbrx": "flat, all experts in one matrix",
    "jetmoe": "no loader reads its experts one by one",
    "zaya": "loaders want fused linear_fc1 matrices for each expert",
    "step3p5": "separate 3-D gate, up and down",
    "step3p7": "separate 3-D gate, up and down",
    "inkling_mm_model": "interleaved w13_weight",
    "nemotron_h": "ungated",
    "ernie4_5_vl_moe": "text and vision experts of two widths in one layer",
    "deepseek_v4": "packed FP4 experts",
    "switch_transformers": "wi and wo for each expert",
    "nllb-moe": "fc1 and fc2 with biases for each expert",
}


def find_family(model_type: str) -> Family | None:
    """The row of a model type."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
