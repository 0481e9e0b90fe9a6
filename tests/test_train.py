"""Training end to end on the digits, and what a run leaves behind."""

import copy
import json
import math
import os
import platform
import re
import shlex
import sys
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from helpers import TINY, archive, command, leave_run, one_run, refused, save_npz
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import density, open_data
from torch.optim.lr_scheduler import OneCycleLR

import pixelcnn_lit.benchmark
import pixelcnn_lit.complete
import pixelcnn_lit.evaluate
import pixelcnn_lit.export
import pixelcnn_lit.sample
import pixelcnn_lit.summarize
import pixelcnn_lit.train
from pixelcnn_lit.checkpoints.read import read_checkpoint
from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data.images import fingerprint
from pixelcnn_lit.density.density import Density
from pixelcnn_lit.density.load import load
from pixelcnn_lit.lit.density_module import DensityModule
from pixelcnn_lit.models.pixelcnn_published import PublishedPixelCNN
from pixelcnn_lit.nn.layers import CausalConv2d
from pixelcnn_lit.optim.schedulers import WarmupCosine
from pixelcnn_lit.runs.saved import WEIGHTS
from pixelcnn_lit.training.checkpoint_io import AtomicCheckpointIO

LIBC, LIBC_VERSION = platform.libc_ver()


