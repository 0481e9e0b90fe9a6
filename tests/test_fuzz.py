"""Damaged and hostile files: each ends in one clear line or in the right result; nothing runs, hangs or crashes.

$PIXELCNN_FUZZ sets how many files of each of the four kinds are damaged.
"""

import copy
import io
import os
import random
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import command, refused, save_npz

from pixelcnn_lit.checkpoints.int8 import SCALE, dequantize
from pixelcnn_lit.checkpoints.safetensors import write_weights
from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data.npz import npz
from pixelcnn_lit.data.official import mnist
from pixelcnn_lit.density.density import Density
from pixelcnn_lit.density.load import load

N = int(os.environ.get("PIXELCNN_FUZZ", "130"))


def damage(content: bytes, rng: random.Random) -> bytes:
    """Cut off, one bit flipped, a stretch overwritten, or two stretches exchanged."""
    damaged, n = bytearray(content), len(content)
    match rng.randrange(4):
        case 0:
            return content[: rng.randrange(n)]
        case 1:
            damaged[rng.randrange(n)] ^= 1 << rng.randrange(8)
        case 2:
            start = rng.randrange(n)
            damaged[start : start + 64] = rng.randbytes(min(64, n - start))
        case 3:
            a, b, k = rng.randrange(n // 2), rng.randrange(n // 2, n), min(64, n // 4)
            damaged[a : a + k], damaged[b : b + k] = content[b : b + k], content[a : a + k]
    return bytes(damaged)


def exchange(values: dict, rng: random.Random) -> dict:
    """The same values, two of them under each other's key."""
    a, b = rng.sample(sorted(values), 2)
    return values | {a: values[b], b: values[a]}


def fuzz(read, right, same, write) -> int:
    """`write(rng)` leaves a damaged file, which `read()` must refuse or read as `right`; returns the number refused."""
    lines = []
    for n in range(N):
        write(random.Random(n))
        try:
            result = read()
        except UserError as error:
            lines.append(str(error))
        else:
            assert same(result, right), f"damage {n} went unnoticed"
    assert all(line.isprintable() for line in lines)
    return len(lines)


@pytest.fixture(scope="module")
def model() -> Density:
    torch.manual_seed(0)
    return Density(
        model={
            "_target_": "pixelcnn_lit.models.pixelcnn.PixelCNN",
            "hidden_channels": 8,
            "n_residual": 1,
            "embedding": {"_target_": "pixelcnn_lit.nn.embeddings.LevelEmbedding", "width": 2},
        },
        likelihood={"_target_": "pixelcnn_lit.likelihoods.categorical.Categorical"},
        image_shape=[1, 4, 4],
        num_classes=2,
        levels=3,
        class_names=["a", "b"],
        label="x",
        dataset={},
    )


def same_model(a: Density, b: Density) -> bool:
    weights = b.state_dict()
    return a.settings["model"] == b.settings["model"] and all(
        torch.equal(v, weights[k]) for k, v in a.state_dict().items()
    )


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_damaged_weights_are_refused_to_the_bit(tmp_path, model, suffix):
    path = tmp_path / f"x.{suffix}"

    def save(settings, weights) -> bytes:
        if suffix == "ckpt":
            torch.save({"hyper_parameters": settings, "state_dict": weights}, path)
        else:
            write_weights(path, weights, settings)
        return path.read_bytes()

    settings, weights = model.settings, model.state_dict()
    content = save(settings, weights)
    assert same_model(load(str(path)), model)

    def write(rng: random.Random) -> None:
        match rng.randrange(8):
            case 0:
                save(exchange(settings, rng), weights)
            case 1:
                save(settings, {k: v for k, v in weights.items() if k != rng.choice(sorted(weights))})
            case 2 if suffix == "safetensors":  # weights exchanged in the file, not before its hash was taken
                path.write_bytes(content.replace(b"network.first.weight", b"network.FIRST.weight", 1))
            case _:
                path.write_bytes(damage(content, rng))

    assert fuzz(lambda: load(str(path)), model, same_model, write) > 0.7 * N


def test_damaged_npz_files_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    arrays = save_npz(path, (4, 4), 20, 6, classes=2, class_names=None)
    content, right = path.read_bytes(), npz(str(path))

    def write(rng: random.Random) -> None:
        match rng.randrange(8):
            case 0:
                kept = rng.sample(sorted(arrays), 3)
                np.savez(path, **{key: arrays[key] for key in kept})
            case 1:
                images, labels = rng.choice(("train", "test")) + "_images", rng.choice(("train", "test")) + "_labels"
                np.savez(path, **arrays | {images: arrays[labels], labels: arrays[images]})
            case _:
                path.write_bytes(damage(content, rng))

    def same(a, b) -> bool:
        pairs = [(a.train.x, b.train.x), (a.train.y, b.train.y), (a.test.x, b.test.x), (a.test.y, b.test.y)]
        return all(torch.equal(x, y) for x, y in pairs)

    assert fuzz(lambda: npz(str(path)), right, same, write) > 0.7 * N


def test_damaged_idx_files_are_refused_or_renewed_from_their_archive(small_mnist):
    root, _ = small_mnist
    right = mnist(str(root))
    raw = root / "MNIST" / "raw"
    contents = {path: path.read_bytes() for path in raw.iterdir()}

    def write(rng: random.Random) -> None:
        for path, content in contents.items():
            path.write_bytes(content)
        idx = rng.choice(sorted(path for path in contents if path.suffix != ".gz"))
        for path in (idx, idx.with_suffix(".gz"))[: rng.randrange(1, 3)]:
            path.write_bytes(damage(contents[path], rng))

    def same(a, b) -> bool:
        return torch.equal(a.train.x, b.train.x) and torch.equal(a.test.y, b.test.y)

    assert fuzz(lambda: mnist(str(root)), right, same, write) > 0.3 * N


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("model", "n_residual"), 10**9),
        (("model", "hidden_channels"), 10**9),
        (("model", "embedding", "width"), 10**12),
        (("num_classes",), 10**12),
        (("image_shape",), [3, 10**6, 10**6]),
        (("image_shape",), [10**9, 4, 4]),
        (("levels",), 10**9),
    ],
)
def test_an_untrusted_file_cannot_ask_for_all_memory_or_time(tmp_path, model, where, value):
    settings = copy.deepcopy(model.settings)
    inner = settings
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    torch.save({"hyper_parameters": settings, "state_dict": model.state_dict()}, tmp_path / "x.ckpt")
    with pytest.raises(UserError):
        load(str(tmp_path / "x.ckpt"))


