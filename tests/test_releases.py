"""Law 10: files written by earlier releases still load, evaluate to the same figure, and resume."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import command, refused

import pixelcnn_lit
from pixelcnn_lit.checkpoints import safetensors
from pixelcnn_lit.checkpoints.read import read_checkpoint
from pixelcnn_lit.runs.machine import cores
from pixelcnn_lit.runs.release import RELEASE
from pixelcnn_lit.training import checkpoint_io

RELEASES = sorted(path for path in (Path(__file__).parent / "releases").iterdir() if path.is_dir())
FILES = [(release, name) for release in RELEASES for name in json.loads((release / "nll.json").read_text())]


@pytest.mark.parametrize(("release", "name"), FILES, ids=lambda value: getattr(value, "name", value))
def test_law_10_a_file_of_a_release_evaluates_to_its_figure(tmp_path, release, name):
    command("evaluate", f"ckpt={release}/{name}", "trainer=cpu", "dataset.num_workers=0", f"run_dir={tmp_path}")
    nll = json.loads((tmp_path / "evaluation.json").read_text())["nll"]
    assert nll == pytest.approx(json.loads((release / "nll.json").read_text())[name], rel=1e-5)  # other processors


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_law_10_a_run_of_a_release_resumes(tmp_path, release):
    shutil.copytree(release / "run", tmp_path / "run")
    command("train", f"run_dir={tmp_path}/run", "ckpt=last", "trainer.max_epochs=3")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["epochs"], result["steps"]) == (3, 15)


@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_a_file_of_a_later_release_is_refused(tmp_path, run, kind, monkeypatch):
    """As its own release writes it; what it holds may be anything."""
    monkeypatch.setattr(checkpoint_io if kind == "ckpt" else safetensors, "RELEASE", "99.1.0")
    file = tmp_path / f"x.{kind}"
    if kind == "ckpt":
        later = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True) | {"hyper_parameters": ["new"]}
        checkpoint_io.AtomicCheckpointIO().save_checkpoint(later, file)
    else:
        safetensors.write_weights(file, pixelcnn_lit.load(str(run)).state_dict(), {"new": 1})
    said = refused("evaluate", f"ckpt={file}", f"run_dir={tmp_path}/out")
    assert said.endswith(f"x.{kind}: written by pixelcnn_lit 99.1.0, and this is {RELEASE}; install that release")


def test_results_and_weights_say_what_they_were_made_with(run, tmp_path):
    result = json.loads((run / "result.json").read_text())
    assert result["pixelcnn_lit"] == RELEASE
    assert result["torch"] == torch.__version__
    assert result["hardware"].startswith(f"{cores()} x ")
    command("export", f"ckpt={run}", f"out={tmp_path}/x.safetensors", f"run_dir={tmp_path}/out")
    for file in (tmp_path / "x.safetensors", run / "checkpoints" / "last.ckpt"):
        assert read_checkpoint(str(file))["pixelcnn_lit"] == RELEASE


def test_law_10_the_mnist_weights_of_release_0_1_0_score_as_they_did():
    model = pixelcnn_lit.load(str(RELEASES[0] / "mnist.safetensors"))
    stroke = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    stroke[..., 4:24, 13:16] = 253
    assert float(model.nats(stroke, [1])) == pytest.approx(47.4308, abs=1e-3)
