"""Score a checkpoint on a split: bits per dimension overall and per class, as a table and as JSON."""

import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pixelcnn_lit.command import command, run_dir
from pixelcnn_lit.data.module import image_data, uniform_bpd
from pixelcnn_lit.errors import UserError
from pixelcnn_lit.lit import load, require_same_data
from pixelcnn_lit.machine import make_trainer


@command("evaluate")
def main(cfg: DictConfig) -> None:
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # pyright: ignore[reportAssignmentType]
    model = load(config["ckpt"])
    data = image_data(config.get("dataset") or model.hparams["dataset"])
    data.setup()
    require_same_data(config["ckpt"], model.hparams, data.facts)
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    if config["split"] not in splits:
        raise UserError(f"split={config['split']}: type one of {', '.join(splits)}")
    trainer = make_trainer(config["trainer"], logger=False, enable_checkpointing=False)
    trainer.test(model, data.score_dataloader(splits[config["split"]]), verbose=False)
    figures = {key.removeprefix("test/"): float(value) for key, value in trainer.callback_metrics.items()}
    per_class = dict(zip(data.class_names, model.bpd_per_class, strict=True))
    result = {
        "label": data.label,
        "split": config["split"],
        "images": len(splits[config["split"]]),
        **figures,
        "uniform_bpd": uniform_bpd(data.levels),
        "bpd_per_class": per_class,
        "checkpoint": config["ckpt"],
    }
    (run_dir() / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"{data.label}, {config['split']} split, {result['images']} images, "
        f"{uniform_bpd(data.levels):.4f} bpd for a uniform model"
    )
    width = max(map(len, [*per_class, "all"]))
    for name, bpd in {**per_class, "all": figures["bpd"]}.items():
        print(f"{name:>{width}}  {bpd:.4f} bpd")
    print(run_dir() / "evaluation.json")


if __name__ == "__main__":
    main()
