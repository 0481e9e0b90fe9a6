"""The list of commands, the page of each, and the script `pixelcnn`, whose verbs they are."""

import functools
import re
import shlex
import signal
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY, command, refused
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pixelcnn_lit.__main__ import COMMANDS, become, overview
from pixelcnn_lit.runs import launch
from pixelcnn_lit.runs.help import SCRIPT, WIDTH, page
from pixelcnn_lit.runs.places import CONF, PACKAGE, WEIGHTS

LISTED = [name for names in COMMANDS.values() for name in names]
HYDRA_MAINS = sorted(path.stem for path in CONF.glob("*.yaml") if "  - job\n" in path.read_text(encoding="utf-8"))
GROUPS = {path.name for path in CONF.iterdir() if path.is_dir()}
SCRIPTS = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]


def flat(text: str) -> str:
    return " ".join(text.split())


def yaml_of(name: str) -> str:
    return (CONF / f"{name}.yaml").read_text(encoding="utf-8")


@functools.cache
def help_of(name: str, *overrides: str) -> str:
    """The page of a command, and of the settings that are composed."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return page(name, compose(name, list(overrides)))


def test_every_command_is_listed_with_the_first_line_of_its_docstring():
    files = [*PACKAGE.glob("*.py"), *PACKAGE.glob("*/__main__.py")]
    mains = {path for path in files if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}
    mains -= {PACKAGE / "__main__.py"}
    assert sorted(LISTED) == sorted(path.stem if path.parent == PACKAGE else path.parent.name for path in mains)
    assert set(HYDRA_MAINS) == set(LISTED) - {"summarize"}
    rows = dict(re.findall(r"^  (\w+) {2,}(\S.*)$", overview(), re.MULTILINE))
    assert sorted(rows) == sorted(LISTED)
    for path in mains:
        name = path.stem if path.parent == PACKAGE else path.parent.name
        assert path.read_text(encoding="utf-8").startswith(f'"""{rows[name]}')


@pytest.mark.parametrize("name", HYDRA_MAINS)
def test_a_page_tells_of_each_setting_and_each_group_and_of_no_other(name):
    shown = help_of(name)
    assert max(map(len, shown.replace(str(CONF), "conf").splitlines())) <= WIDTH
    sections = {section.split()[0]: section for section in shown.split("\n\n")}
    settings, groups = sections["Settings"], sections.get("Groups", "")
    config: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    listed = config.pop("defaults")
    heads = [re.findall(r"^  ([^\s=]+)", section, re.MULTILINE) for section in (settings, groups)]
    taken = [key.split()[-1] for item in listed if isinstance(item, dict) for key in item]
    assert sorted(heads[0]) == sorted(["debug", "threads", *own_keys(config)])
    assert heads[1] == taken
    assert {group.partition("@")[0] for group in taken} <= GROUPS
    for group in taken:
        options = (CONF / group.partition("@")[0]).rglob("*.yaml")
        assert all(re.search(rf"\b{option.stem}\b", groups) for option in options)
    assert ("ckpt=..." in settings) == (config.get("ckpt") == "???")
    for weights in WEIGHTS.glob("*.safetensors") if config.get("ckpt") == "???" else ():
        assert re.search(rf"shipped weights \([^)]*\b{weights.stem}\b", flat(settings))


def own_keys(config: dict[str, Any], inside: str = "") -> list[str]:
    """Settings as they are typed: those of a group with its name before them."""
    keys = []
    for key, value in config.items():
        keys += own_keys(value, f"{inside}{key}.") if isinstance(value, dict) else [inside + key]
    return keys


@pytest.mark.parametrize("name", [*HYDRA_MAINS, "job"])
def test_each_setting_has_a_comment_in_its_yaml_and_the_page_has_it(name):
    text = yaml_of(name).partition("\nhydra:")[0]
    settings = re.findall(r"^ *[\w.]+: +[^#\n]*[^#\n ]( +# (.+))?$", text.partition("\n\n")[2] or text, re.MULTILINE)
    assert settings
    shown = flat(help_of("sample" if name == "job" else name))
    shown = re.sub(r"(shipped weights) \([^)]*\)", r"\1", shown)
    for comment, words in settings:
        assert comment, f"conf/{name}.yaml: a setting without a comment"
        assert flat(words) in shown
    for words in re.findall(r"^  - .+ # (.+)$", text, re.MULTILINE):
        assert f"({flat(words)})" in shown


