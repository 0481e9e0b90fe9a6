"""Data that changes between two commands, and data of one class."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import command

from pixelcnn_lit.data.images import random_positions
from pixelcnn_lit.runs.saved import run_of, with_dataset_of_run

TINY = ["trainer=cpu", "trainer.max_epochs=1", "trainer.log_every_n_steps=1", "dataset.num_workers=0"]
MODEL = ["model.hidden_channels=4", "model.n_residual=1", "sampler.n_per_class=1"]
JUDGE = ["classifier.width=8", "classifier.n_residual=1"]


def archive(path: Path, n: int = 40, n_classes: int = 2, **changed: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": rng.integers(256, size=(n, 4, 4), dtype=np.uint8),
        "train_labels": np.arange(n) % n_classes,
        "test_images": rng.integers(256, size=(8, 4, 4), dtype=np.uint8),
        "test_labels": np.arange(8) % n_classes,
    }
    np.savez(path, **arrays | changed)
    return arrays


def data(path: Path) -> list[str]:
    return ["dataset=npz", f"dataset.path={path}", "dataset.batch_size=8", "dataset.validation_fraction=0.25"]


def line(capsys, name: str, *overrides: str) -> str:
    with pytest.raises(SystemExit) as stop:
        command(name, *overrides)
    capsys.readouterr()
    assert "\n" not in str(stop.value.code)
    return str(stop.value.code)


def flipped(images: np.ndarray) -> np.ndarray:
    images = images.copy()
    images[3, 2, 1] ^= 1
    return images


@pytest.fixture(params=["train", pytest.param("train_classifier", marks=pytest.mark.long)])
def trained(request, tmp_path) -> tuple[str, Path, Path]:
    """A command, the directory of its run, and the file that it trained on."""
    name, run, file = request.param, tmp_path / "run", tmp_path / "x.npz"
    archive(file)
    command(name, *TINY, *(MODEL if name == "train" else JUDGE), *data(file), f"run_dir={run}")
    return name, run, file


def test_a_run_does_not_resume_on_other_images(trained, capsys):
    name, run, file = trained
    arrays = archive(file)
    before = {path: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    again = [f"run_dir={run}", "ckpt=last", "trainer.max_epochs=2"]
    for changed, split, was, now in [
        ({"n": 36}, "train", 30, 27),
        ({"train_images": flipped(arrays["train_images"])}, "train", 30, 30),
        ({"train_labels": 1 - arrays["train_labels"]}, "train", 30, 30),
        ({"test_images": flipped(arrays["test_images"])}, "test", 8, 8),
    ]:
        archive(file, **changed)
        message = line(capsys, name, *again)
        assert f"last.ckpt: its {split} split was {was} images of checksum " in message
        assert f"here it is {now} images of checksum " in message
        assert message.endswith("; put those images back, or start another run")
    assert before == {path: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    archive(file)
    file.rename(file.with_name("moved.npz"))  # the same images elsewhere
    command(name, *again, f"dataset.path={file.with_name('moved.npz')}")
    assert json.loads((run / "result.json").read_text())["epochs"] == 2


@pytest.mark.parametrize(
    ("overrides", "words", "chosen"),
    [
        (["dataset=npz"], ["run_dir=RUN", "ckpt=last", "dataset.path=x"], ["dataset=npz"]),
        (["+experiment=codes"], ["--multirun", "dataset.root=x", "ckpt=RUN"], ["+experiment=codes"]),
        (
            ["experiment=mnist/cpu", "seed=1"],
            ["ckpt=RUN/checkpoints/last.ckpt", "dataset.root=x"],
            ["experiment=mnist/cpu"],
        ),
        (["dataset=npz"], ["ckpt=RUN", "dataset=arrays", "dataset.path=x"], []),
        (["dataset=npz"], ["ckpt=RUN", "trainer.max_epochs=3"], []),
        (["dataset=npz"], ["run_dir=RUN", "dataset.path=x"], []),  # a new run
        (["dataset=../../../evil", "dataset=/evil", "dataset=none", 5], ["ckpt=RUN", "dataset.path=x"], []),
        (5, ["ckpt=RUN", "dataset.path=x"], []),
        ("damaged", ["ckpt=RUN", "dataset.path=x"], []),
    ],
)
def test_where_only_the_place_of_the_data_is_typed_the_run_tells_which_dataset_it_is(
    tmp_path, overrides, words, chosen
):
    content = b"\xff: [" if overrides == "damaged" else json.dumps({"overrides": overrides}).encode()
    (tmp_path / "config.yaml").write_bytes(content)
    words = [word.replace("RUN", str(tmp_path)) for word in words]
    found = with_dataset_of_run(words)
    assert [word for word in found if word not in words] == chosen
    assert [word for word in found if word not in chosen] == words
    if chosen:
        assert found[found.index(chosen[0]) + 1].startswith("ckpt=")


def test_a_run_that_has_a_name_is_resumed_by_it():
    assert run_of(None, "runs/train", "mine") == run_of("last", "runs/train", "mine") == "runs/train/mine"
    assert run_of(None, "runs/train", None).startswith("runs/train/")


def test_images_are_chosen_at_random_in_their_order():
    positions = random_positions(1000, 100)
    assert positions.tolist() == sorted(set(positions.tolist()))
    assert 300 < positions.float().mean() < 700
    assert torch.equal(random_positions(7, 7), torch.arange(7))


@pytest.mark.parametrize("kept", [None, *(pytest.param(kept, marks=pytest.mark.long) for kept in (3, {"other": "x"}))])
def test_a_checkpoint_from_before_there_were_checksums_resumes(trained, kept):
    name, run, _ = trained
    last = run / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    assert set(content.pop("ImageData")) == {"train", "validation", "test"}
    torch.save(content | ({} if kept is None else {"ImageData": kept}), last)
    command(name, f"run_dir={run}", "ckpt=last", "trainer.max_epochs=2")
    assert json.loads((run / "result.json").read_text())["epochs"] == 2


def test_scores_on_other_images_than_the_runs_are_given_and_say_so(tmp_path, capsys):
    file = tmp_path / "x.npz"
    arrays = archive(file)
    command("train", *TINY, *MODEL, *data(file), f"run_dir={tmp_path}/run")
    evaluate = [f"ckpt={tmp_path}/run/checkpoints/best.ckpt", "trainer=cpu", f"run_dir={tmp_path}/score"]
    for changed, own, told in [
        ({}, [], False),
        ({"test_images": flipped(arrays["test_images"])}, [], True),
        ({"test_images": flipped(arrays["test_images"])}, data(file)[:2], False),  # it is typed that they are others
        ({"train_images": flipped(arrays["train_images"])}, [], False),  # not those that are scored
    ]:
        archive(file, **changed)
        command("evaluate", *evaluate, *own)
        printed = capsys.readouterr().out
        assert ("best.ckpt: its test split was 8 images of checksum " in printed) == told
        assert ("split was" in printed) == told
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(file), str(file.rename(tmp_path / "moved.npz"))))
    command("evaluate", *evaluate)  # as after a run that was resumed where its data had moved, and improved no more
    for images, label in [(arrays["test_images"], "x "), (flipped(arrays["test_images"]), "other ")]:
        archive(tmp_path / "other.npz", test_images=images)
        command("evaluate", *evaluate, f"dataset.path={tmp_path}/other.npz")
        assert json.loads((tmp_path / "score" / "evaluation.json").read_text())["label"].startswith(label)


def test_one_class_is_trained_and_scored(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file, run = tmp_path / "x.npz", tmp_path / "run"
    archive(file, n_classes=1)
    command("train", *TINY, *MODEL, *data(file), f"run_dir={run}")
    result = json.loads((run / "result.json").read_text())
    assert result["test/bpd_per_class"] == {"0": pytest.approx(result["test/bpd"], rel=1e-9)}
    ckpt = f"ckpt={run}/checkpoints/best.ckpt"
    command("evaluate", ckpt, "trainer=cpu", f"run_dir={tmp_path}/score")
    score = json.loads((tmp_path / "score" / "evaluation.json").read_text())
    assert score["bpd_per_class"] == {"0": pytest.approx(score["bpd"], rel=1e-9)}
    assert "this model knows one class" in line(capsys, "evaluate", ckpt, "task=classify")
    assert "has one class" in line(capsys, "train_classifier", *TINY, *JUDGE, *data(file))
