"""The data: splits that do not overlap, orders that are functions of (seed, epoch), formats read right or refused."""

import errno
import gzip
import hashlib
import os
import pickle
import textwrap

import numpy as np
import pytest
import scipy.io
import torch
from helpers import command, refused, save_npz
from PIL import Image
from tiny import open_data
from torchvision import datasets

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data import official
from pixelcnn_lit.data.datamodule import ImageData
from pixelcnn_lit.data.images import Split, carve, fingerprint, first_of_each_class
from pixelcnn_lit.data.loader import Batches
from pixelcnn_lit.data.transforms import crop, flip, pose


def test_digits_are_split_1297_250_250_without_overlap():
    data = open_data()
    assert [len(s) for s in (data.train, data.validation, data.test)] == [1297, 250, 250]
    assert data.facts["image_shape"] == [1, 8, 8]
    assert data.facts["levels"] == 17
    everything = torch.cat([s.x for s in (data.train, data.validation, data.test)]).flatten(1)
    from sklearn.datasets import load_digits

    assert torch.equal(everything.double().sort(0).values, torch.tensor(load_digits().data).sort(0).values)


def test_the_validation_split_does_not_depend_on_the_seed(tmp_path):
    x = torch.arange(100, dtype=torch.uint8).reshape(100, 1, 1, 1)
    train, validation = carve(Split(x, torch.zeros(100).long()), 0.1, "dataset.validation_fraction")
    assert (len(train), len(validation)) == (90, 10)
    assert sorted(torch.cat([train.x, validation.x]).flatten().tolist()) == list(range(100))
    save_npz(tmp_path / "x.npz")
    one, two = (open_data("dataset=npz", f"dataset.path={tmp_path}/x.npz", seed=seed) for seed in (1, 2))
    assert torch.equal(one.validation.x, two.validation.x)


def epoch_of(data: ImageData, epoch: int) -> torch.Tensor:
    loader = data.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)
    return torch.cat([x for x, _ in loader])


def test_the_order_is_a_function_of_seed_and_epoch_whatever_the_workers():
    augmented = ["dataset.random_crop=1", "dataset.horizontal_flip=true"]
    here = open_data(*augmented, "dataset.num_workers=0", seed=3)
    torch.manual_seed(1)
    first = epoch_of(here, 0)
    torch.manual_seed(2)
    assert torch.equal(first, epoch_of(here, 0))
    assert torch.equal(first, epoch_of(open_data(*augmented, "dataset.num_workers=2", seed=3), 0))
    assert not torch.equal(first, epoch_of(here, 1))
    assert not torch.equal(first, epoch_of(open_data(*augmented, seed=4), 0))


def test_loading_takes_nothing_from_the_global_random_stream():
    data = open_data()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    epoch_of(data, 0)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("n", [7, 8, 23])
def test_evaluation_sees_each_image_once_over_all_ranks(n, world):
    ranks = [Batches(n, 4, shuffle=False, rank=rank, world=world) for rank in range(world)]
    seen = [p for rank in ranks for _, positions in rank for p in positions.tolist()]
    assert sorted(seen) == list(range(n))
    assert [len(list(rank)) for rank in ranks] == [len(rank) for rank in ranks]


@pytest.mark.parametrize("world", [1, 2])
def test_training_sees_no_image_twice_an_epoch_and_leaves_out_others_each_epoch(world):
    def epoch(number):
        ranks = [Batches(23, 4, shuffle=True, seed=0, rank=rank, world=world) for rank in range(world)]
        for rank in ranks:
            rank.set_epoch(number)
        return [p for rank in ranks for _, positions in rank for p in positions.tolist()]

    assert len(set(epoch(0))) == len(epoch(0)) == 23 // (4 * world) * 4 * world
    assert set(epoch(0)) != set(epoch(1))


def one_image_of(data: ImageData, epoch: int) -> torch.Tensor:
    """Training image 0 as it is served in an epoch."""
    loader = data.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)
    return next(
        x[positions == 0] for (_, positions), (x, _) in zip(loader.batch_sampler, loader, strict=True) if 0 in positions
    )


