"""Calibration data: what people have, as batches for a model."""

from moe_ext.data.reading import Counts
from moe_ext.data.rows import Columns
from moe_ext.data.sources import Source
from moe_ext.data.stream import Batches, batches, documents

__all__ = ["Batches", "Columns", "Counts", "Source", "batches", "documents"]