def test_a_run_leaves_result_settings_checkpoints_and_pictures(run):
    result = json.loads((run / "result.json").read_text())
    for key in (
        "val/nll",
        "val/bpd",
        "test/bpd",
        "n_params",
        "images_per_second",
        "seconds",
        "checkpoint",
        "overrides",
    ):
        assert result[key], key
    assert result["val/bpd"] == pytest.approx(result["val/nll"] / math.log(2), rel=1e-12)
    assert result["uniform_bpd"] == math.log2(17)
    assert result["steps"] == 8
    for left in ("config.yaml", "real.png", "samples.png", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        assert (run / left).stat().st_size > 100, left
    saved = OmegaConf.load(run / "config.yaml")
    assert saved.model.hidden_channels == 16
    assert OmegaConf.to_container(saved, resolve=True)  # nothing is left to resolve
    assert json.loads((run / "config.json").read_text()) == saved


@pytest.mark.skipif(
    LIBC != "glibc" or tuple(map(int, LIBC_VERSION.split("."))) < (2, 35), reason="wants glibc 2.35 or later"
)
def test_new_tensors_take_the_memory_of_those_that_are_gone(run):
    """After any command, its process asks for no page of memory twice."""
    resource = pytest.importorskip("resource")
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if huge.is_file() and "[always]" in huge.read_text():
        pytest.skip("huge pages hide the small ones")
    pages = []
    for _ in range(8):
        torch.ones(2**24)  # 64 MiB, 16,384 pages
        pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert pages[-1] - pages[3] < 1000  # the first ones may find none that is large enough


def test_a_line_an_epoch_tells_its_own_figures(tmp_path, capsys):
    result = one_run(tmp_path, "~callbacks.samples")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert [line.split(":")[0] for line in lines] == ["epoch 1/2, step 4", "epoch 2/2, step 8"]
    assert min(float(line.split()[-2]) for line in lines) == pytest.approx(result["val/bpd"], abs=1e-4)
    logged = EventAccumulator(str(tmp_path)).Reload().Scalars("train/nll")
    assert [float(line.split()[5].rstrip(",")) for line in lines] == pytest.approx(
        [event.value / math.log(2) for event in logged], abs=1e-4
    )


@pytest.mark.long
def test_the_default_run_ends_at_its_best(tmp_path):
    """The curve that a newcomer sees first does not rise again."""
    command("train", f"run_dir={tmp_path}")
    curve = [event.value for event in EventAccumulator(str(tmp_path)).Reload().Scalars("val/bpd")]
    assert curve[-1] < 1.01 * min(curve)
    assert json.loads((tmp_path / "result.json").read_text())["test/bpd"] < 1.66


def test_tensorboard_has_scalars_pictures_and_the_result(run):
    events = EventAccumulator(str(run)).Reload()
    expected = {"train/nll", "train/nll_step", "val/nll", "val/bpd", "test/bpd", "best/val_bpd", "lr-Muon"}
    assert expected <= set(events.Tags()["scalars"])
    assert expected | {"train/bpd", "train/bpd_step"} <= set(events.Tags()["scalars"])
    assert set(events.Tags()["images"]) == {"real", "samples", "bits_per_pixel"}
    assert "result/text_summary" in events.Tags()["tensors"]


def test_a_checkpoint_is_plain_and_rebuilds_itself_to_the_bit(run, tmp_path, start):
    """Law 6 again, by another process, from the file alone."""
    path = run / "checkpoints" / "best.ckpt"
    content = torch.load(path, weights_only=True)
    assert content["hyper_parameters"]["class_names"] == [str(c) for c in range(10)]
    assert start(tmp_path, "evaluate", f"ckpt={path}", "trainer=cpu", "run_dir=there").wait(60) == 0
    command("evaluate", f"ckpt={path}", "trainer=cpu", f"run_dir={tmp_path}/here")
    here, there = ((tmp_path / place / "evaluation.json").read_text() for place in ("here", "there"))
    assert json.loads(there) == json.loads(here)


def test_evaluate_reproduces_the_figures_of_the_run(run, monkeypatch, tmp_path, capsys):
    result = json.loads((run / "result.json").read_text())
    for split, key in (("test", "test/bpd"), ("validation", "val/bpd")):
        checkpoint = f"ckpt={run}/checkpoints/best.ckpt"
        out = [f"run_dir={tmp_path / split}", "trainer=cpu"]
        command("evaluate", checkpoint, f"split={split}", *out)
        scored = json.loads((tmp_path / split / "evaluation.json").read_text())
        assert scored["images"] == 250
        assert scored["bpd"] == pytest.approx(result[key], abs=1e-6)
        error = result[f"{key}_standard_error"]
        said = capsys.readouterr().out
        assert f"all  {result[key]:.4f} ± {error:.4f} bpd" in said
        assert f"scored: {scored['fingerprint']}\n" in said
        assert scored["fingerprint"] == fingerprint(open_data().split(split))
    assert result["test/fingerprint"] == fingerprint(open_data().test)
    weights = [int((open_data().test.y == c).sum()) for c in range(10)]
    mean = np.average(list(result["test/bpd_per_class"].values()), weights=weights)
    assert mean == pytest.approx(result["test/bpd"], abs=1e-6)


def test_evaluate_scores_any_split_and_takes_the_datasets_own_settings(tmp_path, monkeypatch):
    """A binarized training split too: training gathers grey images, scoring the drawn ones."""
    one_run(tmp_path / "run", "dataset.levels=2", "dataset.binarization=dynamic")
    asked = [f"ckpt={tmp_path}/run/checkpoints/best.ckpt", "split=train", "dataset.batch_size=100", "trainer=cpu"]
    command("evaluate", *asked, f"run_dir={tmp_path}/a")
    assert json.loads((tmp_path / "a" / "evaluation.json").read_text())["images"] == 1297
    limited = [*asked, "trainer.limit_test_batches=2", f"run_dir={tmp_path}/b"]
    command("evaluate", *limited)
    assert json.loads((tmp_path / "b" / "evaluation.json").read_text())["images"] == 200


def test_sample_draws_the_asked_classes_and_the_same_ones_again(run, monkeypatch, tmp_path):
    asked = [f"ckpt={run}/checkpoints/best.ckpt", "classes=[3,7]", "sampler.n_per_class=2", "sampler.temperature=0.6"]
    for name in ("a", "b"):
        command("sample", *asked, f"run_dir={tmp_path / name}")
    a, b = (archive(tmp_path / name / "samples.npz") for name in ("a", "b"))
    assert a["images"].shape == (4, 8, 8, 1)
    assert a["labels"].tolist() == [3, 3, 7, 7]
    assert np.array_equal(a["images"], b["images"])
    assert (tmp_path / "a" / "samples.png").stat().st_size > 100


def test_the_directory_of_a_run_stands_for_its_best_weights(run, tmp_path):
    best = read_checkpoint(str(run / "checkpoints" / "best.ckpt"))
    assert all(torch.equal(w, best["state_dict"][n]) for n, w in read_checkpoint(str(run))["state_dict"].items())
    command("sample", f"ckpt={run}", "classes=7", "sampler.n_per_class=1", f"run_dir={tmp_path}/a")
    assert archive(tmp_path / "a" / "samples.npz")["labels"].tolist() == [7]
    (run / "checkpoints" / "best.ckpt").rename(tmp_path / "best.ckpt")
    try:
        with pytest.raises(SystemExit, match=re.escape("no checkpoints/best.ckpt in it; type the path of a .ckpt")):
            command("sample", f"ckpt={run}")
    finally:
        (tmp_path / "best.ckpt").rename(run / "checkpoints" / "best.ckpt")


def test_classes_are_asked_for_by_name_and_where_none_is_so_called_by_number(run, monkeypatch, tmp_path):
    names = ["10", "2", "cat", *"abcdefg"]
    model = Density(**load(str(run)).settings | {"class_names": names, "label_dropout": 0.1})
    assert model.class_numbers(["cat", 10, "10", 2, 1, "2", 9]) == [2, 0, 0, 1, 1, 1, 9]
    with pytest.raises(
        UserError, match=re.escape("classes=dog: this model was trained on 10 (0), 2 (1), cat (2), a (3)")
    ):
        model.class_numbers(["dog"])
    model.load_state_dict(load(str(run)).state_dict())
    monkeypatch.setattr(pixelcnn_lit.sample, "load", lambda ckpt: model)
    monkeypatch.setattr(pixelcnn_lit.complete, "load", lambda ckpt: model)
    for typed, expected in (("cat", [2]), ("[cat,10]", [2, 0]), ("3", [3])):
        command("sample", f"ckpt={run}", f"classes={typed}", "sampler.n_per_class=1", f"run_dir={tmp_path}")
        assert archive(tmp_path / "samples.npz")["labels"].tolist() == expected
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    command("complete", f"ckpt={run}", f"image={tmp_path}/x.png", "label=cat", f"run_dir={tmp_path}")
    assert json.loads((tmp_path / "completions.json").read_text())["labels"] == [2]
    with pytest.raises(SystemExit, match="label is missing; type label=10 or another"):
        command("complete", f"ckpt={run}", f"image={tmp_path}/x.png")


def test_sample_shows_the_images_filling_up(run, monkeypatch, tmp_path):
    asked = [f"ckpt={run}/checkpoints/best.ckpt", "sampler.n_per_class=1", "gif=true", f"run_dir={tmp_path}"]
    command("sample", *asked)
    with Image.open(tmp_path / "samples.gif") as film, Image.open(tmp_path / "samples.png") as still:
        assert film.n_frames > 20
        film.seek(film.n_frames - 1)
        assert np.array_equal(np.asarray(film.convert("RGB")), np.asarray(still))


@pytest.mark.parametrize(("keep", "conditional"), [("top_half", True), ("bottom_half", False), ("left_half", False)])
def test_completions_keep_what_is_known_and_score_the_rest(run, monkeypatch, tmp_path, capsys, keep, conditional):
    asked = [f"ckpt={run}/checkpoints/best.ckpt", f"keep={keep}", "n_images=3", f"run_dir={tmp_path}"]
    command("complete", *asked)
    result = json.loads((tmp_path / "completions.json").read_text())
    assert ("bpd of the completions" in result) == conditional
    assert ("not the conditional" in capsys.readouterr().out) != conditional
    if conditional:
        test, model = open_data().test[:3], load(str(run / "checkpoints" / "best.ckpt"))
        with torch.no_grad():
            nats = -model.log_prob(test.x, test.y)[:, :, 4:]
        assert result["bpd of the true remaining pixels"] == pytest.approx(nats.mean().item() / math.log(2), rel=1e-5)


def test_a_png_is_completed_where_its_mask_is_black(run, monkeypatch, tmp_path):
    picture = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 255
    Image.fromarray(picture).save(tmp_path / "in.png"), Image.fromarray(mask).save(tmp_path / "mask.png")
    asked = [f"ckpt={run}/checkpoints/best.ckpt", f"image={tmp_path}/in.png", f"keep_mask={tmp_path}/mask.png"]
    drawn = []
    draw = Density.draw
    monkeypatch.setattr(Density, "draw", lambda *a, **own: drawn.append(draw(*a, **own)) or drawn[-1])
    command("complete", *asked, "label=5", "sampler.n_per_class=3", f"run_dir={tmp_path}")
    kept = torch.from_numpy(picture.astype(int) * 17 // 256)[:, :4]
    assert drawn[0].shape == (1, 3, 1, 8, 8)
    assert all(torch.equal(image[0, :, :4].int(), kept.int()) for image in drawn[0][0])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["image=absent.png", "label=1"], "absent.png: no such file"),
        (["image=small.png", "label=1"], "small.png: 4×4 pixels; the model's images are 8×8; type resize=true"),
        (["image=right.png"], "label is missing"),
        (["image=right.png", "label=77"], "this model was trained on"),
        (["keep_mask=small.png"], "small.png: 4×4 pixels; the model's images are 8×8"),
        (["keep=left_half", "keep_mask=right.png"], "keep and keep_mask exclude each other"),
        (["label=3"], "test images have their own"),
        (["keep=middle"], "keep=middle: must be one of top_half"),
        (["n_images=0"], "n_images=0: must be a whole number >= 1"),
        (["sampler.guidance_scale=2"], "train one with label_dropout"),
        (["sampler.method=fast"], "sampler.method=fast: must be one of naive, cached, fixed_point"),
    ],
)
def test_a_completion_that_cannot_be_gets_one_line(run, monkeypatch, tmp_path, asked, message):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (4, 4)).save("small.png"), Image.new("L", (8, 8)).save("right.png")
    with pytest.raises(SystemExit, match=re.escape(message)):
        command("complete", f"ckpt={run}/checkpoints/best.ckpt", *asked)


