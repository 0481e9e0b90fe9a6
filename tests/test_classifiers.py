"""Classifiers, what they say of samples, and a density model as one."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from helpers import command, killed, refused, save_npz
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import density, open_data
from torch import nn
from torchvision import models

from pixelcnn_lit.classifiers import networks
from pixelcnn_lit.classifiers.networks import ResidualBlock
from pixelcnn_lit.config.build import build
from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.density.bayes import marginal, posterior
from pixelcnn_lit.density.load import load
from pixelcnn_lit.lit.classifier_module import ClassifierModule, load_classifier
from pixelcnn_lit.runs.command import CONF
from pixelcnn_lit.scoring.posteriors import score
from pixelcnn_lit.scoring.samples import Features, diversity, frechet_distance, kernel_distance, nearest, read, verdict

NAMES = sorted(path.stem for path in (CONF / "classifier").glob("*.yaml"))
TINY = ["trainer=cpu", "trainer.log_every_n_steps=1", "trainer.precision=32-true", "dataset.num_workers=0"]


@pytest.fixture(scope="module")
def judge_run(tmp_path_factory) -> Path:
    """A narrow ResNet that has learned the digits a little."""
    directory = tmp_path_factory.mktemp("judge")
    small = ["classifier.width=8", "classifier.n_residual=1", "trainer.max_epochs=3"]
    command("train_classifier", *TINY, *small, f"run_dir={directory}")
    return directory


@pytest.fixture(scope="module")
def judge(judge_run) -> ClassifierModule:
    return load_classifier(str(judge_run / "checkpoints" / "best.ckpt"))


@pytest.fixture(scope="module")
def digits():
    return open_data()


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 17, 23)])
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("vgg16")])
def test_each_network_reads_images_of_any_size(name, shape):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose("train_classifier", [f"classifier={name}"]).classifier, resolve=True)
    net = build("classifier", config, nn.Module, image_shape=shape, num_classes=7)
    features = net.body(torch.randn(2, *shape))
    assert features.ndim == 2
    assert net.head(features).shape == (2, 7)


def test_the_gradients_of_a_narrow_residual_block_are_right():
    """A strided 1×1 convolution of fewer than 8 channels gets others from oneDNN in torch 2.15, where AVX2 is all."""
    torch.manual_seed(0)
    block, x = ResidualBlock(4, 8, stride=2), torch.randn(16, 4, 28, 28)
    gradients = []
    for kind in (torch.float32, torch.float64):
        block.to(kind, memory_format=torch.channels_last).zero_grad()
        block(x.to(kind, memory_format=torch.channels_last)).square().sum().backward()
        gradients.append([parameter.grad.double() for parameter in block.parameters()])
    for single, double in zip(*gradients, strict=True):
        assert (single - double).norm() < 1e-4 * double.norm() + 1e-2


@pytest.mark.parametrize(("name", "published"), [("CNN", 62_006), ("ConvBN", 430_346), ("VGG", 9_457_962)])
def test_a_classifier_of_cifar10_has_as_many_parameters_as_published(name, published):
    config = {"_target_": f"pixelcnn_lit.classifiers.networks.{name}"}
    net = build("classifier", config, nn.Module, image_shape=(3, 32, 32), num_classes=10)
    assert sum(parameter.numel() for parameter in net.parameters()) == published


SGD, ADAM = "torch.optim.sgd.SGD", "torch.optim.adam.Adam"
RECIPES = {
    "cnn": {
        "trainer.max_epochs": 2,
        "dataset.batch_size": 4,
        "optimizer": {"_target_": SGD, "lr": 1e-3, "momentum": 0.9},
        "scheduler": None,
    },
    "conv_bn": {
        "trainer.max_epochs": 20,
        "dataset.batch_size": 64,
        "dataset.random_crop": 0,
        "dataset.horizontal_flip": False,
        "optimizer": {"_target_": SGD, "lr": 1e-2},
        "scheduler": {"_target_": "torch.optim.lr_scheduler.ExponentialLR", "gamma": 0.9},
    },
    "vgg": {
        "trainer.max_epochs": 100,
        "dataset.batch_size": 32,
        "dataset.random_crop": 4,
        "dataset.horizontal_flip": True,
        "optimizer": {"_target_": ADAM, "lr": 1e-3},
        "scheduler": None,
    },
    "vgg16_finetuned": {
        "trainer.max_epochs": 30,
        "dataset.batch_size": 32,
        "dataset.horizontal_flip": True,
        "classifier.shift": 4,
        "classifier.train_convolutions": True,
        "classifier.mean": [0.4914, 0.4822, 0.4465],
        "optimizer": {"_target_": ADAM, "lr": 1e-4},
        "scheduler": None,
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_classifiers_recipe_is_the_published_one(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train_classifier", [f"classifier={name}"])
    assert {key: OmegaConf.select(cfg, key) for key in RECIPES[name]} == RECIPES[name]
    assert cfg.trainer.gradient_clip_val is None


def test_the_tutorials_network_scales_by_a_half_and_others_by_the_training_images():
    facts = {"mean": [0.3, 0.4, 0.5], "std": [0.1, 0.2, 0.3], "image_shape": [3, 32, 32], "num_classes": 2}
    facts |= {"levels": 256, "class_names": ["a", "b"], "label": "x", "dataset": {}, "optimizer": {}}
    for name, mean, std in (("CNN", [0.5], [0.5]), ("VGG", [0.3, 0.4, 0.5], [0.1, 0.2, 0.3])):
        config = {"_target_": f"pixelcnn_lit.classifiers.networks.{name}"}
        classifier = ClassifierModule(classifier=config, **facts)
        x = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
        by_hand = (x / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        assert torch.allclose(classifier.scaled(x), by_hand, atol=1e-6)
    whole = ClassifierModule(**facts | {"classifier": config, "mean": [0, 0, 0], "std": [1, 1, 1]})
    assert torch.equal(whole.scaled(x), x / 255)


def test_a_classifier_without_its_parts_gets_one_line(monkeypatch, tmp_path):
    class Bare(nn.Module):
        __module__ = networks.__name__

        def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
            super().__init__()

    monkeypatch.setattr(networks, "Bare", Bare, raising=False)
    said = refused(
        "train_classifier",
        f"classifier._target_={networks.__name__}.Bare",
        "~classifier.width",
        "~classifier.n_residual",
        f"run_dir={tmp_path}",
    )
    assert "Bare needs body and head" in said


def test_vgg16_keeps_its_convolutions_and_scales_images_as_they_were_trained():
    with torch.device("meta"):
        config = {"_target_": "pixelcnn_lit.classifiers.networks.VGG16Transfer", "weights": None}
        net = build("classifier", config, nn.Module, image_shape=(1, 28, 28), num_classes=10)
    trained = {name.split(".")[0] for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {"hidden", "head"}
    assert [m.out_features for m in net.modules() if isinstance(m, nn.Linear)] == [4096, 4096, 10]
    assert net.mean == (0.485, 0.456, 0.406)
    with torch.device("meta"):
        assert net.head(net.body(torch.empty(2, 1, 28, 28))).shape == (2, 10)


def test_vgg16_finetuned_trains_all_weights_and_shifts_each_image_on_its_own():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose("train_classifier", ["classifier=vgg16_finetuned"]).classifier)
    with torch.device("meta"):
        net = build("classifier", config, nn.Module, image_shape=(3, 32, 32), num_classes=10)
    assert all(parameter.requires_grad for parameter in net.parameters())
    mean, std = (torch.tensor(values)[:, None, None] for values in (net.mean, net.std))
    assert mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
    white = ((1 - mean) / std).expand(8, 3, 224, 224)
    seen = []
    net.convolutions.forward = lambda x: seen.append(x) or torch.empty(len(x), 512, 7, 7, device="meta")
    torch.manual_seed(0)
    net.train().body(white)
    net.eval().body(white)
    shifted, still = (images * std + mean for images in seen)
    assert torch.allclose(still, torch.ones(()), atol=1e-6)
    assert set(shifted.round(decimals=4).abs().unique().tolist()) == {0.0, 1.0}  # black came in
    corners = [tuple((image[0] > 0.5).nonzero()[0].tolist()) for image in shifted]
    assert len(set(corners)) > 1
    assert max(map(max, corners)) <= 4


def test_a_file_of_published_weights_is_downloaded_and_read(tmp_path, monkeypatch):
    """In the format of torchvision's, with all its shapes; that every tensor repeats one number makes it small."""
    with torch.device("meta"):
        sizes = {name: value.shape for name, value in models.vgg16().state_dict().items()}
    ones = {name: torch.ones(1).expand(size) for name, size in sizes.items()}
    torch.save(ones, tmp_path / "x.pth")
    checksum = hashlib.sha256((tmp_path / "x.pth").read_bytes()).hexdigest()
    file = (tmp_path / "x.pth").rename(tmp_path / f"vgg16-{checksum[:8]}.pth")
    assert file.stat().st_size < 100_000
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(models.VGG16_Weights.IMAGENET1K_V1.value, "url", file.as_uri())
    config = {"_target_": "pixelcnn_lit.classifiers.networks.VGG16Transfer"}
    with torch.device("meta"):
        net = build("classifier", config, nn.Module, image_shape=(3, 32, 32), num_classes=10)
    net.convolutions.to_empty(device="cpu")
    net.load_pretrained()
    assert all((parameter == 1).all() for parameter in net.convolutions.parameters())
    damaged = file.rename(tmp_path / "vgg16-00000000.pth")
    monkeypatch.setattr(models.VGG16_Weights.IMAGENET1K_V1.value, "url", damaged.as_uri())
    with pytest.raises(UserError, match=r"cannot be downloaded \(invalid hash value"):
        net.load_pretrained()