def test_two_levels_are_a_threshold_or_a_draw_fixed_by_the_image():
    static, dynamic = open_data("dataset.levels=2"), open_data("dataset.levels=2", "dataset.binarization=dynamic")
    digits = open_data()
    assert torch.equal(static.test.x, (digits.test.x * 2 >= 17).to(torch.uint8))
    assert static.label == "digits 1×8×8, 2 levels, static binarization"
    assert dynamic.label == "digits 1×8×8, 2 levels, dynamic binarization"
    again = open_data("dataset.levels=2", "dataset.binarization=dynamic")
    assert torch.equal(dynamic.test.x, again.test.x)
    assert abs(dynamic.test.x.double().mean() - digits.test.x.double().mean() / 16) < 0.01
    draws = [one_image_of(dynamic, epoch) for epoch in (0, 1, 0)]
    assert set(draws[0].unique().tolist()) == {0, 1}
    assert not torch.equal(draws[0], draws[1]), "training draws anew each epoch"
    assert torch.equal(draws[0], draws[2])
    assert set(dynamic.train.x.unique().tolist()) == {0, 1}


def test_resize_pad_and_augmentation_change_the_label_and_spare_the_scored_images():
    data = open_data("dataset.resize=16", "dataset.pad=2", "dataset.horizontal_flip=true", "dataset.random_crop=1")
    for said in ("digits 1×20×20", "resized to 16", "padded by 2", "trained with flips", "trained with crops of 1"):
        assert said in data.label
    scored = torch.cat([x for x, _ in data.test_dataloader()])
    assert torch.equal(scored, data.test.x)


def test_a_crop_is_a_shift_and_a_flip_a_mirror():
    x = torch.arange(1, 17, dtype=torch.uint8).reshape(1, 1, 4, 4).repeat(64, 1, 1, 1)
    cropped = crop(x, torch.Generator().manual_seed(0), margin=1)
    padded = torch.nn.functional.pad(x[:1], (1, 1, 1, 1))
    windows = {tuple(padded[0, 0, i : i + 4, j : j + 4].flatten().tolist()) for i in range(3) for j in range(3)}
    assert {tuple(image.flatten().tolist()) for image in cropped} == windows
    flipped = flip(x, torch.Generator().manual_seed(0))
    kinds = {tuple(image.flatten().tolist()) for image in flipped}
    assert kinds == {tuple(x[0].flatten().tolist()), tuple(x[0].flip(-1).flatten().tolist())}


