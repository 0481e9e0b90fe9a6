"""What is printed can be typed, in any encoding; what is typed arrives, or is answered with what to type."""

import errno
import io
import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import command, leave_run
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.fabric.strategies.launchers.subprocess_script import _hydra_subprocess_cmd
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf
from PIL import Image

import pixelcnn_lit.data.__main__
import pixelcnn_lit.decompress
import pixelcnn_lit.runs.command
import pixelcnn_lit.runs.run_dir
import pixelcnn_lit.summarize
from pixelcnn_lit import train, train_classifier
from pixelcnn_lit.config.build import check
from pixelcnn_lit.config.errors import explain
from pixelcnn_lit.config.quoting import setting
from pixelcnn_lit.runs import launch
from pixelcnn_lit.runs.atomic import atomic_write_text
from pixelcnn_lit.runs.command import CONF
from pixelcnn_lit.runs.run_dir import run_dir
from pixelcnn_lit.runs.terminal import progress
from pixelcnn_lit.training import run as training_run
from pixelcnn_lit.training.loggers import where_to_look
from pixelcnn_lit.training.sample_grid import SampleGrid

ODD = " \t'\"\\$ `!#&()*,;:<=>?@[]^{|}~%+-./é日${${b}a3"
NASTY = [
    *("a b", " a", "b ", "a(b", "a)b", "f(x)", "choice(a,b)", "a,b", "#b", "a[b]", "[b", "[a,b]", "{a:b}", "{b", "a=b"),
    *(
        "a'b",
        "'a'",
        'a"b',
        "a$b",
        "$HOME",
        "${b}",
        "a${b}c",
        "\\${b}",
        "a\\b",
        "a\\",
        '\\"',
        "*",
        "a?b",
        "~",
        "~/x",
        "~x",
    ),
    *("é", "日本", "a;b", "a|b", "a&b", "`id`", "!!", "a:b", "a::b", "-b", "--help", "null", "true", "3", "1e3", "007"),
    *("???", "x/epoch=3-step=81.ckpt", "a\tb", "a\nb", "s3://b", "a%sb"),
]
RNG = random.Random(0)
NASTY += ["".join(RNG.choices(ODD, k=RNG.randrange(1, 9))) for _ in range(300)]
WORST = "a b(c,d)#[e]='f\"g$h${i}\\{j}*?~é;&|`k`\\"  # a name for a directory
FEW = ["trainer.max_epochs=1", "trainer.limit_train_batches=1", "trainer.limit_val_batches=1", "~callbacks.samples"]
FEW += ["model_size=tiny", "trainer=cpu", "trainer.limit_test_batches=1", "trainer.log_every_n_steps=1"]


def value(override: str) -> str:
    """What a command is given that has `override` on its command line."""
    read = OverridesParser.create().parse_override(override).value()
    config = OmegaConf.create({"key": None, "other": "${key}"})
    OmegaConf.update(config, "key", read)
    assert config.other == config.key
    return config.key


def pasted(lines: list[str]) -> list[list[str]]:
    """The arguments that programs get when these lines are pasted into a shell."""
    programs = "".join(f"{name}() {{ printf '%s\\0' \"$@\"; printf '\\0'; }}\n" for name in ("python", "tensorboard"))
    shell = ["bash", "-c", programs + "\n".join(lines)]
    printed = subprocess.run(shell, capture_output=True, encoding="utf-8", timeout=60, check=True).stdout
    return [call.split("\0") for call in printed.removesuffix("\0\0").split("\0\0")]


@pytest.mark.parametrize("text", ["runs/a-1_2.b", "3", *NASTY[:50]])
def test_a_setting_is_read_as_it_was_meant(text):
    if text != "???":  # of which OmegaConf thinks that it is missing; `shown` writes ./???
        assert value(setting("key", text)) == text


def test_a_setting_that_needs_no_quotes_has_none():
    assert setting("run_dir", "runs/train/2026-01-01_00-00-00_2") == "run_dir=runs/train/2026-01-01_00-00-00_2"