def test_published_weights_are_loaded_where_a_run_starts_and_what_fails_is_told_in_one_line(monkeypatch):
    with torch.device("meta"):
        config = {"_target_": "pixelcnn_lit.classifiers.networks.VGG16Transfer"}
        net = build("classifier", config, nn.Module, image_shape=(3, 32, 32), num_classes=10)
    for error in (OSError("no network"), RuntimeError('invalid hash value (expected "39", got "8d")')):

        def failing(*_, error=error, **__):
            raise error

        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", failing)
        with pytest.raises(UserError, match=r"cannot be downloaded .* classifier\.weights=null starts without"):
            net.load_pretrained()
    published = {f"features.{name}": torch.ones_like(p) for name, p in net.convolutions.state_dict().items()}
    published["classifier.0.weight"] = torch.zeros(1)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: published)
    net.load_pretrained()
    net.weights = "IMAGENET"
    with pytest.raises(UserError, match="type one of IMAGENET1K_V1"):
        net.load_pretrained()


def test_a_run_leaves_result_confusions_and_a_checkpoint_that_rebuilds_itself(judge_run, judge, digits):
    result = json.loads((judge_run / "result.json").read_text())
    assert result["test/images"] == 250
    assert result["test/accuracy"] > 0.5
    assert (judge_run / "confusion.png").is_file()
    with torch.no_grad():
        right = judge(digits.test.x).argmax(1) == digits.test.y
    assert result["test/accuracy"] == pytest.approx(float(right.double().mean()), abs=1e-9)
    per_class = {name: float(right[digits.test.y == n].double().mean()) for n, name in enumerate(digits.class_names)}
    assert result["test/accuracy_per_class"] == pytest.approx(per_class)