def test_exported_weights_draw_the_same_and_say_nothing_of_the_machine(run, monkeypatch, tmp_path):
    best, out = str(run / "checkpoints" / "best.ckpt"), str(tmp_path / "x.safetensors")
    settings = load(best).settings
    places = {"root": "/home/me", "path": "/home/me/x.npz", "name": "/home/me/x.npz"}
    model = Density(**settings | {"dataset": settings["dataset"] | places})
    model.load_state_dict(load(best).state_dict())
    monkeypatch.setattr(pixelcnn_lit.export, "load", lambda ckpt: model)
    command("export", f"ckpt={best}", f"out={out}")
    assert load(out).settings["dataset"] == settings["dataset"] | {"name": "x"}
    assert b"/home/me" not in Path(out).read_bytes()
    assert torch.equal(load(out).sample(), load(best).sample())


def test_rounded_weights_are_near_and_their_files_small(run, monkeypatch, tmp_path):
    best, out = str(run / "checkpoints" / "best.ckpt"), tmp_path / "x.safetensors"
    whole, sizes, read = load(best).state_dict(), {}, {}
    for dtype in ("float32", "float16", "int8"):
        command("export", f"ckpt={best}", f"out={out}", f"dtype={dtype}")
        sizes[dtype], read[dtype] = out.stat().st_size, load(str(out)).state_dict()
    assert sizes["float16"] < 0.6 * sizes["float32"]
    assert sizes["int8"] < 0.45 * sizes["float32"]  # much of so small a model is not in int8
    near = 0
    for name, weight in whole.items():
        halved, inside = weight.half().to(weight.dtype), name.startswith("network.blocks")
        assert torch.equal(read["float32"][name], weight)
        assert torch.equal(read["float16"][name], halved)
        if torch.equal(read["int8"][name], halved):
            assert not inside or weight.ndim == 1
        else:
            errors, furthest = (w.flatten(1).abs().amax(1) for w in (read["int8"][name] - weight, weight))
            assert (errors <= furthest / 253).all()  # half of its 127th part, and the rounding of float32
            assert not name.startswith(("likelihood.", "embedding.", "network.first."))
            near += 1
    assert near >= 2


