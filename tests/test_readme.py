"""What the pages show is real: their commands compose, their code runs, their links and pictures are there."""

import doctest
import importlib
import math
import os
import re
import shlex
import shutil
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from pixelcnn_lit.config.build import inspect_config
from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.runs.command import CONF

ROOT = Path(__file__).parent.parent
FOLDERS = ("conf", "notebooks", "pixelcnn_lit", "tests")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *(page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md"))))
}
README = PAGES["README.md"]
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


# Files that models/README.md shows: their path between backticks, a colon, the file.
SHOWN = re.findall(
    r"`((?:pixelcnn_lit|conf)/[\w/]+\.\w+)`:\n\n```\w+\n(.*?)```",
    PAGES["pixelcnn_lit/models/README.md"],
    re.DOTALL,
)


def test_the_readme_is_short_and_no_page_is_unfinished():
    assert len(README.splitlines()) <= 250
    assert not [name for name, text in PAGES.items() if "TODO" in text]


def name_of(experiment: Path) -> str:
    """The name by which it is chosen: mnist/race/pixelcnn."""
    return experiment.relative_to(CONF / "experiment").with_suffix("").as_posix()


EXPERIMENTS = sorted((CONF / "experiment").rglob("*.yaml"))
# The Hydra mains as they are run: `python -m pixelcnn_lit.train ...`, `pixelcnn train ...`.
MAINS = "|".join(path.stem for path in CONF.glob("*.yaml") if path.stem not in ("job", "dataset_options"))
SHOWN_COMMAND = re.compile(rf"(?:-m pixelcnn_lit\.|(?:^|`|&& )pixelcnn )((?:{MAINS})\b(?! -sc)[^`\n]*)", re.MULTILINE)


def commands(text: str) -> list[str]:
    """Every command in a text whose main is Hydra's, also where it is wrapped between backticks or by a backslash."""
    text = text.replace("\\\n", " ")
    text = re.sub(r"`[^`\n]+\n[^`\n]+`", lambda wrapped: wrapped[0].replace("\n", " "), text)
    return [command.partition(" #")[0] for command in SHOWN_COMMAND.findall(text)]


def jobs(overrides: list[str]) -> list[tuple[str, ...]]:
    """What a command composes: one job, or those of a sweep; of a range to search, its lower end."""
    if "-m" not in overrides:
        return [tuple(overrides)]
    sweep = [override for override in overrides if not override.startswith(("-m", "hydra/sweeper", "hydra.sweeper"))]
    varied = [re.sub(r"interval\(([^,]+),[^)]*\)", r"\1", override).partition("=") for override in sweep]
    return list(product(*([f"{key}{sign}{value}" for value in values.split(",")] for key, sign, values in varied)))


YAMLS = [path.read_text(encoding="utf-8") for path in sorted(CONF.rglob("*.yaml"))]
COMMANDS = sorted({command.strip() for text in (*PAGES.values(), *YAMLS) for command in commands(text)})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_we_show_composes(command):
    name, *words = shlex.split(command.replace(" --cfg job", "").replace(" --help", ""))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for job in jobs(words):
            cfg = compose(name, list(job))
            if name == "train":  # a recipe may inherit what its network has no such setting for
                network: Any = OmegaConf.to_container(cfg.model, resolve=True)
                del network["embedding"]
                facts = ("image_size", "in_channels", "num_classes", "out_channels")
                inspect_config("model", network, nn.Module, facts)


@pytest.mark.parametrize("page", PAGES)
def test_every_option_of_a_group_that_a_page_names_exists(page):
    """As in `experiment=mnist/cpu` or `dataset=npz`, with what follows in the same backticks."""
    named = re.findall(r"(?<=[` ])([a-z_]+)=([\w/]+)", PAGES[page])
    shown = [path for path, _ in SHOWN]
    for group, name in named:
        option = CONF / group / f"{name}.yaml"
        assert not (CONF / group).is_dir() or option.is_file() or f"conf/{group}/{name}.yaml" in shown, option


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_an_experiment_opens_with_its_own_command(path):
    first, second = path.read_text(encoding="utf-8").splitlines()[:2]
    assert first == "# @package _global_"
    assert second.startswith(f"# python -m pixelcnn_lit.train experiment={name_of(path)}")


