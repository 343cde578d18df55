"""The whole job, from folder to folder: calibrate, decide, prune, set skip thresholds, judge.

One decoder layer is in memory at a time. Every stage is the package's own, with the same result as when it is called
alone.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from torch import Tensor

from moe_ext.calibration.calibrate import calibrate
from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.checkpoints.load_save import HUB_NAME, read_tokenizer, write_thresholds
from moe_ext.checkpoints.meta_model import skeleton_of
from moe_ext.checkpoints.stored_tensors import stored_tensors
from moe_ext.compression.judge import judged, record_reference
from moe_ext.compression.request import CRITERION, Method, Request, check_possible
from moe_ext.compression.result import Compressed, Measured
from moe_ext.compression.texts import HELD_BACK, check_judged, documents_of, held_back
from moe_ext.compression.work_folder import WorkFolder, fingerprint
from moe_ext.data.tokens import Texts
from moe_ext.decision.pruning_plan import PruningPlan
from moe_ext.decision.thin_plan import MULTIPLE
from moe_ext.decision.thresholds import skip_thresholds
from moe_ext.models.blocks import layer_numbers, moe_blocks
from moe_ext.pruning.prune_folder import prune_checkpoint
from moe_ext.pruning.unfinished import locked
from moe_ext.reconstruction.search import search
from moe_ext.runtime.batches import token_batches
from moe_ext.storage.digests import text_digest
from moe_ext.storage.files import folder_destination

# Files of a repository on the Hub that nothing here reads.
_OTHER_WEIGHTS = ["*.bin", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.pt", "*.pth", "original/*"]


def compress(
    checkpoint: str | os.PathLike[str],
    texts: Texts,
    out: str | os.PathLike[str],
    *,
    method: Method = "thin",
    size: float | None = None,
    fit: int | str | None = None,
    keep: int | None = None,
    ratio: float | None = None,
    multiple: int = MULTIPLE,
    blocks: int = 1,
    refit: bool = True,
    skip: bool = True,
    judge: Texts | Literal["held back"] | None = "held back",
    keep_files: str | os.PathLike[str] | None = None,
    window: int = 512,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Compressed:
    """Writes a smaller checkpoint that skips weak experts, and measures what it lost.

    Calibrates, decides, prunes with a refit, calibrates the result and stores its skip thresholds, one decoder layer in
    memory at a time; then both models predict the text that was held back, each alone in memory. Finished stages wait
    in ``.OUT.compress`` beside ``out``, so that the same call, killed at any moment, goes on with them and ends with
    the same bytes; another call begins anew. ``out`` appears last, and whole.

    Args:
        checkpoint: a folder with safetensors weights, or a name on the Hugging Face Hub, which is downloaded.
        texts: domain to text, or to several that are separate documents.
        out: must not exist yet, or be an empty folder.
        method: "thin": experts lose the channels that contribute least (``size`` or ``fit``). "thin-obs": those that
            the optimal brain surgeon removes; O(I^3) an expert. "experts": whole experts go by the criterion
            weighted_ean (``keep`` or ``ratio``). "experts+thin": first experts, then channels, with both. "search":
            experts by what the model's predictions lose, the number shared out over the layers (``keep`` or ``ratio``
            on average); where these differ the result loads through :func:`moe_ext.from_pretrained` only. Super experts
            (:func:`moe_ext.super_experts`) stay.
        size: share of all expert parameters that is left, in (0, 1).
        fit: bytes that all weights may take, a number or a text such as ``"48GB"``.
        keep: experts that a layer keeps.
        ratio: share of the experts that go, in (0, 1).
        multiple, blocks: of the experts' width, as for :func:`moe_ext.thin_plan`.
        refit: whether the kept experts' down projections are fitted to make up for what goes, on the calibration text.
        skip: whether skip thresholds, at the median, go into the result's config.
        judge: domain to text, or texts, to judge on; or "held back": the last tenth of every domain of ``texts``, which
            is then not calibrated on; or None: nothing is judged, and no model has to fit into memory.
        keep_files: a folder, new or empty, for statistics, plan and what this returns; without one they are removed.
        window, batch_size: of the calibration text, as for :func:`moe_ext.runtime.batches.token_batches`, and of the
            text that is judged on, as for :func:`moe_ext.perplexity`.
        dtype: as for :func:`moe_ext.prune_checkpoint`.
        device: where layers and the judged models run.
        trust_remote_code: as for :func:`moe_ext.from_pretrained`.
        progress: whether to show progress bars.

    Returns:
        What the two checkpoints take, and what the result lost.

    Raises:
        ValueError: sizes out of range, not the method's or not possible for the model; text that is too short; float8
            weights with a refit or judged; a model that was compressed already. Found before anything is written.
        FileExistsError: ``out`` or ``keep_files`` holds something.
        BlockingIOError: another process is writing ``out``.
        CheckpointError, OSError, MemoryError: as of the stages.
    """
    request = Request(method, size, fit, keep, ratio, multiple, blocks, refit, skip)
    if not texts:
        raise ValueError("texts: expected one or more domains, got none")
    if window < 2 or batch_size < 1:
        raise ValueError(f"window and batch_size: expected 2 and 1 or more, got {window} and {batch_size}")
    work = WorkFolder(Path(os.path.realpath(out)))
    kept = None if keep_files is None else Path(os.path.realpath(keep_files))
    if kept == work.target:
        raise ValueError(f"keep_files: is {kept}, where the checkpoint goes; give another folder")
    if work.finished() is None:
        folder_destination(work.target)
        if kept is not None:
            folder_destination(kept)
    folder = _folder_of(checkpoint)
    positions = check_possible(
        request, folder, judged=judge is not None, dtype=dtype, trust_remote_code=trust_remote_code
    )
    tokenizer = read_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    scored: Texts | None = judge if not isinstance(judge, str) else None
    if judge == "held back":
        texts, scored = held_back(texts, tokenizer)
    elif isinstance(judge, str):
        raise ValueError(f"judge: expected texts, 'held back' or None, got {judge!r}")
    if scored is not None:
        check_judged(scored, tokenizer, window, positions)
    stages = _Stages(
        request,
        folder,
        work,
        batches=list(token_batches(texts, tokenizer, window=window, batch_size=batch_size)),
        dataset=" + ".join(texts),
        judged=scored,
        held_back=1 / HELD_BACK if judge == "held back" else None,
        scoring={"window": window, "batch_size": batch_size},
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    found = work.finished(stages.job)
    if found is None:
        with locked(work.path, work.target):
            work.begin(stages.job)
            found = stages.run()
            work.put_in_place(found)
    work.end(found, kept)
    return found


def _folder_of(checkpoint: str | os.PathLike[str]) -> Path:
    """A checkpoint's folder; of a name on the Hub its snapshot in the cache, downloaded if need be."""
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    if not HUB_NAME.fullmatch(str(checkpoint)):
        raise FileNotFoundError(f"there is no checkpoint folder {checkpoint}")
    try:
        return Path(snapshot_download(str(checkpoint), ignore_patterns=_OTHER_WEIGHTS))
    except OSError as error:
        reason = f"there is no folder {checkpoint}, and the Hub gives no such checkpoint: {error}"
        raise FileNotFoundError(reason) from error


