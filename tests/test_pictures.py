"""People's pictures: whatever the file, its pixels are those that a viewer shows, and no change goes without a word."""

import contextlib
import io
import json
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import command, refused
from PIL import Image, features
from tiny import density
from torch import Tensor

import pixelcnn_lit.evaluate
import pixelcnn_lit.scoring.own_pictures
from pixelcnn_lit.compress import read_folder
from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data.folder import folder
from pixelcnn_lit.data.pictures import picture_files, read_image, read_picture, tell
from pixelcnn_lit.density.density import Density
from pixelcnn_lit.density.load import load
from pixelcnn_lit.scoring.own_pictures import classes_of

LOSSLESS = {"PNG": {}, "BMP": {}, "TIFF": {}, "GIF": {}, "PPM": {}, "TGA": {}, "WEBP": {"lossless": True}}
CONVERTED = {("BMP", "LA"), ("PPM", "LA"), ("PPM", "P"), ("PPM", "RGBA"), ("BMP", "RGBA")}  # Pillow cannot write these
WITHOUT_GREY = ("WEBP", "GIF")  # GIF has a palette of greys


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


def pixels_of(array: np.ndarray) -> Tensor:
    """[H,W] or [H,W,3] as [1 or 3,H,W]."""
    return torch.from_numpy(array.copy()).reshape(*array.shape[:2], -1).permute(2, 0, 1)


def written(image: Image.Image, path: Path, format: str, **options: object) -> Path:
    image.save(path, format, **options)
    return path


def line_of(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as stop:
        call(*arguments, **options)
    return str(stop.value)


@pytest.mark.parametrize("format", LOSSLESS)
def test_pixels_are_those_of_the_file_whatever_its_format_and_ending(format, tmp_path):
    grey, colour = noise(6, 5), noise(6, 5, 3)
    few = colour[0, :4][colour[..., 0] % 4]  # of four colours, for a palette
    pictures = {
        "L": (Image.fromarray(grey), grey),
        "1": (Image.fromarray(grey > 127), np.where(grey > 127, 255, 0).astype(np.uint8)),
        "RGB": (Image.fromarray(colour), colour),
        "P": (Image.fromarray(few).quantize(4), few),
    }
    for mode, (image, array) in pictures.items():
        if (format, mode) in CONVERTED or (format == "GIF" and mode == "RGB"):
            continue
        read = read_picture(written(image, tmp_path / "x.txt", format, **LOSSLESS[format]))
        seen = read.pixels
        if mode in ("L", "1") and format in WITHOUT_GREY and len(seen) == 3:
            assert torch.equal(seen, seen[:1].expand(3, -1, -1))
            seen = seen[:1]
        assert torch.equal(seen, pixels_of(array)), mode
        assert read.changes == ()


def test_lossy_formats_are_read_to_within_their_loss(tmp_path):
    smooth = np.add.outer(np.arange(16), np.arange(24)).astype(np.uint8) * 4
    for format in ["JPEG", "WEBP", *["AVIF"] * features.check("avif"), *["JPEG2000"] * features.check("jpg_2000")]:
        read = read_image(written(Image.fromarray(smooth), tmp_path / "x.png", format), (1, 16, 24), 256)
        assert read.pixels.shape == (1, 16, 24)
        assert (read.pixels[0].int() - torch.from_numpy(smooth).int()).abs().max() < 20


TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: np.rot90,
}


@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_a_picture_is_turned_as_its_exif_orientation_says_and_this_is_told(format, tmp_path):
    stored = np.kron(noise(2, 3), np.ones((8, 8), np.uint8))  # blocks, which JPEG keeps
    for orientation, turn in TURNS.items():
        exif = Image.Exif()
        exif[0x112] = orientation
        options = {"exif": exif, **({"quality": 100} if format == "JPEG" else {"lossless": True})}
        read = read_picture(written(Image.fromarray(stored), tmp_path / "x", format, **options))
        difference = read.pixels[0].int() - torch.from_numpy(turn(stored).copy()).int()
        assert difference.abs().max() <= 1
        told = () if orientation == 1 else (f"turned as its EXIF orientation ({orientation}) says",)
        assert read.changes == told


