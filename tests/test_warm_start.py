"""A run that starts from trained weights."""

import pytest
import torch
from helpers import TINY, command, one_run, refused
from omegaconf import OmegaConf
from tiny import NETWORKS, make

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.density.load import load
from pixelcnn_lit.density.warm_start import parts_of, taken_over


@pytest.mark.parametrize("network", NETWORKS)
def test_all_that_fits_is_taken_over_and_the_rest_is_named(network):
    trained = make(network, "categorical", num_classes=3)
    same, other = make(network, "categorical", num_classes=3), make(network, "categorical", num_classes=5)
    for model in (same, other):
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
    line = taken_over(same, trained)
    assert "differ" not in line
    before = trained.state_dict()
    assert all(torch.equal(weight, before[name]) for name, weight in same.state_dict().items())
    _, _, left_out = taken_over(other, trained).partition("since their shapes differ: ")
    apart = tuple(f"{module}." for module in left_out.split(", "))
    for name, weight in other.state_dict().items():
        if name.startswith(apart):
            assert not weight.any(), f"{name}: a module is taken over as a whole"
        else:
            assert torch.equal(weight, before[name]), name
    assert any(weight.shape != before[name].shape for name, weight in other.state_dict().items())


def test_a_run_begins_with_the_weights_and_their_model(tmp_path, capsys):
    first = one_run(tmp_path / "a", "model=gated_pixelcnn", "trainer.max_epochs=1", "callbacks=samples")
    trained = load(first["checkpoint"])
    still = ["optimizer=adam", "optimizer.lr=0.0", "~scheduler", "trainer.max_epochs=1", "callbacks=samples"]
    command("train", *TINY[1:], *still, f"init={first['checkpoint']}", f"run_dir={tmp_path}/b")
    out = capsys.readouterr().out
    assert f"init={first['checkpoint']}: " in out
    weights = load(str(tmp_path / "b")).state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in trained.state_dict().items())
    saved = OmegaConf.to_container(OmegaConf.load(tmp_path / "b" / "config.yaml"))
    assert saved["model"] == trained.settings["model"]
    (tmp_path / "a" / "checkpoints" / "best.ckpt").unlink()  # a resumed run has its weights
    command("train", f"ckpt={tmp_path}/b", "trainer.max_epochs=2")


@pytest.mark.parametrize("override", ["model=pixelcnn_pp", "model_size=base", "model.n_residual=3", "+likelihood.x=1"])
def test_another_model_beside_it_gets_one_line(override):
    with pytest.raises(UserError, match=r"init=\.\.\. already determines"):
        parts_of(make("pixelcnn", "categorical"), ["seed=1", override])


def test_weights_that_are_not_there_get_one_line(tmp_path):
    line = refused("train", *TINY[1:], "init=nothing", f"run_dir={tmp_path}")
    assert line.startswith("error: init=nothing: no such file")
