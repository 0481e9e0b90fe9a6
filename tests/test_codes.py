"""Codes of a tokenizer: more levels than uint8 holds, in no order, of any number of channels."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import archive, command, refused, save_npz
from PIL import Image
from tiny import check_no_future, configs, make, open_data, redraw

import pixelcnn_lit
from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data.grids import as_rgb
from pixelcnn_lit.density.density import Density
from pixelcnn_lit.samplers.draw import Request, draw

LEVELS = 300


def save_codes(path: Path, dtype: type = np.uint16, shape: tuple[int, ...] = (4, 5)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    codes = {f"{part}_images": rng.integers(LEVELS, size=(n, *shape)) for part, n in (("train", 40), ("test", 8))}
    return save_npz(path, **{key: value.astype(dtype) for key, value in codes.items()})


def asked(path: Path) -> list[str]:
    return ["experiment=codes", f"dataset.path={path}", f"dataset.source_levels={LEVELS}", "dataset.batch_size=8"]


@pytest.fixture(scope="module", params=[(4, 5), (4, 5, 2)], ids=["one channel", "two"])
def trained(request, tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """A run on codes, and its data."""
    directory = tmp_path_factory.mktemp("codes")
    codes = save_codes(directory / "x.npz", shape=request.param)
    tiny = ["model_size=tiny", "trainer=cpu", "trainer.max_steps=2", "sampler.n_per_class=1"]
    command("train", *tiny, *asked(directory / "x.npz"), f"run_dir={directory}/run")
    return directory / "run", codes


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_codes_of_any_integers_are_read_and_written_as_arrays(tmp_path, dtype):
    codes = save_codes(tmp_path / "x.npz", dtype)
    typed = ["dataset=npz", f"dataset.path={tmp_path}/x.npz", f"dataset.source_levels={LEVELS}"]
    data = open_data(*typed)
    assert (data.levels, data.test.x.dtype) == (LEVELS, torch.int32)
    assert np.array_equal(data.test.x[:, 0].numpy(), codes["test_images"])
    command("data", *typed, f"out={tmp_path}/there", f"run_dir={tmp_path}/run")
    there = open_data("dataset=arrays", f"dataset.path={tmp_path}/there")
    assert np.load(tmp_path / "there" / "test_images.npy").dtype == np.uint16
    assert (there.facts, there.test.x.dtype) == (data.facts, torch.int32)
    for name in ("train", "validation", "test"):
        assert torch.equal(there.split(name).x, data.split(name).x)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ([], "is uint16 [40, 4, 5]; give uint8; of the codes of a tokenizer, type how many there are: dataset.source"),
        (["dataset.source_levels=299"], "train_images has values 0 to 299, of 299 levels"),
        (["dataset.source_levels=70000"], "dataset.source_levels=70000: must be"),
        ([f"dataset.source_levels={LEVELS}", "dataset.levels=2"], "dataset.levels: .* holds codes"),
        ([f"dataset.source_levels={LEVELS}", "dataset.resize=2"], "dataset.resize: .* holds codes"),
        ([f"dataset.source_levels={LEVELS}", "dataset.pad=2"], "dataset.pad: .* holds codes"),
    ],
)
def test_codes_that_are_misread_get_one_line(tmp_path, typed, message):
    save_codes(tmp_path / "x.npz")
    with pytest.raises(UserError) as stop:
        open_data("dataset=npz", f"dataset.path={tmp_path}/x.npz", *typed)
    assert message in str(stop.value) or re.search(message, str(stop.value))


def test_codes_that_would_wrap_around_are_refused(tmp_path):
    save_npz(tmp_path / "x.npz", (4, 5), train_images=np.full((40, 4, 5), 2**32 + 5))
    with pytest.raises(UserError, match="has values 4294967301 to 4294967301, of 300 levels"):
        open_data("dataset=npz", f"dataset.path={tmp_path}/x.npz", f"dataset.source_levels={LEVELS}")


def test_codes_are_sampled_completed_scored_and_handed_out(trained, tmp_path):
    run, codes = trained
    ckpt, channels = f"ckpt={run}", 1 if codes["train_images"].ndim == 3 else 2
    model = pixelcnn_lit.load(str(run))
    assert model.image_shape == (channels, 4, 5)
    assert not model.embedding.ordered
    command("sample", ckpt, "sampler.n_per_class=2", f"run_dir={tmp_path}/sample")
    drawn = archive(tmp_path / "sample" / "samples.npz")["images"]
    assert drawn.shape == (8, 4, 5, channels)
    assert drawn.dtype == np.int32
    assert LEVELS > drawn.max() > 255
    expected = model.sample(n_per_class=2).flatten(0, 1).permute(0, 2, 3, 1)
    assert np.array_equal(drawn, expected.numpy())
    command("complete", ckpt, "n_images=2", "sampler.n_per_class=1", f"run_dir={tmp_path}/complete")
    for directory in ("sample/samples.png", "complete/completions.png"):
        with Image.open(tmp_path / directory) as picture:
            assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 20  # colours
    command("evaluate", ckpt, "trainer=cpu", f"run_dir={tmp_path}/evaluate")
    told = json.loads((tmp_path / "evaluate" / "evaluation.json").read_text())
    assert told["bpd"] == json.loads((run / "result.json").read_text())["test/bpd"]
    picture = tmp_path / "x.png"
    Image.new("L", (5, 4)).save(picture)
    assert "a picture is no image of this model" in refused("evaluate", ckpt, "trainer=cpu", f"images={picture}")


def test_codes_are_compressed_and_come_back_to_the_bit(trained, tmp_path):
    run, codes = trained
    own = [f"ckpt={run}", f"run_dir={tmp_path}/run"]
    np.savez(tmp_path / "x.npz", images=codes["test_images"], labels=codes["test_labels"])
    command("compress", *own, f"images={tmp_path}/x.npz", f"out={tmp_path}/x.plc")
    command("decompress", *own, f"file={tmp_path}/x.plc", f"out={tmp_path}/y.npz")
    back = archive(tmp_path / "y.npz")
    assert np.array_equal(back["images"].reshape(codes["test_images"].shape), codes["test_images"])
    assert np.array_equal(back["labels"], codes["test_labels"])
    assert "type a name that ends in .npz" in refused("decompress", *own, f"file={tmp_path}/x.plc", f"out={tmp_path}/y")


def unordered(levels: int, image_shape: tuple[int, int, int]) -> Density:
    """A tiny model whose embedding reads levels as names, in float64, redrawn."""
    own = copy.deepcopy(configs("pixelcnn", "categorical_independent"))
    own["model"]["embedding"]["ordered"] = False
    facts = {"image_shape": image_shape, "levels": levels, "num_classes": 3, "class_names": ["a", "b", "c"]}
    model = Density(**own, **facts).double()
    redraw(model)
    return model.eval()


def test_the_laws_hold_where_levels_are_names():
    """Laws 2 and 5: no feature sees the future, and all methods draw the same."""
    check_no_future(unordered(17, (1, 4, 5)))
    model = unordered(LEVELS, (1, 3, 4))
    images = [
        draw(Request(model, torch.tensor([0, 2])), method=method) for method in ("naive", "cached", "fixed_point")
    ]
    assert images[0].dtype == torch.int32
    assert all(torch.equal(images[0], other) for other in images[1:])


def test_a_level_that_is_a_name_is_a_row_of_its_own():
    embedding = unordered(17, (2, 3, 4)).embedding
    read = embedding(torch.tensor([[[[3]], [[16]]]]), torch.float64)[0, :, 0, 0]
    rows = [table.weight[level] for table, level in zip(embedding.tables, (3, 16), strict=True)]
    assert torch.equal(read, torch.cat([*rows, torch.ones(1)]))
    own = configs("pixelcnn", "categorical")
    own["model"]["embedding"] |= {"ordered": False, "width": 0}
    with pytest.raises(UserError, match=r"model\.embedding: width=0 leaves nothing to read"):
        Density(**own, image_shape=(1, 3, 4), levels=17, num_classes=1, class_names=["a"])


def test_codes_have_colours_that_tell_them_apart():
    shown = as_rgb(torch.arange(512).view(1, 1, 16, 32), 512)
    assert len(shown.flatten(2).unique(dim=2)[0, 0]) > 400
    assert as_rgb(torch.zeros(2, 5, 4, 4, dtype=torch.int32), 512).shape == (2, 3, 4, 4)
    for channels in (2, 3, 5):
        images = torch.randint(256, (2, channels, 4, 4), dtype=torch.uint8)
        shown = as_rgb(images, 256)
        assert torch.equal(shown[:, :channels], images[:, :3])
        assert not shown[:, channels:].any()


def test_a_model_of_more_channels_than_colours_is_exact():
    model = make("pixelcnn", "categorical", (4, 1, 2), levels=2)
    x = torch.tensor([[n >> bit & 1 for bit in range(8)] for n in range(256)], dtype=torch.uint8).view(-1, 4, 1, 2)
    assert abs(float(model.nats(x, [1] * 256).neg().exp().sum()) - 1) < 1e-9