def test_colours_of_print_are_converted_and_this_is_told(tmp_path):
    colours = np.kron(noise(2, 3, 3), np.ones((8, 8, 1), np.uint8))
    for mode, format in (("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF")):
        options = {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
        read = read_picture(written(Image.fromarray(colours).convert(mode), tmp_path / "x", format, **options))
        assert (read.pixels.int() - pixels_of(colours).int()).abs().max() <= 4
        assert read.changes == (f"converted from {mode} to RGB",)


def test_damaged_exif_data_leaves_a_picture_upright(tmp_path):
    for format in ("PNG", "JPEG", "WEBP"):
        read = read_picture(written(Image.new("RGB", (5, 4)), tmp_path / "x", format, exif=b"Exif\0\0no exif at all"))
        assert (read.pixels.shape, read.changes) == ((3, 4, 5), ())


def transparent(tmp_path: Path) -> dict[str, tuple[Path, np.ndarray, np.ndarray]]:
    """Files that are transparent in some pixels, each with its pixels [H,W] or [H,W,3] and their opacity [H,W]."""
    grey, colour, alpha = noise(6, 5), noise(6, 5, 3, seed=1), noise(6, 5, seed=2)
    alpha[0, 0], alpha[0, 1] = 0, 255
    index = np.arange(30, dtype=np.uint8).reshape(6, 5) % 4
    palette = Image.fromarray(index)
    palette.putpalette(noise(12, seed=3).tobytes())  # which makes it P
    of_palette = np.asarray(palette.convert("RGB"))
    files = {
        "LA": (Image.fromarray(np.dstack([grey, alpha]), "LA"), "PNG", {}, grey, alpha),
        "RGBA": (Image.fromarray(np.dstack([colour, alpha])), "PNG", {}, colour, alpha),
        "RGBA TIFF": (Image.fromarray(np.dstack([colour, alpha])), "TIFF", {}, colour, alpha),
        "RGBA WebP": (
            Image.fromarray(np.dstack([colour, alpha])), "WEBP", {"lossless": True, "exact": True}, colour, alpha,
        ),
        "L, one level": (
            Image.fromarray(grey), "PNG", {"transparency": int(grey[2, 2])},
            grey, np.where(grey == grey[2, 2], 0, 255),
        ),
        "RGB, one colour": (
            Image.fromarray(colour), "PNG", {"transparency": tuple(map(int, colour[2, 2]))},
            colour, np.where((colour == colour[2, 2]).all(-1), 0, 255),
        ),
        "P, one index": (palette, "GIF", {"transparency": 2}, of_palette, np.where(index == 2, 0, 255)),
        "P, by index": (
            palette, "PNG", {"transparency": bytes([255, 0, 100, 255])},
            of_palette, np.array([255, 0, 100, 255])[index],
        ),
    }  # fmt: skip
    made = {}
    for name, (image, format, options, array, opacity) in files.items():
        made[name] = (written(image, tmp_path / name, format, **options), array, opacity)
    return made


def test_a_transparent_picture_is_refused_or_composed_on_the_background_that_is_typed(tmp_path):
    for name, (file, array, opacity) in transparent(tmp_path).items():
        line = line_of(read_picture, file, settings="dataset.")
        assert "type dataset.background=white or dataset.background=black" in line, name
        assert "background" not in line_of(read_picture, file)
        share = torch.from_numpy(opacity / 255.0)
        for background, level in (("white", 255), ("black", 0)):
            read = read_picture(file, background)
            expected = pixels_of(array) * share + level * (1 - share)
            assert read.pixels.shape == expected.shape, name
            assert (read.pixels - expected).abs().max() <= 1, name
            assert read.changes == (f"transparent; composed on {background}",)


def test_a_picture_that_is_opaque_everywhere_needs_no_background(tmp_path):
    grey, colour, opaque = noise(6, 5), noise(6, 5, 3), np.full((6, 5), 255, np.uint8)
    for array in (grey, colour):
        image = Image.fromarray(np.dstack([array, opaque]), "LA" if array.ndim == 2 else "RGBA")
        for background in (None, "white"):
            read = read_picture(written(image, tmp_path / "x", "PNG"), background)
            assert torch.equal(read.pixels, pixels_of(array))
            assert read.changes == ()


def png16(samples: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, of uint16 [H,W,3], which Pillow cannot write."""
    body = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples))
    size = struct.pack(">2I5B", samples.shape[1], samples.shape[0], 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", size), (b"IDAT", body), (b"IEND", b""))
    whole = (struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


def tiff16(samples: np.ndarray) -> bytes:
    """A TIFF of 16 bits a channel, of uint16 [H,W,3], which Pillow cannot write."""
    data = samples.astype("<u2").tobytes()
    height, width, _ = samples.shape
    short, long = 3, 4
    entries = [(256, short, 1, width), (257, short, 1, height), (258, short, 3, 8), (259, short, 1, 1)]
    entries += [(262, short, 1, 2), (273, long, 1, 14), (277, short, 1, 3), (278, short, 1, height)]
    entries += [(279, long, 1, len(data))]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 14 + len(data)) + struct.pack("<3H", 16, 16, 16) + data + directory + bytes(4)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def test_more_than_8_bits_a_channel_are_refused(tmp_path):
    deep = np.random.default_rng(0).integers(65536, size=(6, 5, 3), dtype=np.uint16)
    files = {
        "grey PNG": saved(Image.fromarray(deep[..., 0]), "PNG"),
        "colour PNG": png16(deep),
        "grey TIFF": saved(Image.fromarray(deep[..., 0]), "TIFF"),
        "colour TIFF": tiff16(deep),
        "TIFF of integers": saved(Image.fromarray(deep[..., 0].astype(np.int32)), "TIFF"),
        "TIFF of floats": saved(Image.fromarray(deep[..., 0].astype(np.float32)), "TIFF"),
        "grey PGM": b"P5 5 6 65535\n" + deep[..., 0].astype(">u2").tobytes(),
        "colour PPM": b"P6 5 6 65535\n" + deep.astype(">u2").tobytes(),
        "colour PPM in text": b"P3 5 6 1023\n" + b" ".join(b"%d" % (n % 1024) for n in deep.flatten()),
    }
    if features.check("jpg_2000"):
        whole = saved(Image.new("RGB", (5, 6)), "JPEG2000")
        depth = whole.index(b"\xff\x4f\xff\x51") + 42
        files["JPEG 2000"] = whole[:depth] + b"\x0f" + whole[depth + 1 :]
    if features.check("avif"):
        whole = bytearray(saved(Image.new("RGB", (16, 16)), "AVIF"))
        whole[whole.index(b"av1C") + 6] |= 0x40
        depths = whole.index(b"pixi") + 9
        whole[depths : depths + 3] = bytes([10, 10, 10])
        files["AVIF"] = bytes(whole)
    for name, content in files.items():
        (tmp_path / "x.png").write_bytes(content)
        line = line_of(read_picture, tmp_path / "x.png")
        assert "x.png: has more than 8 bits a channel, most likely 16" in line, name
    for content in (b"P6 5 6 255\n", b"P6 5 6 15\n", b"P4 5 6\n"):
        (tmp_path / "x.png").write_bytes(content + bytes(90))
        assert read_picture(tmp_path / "x.png").pixels.shape[1:] == (6, 5)


def test_one_picture_is_read_and_several_are_refused(tmp_path):
    frames = [Image.fromarray(noise(6, 5, 3, seed=n)) for n in range(3)]
    for format in ("GIF", "PNG", "TIFF", "WEBP"):
        file = written(frames[0], tmp_path / "x", format, save_all=True, append_images=frames[1:])
        assert "has 3 frames" in line_of(read_picture, file), format
    photo = written(frames[0], tmp_path / "x.jpg", "MPO", save_all=True, append_images=frames[1:], quality=100)
    read = read_picture(photo)  # of a camera, which puts previews behind the photo
    alone = read_picture(written(frames[0], tmp_path / "alone.jpg", "JPEG", quality=100))
    assert torch.equal(read.pixels, alone.pixels)
    assert read.changes == ("took the first of several pictures in the file, as a viewer does",)


def test_a_file_that_is_no_picture_gets_one_line(tmp_path):
    assert line_of(read_picture, tmp_path / "absent.png").endswith("absent.png: no such file")
    assert "is a folder" in line_of(read_picture, tmp_path)
    for content in (b"", b"no picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n", b"\x89HDF\r\n\x1a\n"):
        (tmp_path / "x.png").write_bytes(content)
        assert "not a readable picture; save it as PNG" in line_of(read_picture, tmp_path / "x.png")
    for format in LOSSLESS:
        whole = saved(Image.fromarray(noise(64, 64)), format, **LOSSLESS[format])
        (tmp_path / "x.png").write_bytes(whole[: len(whole) // 2])
        assert "x.png: not a readable picture" in line_of(read_picture, tmp_path / "x.png"), format


def test_a_coloured_picture_is_grey_for_a_grey_model_only_where_that_is_typed(tmp_path):
    grey, colour = noise(6, 5), noise(6, 5, 3)
    nearly = np.dstack([grey // 2, grey // 2 + 8, grey // 2])
    files = {name: tmp_path / name for name in ("grey", "equal", "nearly", "colour")}
    for file, array in zip(files.values(), (grey, np.dstack([grey] * 3), nearly, colour), strict=True):
        Image.fromarray(array).save(file, "PNG")
    luma = torch.from_numpy(np.asarray(Image.fromarray(colour).convert("L")).copy())[None]
    one, three = (1, 6, 5), (3, 6, 5)
    for file in (files["grey"], files["equal"]):
        read = read_image(file, one, 256)
        assert torch.equal(read.pixels, pixels_of(grey))
        assert read.changes == ()
    read = read_image(files["nearly"], one, 256)
    assert (read.pixels - pixels_of(grey // 2).int()).abs().max() <= 8
    assert read.changes == ("nearly grey, made grey",)
    assert "is coloured, but the model's images are grey; type colour=grey" in line_of(
        read_image, files["colour"], one, 256
    )
    for shape in (one, three):
        read = read_image(files["colour"], shape, 256, colour="grey")
        assert torch.equal(read.pixels, luma.expand(shape))
        assert read.changes == ("coloured, turned to grey",)
    for name in ("equal", "nearly", "colour"):
        read = read_image(files[name], three, 256)
        assert torch.equal(read.pixels, read_picture(files[name]).pixels)
        assert read.changes == ()
    for wanted in (None, "grey"):
        read = read_image(files["grey"], three, 256, colour=wanted)
        assert torch.equal(read.pixels, pixels_of(grey).expand(three))
        assert read.changes == ("grey, taken as three equal channels",)


def test_a_picture_of_another_size_is_scaled_and_cropped_to_the_middle_only_where_that_is_typed(tmp_path):
    for size in ((8, 8), (9, 5), (5, 9), (3, 2), (1, 300), (300, 1), (640, 480)):
        file = written(Image.new("RGB", size, (10, 20, 30)), tmp_path / "x", "PNG")
        width, height = size
        assert f"x: {height}×{width} pixels; the model's images are 6×5; type resize=true" in line_of(
            read_image, file, (3, 6, 5), 256
        )
        read = read_image(file, (3, 6, 5), 256, resize=True)
        assert torch.equal(read.pixels, torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None].expand(3, 6, 5))
        how = "enlarged" if height < 6 or width < 5 else "scaled"
        assert read.changes == (f"{how} to 6×5 and cropped to the middle",)
    fine = np.indices((40, 32)).sum(0) % 2 * 255  # a chessboard
    read = read_image(
        written(Image.fromarray(fine.astype(np.uint8)), tmp_path / "x", "PNG"), (1, 5, 4), 256, resize=True
    )
    assert read.pixels[0, 1:-1, 1:-1].tolist() == [[pytest.approx(127.5, abs=2)] * 2] * 3  # antialiased
    assert read.changes == ("scaled to 5×4",)
    wide = np.hstack([np.full((6, 20), 200), noise(6, 6), np.full((6, 20), 100)]).astype(np.uint8)
    for array in (wide, wide.T):
        read = read_image(written(Image.fromarray(array), tmp_path / "x", "PNG"), (1, 6, 6), 256, resize=True)
        middle = array[:, 20:26] if array is wide else array[20:26]
        assert torch.equal(read.pixels, pixels_of(middle))


def test_levels_are_inverted_and_requantized_and_this_is_told_last(tmp_path):
    array = noise(6, 5)
    file = written(Image.fromarray(array), tmp_path / "x", "PNG")
    assert torch.equal(read_image(file, (1, 6, 5), 256, invert=True).pixels, pixels_of(255 - array))
    for levels in (2, 17):
        read = read_image(file, (1, 6, 5), levels, invert=True)
        assert torch.equal(read.pixels, pixels_of(((255 - array.astype(int)) * levels // 256).astype(np.uint8)))
        assert read.changes == ("inverted", f"256 levels taken as {levels}")


def test_a_drawing_on_nothing_is_composed_before_it_is_inverted(tmp_path):
    drawing = np.zeros((6, 5, 4), np.uint8)  # all black, on nothing
    drawing[2, 2] = (0, 0, 0, 255)
    file = written(Image.fromarray(drawing), tmp_path / "x", "PNG")
    read = read_image(file, (1, 6, 5), 256, background="white", invert=True)
    assert read.pixels.nonzero().tolist() == [[0, 2, 2]]


def test_pictures_below_a_folder_are_told_by_content_and_what_is_left_out_is_counted(tmp_path, capsys):
    pictures = ["2.png", "10.JPG", "b/1.without_ending", "b/a.txt", "c/10/x.gif", "c/9/x.gif"]
    hidden = [".x.png", "._2.png", ".ipynb_checkpoints/2.png", "__MACOSX/b/1.png", "b/Thumbs.db", ".DS_Store"]
    others = ["notes", "b/photo.HEIC"]
    for name in pictures + hidden + others:
        path = tmp_path / ".home" / "drawings" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = b"no picture" if name in others else saved(Image.new("L", (4, 4)), "PNG")
        path.write_bytes(content)
    here = tmp_path / ".home" / "drawings"
    assert [file.relative_to(here).as_posix() for file in picture_files(here)] == [
        "2.png", "10.JPG", "b/1.without_ending", "b/a.txt", "c/9/x.gif", "c/10/x.gif",
    ]  # fmt: skip
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2] for line in said] == [
        "hidden and system files left out: 6",
        "files left out that are no pictures: 2 (photo.HEIC, notes)",
    ]
    (tmp_path / "empty").mkdir()
    assert "no pictures in it" in line_of(picture_files, tmp_path / "empty")
    for broken in (saved(Image.new("L", (64, 64)), "PNG")[:60], b"P5 100000 100000 255\n", b"no picture", b""):
        (here / "broken.png").write_bytes(broken)  # is not left out: people must know of it
        assert here / "broken.png" in picture_files(here)
        assert "broken.png: not a readable picture" in line_of(read_picture, here / "broken.png")


def test_each_kind_of_change_is_told_in_one_line_in_the_order_of_the_changes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (9, 8)).save("a.png")
    Image.new("LA", (8, 8)).save("b.png")
    Image.new("L", (8, 8)).save("c.png")
    names = [Path(f"{name}.png") for name in "abc"]
    tell([read_image(name, (3, 8, 8), 256, background="black", resize=True, invert=True) for name in names])
    assert capsys.readouterr().out.splitlines() == [
        "b.png: transparent; composed on black",
        "3 of 3 pictures: grey, taken as three equal channels",
        "a.png: scaled to 8×8 and cropped to the middle",
        "3 of 3 pictures: inverted",
    ]


def test_folders_of_a_dataset_and_of_compress_are_read_by_the_same_rules(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x112] = 3
    stored = noise(4, 4)
    for split in ("train", "test"):
        (tmp_path / split / "0").mkdir(parents=True)
        Image.fromarray(stored).save(tmp_path / split / "0" / "x.png", exif=exif)
    turned = pixels_of(stored[::-1, ::-1])
    images = folder(str(tmp_path))
    for split in (images.train, images.test):
        assert torch.equal(split.x[0], turned)
    images.tell()
    assert torch.equal(read_folder(str(tmp_path), None, ["0"])[0][1], turned)
    assert capsys.readouterr().out == "2 of 2 pictures: turned as its EXIF orientation (3) says\n" * 2
    Image.new("RGBA", (4, 4)).save(tmp_path / "train" / "0" / "x.png")
    transparent = "x.png: is transparent in places; "
    assert line_of(read_folder, str(tmp_path), None, ["0"]).endswith(f"{transparent}save it without transparency")
    assert f"{transparent}type dataset.background=white or" in line_of(folder, str(tmp_path))


# The commands, with a model of grey 8×8 digits of 17 levels in ten classes


@pytest.fixture(scope="module")
def model(run) -> Density:
    return load(str(run))


def drawing(mode: str = "RGB", size: tuple[int, int] = (80, 80), paper: object = "white") -> Image.Image:
    """A black stroke in the middle of white paper."""
    image = Image.new(mode, size, paper)
    image.paste("black", (size[0] // 4, size[1] // 8, size[0] * 3 // 4, size[1] - size[1] // 8))
    return image


def as_seen(file: Path) -> Tensor:
    return read_image(file, (1, 8, 8), 17, "white", resize=True, invert=True).pixels


def test_a_jpeg_drawn_black_on_white_is_completed(run, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    drawing().save("drawing.jpg")
    drawn = []
    draw = Density.draw
    monkeypatch.setattr(Density, "draw", lambda *a, **own: drawn.append(draw(*a, **own)) or drawn[-1])
    asked = [f"ckpt={run}", "label=1", "sampler.n_per_class=2", f"run_dir={tmp_path}/out"]
    command("complete", *asked, "image=drawing.jpg", "resize=true", "invert=true")
    changes = ["scaled to 8×8", "inverted", "256 levels taken as 17"]
    assert capsys.readouterr().out.splitlines()[:3] == [f"drawing.jpg: {change}" for change in changes]
    seen = as_seen(Path("drawing.jpg"))
    assert seen[0, 0, 0] == 0  # paper is black now
    assert seen[0, 4, 4] == 16  # and ink white
    assert drawn[0].shape == (1, 2, 1, 8, 8)
    assert all(torch.equal(image[:, :4], seen[:, :4]) for image in drawn[0][0])
    result = json.loads(Path("out/completions.json").read_text())
    assert (result["image"], result["changes"]) == ("drawing.jpg", changes)
    with Image.open("out/completions.png") as picture:
        assert picture.height == 8 * 4 + 4

    # A mask is scaled with the picture, and neither inverted nor asked for its colours.
    left = Image.new("RGB", (80, 80), (0, 0, 40))
    left.paste((255, 255, 200), (0, 0, 40, 80))
    left.save("left.png")
    command("complete", *asked, "image=drawing.jpg", "resize=true", "invert=true", "keep_mask=left.png")
    assert all(torch.equal(image[..., :4], seen[..., :4]) for image in drawn[1][0])
    assert "left.png: scaled to 8×8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["image=large.png"], "large.png: 80×80 pixels; the model's images are 8×8; type resize=true"),
        (["image=."], "is a folder"),
        (["invert=true"], "invert: is for pictures of your own; type image=FILE, too"),
        (["colour=grey", "keep_mask=right.png"], "colour: is for pictures of your own"),
        (["resize=true"], "resize: is for pictures of your own; type image=FILE or keep_mask=FILE"),
        (["image=right.png", "keep_mask=nothing.png"], "nothing.png: is transparent in places; save it without"),
    ],
)
def test_a_picture_that_cannot_be_completed_gets_one_line(run, monkeypatch, tmp_path, asked, message):
    pictures(tmp_path, monkeypatch)
    assert message in refused("complete", f"ckpt={run}", *asked, *["label=1"] * ("image" in asked[0]))


def pictures(directory: Path, monkeypatch) -> None:
    """Stand in a folder with some."""
    monkeypatch.chdir(directory)
    drawing().save("large.png")
    Image.new("LA", (8, 8)).save("nothing.png")
    Image.fromarray(noise(8, 8)).save("right.png")


def test_evaluate_tells_the_bits_of_each_picture_of_a_folder_and_reads_no_dataset(
    run, model, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(pixelcnn_lit.evaluate, "saved_or_given", lambda *_, **__: pytest.fail("a dataset was read"))
    monkeypatch.setattr(pixelcnn_lit.scoring.own_pictures, "SHOWN", 3)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "drawings" / "b").mkdir(parents=True)
    drawing().save("drawings/10.jpg")
    drawing("RGBA", (60, 40), (0, 0, 0, 0)).save("drawings/9.png")
    Image.fromarray(noise(8, 8)).save("drawings/b/noise.webp", lossless=True)
    Image.fromarray(noise(8, 8, seed=1)).save("drawings/b/noise 2.bmp")
    Path("drawings/notes.txt").write_text("no picture")
    files = ["9.png", "10.jpg", "b/noise 2.bmp", "b/noise.webp"]
    x = torch.stack([as_seen(Path("drawings", file)) for file in files])
    asked = [f"ckpt={run}", "background=white", "resize=true", "invert=true", "trainer=cpu", f"run_dir={tmp_path}/out"]
    command("evaluate", *asked, "images=drawings", "dataset.batch_size=3")
    said = capsys.readouterr().out
    y = model.classify(x).argmax(1)
    given = torch.stack([-model.nats(x, [label] * len(x)) for label in range(10)], dim=1).double()
    bpd = -(given.logsumexp(1) - math.log(10)) / math.log(2) / 64  # of p(x): the sum over y of p(x | y) / 10
    result = json.loads(Path("out/evaluation.json").read_text())
    assert [row["file"] for row in result["pictures"]] == files
    assert [row["class"] for row in result["pictures"]] == [str(int(label)) for label in y]
    assert [row["bpd"] for row in result["pictures"]] == pytest.approx(bpd.tolist(), rel=1e-5)
    assert result["bpd"] == pytest.approx(float(bpd.mean()), rel=1e-5)
    assert "likeliest of 10 by Bayes' rule" in result["classes"]
    own = {"images": 4, "background": "white", "resize": True, "invert": True, "colour": None, "label": "drawings"}
    assert result | own == result
    assert "drawings: files left out that are no pictures: 1 (notes.txt)" in said
    assert "4 of 4 pictures: inverted" in said
    assert "class: the likeliest of 10 by Bayes' rule" in said
    table = [line.split() for line in said.splitlines()]
    sure = given.softmax(1).amax(1).tolist()
    for file, label, probability, one in zip(files[:3], y.tolist(), sure, bpd.tolist(), strict=False):
        assert [*file.split(), str(label), f"({probability:.0%})", f"{one:.4f}"] in table
    assert ["mean", f"{bpd.mean():.4f}"] in table
    assert "noise.webp " not in said
    assert "shown: the first 3 of 4; all are in evaluation.json" in said
    with Image.open("out/bits_per_pixel.png") as picture:
        shown = np.asarray(picture)
    side = 32  # of an image of 8×8, enlarged
    assert shown.shape[0] == 3 * (side + 2) + 2
    spent = shown[:, -side - 2 : -2].reshape(len(shown), -1).max(1)
    assert spent.max() == 255  # where the most is spent
    given = shown[2 : 2 + side : 4, -2 * side - 4 : -side - 4 : 4, 0]
    assert np.array_equal(given, (x[0, 0].double() * 255 / 16).round().numpy())

    command("evaluate", *asked, "images=drawings/10.jpg", "label=3")
    said = capsys.readouterr().out
    one = json.loads(Path("out/evaluation.json").read_text())
    assert one["bpd"] == pytest.approx(float(model.nats(x[1:2], [3])) / math.log(2) / 64, rel=1e-5)
    assert (one["classes"], one["images"], one["label"]) == ("label=3", 1, "10.jpg")
    assert [(row["file"], row["class"]) for row in one["pictures"]] == [("10.jpg", "3")]
    assert "class: label=3" in said

    command("evaluate", *asked, "images=drawings", "n_images=2")
    assert "2 of 4 pictures, a fixed random subset" in capsys.readouterr().out
    some = json.loads(Path("out/evaluation.json").read_text())["pictures"]
    assert len(some) == 2
    assert all(row in result["pictures"] for row in some)


def test_a_drawing_that_is_much_likelier_inverted_gets_a_hint(monkeypatch, tmp_path, capsys):
    stroke = torch.zeros(28, 28, dtype=torch.uint8)
    stroke[5:23, 13:16] = 255
    for name, pixels in (("chalk", stroke), ("ink", 255 - stroke)):
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{name}.png")
    asked = ["ckpt=mnist", f"run_dir={tmp_path}/out"]
    for images, hint in (
        (tmp_path, "1 of 2 pictures are much likelier inverted (black on white?): type invert=true"),
        (tmp_path / "ink.png", "the picture is much likelier inverted"),
    ):
        command("evaluate", *asked, "trainer=cpu", f"images={images}")
        assert hint in capsys.readouterr().out
    command("evaluate", *asked, "trainer=cpu", f"images={tmp_path}/ink.png", "invert=true")
    assert "likelier inverted" not in capsys.readouterr().out
    few = ["label=1", "sampler.n_per_class=1"]
    monkeypatch.setattr(Density, "draw", lambda self, *_, image, **__: image[:, None])
    for name in ("ink", "chalk"):
        command("complete", *asked, *few, f"image={tmp_path}/{name}.png")
        assert ("the picture is much likelier inverted" in capsys.readouterr().out) == (name == "ink")


def test_a_model_that_knows_one_class_or_none_asks_for_none():
    x = torch.randint(17, (3, 1, 4, 5), dtype=torch.uint8)
    for model, number in (
        (density("pixelcnn", "categorical", conditional=False), 3),
        (density("pixelcnn", "categorical", num_classes=1, class_names=["a"]), 0),
    ):
        y, *others = classes_of(model, x, None, batch_size=2)
        assert (y.tolist(), *others) == ([number] * 3, "the model's only class", None, None)
        assert model.bits_per_pixel(x, y).shape == (3, 4, 5)
    with pytest.raises(UserError, match="label=a: this model was trained on no classes"):
        classes_of(density("pixelcnn", "categorical", conditional=False), x, "a", batch_size=2)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["images=nothing.png"], "type background=white"),
        (["images=right.png", "label=77"], "label=77: this model was trained on 0, 1"),
        (["images=right.png", "split=test"], "split=test: is a part of a dataset; leave split or images out"),
        (["images=right.png", "task=classify"], "task=classify: needs images of known classes"),
        (["images=right.png", "dataset=digits"], "dataset: no dataset is read where images are given"),
        (["images=right.png", "dataset.path=x"], "dataset.path: no dataset is read"),
        (["images=right.png", "dataset.batch_size=0"], "dataset.batch_size=0: must be a whole number >= 1"),
        (["label=0"], "label: is for pictures of your own; type images=FILE_OR_FOLDER, too"),
    ],
)
def test_pictures_that_cannot_be_scored_get_one_line(run, monkeypatch, tmp_path, asked, message):
    pictures(tmp_path, monkeypatch)
    with contextlib.chdir(tmp_path):
        assert message in refused("evaluate", f"ckpt={run}", "trainer=cpu", *asked)
