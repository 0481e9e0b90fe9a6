"""Where a run is logged: several loggers at once, and one curve of a run that is resumed."""

import csv
import importlib.util
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, command, killed, one_run, refused
from hydra._internal.hydra import Hydra
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tiny import NETWORKS, density, make, open_data

from pixelcnn_lit.data import grids
from pixelcnn_lit.density.density import SAMPLER
from pixelcnn_lit.density.summary import summary
from pixelcnn_lit.lit.density_module import DensityModule
from pixelcnn_lit.scoring import plots
from pixelcnn_lit.training import callbacks, sample_grid
from pixelcnn_lit.training.loggers import CSVLogger, with_run_ids
from pixelcnn_lit.training.sample_grid import SampleGrid

TWO = ["trainer.max_epochs=2", "callbacks.samples.every_n_epochs=0"]
HAS_WANDB = importlib.util.find_spec("wandb") is not None


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_killed_and_resumed_run_leaves_the_rows_of_one_that_never_was(tmp_path):
    own = [*TINY, *TWO, "logger=csv", "callbacks.last.every_n_steps=3"]
    command("train", *own, f"run_dir={tmp_path}/whole")
    with killed(DensityModule, "training_step", after=5):
        command("train", *own, f"run_dir={tmp_path}/cut")
    with (tmp_path / "cut" / "metrics.csv").open("a", encoding="utf-8") as file:
        file.write("1")  # the beginning of a row that was being written
    command("train", f"ckpt={tmp_path}/cut")
    whole, cut = rows(tmp_path / "whole"), rows(tmp_path / "cut")
    assert [row["step"] for row in cut] == [row["step"] for row in whole]
    for key in ("train/bpd", "train/bpd_step", "val/bpd", "best/val_bpd", "test/bpd", "lr-Muon"):
        assert [row[key] for row in cut] == [row[key] for row in whole], key
        assert any(row[key] for row in whole), key


def test_a_new_column_moves_no_value(tmp_path):
    logger = CSVLogger(str(tmp_path))
    logger.log_metrics({"a": 1.0}, 0)
    logger.log_metrics({"b": 2.0}, 1)
    logger.log_metrics({"a": 3.0, "c": 4.0}, 2)
    logger.log_metrics({"b": 5.0}, 3)
    assert [list(row.values()) for row in rows(tmp_path)] == [
        ["0", "1.0", "", ""],
        ["1", "", "2.0", ""],
        ["2", "3.0", "", "4.0"],
        ["3", "", "5.0", ""],
    ]


def test_another_logger_may_be_chosen_for_a_resumed_run(tmp_path):
    one_run(tmp_path, "trainer.max_epochs=1", "logger=csv")
    for logger, left in (("none", 1), ("[csv,tensorboard]", 2)):
        before = len(rows(tmp_path))
        command("train", f"ckpt={tmp_path}", f"logger={logger}", f"trainer.max_epochs={left + 1}")
        assert (len(rows(tmp_path)) > before) == (logger != "none")
    assert list(tmp_path.glob("events*"))


@pytest.mark.parametrize(
    "untrusted",
    [
        {"csv": {"_target_": "lightning.pytorch.loggers.CSVLogger", "name": "/somewhere/else"}},
        {"mine": {"_target_": "lightning.pytorch.loggers.MLFlowLogger", "tracking_uri": "http://else.where"}},
        {"wandb": {"_target_": "lightning.pytorch.loggers.WandbLogger", "settings": {"api_key": "theirs"}}},
        {"tensorboard": {"_target_": "lightning.pytorch.loggers.TensorBoardLogger", "sub_dir": "../.."}},
        {"csv": 3},
    ],
)
def test_an_untrusted_run_chooses_no_logger_that_writes_or_sends_elsewhere(tmp_path, run, untrusted):
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(run / "checkpoints" / "last.ckpt", tmp_path / "checkpoints")
    config = OmegaConf.load(run / "config.yaml")
    config.logger = untrusted
    OmegaConf.save(config, tmp_path / "config.yaml")
    line = refused("train", f"ckpt={tmp_path}", "trainer.max_epochs=3")
    assert "has settings that are taken from no file; type logger=... again" in line


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("+logger.mine=3", "logger.mine: must be settings with a _target_"),
        ("+logger.mine._target_=os.system", "_target_=os.system: not a Logger of"),
    ],
)
def test_what_is_no_logger_gets_one_line(tmp_path, setting, message):
    assert message in refused("train", *TINY, setting, f"run_dir={tmp_path}")


