"""Where a calibration layer by layer is: a file that grows a layer at a time, so that a killed run goes on."""

import json
from collections.abc import Mapping, Sequence

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.checkpoints.streamed_model import LayersOnDisk
from moe_ext.runtime.course import Course
from moe_ext.runtime.hidden_states import FolderOptions, MappedStates, waiting_states
from moe_ext.runtime.processes import place_among
from moe_ext.storage.digests import joined_digest, text_digest
from moe_ext.storage.files import file_destination
from moe_ext.storage.tensor_file import write_tensors
from moe_ext.version import __version__


class CalibrationProgress:
    """Where a calibration is: its hidden states, the layers that are done, and the file that says so.

    Attributes:
        states: hidden states before ``position``.
        position: call of a decoder layer to go on with.
        digests: by MoE layer, of the routers of those whose sums are in the statistics.

    Args:
        stats: statistics of no text; the sums of finished layers are read into them.
        course: of the model's forward passes over the batches.
        show: whether to say how much room the hidden states take.

    Raises:
        ValueError: the file is of another run.
        MemoryError, OSError: as :func:`waiting_states`.
    """

    def __init__(
        self,
        layers: LayersOnDisk,
        batches: Sequence[Mapping[str, Tensor]],
        stats: ExpertStatistics,
        options: FolderOptions,
        outputs: bool,
        course: Course,
        *,
        show: bool,
    ) -> None:
        self._stats = stats
        self._path = None if options.resume is None else file_destination(options.resume)
        self._job = joined_digest(
            [
                __version__,
                text_digest(batches),
                layers.fingerprint(),
                f"{layers.model.dtype} {options.device} {outputs} {stats.width} {place_among()} {stats.dataset}",
                *(["gram"] if stats.channel_order is not None else []),
                *stats.shards,
            ]
        )
        self.digests: dict[int, str] = {}
        reached = self._read()
        self.states, self.position = waiting_states(
            course, batches, options.scratch, self._job, reached, hold=True, show=show
        )

    def write(self, position: int) -> None:
        """Says that the layer calls before ``position`` are done."""
        if self._path is not None:
            metadata = {"job": self._job, "layer": str(position), "digests": json.dumps(self.digests)}
            write_tensors(self._path, self._stats.every_tensor(), metadata)
        if isinstance(self.states, MappedStates):
            self.states.forget_earlier()

    def finish(self) -> None:
        """Removes the hidden states; the file stays until the result is safe."""
        self.states.remove()

    def _read(self) -> int:
        """Takes over what the file holds; the decoder layer that it had come to."""
        if self._path is None or not self._path.exists():
            return 0
        try:
            with safe_open(self._path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("job") != self._job:
                    raise ValueError(
                        f"resume: {self._path} is of another run (model, text or options differ); "
                        "name a new file, or delete it"
                    )
                for name, tensor in self._stats.every_tensor().items():
                    tensor.copy_(file.get_tensor(name))
                self.digests = {int(layer): digest for layer, digest in json.loads(metadata["digests"]).items()}
                return int(metadata["layer"])
        except SafetensorError as error:
            raise ValueError(f"resume: {self._path} is no file of an interrupted calibration ({error})") from None