def test_weights_too_large_for_half_precision_are_refused(run, monkeypatch, tmp_path):
    model = load(str(run / "checkpoints" / "best.ckpt"))
    next(model.parameters()).data.flatten()[0] = 1e5
    monkeypatch.setattr(pixelcnn_lit.export, "load", lambda ckpt: model)
    with pytest.raises(SystemExit, match="too large for float16; type dtype=float32"):
        command("export", f"ckpt={run}", f"out={tmp_path}/x.safetensors", "dtype=float16")


def test_the_weights_the_package_brings_along_draw_digits(monkeypatch, tmp_path):
    command("sample", "ckpt=mnist", "classes=[7]", f"run_dir={tmp_path}")
    assert archive(tmp_path / "samples.npz")["images"].shape == (2, 28, 28, 1)


@pytest.mark.parametrize(
    ("name", "label", "most"), [("mnist", "mnist 1×28×28, 256 levels", 5e6), ("cifar10", "cifar10 3×32×32", 15e6)]
)
def test_the_weights_the_package_brings_along_are_small_and_say_nothing_of_a_machine(name, label, most):
    model = load(name)
    assert model.label.startswith(label)
    assert "/" not in str(model.settings["dataset"])
    assert (WEIGHTS / f"{name}.safetensors").stat().st_size <= most


def test_a_name_that_no_weights_have_gets_one_line(monkeypatch):
    brought = ", ".join(sorted(file.stem for file in WEIGHTS.glob("*.safetensors")))
    with pytest.raises(SystemExit, match=re.escape(f"type the path of a .ckpt or .safetensors, a RUN_DIR, {brought}")):
        command("sample", "ckpt=mnits")


@pytest.mark.real_data
@pytest.mark.skipif("PIXELCNN_DATA" not in os.environ, reason="set PIXELCNN_DATA to a folder with MNIST/raw")
def test_the_weights_the_package_brings_along_score_what_their_card_says(monkeypatch, tmp_path):
    asked = ["ckpt=mnist", f"dataset.root={os.environ['PIXELCNN_DATA']}", f"run_dir={tmp_path}"]
    command("evaluate", *asked)
    bpd = json.loads((tmp_path / "evaluation.json").read_text())["bpd"]
    assert f"test {bpd:.4f} bpd" in (WEIGHTS / "README.md").read_text(encoding="utf-8")


