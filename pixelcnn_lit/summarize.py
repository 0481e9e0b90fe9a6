"""Show the table and the curves of a sweep, best first.

    python -m pixelcnn_lit.summarize runs/train/SWEEP
    python -m pixelcnn_lit.summarize runs/train
    python -m pixelcnn_lit.summarize check=runs/train/ENTRY

The directory is that of a sweep, or any that holds runs. Those without a result follow the table, with the reason.
"seconds" are those of a whole run, from its start to its test.

Where a sweep repeats each choice of settings with several seeds, each is compared with the first, seed by seed: the
mean of the differences of the validation, and its standard error.

`check=` scores the runs in a directory once more, as entries of a race, and restores the images of their proof.plc.
"""

import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pixelcnn_lit.runs.help import page
from pixelcnn_lit.runs.run_dir import relative
from pixelcnn_lit.runs.saved import CONFIG
from pixelcnn_lit.runs.terminal import print_what_can_be_printed, survive_closed_pipes

FIGURES = ("bpd", "accuracy")  # of density models, of classifiers
LEFT_OUT = ("nll", "bpd_standard_error", "nats_per_image", "loss", "images", "fingerprint")  # of those of a validation
IN_ALL = ("images_per_second", "seconds")  # of the whole run: few digits are enough
COLUMNS = ("n_params", *IN_ALL)


def main() -> None:
    print_what_can_be_printed()
    if sys.argv[1:] in (["--help"], ["-h"]):
        print(page("summarize"))
        return
    if len(sys.argv) != 2:
        sys.exit("error: give the directory of a sweep, or of many runs: python -m pixelcnn_lit.summarize DIRECTORY")
    directory = Path(sys.argv[1].removeprefix("check="))
    if not directory.is_dir():
        sys.exit(f"error: {directory}: no such directory")
    if sys.argv[1].startswith("check="):
        from pixelcnn_lit.codec.entry import check_all  # not above: tables need no torch

        check_all(directory)
    elif not summarize(directory):
        sys.exit(f"error: {directory}: no runs in it")


def summarize(directory: Path) -> bool:
    """Print the table of the runs in a directory, and draw their curves; returns whether there are any."""
    jobs = sorted(path.parent.parent for path in directory.rglob("hydra/hydra.yaml") if _trains(path.parent.parent))
    done = {job: json.loads((job / "result.json").read_bytes()) for job in jobs if (job / "result.json").is_file()}
    for figure in FIGURES:
        scored = {job: result for job, result in done.items() if f"test/{figure}" in result}
        if scored:
            _table(scored, figure)
            _pairs(scored, figure)
            _curves(scored, figure, directory)
    for job in jobs:
        if job not in done:
            state, reason = _state(job)
            print(f"{state:>19}  {job}: {shlex.join(_typed(job))}\n{'':>19}  {reason}")
    return bool(jobs)


def _table(done: dict[Path, dict[str, Any]], figure: str) -> None:
    found = dict.fromkeys(key for result in done.values() for key in result if key.startswith("val/"))
    own = [key for key in found if key.removeprefix("val/") not in (figure, *LEFT_OUT)]  # figures of somebody's own
    columns = (f"val/{figure}", f"test/{figure}", *own, *COLUMNS)
    sign = 1 if figure == "bpd" else -1
    alike = _alike(done)
    if alike:
        print(f"all with: {shlex.join(alike)}")
    print(*(f"{column:>19}" for column in columns), " job: overrides", sep="")

    def order(job: Path) -> tuple[str, float]:
        return _scored_on(done[job]), sign * done[job].get(columns[0], 0.0)  # without validation all are alike

    before = None
    for job in sorted(done, key=order):
        result = done[job]
        if _scored_on(result) != before:
            before = _scored_on(result)
            print(before)
        cells = [_cell(column, result.get(column, "-")) for column in columns]
        if error := result.get("test/bpd_standard_error"):
            cells[1] += f" ± {error:.4f}"
        print(*(f"{cell:>19}" for cell in cells), f"  {job}: {shlex.join(_own(result, alike))}", sep="")


