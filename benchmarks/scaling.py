"""How long would calibrating and pruning a large model take, and how much memory? Fills the tables of docs/scaling.md.

    python benchmarks/scaling.py

The formula is in the document; the rates are those of the newest streaming result, and the bandwidths that it states.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from update_tables import newest

from moe_ext.storage.dated_results import table
from moe_ext.storage.files import replace_file

DOCUMENT = Path(__file__).parent.parent / "docs" / "scaling.md"
BEGIN, END = "<!-- scaling tables -->", "<!-- end of scaling tables -->"

TOKENS = 128 * 2048  # NAEE calibrates with 128 sequences of 2048 tokens
SEQUENCE = 2048
BATCH = 8  # sequences
KEPT = 0.75  # of the experts
ELEMENT = 2  # bytes, bfloat16


@dataclass(frozen=True)
class Model:
    """Shapes as the models' config.json has them."""

    name: str
    layers: int
    dense_layers: int
    hidden: int
    experts: int
    inner: int
    top_k: int
    attention: int  # parameters of a layer's attention
    heads: int  # attention heads times their dimension
    shared: int  # inner size of shared experts
    dense_inner: int
    vocabulary: int

    @property
    def expert_parameters(self) -> int:
        return 3 * self.hidden * self.inner

    @property
    def layer_parameters(self) -> int:
        shared = 3 * self.hidden * self.shared
        return self.attention + self.experts * (self.expert_parameters + self.hidden) + shared

    @property
    def parameters(self) -> int:
        dense = self.attention + 3 * self.hidden * self.dense_inner
        sparse = self.layers - self.dense_layers
        return sparse * self.layer_parameters + self.dense_layers * dense + 2 * self.vocabulary * self.hidden

    @property
    def pruned_parameters(self) -> float:
        sparse = self.layers - self.dense_layers
        return self.parameters - (1 - KEPT) * sparse * self.experts * self.expert_parameters

    @property
    def layer_flops(self) -> int:
        """Of one token through one layer, a multiplication and an addition being two."""
        active = self.attention + self.top_k * self.expert_parameters + 3 * self.hidden * self.shared
        return 2 * (active + self.experts * self.hidden) + 2 * SEQUENCE * self.heads