def test_guidance_of_a_model_trained_with_label_dropout_draws(tmp_path, monkeypatch):
    one_run(tmp_path / "run", "label_dropout=0.5")
    asked = [f"ckpt={tmp_path}/run/checkpoints/best.ckpt", "sampler.guidance_scale=3", f"run_dir={tmp_path}/out"]
    command("sample", *asked)
    assert archive(tmp_path / "out" / "samples.npz")["images"].shape == (20, 8, 8, 1)


def test_the_benchmark_measures_each_sampler_beside_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pixelcnn_lit.benchmark, "cores", lambda: 2)
    monkeypatch.setattr(pixelcnn_lit.benchmark, "on_threads", lambda threads: nullcontext())
    small = ["model_size=tiny", "model=pixelcnn_published", "image_shape=[1,6,6]", "batch_size=2", "rounds=1"]
    command("benchmark", *small, f"run_dir={tmp_path}")
    result = json.loads((tmp_path / "benchmark.json").read_text())
    samplers = ("one forward", "naive", "cached", "cached, bf16", "compress", "decompress")
    assert set(result["sampling"]) == {f"sampling, {n}" for n in samplers}
    assert result["sampling"]["sampling, naive"]["times naive"] == 1
    assert "of a dense convolution" in capsys.readouterr().out
    assert set(result["training"]) == {"training, as published", "training, fp32", "training, bf16"}
    assert list(result["threads"]) == [f"{kind}, threads={n}" for kind in ("training", "cached") for n in (1, 2)]
    assert result["threads"]["cached, threads=1"]["times threads=1"] == 1
    assert (result["threads to train"], result["threads to sample"]) == (1, 1)


def test_the_benchmark_of_a_checkpoint_measures_its_model_at_each_batch_size(tmp_path, capsys):
    one_run(tmp_path / "run")
    own = [f"ckpt={tmp_path}/run", "batch_size=[3,1]", "rounds=1", "busy=true"]
    command("benchmark", *own, f"run_dir={tmp_path}/out")
    result = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert result["image_shape"] == [1, 8, 8]
    assert (result["weights"], result["busy"], result["batch_size"]) == (f"{tmp_path}/run", True, 3)
    assert "sampling, cached" in result["sampling, batch 1"]
    assert "weights" in capsys.readouterr().out
    assert "levels=3: ckpt=... already determines" in refused("benchmark", *own, "levels=3", f"run_dir={tmp_path}/no")
    assert "batch_size=[]" in refused("benchmark", "batch_size=[]", f"run_dir={tmp_path}/none")


