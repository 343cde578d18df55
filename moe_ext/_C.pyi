torch_built_with: str
torch_at_least: str
cuda_archs: str
compiler: str

def cpu_variants() -> list[tuple[str, bool]]: ...
def active_cpu_variant() -> str: ...
