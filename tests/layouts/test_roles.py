"""By behaviour: our matrices compute what the experts of transformers compute.

Each model is built tiny, its experts filled with numbers that FP8 holds exactly, saved by
transformers in both of its forms, converted, and decoded again. So nothing is lost on the way, and
x @ gate.T, the activation and @ down.T must give what the model's own module gives.
"""

from __future__ import annotations

import pytest
import torch
from kit.files import read_tensors

import moe_ckpt
from moe_ckpt.layouts.table import FAMILIES

pytest.importorskip("transformers")

from kit.expert_models import E, H, build

pytestmark = pytest.mark.filterwarnings("ignore")

# In the table for releases that transformers loads with code of theirs, or under another type.
NOT_BUILT = {"ernie4_5_moe_vl", "kimi_k2", "mimo_v2", "minimax_m3", "qwen3_vl_moe_text", "step3p5"}
BUILT = [
    model_type
    for family in FAMILIES
    if family.checked in ("export", "module")
    for model_type in family.model_types
    if model_type not in NOT_BUILT
]
# What transformers writes under names or in sizes that cannot be taken back; see the table.
REFUSED = {
    *((name, "B") for name in ("axk2", "ernie4_5_vl_moe", "glm5_next", "hy_v4", "kimi_linear")),
    *((name, "B") for name in ("deepseek_v4", "kimi_k25", "qwen3_omni_moe")),
    *((name, "B") for name in ("bailing_hybrid", "deepseek_ocr2", "dots3_note", "hy_v4_vl")),
    *((name, "B") for name in ("inkling2", "inkling2_loop", "lara_mini", "mistral_large4")),
    *((name, "B") for name in ("sarvam_moe", "unlimited_ocr")),
    ("qwen3_omni_moe_thinker", "B"),
    *((name, "B") for name in ("inkling_mm_model", "longcat_flash", "minimax_m3_vl", "step3p7")),
    ("longcat_flash", "A"),
}
BOTH_ORIENTATIONS = {"qwen3_vl_moe"}


def save_and_convert(model, folder, mode, layout=None):
    model.to(torch.bfloat16).save_pretrained(folder / mode, save_original_format=mode == "A")
    model.float()
    stats = folder / "stats.json"
    stats.write_text('{"schema": "moe-ckpt/stats", "version": 1, "modules": {"none": {}}}')
    out = folder / f"{mode}-out"
    result = moe_ckpt.convert(
        folder / mode,
        out,
        format="fp8-tensor",
        stats=[stats],
        missing_stats="constant",
        experts="split",
        layout=layout,
    )
    return result.plan.experts, read_tensors(out)


def values(tensors, name):
    stored = tensors[name]
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
    flat = torch.frombuffer(bytearray(stored.data), dtype=dtypes[stored.dtype])
    return flat.view(stored.shape).float()


def decoded(tensors, module):
    return values(tensors, f"{module}.weight") * values(tensors, f"{module}.weight_scale")


def modules_with_experts(model):
    """The modules that hold experts, layer by layer."""
    found = []
    for name, module in model.named_modules():
        own = {leaf for leaf, _ in module.named_parameters(recurse=False)}
        is_routed = not any(word in name for word in ("shared", "encoder", "talker", "tower"))
        has_weights = own & {"gate_up_proj", "up_proj"} and is_routed
        if has_weights or type(module).__name__ in ("DbrxExperts", "JetMoeMoE"):
            found.append(module)
    return found


def run_theirs(module, x):
    """[E, tokens, H]: every expert on every token."""
    name = type(module).__name__
    if name == "Llama4TextExperts":
        return module(x.repeat(E, 1)).view(E, -1, H)
    if name == "JetMoeMoE":
        sizes = [len(x)] * E
        gate, up = module.input_linear(x.repeat(E, 1), sizes).chunk(2, dim=-1)
        hidden = module.activation(gate) * up
        return module.output_linear(hidden, sizes).view(E, -1, H)
    expert = torch.arange(E).repeat_interleave(len(x)).view(-1, 1)
    return module(x.repeat(E, 1), expert, torch.ones(len(expert), 1)).view(E, -1, H)


