"""A user's mistake gets one line that says what to type, exit code 1 or 2, and no traceback."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Annotated

import pytest
import torch
from annotated_types import Ge
from helpers import TINY, command, one_run, save_npz
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, OverrideParseException
from omegaconf import OmegaConf
from torch._inductor.exc import InductorError, InvalidCxxCompiler

import pixelcnn_lit.runs.command
from pixelcnn_lit.config.build import resolve
from pixelcnn_lit.config.errors import UserError, explain
from pixelcnn_lit.config.schema import matches
from pixelcnn_lit.runs.command import CONF
from pixelcnn_lit.runs.run_dir import relative


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run a main in this process: returns (exit code, what it printed on stderr)."""

    def run(name: str, *overrides: str) -> tuple[int, str]:
        monkeypatch.chdir(tmp_path)
        try:
            command(name, *overrides)
            code = 0
        except SystemExit as stop:
            code = 1 if isinstance(stop.code, str) else int(stop.code or 0)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        return code, capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A digits checkpoint of one step."""
    directory = tmp_path_factory.mktemp("run")
    one_run(directory, *ONE_STEP)
    return str(directory / "checkpoints" / "best.ckpt")


ONE_STEP = ["trainer.max_epochs=1", "trainer.limit_train_batches=1", "callbacks.samples.every_n_epochs=0"]

TYPOS = [
    ("dataset=foo", "there is no such dataset; choose from: arrays, cifar10, cifar100, digits"),
    ("classes=[3,", "classes=[3,: ends too soon for a list; type classes=[a,b] without spaces, or"),
    ("optimizer.lr=2e-3,", "optimizer.lr=2e-3,: ends too soon for a list; type optimizer.lr=a,b without spaces, or"),
    ("optimizer.learning_rate=1", "optimizer.learning_rate: there is no such setting; did you mean optimizer.lr?"),
    ("dataset.bs=1", "dataset.bs: there is no such setting; did you mean dataset.batch_size?"),
    ("experiment=mnist/cup", "experiment=mnist/cup: there is no such experiment; did you mean mnist/cpu?"),
    ("-m --cfg job", "Only one of --run, --multirun, --cfg, --info and"),
    ("seed=1 --cfg job seed=2", "seed=2: an option stands between this and other settings"),
    ("--lr=3", "--lr=3: no such option; type settings as key=value"),
    ("dataset.path=x.npz", "dataset.path: this dataset has no such setting; type dataset=NAME, too"),
    ("hydra/sweeper=optuna", "others are plugins: see pixelcnn_lit/training/README.md"),
    ("dataset.batch_size=5000", "more than the 1297 training images; type dataset.batch_size=324, for example"),
    ("logger=[csv,tensorboad]", "logger=tensorboad: there is no such logger; did you mean tensorboard?"),
    ("model.n_residul=3", "there is no such setting; did you mean model.n_residual?"),
    ("modle.n_residual=3", "there is no such setting; did you mean model.n_residual?"),
    ("n_residual=3", "n_residual: there is no such setting; did you mean model.n_residual?"),
    ("model=pixel_attention,row_lstm n_head=1 -m", "did you mean model.n_heads?"),
    ("~n_residual", "n_residual: there is no such setting; did you mean model.n_residual?"),
    ("model.n_residual=-1", "model.n_residual=-1: must be a whole number >= 1"),
    ("model.n_residual=abc", "model.n_residual=abc: must be a whole number >= 1"),
    ("model.n_residual=2.5", "model.n_residual=2.5: must be a whole number >= 1"),
    ("model.n_residual=", "model.n_residual"),
    ("likelihood.colour=red", "likelihood.colour=red: must be one of autoregressive, independent"),
    ("conditional=1", "conditional=1: must be true or false"),
    ("+model.depth=3", "model.depth: there is no such setting"),
    ("optimizer._target_=torch.optim.RMSProp", "there is no RMSProp in torch.optim; did you mean RMSprop?"),
    ("optimizer.lr=fast", "optimizer.lr=fast: must be a number"),
    ("optimizer.lr=-1", "optimizer: Invalid learning rate"),
    ("likelihood.colour=grey", "likelihood.colour=grey: must be one of autoregressive, independent"),
    ("sampler.temperature=0", "sampler.temperature=0: must be a number >= 0.001"),
    ("sampler.n_per_class=0", "sampler.n_per_class=0"),
    ("dataset.batch_size=0", "dataset.batch_size=0: must be a whole number >= 1"),
    ("dataset.batch_size=5000", "more than the 1297 training images"),
    ("dataset.levels=300", "dataset.levels=300: must be a whole number >= 2 and <= 256"),
    ("dataset.levels=18", "digits has 17"),
    ("trainer.max_epochs=many", "trainer.max_epochs=many: must be a whole number"),
    ("trainer.precision=12", "trainer.precision=12"),
    ("trainer.accelerator=abacus", "trainer=auto fits any machine"),
    ("seed=-1", "seed=-1: must be a whole number >= 0"),
    ("label_dropout=2", "label_dropout=2: must be a number >= 0 and <= 1"),
    ("compile=maybe", "compile=maybe: must be true or false"),
    ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]: must be a list of 2"),
    ("callbacks.samples.every_n_epochs=abc", "callbacks.samples.every_n_epochs=abc: must be a whole number"),
    ("trainer.limit_val_batches=0", "trainer.limit_val_batches=0: leaves none of 16 batches to score"),
    ("trainer.check_val_every_n_epoch=2", "trainer.max_epochs=1: type at least trainer.check_val_every_n_epoch=2"),
    ("trainer.max_epochs=-1", "type trainer.max_epochs, trainer.max_steps or trainer.max_time"),
    ("+callbacks.clock={_target_:lightning.pytorch.callbacks.Timer} trainer.max_epochs=-1", "or trainer.max_time"),
    ("+scheduler.time_share=3", "scheduler.time_share: there is no such setting"),
    ("scheduler.hold=2", "scheduler.hold=2: must be a number >= 0 and <= 1"),
    ("model=pixel_attention model.n_heads=3", "n_heads=3: must divide"),
    ("ckpt=3", "ckpt=3: no run, and no checkpoint of one"),
    ("ckpt=missing.ckpt", "ckpt=missing.ckpt: no run, and no checkpoint of one; type RUN_DIR"),
    ("ckpt=[a]", "ckpt=['a']: no run, and no checkpoint of one"),
    ("ckpt=???", "ckpt is missing; type ckpt=..."),
    ("run_dir=null", "run_dir=null: must be a directory"),
    ("run_dir=${nowhere}", "Interpolation key 'nowhere' not found; where ${ stands for itself, type \\${ in quotes"),
    ("ckpt=last", "ckpt=last: of which run? type run_dir=DIRECTORY or run_name=NAME too"),
    ("n_residual", "n_residual: not an override; type model.n_residual=..."),
    ("scheduler=null", "a choice cannot be null; leave it out with ~NAME"),
    ("dataset=npz", "dataset.path is missing; type dataset.path=..."),
    ("dataset=npz dataset.path=absent.npz", "dataset.path=absent.npz: no such file"),
    ("dataset.download=true", "there is no such setting"),
    ("~model", "model"),
    ("~sampler", "sampler"),
    ("callbacks.ema=null", "callbacks.ema: must be settings with a _target_"),
    ("+callbacks.foo=3", "callbacks.foo: must be settings with a _target_"),
    ("model._target_=5", "model: must be settings with a _target_"),
    ("dataset._target_=5", "_target_=5: not a Images"),
    ("~callbacks.best._target_", "callbacks.best: must be settings with a _target_"),
    ("~callbacks.best", "callbacks.best: must keep the weights best on val/nll"),
    ("callbacks.best.monitor=val/bdp", "callbacks.best: must keep the weights best on val/nll"),
    ("+callbacks.stop={_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:val/ppl}", "val/ppl"),
    ("+callbacks.stop={_target_:lightning.pytorch.callbacks.EarlyStopping}", "callbacks.stop.monitor is missing"),
    ("+trainer.logger=false", "trainer.logger: is set by the program"),
    ("+trainer.enable_model_summary=true", "trainer.enable_model_summary: is set by the program"),
    ("+trainer.fast_dev_run=true", "type trainer.max_steps=1"),
    ("sampler.guidance_scale=2", "train one with label_dropout=0.1"),
    ("sampler.mix_with=77", "sampler.mix_with=77: this model was trained on 0, 1, 2"),
    ("trainer.limit_test_batches=0", "trainer.limit_test_batches=0: leaves none of 16 batches to score"),
    ("trainer.val_check_interval=0", "trainer"),
    ("trainer.val_check_interval=100", "val_check_interval"),
    ("trainer.check_val_every_n_epoch=0", "trainer"),
    ("trainer.accumulate_grad_batches=0", "accumulate_grad_batches"),
    ("trainer.devices=[0]", "trainer"),
    ("trainer.accelerator=tpu", "trainer"),
    ("trainer.precision=transformer-engine", "trainer"),
    ("trainer.precision=bf17", "trainer"),
]


@pytest.mark.parametrize(("overrides", "message"), TYPOS, ids=[overrides for overrides, _ in TYPOS])
def test_a_typo_gets_one_line(run, overrides, message):
    code, err = run("train", *TINY, *ONE_STEP, *overrides.split())
    assert code in (1, 2)
    assert message in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err


KEYS = {
    "lr": "did you mean optimizer.lr?",
    "model.lr": "did you mean optimizer.lr?",
    "max_epochs": "did you mean trainer.max_epochs?",
    "hidden_chanels": "did you mean model.hidden_channels?",
    "batch_size": "did you mean dataset.batch_size or sampler.batch_size?",
    "dataset.batch_sise": "did you mean dataset.batch_size?",
    "modle": "did you mean model?",
    "modle.n_residual": "did you mean model.n_residual?",
    "learning_rate": "did you mean optimizer.lr?",  # and not a monitor of it
    "trainer.foo": "choose from: accelerator, accumulate_grad_batches",
    "callbacks.sample": "did you mean callbacks.samples?",
    "seed.foo": "choose from: callbacks, channels_last",
    "model.n_residual.foo": "choose from: callbacks, channels_last",
    "callbacks.best.mode": "choose from: _target_, auto_insert_metric_name",  # and not `model`
}


def test_an_unknown_key_is_looked_for_in_all_groups():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train")
        settings = OmegaConf.to_container(config)
        for key, answer in KEYS.items():
            with pytest.raises(ConfigCompositionException) as unknown:
                compose("train", [f"{key}=3"])
            line = explain(unknown.value, lambda: settings)
            assert line.startswith(f"{key}: there is no such setting; {answer}"), line
            hinted = line.endswith(f"if its _target_ has it, type +{key}=...")
            assert hinted == (key == "callbacks.best.mode")
        for key, answer in {
            "lr": "optimizer.lr=...",
            "model.n_residual": "model.n_residual=...",
            "foo": "key=value",
        }.items():
            with pytest.raises(OverrideParseException) as nothing:
                compose("train", [key])
            assert explain(nothing.value, lambda: settings) == f"{key}: not an override; type {answer}, without spaces"


@pytest.mark.parametrize("way", ["debug=true", "HYDRA_FULL_ERROR"])
def test_the_traceback_is_there_for_those_who_ask(run, monkeypatch, way):
    if way == "HYDRA_FULL_ERROR":
        monkeypatch.setenv(way, "1")
    with pytest.raises(UserError):
        run("train", *TINY, *ONE_STEP, "model.n_residual=-1", *(["debug=true"] if way == "debug=true" else []))


def damage(path: str, out: str, how: str) -> str:
    content = bytearray(Path(path).read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = bytearray()
    else:
        with zipfile.ZipFile(path) as archive:  # in a weight: what lies between two of them, nothing reads
            largest = max(archive.namelist(), key=lambda name: archive.getinfo(name).file_size)
            content[content.index(archive.read(largest)) + 1] ^= 255
    Path(out).write_bytes(content)
    return out


@pytest.fixture
def copy(checkpoint, tmp_path) -> str:
    """The checkpoint in a copy of its run directory."""
    shutil.copytree(Path(checkpoint).parent.parent, tmp_path / "copy")
    return str(tmp_path / "copy" / "checkpoints" / "best.ckpt")


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped"])
@pytest.mark.parametrize("main", ["train", "sample", "evaluate"])
def test_a_damaged_checkpoint_gets_one_line(run, checkpoint, copy, main, how):
    code, err = run(main, f"ckpt={damage(checkpoint, copy, how)}")
    assert code == 1
    assert "damaged" in err
    assert len(err.strip().splitlines()) == 1, err


def npz(path: Path, size: int) -> list[str]:
    save_npz(path, (size, size), 60, 60, classes=10)
    return ["dataset=npz", f"dataset.path={path}", "dataset.batch_size=8", "dataset.num_workers=0"]


def test_a_checkpoint_of_another_dataset_is_refused_with_both_values(run, checkpoint, copy, tmp_path):
    other = npz(tmp_path / "x.npz", 4)
    code, err = run("evaluate", f"ckpt={checkpoint}", *other)
    assert (code, "its image_shape is [1, 8, 8], here it is [1, 4, 4]" in err) == (1, True)
    code, err = run("train", f"ckpt={copy}", *other)
    assert code == 1
    assert "dataset._target_ is pixelcnn_lit.data.digits.digits in the run and pixelcnn_lit.data.npz.npz here" in err
    # the same file name, but other images in it
    code, err = run("train", *TINY, *ONE_STEP, *other, f"run_dir={tmp_path}/run")
    assert code == 0
    npz(tmp_path / "x.npz", 5)
    code, err = run("train", f"run_dir={tmp_path}/run", "ckpt=last")
    assert (code, "its image_shape is [1, 4, 4], here it is [1, 5, 5]" in err) == (1, True)


def test_no_compiler_gets_a_line():
    assert "install one" in str(explain(InductorError(InvalidCxxCompiler(), None)))


def test_a_command_without_its_checkpoint_says_what_to_type(run, tmp_path):
    known = "the path of a .ckpt or .safetensors, a RUN_DIR, cifar10, mnist"
    for name in ("sample", "evaluate", "complete", "compress", "decompress", "export", "judge"):
        assert run(name) == (1, f"error: ckpt is missing; type ckpt= and {known}\n")
    (tmp_path / "runs" / "train" / "first").mkdir(parents=True)
    meant = "ckpt=first: no such file; did you mean runs/train/first?"
    assert run("sample", "ckpt=first") == (1, f"error: {meant} type {known}\n")
    assert run("judge", "ckpt=mnist") == (
        1,
        f"error: classifier_ckpt is missing; type classifier_ckpt= and {known[:46]}\n",
    )
    assert run("compress", "ckpt=mnist") == (1, "error: out is missing; type out=...\n")


def test_what_torch_alone_knows_is_checked_before_lightning_is_imported(run, monkeypatch):
    monkeypatch.setattr(pixelcnn_lit.runs.command, "_imported", lambda name: pytest.fail("it was imported first"))
    for name, wrong in (
        *[("train", wrong) for wrong in ("model.n_residual=-1", "optimizer.lr=fast", "scheduler.hold=2")],
        *[("train", wrong) for wrong in ("likelihood.colour=grey", "sampler.temperature=0")],
        *[("sample", "ckpt=missing.ckpt"), ("judge", "classifier_ckpt=~/missing.ckpt"), ("decompress", "ckpt=runs")],
    ):
        code, err = run(name, *(["ckpt=mnist"] if name == "judge" else []), wrong)
        assert (code, len(err.splitlines())) == (1, 1)
        assert err.startswith(f"error: {wrong.replace('~', os.path.expanduser('~'))}: ")


def test_what_is_checked_first_does_not_import_lightning():
    """Whatever is chosen in those groups."""
    chosen = {
        group: list((CONF / group).glob("*.yaml"))
        for group in ("model", "likelihood", "sampler", "optimizer", "scheduler")
    }
    targets = [
        (group, re.search(r"^_target_: (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE))
        for group in chosen
        for path in chosen[group]
    ]
    parts = [{group: {"_target_": found[1]}} for group, found in targets if found]
    assert len(parts) > 10
    code = f"import sys; from pixelcnn_lit.config.build import check_parts\nfor part in {parts}: check_parts(part)\n"
    code += "assert 'torch' in sys.modules; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def test_a_class_the_model_does_not_know_is_refused(run, checkpoint):
    for classes in ("[3,11]", "[10]", "[]"):  # 10 would be "no class", which this model never saw
        code, err = run("sample", f"ckpt={checkpoint}", f"classes={classes}")
        assert code == 1
        assert "this model was trained on 0, 1, 2" in err
    code, err = run("evaluate", f"ckpt={checkpoint}", "split=tset")
    assert code == 1
    assert "split=tset: must be one of train, validation, test" in err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.n_residual=3", "model.n_residual is 2 in the run and 3 here"),
        ("seed=3", "seed is 0 in the run and 3 here"),
        ("model_size=small", "model.hidden_channels is 16 in the run and 64 here"),
        ("~scheduler", "may be changed when a run is resumed"),
        ("callbacks=samples", "saved with callbacks=default; type that"),
        ("trainer.max_epochs=abc", "trainer.max_epochs=abc: must be a whole number"),
    ],
)
def test_a_resumed_run_keeps_its_own_settings_or_not_at_all(run, copy, override, message):
    before = {path: path.read_bytes() for path in Path(copy).parent.iterdir()}
    code, err = run("train", f"ckpt={copy}", override)
    assert code == 1
    assert message in err
    assert len(err.strip().splitlines()) == 1, err
    assert before == {path: path.read_bytes() for path in Path(copy).parent.iterdir()}


def test_a_directory_that_holds_a_run_is_not_overwritten(run, copy):
    directory = Path(copy).parent.parent
    code, err = run("train", *TINY, *ONE_STEP, f"run_dir={directory}")
    assert code == 1
    assert "holds a run; type ckpt=last to resume, or another run_dir or run_name" in err
    code, err = run("train", f"run_dir={directory}2", "ckpt=last")
    assert code == 1
    assert f"nothing was saved there yet; did you mean run_dir={relative(directory)}?" in err
    code, err = run("train", f"ckpt={copy}", "run_dir=elsewhere")
    assert code == 1
    assert "of another run; leave out run_dir" in err
    (directory / "config.yaml").write_text("a: [")
    code, err = run("train", f"ckpt={copy}")
    assert code == 1
    assert "config.yaml: damaged" in err


def test_untrusted_settings_run_nothing(run, copy):
    """config.yaml is read when a run is resumed."""
    directory = Path(copy).parent.parent
    config = (directory / "config.yaml").read_text()
    target = "lightning.pytorch.callbacks.LearningRateMonitor"
    assert target in config
    for bad in ("os.system", "lightning.pytorch.callbacks.lr_monitor.torch.os.system", "lightning.pytorch.Trainer"):
        (directory / "config.yaml").write_text(config.replace(target, bad))
        code, err = run("train", f"run_dir={directory}", "ckpt=last")
        assert code == 1
        assert f"_target_={bad}: not a Callback" in err


@pytest.mark.parametrize("key", ["dirpath", "exclude_batches_path", "save_dir", "filename"])
def test_untrusted_settings_write_nothing_elsewhere(run, copy, tmp_path, key):
    directory = Path(copy).parent.parent
    settings = OmegaConf.load(directory / "config.yaml")
    settings.callbacks.last[key] = f"{tmp_path}/elsewhere"
    OmegaConf.save(settings, directory / "config.yaml")
    code, err = run("train", f"run_dir={directory}", "ckpt=last")
    assert code == 1
    assert f"callbacks.last would write elsewhere; remove its {key}" in err


@pytest.mark.parametrize("content", [{"lr": 1}, torch.zeros(3), [], {"hyper_parameters": {"lr": 1}, "state_dict": {}}])
def test_a_checkpoint_of_another_program_gets_one_line(run, tmp_path, content):
    torch.save(content, tmp_path / "x.ckpt")
    code, err = run("sample", f"ckpt={tmp_path}/x.ckpt")
    assert code == 1
    assert "not a checkpoint of this program" in err


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.optim.adam.torch.os.system",
        "pixelcnn_lit.runs.command.os.system",
        "pixelcnn_lit.density.load.load",
        "pixelcnn_lit.models.pixelcnn.nn.Linear",
        "pixelcnn_lit.models.absent.Net",
    ],
)
def test_a_target_is_a_class_of_ours_or_nothing(target):
    with pytest.raises(UserError, match="not a Module"):
        resolve(target, torch.nn.Module)


def test_a_checkpoint_that_names_a_foreign_target_runs_nothing(run, checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["model"]["_target_"] = "torch.optim.adam.torch.os.system"
    torch.save(content, tmp_path / "x.ckpt")
    code, err = run("sample", f"ckpt={tmp_path}/x.ckpt")
    assert code == 1
    assert "_target_=torch.optim.adam.torch.os.system: not a Module" in err


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("went_off",)


def test_a_checkpoint_with_code_in_it_runs_nothing(run, tmp_path):
    torch.save({"hyper_parameters": Bomb()}, tmp_path / "x.ckpt")
    code, err = run("sample", f"ckpt={tmp_path}/x.ckpt")
    assert code == 1
    assert "not a checkpoint of plain values" in err
    assert not (tmp_path / "went_off").exists()


def test_types_fit_as_people_write_them():
    assert matches(1, float)
    assert not matches(True, int)
    assert not matches(1.5, int)
    assert matches(None, int | None)
    assert matches([0.9, 0.99], tuple[float, float])
    assert not matches(["a"], list[int])
    assert not matches(0, Annotated[int, Ge(1)])
    assert matches(None, Annotated[int | None, Ge(1)])


def test_too_little_memory_is_answered_in_one_line():
    for error in (
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
    ):
        line = explain(error)
        assert line.startswith("out of memory; type a smaller batch_size")
        assert "\n" not in line
    assert explain(RuntimeError("a fault of the program")) is None


def test_a_sweep_for_slurm_away_from_slurm_gets_one_line():
    line = explain(RuntimeError('Could not detect "srun", are you indeed on a slurm cluster?'))
    assert line == "hydra/launcher=submitit_slurm: there is no srun here; type it on a machine of the cluster"