IN_A_CHECKOUT = """
import sys, pytest
from helpers import command
command("data", "dataset=stripes", "dataset.num_workers=0")
command("train", "model=rowcnn", "dataset=stripes", "model_size=tiny", "trainer=cpu", "trainer.max_steps=1",
    "dataset.num_workers=0")
sys.exit(pytest.main(["tests/test_laws.py", "tests/test_samplers.py", "-k", "rowcnn", "-q", "-n0"]))
"""


@pytest.mark.long
def test_the_files_that_a_page_shows_are_put_into_a_checkout_unedited_and_keep_the_laws(tmp_path, children):
    for part in ("conf", "pixelcnn_lit"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("weights", "__pycache__"))
    (tmp_path / "tests").mkdir()
    for file in (*(ROOT / "tests").glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(file, tmp_path / file.relative_to(ROOT))
    assert len(SHOWN) == 4
    for path, content in SHOWN:
        assert not (tmp_path / path).exists()
        (tmp_path / path).write_text(content)
    (tmp_path / "use.py").write_text(IN_A_CHECKOUT)
    done = children.popen(tmp_path, "use.py", PYTHONPATH=f"{tmp_path}{os.pathsep}{tmp_path / 'tests'}")
    assert done.wait(300) == 0
    assert "stripes 1×8×8, 256 levels: val " in done.output()
    assert int(re.search(r"(\d+) passed", done.output())[1]) > 20


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_the_pictures_and_links_of_a_page_lead_somewhere(page):
    text = re.sub(r"`[^`\n]+`", "", FENCED.sub("", PAGES[page]))  # a link's text may be code, its target is none
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    for target in targets:
        assert "://" not in target, f"{target}: readable without a network"
        file, _, anchor = target.partition("#")
        there = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(PAGES[there.relative_to(ROOT).as_posix()]), target


def test_pages_are_found_and_show_pictures():
    assert {"pixelcnn_lit/README.md", "conf/experiment/README.md", "tests/README.md"} < set(PAGES)
    assert len(re.findall(r"!\[", README)) == 3
    assert len(COMMANDS) > 60


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_a_page_names_exists(page):
    named = set(re.findall(r"`(test_(?!images|labels)\w+)`", PAGES[page]))
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    assert all(f"def {name}(" in sources for name in named), named
    assert len(named) > 10 or page != "tests/README.md"


PACKAGE = ROOT / "pixelcnn_lit"
EXAMPLES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>>" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_in_docstrings_do_what_they_say(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed


def test_the_public_api_does_what_its_page_says():
    """With the letters of pixelcnn_lit's own docstring."""
    import pixelcnn_lit

    model = pixelcnn_lit.load("mnist")
    images = model.sample(n_per_class=2, classes=[3, "7"], temperature=0.9, guidance_scale=2.0, seed=0)
    assert (images.shape, images.dtype) == ((2, 2, 1, 28, 28), torch.uint8)
    x, y = images.flatten(0, 1), torch.tensor([3, 3, 7, 7])
    bits = model.bits_per_pixel(x, y)
    assert torch.allclose(bits.sum((1, 2)), model.nats(x, y) / math.log(2))
    known = torch.zeros(28, 28, dtype=torch.bool)
    known[:14] = True
    filled = model.complete(x, known, y, n=2, seed=0)
    assert filled.shape == (4, 2, 1, 28, 28)
    assert torch.equal(filled[..., :14, :], x[:, None, :, :14].expand(-1, 2, -1, -1, -1))
    for wrong in (x.float(), x[:, :, 1:], x[:1].repeat(2, 3, 1, 1)):
        with pytest.raises(UserError, match="x: "):
            model.nats(wrong, y[: len(wrong)])
    with pytest.raises(UserError, match=r"y=.*: this model was trained on"):
        model.nats(x[:2], torch.tensor([3, 11]))
    assert torch.equal(model.nats(x, ["3", 3, "7", 7]), model.nats(x, y))
    assert model.nats(x[:0], []).shape == (0,)
    given = torch.stack([-model.nats(x, [label] * 4) for label in range(10)], dim=1).double()
    assert torch.allclose(model.classify(x, batch_size=3), given.log_softmax(1), atol=1e-5)
    only_3 = torch.eye(10)[3]
    assert model.classify(x, only_3).exp().round().argmax(1).tolist() == [3] * 4
    for prior in ([0.1] * 10, torch.ones(3), -torch.ones(10)):
        with pytest.raises(UserError, match=r"prior: .*give a torch\.Tensor of shares, \[10\]"):
            model.classify(x, prior)
    with pytest.raises(ValueError, match=r"x: torch\.float32"):
        model.classify(x.float())
    with pytest.raises(UserError, match="batch_size=0: must be 1 or more"):
        model.classify(x, batch_size=0)
    with pytest.raises(UserError, match="this model was trained on"):
        model.sample(classes=["cat"])
    for wrong in (x.numpy(), x.tolist(), x.bool()):
        with pytest.raises(UserError, match=r"x: .*give a torch\.Tensor of integers"):
            model.nats(wrong, y)
    for classes in ([True], [1.0], [[1]], 1, "1", torch.tensor([11])):
        with pytest.raises(UserError, match=r"classes[:=]"):
            model.sample(classes=classes)
    assert torch.equal(model.sample(classes=torch.tensor([3]), seed=1), model.sample(classes=["3"], seed=1))
    with pytest.raises(UserError, match="n_per_class: is set by another argument"):
        model.complete(x, known, y, n=1, n_per_class=2)
    with pytest.raises(UserError, match=r"known: ndarray; give a torch.Tensor, bool \[28, 28\]"):
        model.complete(x, known.numpy(), y)
    model.label_dropout = 0.0  # as of one that never saw an image without its class
    with pytest.raises(UserError, match=r"y=.*: this model was trained on 0, 1, .*, 9$"):
        model.complete(x[:1], known, torch.tensor([10]))
    with pytest.raises(UserError, match=r"^temperature=0: must be a number >= 0\.001"):
        model.sample(temperature=0)


def python_of(page: str) -> list[str]:
    """The Python that a page shows, but for files to put into a checkout."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)
    return [block for block in blocks if block not in dict(SHOWN).values()]


def test_the_python_of_the_readme_runs():
    (code,) = python_of("README.md")
    made: dict[str, Any] = {}
    exec(code, made)
    assert made["images"].shape == (2, 4, 1, 28, 28)
    assert made["filled"].shape == (2, 4, 1, 28, 28)
    assert made["bits"].shape == (2, 28, 28)
    assert torch.allclose(made["bits"].sum((1, 2)), made["nats"] / math.log(2))
    assert torch.allclose(made["log_posterior"].logsumexp(1), torch.zeros(2, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md" and python_of(page)])
def test_the_python_of_the_other_pages_runs(page, tmp_path, monkeypatch):
    """With a stand-in for MNIST, which would be downloaded."""
    monkeypatch.chdir(tmp_path)
    digits = SimpleNamespace(data=torch.zeros(3, 28, 28, dtype=torch.uint8), targets=torch.arange(3))
    monkeypatch.setattr("torchvision.datasets.MNIST", lambda root, train, download: digits)
    for code in python_of(page):
        exec(code, {})
    shapes = {"pixelcnn_lit/scoring": (3, 32, 32, 3), "pixelcnn_lit/data": (64, 8, 8, 3)}
    for file in tmp_path.glob("*.npz"):
        with np.load(file) as archive:
            assert archive["test_images"].shape == shapes[str(Path(page).parent)]


def test_load_and_sample_import_no_lightning(tmp_path, children):
    heavy = {"lightning", "torchvision", "torchmetrics", "matplotlib", "torch._dynamo"}
    code = (
        "import sys, pixelcnn_lit; assert 'torch' not in sys.modules; pixelcnn_lit.load('mnist').sample(classes=[1]);"
    )
    code += f"sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    asked = children.popen(tmp_path, "-c", code)
    assert asked.wait(60) == 0, asked.output()
