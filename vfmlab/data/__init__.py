"""Images: procedural scenes, folders, tables and shards behind one interface, and the stream of training batches."""

from vfmlab.data.base import Batch, ImageSource, to_float, to_uint8
from vfmlab.data.open import open_source

__all__ = ["Batch", "ImageSource", "open_source", "to_float", "to_uint8"]