def test_each_pose_is_told_in_the_class_and_scored_images_are_in_none():
    data = open_data("dataset.poses=8", "dataset.batch_size=64", "dataset.num_workers=0")
    upright = {(image.numpy().tobytes(), int(label)) for image, label in zip(data.train.x, data.train.y, strict=True)}
    met = set()
    for x, y in data.train_dataloader():
        for image, told in zip(x, y, strict=True):
            pose, label = divmod(int(told), 10)
            back = torch.rot90(image, -(pose // 2), (-2, -1))
            back = back.flip(-1) if pose % 2 else back
            assert (back.contiguous().numpy().tobytes(), label) in upright
            met.add(pose)
    assert met == set(range(8))
    assert data.label.endswith("trained in 8 poses")
    assert torch.equal(torch.cat([x for x, _ in data.test_dataloader()]), data.test.x)
    assert torch.equal(torch.cat([y for _, y in data.test_dataloader()]), data.test.y)


def test_the_poses_of_an_image_are_the_symmetries_of_a_square():
    x = torch.arange(9, dtype=torch.uint8).reshape(1, 1, 3, 3).repeat(200, 1, 1, 1)
    y = torch.full((200,), 4)
    for poses in (1, 2, 8):
        posed, told = pose(x, y, torch.Generator().manual_seed(0), poses, num_classes=10)
        each = {int(one): posed[told == one].flatten(1).unique(dim=0).tolist() for one in told.unique()}
        assert sorted(each) == [4 + 10 * n for n in range(poses)]
        assert len({tuple(only) for (only,) in each.values()}) == poses
    assert each[4] == [list(range(9))]
    assert each[14] == [[2, 1, 0, 5, 4, 3, 8, 7, 6]]
    assert torch.equal(x[0, 0].flatten(), torch.arange(9).to(torch.uint8)), "the images that were given are unchanged"


def test_poses_that_nobody_could_be_told_are_refused(tmp_path):
    save_npz(tmp_path / "x.npz")
    own = ["dataset=npz", f"dataset.path={tmp_path}/x.npz", f"run_dir={tmp_path}/run"]
    assert "6×5 is not square; type 2" in refused("train", *own, "dataset.poses=8")
    assert "type conditional=true, or dataset.poses=1" in refused("train", *own, "dataset.poses=2", "conditional=false")
    assert "classifiers are told no pose" in refused("train_classifier", *own, "dataset.poses=2")
    assert "dataset.poses" in refused("train", *own, "dataset.poses=3")


def test_npz_images_arrive_channels_first_with_their_names(tmp_path):
    arrays = save_npz(tmp_path / "x.npz")
    data = open_data("dataset=npz", f"dataset.path={tmp_path}/x.npz")
    assert data.facts["image_shape"] == [3, 6, 5]
    assert data.facts["class_names"] == ["a", "b", "c", "d"]
    assert np.array_equal(data.test.x.permute(0, 2, 3, 1).numpy(), arrays["test_images"])
    save_npz(tmp_path / "nameless.npz", class_names=None)
    assert open_data("dataset=npz", f"dataset.path={tmp_path}/nameless.npz").class_names == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": None}, "there is no test_labels"),
        ({"train_labels": np.arange(40) % 5}, r"labels 0\.\.4 out of range; 4 classes take labels 0\.\.3"),
        ({"test_images": np.zeros((8, 7, 5, 3), np.uint8)}, "different sizes"),
        ({"test_images": np.zeros((8, 6, 5, 3), np.float32)}, "give uint8"),
        ({"test_labels": np.zeros(7, int)}, "one label an image"),
        (
            {"train_images": np.full((40, 6, 5, 65), 99, np.uint8), "test_images": np.zeros((8, 6, 5, 65), np.uint8)},
            "give 1",
        ),
    ],
)
def test_npz_faults_are_named(tmp_path, changes, message):
    save_npz(tmp_path / "x.npz", **changes)
    with pytest.raises(UserError, match=message) as refusal:
        open_data("dataset=npz", f"dataset.path={tmp_path}/x.npz")
    assert "damaged" not in str(refusal.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_or_missing_npz_is_named(tmp_path, save):
    save(tmp_path / "x.npz", **save_npz(tmp_path / "x.npz"))
    whole = (tmp_path / "x.npz").read_bytes()
    flipped = bytearray(whole)
    flipped[300] ^= 255
    for damaged in (whole[: len(whole) // 2], b"", b"not an archive", bytes(flipped)):
        (tmp_path / "x.npz").write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            open_data("dataset=npz", f"dataset.path={tmp_path}/x.npz")
    with pytest.raises(UserError, match="no such file"):
        open_data("dataset=npz", f"dataset.path={tmp_path}/absent.npz")


def save_folder(root, size=(5, 4), mode="RGB"):
    for split, n in (("train", 6), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for k in range(n):
                pixel = (40 * label, k, 7) if mode == "RGB" else 40 * label + k
                Image.new(mode, size, pixel).save(root / split / name / f"{k}.png")


def test_a_folder_of_png_files_is_read_grey_or_colour(tmp_path):
    save_folder(tmp_path / "colour")
    data = open_data("dataset=folder", f"dataset.path={tmp_path}/colour", "dataset.batch_size=4")
    assert data.facts == {"image_shape": [3, 4, 5], "num_classes": 2, "levels": 256, "class_names": ["cat", "dog"]}
    assert data.test.x[:, :, 0, 0].tolist() == [[0, 0, 7], [0, 1, 7], [40, 0, 7], [40, 1, 7]]
    assert data.test.y.tolist() == [0, 0, 1, 1]
    save_folder(tmp_path / "grey", mode="L")
    assert open_data("dataset=folder", f"dataset.path={tmp_path}/grey").facts["image_shape"] == [1, 4, 5]
    save_folder(tmp_path / "black_and_white", mode="1")
    assert open_data("dataset=folder", f"dataset.path={tmp_path}/black_and_white").facts["image_shape"] == [1, 4, 5]
    save_folder(tmp_path / "deep", mode="I;16")
    with pytest.raises(UserError, match="8 bits"):
        open_data("dataset=folder", f"dataset.path={tmp_path}/deep")


def test_folder_faults_are_named(tmp_path):
    with pytest.raises(UserError, match="it must hold train/CLASS"):
        open_data("dataset=folder", f"dataset.path={tmp_path}")
    save_folder(tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "train" / "dog" / "odd.png")
    with pytest.raises(UserError, match=r"odd\.png: 9×9 pixels, but .*0\.png has 4×5; type dataset\.resize=4"):
        open_data("dataset=folder", f"dataset.path={tmp_path}")
    (tmp_path / "train" / "dog" / "odd.png").write_bytes(b"no PNG")
    with pytest.raises(UserError, match=r"odd\.png: not a readable picture"):
        open_data("dataset=folder", f"dataset.path={tmp_path}")


def test_mnist_files_are_read_with_no_network(small_mnist):
    root, pixels = small_mnist
    data = open_data("dataset=mnist", f"dataset.root={root}")
    assert torch.equal(data.test.x, torch.from_numpy(pixels[:10, None]))
    assert data.class_names == list("0123456789")
    assert len(data.train) + len(data.validation) == 30
    with pytest.raises(UserError, match=f"type dataset.root={root}$"):
        open_data("dataset=mnist", f"dataset.root={root}/MNIST")


def test_too_few_mnist_images_are_refused(small_mnist, monkeypatch):
    root, _ = small_mnist
    monkeypatch.setitem(official.LENGTHS, "MNIST", (60_000, 10_000))
    with pytest.raises(UserError, match=r"has \(30, 10\) images"):
        open_data("dataset=mnist", f"dataset.root={root}")


def test_damaged_or_absent_mnist_gives_three_ways_out(small_mnist):
    root, _ = small_mnist
    (root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"check the network.*copy the four.*dataset=digits"):
        open_data("dataset=mnist", f"dataset.root={root}")


@pytest.mark.parametrize("damage", ["truncated gz", "wrong MD5", "short IDX", "flipped IDX", "label IDX swapped"])
def test_damaged_files_are_renewed_from_archives_or_refused(small_mnist, damage):
    root, _ = small_mnist
    data = open_data("dataset=mnist", f"dataset.root={root}")  # unpacks
    raw = root / "MNIST" / "raw"
    archive, images = raw / "train-images-idx3-ubyte.gz", raw / "train-images-idx3-ubyte"
    content = bytearray(images.read_bytes())
    if damage in ("truncated gz", "wrong MD5"):
        images.unlink()
        archive.write_bytes(archive.read_bytes()[:5000] + (b"" if damage == "truncated gz" else bytes(20_000)))
        before = sorted(raw.iterdir())
        with pytest.raises(UserError, match="MNIST could not be read"):
            open_data("dataset=mnist", f"dataset.root={root}")
        assert sorted(raw.iterdir()) == before
        assert sorted(root.iterdir()) == [root / "MNIST"]  # nothing half-written is left
        return
    content[5000] ^= 1
    images.write_bytes({"short IDX": content[:9000], "flipped IDX": content}.get(damage, b"\0\0\x08\x01" + bytes(4)))
    again = open_data("dataset=mnist", f"dataset.root={root}", "dataset.download=false")
    assert torch.equal(again.train.x, data.train.x)


def test_no_room_and_no_permission_get_a_line_and_leave_nothing(small_mnist, monkeypatch, tmp_path):
    root, _ = small_mnist
    before = sorted(root.rglob("*"))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    with monkeypatch.context() as patch:
        patch.setattr(gzip.GzipFile, "read", full)
        with pytest.raises(UserError, match="No space left"):
            open_data("dataset=mnist", f"dataset.root={root}")
    assert sorted(root.rglob("*")) == before
    with pytest.raises(UserError, match=r"No such file|denied"):
        open_data("dataset=mnist", "dataset.root=/proc/nothing")
    with pytest.raises(UserError, match="check the network"):
        open_data("dataset=mnist", f"dataset.root={tmp_path}/new")
    assert not (tmp_path / "new").exists()


def test_cifar10_batches_are_read_channels_first(tmp_path, monkeypatch):
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(14, 3, 32, 32), dtype=np.uint8)
    lists = {"train_list": [["data_batch_1", pixels[:10]]], "test_list": [["test_batch", pixels[10:]]]}
    for attribute, entries in lists.items():
        for name, x in entries:
            (base / name).write_bytes(pickle.dumps({"data": x.reshape(len(x), -1), "labels": list(range(len(x)))}))
        checked = [[name, hashlib.md5((base / name).read_bytes()).hexdigest()] for name, _ in entries]
        monkeypatch.setattr(datasets.CIFAR10, attribute, checked)
    names = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    digest = hashlib.md5((base / "batches.meta").read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": digest})
    monkeypatch.setitem(official.LENGTHS, "CIFAR10", (10, 4))
    data = open_data("dataset=cifar10", f"dataset.root={tmp_path}", "dataset.validation_fraction=0.5")
    assert torch.equal(data.test.x, torch.from_numpy(pixels[10:]))
    assert data.class_names == names


def test_cifar100_is_read_with_its_fine_classes(tmp_path, monkeypatch):
    base = tmp_path / "cifar-100-python"
    base.mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(300, 3, 32, 32), dtype=np.uint8)
    names = [f"class {label}" for label in range(100)]
    contents = {"meta": {"fine_label_names": names}}
    for name, x in (("train", pixels[:200]), ("test", pixels[200:])):
        contents[name] = {"data": x.reshape(len(x), -1), "fine_labels": [n % 100 for n in range(len(x))]}
    for name, content in contents.items():
        (base / name).write_bytes(pickle.dumps(content))
    digests = {name: hashlib.md5((base / name).read_bytes()).hexdigest() for name in contents}
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", digests["train"]]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", digests["test"]]])
    monkeypatch.setattr(datasets.CIFAR100, "meta", datasets.CIFAR100.meta | {"md5": digests["meta"]})
    monkeypatch.setitem(official.LENGTHS, "CIFAR100", (200, 100))
    data = open_data("dataset=cifar100", f"dataset.root={tmp_path}")
    assert torch.equal(data.test.x, torch.from_numpy(pixels[200:]))
    assert data.class_names == names


