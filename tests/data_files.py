"""Small data sets of every kind, for tests: each image tells its number by its colour."""

from __future__ import annotations

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from vfmlab.config import Data
from vfmlab.data import open_source


def colour(i):
    return (i % 256, (7 * i) % 256, (31 * i) % 256)


def png(i, side=10):
    stream = io.BytesIO()
    Image.new("RGB", (side, side), colour(i)).save(stream, "PNG")
    return stream.getvalue()


def fill(root, classes=("cat", "dog"), each=20, first=0):
    """Class folders whose images tell their number by their colour."""
    number = first
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for _ in range(each):
            (root / name / f"{number:04}.png").write_bytes(png(number))
            number += 1
    return root


def numbers(source, indices=None):
    """Which images a source holds, by their colour."""
    indices = torch.arange(len(source)) if indices is None else indices
    return source.batch(indices).images[:, 0, 4, 4].tolist()


def data(source, **fields):
    return Data(**{"source": source, "size": 8, "val": 8, **fields})


def both(source, **fields):
    config = data(source, **fields)
    return open_source(config, "train"), open_source(config, "val")


def table(path, rows, labels=None, names=None, struct=True, label="label"):
    """A parquet file in the layout of the Hugging Face hub."""
    values = [{"bytes": row, "path": None} for row in rows] if struct else rows
    columns = {"image": pa.array(values)}
    if labels is not None:
        columns[label] = pa.array(labels)
    made = pa.table(columns)
    if names:
        features = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        made = made.replace_schema_metadata({"huggingface": json.dumps(features)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(made, path)


def shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def shards(root, parts, label="cls"):
    for part, rows in parts.items():
        members = []
        for i in rows:
            members.append((f"s{i:04}.png", png(i)))
            content = b"%d" % (i % 3) if label == "cls" else b'{"label": "%s"}' % b"xyz"[i % 3 : i % 3 + 1]
            members += [(f"s{i:04}.{label}", content)] if label else []
            members.append((f"s{i:04}.txt", b"a caption"))
        shard(root / f"{part}.tar", members)
