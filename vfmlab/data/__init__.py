"""Images: scenes, folders, tables and shards behind one interface, and the stream of training batches."""

from vfmlab.data import account
from vfmlab.data.base import Batch, ImageSource, to_float, to_uint8
from vfmlab.data.decode import centre_crop, read_image
from vfmlab.data.examples import examples, some_images
from vfmlab.data.open import open_source
from vfmlab.data.records import RecordSource, readable
from vfmlab.data.split import class_number
from vfmlab.data.stream import BatchStream

__all__ = ["Batch", "BatchStream", "ImageSource", "RecordSource", "account", "centre_crop", "class_number",
           "examples", "open_source", "read_image", "readable", "some_images", "to_float", "to_uint8"]