def test_images_are_scaled_by_the_statistics_of_the_training_images(judge, digits):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge.net.body, "forward", lambda x: seen.append(x) or x.flatten(1))
        judge.features(digits.train.x)
    assert float(seen[0].mean()) == pytest.approx(0, abs=1e-5)
    assert float(seen[0].std(correction=0)) == pytest.approx(1, abs=1e-5)
    with torch.no_grad():
        assert torch.equal(judge(digits.test.x), judge.net.head(judge.features(digits.test.x)))


@pytest.mark.long
def test_a_run_killed_and_gone_on_with_ends_like_one_never_killed(tmp_path):
    small = [*TINY, "classifier.width=4", "classifier.n_residual=1", "trainer.max_epochs=2"]
    small += ["trainer.limit_train_batches=5", "callbacks.last.every_n_steps=2", "dataset.batch_size=16"]
    command("train_classifier", *small, f"run_dir={tmp_path}/whole")
    whole = last_and_curve(tmp_path / "whole")
    for where, after in (("training_step", 8), ("validation_step", 1), ("validation_step", 17)):
        directory = tmp_path / f"{where}{after}"
        with killed(ClassifierModule, where, after):
            command("train_classifier", *small, f"run_dir={directory}")
        command("train_classifier", f"run_dir={directory}", "ckpt=last")
        cut = last_and_curve(directory)
        assert cut[1] == whole[1]
        assert val_figures(directory) == val_figures(tmp_path / "whole")
        assert all(torch.equal(whole[0][key], cut[0][key]) for key in whole[0] | cut[0])
    longer = ["trainer.max_epochs=3", f"run_dir={tmp_path}/whole", "ckpt=last"]
    command("train_classifier", *longer)
    assert json.loads((tmp_path / "whole" / "result.json").read_text())["epochs"] == 3


