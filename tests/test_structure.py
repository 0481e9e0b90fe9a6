"""The shape of the program: who imports whom, and what the yaml files promise."""

import ast
import graphlib
import re
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pixelcnn_lit.runs.command import CONF

ROOT = Path(__file__).parent.parent
PICTURE = (ROOT / "pixelcnn_lit" / "README.md").read_text(encoding="utf-8")
COMMANDS = [path.stem for path in CONF.glob("*.yaml") if (ROOT / "pixelcnn_lit" / f"{path.stem}.py").is_file()]
# From the ground up: a folder imports those of lower floors alone. Commands stand on the roof: nobody imports them.
FLOORS = (
    ("nn", "config"),
    ("runs",),
    ("models", "likelihoods", "optim", "classifiers"),
    ("samplers", "checkpoints"),
    ("density",),
    ("data",),
    ("lit",),
    ("training", "scoring", "codec"),
    ("__init__", "__main__", "data.__main__", "summarize", *COMMANDS),
)


def room(module: str) -> str:
    """A folder of the package, or a file at its top; the command `data` lies in a folder."""
    return module if module == "data.__main__" else module.split(".")[0]


def imports() -> set[tuple[str, str]]:
    """Pairs (module, module it imports) inside the package, without the package's name."""
    pairs = set()
    for path in (ROOT / "pixelcnn_lit").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT / "pixelcnn_lit").with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("pixelcnn_lit") for alias in node.names), "write from ... import"
            assert not getattr(node, "level", 0), "write absolute imports"
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pixelcnn_lit"):
                inside = (node.module or "").removeprefix("pixelcnn_lit").lstrip(".")
                for alias in node.names:
                    whole = f"{inside}.{alias.name}".lstrip(".")
                    is_module = (ROOT / "pixelcnn_lit" / Path(*whole.split("."))).with_suffix(".py").is_file()
                    pairs.add((module, whole if is_module else inside))
    return pairs


def test_imports_go_down_from_room_to_room_and_run_in_no_circle():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    pairs = imports()
    arrows = {(room(a), room(b)) for a, b in pairs if room(a) != room(b)}
    rooms = {room for arrow in arrows for room in arrow}
    print(f"{len(rooms)} rooms, {len(arrows)} arrows")
    assert rooms == set(floor), "every room lies on a floor"
    assert not [(a, b) for a, b in arrows if floor[a] <= floor[b]]
    assert len(rooms) <= 29
    assert len(arrows) <= 100
    graphlib.TopologicalSorter({a: {c for b, c in pairs if b == a} for a, _ in pairs}).prepare()  # refuses circles


def test_a_folder_bears_the_name_of_its_group_in_conf():
    """Options of a group that are classes or functions of this package are at home in its folder."""
    homes = {"model": "models", "likelihood": "likelihoods", "sampler": "samplers", "classifier": "classifiers"}
    homes |= {"dataset": "data", "optimizer": "optim", "scheduler": "optim"}
    for group, folder in homes.items():
        options = [OmegaConf.load(path) for path in (CONF / group).glob("*.yaml")]
        targets = [str(option.get(group, option).get("_target_", "")) for option in options]
        own = [target for target in targets if target.startswith("pixelcnn_lit.")]
        assert all(target.startswith(f"pixelcnn_lit.{folder}.") for target in own), own


