"""Tiny checkpoints with quantized weights, in the formats of the tools that users quantize with."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 64
BITS = torch.arange(8) * 4
AWQ_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
GGUF_PLUGIN = "vllm_gguf_plugin"  # vLLM's, which loads such files
GGUF_MATRICES = GGMLQuantizationType.Q8_0
Tensors = dict[str, Tensor]


def quantize_weights(directory: Path, method: str) -> None:
    """Quantize the linear layers of the model in `directory` by one of `METHODS`."""
    file, config_file = directory / "model.safetensors", directory / "config.json"
    convert, config = METHODS[method]
    weights = {}
    for name, weight in load_file(file).items():
        layer, _, kind = name.rpartition(".")
        is_linear = kind == "weight" and ".layers." in name and weight.dim() == 2
        parts = convert(weight) if is_linear else {kind: weight}
        weights |= {f"{layer}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(weights, file, metadata={"format": "pt"})
    settings = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**settings, "quantization_config": config}))


def _pack(codes: Tensor) -> Tensor:
    """Eight 4-bit codes of the last axis -> one int32, the first code in the lowest bits."""
    words = (codes.unflatten(-1, (-1, 8)).long() << BITS).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> codes 0 to 15 with zero at 8, and scales [out, in / GROUP]."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1) / 7
    return ((groups / scale[..., None]).round() + 8).flatten(1), scale


def _w8a8(weight: Tensor) -> Tensors:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def _w4a16(weight: Tensor) -> Tensors:
    codes, scale = _int4(weight)
    shape = torch.tensor(weight.shape)
    return {"weight_packed": _pack(codes), "weight_scale": scale.bfloat16(), "weight_shape": shape}


def _gptq(weight: Tensor) -> Tensors:
    codes, scale = _int4(weight)
    zeros = _pack(torch.full_like(scale.t(), 7))  # the format stores them less one
    groups = (torch.arange(weight.shape[1]) // GROUP).to(torch.int32)
    return {"qweight": _pack(codes).t(), "scales": scale.t().half(), "qzeros": zeros, "g_idx": groups}


def _awq(weight: Tensor) -> Tensors:
    codes, scale = _int4(weight)
    ordered = codes.t().unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1)
    return {
        "qweight": _pack(ordered),
        "scales": scale.t().half(),
        "qzeros": _pack(torch.full_like(scale.t(), 8)),
    }


def _compressed(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    """The configuration of compressed-tensors for symmetric integers."""
    common = {"type": "int", "symmetric": True}
    group = {"targets": ["Linear"], "weights": {**common, **weights}}
    if inputs is not None:
        group["input_activations"] = {**common, **inputs}
    config = {"quant_method": "compressed-tensors", "format": layout, "ignore": ["lm_head"]}
    return {**config, "config_groups": {"linear": group}}


METHODS: dict[str, tuple[Callable[[Tensor], Tensors], dict[str, Any]]] = {
    "compressed-tensors W8A8": (
        _w8a8,
        _compressed(
            "int-quantized",
            {"num_bits": 8, "strategy": "channel"},
            {"num_bits": 8, "strategy": "token", "dynamic": True},
        ),
    ),
    "compressed-tensors W4A16": (
        _w4a16,
        _compressed("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}, None),
    ),
    "GPTQ": (
        _gptq,
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
        },
    ),
    "AWQ": (
        _awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    ),
}


def write_gguf(directory: Path, layers: int) -> Path:
    """Replace the weights of the Qwen3 in `directory` by a GGUF file, whose matrices have 8 bits, and return that."""
    weights, file = directory / "model.safetensors", directory / "model.gguf"
    names = get_tensor_name_map(MODEL_ARCH.QWEN3, layers)
    writer = GGUFWriter(file, "qwen3")
    for name, weight in load_file(weights).items():
        dtype = GGUF_MATRICES if weight.dim() == 2 else GGMLQuantizationType.F32
        writer.add_tensor(
            names.get_name(name, (".weight",)), quantize(weight.numpy(), dtype), raw_dtype=dtype
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weights.unlink()
    return file


def multiply_gguf_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dequantize weights in place of the kernels of vLLM's plugin, all of which need a GPU."""

    def ggml_dequantize(weight: Tensor, kind: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        values = torch.from_numpy(dequantize(weight.numpy(), GGMLQuantizationType(kind)))
        return values.to(dtype).reshape(rows, columns)

    def multiply(weight: Tensor, x: Tensor, kind: int, rows: int) -> Tensor:
        # Each row alone: a BLAS rounds by the number of rows.
        values = ggml_dequantize(weight, kind, rows, x.shape[-1], x.dtype)
        return torch.stack([values @ row for row in x])

    ops = import_module(f"{GGUF_PLUGIN}.ops")
    monkeypatch.setattr(ops, "ggml_dequantize", ggml_dequantize)
    monkeypatch.setattr(ops, "ggml_mul_mat_a8", multiply)
    monkeypatch.setattr(ops, "ggml_mul_mat_vec_a8", multiply)