def val_figures(directory: Path) -> dict:
    result = json.loads((directory / "result.json").read_text())
    return {key: value for key, value in result.items() if key.startswith(("val/", "test/"))}


def last_and_curve(directory: Path) -> tuple[dict, set]:
    """Weights of the last checkpoint, and the mean training losses of the epochs in TensorBoard."""
    events = EventAccumulator(str(directory)).Reload()
    assert "confusion" in events.Tags()["images"]
    losses = {(event.step, repr(event.value)) for event in events.Scalars("train/loss")}
    return torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"], losses


def test_mistakes_get_one_line(judge_run, tmp_path):
    ckpt = f"{judge_run}/checkpoints/best.ckpt"
    said = refused("train_classifier", *TINY, "classifier=cnn", f"run_dir={tmp_path}/a")
    assert "wants images of 16×16 and more; type classifier=resnet" in said
    said = refused("train_classifier", "classifier.wdth=3", f"run_dir={tmp_path}/b")
    assert "did you mean classifier.width?" in said
    said = refused("evaluate", f"ckpt={ckpt}", f"run_dir={tmp_path}/c")
    assert "not a checkpoint of this program's density models" in said
    said = refused("judge", "ckpt=mnist", f"classifier_ckpt={ckpt}", f"run_dir={tmp_path}/d")
    assert "its image_shape is [1, 8, 8], here it is [1, 28, 28]" in said


# What a judge says


def test_consistency_of_real_test_images_is_the_test_accuracy(judge_run, judge, digits):
    drawn = read(judge, digits.test, batch_size=32)
    told = verdict(drawn, digits.test.y, read(judge, digits.train, 64), 10, n_compared=20)
    assert told.consistency == pytest.approx(json.loads((judge_run / "result.json").read_text())["test/accuracy"])


def test_figures_do_not_depend_on_the_batches(judge, digits):
    training, y = read(judge, digits.train, 64), digits.test.y[:200]
    by_7, at_once = (verdict(read(judge, digits.test[:200], n), y, training, 10, 15) for n in (7, 200))
    assert torch.equal(by_7.confusion, at_once.confusion)
    for name in ("consistency", "frechet", "kernel", "diversity"):
        assert getattr(by_7, name) == pytest.approx(getattr(at_once, name), rel=1e-3, abs=1e-4)


