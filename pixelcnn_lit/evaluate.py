"""Score a checkpoint on a split: bits per dimension overall and per class, as a table and as JSON."""

import json
from typing import Any, Literal

from pixelcnn_lit.checkpoints import write_text
from pixelcnn_lit.command import command, run_dir, shown
from pixelcnn_lit.data.module import saved_or_given, uniform_bpd
from pixelcnn_lit.lit import load, require_same
from pixelcnn_lit.machine import make_trainer


@command("evaluate")
def main(
    ckpt: str, split: Literal["train", "validation", "test"], dataset: dict[str, Any], trainer: dict[str, Any]
) -> None:
    model = load(ckpt)
    data = saved_or_given(model.hparams["dataset"], dataset)
    data.setup()
    require_same(ckpt, dict(model.hparams), data.facts)
    scorer = make_trainer(trainer, logger=False, enable_checkpointing=False)
    data.test = getattr(data, split)  # so that Lightning asks for it, process by process
    scorer.test(model, data, verbose=False)
    figures = {key.removeprefix("test/"): value for key, value in model.figures.items()}
    # A class without images has no bpd.
    per_class = {n: b for n, b in zip(data.class_names, model.bpd_per_class, strict=True) if b == b}
    uniform = uniform_bpd(data.levels)
    head = {"label": data.label, "split": split, "images": model.images_scored, "checkpoint": ckpt}
    result = {**head, **figures, "uniform_bpd": uniform, "bpd_per_class": per_class}
    if not scorer.is_global_zero:
        return
    write_text(run_dir() / "evaluation.json", json.dumps(result, indent=2))
    print(f"{data.label}, {split} split, {model.images_scored} images, {uniform:.4f} bpd for a uniform model")
    width = max(map(len, [*per_class, "all"]))
    for name, bpd in {**per_class, "all": figures["bpd"]}.items():
        print(f"{name:>{width}}  {bpd:.4f} bpd")
    print(shown(run_dir() / "evaluation.json"))


if __name__ == "__main__":
    main()