def test_the_benchmarks_reference_is_the_published_network_and_dead_taps_are_no_work():
    model = density("pixelcnn_published", "categorical", (1, 6, 6), n_residual=2).double()
    x, y = torch.randint(17, (2, 1, 6, 6), dtype=torch.uint8), torch.tensor([0, 2])
    dense = pixelcnn_lit.benchmark.with_dense_kernels(copy.deepcopy(model))
    assert torch.allclose(dense.nats(x, y), model.nats(x, y), rtol=1e-12)
    live = [pixelcnn_lit.benchmark.live_flops(each.float(), x, y) for each in (model, dense)]
    assert live[0] == live[1]  # the dead rows of the dense kernels are no work either
    published = pixelcnn_lit.benchmark.as_published(density("pixel_attention", "categorical", (1, 6, 6)))
    kernels = [layer for layer in published.modules() if hasattr(layer, "mask")]
    assert len(kernels) == 1 + 2 + 3
    assert not any(isinstance(kernel, CausalConv2d) for kernel in kernels)
    assert all(kernel.weight.is_contiguous() for kernel in kernels)
    assert type(published.network) is PublishedPixelCNN
    assert published.likelihood.out_channels == 17

    class Alone(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = CausalConv2d(2, 3, 3, "B")

        def forward(self, x, y):
            return self.conv(x).sum((1, 2, 3))

    x = torch.randn(4, 2, 5, 6)
    live = 2 * 4 * 5 * 6 * 2 * 3 * 5  # of a product with the five live taps
    assert pixelcnn_lit.benchmark.live_flops(Alone(), x, y) == 2 * live
    assert pixelcnn_lit.benchmark.live_flops(Alone(), x.requires_grad_(), y) == 3 * live


def test_attention_to_later_pixels_is_no_work():
    class Alone(torch.nn.Module):
        def forward(self, x, y):
            tokens = x.flatten(2).mT.contiguous()[:, None].requires_grad_()
            attend = torch.nn.functional.scaled_dot_product_attention
            return attend(tokens, tokens, tokens, is_causal=True).sum((1, 2, 3))

    x, pairs = torch.randn(2, 16, 5, 6), 30 * 31 // 2
    assert pixelcnn_lit.benchmark.live_flops(Alone(), x, torch.zeros(2)) == 3 * 2 * 2 * 2 * pairs * 16


def test_the_mean_counts_every_image_once_whatever_the_batches(run):
    """250 images in batches of 7, 32 and 250: published code averages the means of batches, the short one too."""
    model, data = load(str(run / "checkpoints" / "best.ckpt")), open_data()
    with torch.no_grad():
        bpd = model.nats(data.test.x, data.test.y).double() / 64 / math.log(2)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    for data.batch_size in (7, 32, 250):
        module = DensityModule(model)
        trainer.test(module, data.test_dataloader(), verbose=False)
        assert float(trainer.callback_metrics["test/bpd"]) == pytest.approx(float(bpd.mean()), abs=1e-5)
        error = float(bpd.std()) / len(bpd) ** 0.5
        assert module.figures["test/bpd_standard_error"] == pytest.approx(error, abs=1e-6)


def test_a_uniform_model_scores_log2_of_the_levels(run):
    model = load(str(run / "checkpoints" / "best.ckpt"))
    last = list(model.network.modules())[-1]
    for parameter in (*last.parameters(), *model.likelihood.parameters()):
        torch.nn.init.zeros_(parameter)
    data = open_data()
    with torch.no_grad():
        nats = model.nats(data.test.x, data.test.y)
    assert torch.allclose(nats / 64 / math.log(2), torch.tensor(math.log2(17)), atol=1e-5)


def test_sample_grids_do_not_disturb_training(tmp_path):
    seldom = one_run(tmp_path / "a", "callbacks.samples.every_n_epochs=0")
    often = one_run(tmp_path / "b", "callbacks.samples.every_n_epochs=1")
    assert seldom["val/nll"] == often["val/nll"]
    assert seldom["test/bpd"] == often["test/bpd"]


def test_the_published_network_trains_and_says_that_its_training_loss_is_no_likelihood(tmp_path, capsys):
    one_run(tmp_path, "model=pixelcnn_published", "optimizer=adam", "scheduler=plateau", "callbacks=samples")
    assert not load(str(tmp_path / "checkpoints" / "last.ckpt")).network.train_is_likelihood
    assert re.search(r"train \d\.\d+ \(no likelihood\), val ", capsys.readouterr().out)


def test_an_unconditional_model_trains_and_draws_one_row(tmp_path):
    one_run(tmp_path, "conditional=false")
    assert load(str(tmp_path / "checkpoints" / "best.ckpt")).classes == [10]


def test_binary_images_get_nats_an_image_too(tmp_path):
    result = one_run(tmp_path, "dataset.levels=2", "dataset.binarization=dynamic")
    assert result["test/nats_per_image"] == pytest.approx(result["test/nll"] * 64, rel=1e-5)
    assert "dynamic binarization" in result["label"]


def test_max_steps_inside_an_epoch_still_ends_with_a_score(tmp_path):
    result = one_run(tmp_path, "trainer.max_steps=2")
    assert result["steps"] == 2
    assert (tmp_path / "samples.png").is_file()


def test_a_run_stopped_inside_an_epoch_goes_on_to_the_end(tmp_path):
    one_run(tmp_path, "trainer.max_steps=2")
    assert one_run(tmp_path, "ckpt=last", "trainer.max_steps=-1")["epochs"] == 2


def test_a_finished_run_can_be_made_longer(tmp_path):
    one_run(tmp_path)
    assert one_run(tmp_path, "ckpt=last", "trainer.max_epochs=3")["steps"] == 12


@pytest.mark.parametrize("total_steps", [1, 2, 20, 1000])
def test_the_learning_rate_rises_to_its_value_and_falls_to_nearly_nothing(total_steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = WarmupCosine(optimizer, total_steps=total_steps)
    rates = []
    for _ in range(total_steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert max(rates) == pytest.approx(0.5, rel=1e-2)  # the top may lie between two steps
    peak = rates.index(max(rates))
    assert all(b > a for a, b in pairwise(rates[: peak + 1]))
    assert all(b <= a for a, b in pairwise(rates[peak:]))
    assert scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-9)


def test_the_learning_rate_is_that_of_onecycle_where_that_is_defined():
    rates = []
    for kind, own in ((WarmupCosine, {"warmup": 0.1}), (OneCycleLR, {"max_lr": 0.5, "pct_start": 0.1})):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5, momentum=0.9)
        scheduler = kind(optimizer, total_steps=105, **own)
        rates.append([])
        for _ in range(105):
            rates[-1].append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step() if len(rates[-1]) < 105 else None
    assert rates[0] == pytest.approx(rates[1], abs=1e-5)


def test_the_learning_rate_follows_the_time_where_that_ends_first():
    optimizer, share = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5), 0.0
    scheduler = WarmupCosine(optimizer, 100_001, time_share=lambda: share, warmup=0.1, hold=0.5)
    rates = {}
    for share in (0.0, 0.05, 0.11, 0.54, 0.775, 1.0, 1.1):  # up to 0.1, down from 0.55; a last step may end late
        optimizer.step()
        scheduler.step()
        rates[share] = scheduler.get_last_lr()[0]
    expected = {0.0: 0.02, 0.05: 0.26, 0.11: 0.5, 0.54: 0.5, 0.775: 0.25, 1.0: 0, 1.1: 0}
    assert rates == pytest.approx(expected, abs=1e-4)