def test_text_is_read_and_written_as_utf_8_whatever_the_system_prefers():
    for path in (ROOT / "pixelcnn_lit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            text = isinstance(node.func, ast.Attribute) and node.func.attr in ("read_text", "write_text")
            if isinstance(node.func, ast.Name) and node.func.id == "open":
                text = not any("b" in str(getattr(argument, "value", "")) for argument in node.args[1:])
            encoded = any(keyword.arg == "encoding" for keyword in node.keywords)
            assert encoded or not text, f"{path.name}, line {node.lineno}: say encoding='utf-8'"


def test_the_picture_beside_the_code_is_the_import_graph():
    """But for commands, which are drawn as one, and for `config` and `runs`, which most others import."""
    drawn = set(re.findall(r"^ *(\w+) --> (\w+)$", PICTURE, re.MULTILINE))
    named = {a: "commands" if a in FLOORS[-1] else a for names in FLOORS for a in names}
    real = {(named[room(a)], named[room(b)]) for a, b in imports() if room(a) != room(b)}
    assert drawn == {(a, b) for a, b in real if not {a, b} & {"config", "runs"}}


def test_the_baseline_is_the_published_one():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for dataset in ("cifar10", "mnist"):
            cfg = compose("train", [f"experiment={dataset}/baseline"])
            assert cfg.model._target_.endswith(".PublishedPixelCNN")
            assert (cfg.model.hidden_channels, cfg.model.n_residual, cfg.model.kernel_size) == (256, 15, 7)
            assert cfg.model.embedding._target_.endswith(".ScaledLevels")
            assert (cfg.likelihood.colour, cfg.likelihood.ordinal) == ("independent", False)
            assert cfg.optimizer._target_.endswith(".Adam")
            assert (cfg.optimizer.lr, cfg.optimizer.weight_decay) == (3e-4, 1e-5)
            assert cfg.scheduler._target_.endswith(".ReduceLROnPlateau")
            assert (cfg.scheduler.factor, cfg.scheduler.patience) == (0.5, 5)
            assert (cfg.trainer.max_epochs, cfg.dataset.batch_size) == (30, 128)
            assert cfg.trainer.gradient_clip_val is None
            assert (cfg.sampler.temperature, cfg.sampler.n_per_class) == (0.6, 2)
            assert cfg.dataset.resize == (32 if dataset == "mnist" else None)
            assert "ema" not in cfg.callbacks


def test_the_published_recipe_of_the_race_has_nothing_of_ours():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg, ours = (compose("train", [f"experiment=mnist/race/{name}"]) for name in ("published", "pixelcnn"))
    assert (cfg.dataset, cfg.callbacks) == (ours.dataset, ours.callbacks)
    assert {**cfg.trainer, "gradient_clip_val": 1.0} == ours.trainer
    assert cfg.model._target_.endswith(".PublishedPixelCNN")
    assert cfg.model.embedding._target_.endswith(".ScaledLevels")
    assert (cfg.likelihood.colour, cfg.likelihood.ordinal, cfg.get("scheduler")) == ("independent", False, None)
    assert cfg.optimizer._target_.endswith(".Adam")


def test_model_sizes_set_two_numbers_and_nothing_else():
    sizes = {path.stem: OmegaConf.load(path) for path in (CONF / "model_size").glob("*.yaml")}
    expected = {"tiny": (16, 2), "small": (64, 5), "base": (256, 15), "large": (384, 20)}
    assert sizes == {k: {"hidden_channels": h, "n_residual": n} for k, (h, n) in expected.items()}


def test_a_run_on_the_digits_is_short_and_no_other_dataset_has_a_recipe():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        epochs = {name: compose("train", [f"dataset={name}", *path]).trainer.max_epochs for name, path in DATASETS}
        assert compose("train", ["experiment=mnist/race/pixelcnn", "dataset=digits"]).trainer.max_epochs == -1
        assert compose("train", ["trainer.max_epochs=3"]).trainer.max_epochs == 3
    assert epochs == {name: 7 if name == "digits" else 30 for name in epochs}
    assert [path.name for path in (CONF / "recipe").iterdir()] == ["digits.yaml"]


DATASETS = [(path.stem, ["dataset.path=x"][: "path" in OmegaConf.load(path)]) for path in CONF.glob("dataset/*.yaml")]

WITHOUT_TORCH = """
import sys
sys.modules |= dict.fromkeys(["torch", "lightning", "torchvision", "torchmetrics", "matplotlib", "sklearn"])
from pixelcnn_lit.runs.command import run
for name in sys.argv[1].split():
    for typed in ["--help"] * (name == "train") + ["typo=1"]:
        sys.argv = [name, typed]
        try:
            run(name)
        except SystemExit as stop:
            print(name, typed, stop.code)
"""


def test_help_and_typos_are_answered_before_torch_is_imported(tmp_path, children):
    names = " ".join([*COMMANDS, "data"])
    asked = children.popen(tmp_path, "-c", WITHOUT_TORCH, names)
    assert asked.wait(60) == 0
    assert "\nSettings (KEY=VALUE), with their defaults\n" in asked.output()
    for name in names.split():
        assert f"{name} typo=1 error: typo: there is no such setting" in asked.output()
