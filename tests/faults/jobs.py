"""The jobs that are killed and failed, run in a folder with ``in``, ``out`` and ``scratch``."""

from dataclasses import dataclass

_READING = "in/model --text in/text --window 32 --batch-size 4"


@dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
        arguments: of ``moe-ext``.
        results: what it leaves at the end, files or folders.
        growing: results that are there before that, and say of themselves that they are not finished.
        printed: file below the folder that its standard output goes to.
        faults: how many are tried, if not all: fewer of what takes long and writes as others do.
        once: whether the command refuses to run again where its result is.
    """

    arguments: str
    results: tuple[str, ...]
    growing: tuple[str, ...] = ()
    printed: str | None = None
    once: bool = False
    faults: int = 20


JOBS = {
    "calibrate": Job(f"calibrate {_READING} --out out/s.safetensors", ("out/s.safetensors",)),
    "calibrate sequentially": Job(
        f"calibrate {_READING} --sequential --scratch scratch --out out/s.safetensors", ("out/s.safetensors",)
    ),
    "merge": Job("merge in/text.safetensors in/more.safetensors --out out/all.safetensors", ("out/all.safetensors",)),
    "plan": Job("plan in/text.safetensors --keep 3 --out out/plan.json", ("out/plan.json",)),
    "prune": Job("prune in/model in/plan.json --shard-size 2e-5 --out out/pruned", ("out/pruned",), once=True),
    "prune a GGUF": Job(
        "prune in/tiny.gguf in/gguf.json --out out/pruned.gguf", ("out/pruned.gguf",), once=True, faults=12
    ),
    "prune, refitted": Job(
        f"prune in/model in/plan.json --refit {_READING.removeprefix('in/model ')} --shard-size 2e-5 --out out/pruned",
        ("out/pruned",),
        once=True,
    ),
    "quantize": Job(
        "quantize in/model --experts int8 --shard-size 2e-5 --out out/quantised",
        ("out/quantised",),
        once=True,
        faults=12,
    ),
    "compress": Job(
        f"compress {_READING} --method experts --keep 3 --out out/small", ("out/small",), once=True, faults=12
    ),
    "search": Job(
        f"search {_READING} --keep 3 --out out/plan.json --losses out/losses.safetensors",
        ("out/plan.json",),
        growing=("out/losses.safetensors",),
    ),
    "search sequentially": Job(
        f"search {_READING} --keep 3 --sequential --scratch scratch --out out/plan.json",
        ("out/plan.json",),
        growing=("out/plan.safetensors",),
    ),
    "skip": Job("skip in/model in/text.safetensors --out out/skipping", ("out/skipping",), once=True),
    "skip in place": Job("skip in/model in/text.safetensors --in-place", ("in/model/config.json",)),
    "report": Job("report in/text.safetensors in/losses.safetensors --out out/page.html", ("out/page.html",), faults=4),
    "eval": Job("eval in/model --text in/text --window 32 --json", (), printed="out/eval.json"),
    "compare": Job(
        "compare in/model --text in/text --window 32 --decode-tokens 2 --out out/compare.json", ("out/compare.json",)
    ),
}