def test_a_first_step_that_takes_long_costs_no_warm_up():
    """It compiles the loss."""
    optimizer, share = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5), 0.0
    scheduler = WarmupCosine(optimizer, 100_001, time_share=lambda: share, warmup=0.1)
    rates = {}
    for share in (0.2, 0.24, 1.0):  # 0.24: a twentieth of what was left then
        optimizer.step()
        scheduler.step()
        rates[share] = scheduler.get_last_lr()[0]
    assert rates == pytest.approx({0.2: 0.02, 0.24: 0.26, 1.0: 0}, abs=1e-4)


def test_a_first_step_may_take_all_the_time():
    optimizer, share = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5), 0.0
    scheduler = WarmupCosine(optimizer, 1000, time_share=lambda: share)
    share = 1.0
    optimizer.step()
    scheduler.step()
    assert 0 < scheduler.get_last_lr()[0] < 0.5


@pytest.mark.long
def test_a_race_is_scored_when_its_time_is_up(tmp_path, monkeypatch):
    race = ["experiment=mnist/race/pixelcnn", "dataset=digits", "model_size=tiny", "trainer.max_time=00:00:00:04"]
    command("train", *race, "trainer.log_every_n_steps=1", f"run_dir={tmp_path}")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["val/images"] == result["test/images"] == 250
    assert result["epochs"] < 1000
    rates = [event.value for event in EventAccumulator(str(tmp_path)).Reload().Scalars("lr-Muon")]
    assert max(rates) == pytest.approx(5e-3)
    assert rates[-1] < max(rates) / 2


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["mnist/gpu", "cifar10/10min", "cifar10/20min", "cifar10/best", "cifar10/24gb"])
def test_a_recipe_for_a_gpu_takes_a_few_steps_on_a_cpu(tmp_path, monkeypatch, recipe):
    """As it is, but narrow, shallow and not compiled, on few images of its dataset's shape."""
    save_npz(tmp_path / "x.npz", (28, 28) if recipe.startswith("mnist") else (32, 32, 3), 40, 2, classes=10)
    few = ["dataset=npz", f"dataset.path={tmp_path}/x.npz", "dataset.batch_size=2", "dataset.num_workers=0"]
    small = ["compile=false", "model.hidden_channels=8", "model.n_residual=2", "trainer.max_steps=2"]
    command("train", f"experiment={recipe}", *few, *small, "~callbacks.samples", f"run_dir={tmp_path}/run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 2
    assert math.isfinite(result["test/bpd"])


@pytest.mark.long
@pytest.mark.parametrize(
    ("recipe", "n_layers", "state"),
    [("cifar10/row_lstm", 12, 128), ("cifar10/diagonal_bilstm", 12, 128), ("mnist/diagonal_bilstm", 7, 16)],
)
def test_the_lstms_of_the_papers_size_take_a_step(tmp_path, recipe, n_layers, state):
    size = (28, 28) if recipe.startswith("mnist") else (32, 32, 3)
    save_npz(tmp_path / "x.npz", size, 4, 1, classes=2)
    few = ["dataset=npz", f"dataset.path={tmp_path}/x.npz", "dataset.num_workers=0", "dataset.validation_fraction=0.25"]
    command(
        "train",
        f"experiment={recipe}",
        *few,
        "dataset.batch_size=1",
        "trainer.max_steps=1",
        "~callbacks.samples",
        f"run_dir={tmp_path}/run",
    )
    network = load(str(tmp_path / "run")).network
    assert len(network.layers) == n_layers
    assert {layer.out.in_channels for layer in network.layers} == {state}


@pytest.mark.parametrize("likelihood", ["categorical", "categorical_independent", "logistic_mixture"])
def test_a_colour_model_trains_is_scored_and_draws(tmp_path, monkeypatch, likelihood):
    save_npz(tmp_path / "x.npz", (5, 4, 3), 80, 9, classes=3)
    npz = ["dataset=npz", f"dataset.path={tmp_path}/x.npz", "dataset.batch_size=8", "dataset.num_workers=0"]
    result = one_run(tmp_path / "run", *npz, f"likelihood={likelihood}")
    most = 11 if likelihood == "logistic_mixture" else 9  # its components start on greys
    assert 7.5 < result["test/bpd"] < most  # the images are noise: 8 bits, and no less can be learnt
    assert result["test/images"] == 9
    command("sample", f"ckpt={result['checkpoint']}", f"run_dir={tmp_path}/out")
    assert archive(tmp_path / "out" / "samples.npz")["images"].shape == (6, 5, 4, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_run_trains_in_bf16_and_draws(tmp_path):
    result = one_run(tmp_path, "trainer=gpu", "callbacks.samples.every_n_epochs=1")
    assert result["precision"] == "bf16-mixed"
    assert (tmp_path / "samples.png").is_file()


@pytest.mark.parametrize("moment", ["save", "fsync", "replace"])
def test_a_checkpoint_cut_off_while_it_is_written_leaves_the_earlier_one(tmp_path, monkeypatch, moment):
    io, path = AtomicCheckpointIO(), tmp_path / "checkpoints" / "last.ckpt"
    io.save_checkpoint({"step": torch.tensor(1)}, path)

    def cut_off(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as broken:
        broken.setattr({"save": torch}.get(moment, os), moment, cut_off)
        with pytest.raises(OSError, match="no space"):
            io.save_checkpoint({"step": torch.tensor(2)}, path)
    assert torch.load(path, weights_only=True)["step"] == 1
    assert list(path.parent.iterdir()) == [path]


def test_label_dropout_hides_the_class_from_some_images(run):
    model = DensityModule(Density(**load(str(run)).settings | {"label_dropout": 1.0}))
    seen = []
    model.density.network.embed.register_forward_pre_hook(lambda _, y: seen.append(y[0]))
    model.log = lambda *_, **__: None
    model.training_step((torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2, 3])), 0)
    assert seen[0].tolist() == [10] * 4


def test_a_sweep_leaves_a_table_and_names_its_failed_jobs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sweep = [*TINY, "trainer.max_epochs=1", "~callbacks.samples"]
    with pytest.raises(SystemExit):
        command("train", "-m", *sweep, "model.n_residual=-1,1,2")
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["summarize", str(tmp_path)])
    pixelcnn_lit.summarize.main()
    table = capsys.readouterr().out
    assert "\ndigits 1×8×8, 17 levels: 250 validation and 250 test images\n" in table
    in_common, *others = [line for line in table.splitlines() if "model_size=tiny" in line]
    assert in_common == f"all with: {shlex.join([*sweep[:-1], f'{sweep[-1]}=null'])}"
    assert all("failed" in line for line in others)  # a row tells what is its own
    rows = [line for line in table.splitlines() if "model.n_residual=" in line]
    assert len(rows) == 4  # two results, the failed job, its reason
    assert float(rows[0].split()[0]) <= float(rows[1].split()[0])
    assert "model.n_residual=-1: must be a whole number >= 1" in table


