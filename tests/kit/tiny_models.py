"""Tiny models of transformers in which every scale matters, for tests of what loads again."""

from __future__ import annotations

import json

import torch
import transformers

# Every expert is used for every token: no difference is lost, or blown up, by other choices.
SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
CONFIGS = {
    "qwen3_moe": SIZES
    | {"head_dim": 64, "intermediate_size": 256, "moe_intermediate_size": 128, "num_experts": 4},
    "mixtral": SIZES | {"head_dim": 64, "intermediate_size": 128, "num_local_experts": 4},
    # A dense layer, then one of experts with a shared one.
    "deepseek_v3": SIZES
    | {
        "num_key_value_heads": 4,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 128,
        "v_head_dim": 64,
    },
}
TOKENS = torch.arange(48).mul(29).remainder(64).view(2, 24)


def save(model_type, folder):
    """Build a model and save it as transformers does, experts fused; statistics beside it."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **CONFIGS[model_type])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                fill(parameter)
    model.to(torch.bfloat16).save_pretrained(folder / "in", save_original_format=False)
    read = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    read += [n for n, p in model.named_parameters() if p.dim() == 3]
    modules = {name: {"input_amax": 8 + number / 64} for number, name in enumerate(read)}
    text = json.dumps({"schema": "moe-ckpt/stats", "version": 1, "modules": modules})
    (folder / "stats.json").write_text(text)
    return folder / "in", folder / "stats.json"


def fill(parameter):
    """Random, of another magnitude in every matrix, row and group of 32 columns."""
    *lead, n, k = parameter.shape
    matrix, row = torch.rand(*lead, 1, 1), torch.rand(*lead, n, 1)
    column = torch.rand(*lead, 1, -(-k // 32)).repeat_interleave(32, -1)[..., :k]
    magnitude = (4 * (matrix + row + column - 1.5)).exp2()
    parameter.copy_(torch.randn(parameter.shape) * magnitude * k**-0.5)


def load(folder, **quantization):
    """A model in bf16, and what transformers says that it lacked or did not know."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if quantization:
        config.quantization_config |= quantization
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.bfloat16, output_loading_info=True
    )
    return model.eval(), {what: sorted(map(str, found)) for what, found in info.items() if found}


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits.float()


def weights(model):
    """All parameters; what compressed-tensors keeps compressed, it decodes in the first run."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def distance(x, y):
    """The difference, relative to y."""
    return ((x.float() - y.float()).norm() / y.float().norm()).item()