def test_several_loggers_at_once_or_none(tmp_path):
    one_run(tmp_path / "both", "trainer.max_epochs=1", "logger=[tensorboard,csv]")
    result = one_run(tmp_path / "none", "trainer.max_epochs=1", "logger=none")
    assert math.isfinite(result["test/bpd"])
    assert list((tmp_path / "both").glob("events*"))
    assert rows(tmp_path / "both")[-1]["test/bpd"]
    left = {path.name for path in (tmp_path / "none").iterdir()}
    assert not {name for name in left if name.startswith("events") or name == "metrics.csv"}
    assert {"result.json", "samples.png", "bits_per_pixel.png", "real.png"} <= left


def test_hparams_has_all_settings_and_leaves_their_order_to_tensorboard(run):
    """TensorBoard begins with those that differ between runs, unless a run has named the columns."""
    events = EventAccumulator(str(run)).Reload()
    assert "_hparams_/experiment" not in events.summary_metadata
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    shown = HParamsPluginData.FromString(content).session_start_info.hparams
    typed = [override.split("=")[0] for override in OmegaConf.load(run / "config.yaml").overrides]
    assert {*typed, "optimizer.lr", "model.embedding.width"} <= set(shown)


def test_the_best_score_is_that_of_the_validations_so_far(tmp_path):
    one_run(tmp_path, "trainer.max_epochs=3", "optimizer.lr=0.5", "logger=csv")  # which rises and falls
    logged = rows(tmp_path)
    scores = [float(row["val/bpd"]) for row in logged if row["val/bpd"]]
    best = [float(row["best/val_bpd"]) for row in logged if row["best/val_bpd"]]
    assert best == pytest.approx([min(scores[: n + 1]) for n in range(3)])


def test_a_new_run_gets_an_id_which_a_resumed_one_keeps():
    wandb = {"wandb": {"_target_": "lightning.pytorch.loggers.WandbLogger", "id": None}}
    first, second = with_run_ids(wandb), with_run_ids(wandb)
    assert first["wandb"]["id"] != second["wandb"]["id"]
    assert with_run_ids(first) == first


@pytest.mark.skipif(HAS_WANDB, reason="wandb is installed")
def test_a_logger_that_is_not_installed_gets_one_line(tmp_path):
    line = refused("train", *TINY, "logger=wandb", f"run_dir={tmp_path}")
    assert line.endswith("; type pip install -e '.[wandb]'")
    assert line.startswith("error: logger.wandb: ")


