"""What several files of tests read. Nothing heavy is imported here: the process that deals the tests out needs none."""

import gzip
import hashlib
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import Child, Children, one_run

# One thread, for tests run side by side and their tensors are small. torch reads it when it is imported, here and in
# each process that a test starts.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark notebooks: each starts a kernel, and trains."""
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker(pytest.mark.long)


@pytest.fixture
def children() -> Iterator[Children]:
    """See `Children`: what a test starts ends with it. A fixture of wider scope opens its own."""
    with Children() as started:
        yield started


@pytest.fixture
def start(children) -> Callable[..., Child]:
    """`start(directory, name, *overrides, **environment)`: a command, forked."""
    return children.start


@pytest.fixture
def spawn(children) -> Callable[..., Child]:
    """`spawn(directory, name, *overrides, **environment)`: a command, typed."""
    return children.spawn


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A finished tiny run on the digits, for all who only read it."""
    directory = tmp_path_factory.mktemp("run")
    one_run(directory)
    return directory


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """30 + 10 images in MNIST's own format, whose checksums torchvision is told to expect."""
    from torchvision import datasets

    from pixelcnn_lit.data import official

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(256, size=(30, 28, 28), dtype=np.uint8)
    resources = []
    for part, n in (("train", 30), ("t10k", 10)):
        contents = {
            f"{part}-images-idx3-ubyte.gz": struct.pack(">4i", 2051, n, 28, 28) + pixels[:n].tobytes(),
            f"{part}-labels-idx1-ubyte.gz": struct.pack(">2i", 2049, n) + bytes(k % 10 for k in range(n)),
        }
        for name, content in contents.items():
            (raw / name).write_bytes(gzip.compress(content))
            resources.append((name, hashlib.md5((raw / name).read_bytes()).hexdigest()))
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setitem(official.LENGTHS, "MNIST", (30, 10))
    return tmp_path, pixels