@pytest.mark.parametrize(("key", "value"), [("conditional", ""), ("label_dropout", "x"), ("class_names", None)])
def test_settings_of_a_file_have_the_types_of_a_model(tmp_path, model, key, value):
    settings = model.settings | {key: value}
    torch.save({"hyper_parameters": settings, "state_dict": model.state_dict()}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=f"x.ckpt: {key}={value}: must be"):
        load(str(tmp_path / "x.ckpt"))


INT8, ONES = torch.ones(3, 1, dtype=torch.int8), torch.ones(3, 1)


@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        (INT8, torch.ones(1, 10**6)),
        (INT8, ONES.to(torch.complex128)),
        (INT8, torch.ones(2, 1)),
        (INT8[0, 0], torch.ones(())),
        (ONES, ONES),
    ],
)
def test_untrusted_scales_are_refused(weight, scale):
    with pytest.raises((ValueError, TypeError)):
        dequantize({"w": weight, f"w{SCALE}": scale})


@pytest.mark.parametrize("added", [{f"x{SCALE}": ONES}, {"x": ONES}, {"x": ONES.to_sparse()}, {5: ONES}])
def test_weights_that_belong_to_nothing_are_refused(tmp_path, model, added):
    torch.save({"hyper_parameters": model.settings, "state_dict": {**model.state_dict(), **added}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError):
        load(str(tmp_path / "x.ckpt"))


@pytest.mark.parametrize("where", ["hidden_channels", "embedding"])
def test_settings_that_do_not_fit_the_weights_get_no_memory(tmp_path, model, monkeypatch, where):
    """But what any constructor needs: nothing is allocated that would go beyond the budget."""
    large = 10**8 if where == "hidden_channels" else model.settings["model"]["embedding"] | {"width": 10**8}
    settings = model.settings | {"model": model.settings["model"] | {where: large}}
    torch.save({"hyper_parameters": settings, "state_dict": model.state_dict()}, tmp_path / "x.ckpt")
    made, normal = [], torch.nn.init.normal_
    monkeypatch.setattr(torch.nn.init, "normal_", lambda w, **own: made.append(w.nbytes) or normal(w, **own))
    with pytest.raises(UserError, match=r"asks for more than [\d,]+ bytes of memory"):
        load(str(tmp_path / "x.ckpt"))
    assert sum(made) < 2**30


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path, run):
    """50,000×50,000 pixels in a kilobyte."""
    chunks = {b"IHDR": struct.pack(">2I5B", 50_000, 50_000, 8, 0, 0, 0, 0), b"IDAT": zlib.compress(b"\0" * 10**6)}
    chunks[b"IEND"] = b""
    written = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks.items()
    ]
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(written))
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for own in (["evaluate", f"images={bomb}", "trainer=cpu"], ["complete", f"image={bomb}", "label=3"]):
        name, *asked = own
        assert "bomb.png" in refused(name, f"ckpt={run}", *asked, "resize=true", f"run_dir={tmp_path}/{name}")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10**6  # kilobytes


