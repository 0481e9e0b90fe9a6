"""Images that people have: in folders, archives and arrays, as they really lie there."""

import errno
import json
import multiprocessing
import pickle
import re
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import command, killed, one_run, refused, save_npz
from PIL import Image
from tiny import open_data

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data import arrays
from pixelcnn_lit.data.arrays import Mapped
from pixelcnn_lit.data.datamodule import ImageData
from pixelcnn_lit.data.images import Split, fingerprint
from pixelcnn_lit.lit.density_module import DensityModule


def opened(kind: str, path: Path, *overrides: str) -> ImageData:
    return open_data(f"dataset={kind}", f"dataset.path={path}", "dataset.batch_size=4", *overrides)


def line(kind: str, path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as stop:
        opened(kind, path, *overrides)
    return str(stop.value)


def sizes(data: ImageData) -> list[int]:
    return [len(split) for split in (data.train, data.validation, data.test)]


# Folders


def picture(*size: int, mode: str = "L", seed: int = 0) -> Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(*size, *channels), dtype=np.uint8))


def pictures(
    directory: Path, n: int = 5, ending: str = ".png", mode: str = "L", size: tuple[int, int] = (6, 5)
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        picture(*size, mode=mode, seed=k).save(directory / f"{k}{ending}")


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder of two classes, five pictures of each for training and for the test."""
    for split in ("train", "test"):
        for name in "ab":
            pictures(tmp_path / "root" / split / name)
    return tmp_path / "root"


@pytest.mark.parametrize("ending", [".PNG", ".jpg", ".JPEG", ".webp", ".bmp", ".tif"])
def test_pictures_of_any_ending_are_all_read(root, ending):
    pictures(root / "train" / "c", n=7, ending=ending)
    data = opened("folder", root, "dataset.validation_fraction=0.2", "dataset.colour=grey")  # WebP knows no grey
    assert (sizes(data), data.class_names) == ([14, 3, 10], ["a", "b", "c"])


def test_hidden_and_system_entries_are_neither_classes_nor_images_and_are_counted(root, capsys):
    for name in (".ipynb_checkpoints", "__MACOSX"):
        pictures(root / "train" / name, n=2)
    for name in ("._0.png", ".DS_Store", "Thumbs.db"):
        (root / "train" / "a" / name).write_bytes(b"\x00\x05\x16\x07")
    (root / "train" / "b" / "notes.txt").write_text("mine")
    picture(3, 3).save(root / "train" / "loose.png")
    (root / "extra").mkdir()
    data = opened("folder", root, "dataset.validation_fraction=0.2")
    assert (sizes(data), data.class_names) == ([8, 2, 10], ["a", "b"])
    said = [text.partition(": ")[2] for text in capsys.readouterr().out.splitlines()]
    assert said == [
        "folders left out, which are none of a split: 1 (extra)",
        "hidden and system files left out: 7",
        "files left out that are no pictures: 1 (notes.txt)",
        "pictures left out that are in no class: 1 (loose.png)",
    ]


@pytest.mark.parametrize("name", ["val", "valid", "Validation"])
def test_a_folder_of_validation_images_is_the_validation_split(root, name):
    pictures(root / name / "b", n=3)
    data = opened("folder", root)
    assert sizes(data) == [10, 3, 10]
    assert data.validation.y.tolist() == [1, 1, 1]
    assert opened("folder", root).label == "root 1×6×5, 256 levels"
    (root / "VALID" / "a").mkdir(parents=True)
    assert "which holds the validation images? leave one" in line("folder", root)


def test_a_folder_without_test_images_is_divided_by_a_fixed_choice(tmp_path):
    for name in "ab":
        pictures(tmp_path / name, n=10)
    assert "no folder of test images; type dataset.test_fraction=0.1" in line("folder", tmp_path)
    one, two = (opened("folder", tmp_path, "dataset.test_fraction=0.2") for _ in range(2))
    assert sizes(one) == [14, 2, 4]
    assert "0.2 split off for testing" in one.label
    assert opened("folder", tmp_path, "dataset.test_fraction=0.01").test.y.tolist() == [0, 1]  # of each class one
    assert one.test.y.tolist() == [0, 0, 1, 1]
    assert torch.equal(one.test.x, two.test.x)
    everything = torch.cat([split.x for split in one.splits().values()]).flatten(1)
    assert len(everything.unique(dim=0)) == 10  # each twice: both classes have the same pictures
    pictures(tmp_path / "train" / "a")
    assert "no folder of test images" in line("folder", tmp_path)
    pictures(tmp_path / "test" / "a")
    assert "has the test images; leave it out" in line("folder", tmp_path, "dataset.test_fraction=0.2")
    (tmp_path / "train").rename(tmp_path / "zug")
    assert f"call that {tmp_path / 'train'}" in line("folder", tmp_path)


def test_classes_that_are_numbers_are_in_their_order(tmp_path):
    for split in ("train", "test"):
        for label in range(12):
            pictures(tmp_path / split / str(label), n=1, size=(4, 4))
    assert opened("folder", tmp_path).class_names == [str(label) for label in range(12)]


def test_a_class_without_training_images_is_refused(root):
    (root / "train" / "c").mkdir()
    assert "class c has no training images" in line("folder", root)
    pictures(root / "test" / "d", n=1)
    (root / "train" / "c").rmdir()
    assert "has a class that the training images lack: d" in line("folder", root)


def test_pictures_of_many_sizes_are_scaled_and_cropped_while_they_are_read(root, capsys):
    tall = picture(24, 12)
    tall.save(root / "train" / "a" / "0.png")
    assert re.search(r"1\.png: 6×5 pixels, but .*0\.png has 24×12; type dataset\.resize=12$", line("folder", root))
    capsys.readouterr()
    data = opened("folder", root, "dataset.resize=6")
    assert data.facts["image_shape"] == [1, 6, 6]
    assert data.label == "root 1×6×6, 256 levels, resized to 6 and cropped"
    expected = np.asarray(tall.resize((6, 12), Image.Resampling.BILINEAR))[3:9]
    x = torch.cat([data.train.x, data.validation.x])
    apart = [
        (image[0, 1:-1].int() - torch.tensor(expected[1:-1])).abs().max() for image in x
    ]  # beyond a crop's edges nothing is seen
    assert min(apart) <= 2
    printed = capsys.readouterr().out
    assert "0.png: scaled to 6×6 and cropped to the middle" in printed
    assert "19 of 20 pictures: enlarged to 6×6 and cropped to the middle" in printed


def test_grey_pictures_among_coloured_ones_are_of_one_kind_if_that_is_asked_for(root):
    picture(6, 5, mode="RGB").save(root / "train" / "a" / "3.png")
    asked = line("folder", root)
    assert asked.endswith("0.png is grey; type dataset.colour=rgb or dataset.colour=grey")
    assert "3.png: is in colour" in asked
    for colour, channels in (("rgb", 3), ("grey", 1)):
        data = opened("folder", root, f"dataset.colour={colour}")
        assert data.facts["image_shape"] == [channels, 6, 5]
        assert data.label.endswith(f"turned to {colour}")


def test_transparent_pictures_need_a_background(root):
    hidden = np.zeros((6, 5, 4), np.uint8)
    hidden[..., :3] = 7  # under nothing
    Image.fromarray(hidden).save(root / "train" / "a" / "0.png")
    assert "type dataset.background=white or dataset.background=black" in line("folder", root)
    for name, value in (("white", 255), ("black", 0)):
        data = opened("folder", root, f"dataset.background={name}", "dataset.colour=grey")
        x = torch.cat([data.train.x, data.validation.x])
        assert (x == value).flatten(1).all(1).sum() == 1
        assert f"on {name}" in data.label


def test_pictures_further_down_are_taken_and_told_and_one_folder_too_high_is_refused(root, capsys):
    pictures(root / "train" / "a" / "more", n=3)
    data = opened("folder", root)
    assert sizes(data) == [12, 1, 10]
    assert "pictures taken from folders within a class: 3 (0.png, 1.png, 2.png)" in capsys.readouterr().out
    assert line("folder", root.parent, "dataset.test_fraction=0.5").endswith(f"type dataset.path={root}")


def test_an_odd_first_picture_is_named_whatever_the_order(tmp_path):
    for name in "ab":
        pictures(tmp_path / name, n=9)
    picture(9, 9).save(tmp_path / "a" / "0.png")
    assert re.search(r"6×5 pixels, but .*a/0\.png has 9×9", line("folder", tmp_path, "dataset.test_fraction=0.2"))


def test_documents_that_pillow_does_not_read_are_left_out_and_counted(root, capsys):
    for name in ("paper.pdf", "table.h5", "film.mpg", "figure.eps"):
        (root / "train" / "a" / name).write_bytes(b"no picture")
    assert sizes(opened("folder", root)) == [9, 1, 10]
    assert "files left out that are no pictures: 4" in capsys.readouterr().out


def test_links_are_followed_once_and_one_that_leads_nowhere_is_told(root, tmp_path):
    pictures(tmp_path / "elsewhere", n=4)
    (root / "train" / "c").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "a" / "up").symlink_to(root / "train")
    data = opened("folder", root, "dataset.validation_fraction=0.5")
    assert (sizes(data), data.class_names) == ([7, 7, 10], ["a", "b", "c"])
    (root / "train" / "b" / "9.png").symlink_to(tmp_path / "gone.png")
    assert "9.png: no such file" in line("folder", root)


# Archives


def test_medmnists_archives_work_as_they_are(tmp_path):
    labels = {
        f"{part}_labels": (np.arange(n)[:, None] % 4).astype(np.uint8) for part, n in (("train", 40), ("test", 8))
    }
    own = {"val_images": np.full((6, 6, 5, 3), 99, np.uint8), "val_labels": np.zeros((6, 1), np.uint8)}
    save_npz(tmp_path / "x.npz", class_names=None, **labels, **own)
    data = opened("npz", tmp_path / "x.npz")
    assert sizes(data) == [40, 6, 8]
    assert data.train.y.tolist() == [n % 4 for n in range(40)]


def test_names_of_classes_may_be_bytes(tmp_path):
    save_npz(tmp_path / "x.npz", class_names=np.array([b"cat", b"dog", "frög".encode(), b"x"]))
    assert opened("npz", tmp_path / "x.npz").class_names == ["cat", "dog", "frög", "x"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(40) % 3 + 1, "class 0 has no training images: .*; they begin at 1: subtract 1"),
        (
            np.where(np.arange(40) < 20, 5, 100_000),
            "class 0 has no training images: .* 2 kinds of numbers, 5 to 100000",
        ),
        (np.arange(40) % 3 - 1, "class 0|class 2"),
        (np.arange(40) % 3 * 2, "class 1 has no training images: .* 3 kinds of numbers, 0 to 4; give 0 to 2$"),
        (np.zeros((40, 3), int), r"train_labels is int64 \[40, 3\]; give integers \[N\]"),
        (np.zeros(40), r"train_labels is float64 \[40\]; give integers \[N\]"),
        (np.zeros(39, int), "40 train_images and 39 labels; give one label an image"),
        (np.zeros(0, int), "40 train_images and 0 labels"),
    ],
)
def test_labels_that_are_none_get_one_line(tmp_path, labels, message):
    save_npz(tmp_path / "x.npz", class_names=None, train_labels=labels)
    assert re.search(message, line("npz", tmp_path / "x.npz"))
    assert "\n" not in line("npz", tmp_path / "x.npz")


def test_images_of_few_levels_stay_what_they_are_or_the_line_asks_for_their_levels(tmp_path):
    save_npz(
        tmp_path / "x.npz", (6, 5), train_images=(bits := np.arange(40 * 30).reshape(40, 6, 5) % 2).astype(np.uint8)
    )
    for typed in ([], ["dataset.levels=2"]):
        assert "no value is above 1" in line("npz", tmp_path / "x.npz", *typed)
        assert "type dataset.source_levels=2, or 256" in line("npz", tmp_path / "x.npz", *typed)
    assert "test split: a value of 255 in images of 2 levels" in line(
        "npz", tmp_path / "x.npz", "dataset.source_levels=2"
    )
    save_npz(tmp_path / "x.npz", (6, 5), train_images=bits.astype(np.uint8), test_images=bits[:8].astype(np.uint8))
    data = opened("npz", tmp_path / "x.npz", "dataset.source_levels=2", "dataset.levels=2")
    assert np.array_equal(data.test.x[:, 0].numpy(), bits[:8])
    assert data.label == "x 1×6×5, 2 levels"
    assert opened("npz", tmp_path / "x.npz", "dataset.source_levels=256").levels == 256


def test_axes_in_another_order_and_an_npy_file_get_their_own_lines(tmp_path):
    save_npz(tmp_path / "x.npz", (3, 6, 5))
    assert "looks like [N,C,H,W]; give [N,H,W,C], as train_images.transpose(0, 2, 3, 1)" in line(
        "npz", tmp_path / "x.npz"
    )
    np.save(tmp_path / "x.npy", np.zeros((4, 8, 8), np.uint8))
    assert "is an .npy file, which holds one array" in line("npz", tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("shape", "typed", "message"),
    [
        ((28, 28, 28), [], "give 1 (grey) or 3 (RGB) channels; if these are right, type dataset.source_levels=256"),
        ((16, 16, 4), [], "give 1 (grey) or 3 (RGB) channels"),
        ((2, 8, 8), ["dataset.source_levels=300"], "looks like [N,C,H,W]"),
        ((0, 8), [], "give uint8 [N,H,W] or [N,H,W,C]"),
    ],
)
def test_arrays_whose_axes_or_channels_may_be_others_are_refused(tmp_path, shape, typed, message):
    save_npz(tmp_path / "x.npz", shape)
    assert message in line("npz", tmp_path / "x.npz", *typed)


def test_four_channels_are_read_where_that_is_stated(tmp_path):
    made = save_npz(tmp_path / "x.npz", (6, 5, 4))
    data = opened("npz", tmp_path / "x.npz", "dataset.source_levels=256")
    assert np.array_equal(data.test.x.permute(0, 2, 3, 1).numpy(), made["test_images"])


@pytest.mark.parametrize("names", [np.array(7), np.array("ab")])
def test_names_that_are_no_list_are_refused(tmp_path, names):
    save_npz(tmp_path / "x.npz", class_names=names)
    assert "give one name a class" in line("npz", tmp_path / "x.npz")


def test_two_classes_of_one_name_are_refused(tmp_path):
    save_npz(tmp_path / "x.npz", class_names=np.array(list("abca")))
    assert "several classes are called a; give each its own name" in line("npz", tmp_path / "x.npz")


def test_an_array_of_another_name_does_no_harm(tmp_path):
    save_npz(tmp_path / "x.npz", val_loss=np.zeros(3))
    assert sizes(opened("npz", tmp_path / "x.npz")) == [36, 4, 8]


def test_too_little_memory_is_called_that(tmp_path, monkeypatch):
    save_npz(tmp_path / "x.npz")

    def full(*_, **__):
        raise MemoryError("Unable to allocate 737. MiB")

    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", full)
    assert line("npz", tmp_path / "x.npz").endswith("does not fit into memory; see dataset=arrays")


# Arrays


@pytest.fixture
def small_parts(monkeypatch) -> None:
    """Reads images a few at a time, as from a dataset larger than memory."""
    monkeypatch.setattr("pixelcnn_lit.data.images.PART", 7)
    monkeypatch.setattr("pixelcnn_lit.data.arrays.PART", 7)


def same(one: ImageData, other: ImageData) -> None:
    """They serve the same images, in the same order, under the same name."""
    assert (one.facts, one.label) == (other.facts, other.label)
    for a, b in zip(one.splits().values(), other.splits().values(), strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.y, b.y)
    for left, right in zip(one.train_dataloader(), other.train_dataloader(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


SOURCES = {
    "digits": (["dataset=digits"], 17),
    "binary": (["dataset=digits", "dataset.levels=2", "dataset.pad=1"], 2),
    "npz": (["dataset=npz", "dataset.path=x.npz", "dataset.batch_size=4"], 256),
    "folder": (["dataset=folder", "dataset.path=root", "dataset.resize=4", "dataset.batch_size=4"], 256),
}


@pytest.mark.parametrize("source", SOURCES)
def test_any_dataset_written_as_arrays_is_the_same_dataset(source, root, tmp_path, monkeypatch, small_parts, capsys):
    monkeypatch.chdir(tmp_path)
    save_npz(tmp_path / "x.npz")
    typed, levels = SOURCES[source]
    command("data", *typed, "out=there", f"run_dir={tmp_path}/run")
    assert "images, to be read with dataset=arrays: there\n" in capsys.readouterr().out
    before = open_data(*typed)
    after = open_data("dataset=arrays", "dataset.path=there", f"dataset.batch_size={before.batch_size}")
    assert after.levels == levels
    same(before, after)
    assert isinstance(after.train.images, Mapped)
    assert "out=there: is there already" in refused("data", *typed, "out=there", f"run_dir={tmp_path}/run")


def test_arrays_that_are_made_by_hand_are_read(tmp_path):
    made = save_npz(tmp_path / "x.npz", class_names=None)
    for key, array in made.items():
        np.save(tmp_path / f"{key}.npy", array)
    assert opened("arrays", tmp_path).label == f"{tmp_path.name} 3×6×5, 256 levels"
    data = opened("arrays", tmp_path, "dataset.name=mine")
    same(opened("npz", tmp_path / "x.npz", "dataset.name=mine"), data)
    (tmp_path / "dataset.json").write_text(json.dumps({"class_names": list("wxyz"), "name": "ours"}))
    data = opened("arrays", tmp_path)
    assert (data.class_names, data.label) == (list("wxyz"), "ours 3×6×5, 256 levels")
    lists = ('{"class_names": 3}', '{"class_names": "ab"}', '{"changes": [1]}', '{"changes": "x"}', "[" * 100_000)
    for wrong in ('{"levels": 1}', '{"levels": "2"}', '{"levels": 256.5}', '{"name": 1}', "[]", "{", *lists):
        (tmp_path / "dataset.json").write_text(wrong)
        assert "dataset.json: must hold an object of class_names" in line("arrays", tmp_path)
    (tmp_path / "dataset.json").unlink()
    content = (tmp_path / "train_images.npy").read_bytes()
    torn_header = content[:20] + b"(" * 20 + content[40:]
    for broken in (content[:-1], content[:60], b"", b"no array", pickle.dumps(0), torn_header):
        (tmp_path / "train_images.npy").write_bytes(broken)
        assert f"{tmp_path}/train_images.npy: a damaged .npy file" in line("arrays", tmp_path)
    (tmp_path / "train_images.npy").unlink()
    assert "there is no train_images in it; it has: test_images, test_labels, train_labels" in line("arrays", tmp_path)
    assert "no such folder" in line("arrays", tmp_path / "x.npz")


def test_arrays_that_cannot_be_written_leave_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    monkeypatch.setattr(arrays, "progress", full)
    assert "the disk is full" in refused("data", f"out={tmp_path}/there", f"run_dir={tmp_path}/run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    dynamic = ["dataset.levels=2", "dataset.binarization=dynamic"]
    assert "draws anew in each batch" in refused("data", *dynamic, f"out={tmp_path}/there", f"run_dir={tmp_path}/run")


def test_a_mapped_file_is_sent_to_another_process_by_its_name(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(4000 * 64, dtype=np.uint8).reshape(4000, 8, 8))
    split = Split(Mapped(tmp_path / "x.npy"), torch.zeros(4000, dtype=torch.int64))[torch.arange(0, 4000, 2)]
    assert len(pickle.dumps(split.images.whole)) < 1000
    sent = pickle.loads(pickle.dumps(split))
    assert torch.equal(sent.x, split.x)


METHODS = {"fork": [], "spawn": [pytest.mark.long]}


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=METHODS[name]) for name in multiprocessing.get_all_start_methods() if name in METHODS],
)
def test_workers_serve_mapped_images_however_they_are_started(tmp_path, monkeypatch, method):
    command("data", f"out={tmp_path}/there", f"run_dir={tmp_path}/run")
    monkeypatch.setattr("pixelcnn_lit.data.loader._start_method", lambda: method)
    own = ["dataset.horizontal_flip=true", "dataset.resize=6", "dataset.batch_size=400"]
    there = opened("arrays", tmp_path / "there", *own, "dataset.num_workers=2")
    here = open_data("dataset=digits", *own, "dataset.num_workers=0")
    same(here, there)


def test_a_run_on_arrays_is_the_run_on_their_source_to_the_bit(tmp_path):
    command("data", f"out={tmp_path}/there", f"run_dir={tmp_path}/data")
    own = ["dataset.batch_size=16", "dataset.num_workers=0"]
    one = one_run(tmp_path / "a", *own)
    two = one_run(tmp_path / "b", "dataset=arrays", f"dataset.path={tmp_path}/there", *own)
    assert {key: one[key] for key in ("label", "val/bpd", "test/bpd")} == {
        key: two[key] for key in ("label", "val/bpd", "test/bpd")
    }
    states = [torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in "ab"]
    assert all(torch.equal(one, two) for one, two in zip(*(state.values() for state in states), strict=True))


def test_whole_splits_are_read_a_part_at_a_time(tmp_path, small_parts):
    x = torch.randint(256, (40, 3, 4, 5), dtype=torch.uint8)
    split = Split(x, torch.arange(40))
    positions = torch.randperm(40)
    for some in (split[positions], split[positions][3:].changed(lambda x, at: x)):
        assert [len(part) for part in some.parts(9)][:-1] == [9, 9, 9, 9][: len(some) // 9]
        assert torch.equal(some.x, x[positions[-len(some) :]])
        assert fingerprint(some) == fingerprint(some.held())


def test_parts_of_a_split_hold_no_more_positions_than_it_has():
    split = Split(torch.zeros(100_000, 1, 1, 1, dtype=torch.uint8), torch.zeros(100_000, dtype=torch.int64))
    held = {part.images.positions.untyped_storage() for part in split.parts(1000)}
    assert sum(storage.nbytes() for storage in held) == 8 * 100_000


@pytest.fixture
def two_gigabytes(tmp_path) -> Path:
    """Two gigabytes: 650,000 images of 3×32×32, which take no room on the disk but for the first."""
    for part, n in (("train", 650_000), ("val", 100), ("test", 100)):
        shape = {"descr": "|u1", "fortran_order": False, "shape": (n, 32, 32, 3)}
        with (tmp_path / f"{part}_images.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, shape)
            file.write(bytes(range(256)))
            file.truncate(file.tell() + n * 3072 - 256)
        np.save(tmp_path / f"{part}_labels.npy", np.arange(n) % 10)
    return tmp_path


def limited() -> None:
    used = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + 1_200_000_000,) * 2)


@pytest.mark.long
@pytest.mark.parametrize("name", ["train", "evaluate", "data"])
def test_arrays_need_little_memory_whatever_their_size(two_gigabytes, start: Callable, run, name):
    """A process may have 1.2 GB more of its own than it has when it begins, with all imported."""
    own = {"train": ["model_size=tiny", "trainer=cpu", "trainer.max_steps=2", "~callbacks.samples"], "data": []}
    own["evaluate"] = [f"ckpt={two_gigabytes}/run", "trainer=cpu", "split=train", "n_images=100"]
    if name == "evaluate":
        train = start(two_gigabytes, "train", *own["train"], *arrays_in(two_gigabytes), f"run_dir={two_gigabytes}/run")
        assert train.wait(300) == 0
    child = start(two_gigabytes, name, *own[name], *arrays_in(two_gigabytes), "run_dir=out", before=limited)
    assert child.wait(500) == 0


def arrays_in(folder: Path) -> list[str]:
    return ["dataset=arrays", f"dataset.path={folder}", "dataset.num_workers=2", "dataset.batch_size=8"]


@pytest.mark.long
def test_a_run_on_arrays_resumes_to_the_bit_and_two_processes_score_like_one(tmp_path, spawn: Callable):
    command("data", f"out={tmp_path}/there", f"run_dir={tmp_path}/data")
    tiny = [
        "model_size=tiny",
        "trainer=cpu",
        "trainer.max_epochs=2",
        "trainer.limit_train_batches=6",
        "~callbacks.samples",
    ]
    tiny += ["dataset=arrays", f"dataset.path={tmp_path}/there", "dataset.batch_size=16"]
    command("train", *tiny, f"run_dir={tmp_path}/whole")
    with killed(DensityModule, "training_step", 8):
        command("train", *tiny, f"run_dir={tmp_path}/cut", "callbacks.last.every_n_steps=1")
    command("train", f"run_dir={tmp_path}/cut", "ckpt=last")
    whole, cut = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "cut")
    )
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=64-true"]
    figures = []
    for name, own in (("one", ["trainer=cpu", "trainer.precision=64-true"]), ("two", two)):
        child = spawn(tmp_path, "evaluate", f"ckpt={tmp_path}/whole", *own, f"run_dir={tmp_path}/{name}")
        assert child.wait(300) == 0
        figures.append(json.loads((tmp_path / name / "evaluation.json").read_text())["bpd"])
    assert figures[0] == pytest.approx(figures[1], abs=1e-9)
