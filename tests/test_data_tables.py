"""Tables: label columns of every type, images in every column type, files that unpack to more than they should."""

from __future__ import annotations

import decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import both, numbers, png
from PIL import Image

from vfmlab.errors import DataError

N = 20
ODD = [i % 2 for i in range(N)]
TEXT = [("even", "odd")[k] for k in ODD]


def write(path, image, label=None, name="label"):
    columns = {"image": image} | ({} if label is None else {name: label})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def images(kind=None):
    return pa.array([png(i) for i in range(N)], kind or pa.binary())


@pytest.mark.parametrize("kind", ["parquet", "hf"])
@pytest.mark.parametrize(
    ("values", "names"),
    [
        (pa.array(ODD, pa.int8()), ["0", "1"]),
        (pa.array(ODD, pa.uint64()), ["0", "1"]),
        (pa.array([float(k) for k in ODD]), ["0", "1"]),
        (pa.array(TEXT), ["even", "odd"]),
        (pa.array(TEXT, pa.large_string()), ["even", "odd"]),
        (pa.array(TEXT, pa.string_view()), ["even", "odd"]),
        (pa.array(TEXT).dictionary_encode(), ["even", "odd"]),
        (pa.array(ODD).dictionary_encode(), ["0", "1"]),
        (pa.array([bool(k) for k in ODD]), ["false", "true"]),
    ],
    ids=str,
)
def test_labels_of_every_type_that_can_be_a_class(tmp_path, monkeypatch, kind, values, names):
    datasets = pytest.importorskip("datasets")
    if kind == "hf" and pa.types.is_string_view(values.type):
        pytest.skip("the library itself does not read string_view")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "d/x.parquet", images(), values)
    train, val = both(f"{kind}:{tmp_path / 'd'}")
    assert train.class_names == names
    for source in (train, val):
        assert source.labels.tolist() == [n % 2 for n in numbers(source)]


@pytest.mark.parametrize(
    "values",
    [
        pa.array([k + 0.5 for k in ODD]), pa.array([float("nan")] * N), pa.array([[k] for k in ODD]),
        pa.array([{"a": k} for k in ODD]), pa.array([decimal.Decimal("1.5")] * N), pa.array([None] * N, pa.int64()),
        pa.array([b"x"] * N),
    ],
    ids=lambda values: str(values.type),
)  # fmt: skip
def test_labels_that_cannot_be_classes_are_refused_by_name(tmp_path, values):
    path = write(tmp_path / "x.parquet", images(), values)
    with pytest.raises(DataError, match=r"column 'label'.*data\.label_column") as caught:
        both(f"parquet:{path}")
    assert "\n" not in str(caught.value)
    train, _ = both(f"parquet:{path}", label_column="")  # the way out that the message names
    assert train.class_names == ["all"]


@pytest.mark.parametrize("name", ["label_name", "class_label", "coarse_label", "Category"])
def test_columns_that_are_called_nearly_like_labels(tmp_path, name):
    assert both(f"parquet:{write(tmp_path / 'x.parquet', images(), TEXT, name)}")[0].class_names == ["even", "odd"]


def test_a_table_without_classes_says_so(tmp_path):
    notes = both(f"parquet:{write(tmp_path / 'x.parquet', images(), TEXT, 'caption')}")[0].notes
    assert any("no column of classes among image, caption; name one in data.label_column" in line for line in notes)
    assert any(line.startswith("no classes: ") for line in notes)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=str)
def test_images_in_every_kind_of_bytes(tmp_path, kind):
    train, val = both(f"parquet:{write(tmp_path / 'x.parquet', images(kind), TEXT)}")
    assert sorted(numbers(train) + numbers(val)) == list(range(N))
    struct = pa.array([{"bytes": png(i), "path": None} for i in range(N)])
    assert both(f"parquet:{write(tmp_path / 'y.parquet', struct, TEXT)}")[0].fingerprint == train.fingerprint


@pytest.mark.parametrize("fields", ["path", "both"])
def test_images_in_files_that_the_table_names(tmp_path, fields):
    for i in range(N):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    rows = [{"path": f"{i}.png"} | ({"bytes": None} if fields == "both" else {}) for i in range(N)]
    kind = pa.struct([("path", pa.string())] + [("bytes", pa.binary())] * (fields == "both"))
    path = write(tmp_path / "x.parquet", pa.array(rows, kind), TEXT)
    train, val = both(f"parquet:{path}")
    assert sorted(numbers(train) + numbers(val)) == list(range(N))
    first = train.fingerprint
    (tmp_path / f"{numbers(train)[0]}.png").write_bytes(png(77, side=30))
    assert both(f"parquet:{path}")[0].fingerprint != first


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_small_file_that_unpacks_to_much_is_refused(tmp_path, monkeypatch, dictionary):
    monkeypatch.setattr("vfmlab.data.tables.UNPACKED", 2**20)
    path = tmp_path / "x.parquet"
    cells = pa.array([b"\0" * 2**19] * N)
    pq.write_table(pa.table({"image": cells, "label": ODD}), path, compression="zstd", use_dictionary=dictionary)
    assert path.stat().st_size < 2**16
    with pytest.raises(DataError, match="column 'image' of .* unpacks to more than"):
        both(f"parquet:{path}")


def test_a_picture_of_another_size_in_a_cell_is_cropped(tmp_path):
    Image.fromarray(np.full((30, 50, 3), 9, np.uint8)).save(tmp_path / "a.png")
    rows = pa.array([(tmp_path / "a.png").read_bytes()] * N)
    train, _ = both(f"parquet:{write(tmp_path / 'x.parquet', rows, ODD)}")
    assert train.native_size() == (50, 30)


def test_files_of_one_table_that_do_not_fit_each_other(tmp_path):
    """A column that one of them lacks is named with the file; another width of the same numbers is none the worse."""
    write(tmp_path / "a.parquet", images(), pa.array(ODD, pa.int64()))
    for k, (labels, line) in enumerate(((None, r"b\.parquet has no column 'label', a\.parquet has"),
                                        (pa.array(["x"] * N), r"'label' of .*b\.parquet cannot be read as int64"))):
        write(tmp_path / "b.parquet", images(), labels)
        with pytest.raises(DataError, match=line) as caught:
            both(f"parquet:{tmp_path}")
        assert "\n" not in str(caught.value), k
    write(tmp_path / "b.parquet", images(), pa.array(ODD, pa.int32()))
    assert sum(map(len, both(f"parquet:{tmp_path}"))) == 2 * N
