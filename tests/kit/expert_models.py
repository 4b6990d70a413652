"""Models of transformers, tiny, whose experts hold numbers that FP8 holds exactly."""

from __future__ import annotations

import json
import zlib

import torch
import transformers
from kit.files import FIXTURES

E, H = 8, 64
HEADERS = json.loads((FIXTURES / "layout-headers.json").read_text())
# For model types whose config is not among the headers: every family's word for each size.
CONFIG = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size"), 24),
    "hidden_size": H,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "first_k_dense_replace": 0,
    "enable_moe_block": True,
    # What some have of their own; their defaults are those of large models.
    "vocab_size_per_layer_input": 128,
    "index_n_heads": 2,
}


def build(model_type, intermediate, saved=None):
    """A model in float32 whose experts hold multiples of 2**-12 that E4M3 can hold."""
    torch.manual_seed(zlib.crc32(model_type.encode()))
    saved = saved or HEADERS.get(model_type, {"A": {"config": CONFIG}})["A"]["config"]
    config = sized(json.loads(json.dumps(saved)), intermediate)
    config = transformers.AutoConfig.for_model(config.pop("model_type", model_type), **config)
    names = saved.get("architectures")
    if names:
        model = getattr(transformers, names[0])._from_config(config, dtype=torch.float32)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 3 and ("expert" in name or "put_linear" in name):
                fill(parameter)
            elif name.endswith(("mlp.w1", "mlp.v1", "mlp.w2")):
                fill(parameter.view(E, -1, H))
            elif name.endswith("proj_bias"):
                parameter.copy_(torch.randn(parameter.shape).bfloat16())
    return model.eval()


def sized(config, intermediate):
    """The config with another expert width: 24 in all of the headers."""
    for key, value in list(config.items()):
        if key in ("dtype", "transformers_version", "time_step_limit"):
            del config[key]
        elif isinstance(value, dict):
            sized(value, intermediate)
        elif "size" in key and value in (24, [24, 16]):
            config[key] = intermediate if value == 24 else [intermediate, 16]
    return config


def fill(tensor):
    codes = torch.randint(0, 256, tensor.shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = codes.float().nan_to_num(0.0)
    values.flatten(1)[:, 7] = 448.0
    tensor.copy_(values * 2.0**-12)
