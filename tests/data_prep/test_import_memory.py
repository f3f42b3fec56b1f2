"""Importers hold captions, never features: ten times the records take about as much memory, in fresh processes."""

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from data_prep import from_scan
from tests.patience import PATIENCE

MIB = 1 << 20
SMALL, LARGE = 200, 2000
SHAPE = (36, 256)

_PEAK = """
import sys
import importlib
kind, *flags = sys.argv[1:]
status = importlib.import_module(f"data_prep.{kind}").main(flags)
# not ru_maxrss, which begins with that of the process that started this one
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(status)
"""


def _peak(kind, images, tmp_path):
    """Bytes that the import took at most, and those of its features."""
    src, features = tmp_path / f"{kind}{images}", tmp_path / f"features{images}"
    src.mkdir()
    array = np.random.default_rng(0).normal(size=(images, *SHAPE)).astype(np.float32)
    flags = [f"--src={src}", "--name=toy", f"--out={src}"]
    if kind == "from_clip_retrieval":
        for folder in ("img_emb", "text_emb"):
            (src / folder).mkdir()
            np.save(src / folder / f"{folder}_0.npy", array.reshape(images, -1))
        (src / "metadata").mkdir()
        texts = {"image_path": [str(i) for i in range(images)], "caption": [f"a dog {i}" for i in range(images)]}
        pq.write_table(pa.table(texts), src / "metadata" / "metadata_0.parquet")
        return _measured(kind, [*flags, "--split=train"]), array.nbytes
    flags += ["--feature_dtype=keep"]
    if kind == "from_scan":
        np.save(src / "dev_ims.npy", array)
    elif kind == "from_hdf5":
        with h5py.File(src / "a.h5", "w") as file:
            for i, rows in enumerate(array):
                file[f"{i}_features"] = rows
        flags[0] = f"--hdf5={src / 'a.h5'}"
    elif kind == "from_npz":
        for i, rows in enumerate(array):
            np.savez(src / f"{i}.npz", x=rows)
        flags[0] = f"--npz={src}"
    else:
        features.mkdir()
        for i, rows in enumerate(array):
            np.save(features / f"{i}.npy", rows)
        flags += [f"--features={features}", "--as=regions"]
    if kind in ("from_hdf5", "from_npz"):
        lines = [f"{i},a dog number {i} runs,dev" for i in range(images)]
        (src / "c.csv").write_text("\n".join(["image,caption,split", *lines]) + "\n")
        flags += [f"--captions={src / 'c.csv'}"]
        flags[3] = "--feature_dtype=float32"
    (src / "dev_caps.txt").write_text("".join(f"a dog number {i} runs\n" for i in range(images)))
    (src / "dev_ids.txt").write_text("".join(f"{i}\n" for i in range(images)))
    return _measured(kind, flags), array.nbytes


def _measured(kind, flags):
    run = [sys.executable, "-c", _PEAK, kind, *flags]
    root = Path(from_scan.__file__).parent.parent
    out = subprocess.run(run, check=True, capture_output=True, text=True, cwd=root, timeout=PATIENCE).stdout
    return int(out.splitlines()[-1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
@pytest.mark.parametrize("kind", ["from_scan", "from_npy", "from_npz", "from_hdf5", "from_clip_retrieval"])
def test_ten_times_the_records_take_no_more_memory(kind, tmp_path):
    (small, few), (large, many) = (_peak(kind, images, tmp_path) for images in (SMALL, LARGE))
    assert many - few > 60 * MIB
    growth = large - small
    print(f"{kind}: {small / MIB:.0f} and {large / MIB:.0f} MiB at most for {few / MIB:.0f} and {many / MIB:.0f} MiB")
    assert growth < (many - few) / 2