def test_every_command_that_is_printed_can_be_pasted_into_a_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hydra_config = SimpleNamespace(job=SimpleNamespace(config_name="train"))
    monkeypatch.setattr(training_run.HydraConfig, "get", lambda: hydra_config)
    monkeypatch.setattr(training_run, "last_checkpoint", lambda directory: Path(__file__))
    figures = ("val/bpd", "test/bpd", "uniform_bpd", "images_per_second", "seconds", "val/accuracy", "test/accuracy")
    result = dict.fromkeys((*figures, "val/images", "test/images", "n_params"), 1)
    result |= {"label": "x", "checkpoint": "y", "test/accuracy_per_class": {"a": 1.0}}
    names, lines = [name for name in NASTY if not name.isspace()], []
    for name in names:
        directory = tmp_path / name
        training_run.print_resume_command(directory)
        lines.append(capsys.readouterr().out.partition("to resume, type: ")[2])
        logged = SimpleNamespace(loggers=[TensorBoardLogger(directory, name="", version="")])
        places = where_to_look(logged)
        for closing in (
            train.closing_lines(result, [], places),
            train_classifier.closing_lines(result, directory, places),
        ):
            lines.append(closing.partition("look at it:")[2])
    calls = pasted(lines)
    assert len(calls) == 3 * len(names)
    for name, resume, *boards in zip(names, calls[::3], calls[1::3], calls[2::3], strict=True):
        assert resume[:2] == ["-m", "pixelcnn_lit.train"]
        assert resume[3] == "ckpt=last"
        typed = value(resume[2].replace("run_dir=", "key=", 1))
        for path in (typed, *(board[1] for board in boards)):
            assert os.path.abspath(os.path.expanduser(path)) == str(tmp_path / name), name
            assert not path.startswith("-"), name


def test_directories_of_any_name_do_for_whatever_is_read_or_written(tmp_path, monkeypatch, capsys):
    """What is typed of them comes from a shell, into which the line that was printed was pasted."""
    (tmp_path / WORST).mkdir()
    monkeypatch.chdir(tmp_path / WORST)  # Hydra tells of it, too
    Path(WORST).mkdir()
    images, labels = np.full((40, 4, 4), 99, np.uint8), np.arange(40) % 2
    np.savez(Path(WORST, "x.npz"), train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) * 16).save(Path(WORST, "x.png"))
    npz = ["dataset=npz", setting("dataset.path", f"{WORST}/x.npz"), "dataset.batch_size=8", "dataset.num_workers=0"]
    run, ckpt = f"{WORST}/run", setting("ckpt", f"{WORST}/run/checkpoints/best.ckpt")
    command("train", *FEW, *npz, setting("run_dir", run))
    asked = []

    def stopped(run: training_run.Run, **settings: dict) -> None:
        asked.append((run.directory, run.start.absolute(), settings["dataset"]["path"]))
        raise training_run.Stopped(15)

    monkeypatch.setattr(train, "train", stopped)
    capsys.readouterr()
    again = ""
    for typed in ([ckpt, npz[0], npz[1].replace("x.npz", "y.npz")], [], [setting("ckpt", run)]):
        with pytest.raises(training_run.Stopped):
            command("train", *(typed or pasted([again])[0][2:]))
        again = capsys.readouterr().out.partition("to resume, type: ")[2]
    starts = [Path(run, "checkpoints", f"{name}.ckpt").absolute() for name in ("best", "last", "last")]
    paths = [f"{WORST}/{name}.npz" for name in ("y", "x", "x")]
    assert asked == [(Path(run).absolute(), *each) for each in zip(starts, paths, strict=True)]

    out = f"{WORST}/out"
    command("evaluate", ckpt, npz[1], "trainer=cpu", setting("run_dir", out))
    command("complete", ckpt, setting("image", f"{WORST}/x.png"), "label=0", setting("keep_mask", f"{WORST}/x.png"))
    command("export", ckpt, setting("out", f"{out}/x.safetensors"))
    exported = setting("ckpt", f"{out}/x.safetensors")
    np.savez(Path(WORST, "z.npz"), images=images)
    command("compress", exported, setting("images", f"{WORST}/z.npz"), setting("out", f"{out}/z.plc"))
    command("decompress", exported, setting("file", f"{out}/z.plc"), setting("out", f"{out}/z.npz"))
    with np.load(f"{out}/z.npz") as back:
        assert np.array_equal(back["images"][..., 0], images)
    assert {path.name for path in Path().iterdir()} == {WORST, "runs"}
    assert not Path("runs", "train").exists()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["summarize", WORST])
    pixelcnn_lit.summarize.main()
    assert shlex.join(npz[:2]) in capsys.readouterr().out


