"""The layouts that ``tests/support/quantised.py`` writes itself are those of the formats' own libraries, which
``pip install autoawq``, ``nvidia-modelopt`` and ``gptqmodel`` bring; each test is skipped without its library."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_ext.checkpoints.modelopt import modelopt_weights
from moe_ext.checkpoints.stored_tensors import StoredTensor
from tests.support.quantised import FORMS, Tensors, _rounded

WEIGHT = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))  # (outputs, inputs)


def linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight.data.copy_(weight)
    return made


def assert_same_bytes(ours: Tensors, theirs: Tensors) -> None:
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(ours[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def test_autoawq_writes_the_same() -> None:
    gemm: Any = pytest.importorskip("awq.modules.linear.gemm", reason="needs autoawq")
    numbers, zeros, scales = _rounded(WEIGHT, 32, 4)
    # AutoAWQ rounds anew: it is given numbers that stand for what ours do.
    exact = ((numbers.unflatten(1, (-1, 32)) - zeros[..., None]) * scales[..., None]).flatten(1)
    written = gemm.WQLinear_GEMM.from_linear(linear(exact), 4, 32, scales=scales.T, zeros=zeros.T.float())
    theirs = {name: getattr(written, name) for name in ("qweight", "qzeros", "scales")}
    assert_same_bytes(FORMS["AWQ"]().store(WEIGHT), theirs)


def test_modelopts_numbers_are_read_as_modelopt_reads_them() -> None:
    qtensor: Any = pytest.importorskip("modelopt.torch.quantization.qtensor", reason="needs nvidia-modelopt")
    packed, scale, scale_2 = qtensor.NVFP4QTensor.quantize(WEIGHT, 16)
    theirs = {"weight": packed._quantized_data, "weight_scale": scale, "weight_scale_2": scale_2.reshape(())}
    ours = FORMS["ModelOpt, NVFP4"]().store(WEIGHT)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
    named = {f"m.{name}": tensor for name, tensor in theirs.items()}
    stored = {name: StoredTensor(name, Path(), each.dtype, tuple(each.shape), 0) for name, each in named.items()}
    (weight,) = modelopt_weights("folder", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, stored)
    got = weight.values(named, torch.float32)
    expected = packed.dequantize(dtype=torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert float((expected - WEIGHT).abs().max()) < float(WEIGHT.abs().max()) / 6  # half of the widest step, 4 to 6


@pytest.mark.parametrize("bits", [4, 8])
def test_gptqmodel_writes_the_same(bits: int) -> None:
    module: Any = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", reason="needs gptqmodel")
    group = {4: 32, 8: 16}[bits]
    numbers, zeros, scales = _rounded(WEIGHT, group, bits)
    exact = ((numbers.unflatten(1, (-1, group)) - zeros[..., None]) * scales[..., None]).flatten(1)
    made = module.TorchLinear(
        bits=bits, group_size=group, sym=False, desc_act=False, in_features=128, out_features=64, bias=False
    )
    groups = torch.arange(128, dtype=torch.int32) // group
    made.pack(linear(exact), scales.T.contiguous().T, zeros.T.contiguous().T, g_idx=groups)
    theirs = {name: getattr(made, name) for name in ("qweight", "scales", "g_idx")}
    assert_same_bytes(FORMS[f"GPTQ, {bits} bits"]().store(WEIGHT), theirs)