@pytest.mark.skipif(not HAS_WANDB, reason="wandb is not installed")
def test_wandb_offline_resumes_the_same_run(tmp_path):
    own = [*TINY, *TWO, "logger=wandb", "logger.wandb.offline=true", "callbacks.last.every_n_steps=3"]
    with killed(DensityModule, "training_step", after=5):
        command("train", *own, f"run_dir={tmp_path}")
    command("train", f"ckpt={tmp_path}")
    ids = {path.name.rpartition("-")[2] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert ids == {OmegaConf.load(tmp_path / "config.yaml").logger.wandb.id}
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()


def test_the_course_of_a_run_is_that_of_its_validations(tmp_path):
    result = one_run(tmp_path, *TWO)
    assert [point["step"] for point in result["history"]] == [4, 8]
    assert [point["images"] for point in result["history"]] == [64, 128]
    assert min(point["val/bpd"] for point in result["history"]) == result["val/bpd"]
    metrics = EventAccumulator(str(tmp_path)).Reload().Scalars("val/bpd")
    assert [point["val/bpd"] for point in result["history"]] == pytest.approx([event.value for event in metrics])


def test_a_sweep_ends_with_its_table_and_its_curves(tmp_path, capsys, monkeypatch):
    lines, draw = [], plots.show_lines
    monkeypatch.setattr(plots, "show_lines", lambda drawn, *own: lines.append(drawn) or draw(drawn, *own))
    swept = ["-m", *TINY, "trainer.max_epochs=1", "callbacks.samples.every_n_epochs=0", "seed=0,1"]
    command("train", *swept, f"run_dir={tmp_path}")
    table = capsys.readouterr().out.partition("all runs of the sweep: ")[2]
    scores = [json.loads((tmp_path / job / "result.json").read_text())["val/bpd"] for job in ("0", "1")]
    assert [f"{score:.4f}" in table for score in scores] == [True, True]
    assert "curves_bpd.png" in table
    (panels,) = lines
    (drawn,) = panels.values()
    assert drawn == {f"{job}: seed={job}": [(64, score)] for job, score in zip(("0", "1"), scores, strict=True)}
    assert (tmp_path / "curves_bpd.png").is_file()


def test_a_picture_has_a_row_a_class_with_its_name():
    images = torch.zeros(2, 3, 1, 8, 8, dtype=torch.uint8)
    plain, named = grids.grid(images, 17), grids.grid(images, 17, ["cat", "a dog"])
    assert torch.equal(named[:, :, -plain.shape[2] :], plain)
    margin = named[:, :, : -plain.shape[2]]
    halves = margin.chunk(2, dim=1)
    assert all((half == 255).any() for half in halves)  # white letters beside each row


def test_heat_grows_with_the_bits_from_black_to_white():
    colours = grids.heat(torch.linspace(0, 6, 256)[None], most=6.0)  # [3,1,256]
    assert colours[:, 0, 0].tolist() == [0, 0, 0]
    assert colours[:, 0, -1].tolist() == [255, 255, 255]
    assert (colours.int().sum(0).diff() >= 0).all()


@pytest.mark.parametrize(("name", "score"), [("train", "val/bpd"), ("train_classifier", "val/accuracy")])
def test_a_training_returns_its_score_to_a_sweeper(tmp_path, monkeypatch, name, score):
    returned, original = [], Hydra.run

    def observed(self, *arguments, **own):
        job = original(self, *arguments, **own)
        returned.append(job.return_value)
        return job

    monkeypatch.setattr(Hydra, "run", observed)
    tiny = TINY if name == "train" else [*TINY[1:4], "classifier.width=4", "classifier.n_residual=1"]
    for _ in range(2):  # the second finds it completed
        command(name, *tiny, "trainer.max_epochs=1", "skip_completed=true", f"run_dir={tmp_path}")
    result = json.loads((tmp_path / "result.json").read_text())
    assert returned == [result[score]] * 2
    best = EventAccumulator(str(tmp_path)).Reload().Scalars(f"best/{score.replace('/', '_')}")
    assert [event.value for event in best] == pytest.approx([result[score]])


@pytest.mark.parametrize("network", NETWORKS)
def test_telling_of_a_model_changes_nothing_in_it(network):
    model = make(network, "categorical").train()
    before, chance = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    line = summary(model)
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in line
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), chance)
    assert model.training


def test_an_epochs_loss_is_logged_from_the_device_of_the_module():
    """Between several GPUs it is summed there."""
    logged: dict = {}
    module = SimpleNamespace(
        device=torch.device("meta"),
        training_figures=lambda loss: {"bpd": loss},
        log_dict=lambda figures, **_: logged.update(figures),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "trained", lambda module: module)
        callbacks.TrainingLoss().on_train_epoch_end(None, module)
    assert logged["train/bpd"].device == module.device


def test_a_map_of_bits_stands_beside_its_image_and_is_black_where_a_class_has_none(tmp_path, monkeypatch):
    model = density("pixelcnn", "categorical", image_shape=(1, 8, 8), num_classes=10, class_names=list("abcdefghij"))
    data = open_data()
    ones = (data.validation.y == 1).nonzero()[:, 0]
    data.validation = data.validation[torch.cat([(data.validation.y != 1).nonzero()[:, 0], ones[:1]])]
    tiles = []
    monkeypatch.setattr(sample_grid, "tiled", lambda pictures, names: tiles.append(pictures) or grids.tiled(pictures))
    trainer = SimpleNamespace(datamodule=data, default_root_dir=tmp_path, loggers=[], global_step=0)
    SampleGrid({"_target_": SAMPLER})._show_bits(trainer, model)
    (drawn,) = tiles  # [K,2n,3,H,W]: image, map, image, map
    for label in range(10):
        x = data.validation.x[data.validation.y == label][:2]
        maps = grids.heat(model.bits_per_pixel(x, [label] * len(x)), model.uniform_bits)
        assert torch.equal(drawn[label, ::2][: len(x)], grids.as_rgb(x, model.levels))
        assert torch.equal(drawn[label, 1::2][: len(x)], maps)
        assert len(x) == 2 or not drawn[label, 3].any()
