"""Exports read by the libraries they are for, not by ours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

FOLDERS = ("zarr", "webdataset")


def read_npy(out):
    return np.load(out, mmap_mode="r"), None


def read_parquet(out):
    table = pq.read_table(out)
    columns = {key: table[key].to_pylist() for key in ("name", "digest", "valid", "reason")}
    assert table["row"].to_pylist() == list(range(table.num_rows))
    return table["features"].combine_chunks().to_numpy_ndarray(), columns


def read_zarr(out):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(str(out), mode="r")
    texts = {}
    for key in ("name", "digest", "reason"):
        padded = group[key][:]
        cells = padded.view(f"S{padded.shape[1]}")[:, 0]
        texts[key] = [cell.decode() for cell in cells]
    texts["reason"] = [reason or None for reason in texts["reason"]]
    return group["features"][:], {**texts, "valid": group["valid"][:].tolist()}


def read_webdataset(out):
    wds = pytest.importorskip("webdataset", exc_type=ImportError)
    shards = json.loads((out / "export.json").read_text())["shards"]
    urls = [str(out / shard) for shard in shards]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode())
    facts = [sample["json"] for sample in samples]
    assert [fact["row"] for fact in facts] == list(range(len(samples)))
    assert [int(sample["__key__"]) for sample in samples] == list(range(len(samples)))
    columns = {key: [f[key] for f in facts] for key in ("name", "digest", "valid", "reason")}
    return np.stack([sample["npy"] for sample in samples]), columns


READ = {
    "npy": read_npy,
    "parquet": read_parquet,
    "zarr": read_zarr,
    "webdataset": read_webdataset,
}


def need_package(to):
    if to == "zarr":
        pytest.importorskip("zarr")


def equal_bits(read, wanted):
    assert (read.dtype, read.shape) == (wanted.dtype, wanted.shape)
    assert np.ascontiguousarray(read).tobytes() == np.ascontiguousarray(wanted).tobytes()


def leftovers(folder):
    return sorted(p.name for p in Path(folder).iterdir() if "raypipe-" in p.name)
