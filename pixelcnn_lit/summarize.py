"""Show the table and the curves of a sweep, best first.

    python -m pixelcnn_lit.summarize runs/train/SWEEP
    python -m pixelcnn_lit.summarize runs/train

The directory is that of a sweep, or any that holds runs. Those without a result follow the table, with the reason.
"""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pixelcnn_lit.runs.help import page
from pixelcnn_lit.runs.run_dir import relative
from pixelcnn_lit.runs.saved import CONFIG
from pixelcnn_lit.runs.terminal import print_what_can_be_printed

FIGURES = ("bpd", "accuracy")  # of density models, of classifiers
LEFT_OUT = ("nll", "bpd_standard_error", "nats_per_image", "loss", "images")  # of those of a validation
COLUMNS = ("n_params", "images_per_second", "seconds")


def main() -> None:
    print_what_can_be_printed()
    if sys.argv[1:] in (["--help"], ["-h"]):
        print(page("summarize"))
        return
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("error: type python -m pixelcnn_lit.summarize DIRECTORY, the directory of a sweep (or of many runs)")
    if not summarize(Path(sys.argv[1])):
        sys.exit(f"error: {sys.argv[1]}: no runs in it")


def summarize(directory: Path) -> bool:
    """Print the table of the runs in a directory, and draw their curves; returns whether there are any."""
    jobs = sorted(path.parent.parent for path in directory.rglob("hydra/hydra.yaml") if _trains(path.parent.parent))
    done = {job: json.loads((job / "result.json").read_bytes()) for job in jobs if (job / "result.json").is_file()}
    for figure in FIGURES:
        scored = {job: result for job, result in done.items() if f"test/{figure}" in result}
        _table(scored, figure)
        _curves(scored, figure, directory)
    for job in jobs:
        if job not in done:
            overrides = shlex.join(_typed(job))
            print(f"{'failed':>19}  {job}: {overrides}\n{'':>19}  {_reason(job)}")
    return bool(jobs)


def _table(done: dict[Path, dict[str, Any]], figure: str) -> None:
    if not done:
        return
    found = dict.fromkeys(key for result in done.values() for key in result if key.startswith("val/"))
    own = [key for key in found if key.removeprefix("val/") not in (figure, *LEFT_OUT)]  # figures of somebody's own
    columns = (f"val/{figure}", f"test/{figure}", *own, *COLUMNS)
    sign = 1 if figure == "bpd" else -1
    print(*(f"{column:>19}" for column in columns), " job: overrides", sep="")

    def order(job: Path) -> tuple[str, float]:
        return done[job]["label"], sign * done[job].get(columns[0], 0.0)  # without validation all are alike

    label = None
    for job in sorted(done, key=order):
        result = done[job]
        if result["label"] != label:  # figures of different images do not compare
            label = result["label"]
            print(label)
        cells = (_cell(result.get(column, "-")) for column in columns)
        print(*(f"{cell:>19}" for cell in cells), f"  {job}: {shlex.join(result['overrides'])}", sep="")


def _curves(done: dict[Path, dict[str, Any]], figure: str, directory: Path) -> None:
    """Draw the validations of runs over the images that each had been trained on, beside their table."""
    alike = set.intersection(*(set(result["overrides"]) for result in done.values())) if done else set()
    lines = {}
    for job, result in done.items():
        own = [override for override in result["overrides"] if override not in alike]
        points = [(each["images"], each[f"val/{figure}"]) for each in result.get("history", [])]
        if points:
            lines[f"{job.relative_to(directory)}: {shlex.join(own)}"] = points
    if lines:
        from pixelcnn_lit.scoring.plots import show_lines  # not above: a table alone needs no matplotlib

        path = show_lines(lines, "images of training", f"val/{figure}", directory / f"curves_{figure}.png")
        print(f"curves: {relative(path)}")


def _trains(job: Path) -> bool:
    config_name = OmegaConf.load(job / "hydra" / "hydra.yaml").hydra.job.config_name
    return (job / CONFIG).is_file() or str(config_name).startswith("train")


def _typed(job: Path) -> list[str]:
    """A run that began has its overrides in its settings; one that was refused only where Hydra put them."""
    began = (job / CONFIG).is_file()
    left: Any = OmegaConf.to_container(OmegaConf.load(job / CONFIG if began else job / "hydra" / "overrides.yaml"))
    return left["overrides"] if began else left


def _cell(value: int | float | str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if value < 100 else f"{value:.0f}"


def _reason(job: Path) -> str:
    error = job / "error.txt"
    return (
        error.read_text(encoding="utf-8").strip()
        if error.is_file()
        else "it left neither result.json nor error.txt: interrupted, or running"
    )


if __name__ == "__main__":
    main()