def activation(module, gate, up):
    name = type(module).__name__
    if name in ("GptOssExperts", "OpenAIPrivacyFilterExperts", "MiniMaxM3VLExperts"):
        alpha = getattr(module, "alpha", None) or module.swiglu_alpha
        gate = gate.clamp(max=module.limit)
        return (up.clamp(-module.limit, module.limit) + 1) * gate * torch.sigmoid(alpha * gate)
    if name == "DeepseekV4Experts":
        return module.act_fn(gate.clamp(max=module.limit)) * up.clamp(-module.limit, module.limit)
    if name in ("HYV4Experts", "HYV4VLExperts", "Glm5NextTextExperts"):
        gate = gate.clamp(max=module.swiglu_limit)
        return torch.nn.functional.silu(gate) * up.clamp(-module.swiglu_limit, module.swiglu_limit)
    if name == "Step3p7Experts":
        gate = module.act_fn(gate).clamp(max=module.limit)
        return gate * up.clamp(-module.limit, module.limit)
    if name in ("Inkling2Experts", "Inkling2LoopExperts"):
        return module.act_fn(gate, up)
    if name == "DbrxExperts":
        return module.mlp.activation_fn(gate) * up
    act = module.activation if name == "JetMoeMoE" else module.act_fn
    return act(up) if gate is None else act(gate) * up


def run_ours(module, experts, tensors, x):
    results = []
    for e in range(experts.first, experts.first + experts.num_experts):
        names = [f"{experts.output}.{e}.{name}" for name in experts.projections]
        biases = [
            values(tensors, f"{name}.bias") if f"{name}.bias" in tensors else torch.zeros(1)
            for name in names
        ]
        *reading, down = [decoded(tensors, name) for name in names]
        read = [x @ w.T + b for w, b in zip(reading, biases, strict=False)]
        hidden = activation(module, read[0] if len(read) == 2 else None, read[-1])
        result = hidden @ down.T + biases[-1]
        results.append(getattr(module, "post_expert_norm", lambda x: x)(result))
    return torch.stack(results)


@pytest.mark.parametrize(
    "intermediate",
    [  # neither, gate_up or down is square
        24,
        pytest.param(32, marks=pytest.mark.slow),
        pytest.param(64, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("model_type", BUILT)
def test_our_matrices_compute_what_the_module_computes(tmp_path, model_type, intermediate):
    model = build(model_type, intermediate)
    square = model_type in BOTH_ORIENTATIONS and intermediate != 24
    outputs = {}
    for mode in "AB":
        if (model_type, mode) in REFUSED:
            with pytest.raises(moe_ckpt.LayoutError):
                save_and_convert(model, tmp_path, mode)
            continue
        if square:
            with pytest.raises(moe_ckpt.LayoutError, match="square"):
                save_and_convert(model, tmp_path, mode)
        found, tensors = save_and_convert(model, tmp_path, mode, "fused" if square else None)
        modules = modules_with_experts(model)
        assert len(found) == len(modules) > 0
        x = torch.randn(5, H) * 4
        for experts, module in zip(found, modules, strict=True):
            theirs = run_theirs(module, x)
            ours = run_ours(module, experts, tensors, x)
            assert theirs.abs().max() > 1e-3
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        outputs[mode] = tensors
        if mode == "A":
            same_as_saved(tmp_path / "A", tensors)
    assert outputs or model_type == "longcat_flash"
    if len(outputs) == 2:
        assert outputs["A"] == outputs["B"]


def same_as_saved(folder, tensors):
    """Where transformers saves experts one by one, ours are those matrices under those names."""
    saved = read_tensors(folder)
    for name, stored in saved.items():
        if f"{name}_scale" in tensors:
            assert torch.equal(decoded(tensors, name.removesuffix(".weight")), values(saved, name))
        elif name in tensors:
            assert tensors[name] == stored


def test_every_family_that_says_so_is_built():
    said = {t for f in FAMILIES if f.checked in ("export", "module") for t in f.model_types}
    assert set(BUILT) | NOT_BUILT >= said