def test_an_npz_that_lies_about_its_size_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for name, shape in (("train_images", (10**9, 28, 28)), ("test_images", (10**9, 28, 28))):
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
            archive.writestr(f"{name}.npy", header.getvalue() + b"\0" * 100)
        for name in ("train_labels", "test_labels"):
            labels = io.BytesIO()
            np.save(labels, np.arange(10))
            archive.writestr(f"{name}.npy", labels.getvalue())
    said = refused("data", "dataset=npz", f"dataset.path={tmp_path}/x.npz", f"run_dir={tmp_path}/out")
    assert "x.npz" in said
    assert "damaged" in said or "memory" in said
    with zipfile.ZipFile(tmp_path / "y.npz", "w") as archive:
        for name in ("train_images", "test_images", "train_labels", "test_labels"):
            archive.writestr(f"{name}.npy", b"no array")
    assert "is no array" in refused("data", "dataset=npz", f"dataset.path={tmp_path}/y.npz", f"run_dir={tmp_path}/out")


def test_names_of_an_untrusted_file_move_no_cursor(tmp_path, capsys):
    save_npz(tmp_path / "x.npz", class_names=np.array(["a\x1b[2J", "b\x07", "c\r", "d\n"]))
    command("data", "dataset=npz", f"dataset.path={tmp_path}/x.npz", f"run_dir={tmp_path}/out")
    printed = capsys.readouterr().out
    assert printed
    assert not set("\x1b\x07\r") & set(printed)


def test_an_archive_that_would_unpack_to_any_size_is_refused(tmp_path, model):
    torch.save({"hyper_parameters": model.settings, "state_dict": model.state_dict()}, tmp_path / "x.ckpt")
    with zipfile.ZipFile(tmp_path / "x.ckpt") as plain, zipfile.ZipFile(tmp_path / "y.ckpt", "w", 8) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(UserError, match="compressed"):
        load(str(tmp_path / "y.ckpt"))
    assert Path(tmp_path / "x.ckpt").is_file()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, model, value):
    weights = {name: values.clone() for name, values in model.state_dict().items()}
    weights["network.first.bias"][0] = value
    torch.save({"hyper_parameters": model.settings, "state_dict": weights}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="not finite"):
        load(str(tmp_path / "x.ckpt"))
