"""Law 10: files written by earlier releases still load, evaluate to the same figure, and resume."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import command

import pixelcnn_lit

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


def test_law_10_the_mnist_weights_of_release_0_1_0_score_as_they_did():
    model = pixelcnn_lit.load(str(RELEASES[0] / "mnist.safetensors"))
    stroke = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    stroke[..., 4:24, 13:16] = 253
    assert float(model.nats(stroke, [1])) == pytest.approx(47.4308, abs=1e-3)