@pytest.mark.parametrize("way", [f"{SCRIPT} ", "python -m pixelcnn_lit."])
@pytest.mark.parametrize("name", LISTED)
def test_a_page_shows_two_examples_as_they_are_typed_in_eighty_columns(name, way, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", f"/bin/{SCRIPT}" if way.startswith(SCRIPT) else "-m"])
    text = page(name, {} if name in HYDRA_MAINS else None)
    wide = [line for line in [*text.splitlines(), *overview().splitlines()] if len(line) > WIDTH]
    assert all(line.strip() == f"{CONF}/" for line in wide), wide
    shown = re.findall(rf"^  {way}(.+)$", text.replace(" \\\n     ", ""), re.MULTILINE)
    assert len(shown) >= 2
    if name in HYDRA_MAINS:
        assert [f"# python -m pixelcnn_lit.{example}" for example in shown] == yaml_of(name).splitlines()[: len(shown)]


def test_what_to_type_first_composes(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", f"/bin/{SCRIPT}"])
    typed = [shlex.split(line) for line in re.findall(rf"^  {SCRIPT} (.+?)(?:  .*)?$", overview(), re.MULTILINE)]
    assert len(typed) == 3
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for name, *overrides in typed:
            compose(name, [word for word in overrides if word != "--help"])


def test_a_page_names_the_keys_of_the_option_that_is_typed():
    keys = re.compile(r"model=pixelcnn .*?keys: ([\w, ]*)model_size=", re.DOTALL)
    default, other = (keys.search(flat(help_of("train", *typed)))[1] for typed in ([], ["model=pixel_attention"]))
    assert "n_heads" not in default
    assert "n_heads" in other


def test_hydra_prints_the_page_and_refuses_a_typo(capsys):
    with pytest.raises(SystemExit) as stop:
        command("train", "model=pixel_attention", "--help")
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == help_of("train", "model=pixel_attention")
    assert "did you mean model.n_residual?" in refused("train", "n_residul=3", "--help")


@pytest.mark.parametrize("name", HYDRA_MAINS)
def test_a_verb_is_the_module_that_python_m_would_run(name, monkeypatch):
    """As seen where the program is started again: by DDP, which asks __main__, and by joblib's workers."""

    def seen(name: str) -> None:
        raise SystemExit((name, sys.modules["__main__"].__spec__.name, Path(sys.argv[0]), sys.argv[1:]))

    monkeypatch.setattr(launch, "launch", seen)
    monkeypatch.setattr(sys, "argv", [f"/bin/{SCRIPT}", name, "a=1", "--help"])
    with pytest.raises(SystemExit) as stop:
        become(name, "a=1", "--help")
    module = "pixelcnn_lit.data.__main__" if name == "data" else f"pixelcnn_lit.{name}"
    file = PACKAGE.parent / f"{module.replace('.', '/')}.py"
    assert stop.value.code == (name, module, file, ["a=1", "--help"])


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> str:
    """A file as pip writes it for [project.scripts]."""
    path = tmp_path_factory.mktemp("bin") / SCRIPT
    module, _, function = SCRIPTS[SCRIPT].partition(":")
    path.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    return str(path)


WITHOUT_TORCH = """
import runpy, sys
sys.modules |= dict.fromkeys(["torch", "lightning", "torchvision", "torchmetrics", "matplotlib", "sklearn"])
if sys.argv[1] == "no hydra":
    sys.modules |= dict.fromkeys(["hydra", "omegaconf"])
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("also", "typed", "code", "said"),
    [
        ("no hydra", "", 0, "Type first"),
        ("no hydra", "help", 0, "Type first"),
        ("no hydra", "--help", 0, "Type first"),
        ("no hydra", "smaple ckpt=mnist", 1, "error: smaple: there is no such command; did you mean sample?"),
        ("no hydra", "help smaple", 1, "error: smaple: there is no such command; did you mean sample?"),
        ("no hydra", "ckpt=mnist", 1, "error: ckpt=mnist: there is no such command; choose from: sample, complete"),
        ("", "help sample", 0, "Draw class-conditional samples"),
        ("", "summarize --help", 0, "Show the table and the curves of a sweep"),
        ("", "summarize x", 1, "error: "),
        ("", "sample ckpt=x.ckpt", 1, "error: ckpt=x.ckpt: no such file"),
    ],
)
def test_the_script_answers_without_torch(tmp_path, children, script, also, typed, code, said):
    asked = children.popen(tmp_path, "-c", WITHOUT_TORCH, also, script, *typed.split())
    assert asked.wait(60) == code
    assert asked.output().startswith(said) or said in asked.output().splitlines()
    assert code == 0 or asked.output().count("\n") == 1


RUN = [*TINY, "trainer.max_steps=2", "trainer.limit_train_batches=2"]


@pytest.mark.long
def test_the_script_trains_in_two_processes_of_which_lightning_starts_one(tmp_path, children, script):
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    asked = children.popen(tmp_path, script, "train", *RUN, *two, "run_dir=run")
    assert asked.wait(180) == 0
    assert "MEMBER: 2/2" in asked.output()
    assert asked.output().count("best checkpoint:") == 1


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_the_script_sweeps_in_processes_that_are_started_for_it(tmp_path, children, script, launcher):
    package = "hydra_joblib_launcher" if launcher == "joblib" else "hydra_submitit_launcher"
    pytest.importorskip(f"hydra_plugins.{package}", reason="pip install -e '.[sweeps]'")
    sweep = ["-m", *RUN, "seed=0,1", f"hydra/launcher={launcher}", "run_dir=sweep"]
    assert children.popen(tmp_path, script, "train", *sweep).wait(300) == 0
    assert sorted(path.parent.name for path in (tmp_path / "sweep").rglob("result.json")) == ["0", "1"]
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]
    table = children.popen(tmp_path, script, "summarize", "sweep")
    assert table.wait(60) == 0
    assert "seed=1" in table.output()


@pytest.mark.long
def test_a_signal_ends_the_script_as_it_ends_the_module(tmp_path, children, script):
    endless = [*TINY, "trainer.max_epochs=100000", "callbacks.samples.every_n_epochs=0"]
    ways = [["-m", "pixelcnn_lit.train"], [script, "train"]]
    for n, way in enumerate(ways):
        asked = children.popen(tmp_path, *way, *endless, f"run_dir={n}")
        asked.wait_until((tmp_path / str(n) / "checkpoints" / "best.ckpt").is_file)
        asked.signal(signal.SIGTERM)
        assert asked.wait(60) == 143
        assert asked.output().splitlines()[-1].startswith("stopped; to resume, type: python -m pixelcnn_lit.train")


def test_a_signal_ends_the_script_from_its_first_moments_on(tmp_path, children, script):
    """While it imports; -X importtime tells of the first import after the handlers are set."""
    asked = children.popen(tmp_path, "-X", "importtime", script, "train", PYTHONUNBUFFERED="1")
    asked.wait_until(lambda: "omegaconf" in asked.output())
    asked.signal(signal.SIGTERM)
    assert asked.wait(60) == 143
    assert "Traceback" not in asked.output()