def test_the_table_of_a_sweep_of_classifiers_has_their_accuracies_best_first(tmp_path, capsys):
    for name, accuracy in (("a", 0.8), ("b", 0.9)):
        leave_run(tmp_path / name, "train_classifier", [name], val_accuracy=accuracy, test_accuracy=accuracy)
    pixelcnn_lit.summarize.summarize(tmp_path)
    rows = capsys.readouterr().out.splitlines()
    assert "val/accuracy" in rows[0]
    assert [row.split()[0] for row in rows[2:]] == ["0.9000", "0.8000"]


def test_choices_that_ran_with_the_same_seeds_are_compared_seed_by_seed(tmp_path, capsys):
    """By their validation: the test set selects nothing."""
    found = {("lr=1", "seed=0"): 3.0, ("lr=2", "seed=0"): 2.9, ("lr=3", "seed=0"): 2.0}
    found |= {("lr=1", "seed=1"): 5.0, ("lr=7", "seed=1", "lr=2"): 4.7}  # the last was resumed
    found |= {("lr=1", "seed=2"): 7.0, ("lr=2", "seed=2"): 6.8, ("lr=1", "seed=3"): 7.0}
    for n, (overrides, bpd) in enumerate(found.items()):
        leave_run(tmp_path / str(n), "train", ["model_size=tiny", *overrides], val_bpd=bpd, test_bpd=9.0)
    pixelcnn_lit.summarize.summarize(tmp_path)
    pairs = [line for line in capsys.readouterr().out.splitlines() if "pairs by seed" in line]
    assert pairs == ["val/bpd, 3 pairs by seed: 0.2000 ± 0.0577 lower with lr=2 than with lr=1"]


def test_the_training_loss_of_an_epoch_does_not_depend_on_accumulation(tmp_path):
    losses = []
    for n in (1, 2):
        one_run(tmp_path / str(n), "optimizer.lr=0", f"trainer.accumulate_grad_batches={n}")
        events = EventAccumulator(str(tmp_path / str(n))).Reload()
        losses.append([event.value for event in events.Scalars("train/nll")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