@dataclass(frozen=True)
class _Stages:
    """One job, stage by stage; each leaves a file or a folder in the work folder and is not run again if it is there.

    Attributes:
        batches: to calibrate on and to refit to.
        judged: domain to text; None: nothing is judged.
        scoring: how windows are cut.
    """

    request: Request
    folder: Path
    work: WorkFolder
    batches: list[dict[str, Tensor]]
    dataset: str
    judged: Texts | None
    held_back: float | None
    scoring: dict[str, int]
    dtype: str
    device: str
    trust_remote_code: bool
    progress: bool

    @cached_property
    def job(self) -> str:
        files = {tensor.file for tensor in stored_tensors(self.folder).values()} | {self.folder / "config.json"}
        asked = {
            "request": asdict(self.request),
            "text": text_digest(self.batches),
            "dataset": self.dataset,
            "judged": None if self.judged is None else documents_of(self.judged),
            "scoring": self.scoring,
            "dtype": self.dtype,
            "device": self.device,
        }
        return fingerprint(self.folder, files, asked)

    def run(self) -> Compressed:
        plan = self._plan()
        self._prune(plan)
        if self.request.skip:
            self._set_thresholds()
        before, after = self._measured(self.folder), self._measured(self.work.checkpoint)
        stock = len(set(map(len, plan.keep))) == 1
        found = Compressed(str(self.work.target), self.request.method, stock, before, after, self.held_back)
        return found if self.judged is None else self._judge(found, self.judged)

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "device": self.device,
            "trust_remote_code": self.trust_remote_code,
            "progress": self.progress,
        }

    def _statistics(self, name: str, folder: Path, **options: Any) -> ExpertStatistics:
        file, unfinished = self.work.file(name), self.work.file(f"unfinished-{name}")
        if not file.is_file():
            label, shard = self.dataset, text_digest(self.batches)[:12]
            stats = calibrate(folder, self.batches, dataset=label, shard=shard, resume=unfinished, **options)
            stats.save(file)
        unfinished.unlink(missing_ok=True)
        return ExpertStatistics.load(file)

    def _plan(self) -> PruningPlan:
        file = self.work.file("plan.json")
        if not file.is_file():
            observed = {"channels": self.request.channels, **self._options}
            stats = self._statistics("statistics.safetensors", self.folder, **observed)
            if self.request.method == "search":
                made = search(
                    self.folder,
                    self.batches,
                    keep=self.request.keep,
                    ratio=self.request.ratio,
                    loss="fisher",
                    resume=self.work.file("search.safetensors"),
                    dataset=self.dataset,
                    statistics=stats,  # for super experts, which stay
                    **self._options,
                ).plan
            else:
                made = self.request.plan(stats, self.folder, self.trust_remote_code, CRITERION)
            made.save(file)
        return PruningPlan.load(file)

    def _prune(self, plan: PruningPlan) -> None:
        if not self.work.checkpoint.is_dir():
            refit = self.batches if self.request.refit else None
            prune_checkpoint(self.folder, plan, self.work.checkpoint, refit=refit, **self._options)

    def _set_thresholds(self) -> None:
        folder = self.work.checkpoint
        # In the type in which it was written.
        stats = self._statistics("result-statistics.safetensors", folder, **{**self._options, "dtype": "auto"})
        skeleton = skeleton_of(folder, stored_tensors(folder), trust_remote_code=self.trust_remote_code)
        numbers = layer_numbers(moe_blocks(skeleton.model))
        write_thresholds(folder, skip_thresholds(stats), numbers, trust_remote_code=self.trust_remote_code)

    def _measured(self, folder: Path) -> Measured:
        stored = stored_tensors(folder)
        skeleton = skeleton_of(folder, stored, trust_remote_code=self.trust_remote_code)
        return Measured(skeleton.model.num_parameters(), sum(tensor.size for tensor in stored.values()))

    def _judge(self, found: Compressed, texts: Texts) -> Compressed:
        reference = self.work.file("reference.safetensors")
        scoring = {**self.scoring, "progress": self.progress}
        loading = {"device": self.device, "trust_remote_code": self.trust_remote_code}
        if not reference.is_file():
            record_reference(self.folder, texts, reference, {**loading, "dtype": self.dtype}, scoring)
        quality = judged(self.work.checkpoint, texts, reference, loading, scoring)
        before, after = (
            replace(measured, perplexity=quality[name].per_domain, mean=quality[name].mean)
            for name, measured in (("before", found.before), ("after", found.after))
        )
        return replace(found, before=before, after=after, **quality["measured"])
