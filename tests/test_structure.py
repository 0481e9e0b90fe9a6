"""The shape of the program: who imports whom, and what the yaml files promise."""

import ast
import re
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pixelcnn_lit.command import CONF

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [path.stem for path in CONF.glob("*.yaml") if (ROOT / "pixelcnn_lit" / f"{path.stem}.py").is_file()]
# Lower floors know nothing of higher ones. A main stands on the roof: nobody imports it.
FLOORS = (
    (
        "errors",
        "budget",
        "noise",
        "pictures",
        "fronts",
        "ordinal",
        "signals",
        "files",
        "memory",
        "run_dir",
        "workers",
        "terminal",
    ),
    ("build", "checkpoints", "rounding", "machine", "schedulers", "trainer", "runs"),
    ("command",),
    ("launch",),
    ("data", "models.caches", "models.layers", "likelihoods", "muon", "averaging"),
    ("models",),
    ("samplers",),
    ("lit", "classifiers"),
    ("bayes", "codec", "callbacks"),
    ("resume",),
    ("fitting",),
    ("summarize", "data.__main__", *COMMANDS),
)


def floor(module: str) -> int:
    """The floor of the longest prefix of `module` that FLOORS names."""
    names = {name: number for number, names in enumerate(FLOORS) for name in names}
    parts = module.split(".")
    return next(names[p] for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in names)


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


def test_imports_go_down():
    pairs = imports()
    assert len(pairs) > 20
    upwards = [(a, b) for a, b in pairs if floor(a) < floor(b)]
    assert not upwards
    roof = [(a, b) for a, b in pairs if floor(b) == len(FLOORS) - 1]
    assert not roof, "a main is imported by nobody"


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


def room(module: str) -> str:
    """The box of the README's picture that a module stands in."""
    if floor(module) == len(FLOORS) - 1:
        return "mains"
    return module.split(".")[0]


def test_the_picture_in_the_readme_is_the_import_graph():
    drawn = set(re.findall(r"^ *(\w+) --> (\w+)$", README, re.MULTILINE))
    real = {(room(a), room(b)) for a, b in imports() if room(a) != room(b)}
    plumbing = {
        "errors",
        "budget",
        "build",
        "launch",
        "signals",
        "command",
        "run_dir",
        "files",
        "memory",
        "trainer",
        "noise",
        "fronts",
        "ordinal",
        "pictures",
        "machine",
        "workers",
        "schedulers",
        "checkpoints",
        "rounding",
        "terminal",
    }  # drawn as one box, without arrows
    assert drawn == {(a, b) for a, b in real if not {a, b} & plumbing}


def test_the_baseline_is_the_published_one():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for dataset in ("cifar10", "mnist"):
            cfg = compose("train", [f"experiment=baseline_{dataset}"])
            assert (cfg.model.hidden_channels, cfg.model.n_residual, cfg.model.norm) == (256, 15, "batch")
            assert cfg.model.level_channels == 0
            assert cfg.likelihood.colour == "independent"
            assert cfg.optimizer._target_.endswith(".Adam")
            assert (cfg.optimizer.lr, cfg.optimizer.weight_decay) == (3e-4, 1e-5)
            assert cfg.scheduler._target_.endswith(".ReduceLROnPlateau")
            assert (cfg.scheduler.factor, cfg.scheduler.patience) == (0.5, 5)
            assert (cfg.trainer.max_epochs, cfg.dataset.batch_size) == (30, 128)
            assert (cfg.sampler.temperature, cfg.sampler.n_per_class) == (0.6, 2)
            assert cfg.dataset.resize == (32 if dataset == "mnist" else None)
            assert "ema" not in cfg.callbacks


def test_the_published_recipe_of_the_race_has_nothing_of_ours():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["experiment=mnist_race_published"])
    assert (cfg.model.norm, cfg.model.level_channels, cfg.model.dropout) == ("batch", 0, 0.0)
    assert (cfg.likelihood.colour, cfg.likelihood.ordinal, cfg.get("scheduler")) == ("independent", False, None)
    assert cfg.optimizer._target_.endswith(".Adam")


def test_model_sizes_set_two_numbers_and_nothing_else():
    sizes = {path.stem: OmegaConf.load(path) for path in (CONF / "model_size").glob("*.yaml")}
    expected = {"tiny": (16, 2), "small": (64, 5), "base": (256, 15), "large": (384, 20)}
    assert sizes == {k: {"hidden_channels": h, "n_residual": n} for k, (h, n) in expected.items()}


def test_a_run_on_the_digits_is_short_and_no_other_dataset_has_a_recipe():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        epochs = {name: compose("train", [f"dataset={name}", *path]).trainer.max_epochs for name, path in DATASETS}
        assert compose("train", ["experiment=mnist_race", "dataset=digits"]).trainer.max_epochs == -1
        assert compose("train", ["trainer.max_epochs=3"]).trainer.max_epochs == 3
    assert epochs == {name: 7 if name == "digits" else 30 for name in epochs}
    assert [path.name for path in (CONF / "recipe").iterdir()] == ["digits.yaml"]


DATASETS = [(path.stem, ["dataset.path=x"][: "path" in OmegaConf.load(path)]) for path in CONF.glob("dataset/*.yaml")]

WITHOUT_TORCH = """
import sys
sys.modules |= dict.fromkeys(["torch", "lightning", "torchvision", "torchmetrics", "matplotlib", "sklearn"])
from pixelcnn_lit.command import run
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
    assert "train is powered by Hydra" in asked.output()
    for name in names.split():
        assert f"{name} typo=1 error: typo: there is no such setting" in asked.output()
