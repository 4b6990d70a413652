"""Quantized checkpoints in every encoding that is read, and the numbers that they stand for.

Written apart from the package, in plain torch from the definitions.
"""

from __future__ import annotations

import torch
from kit.expert_layouts import config_of, matrices_of, write

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SCALE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SCALE_DTYPES |= {"U8": torch.uint8, "F8_E8M0": torch.float8_e8m0fnu}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
QWEN = "model.layers.0.mlp.experts"


def spread(weight, step=1):
    """Weights whose blocks, rows and tiles differ in size: a scale belongs to one place only."""
    n, k = weight.shape[-2:]
    rows, columns = torch.arange(n).view(-1, 1), torch.arange(k).view(1, -1)
    blocks = (rows // 16 * 5 + columns // 16 * 3) % 4 * step
    tiles = (rows // 128 + columns // 128 * 2) % 4
    return weight.float() * 2.0 ** (blocks + rows // 16 % 3 + rows % 2 + tiles - 6)


def float4_codes(values):
    """The nearest E2M1 code, half to even."""
    magnitude = values.abs()
    index = sum((magnitude > limit).int() for limit in (0.25, 1.25, 2.5, 5.0))
    index += sum((magnitude >= limit).int() for limit in (0.75, 1.75, 3.5))
    return (index + 8 * (values < 0)).to(torch.uint8)


def float4_values(codes):
    """The values of E2M1 codes."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)])
    return table[codes.long()]


def nibbles(codes):
    """Two codes in a byte, the even column low."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def words(codes):
    """Eight codes in an int32, the first column lowest."""
    shifts = 4 * torch.arange(8)
    packed = (codes.long().unflatten(-1, (-1, 8)) << shifts).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def per_block(scale, rows, columns, shape):
    """A scale for each weight, of one for ``rows`` x ``columns``."""
    wide = scale.float().repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    return wide[..., : shape[-2], : shape[-1]]


def block_amax(weight, rows, columns):
    """The largest magnitude of blocks, those at the edges cut off."""
    n, k = weight.shape[-2:]
    padded = torch.nn.functional.pad(weight.abs(), (0, -k % columns, 0, -n % rows))
    tiles = padded.unflatten(-2, (-1, rows)).unflatten(-1, (-1, columns))
    return tiles.amax((-3, -1))


def e4m3(values):
    """The nearest E4M3."""
    return values.clamp(-448, 448).to(torch.float8_e4m3fn)


def exponent_of(amax, largest):
    """The smallest e with amax <= largest * 2**e."""
    e = torch.ceil(torch.log2(amax.double().clamp(min=2.0**-120) / largest))
    return e.clamp(-127, 127)


def as_e8m0(exponent, dtype):
    """Powers of two as a byte."""
    byte = (exponent + 127).to(torch.uint8)
    return byte if dtype == "U8" else byte.view(torch.float8_e8m0fnu)


def beside(name, ending):
    """The tensor with an ending beside a weight; one with a dot is another of its module."""
    return (name.removesuffix(".weight") if ending.startswith(".") else name) + ending


def fp8_block(name, weight, dtype="F32", ending="_scale_inv", dims=2):
    """DeepSeek's; 4-D as ModelOpt exports it."""
    scale = block_amax(weight, 128, 128) / 448
    if dtype == "F8_E8M0":
        exponent = exponent_of(block_amax(weight, 128, 128), 448)
        stored, scale = as_e8m0(exponent, dtype), (2.0**exponent).float()
    else:
        stored = scale.to(SCALE_DTYPES[dtype])
        scale = stored.float()
    wide = per_block(scale, 128, 128, weight.shape)
    codes = e4m3(weight / wide)
    if dims == 4:
        stored = stored[..., :, None, :, None]
    return {name: codes, beside(name, ending): stored}, codes.float() * wide


def fp8_tensor(
    name,
    weight,
    dtype="F32",
    dims=0,
    inputs=None,
    input_dtype="F32",
    ending="_scale",
    input_name="input_scale",
):
    """One scale for the matrix; of a stack one for each, ``dims`` 3 as they are multiplied.

    ``dims`` 0 of a stack: one for all.
    """
    amax = weight.abs().amax() if dims == 0 else weight.abs().amax((-2, -1))
    stored = (amax / 448).to(SCALE_DTYPES[dtype])
    wide = stored.float().unflatten(-1, (-1, 1, 1)) if stored.dim() else stored.float()
    codes = e4m3(weight / wide)
    scale = beside(name, ending)
    tensors = {name: codes, scale: stored.view(1) if dims == 1 else stored}
    if dims == 3:
        tensors[scale] = stored.view(-1, 1, 1)
    if inputs is not None:
        input_scale = torch.tensor(inputs, dtype=SCALE_DTYPES[input_dtype])
        module = name.removesuffix("weight") if name.endswith("weight") else f"{name}_"
        if weight.dim() == 3:
            input_scale = input_scale.expand(len(weight)).contiguous()
        tensors[f"{module}{input_name}"] = input_scale.view(1) if dims == 1 else input_scale
    return tensors, codes.float() * wide


def fp8_channel(name, weight, dtype="F32", dims=2):
    """One scale for each row."""
    stored = (weight.abs().amax(-1, keepdim=True) / 448).to(SCALE_DTYPES[dtype])
    codes = e4m3(weight / stored.float())
    scale = stored if dims == 2 else stored.squeeze(-1)
    return {name: codes, f"{name}_scale": scale}, codes.float() * stored.float()


def mxfp8(name, weight, dtype="U8", ending="_scale"):
    """A power of two for 32."""
    exponent = exponent_of(block_amax(weight, 1, 32), 448)
    wide = per_block(2.0**exponent, 1, 32, weight.shape)
    codes = e4m3(weight / wide)
    return {name: codes, f"{name}{ending}": as_e8m0(exponent, dtype)}, codes.float() * wide


def nvfp4(name, weight, dialect="modelopt", dims=0, inputs=0.25, amax=None, other=1.0):
    """``amax`` is that of all that share a scale; ``other`` is what the scale differs by."""
    known = weight.abs().amax() if amax is None else amax
    multiplier = known.float() / 2688 * other
    divisor = 1 / multiplier
    scale = e4m3(block_amax(weight, 1, 16) / (6 * multiplier))
    inner = scale.float() * multiplier if dialect == "modelopt" else scale.float() / divisor
    wide = per_block(inner, 1, 16, weight.shape)
    codes = float4_codes(torch.where(wide == 0, 0.0, weight / wide))
    module = name.removesuffix("weight")
    if dialect == "modelopt":
        tensors = {name: nibbles(codes), f"{name}_scale": scale, f"{name}_scale_2": multiplier}
        extra = {f"{module}input_scale": inputs}
    else:
        tensors = {f"{name}_packed": nibbles(codes), f"{name}_scale": scale}
        tensors[f"{name}_global_scale"] = divisor
        extra = {f"{module}input_global_scale": inputs and 1 / inputs}
    tensors |= {key: torch.tensor(value) for key, value in extra.items() if value is not None}
    shaped = {k: t.view(1) if dims == 1 and t.dim() == 0 else t for k, t in tensors.items()}
    return shaped, float4_values(codes) * wide


def mxfp4(name, weight, dtype="U8", blocks=False, ending=None):
    """compressed-tensors'; ``blocks`` as gpt-oss is released; ``ending`` as it is beside FP8."""
    exponent = exponent_of(block_amax(weight, 1, 32), 6)
    wide = per_block(2.0**exponent, 1, 32, weight.shape)
    codes = float4_codes(weight / wide)
    packed, scale = nibbles(codes), as_e8m0(exponent, dtype)
    tensors = {f"{name}_packed": packed, f"{name}_scale": scale}
    if ending:
        tensors = {name: packed.view(torch.int8), beside(name, ending): scale}
    if blocks:
        tensors = {f"{name}_blocks": packed.unflatten(-1, (-1, 16)), f"{name}_scales": scale}
    return tensors, float4_values(codes) * wide


def int4(name, weight, group=32, dtype="BF16", shape_dtype=torch.int64):
    """compressed-tensors' pack-quantized, symmetric."""
    stored = (block_amax(weight, 1, group) / 7.5).to(SCALE_DTYPES[dtype])
    wide = per_block(stored, 1, group, weight.shape)
    codes = (weight / wide).round().clamp(-8, 7) + 0.0
    tensors = {f"{name}_packed": words((codes + 8).to(torch.uint8)), f"{name}_scale": stored}
    tensors[f"{name}_shape"] = torch.tensor(weight.shape, dtype=shape_dtype)
    return tensors, codes * wide


def int8(name, weight, dtype="F32", dims=2):
    """compressed-tensors' int-quantized, by channel."""
    stored = (weight.abs().amax(-1, keepdim=True) / 127.5).to(SCALE_DTYPES[dtype])
    codes = (weight / stored.float()).round().clamp(-128, 127) + 0.0
    scale = stored if dims == 2 else stored.squeeze(-1)
    return {name: codes.to(torch.int8), f"{name}_scale": scale}, codes * stored.float()


def experts(encode, count, i, h, *, module=QWEN, shared_amax=False, step=1, **options):
    """Split experts: their tensors, and the decoded matrices by weight name."""
    tensors, decoded = {}, {}
    for e, matrices in enumerate(matrices_of(count, i, h, torch.float32)):
        weights = [spread(matrix, step) for matrix in matrices]
        together = torch.stack([w.abs().amax() for w in weights[:2]]).amax()
        for projection, weight in zip(PROJECTIONS, weights, strict=True):
            name = f"{module}.{e}.{projection}.weight"
            more = {"amax": together} if shared_amax and projection != "down_proj" else {}
            found, decoded[name] = encode(name, weight, **options, **more)
            tensors |= found
    return tensors, decoded


def linear(encode, name, n, k, seed=0, **options):
    """A linear layer: its tensors, and the decoded matrix by weight name."""
    weight = spread(matrices_of(seed + 1, n, k, torch.float32)[seed][0])
    tensors, decoded = encode(f"{name}.weight", weight, **options)
    return tensors, {f"{name}.weight": decoded}


def fused(encode, count, i, h, *, module=QWEN, interleaved=False, step=1, **options):
    """Fused experts: their tensors, and the decoded matrices by the weight name when split."""
    tensors, decoded = {}, {}
    all_matrices = [
        [spread(m, step) for m in matrices] for matrices in matrices_of(count, i, h, torch.float32)
    ]
    gate_up = torch.stack(
        [
            torch.stack((g, u), 1).flatten(0, 1) if interleaved else torch.cat((g, u))
            for g, u, _ in all_matrices
        ]
    )
    down = torch.stack([d for _, _, d in all_matrices])
    for leaf, weight in (("gate_up_proj", gate_up), ("down_proj", down)):
        found, values = encode(f"{module}.{leaf}", weight, **options)
        tensors |= found
        for e, value in enumerate(values):
            halves = {"down_proj": value}
            if leaf == "gate_up_proj":
                pair = (value[0::2], value[1::2]) if interleaved else value.chunk(2)
                halves = dict(zip(PROJECTIONS, pair, strict=False))
            for projection, half in halves.items():
                decoded[f"{module}.{e}.{projection}.weight"] = half
    return tensors, decoded


def save(folder, tensors, quantization, *, count, i, h, model_type="qwen3_moe", shards=1, **config):
    """A checkpoint of one layer, with what its config says of quantization."""
    found = config_of(model_type, count, i, h, 1) | config
    if quantization is not None:
        found["quantization_config"] = quantization
    write(folder, tensors, found, shards)
    return folder


FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
MXFP8 = FP8 | {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
FP8_TENSOR = {"quant_method": "fp8", "activation_scheme": "static"}
FP8_FP4 = FP8 | {"expert_dtype": "fp4"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}


def compressed(kind, bits, strategy, stored, group=None, block=None, dynamic_input=None):
    """The configuration of compressed-tensors for one group."""
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True}
    weights |= {"dynamic": False, "group_size": group, "block_structure": block}
    inputs = None
    if dynamic_input is not None:
        inputs = {"num_bits": 8, "type": kind, "dynamic": dynamic_input}
        inputs["strategy"] = "token" if dynamic_input else "tensor"
    group_0 = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group_0},
    }


CT_NVFP4 = compressed("float", 4, "tensor_group", "nvfp4-pack-quantized", 16)
CT_MXFP4 = compressed("float", 4, "group", "mxfp4-pack-quantized", 32)
CT_MXFP8 = compressed("float", 8, "group", "mxfp8-quantized", 32)
CT_BLOCK = compressed("float", 8, "block", "float-quantized", block=[128, 128], dynamic_input=True)
CT_CHANNEL = compressed("float", 8, "channel", "float-quantized", dynamic_input=True)
CT_TENSOR = compressed("float", 8, "tensor", "float-quantized", dynamic_input=False)
CT_INT8 = compressed("int", 8, "channel", "int-quantized", dynamic_input=True)


def ct_int4(group):
    """Integers of compressed-tensors."""
    return compressed("int", 4, "group", "pack-quantized", group)


TRANSFORMERS = {"ending": "_scale_inv", "inputs": 0.5, "input_name": "activation_scale"}
MISTRAL = {"ending": ".qscale_weight", "inputs": 0.5, "input_name": "qscale_act"}

# name -> (encoder, its options, what the config says, K must be a multiple of)
ENCODINGS = {
    **{
        f"fp8-block-{dtype}": (fp8_block, {"dtype": dtype}, FP8, 1)
        for dtype in ("F32", "BF16", "F16", "F8_E8M0")
    },
    "fp8-block-4d": (fp8_block, {"ending": "_scale", "dims": 4}, MODELOPT, 1),
    "fp8-block-4d-inv": (fp8_block, {"dims": 4}, FP8, 1),
    "fp8-block-deepseek-v4": (fp8_block, {"ending": ".scale", "dtype": "F8_E8M0"}, FP8, 1),
    "fp8-block-ct": (fp8_block, {"ending": "_scale", "dtype": "BF16"}, CT_BLOCK, 1),
    "fp8-tensor-0d": (fp8_tensor, {"inputs": 0.5}, MODELOPT, 1),
    "fp8-tensor-1d": (fp8_tensor, {"inputs": 0.5, "dims": 1, "dtype": "BF16"}, CT_TENSOR, 1),
    "fp8-tensor-dynamic": (fp8_tensor, {"dims": 1}, CT_TENSOR, 1),
    "fp8-tensor-inv": (fp8_tensor, TRANSFORMERS, FP8_TENSOR, 1),
    "fp8-tensor-mistral": (fp8_tensor, MISTRAL, FP8_TENSOR, 1),
    "fp8-channel-1d": (fp8_channel, {"dims": 1}, MODELOPT, 1),
    "fp8-channel-bf16": (fp8_channel, {"dtype": "BF16"}, CT_CHANNEL, 1),
    "fp8-channel-f16": (fp8_channel, {"dtype": "F16"}, CT_CHANNEL, 1),
    "mxfp8-modelopt": (mxfp8, {}, MODELOPT, 32),
    "mxfp8-inv": (mxfp8, {"ending": "_scale_inv"}, MXFP8, 32),
    "mxfp8-inv-e8m0": (mxfp8, {"ending": "_scale_inv", "dtype": "F8_E8M0"}, MXFP8, 32),
    "mxfp8-ct": (mxfp8, {}, CT_MXFP8, 32),
    "nvfp4-modelopt": (nvfp4, {}, MODELOPT, 16),
    "nvfp4-modelopt-1d": (nvfp4, {"dims": 1}, MODELOPT, 16),
    "nvfp4-w4a16": (nvfp4, {"inputs": None}, MODELOPT, 16),
    "nvfp4-ct": (nvfp4, {"dialect": "ct", "dims": 1}, CT_NVFP4, 16),
    "nvfp4-ct-a16": (nvfp4, {"dialect": "ct", "dims": 1, "inputs": None}, CT_NVFP4, 16),
    "mxfp4-ct": (mxfp4, {}, CT_MXFP4, 32),
    "mxfp4-ct-e8m0": (mxfp4, {"dtype": "F8_E8M0"}, CT_MXFP4, 32),
    "mxfp4-deepseek-v4": (mxfp4, {"ending": ".scale", "dtype": "F8_E8M0"}, FP8_FP4, 32),
    "mxfp4-inv": (mxfp4, {"ending": "_scale_inv"}, FP8_FP4, 32),
    "int4-g32": (int4, {"shape_dtype": torch.int32}, ct_int4(32), 32),
    "int4-g64-f16": (int4, {"group": 64, "dtype": "F16"}, ct_int4(64), 64),
    "int4-g128-f32": (int4, {"group": 128, "dtype": "F32"}, ct_int4(128), 128),
    "int8": (int8, {"dtype": "BF16"}, CT_INT8, 1),
    "int8-1d": (int8, {"dims": 1}, CT_INT8, 1),
}
