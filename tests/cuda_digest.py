"""Prints a digest of what the CUDA operators return for fixed inputs, every way that they can be computed.

Two runs must print the same, whatever the order in which a device runs blocks and warps: `.ci/run` compares runs.
"""

import hashlib
import os

import torch

from moe_ext import ops
from tests.support.quantised_layers import FORMATS, quantised_case
from tests.support.reference import DTYPES, GROUPED, WGMMA, experts_case

KERNELS = ["small_batch", *GROUPED, *["hopper_pairs"] * WGMMA, "plain"]
PACKED_KERNELS = ["small_batch", "flat", "narrow", *["hopper"] * WGMMA, "plain"]
SHAPES = [(1, 8, 2, 264, 128), (13, 6, 3, 128, 328), (150, 5, 2, 136, 72), (2500, 3, 2, 16, 24)]  # T, E, K, H, I


def quantised_results() -> list[torch.Tensor]:
    """Of a layer in every format of weights, by every way that takes it; down's k is in parts."""
    results = []
    for form in FORMATS.values():
        case = quantised_case(form, 13, 4, 2, 72, 1160, dtype=torch.bfloat16, sentinels=0.3).packed.to("cuda")
        for kernels in PACKED_KERNELS:
            os.environ["MOE_EXT_CUDA_KERNELS"] = kernels
            moments = torch.zeros(4, 3, 3, dtype=torch.float64, device="cuda")
            channels = torch.zeros(4, 1160, dtype=torch.float64, device="cuda")
            out = ops.experts_observed(*case.arguments(), moments, None, channels, **case.options)
            results += [out.cpu(), moments.cpu(), channels.cpu()]
    return results


def main() -> None:
    digest = hashlib.sha256()
    runs = 0
    for shape in SHAPES:
        for dtype in DTYPES:
            case = experts_case(*shape, dtype=dtype, seed=sum(shape), sentinels=0.3)
            x, gate_up, down, experts, weights = (argument.to("cuda") for argument in case.arguments()[:5])
            logits = torch.randn(shape[0], shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
            routed = ops.route(logits.to("cuda"), shape[2], torch.full((shape[2] - 1,), 0.6, device="cuda"))
            results = [tensor.cpu() for tensor in routed]
            for kernels in KERNELS:
                if dtype == torch.float32 and kernels != "plain":
                    continue
                if shape[0] > 1000 and kernels == "small_batch":
                    continue
                os.environ["MOE_EXT_CUDA_KERNELS"] = kernels
                moments = torch.zeros(shape[1], 3, 3, dtype=torch.float64, device="cuda")
                channels = torch.zeros(shape[1], shape[4], dtype=torch.float64, device="cuda")
                pairs = torch.zeros(shape[1], shape[1], dtype=torch.float64, device="cuda")
                out = ops.experts_observed(x, gate_up, down, experts, weights, "silu", moments, None, channels, pairs)
                gram = ops.expert_gram(x, gate_up, down, "silu")
                projection = ops.expert_projection(x, gate_up, down, x, "silu")
                results += [out.cpu(), moments.cpu(), channels.cpu(), pairs.cpu(), gram.cpu(), projection.cpu()]
                runs += 1
            for tensor in results:
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    for tensor in quantised_results():
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    runs += len(FORMATS) * len(PACKED_KERNELS)
    print(f"{digest.hexdigest()} of {runs} runs")


if __name__ == "__main__":
    main()