MODELS = [
    Model("Mixtral-8x7B", 32, 0, 4096, 8, 14336, 2, 2 * 4096**2 + 2 * 4096 * 1024, 4096, 0, 0, 32000),
    Model("Qwen3-235B", 94, 0, 4096, 128, 1536, 8, 2 * 4096 * 8192 + 2 * 4096 * 512, 8192, 0, 0, 151936),
    Model(
        "DeepSeek-V3", 61, 3, 7168, 256, 2048, 8,
        7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168,
        128 * 160, 2048, 18432, 129280,
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Site:
    """Processes that share the text, and what each of them has."""

    name: str
    processes: int
    flops: float  # a second, reached
    reading: float  # bytes a second and process, from the disk
    loading: float  # bytes a second and process, from the page cache to where the layer computes
    memory: float  # bytes where the layer computes


def hours(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 3600 * 1.5 else f"{seconds / 3600:.1f} h"


def calibration(model: Model, site: Site) -> dict[str, str]:
    layer = ELEMENT * model.layer_parameters
    tokens = TOKENS / site.processes
    reading, loading = layer / site.reading, layer / site.loading
    computing = tokens * model.layer_flops / site.flops
    resident = layer + ELEMENT * model.vocabulary * model.hidden
    activations = 6 * BATCH * SEQUENCE * ELEMENT * (model.hidden + model.top_k * model.inner)
    needed = resident + activations
    return {
        "model": model.name,
        "site": site.name,
        "a layer: reading": f"{reading:.1f} s",
        "loading": f"{loading:.1f} s",
        "computing": f"{computing:.1f} s",
        "calibration": hours(model.layers * (loading + max(reading, computing))),
        "memory a process": f"{needed / 1e9:.1f} GB" + ("" if needed < site.memory else ": too much"),
        "hidden states a process": f"{tokens * model.hidden * ELEMENT / 1e9:.2f} GB",
    }


def pruning(name: str, model: Model, element: float, read: float, write: float, measured: float) -> dict[str, str]:
    size = element * model.pruned_parameters
    return {
        "model": name,
        "checkpoint": f"{element * model.parameters / 1e9:.0f} GB",
        "read and written": f"{size / 1e9:.0f} GB each",
        "NVMe": hours(size / read + size / write),
        "at the measured rate": hours(size / measured),
    }


def main() -> None:
    source = newest("streaming")
    result = json.loads(source.read_text())
    jobs, checkpoint = result["jobs"], result["checkpoints"]["hub"]
    fused, size = result["checkpoints"]["fused"], checkpoint["checkpoint_bytes"]
    start = jobs["import"]["seconds"]
    # The generated Mixtral: 16 layers of 8 experts, H 2048, I 4096; a quarter of its experts goes.
    generated = Model("generated", 16, 0, 2048, 8, 4096, 2, 2 * 2048**2 + 2 * 2048 * 1024, 2048, 0, 0, 8192)
    pruned = ELEMENT * generated.pruned_parameters / (jobs["prune"]["seconds"] - start)
    alone = jobs["calibrate, no reading ahead"]
    cpu_flops = result["calibration_tokens"] * generated.layers * generated.layer_flops / alone["computing_seconds"]
    loading = size / jobs["calibrate"]["loading_seconds"]
    read, write = 3e9, 2e9
    sites = [
        Site("2 CPU cores, measured rates", 1, cpu_flops, size / alone["loading_seconds"], loading, 64e9),
        Site("(a) 24 GB GPU, NVMe", 1, 50e12, read, loading, 24e9),
        Site("(b) 8 GPUs of 80 GB, one NVMe", 8, 200e12, read, loading, 80e9),
        Site("(c) 16 nodes of 8 GPUs, an NVMe each", 128, 200e12, read, loading, 80e9),
    ]
    idle = jobs["import"]["peak_rss_bytes"]
    rss = [
        {
            "job": name,
            "seconds": row["seconds"],
            "peak memory": f"{row['peak_rss_bytes'] / 1e6:.0f} MB",
            "above a process that only imports": f"{(row['peak_rss_bytes'] - idle) / 1e6:.0f} MB",
            "waiting for layers": f"{row['loading_seconds']} s" if "loading_seconds" in row else "",
            "computing": f"{row['computing_seconds']} s" if "computing_seconds" in row else "",
        }
        for name, row in jobs.items()
    ]
    rates = [
        {"rate": "loading a layer from the page cache", "value": f"{loading / 1e9:.2f} GB/s"},
        {"rate": "loading a layer from the disk", "value": f"{size / alone['loading_seconds'] / 1e9:.2f} GB/s"},
        {"rate": "pruning, bytes of the result", "value": f"{pruned / 1e9:.2f} GB/s"},
        {"rate": "computing, two cores", "value": f"{cpu_flops / 1e9:.0f} GFLOP/s"},
    ]
    # Published in float8; a scale of 4 bytes for every 128 x 128 weights is not counted.
    stored = [*((model.name, model, ELEMENT) for model in MODELS), ("DeepSeek-V3, float8 as published", MODELS[-1], 1)]
    link = f"[{source.name}](../benchmarks/results/{source.name})"
    parts = [
        f"### Measured\n\nA generated Mixtral of {size / 1e9:.2f} GB ({checkpoint['largest_layer_bytes'] / 1e6:.0f} MB "
        f"a layer, {checkpoint['largest_tensor_bytes'] / 1e6:.0f} MB its largest tensor), and a GraniteMoe of the same "
        f'shapes whose checkpoint holds a layer\'s experts in one tensor ("fused"; '
        f"{fused['largest_tensor_bytes'] / 1e6:.0f} MB the largest); {result['calibration_tokens']} tokens, on "
        f"{result['date']} ({link}).\n\n{table(rss)}\n\n{table(rates)}",
        "### Calibration\n\n" + table([calibration(model, site) for model in MODELS for site in sites]),
        f"### Pruning to {KEPT:.0%} of the experts\n\n"
        + table([pruning(name, model, element, read, write, pruned) for name, model, element in stored]),
    ]
    text = DOCUMENT.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    with replace_file(DOCUMENT) as temporary:
        temporary.write_text(before + "\n" + "\n\n".join(parts) + "\n" + after)


if __name__ == "__main__":
    main()