def _pairs(done: dict[Path, dict[str, Any]], figure: str) -> None:
    """Print how each choice of settings differs from the first one, where both ran with the same seeds, three or more.

    By the validation alone: the test set selects nothing.
    """
    alike = _alike(done)
    by_label: dict[str, dict[tuple[str, ...], dict[str, float]]] = {}
    for result in done.values():
        if f"val/{figure}" in result:
            own = _own(result, alike)
            choice = tuple(sorted(override for override in own if not override.startswith("seed=")))
            seed = next((override for override in own if override.startswith("seed=")), "")
            by_label.setdefault(_scored_on(result), {}).setdefault(choice, {})[seed] = result[f"val/{figure}"]
    for by_choice in by_label.values():
        first, *others = by_choice
        for choice in others:
            common = by_choice[first].keys() & by_choice[choice].keys()
            differences = [by_choice[choice][seed] - by_choice[first][seed] for seed in common]
            if len(differences) >= 3:
                mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
                print(
                    f"val/{figure}, {len(differences)} pairs by seed: {abs(mean):.4f} ± {error:.4f} "
                    f"{'lower' if mean < 0 else 'higher'} with {shlex.join(choice) or 'nothing more'} than with "
                    f"{shlex.join(first) or 'nothing more'}"
                )


def _alike(done: dict[Path, dict[str, Any]]) -> list[str]:
    """Return the overrides that several runs have in common."""
    first, *others = (_in_force(result) for result in done.values())
    return [each for each in first if others and all(each in other for other in others)]


def _own(result: dict[str, Any], alike: list[str]) -> list[str]:
    return [override for override in _in_force(result) if override not in alike]


def _in_force(result: dict[str, Any]) -> list[str]:
    """Return the overrides of a run, of each key the last one: what was typed when it was resumed comes last."""
    last = {override.lstrip("+~").partition("=")[0]: override for override in result["overrides"]}
    return list(last.values())


def _scored_on(result: dict[str, Any]) -> str:
    """The images that a run is scored on: figures of different ones do not compare."""
    validation = f"{result['val/images']} validation and " if "val/images" in result else ""
    return f"{result['label']}: {validation}{result['test/images']} test images"


def _curves(done: dict[Path, dict[str, Any]], figure: str, directory: Path) -> None:
    """Draw the validations of runs over the images that each had been trained on, a panel for each dataset."""
    alike = _alike(done)
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for job, result in done.items():
        points = [(each["images"], each[f"val/{figure}"]) for each in result.get("history", [])]
        if points:
            name = f"{job.relative_to(directory)}: {shlex.join(_own(result, alike))}".removesuffix(": ")
            panels.setdefault(result["label"], {})[name] = points
    if panels:
        from pixelcnn_lit.scoring.plots import show_lines  # not above: a table alone needs no matplotlib

        path = show_lines(panels, "training images seen", f"val/{figure}", directory / f"curves_{figure}.png")
        print(f"curves: {relative(path)}")


def _trains(job: Path) -> bool:
    config_name = OmegaConf.load(job / "hydra" / "hydra.yaml").hydra.job.config_name
    return (job / CONFIG).is_file() or str(config_name).startswith("train")


def _typed(job: Path) -> list[str]:
    """A run that began has its overrides in its settings; one that was refused only where Hydra put them."""
    began = (job / CONFIG).is_file()
    left: Any = OmegaConf.to_container(OmegaConf.load(job / CONFIG if began else job / "hydra" / "overrides.yaml"))
    return left["overrides"] if began else left


def _cell(column: str, value: int | float | str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (column in IN_ALL and value >= 10):
        return f"{value:,.0f}"
    return f"{value:.1f}" if column in IN_ALL else f"{value:.4f}"


def _state(job: Path) -> tuple[str, str]:
    """Return whether a run without a result failed or has not finished, and what is known of it."""
    error = job / "error.txt"
    if error.is_file():
        return "failed", error.read_text(encoding="utf-8").strip()
    return "unfinished", "it has left neither result.json nor error.txt: it was interrupted, or is running"


if __name__ == "__main__":
    survive_closed_pipes()
    main()
