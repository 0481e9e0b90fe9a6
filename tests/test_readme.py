"""What the README shows is real: its examples keep the laws, its commands compose, its pictures are there."""

import re
import shlex
from itertools import product
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from test_laws import check_context, check_no_future, redraw

from pixelcnn_lit.checkpoints import WEIGHTS
from pixelcnn_lit.command import CONF
from pixelcnn_lit.data.module import ImageData
from pixelcnn_lit.likelihoods import Categorical
from pixelcnn_lit.samplers import Request, draw

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXPERIMENTS = sorted((CONF / "experiment").glob("*.yaml"))


def commands(text: str) -> list[str]:
    """Every `python -m pixelcnn_lit.X ...` in a text, X a Hydra main, also where it is wrapped between backticks."""
    text = re.sub(r"`[^`\n]+\n[^`\n]+`", lambda wrapped: wrapped[0].replace("\n", " "), text)
    return re.findall(r"python -m pixelcnn_lit\.(?!summarize)([^`\n#]+)", text)


def jobs(overrides: list[str]) -> list[tuple[str, ...]]:
    """What a command composes: one job, or those of a sweep."""
    if "-m" not in overrides:
        return [tuple(overrides)]
    typed = [override.partition("=") for override in overrides if override != "-m"]
    return list(product(*([f"{key}{sign}{value}" for value in values.split(",")] for key, sign, values in typed)))


COMMANDS = [
    *commands(README),
    *commands((WEIGHTS / "README.md").read_text()),
    *(command for experiment in EXPERIMENTS for command in commands(experiment.read_text())),
    *(f"train {overrides}" for overrides in re.findall(r"^\| `(experiment=[^`]+)`", README, re.MULTILINE)),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_we_show_composes(command):
    name, *overrides = shlex.split(command)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for job in jobs(overrides):
            compose(name, list(job))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_opens_with_its_own_command(path):
    first, second = path.read_text().splitlines()[:2]
    assert first == "# @package _global_"
    assert second.startswith(f"# python -m pixelcnn_lit.train experiment={path.stem}")


def python_example(word: str) -> dict:
    """The names defined by the README's python block that contains `word`."""
    names: dict = {}
    exec(next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if word in block), names)
    return names


def test_the_network_of_the_readme_keeps_the_laws():
    sizes = {"num_classes": 3, "levels": 17, "out_channels": 8, "hidden_channels": 8, "n_residual": 2}
    for image_shape in ((1, 7, 7), (3, 2, 5)):
        net = python_example("class RowCNN")["RowCNN"](image_shape=image_shape, **sizes).double()
        redraw(net)
        check_no_future(net, image_shape)
        if image_shape == (1, 7, 7):
            check_context(net)
        inside = Categorical(image_shape, 17, width=8, ordinal=True).double()
        net = python_example("class RowCNN")["RowCNN"](
            image_shape=image_shape, **sizes | {"out_channels": inside.out_channels}
        )
        request = Request(net.double(), inside, torch.tensor([0, 2]), image_shape, 3, [0, 2])
        assert torch.equal(draw(request, method="cached"), draw(request, method="naive"))  # it has no step


def test_the_dataset_of_the_readme_is_served():
    data = ImageData(python_example("def stripes")["stripes"], name="stripes", batch_size=16, num_workers=0)
    data.setup()
    assert data.label == "stripes 1×8×8, 256 levels"
    x, y = next(iter(data.train_dataloader()))
    assert x.dtype == torch.uint8
    assert torch.equal(x[:, 0, 0, 1] == 255, y == 0)


def test_the_pictures_of_the_readme_are_there():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_every_test_that_the_readme_names_exists():
    named = set(re.findall(r"\| `(test_\w+)`", README))
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    assert len(named) > 5
    assert all(f"def {name}" in sources for name in named), named