@pytest.mark.parametrize("sweep", [[], ["-m"]])
def test_the_processes_of_one_run_share_its_directory_whatever_its_name(tmp_path, monkeypatch, sweep):
    """Lightning starts them with the command line of the first and `hydra.run.dir`."""
    monkeypatch.chdir(tmp_path)
    seen = []

    def main(dataset: dict, augmented: bool, out: str | None, threads: int | None) -> None:
        seen.append((_hydra_subprocess_cmd(1), run_dir()))

    monkeypatch.setattr(pixelcnn_lit.data.__main__, "main", main)
    command("data", *sweep, setting("run_dir", WORST))
    ((typed, cwd), directory) = seen[0]
    assert directory == tmp_path / WORST / ("0" if sweep else "")
    assert cwd == str(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    command("data", *(word for word in typed if word.startswith("hydra.")))
    assert seen[1][1] == directory
    assert {path.name for path in tmp_path.iterdir()} == {WORST}


def answered(capsys, name: str, *overrides: str) -> str:
    """The line on which a command ends."""
    with pytest.raises(SystemExit) as stop:
        command(name, *overrides)
    assert isinstance(stop.value.code, str)
    assert "\n" not in stop.value.code
    return stop.value.code


@pytest.mark.parametrize("text", [text for text in NASTY[:60] if text.isprintable() and text == text.strip(" '")])
def test_a_text_arrives_as_it_is_typed_or_is_shown_as_it_arrives(text):
    """As `ckpt=x/epoch=3-step=81.ckpt`, which Lightning names so."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            read = compose("decompress", [f"file={text}"]).file
            if read != text.replace("\\$", "$"):  # as texts with interpolations are typed
                check("", pixelcnn_lit.decompress.main, {"file": read, "ckpt": "", "out": ""})
        except Exception as error:
            line = explain(error) or repr(error)
            assert "\n" not in line
            if "is missing" in line or "None" in line or "\\${ in quotes" in line:
                return  # what nobody means as a text, or could not
            if "..." not in line:
                (call,) = pasted(
                    ["python " + re.search(r"('?file=\\?\".*?\"'?)( for one|$)", line.partition(" type ")[2])[1]]
                )
                assert value(call[0].replace("file=", "key=")) == text


def test_a_home_directory_is_expanded_wherever_a_path_is_typed(tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    images, labels = np.full((40, 4, 4), 99, np.uint8), np.arange(40) % 2
    np.savez(home / "x.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    np.savez(home / "z.npz", images=images)
    Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) * 16).save(home / "x.png")
    npz = ["dataset=npz", "dataset.path=~/x.npz", "dataset.batch_size=8", "dataset.num_workers=0"]
    command("train", *FEW, *npz, "run_dir=~/run")
    command("train", "ckpt=~/run", "trainer.max_epochs=2")
    saved = OmegaConf.load(home / "run" / "config.yaml")
    assert saved.dataset.path == "~/x.npz"  # another machine may have another home
    ckpt = "ckpt=~/run/checkpoints/best.ckpt"
    command("evaluate", ckpt, "trainer=cpu", "task=ood", "dataset@ood=npz", "ood.path=~/x.npz")
    command("complete", ckpt, "image=~/x.png", "label=0", "keep_mask=~/x.png", 'run_dir="~/${n_images} images"')
    assert (home / "8 images" / "completions.png").is_file()
    command("compress", ckpt, "images=~/z.npz", "out=~/z.plc")
    command("decompress", ckpt, "file=~/z.plc", "out=~/pngs")
    assert (home / "pngs" / "0" / "000000.png").is_file()
    assert {path.name for path in here.iterdir()} == {"runs"}


class Screen(io.TextIOWrapper):
    """A standard output that remembers."""

    def __init__(self, encoding: str = "utf-8", terminal: bool = False) -> None:
        super().__init__(io.BytesIO(), encoding)
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@pytest.mark.parametrize("encoding", ["ascii", "cp1251"])
def test_what_an_encoding_cannot_hold_is_replaced(tmp_path, monkeypatch, encoding):
    """Whoever prints: a command, which may be a worker's of a sweep; what comes before it; the table of a sweep."""
    monkeypatch.setattr(sys, "stdout", Screen(encoding))
    command("data", f"run_dir={tmp_path}/data")
    assert "digits 1?8?8, 17 levels" in sys.stdout.text()

    monkeypatch.setattr(sys, "stdout", Screen(encoding))
    monkeypatch.setattr(launch, "exit_on_signals", lambda: None)
    monkeypatch.setattr(pixelcnn_lit.runs.command, "run", lambda name: print("1×8"))
    with pytest.raises(SystemExit):
        launch.launch("data")
    assert sys.stdout.text() == "1?8\n"

    monkeypatch.setattr(sys, "stdout", Screen(encoding))
    (tmp_path / "job" / "hydra").mkdir(parents=True)
    atomic_write_text(tmp_path / "job" / "hydra" / "hydra.yaml", "hydra: {job: {config_name: train}}")
    atomic_write_text(tmp_path / "job" / "hydra" / "overrides.yaml", "[]")
    atomic_write_text(tmp_path / "job" / "error.txt", "1×8: no")
    monkeypatch.setattr(sys, "argv", ["summarize", f"{tmp_path}/"])
    pixelcnn_lit.summarize.main()
    assert "1?8: no" in sys.stdout.text()


def test_a_run_by_the_clock_shows_how_much_of_it_is_left_and_all_that_is_waited_for(tmp_path, monkeypatch):
    """A bar for training, validation, test and drawing; without a terminal none."""
    by_the_clock = ["model_size=tiny", "trainer=cpu", "trainer.log_every_n_steps=1", "sampler.n_per_class=1"]
    by_the_clock += ["trainer.max_time=00:00:00:01", "trainer.max_epochs=9999"]
    screen = Screen(terminal=True)
    monkeypatch.setattr(sys, "stdout", screen)
    command("train", *by_the_clock, f"run_dir={tmp_path}/a")
    bars = screen.text().split("\r")
    training = [bar for bar in bars if bar.startswith("epoch 1") and "bpd=" in bar]
    assert training
    assert all("left=0:00:0" in bar and "<" not in bar for bar in training)
    assert all(len(line) < 80 for line in screen.text().replace("\r", "\n").splitlines() if "%" in line)
    for what in ("Validation", "Testing", "drawing"):
        assert any(bar.lstrip("\n").startswith(what) for bar in bars), what
    log = Screen()
    monkeypatch.setattr(sys, "stdout", log)
    command("train", *by_the_clock, "trainer.max_epochs=1", f"run_dir={tmp_path}/b")
    assert "\r" not in log.text()


def test_a_bar_is_shown_on_a_terminal_alone(monkeypatch):
    for terminal in (True, False):
        screen = Screen(terminal=terminal)
        monkeypatch.setattr(sys, "stdout", screen)
        assert list(progress(range(3), desc="reading")) == [0, 1, 2]
        assert ("reading" in screen.text()) == terminal


def test_a_run_by_epochs_shows_when_an_epoch_ends(tmp_path, monkeypatch):
    screen = Screen(terminal=True)
    monkeypatch.setattr(sys, "stdout", screen)
    command("train", *FEW, f"run_dir={tmp_path}")
    training = [bar for bar in screen.text().split("\r") if "bpd=" in bar]
    assert training
    assert all("left=" not in bar and "<00:00" in bar for bar in training)
    lines = [line for line in re.split("[\r\n]", screen.text()) if line.startswith("epoch 1/1, step")]
    assert len(lines) == 1, "a line an epoch stays above the bar"


@pytest.mark.long
@pytest.mark.parametrize("sweep", [[], ["-m", "seed=0,1"]])
def test_all_seconds_of_a_run_are_those_of_its_command_up_to_the_last_line(tmp_path, monkeypatch, capsys, sweep):
    now = [0]

    def slow(function, seconds):
        def slower(*arguments):
            now[0] += seconds
            return function(*arguments)

        return slower

    monkeypatch.setattr(pixelcnn_lit.runs.run_dir, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(train, "image_data", slow(train.image_data, 1000))
    monkeypatch.setattr(SampleGrid, "draw", slow(SampleGrid.draw, 100))
    few = [word for word in FEW if word != "~callbacks.samples"] + ["callbacks.samples.every_n_epochs=0"]
    command("train", *sweep, *few, "sampler.n_per_class=1", f"run_dir={tmp_path}/run")
    runs = [tmp_path / "run" / part for part in (("0", "1") if sweep else ("",))]
    assert [json.loads((run / "result.json").read_bytes())["seconds"] for run in runs] == [1100] * len(runs)
    assert capsys.readouterr().out.count("1100 s in all") == len(runs)
    command("train", f"ckpt={runs[0]}", "trainer.max_epochs=2")
    assert "2100 s in all" in capsys.readouterr().out  # its checkpoint was written before the first picture


@pytest.mark.parametrize(
    "typed", [["pixelcnn_lit"], ["pixelcnn_lit.sample", "--help"], ["pixelcnn_lit.summarize", "."]]
)
def test_output_that_nobody_reads_ends_no_program(tmp_path, capfd, typed):
    """As after `| head -1`."""
    leave_run(tmp_path, "train", [], val_bpd=1.0, test_bpd=1.0)
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        ended = subprocess.run([sys.executable, "-m", *typed], stdout=pipe, cwd=tmp_path)
    assert ended.returncode == 0
    assert capfd.readouterr().err == ""


def test_a_full_disk_is_named_by_the_file_that_was_asked_for(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as error:
        atomic_write_text(tmp_path / "asked.txt", "x")
    assert explain(error.value) == f"{tmp_path}/asked.txt: the disk is full; make room"