def test_distances_are_what_their_papers_say():
    torch.manual_seed(0)
    a = torch.randn(4000, 3, dtype=torch.float64)
    shifted = a * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([0.0, 3.0, 0.0])
    exact = (shifted.mean(0) - a.mean(0)).square().sum()
    cov_a, cov_b = a.T.cov(), shifted.T.cov()
    root = torch.linalg.eigvals(cov_a @ cov_b).sqrt().real.sum()
    assert frechet_distance(a, shifted) == pytest.approx(float(exact + (cov_a + cov_b).trace() - 2 * root), rel=1e-3)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-3)
    assert abs(kernel_distance(a, torch.randn(4000, 3, dtype=torch.float64))) < 0.1 < kernel_distance(a, shifted)


def test_diversity_is_within_classes_and_the_nearest_is_the_nearest():
    features, y = torch.tensor([[0.0], [1.0], [10.0], [14.0]]), torch.tensor([0, 0, 1, 1])
    assert diversity(features, y) == pytest.approx((1 + 4) / 2)
    assert nearest(torch.tensor([[0.9], [13.0]]), features).tolist() == [1, 3]
    copies = Features(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
    assert diversity(copies.features, y) == 0


def test_judge_tells_of_each_setting_beside_real_images(judge_run, tmp_path):
    small = ["model_size=tiny", *TINY, "trainer.limit_train_batches=2", "trainer.max_epochs=1", "sampler.n_per_class=1"]
    command("train", *small, "label_dropout=0.1", f"run_dir={tmp_path}/model")
    command(
        "judge",
        f"ckpt={tmp_path}/model/checkpoints/best.ckpt",
        f"classifier_ckpt={judge_run}/checkpoints/best.ckpt",
        "sampler.n_per_class=5",
        "temperatures=[1.0,0.5]",
        "guidance_scales=[1,2]",
        f"run_dir={tmp_path}/judge",
    )
    told = json.loads((tmp_path / "judge" / "judge.json").read_text())["verdicts"]
    assert len(told) == 5
    real = json.loads((judge_run / "result.json").read_text())
    assert told["real test images"]["consistency"] == pytest.approx(real["test/accuracy"])
    assert told["real test images"]["consistency_per_class"] == list(real["test/accuracy_per_class"].values())
    assert told["real test images"]["consistency"] > told["temperature 1, guidance 1"]["consistency"]
    assert told["real test images"]["frechet"] < told["temperature 1, guidance 1"]["frechet"]
    assert all(sum(map(sum, told[name]["confusion"])) == 50 for name in told if name != "real test images")
    for name in ("confusion", "nearest", "curve"):
        assert (tmp_path / "judge" / f"{name}.png").is_file()


# Bayes


def test_the_posterior_is_bayes_rule_and_the_scores_are_its():
    given = torch.tensor([[-10.0, -11.0], [-500.0, -490.0]])
    prior = torch.tensor([0.25, 0.75], dtype=torch.float64)
    p = posterior(given, prior).exp()
    odds = 0.25 * math.exp(-10) / (0.75 * math.exp(-11))
    assert float(p[0, 0] / p[0, 1]) == pytest.approx(odds)
    assert torch.allclose(p.sum(1), torch.ones(2, dtype=torch.float64))
    told = score(p.log(), torch.tensor([0, 1]))
    assert torch.allclose(marginal(given, prior), (given.double().exp() @ prior).log(), rtol=1e-9)
    assert told.accuracy == (float(p[0, 0] > 0.5) + 1) / 2
    assert told.nll == pytest.approx(-float(p[0, 0].log() + p[1, 1].log()) / 2)


def test_likelihoods_given_each_class_are_the_models_own(digits):
    model = density("pixelcnn", "categorical", **digits.facts).double()
    x, y = digits.test.x[:12], digits.test.y[:12]
    given = model.class_log_likelihoods(x, batch_size=5)
    with torch.no_grad():
        assert torch.allclose(given.gather(1, y[:, None])[:, 0], -model.nats(x, y), rtol=1e-12)
    assert given.shape == (12, 10)


def test_evaluate_classifies(tmp_path, digits):
    small = ["model_size=tiny", *TINY, "trainer.limit_train_batches=2", "trainer.max_epochs=1", "sampler.n_per_class=1"]
    for conditional in ("true", "false"):
        run = tmp_path / conditional
        command("train", *small, f"conditional={conditional}", f"run_dir={run}")
    asked = ["task=classify", "n_images=20"]
    ckpt = f"ckpt={tmp_path}/true/checkpoints/best.ckpt"
    command("evaluate", ckpt, *asked, f"run_dir={tmp_path}/out")
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    model, data = load(ckpt.removeprefix("ckpt=")), digits
    some = data.test[torch.randperm(250, generator=torch.Generator().manual_seed(0))[:20]]
    prior = torch.bincount(data.train.y).double() / len(data.train)
    expected = score(posterior(model.class_log_likelihoods(some.x, 20), prior), some.y)
    assert told["images"] == 20
    assert told["nll"] == pytest.approx(expected.nll, rel=1e-5)
    assert told["accuracy"] == expected.accuracy
    other = ["dataset@ood=npz", f"ood.path={tmp_path}/noise.npz"]
    save_npz(tmp_path / "noise.npz", (8, 8), 300, 40, classes=10)
    both = [ckpt, "task=ood", "n_images=20", *other]
    command("evaluate", *both, "ood.levels=17", f"run_dir={tmp_path}/new")
    told = json.loads((tmp_path / "new" / "evaluation.json").read_text())
    assert told["bpd"] < told["bpd_ood"]
    assert told["auroc"] > 0.5
    assert (tmp_path / "new" / "ood.png").is_file()
    said = refused("evaluate", *both, f"run_dir={tmp_path}/levels")
    assert said.endswith("images [1, 8, 8] of 256 levels, the model is of [1, 8, 8] of 17 levels; type ood.levels=17")
    save_npz(tmp_path / "large.npz", (9, 9), 300, 40, classes=10)
    said = refused("evaluate", *both, f"ood.path={tmp_path}/large.npz", f"run_dir={tmp_path}/size")
    assert said.endswith("; type ood.resize=8 and type ood.levels=17")
    save_npz(tmp_path / "colour.npz", (9, 9, 3), 300, 40, classes=10)
    said = refused("evaluate", *both, f"ood.path={tmp_path}/colour.npz", f"run_dir={tmp_path}/colour")
    assert said.endswith("the model is of [1, 8, 8] of 17 levels; type another dataset@ood")
    assert "type both" in refused("evaluate", ckpt, *other, f"run_dir={tmp_path}/alone")
    command("evaluate", ckpt, "n_images=20", "flip_mixture=true", f"run_dir={tmp_path}/flip")
    told = json.loads((tmp_path / "flip" / "evaluation.json").read_text())
    mixed = model.nats(some.x, some.y, flip_mixture=True).mean() / model.dims / math.log(2)
    assert told["flip_mixture_bpd"] == pytest.approx(float(mixed), rel=1e-5)
    assert told["flip_mixture_gain"] == pytest.approx(told["bpd"] - float(mixed), abs=1e-5)
    assert told["flip_mixture_gain_standard_error"] > 0
    assert "leave it out" in refused("evaluate", ckpt, *asked, "flip_mixture=true", f"run_dir={tmp_path}/both")
    ckpt = f"ckpt={tmp_path}/false/checkpoints/best.ckpt"
    assert "knows no classes" in refused("evaluate", ckpt, *asked, f"run_dir={tmp_path}/no")
