torch_built_with: str
torch_at_least: str
cuda_archs: str
compiler: str

def cpu_variants() -> list[tuple[str, bool]]: ...
def active_cpu_variant() -> str: ...
def cuda_kernels(
    tokens: int, hidden: int, intermediate: int, num_experts: int, top_k: int, dtype: str, weights: str
) -> str: ...
