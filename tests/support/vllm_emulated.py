"""In vLLM's environment: lets vLLM on any CPU run int4 experts by its emulation, which is meant for GPUs. vLLM reads
the weights and makes them bfloat16, and its kernel for float experts runs them.
"""

from typing import Any

from vllm.model_executor.layers.fused_moe.experts import cpu_moe, int4_emulation_moe
from vllm.model_executor.layers.fused_moe.oracle import int_wna16


class EmulatedExperts(cpu_moe.CPUUnquantizedExperts):
    def __init__(self, moe_config: Any, quant_config: Any) -> None:
        super().__init__(moe_config, quant_config)
        for weight in (self.quant_config._w1, self.quant_config._w2):
            weight.dtype = weight.scale = None  # they are float by now

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return True

    @property
    def quant_dtype(self) -> None:
        return None

    @property
    def block_shape(self) -> None:
        return None

    def process_weights_after_loading(self, layer: Any) -> None:
        """They are packed for the kernel where they became float."""


def install() -> None:
    """Puts it in the place of vLLM's choice of kernels."""
    emulation = int_wna16.WNA16MoEBackend.EMULATION
    made_float = int_wna16._process_weights_emulation_gptq

    def packed(*arguments: Any) -> Any:
        first, second, *rest = made_float(*arguments)
        packed = (cpu_moe.cpu_prepack_moe_weight(weight, EmulatedExperts.isa) for weight in (first, second))
        return (*packed, *rest)

    int_wna16._process_weights_emulation_gptq = packed
    int_wna16._get_priority_backends = lambda: [emulation]
    int4_emulation_moe.Int4EmulationTritonExperts = EmulatedExperts
