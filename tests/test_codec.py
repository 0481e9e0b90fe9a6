"""A codec gives back the images, to the bit, in as many bits as the model says; or it says why it cannot."""

import json
import math
import re
import shutil
import sys
import zlib

import numpy as np
import pytest
import torch
from helpers import command, refused
from tiny import EACH_ONCE, density

from pixelcnn_lit.checkpoints.safetensors import write_weights
from pixelcnn_lit.codec import coder
from pixelcnn_lit.codec.coder import compress, decompress
from pixelcnn_lit.codec.format import CRC, HEADER, MAGIC, Header
from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data.images import Split
from pixelcnn_lit.density.density import Density
from pixelcnn_lit.runs import workers
from pixelcnn_lit.summarize import main as summarize


def images_of(model: Density, n: int) -> Split:
    x = torch.randint(17, (n, *model.image_shape), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
    return Split(x, torch.tensor([model.classes[k % len(model.classes)] for k in range(n)], dtype=torch.int64))


def assert_comes_back(model: Density, images: Split, batch_size: int) -> coder.Compressed:
    done = compress(model, images, batch_size)
    back = decompress(model, done.content, "file=x")
    assert torch.equal(back.x, images.x)
    assert torch.equal(back.y, images.y)
    return done


@pytest.mark.parametrize(("network", "likelihood"), EACH_ONCE)
def test_what_goes_in_comes_out(network, likelihood):
    for shape in ((1, 4, 5), (3, 3, 2)):
        model = density(network, likelihood, shape)
        assert_comes_back(model, images_of(model, 5), 2)


@pytest.mark.parametrize("n", [0, 1, 4, 7])
def test_any_number_of_images(n):
    for conditional in (True, False):
        model = density("pixelcnn", "categorical", conditional=conditional)
        assert_comes_back(model, images_of(model, n), 4)
    images = Split(images_of(model, n).x, torch.arange(n) % 3)  # labels of a dataset, of which the model knows nothing
    assert torch.equal(decompress(model, compress(model, images, 4).content, "file=x").x, images.x)


def test_it_does_not_depend_on_the_training_mode(monkeypatch):
    model = density("pixelcnn_published", "categorical")
    monkeypatch.delattr(type(model.network), "stepper")  # so that it is evaluated as a whole, where BatchNorm has modes
    content = compress(model, images_of(model, 3), 3).content
    assert compress(model.train(), images_of(model, 3), 3).content == content
    assert model.training


def test_a_file_is_as_small_as_the_model_says():
    """200 images drawn by nobody: some 16,000 bits a batch, of which the header is not counted."""
    model = density("pixelcnn", "categorical", (1, 8, 8))
    images = images_of(model, 200)
    done = assert_comes_back(model, images, 64)
    with torch.no_grad():
        nats = float(model.nats(images.x, images.y).double().sum())
    assert done.model_bits == pytest.approx(nats / math.log(2), rel=1e-5)
    assert done.class_bits == pytest.approx(200 * math.log2(3))
    payload = 8 * Header(*HEADER.unpack_from(done.content, len(MAGIC))).payload_bytes
    assert 0 < payload - done.model_bits - done.class_bits < 4 * 96 + 0.001 * done.model_bits


def test_an_image_may_be_written_mirrored_where_that_takes_fewer_bits(monkeypatch):
    for model in (density("pixelcnn", "categorical", (1, 8, 8)), density("pixelcnn", "categorical", conditional=False)):
        images = images_of(model, 40)
        done, plain = (compress(model, images, 16, flip=flip) for flip in (True, False))
        back = decompress(model, done.content, "file=x")
        assert torch.equal(back.x, images.x)
        assert torch.equal(back.y, images.y)
        nats = [model.nats(x, images.y).double() for x in (images.x, images.x.flip(-1))]
        assert (nats[0] > nats[1]).any()
        assert (nats[0] < nats[1]).any()
        assert done.model_bits == pytest.approx(float(torch.minimum(*nats).sum()) / math.log(2), rel=1e-5)
        assert (done.flip_bits, plain.flip_bits) == (40, 0)
        mixed = model.nats(images.x, images.y, flip_mixture=True).double() / math.log(2)
        assert done.model_bits < float(mixed.sum()) < done.model_bits + done.flip_bits
        with pytest.raises(UserError, match="computes other probabilities"):
            decompress(model, with_header(done.content, flip=0), "file=x")


def test_weights_are_whole_and_sum_to_24_bits():
    logits = torch.randn(2, 17, 3, dtype=torch.float64) * 20
    whole = coder.frequencies(logits)
    assert whole.shape == (6, 17)
    assert (whole == np.floor(whole)).all()
    assert whole.min() >= 1
    assert (np.abs(whole.sum(1) - 2**24) <= 17).all()
    assert np.allclose(whole[1] / 2**24, logits[0, :, 1].softmax(0).numpy(), atol=2e-6)


@pytest.fixture(scope="module")
def written() -> tuple[Density, bytes]:
    model = density("pixelcnn", "categorical")
    return model, compress(model, images_of(model, 6), 4).content


def damaged(content: bytes, seed: int) -> bytes:
    random = np.random.default_rng(seed)
    broken = bytearray(content)
    if seed % 3 == 0:
        broken = broken[: random.integers(len(content))]
    elif seed % 3 == 1:
        broken[random.integers(len(content))] ^= 1 << random.integers(8)
    else:
        at = random.integers(len(content) - 4)
        broken[at : at + 4] = bytes(byte ^ 255 for byte in broken[at : at + 4])
    return bytes(broken)


def test_a_damaged_file_is_refused_in_one_line(written):
    model, content = written
    for seed in range(300):
        with pytest.raises(UserError) as refused:
            decompress(model, damaged(content, seed), "file=x")
        assert "\n" not in str(refused.value), f"damage {seed}"


def with_header(content: bytes, **changed) -> bytes:
    """A file whose checksums are right, and whose header is another."""
    header = Header(*HEADER.unpack_from(content, len(MAGIC)))
    end = len(MAGIC) + HEADER.size + header.text_bytes
    text = changed.pop("text", content[end - header.text_bytes : end])
    head = MAGIC + HEADER.pack(*header._replace(text_bytes=len(text), **changed)) + text
    return head + CRC.pack(zlib.crc32(head)) + content[end + CRC.size :]


def test_a_file_of_another_model_version_or_place_is_refused(written):
    model, content = written
    assert len(decompress(model, with_header(content), "file=x")) == 6
    with pytest.raises(UserError, match="written with another model"):
        decompress(density("pixelcnn", "categorical", seed=1), content, "file=x")
    with pytest.raises(UserError, match="or of another version"):
        decompress(model, b"PLC1" + content[4:], "file=x")
    with pytest.raises(UserError, match="written on cuda Nothing torch 9, here is cpu"):
        decompress(model, with_header(content, text=b"cuda Nothing torch 9"), "file=x")
    for wrong in ({"images": 5}, {"batch_size": 3}, {"digest": bytes(16)}):
        with pytest.raises(UserError, match=r"computes other probabilities|damaged"):
            decompress(model, with_header(content, **wrong), "file=x")


CRAFTED = [{"threads": 0}, {"threads": 65535}, {"batch_size": 0}, {"batch_size": 65535}, {"images": 2**32 - 1}]


@pytest.mark.parametrize("wrong", CRAFTED, ids=str)
def test_a_crafted_header_is_refused_at_once(wrong, written):
    model, content = written
    with pytest.raises(UserError, match="damaged"):
        decompress(model, with_header(content, **wrong), "file=x")


def test_a_crafted_header_of_a_model_without_classes_gets_no_memory():
    """Nothing bounds the number of images but that none is free and that each batch has its stream."""
    model = density("pixelcnn", "categorical", conditional=False)
    content = compress(model, images_of(model, 4), 4).content
    with pytest.raises(UserError, match="damaged"):
        decompress(model, with_header(content, images=2**32 - 1), "file=x")
    with pytest.raises(UserError, match="damaged"):
        decompress(model, with_header(content, images=500), "file=x")


def test_images_that_cost_nothing_come_back():
    """A model that is certain: its images are more than bits."""
    model = density("pixelcnn", "categorical", conditional=False)
    certain = (1000.0 * torch.nn.functional.one_hot(torch.tensor(0), 17)).log_softmax(0)
    model.likelihood.channel_logits = lambda features, x, c: certain[:, None].expand(len(x), 17, features.shape[2])
    done = assert_comes_back(model, Split(zeros := torch.zeros(500, 1, 4, 5, dtype=torch.uint8), no_class(zeros)), 500)
    assert done.model_bits == 0
    assert Header(*HEADER.unpack_from(done.content, len(MAGIC))).payload_bytes * 8 < 500


def no_class(x: torch.Tensor) -> torch.Tensor:
    return torch.full((len(x),), 3)


def test_other_probabilities_end_in_one_line_wherever_they_show(monkeypatch):
    """Some thousand symbols: the range coder meets impossible bits long before the digest is compared."""
    model = density("pixelcnn", "categorical", (1, 16, 16))
    content = compress(model, images_of(model, 60), 30).content
    frequencies = coder.frequencies
    monkeypatch.setattr(coder, "frequencies", lambda logits: frequencies(logits * (1 + 1e-3)))
    with pytest.raises(UserError, match="computes other probabilities"):
        decompress(model, content, "file=x")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a GPU")
def test_what_goes_in_comes_out_on_a_gpu():
    model = density("pixelcnn", "categorical").cuda()
    assert_comes_back(model, images_of(model, 5), 2)


def test_the_commands_write_and_read_npz_and_folders(tmp_path, capsys):
    model = density("pixelcnn", "categorical", (3, 6, 6))
    ckpt = f"{tmp_path}/model.safetensors"
    write_weights(tmp_path / "model.safetensors", model.state_dict(), model.settings)
    images = images_of(model, 5)
    pixels = images.x.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", images=pixels, labels=images.y.numpy())
    np.savez(tmp_path / "unlabelled.npz", images=pixels)
    here = f"run_dir={tmp_path}/run"
    for source in ("unlabelled.npz", "a.npz"):
        asked = [f"images={tmp_path}/{source}", f"out={tmp_path}/a.plc", here]
        command("compress", f"ckpt={ckpt}", *asked)
        said = capsys.readouterr().out
        assert "WebP lossless" in said
        assert "overhead" in said
        asked = [f"file={tmp_path}/a.plc", f"out={tmp_path}/b.npz", here]
        command("decompress", f"ckpt={ckpt}", *asked)
        back = np.load(tmp_path / "b.npz")
        assert (back["images"] == pixels).all()
        assert source != "a.npz" or (back["labels"] == images.y.numpy()).all()
    asked = [f"file={tmp_path}/a.plc", f"out={tmp_path}/folder", here]
    command("decompress", f"ckpt={ckpt}", *asked)
    asked = [f"images={tmp_path}/folder", f"out={tmp_path}/c.plc", here]
    command("compress", f"ckpt={ckpt}", *asked)
    by_class = images.y.argsort(stable=True)
    back = decompress(model, (tmp_path / "c.plc").read_bytes(), "file=c.plc")
    assert torch.equal(back.x, images.x[by_class])  # folder after folder
    assert torch.equal(back.y, images.y[by_class])
    np.savez(tmp_path / "named.npz", images=pixels, labels=np.array(list("abcab")))
    for wrong, said in (
        (f"images={tmp_path}/nothing.npz", "no such file"),
        (f"images={ckpt}", "no npz; of pictures type the folder"),
        (f"images={tmp_path}/named.npz", "`labels` integers"),
        (f"out={tmp_path}/folder", "is a folder"),
        ("n_images=-1", "n_images=-1: must be"),
    ):
        assert said in refused("compress", f"ckpt={ckpt}", *asked, wrong)


def test_an_entry_of_a_race_is_what_it_says_or_refused(run, tmp_path, monkeypatch, capsys):
    entry = tmp_path / "entries" / "0"
    shutil.copytree(run, entry)
    result = json.loads((entry / "result.json").read_text())
    command("compress", f"ckpt={entry}", "n_images=100", f"out={entry}/proof.plc", f"run_dir={tmp_path}/a")
    monkeypatch.setattr(sys, "argv", ["summarize", f"check={entry.parent}"])
    capsys.readouterr()
    summarize()
    said = capsys.readouterr().out
    assert f"test {result['test/bpd']:.4f} bpd on {result['test/fingerprint']}, as result.json says; 100 of" in said
    wrong = {"test/bpd": result["test/bpd"] - 0.001, "test/images": 16, "test/fingerprint": "250 images of another"}
    for key, value in wrong.items():
        (entry / "result.json").write_text(json.dumps(result | {key: value}))
        with pytest.raises(SystemExit, match=rf"error: check=.*{re.escape(str(value)[:5])}"):
            summarize()
    (entry / "result.json").write_text(json.dumps(result))
    for few in ("n_images=99", "images=train"):
        command("compress", f"ckpt={entry}", "n_images=100", few, f"out={entry}/proof.plc", f"run_dir={tmp_path}/a")
        with pytest.raises(SystemExit, match="must hold the first 100 test images"):
            summarize()
    (entry / "proof.plc").unlink()
    with pytest.raises(SystemExit, match="of a whole run, and"):
        summarize()


def test_several_processes_write_and_read_the_same(monkeypatch):
    monkeypatch.setattr(workers, "WORTH", 0.0)
    model = density("pixelcnn_pp", "categorical", (3, 4, 5), n_residual=2)
    images = images_of(model, 11)
    content = compress(model, images, 2).content
    assert compress(model, images, 2, processes=2).content == content
    back = decompress(model, content, "file=x", processes=2)
    assert torch.equal(back.x, images.x)
    assert torch.equal(back.y, images.y)