def test_svhn_is_read_from_matlabs_files(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(256, size=(30, 32, 32, 3), dtype=np.uint8)
    split_list = {}
    for split, x in (("train", pixels[:20]), ("test", pixels[20:])):
        file = tmp_path / f"{split}_32x32.mat"
        digits = np.arange(1, len(x) + 1) % 10
        scipy.io.savemat(file, {"X": x.transpose(1, 2, 3, 0), "y": np.where(digits, digits, 10)[:, None]})  # 10 is a 0
        split_list[split] = ["http://127.0.0.1:9/", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
    monkeypatch.setitem(official.LENGTHS, "SVHN", (20, 10))
    data = open_data("dataset=svhn", f"dataset.root={tmp_path}")
    assert np.array_equal(data.test.x.permute(0, 2, 3, 1).numpy(), pixels[20:])
    assert data.test.y.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    (tmp_path / "test_32x32.mat").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"SVHN could not be read .*copy train_32x32\.mat and test_32x32\.mat to"):
        open_data("dataset=svhn", f"dataset.root={tmp_path}")


@pytest.mark.parametrize("name", ["FashionMNIST", "KMNIST"])
def test_datasets_in_mnists_format_have_their_own_classes(small_mnist, monkeypatch, name):
    root, pixels = small_mnist
    kind = getattr(datasets, name)
    (root / "MNIST").rename(root / name)
    monkeypatch.setattr(kind, "resources", datasets.MNIST.resources)
    monkeypatch.setitem(official.LENGTHS, name, (30, 10))
    data = open_data("dataset=fashion_mnist" if name == "FashionMNIST" else "dataset=kmnist", f"dataset.root={root}")
    assert torch.equal(data.test.x, torch.from_numpy(pixels[:10, None]))
    assert data.class_names == kind.classes


@pytest.mark.parametrize("names", [lambda name: name.replace("-idx", ".idx"), lambda name: f"{name}/{name}"])
def test_mnist_is_read_by_kaggles_names_whatever_else_lies_there(small_mnist, names):
    root, _ = small_mnist
    raw = root / "MNIST" / "raw"
    before = open_data("dataset=mnist", f"dataset.root={root}")
    for file in list(raw.iterdir()):
        content = file.read_bytes()
        file.unlink()
        if not file.suffix:
            target = raw / names(file.name)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(content)
    (raw / "._train-images-idx3-ubyte").write_bytes(b"\x00\x05\x16\x07")
    (raw / "emnist-mnist.gz").write_bytes(gzip.compress(b"not one of the four"))
    after = open_data("dataset=mnist", f"dataset.root={root}", "dataset.download=false")
    assert torch.equal(before.train.x, after.train.x)
    assert torch.equal(before.test.y, after.test.y)


# ImageNet


def save_imagenet(root, size: int = 32, batches: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Write batches in the official format, 20 images each, and as many for validation; return all, and the labels."""
    x = np.random.default_rng(0).integers(256, size=(20 * (batches + 1), 3, size, size), dtype=np.uint8)
    y = np.arange(len(x)) % 7
    root.mkdir(parents=True, exist_ok=True)
    for n in range(batches + 1):
        part = slice(20 * n, 20 * (n + 1))
        content = {"data": x[part].reshape(20, -1), "labels": (y[part] + 1).tolist()}
        name = f"train_data_batch_{n + 1}" if n < batches else "val_data"
        (root / name).write_bytes(pickle.dumps(content, protocol=2))
    return x, y


@pytest.mark.parametrize("size", [32, 64])
def test_imagenets_batches_become_arrays_once(tmp_path, size, capsys):
    x, y = save_imagenet(tmp_path / f"imagenet{size}", size, batches=11)
    asked = [f"dataset=imagenet{size}", f"dataset.root={tmp_path}", "dataset.batch_size=8"]
    data = open_data(*asked)
    assert "220 training and 20 test images become arrays once" in capsys.readouterr().out
    whole = torch.from_numpy(x)
    assert torch.equal(data.test.x, whole[220:])
    assert data.test.y.tolist() == y[220:].tolist()
    trained = torch.cat([data.train.x, data.validation.x]).flatten(1)
    assert torch.equal(trained.unique(dim=0), whole[:220].flatten(1).unique(dim=0))
    version = f"imagenet{size} (Chrabaszcz et al. 2017) 3×{size}×{size}, 256 levels, 11 of 10 batches"
    assert data.label == version
    assert data.class_names == list("1234567")
    for file in (tmp_path / f"imagenet{size}").iterdir():
        file.unlink()
    capsys.readouterr()
    again = open_data(*asked)
    assert torch.equal(again.test.x, data.test.x)
    assert capsys.readouterr().out == ""


def test_imagenets_npz_files_hold_the_same(tmp_path):
    save_imagenet(tmp_path / "a")
    for file in (tmp_path / "a").iterdir():
        content = pickle.loads(file.read_bytes())
        (tmp_path / "b").mkdir(exist_ok=True)
        np.savez(tmp_path / "b" / file.name, **content)
    one, two = (open_data("dataset=imagenet32", f"dataset.root={tmp_path}/{name}") for name in "ab")
    assert torch.equal(one.train.x, two.train.x)
    assert one.label == two.label


class Payload:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_pickle_runs_nothing_and_what_is_no_batch_gets_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_imagenet(tmp_path)
    asked = ["dataset=imagenet32", f"dataset.root={tmp_path}"]
    batch = tmp_path / "train_data_batch_2"
    whole = batch.read_bytes()
    wrong = {"data": np.zeros((20, 3072), np.uint8), "labels": [0] * 20}
    for content, message in (
        (pickle.dumps({"data": Payload(), "labels": []}), "posix.mkdir is no part of an array"),
        (whole[:500], "a damaged batch"),
        (b"", "a damaged batch"),
        (pickle.dumps([1]), "a damaged batch"),
        (pickle.dumps(wrong), "integers from 1"),
        (pickle.dumps(wrong | {"data": np.zeros((20, 3072))}), r"data is float64 \[20, 3072\]"),
        (pickle.dumps(wrong | {"labels": [1] * 19}), "integers from 1"),
        (pickle.dumps(wrong | {"labels": 5}), "integers from 1"),
        (pickle.dumps(wrong | {"labels": [[1]] * 20}), "integers from 1"),
    ):
        batch.write_bytes(content)
        with pytest.raises(UserError, match=message) as stop:
            open_data(*asked)
        assert str(batch) in str(stop.value)
        assert not (tmp_path / "ran").exists()
        assert not (tmp_path / "imagenet32-arrays").exists()
    batch.write_bytes(whole)
    np.savez(tmp_path / "train_data_batch_2.npz", **pickle.loads(whole))
    with pytest.raises(UserError, match="are one batch twice; leave one"):
        open_data(*asked)
    with pytest.raises(UserError, match="no train_data_batch_1 of ImageNet at 32×32"):
        open_data("dataset=imagenet32", f"dataset.root={tmp_path}/none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "train_data_batch_2.npz").unlink()
    (tmp_path / "val_data").write_bytes(pickle.dumps({"data": np.zeros((20, 3072), np.uint8), "labels": [9] * 20}))
    with pytest.raises(UserError, match="no training images of some of the labels 1 to 9; get all batches"):
        open_data(*asked)
    assert not (tmp_path / "imagenet32-arrays").exists()


def test_statistics_of_the_digits_agree_with_numpy():
    from pixelcnn_lit.data.__main__ import channel_statistics

    x = torch.randint(256, (10, 3, 4, 4), dtype=torch.uint8)
    mean, std = channel_statistics(Split(x, torch.zeros(10).long()))
    assert np.allclose(mean, x.double().mean((0, 2, 3)), atol=1e-3)
    assert np.allclose(std, x.double().std((0, 2, 3), correction=0), atol=1e-3)


@pytest.mark.real_data
@pytest.mark.skipif("PIXELCNN_DATA" not in os.environ, reason="set PIXELCNN_DATA to a folder with MNIST/raw")
def test_the_real_mnist_has_its_published_mean():
    data = open_data("dataset=mnist", f"dataset.root={os.environ['PIXELCNN_DATA']}")
    assert [len(s) for s in (data.train, data.validation, data.test)] == [54_000, 6_000, 10_000]
    mean = torch.cat([data.train.x, data.validation.x]).double().mean() / 255
    assert mean == pytest.approx(0.1307, abs=5e-5)


def test_a_class_with_few_images_leaves_its_row_black():
    split = Split(torch.full((3, 1, 2, 2), 9, dtype=torch.uint8), torch.tensor([0, 0, 1]))
    shown = first_of_each_class(split, num_classes=3, n=2)
    assert shown[..., 0, 0, 0].tolist() == [[9, 9], [9, 0], [0, 0]]


def test_a_fingerprint_is_of_each_value_class_and_place():
    x, y = torch.arange(24, dtype=torch.uint8).view(6, 1, 2, 2), torch.tensor([0, 1, 0, 1, 1, 1])
    order = torch.tensor([0, 1, 2, 3, 5, 4])
    turned, flipped = x.view(6, 1, 4, 1), y.clone()
    flipped[0] = 1
    splits = [Split(x, y), Split(x ^ 1, y), Split(x[order], y[order]), Split(turned, y), Split(x, flipped)]
    assert len({fingerprint(split) for split in [*splits, Split(x[:5], y[:5])]}) == 6
    assert fingerprint(Split(x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2), y)) == fingerprint(splits[0])
    assert fingerprint(splits[0]).startswith("6 images of checksum ")


def test_data_shows_the_images_as_they_are_trained_on(tmp_path, capsys):
    switched_on = ["dataset.horizontal_flip=true", "dataset.random_crop=2"]
    for name, own in (("plain", switched_on), ("augmented", [*switched_on, "augmented=true"])):
        command("data", *own, f"run_dir={tmp_path}/{name}")
    plain, augmented = (np.asarray(Image.open(tmp_path / name / "images.png")) for name in ("plain", "augmented"))
    assert plain.shape == augmented.shape
    assert not (plain == augmented).all()
    data = open_data(*switched_on)
    nine = first_of_each_class(data.train, 10, 9).flatten(0, 1)
    assert not torch.equal(data.augment(nine), nine)
    mean = data.train.x.double().mean()
    assert f"mean {mean:.2f} (in [0, 1]: {mean / 16:.4f})" in capsys.readouterr().out
    assert "dataset: no augmentation is switched on" in refused("data", "augmented=true", f"run_dir={tmp_path}/none")


def test_a_program_that_ends_amid_a_loader_ends_its_workers_too(children, tmp_path):
    """They outlive a SIGTERM, by which Python would end them: after half a minute, with a traceback."""
    code = """
        import torch
        from pixelcnn_lit.data.images import Split
        from pixelcnn_lit.data.loader import Batches, Gather, loader

        if __name__ == "__main__":
            split = Split(torch.zeros(40, 1, 2, 2, dtype=torch.uint8), torch.zeros(40, dtype=torch.int64))
            batches = iter(loader(Gather(split), Batches(40, 4, shuffle=True), num_workers=2))
            next(batches)
            raise SystemExit(7)
        """
    (tmp_path / "ends.py").write_text(textwrap.dedent(code))
    process = children.popen(tmp_path, "ends.py")
    assert process.wait(25) == 7
    assert process.output() == ""
