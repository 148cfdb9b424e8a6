"""The tests need no network and no GPU; those for CUDA are skipped where there is none.

There are three kinds. Functions are compared with a plain computation of the same thing. `main`
runs at tiny size while `watch` records the arguments of every call, which are compared with what
they should be. Commands are run as a user types them. Each test states one fact in its name.
"""

import copy
import csv
import fcntl
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageEnhance, ImageOps
from torch import nn

import common
import fixmatch_scar
import mixmatch_scar
import vat_scar
from common import SHAPES, WideResNet, fgsm, load_images, split_labeled
from fixmatch_scar import RANDAUGMENT_OPS, fixmatch_loss, randaugment_op, strong_augment, to_float
from mixmatch_scar import mixmatch_loss
from vat_scar import vat_direction, vat_loss

SCRIPTS = [vat_scar, mixmatch_scar, fixmatch_scar]
NAMES = [script.METHOD for script in SCRIPTS]
HERE = Path(__file__).parent
OWN = {"parse_args", "make_optimizer", "schedule", "batch_loss"}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
close = torch.testing.assert_close
same = partial(torch.testing.assert_close, rtol=0, atol=0)


def test_what_the_scripts_share_is_the_same_text():
    """So what holds for a shared function in one script holds in all three."""
    texts = {}
    for script in SCRIPTS:
        text = Path(script.__file__).read_text(encoding="utf-8")
        _, rest = text.split("Helpers, the same in every script\n")
        texts.setdefault("from the helpers to the end", set()).add(rest)
        for name, function in inspect.getmembers(script, inspect.isfunction):
            if function.__module__ == script.__name__ and name not in OWN:
                texts.setdefault(name, set()).add(inspect.getsource(function))
    assert [name for name, versions in texts.items() if len(versions) > 1] == []


@pytest.fixture(autouse=True)
def cudnn_as_the_scripts_set_it(monkeypatch):
    """And as it was, after each test."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)


def image_bytes(batch):
    """Each image as something that a set can hold."""
    return [image.numpy().tobytes() for image in batch]


@pytest.fixture(scope="session")
def images():
    """The synthetic set: (x_train, y_train, x_test, y_test)."""
    return load_images("synthetic", None)


# -------------------------------------------------------------------------------- runs at tiny size

DATA = ["--data", "synthetic", "--num-labeled", "100"]
SIZE = (
    "--image-size 24 --depth 10 --width 1 --batch-size 4 --epochs 2 --steps-per-epoch 3 "
    "--table2-eps 1"
).split()
ON_CPU = ["--device", "cpu", "--precision", "fp32", "--no-compile"]
SMALL = [*DATA, *SIZE, *ON_CPU]


@pytest.fixture(scope="session")
def few(images):
    """300 images to train with and 100 to test on, of 24 x 24 pixels."""
    x, y, x_test, y_test = images
    x, x_test = x[:, :, 4:28, 4:28].contiguous(), x_test[:, :, 4:28, 4:28].contiguous()
    return x[:300], y[:300], x_test[:100], y_test[:100]


@pytest.fixture
def few_images(few, monkeypatch):
    """The few images as what every script loads, whatever --data says."""
    for script in SCRIPTS:
        monkeypatch.setattr(script, "load_images", lambda *args: few)
        monkeypatch.setattr(script, "image_names", lambda *args: (SHAPES, [], []))
    return few


def run(script, out, *options):
    """Runs a script at tiny size; the folder may be given among the options, too."""
    return script.main([*SMALL, "--out", str(out), *map(str, options)])


def refusal(capsys, script, *argv):
    """The one sentence with which a run ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        script.main([str(word) for word in argv])
    sentence = stopped.value.code  # sys.exit's, which Python prints; argparse prints its own
    if sentence == 2:
        sentence = capsys.readouterr().err
    sentence = sentence.partition("error:")[2].strip()
    assert sentence and "\n" not in sentence
    return sentence


def read_rows(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def load_model(path, classes=10):
    model = WideResNet(classes, 10, 1).eval()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def write_photos(root, classes=("ant", "bee")):
    """train/, test/ of one bright color a class and, without labels, unlabeled/ below folders."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(classes):
        for part, count in ((f"train/{name}", 6), (f"test/{name}", 3), ("unlabeled/deep er", 5)):
            (root / part).mkdir(parents=True, exist_ok=True)
            for n in range(count):
                pixels = rng.integers(0, 60, (40, 48, 3)) + 180 * (np.arange(3) == i)
                size = (48, 40) if n % 2 else (100, 100)
                image = Image.fromarray(pixels.astype(np.uint8)).resize(size)
                image.save(root / part / f"{i} {n}.png")
    return root


def folder_options(root):
    """SMALL's with the images below root; all labels that there are."""
    return ["--data", "folder", "--data-dir", str(root), *SIZE, *ON_CPU]


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos")


# -------------------------------------------------------------------------------------- the network


def test_wide_resnet_28_2_has_its_number_of_parameters():
    assert sum(p.numel() for p in WideResNet(10, 28, 2).parameters()) == 1_467_610


def test_initial_weights_have_their_variance():
    """Convolutions N(0, 2 / (k * k * out)), the linear layer Xavier-normal, its bias 0."""
    torch.manual_seed(0)
    model = WideResNet(10, 28, 2)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            variance = 2 / (module.kernel_size[0] ** 2 * module.out_channels)
        elif isinstance(module, nn.Linear):
            variance = 2 / (module.in_features + module.out_features)
        else:
            continue
        noise = 5 / math.sqrt(2 * module.weight.numel())
        deviation = module.weight.std().item()
        assert deviation == pytest.approx(math.sqrt(variance), rel=noise), name
        assert abs(module.weight.mean().item()) < noise * math.sqrt(2 * variance), name
    assert not model.linear.bias.any()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("depth, width", [(10, 1), (16, 2), (28, 2)])
def test_network_matches_its_description(depth, width, training):
    """Against the same network straight from its description, on a state_dict: logits, and the
    running statistics (momentum 0.1, eps 1e-3)."""
    torch.manual_seed(0)
    model = WideResNet(7, depth, width).double()
    w = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in w.values():  # statistics and scales unlike their initial ones
        if tensor.ndim == 1:
            tensor.uniform_(0.5, 2)
    model.load_state_dict(w)
    w = {name: tensor.clone() for name, tensor in w.items()}

    def bn_lrelu(x, name):
        mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
        scale, shift = w[f"{name}.weight"], w[f"{name}.bias"]
        x = F.batch_norm(x, mean, var, scale, shift, training, momentum=0.1, eps=1e-3)
        return torch.where(x > 0, x, 0.1 * x)

    def conv(x, name, stride=1):
        weight = w[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    images = torch.rand(5, 3, 16, 16, dtype=torch.double)
    x = conv(images, "conv")
    blocks = (depth - 4) // 6  # in each of three groups
    for i in range(3 * blocks):
        stride, block = 2 if i in (blocks, 2 * blocks) else 1, f"blocks.{i}"
        y = bn_lrelu(x, f"{block}.bn1")
        residual = y if i == 0 else x
        if f"{block}.shortcut.weight" in w:
            residual = conv(residual, f"{block}.shortcut", stride)
        y = bn_lrelu(conv(y, f"{block}.conv1", stride), f"{block}.bn2")
        x = residual + conv(y, f"{block}.conv2")
    logits = bn_lrelu(x, "bn").mean((2, 3)) @ w["linear.weight"].T + w["linear.bias"]
    close(model.train(training)(images), logits)
    for name, tensor in model.state_dict().items():
        if "running" in name:
            close(tensor, w[name])


@pytest.mark.parametrize("depth, width", [(4, 1), (12, 1), (10, 0)])
def test_wide_resnet_refuses_other_depths_and_widths(depth, width):
    with pytest.raises(ValueError, match=f"depth must be 6n.*: {depth}, {width}"):
        WideResNet(10, depth, width)


# ------------------------------------------------------------------------------------ images, split


@pytest.mark.parametrize("part, count", [(0, 600), (2, 100)], ids=["train", "test"])
def test_synthetic_images_are_balanced(images, part, count):
    x, y = images[part : part + 2]
    assert x.shape == (10 * count, 3, 32, 32) and x.dtype == torch.uint8
    assert y.dtype == torch.int64 and torch.bincount(y).tolist() == [count] * 10


def test_synthetic_test_images_are_no_training_images(images):
    assert not set(image_bytes(images[0])) & set(image_bytes(images[2]))


def test_synthetic_images_are_the_same_every_time(images):
    for tensor, again in zip(images, load_images("synthetic", "nowhere")):
        same(again, tensor)


@pytest.mark.parametrize(
    "row, column, dark",
    [
        (15, 15, {"ring", "frame", "two bars", "four dots"}),
        (8, 15, {"bar", "four dots"}),
        (22, 15, {"bar", "half disk", "four dots"}),
        (8, 8, {"triangle", "plus", "bar"}),
    ],
    ids=["middle", "top", "bottom", "top left"],
)
def test_synthetic_shapes_fit_their_names(images, row, column, dark):
    """Shapes are brighter than the ground, which those in `dark` leave visible at this place."""
    brightness = [images[0][images[1] == label].float().mean((0, 1)) for label in range(10)]
    ground = sum(mean[[0, 0, -1, -1], [0, -1, 0, -1]].mean() for mean in brightness) / 10
    classes, _, _ = common.image_names("synthetic", None)
    here = {
        name: (mean[row : row + 2, column : column + 2].mean() - ground).item()
        for name, mean in zip(classes, brightness)
    }
    assert {name for name in classes if here[name] < 0.3 * here["disk"]} == dark


@pytest.mark.parametrize("size", [20, 48])
def test_images_of_another_size_are_resized_as_pillow_does(images, size):
    resized = load_images("synthetic", None, size)
    for part in (0, 2):  # to train with and to test on
        assert resized[part].shape == (len(images[part]), 3, size, size)
        for image, ours in zip(images[part][:20], resized[part]):
            pillows = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size))
            difference = ours.permute(1, 2, 0).numpy() - np.asarray(pillows, int)
            assert np.abs(difference).max() <= 2


def test_split_takes_every_image_once(images):
    labeled, unlabeled = split_labeled(images[1], 43, 0)
    assert labeled.dtype == unlabeled.dtype == torch.int64
    assert labeled.tolist() == sorted(labeled.tolist())
    assert unlabeled.tolist() == sorted(set(range(6000)) - set(labeled.tolist()))


def test_split_gives_classes_as_equal_numbers_as_it_can(images):
    """43 labels for ten classes: 4 each, and one more for three that are drawn."""
    counts = []
    for seed in range(5):
        labeled, _ = split_labeled(images[1], 43, seed)
        counts.append(torch.bincount(images[1][labeled], minlength=10).tolist())
        assert sorted(counts[-1]) == [4] * 7 + [5] * 3
    assert len(set(map(str, counts))) > 1


def test_split_follows_from_the_seed(images):
    splits = [split_labeled(images[1], 45, seed)[0].tolist() for seed in (0, 0, 1)]
    assert splits[0] == splits[1]
    assert len(set(splits[0]) & set(splits[2])) < 10


def test_split_leaves_images_without_a_label_unlabeled():
    """All 12 labels may be taken then, however uneven the classes are."""
    y = torch.tensor([0] * 7 + [1] * 5 + [-1] * 4)
    labeled, unlabeled = split_labeled(y, 12, 0)
    assert labeled.tolist() == list(range(12)) and unlabeled.tolist() == [12, 13, 14, 15]


@pytest.mark.parametrize(
    "count, sentence",
    [
        (2, "--num-labeled 2 is too few: there are 3 classes"),
        (12, "--num-labeled 12 takes 4 of class red, which has 2: lower the number, or add images"),
        (22, "--num-labeled 22 leaves no unlabeled image: 21 at most"),
        (23, "--num-labeled 23 is too many: 22 labels are available"),
    ],
)
def test_split_refuses(count, sentence):
    y = torch.tensor([0] * 10 + [1] * 10 + [2] * 2)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        split_labeled(y, count, 0, ["blue", "green", "red"])


@pytest.mark.parametrize("count, quota", [(3, 1), (4, 1)], ids=["by quota", "all labels"])
def test_split_refuses_a_class_of_which_no_image_is_left(count, quota):
    """Were it the last one, labels alone would not tell that there is such a class."""
    y = torch.tensor([0] * 2 + [1] * 2 + [-1] * 2)
    sentence = f"--val {count} takes {quota} of class red, which has 0: lower the number"
    with pytest.raises(ValueError, match=sentence):
        split_labeled(y, count, 0, ["blue", "green", "red"], "--val")


# --------------------------------------------------------------------------------------- the attack


@pytest.fixture
def attacked():
    """What fgsm gets and gives, and the model as it was; one block of it is frozen in eval mode."""
    torch.manual_seed(0)
    model = WideResNet(10, 10, 1).train()
    model.blocks[1].eval()
    before = copy.deepcopy(model)
    x, y = torch.rand(6, 3, 32, 32), torch.arange(6)
    with torch.no_grad():
        result = fgsm(model, x, y, 0.02)
    return SimpleNamespace(model=model, before=before, x=x, y=y, result=result)


def test_fgsm_is_its_formula(attacked):
    """x + eps * sign(gradient of cross-entropy), clipped to [0, 1], image by image."""
    model, expected = attacked.before.eval(), []
    for image, label in zip(attacked.x.split(1), attacked.y.split(1)):
        image = image.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(image), label), image)
        expected.append((image + 0.02 * gradient.sign()).clamp(0, 1).detach())
    # a gradient component can be so near zero that its sign is a matter of rounding
    assert (attacked.result != torch.cat(expected)).float().mean() < 1e-3


def test_fgsm_leaves_no_gradient(attacked):
    assert not attacked.result.requires_grad and not attacked.x.requires_grad
    assert all(p.grad is None for p in attacked.model.parameters())


def test_fgsm_leaves_modes_and_statistics_as_they_were(attacked):
    modes = [[m.training for m in model.modules()] for model in (attacked.model, attacked.before)]
    assert modes[0] == modes[1]
    same(attacked.model.state_dict(), attacked.before.state_dict())


def test_fgsm_is_exact_for_a_confident_model_under_autocast():
    class Confident(nn.Module):
        def forward(self, x):
            score = x.mean((2, 3)) @ torch.tensor([401.0, -1.0, 100.0])  # so that p(y) is 1
            seen.extend([x.dtype, score.dtype])
            return torch.stack([score, -score], 1)

    seen, x = [], torch.full((2, 3, 8, 8), 0.4)
    with torch.autocast("cpu", torch.bfloat16):
        attacked = fgsm(Confident(), x, torch.tensor([0, 0]), 0.1)
    close(attacked, x + 0.1 * torch.tensor([-1, 1, -1]).view(3, 1, 1))
    assert seen == [torch.float32, torch.float32]


@needs_cuda
def test_fgsm_on_cuda_is_that_of_the_cpu(images):
    torch.manual_seed(0)
    model, x, y = WideResNet(10, 10, 1), to_float(images[2][:100]), images[3][:100]
    on_cpu, on_cuda = fgsm(model, x, y, 0.02), fgsm(model.cuda(), x.cuda(), y.cuda(), 0.02)
    assert ((on_cpu - on_cuda.cpu()).abs() > 1e-6).float().mean() < 2e-3


# ------------------------------------------------------------------------------------- augmentation


def affine(image, *coefficients):
    return image.transform(image.size, Image.Transform.AFFINE, coefficients)


PILLOW = [  # FixMatch's Table 12: name, lowest and highest value; the operation by Pillow alone
    ("AutoContrast", 0, 0, lambda image, v: ImageOps.autocontrast(image)),
    ("Brightness", 0.05, 0.95, lambda image, v: ImageEnhance.Brightness(image).enhance(v)),
    ("Color", 0.05, 0.95, lambda image, v: ImageEnhance.Color(image).enhance(v)),
    ("Contrast", 0.05, 0.95, lambda image, v: ImageEnhance.Contrast(image).enhance(v)),
    ("Equalize", 0, 0, lambda image, v: ImageOps.equalize(image)),
    ("Identity", 0, 0, lambda image, v: image),
    ("Posterize", 4, 8, lambda image, v: ImageOps.posterize(image, int(v))),
    ("Rotate", -30, 30, lambda image, v: image.rotate(v)),
    ("Sharpness", 0.05, 0.95, lambda image, v: ImageEnhance.Sharpness(image).enhance(v)),
    ("ShearX", -0.3, 0.3, lambda image, v: affine(image, 1, v, 0, 0, 1, 0)),
    ("ShearY", -0.3, 0.3, lambda image, v: affine(image, 1, 0, 0, v, 1, 0)),
    ("Solarize", 0, 1, lambda image, v: ImageOps.solarize(image, 256 * v)),
    ("TranslateX", -0.3, 0.3, lambda image, v: affine(image, 1, 0, v * image.width, 0, 1, 0)),
    ("TranslateY", -0.3, 0.3, lambda image, v: affine(image, 1, 0, 0, 0, 1, v * image.height)),
]


@pytest.fixture(scope="session", params=[(32, 32), (48, 40)], ids=str)
def one_batch(images, request):
    """Every operation on 200 varied images, all in one batch: (x, op, level, result)."""
    x = torch.cat([images[0][:200], images[0][200:400]], 2)
    x = torch.cat([x, x.flip(0)], 3)[:, :, : request.param[0], : request.param[1]].contiguous()
    x[40:80] = F.avg_pool2d(x[40:80].float(), 5, 1, 2).to(torch.uint8)  # smooth
    x[80:120] = x[80:120] // 8 + 90  # faint
    x[120:160] = x[120:160] // 64 * 85  # four levels, from 0 to 255
    x[160:170] = torch.arange(30).view(10, 3, 1, 1) * 8  # one color
    x, op = x.repeat_interleave(14, 0), torch.arange(14).repeat(200)
    level = torch.rand(2800, generator=torch.Generator().manual_seed(0))
    level[:14], level[14:28] = 0, 1
    return x, op, level, randaugment_op(x, op, level)


def test_randaugment_has_table_12s_operations_and_ranges():
    assert RANDAUGMENT_OPS == tuple((name, low, high) for name, low, high, _ in PILLOW)


@pytest.mark.parametrize("index", range(14), ids=[name for name, *_ in PILLOW])
def test_randaugment_matches_pillow(one_batch, index):
    name, low, high, operation = PILLOW[index]
    x, _, level, ours = (part[index::14] for part in one_batch)
    difference = []
    for image, value, our in zip(x, (low + (high - low) * level.double()).tolist(), ours):
        pillows = operation(Image.fromarray(image.permute(1, 2, 0).numpy()), value)
        difference.append(abs(our.permute(1, 2, 0).numpy() - np.asarray(pillows, int)).max(2))
    if name.startswith(("Rotate", "Shear", "Translate")):
        assert (np.stack(difference) > 0).mean((1, 2)).max() <= 0.02
    else:
        assert np.max(difference) <= 1 and (np.stack(difference) > 0).mean() <= 0.001
    assert torch.equal(ours, x) == (name == "Identity")


@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_randaugment_on_cuda_is_that_of_the_cpu(one_batch, compiled):
    x, op, level, on_cpu = one_batch
    function = torch.compile(randaugment_op, fullgraph=True) if compiled else randaugment_op
    on_cuda = function(x.cuda(), op.cuda(), level.cuda()).cpu()
    difference = (on_cuda.int() - on_cpu.int()).abs().amax(1)
    assert difference[::14].max() <= 1  # AutoContrast rounds down what is near a whole number
    for index in range(1, 14):
        assert (difference[index::14] > 0).float().mean() <= 0.01, PILLOW[index][0]


@pytest.fixture(params=[(32, 32), (48, 40)], ids=str)
def weak(request):
    """An image, 4,000 times, and all crops of it, reflected at its borders."""
    h, w = request.param
    image, pads = torch.arange(3 * h * w).view(3, h, w) % 251, [w // 8, w // 8, h // 8, h // 8]
    crops = F.pad(image.float(), pads, mode="reflect").byte().unfold(1, h, 1).unfold(2, w, 1)
    crops = crops.permute(1, 2, 0, 3, 4).flatten(0, 1)
    return SimpleNamespace(x=image.byte().expand(4000, 3, h, w), crops=crops)


def test_weak_augment_flips_and_moves(weak):
    """Each view is a crop, or a crop's mirror image; all of them occur."""
    names = image_bytes(torch.cat([weak.crops, weak.crops.flip(3)]))
    torch.manual_seed(0)
    seen = [names.index(view) for view in image_bytes(fixmatch_scar.weak_augment(weak.x))]
    assert set(seen) == set(range(len(names)))
    assert 0.45 < np.mean(np.array(seen) < len(weak.crops)) < 0.55


def test_weak_augment_without_flips_moves(weak):
    """Each view is a crop; all of them occur."""
    torch.manual_seed(0)
    views = fixmatch_scar.weak_augment(weak.x, flip=False)
    assert set(image_bytes(views)) == set(image_bytes(weak.crops))


def test_weak_augment_moves_by_an_eighth_of_a_large_side():
    """The pixel in the middle of 96 x 100 tells from which row it comes."""
    x = torch.arange(96, dtype=torch.uint8).view(1, 1, 96, 1).expand(2000, 3, 96, 100)
    torch.manual_seed(0)
    rows = vat_scar.weak_augment(x)[:, 0, 48, 50]
    assert set(rows.tolist()) == set(range(48 - 12, 48 + 12 + 1))


@pytest.fixture(params=[(32, 32, {"flip": False}), (50, 38, {})], ids=str)
def strong(request, monkeypatch):
    """strong_augment of one image 500 times, each operation replaced by adding 1."""
    h, w, options = request.param
    x = (
        (torch.arange(3 * h * w) % 100).byte().view(3, h, w).expand(500, 3, h, w)
    )  # + 2 is below the square's 127
    torch.manual_seed(0)
    weak = fixmatch_scar.weak_augment(x, **options)
    drawn = []
    monkeypatch.setattr(
        fixmatch_scar, "randaugment_op", lambda x, *draw: drawn.append(draw) or x + 1
    )
    torch.manual_seed(0)
    result = strong_augment(x, **options)
    return SimpleNamespace(h=h, w=w, x=x, weak=weak, drawn=drawn, result=result)


def test_strong_augment_is_a_weak_view_two_operations_and_a_gray_square(strong):
    square = (strong.result == 127).all(1)
    same(strong.result, (strong.weak + 2).masked_fill(square[:, None], 127))


def test_strong_augments_square_is_half_the_side_cut_at_the_border(strong):
    square = (strong.result == 127).all(1)
    rows, columns = square.any(2).sum(1), square.any(1).sum(1)
    same(square.sum((1, 2)), rows * columns)  # a rectangle
    for lengths, side in ((rows, strong.h), (columns, strong.w)):
        assert set(lengths.tolist()) == set(range(side // 4, 2 * (side // 4) + 1))


def test_strong_augments_square_may_be_centred_on_every_pixel(strong):
    """A center in the first row leaves the upper half off, one in the last nearly the lower."""
    square = (strong.result == 127).all(1)
    for hit, side in ((square.any(2), strong.h), (square.any(1), strong.w)):
        begin = hit.int().argmax(1)
        end = side - hit.flip(1).int().argmax(1)
        spans = set(zip(begin.tolist(), end.tolist()))
        half = side // 4
        assert spans == {(max(0, c - half), min(side, c + half)) for c in range(side)}


def test_strong_augments_square_is_placed_in_both_directions_alike(strong):
    """Not along a diagonal: its row says nothing of its column."""
    square = (strong.result == 127).all(1).float()
    row = (square * torch.arange(strong.h)[:, None]).sum((1, 2)) / square.sum((1, 2))
    column = (square * torch.arange(strong.w)).sum((1, 2)) / square.sum((1, 2))
    assert abs(torch.corrcoef(torch.stack([row, column]))[0, 1]) < 0.2


def test_strong_augment_draws_two_operations_for_each_image(strong):
    (first, _), (second, _) = strong.drawn
    assert (first == second).float().mean() < 0.2
    for op in (first, second):
        assert torch.bincount(op, minlength=14).min() > 10 and op.max() == 13


def test_strong_augment_draws_levels_for_each_image(strong):
    (_, first), (_, second) = strong.drawn
    assert (first == second).float().mean() < 0.2
    for level in (first, second):
        assert 0 <= level.min() < 0.05 and 0.95 < level.max() <= 1
        assert level.mean() == pytest.approx(0.5, abs=0.05)


def test_strong_augment_draws_levels_apart_from_operations(strong):
    for op, level in strong.drawn:
        for index in range(14):
            assert level[op == index].max() - level[op == index].min() > 0.5


def test_strong_views_of_one_image_differ():
    x = (torch.arange(3 * 32 * 32) % 100).byte().view(3, 32, 32).expand(500, 3, 32, 32)
    assert len({view.numpy().tobytes() for view in strong_augment(x)}) > 450


@pytest.mark.parametrize("x", [torch.rand(2, 3, 32, 32), torch.zeros(2, 1, 32, 32).byte()])
def test_augmentation_accepts_only_uint8_rgb(x):
    index = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="uint8 images"):
        vat_scar.weak_augment(x)
    with pytest.raises(ValueError, match="uint8 images"):
        randaugment_op(x, index, index / 2)


def test_to_float_scales_bytes_to_0_1_channels_last():
    x = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    result = to_float(x)
    close(result, torch.tensor([0, 0.2, 1]).view(1, 3, 1, 1).expand(2, 3, 4, 5))
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_to_float_leaves_floats_as_they_are():
    x = torch.rand(2, 3, 4, 5)
    assert to_float(x) is x


# --------------------------------------------------------------------------------- the three losses

Y = torch.tensor([3, 1, 4, 1])  # labels


def plain_net(scale):
    """Seven classes, without batch norm, so that images stay apart; the larger scale, the more
    confident."""
    torch.manual_seed(1)
    conv, linear = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8 * 15 * 15, 7)
    linear.weight.data *= scale
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), linear).double()


def prob_of(model, image):
    return model(image[None])[0].softmax(0)


def kl_to(model, prob, image):
    """KL(prob || p(image)), as in VAT's paper."""
    return (prob * (prob.log() - prob_of(model, image).log())).sum()


def check_loss(model, result, expected, parts):
    """The loss, its gradient and its metrics are those of the plain computation."""
    loss, metrics = result
    gradients = [torch.autograd.grad(value, model.parameters()) for value in (loss, expected)]
    close(*gradients, rtol=1e-3, atol=1e-5)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert metrics.keys() == parts.keys()
    for name, part in parts.items():
        part = torch.as_tensor(part).item()
        assert metrics[name].item() == pytest.approx(part, rel=1e-3), name
        assert not metrics[name].requires_grad


def test_mixmatch_loss_sample_by_sample():
    model = plain_net(8)
    x = torch.rand(12, 3, 32, 32, dtype=torch.double)
    x_l, x_u, x_v = x.split(4)
    mix, perm = 0.5 + 0.5 * torch.rand(12, dtype=torch.double), torch.randperm(12)
    sharp = [((prob_of(model, a) + prob_of(model, b)) / 2) ** 2.5 for a, b in zip(x_u, x_v)]
    guesses = [(power / power.sum()).detach() for power in sharp]
    target = [*F.one_hot(Y, 7).double(), *guesses, *guesses]
    labeled = unlabeled = 0
    for i, j in enumerate(perm):
        prob = prob_of(model, mix[i] * x[i] + (1 - mix[i]) * x[j])
        mixed_target = mix[i] * target[i] + (1 - mix[i]) * target[j]
        if i < 4:
            labeled -= (mixed_target * prob.log()).sum() / 4
        else:
            unlabeled += ((mixed_target - prob) ** 2).mean() / 8
    result = mixmatch_loss(model, x_l, Y, x_u, x_v, 0.4, 0.75, 0.6, mix=mix, perm=perm)
    parts = {"loss_labeled": labeled, "loss_unlabeled": unlabeled}
    check_loss(model, result, labeled + 0.6 * unlabeled, parts)


@pytest.fixture
def mixed(monkeypatch):
    """What mixmatch_loss without `mix` and `perm` makes of images that tell their number.

    draw_mix gives 0.75 for every image; the model notes what it gets.
    """
    seen, draws = [], []

    def model(x):
        seen.append(x[:, 0, 0, 0])
        return torch.zeros(len(x), 10)

    def draw_mix(count, alpha, device):
        draws.append((count, alpha, device))
        return torch.full((count,), 0.75)

    monkeypatch.setattr(mixmatch_scar, "draw_mix", draw_mix)
    monkeypatch.setattr(
        mixmatch_scar, "forward_untracked", lambda model, x: torch.zeros(len(x), 10)
    )
    x = torch.arange(300.0).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    y = torch.zeros(100, dtype=torch.int64)
    torch.manual_seed(0)
    mixmatch_loss(model, x[:100], y, x[100:200], x[200:], 0.5, 0.7, 1.0)
    partner = ((seen[0] - 0.75 * torch.arange(300)) / 0.25).round().long()
    return SimpleNamespace(draws=draws, partner=partner)


def test_mixup_draws_a_share_for_each_image_of_all_views(mixed):
    assert mixed.draws == [(300, 0.7, torch.device("cpu"))]


def test_mixup_mixes_each_image_with_one_of_all_views(mixed):
    """A permutation: labeled images meet unlabeled ones, in either view."""
    assert sorted(mixed.partner.tolist()) == list(range(300))
    groups = mixed.partner[:100] // 100
    assert torch.bincount(groups, minlength=3).min() > 15


def test_mixmatch_with_alpha_0_mixes_nothing():
    model = plain_net(8)
    x_l, x_u, x_v = torch.rand(3, 4, 3, 32, 32, dtype=torch.double)
    loss = partial(mixmatch_loss, model, x_l, Y, x_u, x_v, 0.4)
    close(loss(0.0, 0.6), loss(0.75, 0.6, mix=torch.ones(12), perm=torch.randperm(12)))


@pytest.mark.parametrize("alpha", [0.01, 0.03, 0.1, 0.75, 4.0, 100.0])
def test_draw_mix_is_the_larger_share_of_a_beta_sample(alpha):
    """Distributed as numpy's, the image's own share the larger one; underflow makes no 1/2."""
    torch.manual_seed(0)
    mix = mixmatch_scar.draw_mix(200_000, alpha, torch.device("cpu")).numpy()
    share = np.random.default_rng(0).beta(alpha, alpha, 200_000)
    assert mix.shape == (200_000,) and mix.dtype == np.float32
    assert 0.5 <= mix.min() and mix.max() <= 1
    assert (mix == 0.5).sum() <= 5
    for at_most in (0.51, 0.55, 0.6, 0.75, 0.9, 0.99, 0.9999):
        expected = (np.maximum(share, 1 - share) <= at_most).mean()
        assert (mix <= at_most).mean() == pytest.approx(expected, abs=6e-3)


def test_vat_loss_sample_by_sample():
    model = plain_net(1)
    x_l, x_u, d0 = torch.rand(14, 3, 32, 32, dtype=torch.double).split([4, 5, 5])
    labeled = sum(-prob_of(model, x)[y].log() / 4 for x, y in zip(x_l, Y))
    divergence = entropy = 0
    for image, start in zip(x_u, d0 - 0.5):
        prob = prob_of(model, image)
        entropy -= (prob * prob.log()).sum() / 5
        r = (0.5 * start / start.norm()).requires_grad_()
        (gradient,) = torch.autograd.grad(kl_to(model, prob.detach(), image + r), r)
        divergence += kl_to(model, prob.detach(), image + 2 * gradient / gradient.norm()) / 5
    result = vat_loss(model, x_l, Y, x_u, 0.5, 2.0, 1, 0.6, 0.2, d0=100 * (d0 - 0.5))
    parts = {"loss_labeled": labeled, "loss_unlabeled": divergence, "entropy": entropy}
    check_loss(model, result, labeled + 0.6 * divergence + 0.2 * entropy, parts)


def test_vat_direction_is_power_iteration_on_the_hessian():
    """One iteration: the Hessian's product with d0. Many: the Hessian's top eigenvector."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    x, d0 = torch.rand(2, 6, 3, 4, 4, dtype=torch.double)
    prob = model(x).softmax(1).detach()
    once, often = (vat_direction(model, x, prob, 1e-4, n, d0 - 0.5) for n in (1, 200))
    for i in range(6):
        kl = partial(kl_to, model, prob[i])
        hessian = torch.autograd.functional.hessian(kl, x[i]).view(48, 48)
        product = hessian @ (d0[i] - 0.5).flatten()
        close(once[i].flatten(), product / product.norm(), rtol=0, atol=2e-4)
        top = torch.linalg.eigh(hessian).eigenvectors[:, -1]
        assert abs(top @ often[i].flatten()).item() > 0.999


def test_vat_direction_starts_at_random_for_each_image():
    """With no iteration it is the start: unit vectors, another one for each image and call."""
    x = torch.rand(20, 3, 8, 8)
    torch.manual_seed(0)
    first, second = (vat_direction(None, x, None, 1.0, 0).flatten(1) for _ in range(2))
    both = torch.cat([first, second])
    close(both @ both.T, torch.eye(40), rtol=0, atol=0.4)
    close(both.norm(dim=1), torch.ones(40))


def test_vat_direction_keeps_its_start_for_an_image_whose_gradient_vanishes():
    """The first image is too dark for this model's only layer; the others are not."""
    torch.manual_seed(0)
    x, d0 = torch.rand(2, 4, 3, 8, 8)
    x[0] = -1
    model = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(192, 5))
    direction = vat_direction(model, x, model(x).softmax(1).detach(), 0.1, 1, d0)
    start = F.normalize(d0, dim=(1, 2, 3))
    close(direction[0], start[0])
    for i in range(1, 4):
        assert (direction[i] - start[i]).norm() > 0.1


def test_vat_direction_has_length_1_where_the_model_is_very_sure():
    """The gradient is about 1e-24 there, its squares below what float32 holds."""
    torch.manual_seed(0)
    x = torch.rand(4, 3, 8, 8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    with torch.no_grad():
        model[1].bias[0] += 50

    def direction(dtype):
        inputs = x.to(dtype)
        prob = model.to(dtype)(inputs).softmax(1).detach()
        return vat_direction(model, inputs, prob, 0.1, 1, inputs - 0.5)

    once, exact = direction(torch.float32), direction(torch.float64)
    close(once.flatten(1).norm(dim=1), torch.ones(4))
    close(once.double(), exact, rtol=0, atol=1e-3)


def test_fixmatch_loss_sample_by_sample():
    """The threshold is the confidence of one of the images, which counts."""
    model = plain_net(25)  # confident on some images, not on others
    x_l, x_weak, x_strong = torch.rand(28, 3, 32, 32, dtype=torch.double).split([4, 12, 12])
    threshold = model(x_weak).float().softmax(1).amax(1).sort().values[5].item()
    labeled = sum(-prob_of(model, x)[y].log() / 4 for x, y in zip(x_l, Y))
    unlabeled = 0
    for weak, strong in zip(x_weak, x_strong):
        prob = prob_of(model, weak)
        if prob.max() > threshold - 1e-6:
            unlabeled -= prob_of(model, strong)[prob.argmax()].log() / 12
    result = fixmatch_loss(model, x_l, Y, x_weak, x_strong, threshold, 0.7)
    parts = {"loss_labeled": labeled, "loss_unlabeled": unlabeled, "mask_rate": 7 / 12}
    check_loss(model, result, labeled + 0.7 * unlabeled, parts)


class Noting(nn.Module):
    """Batch norm and a linear layer; notes each forward's images, mode and need of a gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.bn = nn.BatchNorm2d(3)
        self.linear = nn.Linear(48, 10)
        self.forwards = []

    def forward(self, x):
        self.forwards.append((x.detach().clone(), self.training, torch.is_grad_enabled()))
        return self.linear(self.bn(x).flatten(1))


@pytest.fixture
def batches():
    """Three batches of images, each brighter than the one before."""
    torch.manual_seed(1)
    return torch.rand(4, 3, 4, 4), 2 * torch.rand(4, 3, 4, 4), 3 * torch.rand(4, 3, 4, 4)


def statistics_after(*forwards):
    """A batch norm's statistics after it has seen these images, forward by forward."""
    bn = nn.BatchNorm2d(3)
    for x in forwards:
        bn(x)
    return bn.state_dict()


def test_fixmatch_forwards_labeled_with_strong_views_then_weak_ones(batches):
    model = Noting()
    x_l, x_weak, x_strong = batches
    fixmatch_loss(model, x_l, Y, x_weak, x_strong, 0.5, 1.0)
    jointly = torch.cat([x_l, x_strong])
    same(model.forwards, [(jointly, True, True), (x_weak, True, False)])


def test_fixmatch_moves_the_statistics_with_both_forwards(batches):
    model = Noting()
    x_l, x_weak, x_strong = batches
    fixmatch_loss(model, x_l, Y, x_weak, x_strong, 0.5, 1.0)
    close(model.bn.state_dict(), statistics_after(torch.cat([x_l, x_strong]), x_weak))


def test_mixmatch_guesses_both_views_jointly_then_forwards_all(batches):
    model = Noting()
    mixmatch_loss(model, batches[0], Y, batches[1], batches[2], 0.5, 0.0, 1.0)
    views = torch.cat(batches[1:])
    same(model.forwards, [(views, True, False), (torch.cat(batches), True, True)])


def test_mixmatch_moves_the_statistics_with_only_the_mixed_images(batches):
    model = Noting()
    mixmatch_loss(model, batches[0], Y, batches[1], batches[2], 0.5, 0.0, 1.0)
    close(model.bn.state_dict(), statistics_after(torch.cat(batches)))


def test_vat_forwards_labeled_clean_and_perturbed_images_separately(batches):
    model = Noting()
    x_l, x_u, d0 = batches
    vat_loss(model, x_l, Y, x_u, 1.0, 3.0, 0, 1.0, 0.0, d0=d0)
    perturbed = x_u + 3 * F.normalize(d0, dim=(1, 2, 3))
    same(model.forwards, [(x_l, True, True), (x_u, True, True), (perturbed, True, True)])


def test_vat_moves_the_statistics_with_only_the_labeled_images(batches):
    model = Noting()
    x_l, x_u, _ = batches
    vat_loss(model, x_l, Y, x_u, 1.0, 3.0, 1, 1.0, 0.0)
    close(model.bn.state_dict(), statistics_after(x_l))


LOSS_OPTIONS = {  # of each method, none at its default; and what the loss gets
    "vat": (
        "--xi 0.9 --vat-eps 2.5 --power-iterations 2 --entropy-weight 0.1",
        {"xi": 0.9, "vat_eps": 2.5, "power_iterations": 2, "entropy_weight": 0.1},
    ),
    "mixmatch": ("--temperature 0.6 --alpha 0.8", {"temperature": 0.6, "alpha": 0.8}),
    "fixmatch": ("--mu 2 --threshold 0.2", {"threshold": 0.2}),
}


@pytest.mark.parametrize("flip, more", [("--flip", 0), ("--no-flip", 10)])
@each_script
def test_batch_loss_hands_the_loss_its_views_and_options(script, flip, more, monkeypatch):
    """weak_augment adds 1 and strong_augment 2, and 10 more without flips, so that a view tells
    where it comes from."""
    loss = getattr(script, f"{script.METHOD}_loss")
    calls = []

    def noting(*inputs, **named):
        calls.append(inspect.signature(loss).bind(*inputs, **named).arguments)
        return "a loss", "metrics"

    def fake(amount):
        return lambda x, flip: x + amount + (0 if flip else 10)

    monkeypatch.setattr(script, "weak_augment", fake(1))
    monkeypatch.setattr(script, "strong_augment", fake(2), raising=False)
    monkeypatch.setattr(script, f"{script.METHOD}_loss", noting)
    options, expected = LOSS_OPTIONS[script.METHOD]
    views = {
        "vat": {"x_u": 101},
        "mixmatch": {"x_u1": 101, "x_u2": 101},
        "fixmatch": {"x_weak": 101, "x_strong": 102},
    }
    x_l, x_u = (torch.full((4, 3, 8, 8), value, dtype=torch.uint8) for value in (10, 100))
    args = script.parse_args(["--lambda-u", "0.7", "--precision", "fp32", flip, *options.split()])
    result = script.batch_loss("a model", x_l, "labels", x_u, 0.123, args)
    for name, value in {"x_l": 11, **views[script.METHOD]}.items():
        expected = {**expected, name: torch.full((4, 3, 8, 8), (value + more) / 255)}
    expected = {**expected, "model": "a model", "y_l": "labels", "lambda_u": 0.123}
    assert result == ("a loss", "metrics") and len(calls) == 1
    assert calls[0].keys() == expected.keys()
    for name, value in expected.items():
        if torch.is_tensor(value):
            close(calls[0][name], value)
        else:
            assert calls[0][name] == value, name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@each_script
def test_precision_sets_autocast_around_the_loss(script, precision, monkeypatch):
    seen = []

    def noting(*inputs, **named):
        enabled = torch.is_autocast_enabled("cpu")
        seen.append(torch.get_autocast_dtype("cpu") if enabled else None)

    monkeypatch.setattr(script, f"{script.METHOD}_loss", noting)
    x = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    script.batch_loss(None, x, None, x, 1.0, script.parse_args(["--precision", precision]))
    assert seen == [{"fp32": None, "bf16": torch.bfloat16}[precision]]


def test_mixmatchs_autocast_keeps_no_casts(monkeypatch):
    """The guess is made without gradient; casts that torch 2.5 and 2.6 keep of it have none."""
    seen = []

    def noting(*inputs, **named):
        seen.append(torch.is_autocast_cache_enabled())

    monkeypatch.setattr(mixmatch_scar, "mixmatch_loss", noting)
    x = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    args = mixmatch_scar.parse_args(["--precision", "bf16"])
    mixmatch_scar.batch_loss(None, x, None, x, 1.0, args)
    assert seen == [False]


@each_script
def test_losses_of_bf16_logits_are_computed_in_float32(script):
    """As if the model had given the same numbers as float32."""

    class Coarse(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(48, 10)
            self.dtype = dtype

        def forward(self, x):
            return self.linear(x.flatten(1)).bfloat16().to(self.dtype)

    torch.manual_seed(1)
    x_l, x_u, x_v = torch.rand(3, 4, 3, 4, 4)
    losses = []
    for dtype in (torch.bfloat16, torch.float32):
        model = Coarse(dtype)
        if script is vat_scar:
            loss, metrics = vat_loss(model, x_l, Y, x_u, 1.0, 3.0, 1, 0.6, 0.2, d0=x_v - 0.5)
        elif script is mixmatch_scar:
            loss, metrics = mixmatch_loss(model, x_l, Y, x_u, x_v, 0.5, 0.0, 0.6)
        else:
            loss, metrics = fixmatch_loss(model, x_l, Y, x_u, x_v, 0.1, 0.6)
        losses.append({"loss": loss, **metrics})
    assert {value.dtype for value in losses[0].values()} == {torch.float32}
    close(*losses)


@each_script
def test_batch_loss_draws_each_view_anew(script, images, monkeypatch):
    """The views of unlabeled images differ, and so do those of two calls."""
    loss = getattr(script, f"{script.METHOD}_loss")
    views = []

    def noting(*inputs, **named):
        arguments = inspect.signature(loss).bind(*inputs, **named).arguments
        views.extend(value for name, value in arguments.items() if name.startswith("x_"))

    monkeypatch.setattr(script, f"{script.METHOD}_loss", noting)
    x, y = images[0][:16], images[1][:16]
    for _ in range(2):
        script.batch_loss(None, x, y, x, 1.0, script.parse_args(["--precision", "fp32"]))
    assert len(views) == (4 if script is vat_scar else 6)
    assert len({view.numpy().tobytes() for view in views}) == len(views)


@each_script
def test_bf16_gives_every_parameter_nearly_the_gradient_of_fp32(script, images):
    """A forward under no_grad comes first in MixMatch: autocast must not reuse its casts."""
    gradients = []
    for precision in ("fp32", "bf16"):
        args = script.parse_args(["--precision", precision])
        torch.manual_seed(0)
        model = WideResNet(10, 10, 1)
        loss, _ = script.batch_loss(
            model, images[0][:16], images[1][:16], images[0][16:32], 1.0, args
        )
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    fp32, bf16 = gradients
    for name in fp32:
        similarity = F.cosine_similarity(fp32[name].flatten(), bf16[name].flatten(), dim=0)
        assert similarity > 0.9, name
    assert not torch.equal(fp32["conv.weight"], bf16["conv.weight"])


@each_script
def test_batch_loss_compiles(script, images):
    """Without graph breaks, which would wait for the device; VAT's inner gradient needs one."""
    torch.compiler.reset()
    args, model = script.parse_args(["--precision", "fp32"]), WideResNet(10, 10, 1)
    whole = script is not vat_scar
    compiled = torch.compile(script.batch_loss, fullgraph=whole, backend="aot_eager")
    loss, _ = compiled(model, images[0][:4], images[1][:4], images[0][4:8], torch.tensor(0.5), args)
    loss.backward()
    assert loss.isfinite() and model.conv.weight.grad.isfinite().all()


# --------------------------------------------------------------------------------- SCAR's selection


class Brightness(nn.Module):
    """Two classes: whether an image's mean is above one half; in training mode it is useless."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3, affine=False)

    def forward(self, x):
        mean = self.bn(x).mean(dim=(1, 2, 3)) - 0.5
        return torch.stack([-mean, mean], dim=1)


@pytest.fixture
def gray_images():
    """510 uint8 images, more than go through the model at once: 85 times six levels of gray."""
    values = torch.tensor([0, 120, 126, 127, 129, 255], dtype=torch.uint8)
    return values.repeat(85).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)


@pytest.mark.parametrize("scale", [None, 255], ids=["uint8", "float"])
def test_select_clean_keeps_what_withstands_the_attack(gray_images, scale):
    """Black is attacked to 3, which stays dark; 126 to 129, which does not."""
    x = gray_images if scale is None else gray_images / scale
    keep, pseudo = vat_scar.select_clean(Brightness().train(), x, 3 / 255)
    assert pseudo.tolist() == 85 * [0, 0, 0, 0, 1, 1]
    assert keep.tolist() == 85 * [True, True, False, False, False, True]


def test_select_clean_is_algorithm_1_with_ten_classes(few):
    """Each image alone: its label, the attack away from that, the label again."""
    torch.manual_seed(5)
    model, x = WideResNet(10, 10, 1).eval(), few[0][:60]
    keep, pseudo = vat_scar.select_clean(model, x, 1 / 255)
    same_label, withstands = [], []
    for image, label in zip((x.float() / 255).split(1), pseudo.split(1)):
        same_label.append(model(image).argmax(dim=1) == label)
        attacked = fgsm(model, image, label, 1 / 255)
        withstands.append(model(attacked).argmax(dim=1) == label)
    assert 15 < keep.sum() < 45
    # rounding may decide on an image
    assert torch.cat(same_label).sum() >= 59
    assert (keep == torch.cat(withstands)).sum() >= 59


def test_select_clean_with_eps_0_keeps_all(gray_images):
    assert vat_scar.select_clean(Brightness(), gray_images, 0.0)[0].all()


@pytest.mark.parametrize(
    "name, side, at_once",
    [
        ("select_clean", 16, 256),
        ("select_clean", 32, 64),
        ("select_clean", 96, 7),
        ("select_clean", 300, 1),
        ("predict", 16, 512),
        ("predict", 32, 128),
        ("predict", 96, 14),
        ("predict", 400, 1),
    ],
)
def test_the_model_gets_as_many_pixels_at_once_as_64_or_128_small_images_have(name, side, at_once):
    """So that large images need no more memory here than in training."""
    seen = []

    class Seeing(Brightness):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    x = torch.zeros(at_once + 1, 3, side, side, dtype=torch.uint8)
    function = getattr(vat_scar, name)
    function(Seeing(), x, 1 / 255) if name == "select_clean" else function(Seeing(), x)
    forwards = 3 if name == "select_clean" else 1  # the labels, the attack, the labels again
    assert seen == [at_once] * forwards + [1] * forwards


def test_select_clean_leaves_the_model_in_eval_mode_and_its_statistics_alone(gray_images):
    model = Brightness().train()
    vat_scar.select_clean(model, gray_images, 3 / 255)
    assert not model.training and model.bn.num_batches_tracked == 0


def test_select_confident_takes_the_surest():
    """In float32 the second and the third both have a confidence of 1."""
    logits = torch.tensor([[9.0, 0.0, 0.0], [18.0, 0.0, 0.0], [20.0, 0.0, 0.0], [0.0, 0.1, 0.0]])
    assert vat_scar.select_confident(logits, 1).tolist() == [False, False, True, False]
    assert vat_scar.select_confident(logits, 3).tolist() == [True, True, True, False]


@pytest.fixture
def vats_table_2():
    """Table 2's VAT at eps 1: 7587 of 8227 right, 835 of 1773 wrong; 20 more without a label."""
    keep = torch.arange(10020) < 8227
    y = torch.zeros(10020, dtype=torch.int64)
    y[-20:] = -1
    pseudo = torch.zeros_like(y)
    pseudo[7587:8227] = 1
    pseudo[8227 : 8227 + 835] = 1
    return keep, pseudo, y


def test_selection_stats_counts_only_images_with_a_label(vats_table_2):
    stats = vat_scar.selection_stats(*vats_table_2)
    assert stats["kept"] == 8227 and stats["kept_correct"] == 7587
    assert stats["rejected"] == 1773 and stats["rejected_wrong"] == 835


def test_selection_stats_does_not_count_kept_images_without_a_label(vats_table_2):
    keep, pseudo, y = vats_table_2
    stats = vat_scar.selection_stats(~keep, pseudo, y)
    assert stats["kept"] == 1773 and stats["rejected"] == 8227


def test_sensitivity_and_specificity_are_equations_5_and_6(vats_table_2):
    stats = vat_scar.selection_stats(*vats_table_2)
    assert round(stats["sensitivity"], 2) == 92.22 and round(stats["specificity"], 2) == 47.10


def test_rates_of_nothing_are_nan(vats_table_2):
    keep, pseudo, y = vats_table_2
    assert math.isnan(vat_scar.selection_stats(keep & False, pseudo, y)["sensitivity"])
    assert math.isnan(vat_scar.selection_stats(keep | True, pseudo, y)["specificity"])


# -------------------------------------------------------------- optimizer, schedule, moving average


def settings(script, **values):
    """What parse_args gives, with these values."""
    return SimpleNamespace(**{**vars(script.parse_args(["--device", "cpu"])), **values})


@pytest.mark.parametrize("phase", ["pretrain", "finetune"])
def test_fixmatchs_lr_is_a_cosine_over_the_phase(phase):
    args = settings(fixmatch_scar, lr=0.5, lambda_u=0.7)
    for step in (0, 8, 16):
        expected = 0.5 * math.cos(7 * math.pi * step / (16 * 16)), 0.7
        assert fixmatch_scar.schedule(step, 16, phase, args) == pytest.approx(expected)


def test_vats_lambda_u_rises_over_two_fifths_of_pretraining():
    args = settings(vat_scar, lr=0.5, lambda_u=0.7)
    rates = [vat_scar.schedule(step, 10, "pretrain", args) for step in (0, 2, 4, 9)]
    assert rates == [(0.5, 0), (0.5, pytest.approx(0.35)), (0.5, 0.7), (0.5, 0.7)]


def test_vats_lambda_u_is_constant_in_fine_tuning():
    args = settings(vat_scar, lr=0.5, lambda_u=0.7)
    assert vat_scar.schedule(0, 10, "finetune", args) == (0.5, 0.7)


@pytest.mark.parametrize("batch_size, last", [(64, 16384), (16, 65536)])
def test_mixmatchs_lambda_u_rises_over_the_first_1048576_images(batch_size, last):
    """However long the run is."""
    args = settings(mixmatch_scar, lr=0.5, lambda_u=75, batch_size=batch_size)
    for step, ramp in ((0, 0), (last // 4, 0.25), (last, 1), (last + 1000, 1)):
        for total in (last // 2, 2 * last):
            assert mixmatch_scar.schedule(step, total, "pretrain", args) == (0.5, 75 * ramp)


def test_mixmatchs_lambda_u_is_constant_in_fine_tuning():
    """Whatever the length of this run: theta~ may come from another."""
    args = settings(mixmatch_scar, lr=0.5, lambda_u=75, batch_size=64)
    assert mixmatch_scar.schedule(0, 10, "finetune", args) == (0.5, 75)


def by_hand(script, weights, gradients, state, t, lr, decay):
    """What the optimizer makes of weights (by name) at its step t, from 0; state is its memory."""
    after = {}
    for name, p in weights.items():
        gradient = gradients[name]
        own_decay = decay if p.ndim > 1 else 0.0
        if script is fixmatch_scar:  # SGD, Nesterov momentum, L2
            gradient = gradient + own_decay * p
            state[name] = 0.9 * state.get(name, 0) + gradient
            after[name] = p - lr * (gradient + 0.9 * state[name])
        else:  # Adam, decoupled decay
            m, v = state.get(name, (0, 0))
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            state[name] = m, v
            m, v = m / (1 - 0.9 ** (t + 1)), v / (1 - 0.999 ** (t + 1))
            after[name] = p * (1 - lr * own_decay) - lr * m / (v.sqrt() + 1e-8)
    return after


@each_script
def test_make_optimizer_is_the_methods_by_hand(script):
    """200 steps with gradients that get smaller; weights decay, biases do not."""
    torch.manual_seed(0)
    model, state = nn.Linear(3, 2), {}
    optimizer = script.make_optimizer(model, settings(script, lr=0.01, weight_decay=0.5))
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for t in range(200):
        gradients = {name: torch.randn_like(p) / (1 + t) for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            p.grad = gradients[name]
        optimizer.step()
        expected = by_hand(script, expected, gradients, state, t, 0.01, 0.5)
    close(dict(model.named_parameters()), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def two_batch_norms():
    """An average and a model: batch norms whose weights, statistics and counters differ."""
    average, model = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    for i, tensor in enumerate(average.state_dict().values()):
        tensor.fill_(i)
    for i, tensor in enumerate(model.state_dict().values()):
        tensor.fill_(10 * i + 10)
    return average, model


def test_update_average_averages_weights_and_statistics(two_batch_norms):
    average, model = two_batch_norms
    vat_scar.update_average(average, model, torch.tensor(0.8))
    for i, name in enumerate(["weight", "bias", "running_mean", "running_var"]):
        close(average.state_dict()[name], torch.full((2,), 0.8 * i + 0.2 * (10 * i + 10)))


def test_update_average_copies_counters(two_batch_norms):
    average, model = two_batch_norms
    vat_scar.update_average(average, model, 0.8)
    assert average.num_batches_tracked == 50


def test_update_average_leaves_the_model_alone(two_batch_norms):
    average, model = two_batch_norms
    before = copy.deepcopy(model.state_dict())
    vat_scar.update_average(average, model, 0.8)
    same(model.state_dict(), before)


# -------------------------------------------------------------------------------------- the helpers


def test_predict_is_the_models_logits_in_eval_mode(images):
    """260 images, more than go through the model at once; uint8 or float."""
    model = WideResNet(10, 10, 1).train()
    x = images[0][:260]
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(x.float() / 255)
    for images_of_a_kind in (x, x / 255):
        close(vat_scar.predict(model.train(), images_of_a_kind), expected, rtol=1e-4, atol=1e-4)
    assert not model.training


@needs_cuda
def test_predict_on_cuda_is_that_of_the_cpu(images):
    """In float32, as fgsm."""
    torch.manual_seed(0)
    model, x = WideResNet(10, 10, 1), images[0][:100]
    on_cpu = vat_scar.predict(model, x)
    close(vat_scar.predict(model.cuda(), x.cuda()).cpu(), on_cpu, rtol=1e-3, atol=1e-3)


def test_predict_needs_no_gradient(images):
    assert not vat_scar.predict(WideResNet(10, 10, 1), images[0][:2]).requires_grad


def test_evaluate_is_accuracy_in_percent(gray_images):
    """Black, 120 and white are called dark, dark, bright; one of three labels is right."""
    x = gray_images[[0, 1, 5]]
    accuracy = vat_scar.evaluate(Brightness(), x, torch.tensor([1, 0, 0]))
    assert accuracy == pytest.approx(100 / 3)


def draw(seed=0, count=14):
    """Batches of 5 from 7 images."""
    generator = torch.Generator().manual_seed(seed)
    return vat_scar.draw_batches(torch.arange(10, 17), count, 5, generator)


def test_draw_batches_takes_each_image_once_a_pass():
    passes = draw().view(10, 7).sort(dim=1).values
    same(passes, torch.arange(10, 17).expand(10, 7))


def test_draw_batches_shuffles_each_pass_anew():
    assert len({tuple(one_pass) for one_pass in draw().view(10, 7).tolist()}) == 10


def test_draw_batches_draws_from_its_generator():
    same(draw(seed=1), draw(seed=1))
    assert not torch.equal(draw(seed=1), draw(seed=2))


def test_draw_batches_may_end_within_a_pass():
    assert draw(count=3).shape == (3, 5)


@pytest.fixture
def fake_cuda_graph(monkeypatch):
    """CUDA graphs on a CPU: while one records, a function must note how to compute its outputs."""
    notes = []

    class Graph:
        def replay(self):
            for compute in notes:
                compute()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "a stream")
    recording = []

    class Recording:
        def __init__(self, graph, stream):
            assert isinstance(graph, Graph) and stream == "a stream"

        def __enter__(self):
            recording.append(True)

        def __exit__(self, *error):
            recording.pop()

    monkeypatch.setattr(torch.cuda, "graph", Recording)
    calls = []

    def function(a, b):
        calls.append("recorded" if recording else "called")
        if not recording:
            return {"sum": 10 * a + b}
        result = torch.full((), math.nan)
        notes.append(lambda: result.copy_(10 * a + b))
        return {"sum": result}

    return SimpleNamespace(function=function, calls=calls)


def test_capture_calls_three_times_then_records_once(fake_cuda_graph):
    captured = vat_scar.capture(fake_cuda_graph.function)
    for _ in range(6):
        captured(torch.tensor(1.0), torch.tensor(2.0))
    assert fake_cuda_graph.calls == 3 * ["called"] + ["recorded"]


def test_capture_gives_each_calls_own_result(fake_cuda_graph):
    captured = vat_scar.capture(fake_cuda_graph.function)
    for i in range(6):
        assert captured(torch.tensor(float(i)), torch.tensor(0.5))["sum"] == 10 * i + 0.5


def test_capture_leaves_its_inputs_alone(fake_cuda_graph):
    captured = vat_scar.capture(fake_cuda_graph.function)
    inputs = [torch.tensor(float(i)) for i in range(7)]
    for a, b in itertools.pairwise(inputs):
        captured(a, b)
    assert inputs == [0, 1, 2, 3, 4, 5, 6]


@pytest.fixture
def old_and_new():
    """Contents that save takes, two of each kind, and how they are read."""
    red, blue = (Image.new("RGB", (2, 2), color) for color in ("red", "blue"))
    return {
        "text.csv": ("ä", "ö", lambda path: path.read_text(encoding="utf-8")),
        "picture.png": (red, blue, lambda path: Image.open(path).convert("RGB")),
        "tensors.pt": ({"w": torch.tensor(1)}, {"w": torch.tensor(2)}, vat_scar.load),
    }


@pytest.mark.parametrize("name", ["text.csv", "picture.png", "tensors.pt"])
def test_save_replaces_a_file(name, old_and_new, tmp_path):
    old, new, read = old_and_new[name]
    vat_scar.save(old, tmp_path / name)
    assert read(tmp_path / name) == old
    vat_scar.save(new, tmp_path / name)
    assert read(tmp_path / name) == new
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["text.csv", "picture.png", "tensors.pt"])
def test_save_leaves_the_old_file_until_the_new_one_is_whole(
    name, old_and_new, tmp_path, monkeypatch
):
    old, new, read = old_and_new[name]
    vat_scar.save(old, tmp_path / name)

    def killed(source, target):
        assert read(target) == old and read(source) == new
        raise InterruptedError

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(InterruptedError):
        vat_scar.save(new, tmp_path / name)
    assert read(tmp_path / name) == old


def test_load_brings_tensors_to_the_cpu(tmp_path, monkeypatch):
    """So that a file made on a GPU loads where there is none."""
    options = {}
    monkeypatch.setattr(torch, "load", lambda path, **named: options.update(named))
    vat_scar.load(tmp_path / "checkpoint.pt")
    assert options == {"map_location": "cpu", "weights_only": True}


def test_two_processes_write_different_temporary_files(tmp_path, monkeypatch):
    """Until they are renamed: the process's number is in the name."""
    written = []
    monkeypatch.setattr(os, "replace", lambda source, target: written.append(source))
    for pid in (123, 456):
        monkeypatch.setattr(os, "getpid", lambda: pid)
        vat_scar.save("text", tmp_path / "metrics.csv")
    assert len(set(written)) == 2


def test_only_process_0_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(vat_scar, "RANK", 1)
    vat_scar.save("text", tmp_path / "metrics.csv")
    assert not any(tmp_path.iterdir())


def test_fingerprint_tells_values_shapes_and_words_apart():
    images = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    other_value = images.clone()
    other_value[1, 2, 1, 1] = 0
    fingerprints = [
        vat_scar.fingerprint(*inputs)
        for inputs in (
            ([images],),
            ([other_value],),
            ([images.view(3, 2, 2, 2)],),
            ([images, torch.tensor(1)],),
            ([torch.tensor(1), images],),
            ([images], ["a", ["b"]]),
            ([images], [["a"], "b"]),
            ([images], ["a", ["c"]]),
        )
    ]
    assert len(set(fingerprints)) == len(fingerprints)
    assert all(re.fullmatch("[0-9a-f]{16}", digest) for digest in fingerprints)


def test_fingerprint_depends_on_nothing_else():
    """Not on how tensors lie in memory, nor on what process computes it."""
    images = torch.arange(24, dtype=torch.float32).view(2, 3, 2, 2)
    words = b'["a", "\\udce9"]'
    digest = hashlib.sha256(words + b"(2, 3, 2, 2)" + images.numpy().tobytes()).hexdigest()
    for layout in (torch.contiguous_format, torch.channels_last):
        tensor = images.to(memory_format=layout)
        assert vat_scar.fingerprint([tensor], ["a", odd_name("é")]) == digest[:16]


def test_average_over_processes_is_the_mean_of_each_tensor(monkeypatch):
    """The fake exchange adds what the other three processes would send."""
    ours, theirs = [torch.ones(2, 3), torch.zeros(4), torch.tensor(1.0)], torch.arange(11.0)
    monkeypatch.setattr(vat_scar, "WORLD_SIZE", 4)
    monkeypatch.setattr(vat_scar.dist, "all_reduce", lambda flat: flat.add_(theirs))
    vat_scar.average_over_processes(ours)
    close(ours, [(1 + theirs[:6].view(2, 3)) / 4, theirs[6:10] / 4, torch.tensor(2.75)])


def test_one_process_exchanges_nothing(monkeypatch):
    monkeypatch.setattr(vat_scar.dist, "all_reduce", pytest.fail)
    vat_scar.average_over_processes([torch.ones(2)])


# --------------------------------------------------------------------------------- files and tables


@pytest.mark.parametrize(
    "options, title",
    [
        ("--data cifar10", "CIFAR-10"),
        ("--data svhn", "svhn"),
        ("--data folder --data-dir some/cifar10-jpeg", "CIFAR-10 (JPEG)"),
        ("--data folder --data-dir some/cats", "cats"),
    ],
)
def test_data_title_names_the_data_set_or_the_folder(options, title):
    assert vat_scar.data_title(vat_scar.parse_args(options.split())) == title


def test_machine_info_names_the_cpu_processes_and_versions(monkeypatch):
    monkeypatch.setattr(vat_scar, "WORLD_SIZE", 4)
    info = vat_scar.machine_info(settings(vat_scar, device="cpu"))
    assert "CPU" in info["device"] and info["peak_memory_gib"] is None and info["ranks"] == 4
    assert info["versions"]["torch"] == torch.__version__
    assert info["versions"]["torchvision"] == torchvision.__version__
    assert info["versions"]["numpy"] == np.__version__
    assert info["versions"]["pillow"] == Image.__version__
    assert sys.version.startswith(info["versions"]["python"])


def test_machine_info_names_the_gpu_and_its_peak_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**29)
    info = vat_scar.machine_info(settings(vat_scar, device="cuda"))
    assert info["device"] == "a GPU" and info["peak_memory_gib"] == 1.5


def test_csv_text_quotes_commas():
    rows = [{"file": "a, b", "kept": 1}, {"file": "c", "kept": 0}]
    assert vat_scar.csv_text(rows) == 'file,kept\n"a, b",1\nc,0\n'


def test_without_nan_replaces_only_nan():
    assert vat_scar.without_nan({"a": math.nan, "b": 0.0, "c": 2}) == {"a": None, "b": 0, "c": 2}


def test_table2_rows_are_selections_at_each_eps_in_order(gray_images):
    """85 times 0, 120, 126, 127, 129, 255; all are labeled dark, so two of six are wrong."""
    y = torch.zeros(510, dtype=torch.int64)
    rows = vat_scar.table2_rows(Brightness(), gray_images, y, {10.0, 3.0})
    assert [row["eps"] for row in rows] == [3, 10]
    names = ["kept", "kept_correct", "rejected", "rejected_wrong"]
    assert [{name: row[name] / 85 for name in names} for row in rows] == [
        {"kept": 3, "kept_correct": 2, "rejected": 3, "rejected_wrong": 1},
        {"kept": 2, "kept_correct": 1, "rejected": 4, "rejected_wrong": 1},
    ]
    assert [row["sensitivity"] for row in rows] == pytest.approx([200 / 3, 50])


def test_table2_rows_have_no_nan(gray_images):
    """At eps 0 nothing is rejected."""
    y = torch.zeros(510, dtype=torch.int64)
    (row,) = vat_scar.table2_rows(Brightness(), gray_images, y, {0.0})
    assert row["specificity"] is None


def test_selection_rows_say_for_each_image_what_was_done():
    rows = vat_scar.selection_rows(
        names=["a.png", "b.png"],
        classes=["cat", "dog"],
        kept=torch.tensor([True, False]),
        label=torch.tensor([1, 0]),
        confidence=torch.tensor([0.75, 0.5]),
        final_logits=torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(4.0)]]),
    )
    columns = ["file", "label", "confidence", "kept", "final_label", "final_confidence"]
    assert rows == [
        dict(zip(columns, ["a.png", "dog", "0.750000", 1, "cat", "0.750000"])),
        dict(zip(columns, ["b.png", "cat", "0.500000", 0, "dog", "0.800000"])),
    ]


@pytest.fixture
def picture():
    """selection_picture of 60 random images, whose corner tells their number, of cats and dogs.

    Even ones were kept; all are labeled cat but the last third, which has no true label.
    """
    n = torch.arange(60)
    x = torch.randint(0, 256, (60, 3, 8, 8), generator=torch.Generator().manual_seed(1)).byte()
    x[:, :, 0, 0] = n[:, None].byte()
    keep = n % 2 == 0
    pseudo = n // 2 % 2
    y = torch.where(n < 40, 0, -1)
    pixels = np.asarray(vat_scar.selection_picture(x, keep, pseudo, y, ["cat", "dog"]))
    left = pixels.shape[1] - 17 * 14  # where the columns begin: 8 kept, a gap, 8 rejected
    cells = []
    for row, column in itertools.product(range(2), range(17)):
        corner = 16 + 14 * row, left + 14 * column
        cell = pixels[corner[0] : corner[0] + 12, corner[1] : corner[1] + 12]
        if column != 8:
            number = int(cell[2, 2, 0])
            cells.append(SimpleNamespace(row=row, column=column, number=number, pixels=cell))
    return SimpleNamespace(cells=cells, x=x, y=y, keep=keep, pseudo=pseudo)


def test_picture_has_kept_images_on_the_left(picture):
    for cell in picture.cells:
        assert (cell.column < 8) == picture.keep[cell.number], cell.number


def test_picture_has_a_row_for_each_pseudo_label(picture):
    for cell in picture.cells:
        assert cell.row == picture.pseudo[cell.number], cell.number


def test_picture_shows_each_image_once(picture):
    assert len({cell.number for cell in picture.cells}) == 32
    for cell in picture.cells:
        image = picture.x[cell.number].permute(1, 2, 0).numpy()
        assert (cell.pixels[2:10, 2:10] == image).all(), cell.number


def test_pictures_frame_tells_right_from_wrong(picture):
    colors = {"right": (0, 128, 0), "wrong": (255, 0, 0), "unknown": (128, 128, 128)}
    seen = set()
    for cell in picture.cells:
        kind = "right" if picture.pseudo[cell.number] == picture.y[cell.number] else "wrong"
        if picture.y[cell.number] < 0:
            kind = "unknown"
        seen.add(kind)
        for edge in (cell.pixels[:2], cell.pixels[10:], cell.pixels[:, 0], cell.pixels[:, 11]):
            assert (edge == colors[kind]).all(), (cell.number, kind)
    assert len(seen) == 3


def test_picture_labels_its_rows_and_columns(monkeypatch):
    """Above the columns, and in the classes' rows."""
    texts = {}
    draw = vat_scar.ImageDraw.Draw

    def noting(image):
        pen = draw(image)
        text = pen.text
        pen.text = lambda where, what, color: (
            texts.update({what: where}) or text(where, what, color)
        )
        return pen

    monkeypatch.setattr(vat_scar.ImageDraw, "Draw", noting)
    x = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    label = torch.tensor([0, 1])
    picture = vat_scar.selection_picture(x, label == 0, label, label, ["cat", "dog"])
    left = picture.width - 17 * 14
    assert texts["kept"][0] == left and texts["rejected"][0] == left + 9 * 14
    for row, name in enumerate(["cat", "dog"]):
        assert 16 + 14 * row <= texts[name][1] < 16 + 14 * (row + 1)
        assert texts[name][0] < left


def test_picture_has_at_most_100_rows_of_images_of_at_most_96_pixels():
    x = torch.full((8, 3, 200, 200), 50, dtype=torch.uint8)
    x[:, :, :, 100:] = 150
    label = torch.arange(8)
    picture = vat_scar.selection_picture(x, label < 9, label, label, ["a"] * 1000)
    assert picture.height == 16 + 100 * (96 + 6)
    row = np.asarray(picture)[16 + 50, picture.width - 17 * 102 :, 0]
    assert (row[2:42] == 50).all() and (row[56:98] == 150).all() and (row[100:200] == 255).all()


def test_picture_draws_images_at_random(picture):
    numbers = [cell.number for cell in picture.cells if cell.row == 0 and cell.column < 8]
    assert numbers != sorted(numbers) and max(numbers) > 40


RESULT = {
    "scored_on": "test",
    "data": "CIFAR-10",
    "select": "fgsm",
    "eps": 6.0,
    "pretrain_accuracy": 85.25,
    "final_accuracy": 86.79,
    "command": "python vat_scar.py --seed 3",
    "table2": [
        {"eps": 1.0, "kept": 8, "kept_correct": 6, "rejected": 4, "rejected_wrong": 1},
        {"eps": 2.5, "kept": 0, "kept_correct": 0, "rejected": 12, "rejected_wrong": 3},
    ],
}


def test_printed_tables(capsys):
    vat_scar.print_tables(RESULT, "runs/mine")
    assert capsys.readouterr().out.splitlines()[:11] == [
        "",
        "Table 1: test accuracy (%) on CIFAR-10",
        "VAT                    85.25",
        "VAT + SCAR (eps 6)     86.79",
        "",
        "Table 2: the pretrained VAT on the test images (%)",
        "           sensitivity: right among kept    specificity: wrong among rejected",
        "eps 1      75.00 (6/8)                      25.00 (1/4)",
        "eps 2.5    none (0/0)                       25.00 (3/12)",
        "",
        "Output files: runs/mine",
    ]


@pytest.mark.parametrize(
    "select, eps, name",
    [
        ("none", 6, "nothing (control)"),
        ("confidence", 6, "the most confident (as many as eps 6 keeps)"),
        ("fgsm", 0, "every pseudo-label (eps 0)"),
    ],
)
def test_printed_table_1_names_what_was_added(select, eps, name, capsys):
    """As results/tables.py does."""
    vat_scar.print_tables({**RESULT, "select": select, "eps": eps}, "runs/mine")
    assert f"\nVAT + {name}     86.79\n" in capsys.readouterr().out


@pytest.mark.parametrize("select", ["fgsm", "confidence"])
def test_printed_command_for_the_control_has_a_line_of_its_own(select, capsys, monkeypatch):
    monkeypatch.delenv("CONTROL_FOLLOWS", raising=False)
    vat_scar.print_tables({**RESULT, "select": select}, "my runs/a")
    command = "python vat_scar.py --seed 3 --select none --pretrained 'my runs/a/pretrain.pt'"
    assert capsys.readouterr().out.endswith(f"\n{command} --out 'my runs/a-control'\n")


def test_no_control_is_suggested_where_it_runs_anyway(capsys, monkeypatch):
    """After a control, and where run_all.sh runs it."""
    monkeypatch.delenv("CONTROL_FOLLOWS", raising=False)
    vat_scar.print_tables({**RESULT, "select": "none"}, "runs/mine")
    monkeypatch.setenv("CONTROL_FOLLOWS", "1")
    vat_scar.print_tables(RESULT, "runs/mine")
    assert "--pretrained" not in capsys.readouterr().out


# --------------------------------------------------------------------------------- the command line

DEFAULTS = {
    "data": "cifar10",
    "data_dir": "data",
    "image_size": 32,
    "flip": True,
    "num_labeled": None,
    "val": 0,
    "seed": 0,
    "depth": 28,
    "width": 2,
    "epochs": 200,
    "steps_per_epoch": 1024,
    "batch_size": 64,
    "ema_decay": 0.999,
    "select": "fgsm",
    "table2_eps": [1, 2, 3, 4, 6],
    "pretrained": None,
    "device": "cpu",
    "precision": "fp32",
    "compile": False,
    "tensorboard": False,
}
OWN_DEFAULTS = {
    "vat": {
        "mu": 1,
        "lr": 0.002,
        "weight_decay": 0.02,
        "lambda_u": 0.3,
        "xi": 1,
        "vat_eps": 3,
        "power_iterations": 1,
        "entropy_weight": 0,
        "eps": 6,
        "out": "runs/vat__cifar10__fgsm-eps6__seed0",
    },
    "mixmatch": {
        "mu": 1,
        "lr": 0.002,
        "weight_decay": 0.02,
        "lambda_u": 0.75,
        "temperature": 0.5,
        "alpha": 0.75,
        "eps": 1,
        "out": "runs/mixmatch__cifar10__fgsm-eps1__seed0",
    },
    "fixmatch": {
        "mu": 7,
        "lr": 0.03,
        "weight_decay": 5e-4,
        "lambda_u": 1,
        "threshold": 0.95,
        "eps": 1,
        "out": "runs/fixmatch__cifar10__fgsm-eps1__seed0",
    },
}


@each_script
def test_defaults(script):
    args = vars(script.parse_args(["--device", "cpu"]))
    assert args == {**DEFAULTS, **OWN_DEFAULTS[script.METHOD]}


@pytest.mark.parametrize("data", ["cifar100", "svhn", "stl10", "folder", "synthetic"])
@each_script
def test_takes_each_data_set_and_changes_no_other_default(script, data):
    """But for svhn's digits, which are not flipped."""
    args = vars(script.parse_args(["--device", "cpu", "--data", data, "--out", "runs/mine"]))
    assert args == {
        **DEFAULTS,
        **OWN_DEFAULTS[script.METHOD],
        "data": data,
        "flip": data != "svhn",
        "out": "runs/mine",
    }


@each_script
def test_flips_are_as_asked_for_whatever_the_data(script):
    assert script.parse_args(["--data", "svhn", "--flip"]).flip is True
    assert script.parse_args(["--no-flip"]).flip is False


@pytest.mark.parametrize(
    "options, out",
    [
        ("--data svhn --eps 2.5 --seed 4", "runs/vat__svhn__fgsm-eps2.5__seed4"),
        ("--select none --eps 3", "runs/vat__cifar10__none-eps3__seed0"),
        ("--data folder --data-dir some/cats", "runs/vat__cats__fgsm-eps6__seed0"),
        ("--data folder --data-dir .", f"runs/vat__{Path.cwd().name}__fgsm-eps6__seed0"),
        ("--out mine --seed 4", "mine"),
    ],
)
def test_the_run_folder_names_method_data_selection_and_seed(options, out):
    assert vat_scar.parse_args(options.split()).out == out


@pytest.fixture(params=["bf16", "no bf16"])
def gpu(request, monkeypatch):
    """A GPU, as far as parse_args looks at it; without bf16 it emulates that."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or request.param == "bf16",
    )
    return request.param


@each_script
def test_auto_means_cuda_compiled_and_bf16_where_the_gpu_has_it(script, gpu):
    args = script.parse_args([])
    assert args.device == "cuda" and args.compile
    assert args.precision == ("bf16" if gpu == "bf16" else "fp32")


@each_script
def test_explicit_options_override_auto_on_a_gpu(script, gpu):
    args = script.parse_args(["--no-compile", "--precision", "fp32", "--device", "cuda"])
    assert (args.device, args.precision, args.compile) == ("cuda", "fp32", False)
    args = script.parse_args(["--device", "cpu"])
    assert (args.device, args.precision, args.compile) == ("cpu", "fp32", False)
    assert script.parse_args(["--device", "cpu", "--precision", "bf16"]).precision == "bf16"


REFUSED = [
    ("--depth 27", "--depth must be 6n + 4 (10, 16, 22, 28, ...): 27"),
    ("--depth 4", "--depth must be 6n + 4 (10, 16, 22, 28, ...): 4"),
    ("--data imagenet", "invalid choice: 'imagenet'"),
    ("--select all", "invalid choice: 'all'"),
    ("--epoch 3", "unrecognized arguments: --epoch"),
    ("--epochs 2.5", "--epochs: invalid int value: '2.5'"),
    ("--width 0", "--width must be at least 1: 0"),
    ("--epochs 0", "--epochs must be at least 1: 0"),
    ("--steps-per-epoch 0", "--steps-per-epoch must be at least 1: 0"),
    ("--batch-size 0", "--batch-size must be at least 1: 0"),
    ("--eps 256", "--eps and --table2-eps must be from 0 to 255: 256"),
    ("--table2-eps 1 -2", "--eps and --table2-eps must be from 0 to 255: -2"),
    ("--table2-eps nan", "--eps and --table2-eps must be from 0 to 255: nan"),
    ("--ema-decay 1.5", "--ema-decay must be from 0 to 1: 1.5"),
    ("--image-size 8", "--image-size must be at least 16: 8"),
    ("--eps nan", "--eps must be a finite number and not negative: nan"),
    ("--num-labeled 9", "--num-labeled 9 is too few: there are 10 classes"),
    ("--num-labeled 290 --val 10", "after --num-labeled 290, --val 10 leaves no unlabeled image"),
    ("--pretrained=", "cannot read .: Is a directory"),
    ("--pretrained nowhere/theta.pt", "cannot read nowhere/theta.pt: No such file or directory"),
]
OWN_REFUSED = [
    (vat_scar, "--xi 0", "--xi must be above 0"),
    (mixmatch_scar, "--temperature 0", "--temperature must be above 0"),
    (mixmatch_scar, "--alpha 0.001", "--alpha must be 0 (no MixUp) or at least 0.01"),
    (fixmatch_scar, "--threshold 2", "--threshold is a probability, at most 1: 2"),
    (fixmatch_scar, "--mu 0", "--mu must be at least 1: 0"),
]
ALL_REFUSED = [(vat_scar, options, sentence) for options, sentence in REFUSED] + OWN_REFUSED


@pytest.mark.parametrize(
    "script, options, sentence", ALL_REFUSED, ids=[row[1] for row in ALL_REFUSED]
)
def test_bad_options_are_refused_before_anything_is_written(
    script, options, sentence, few_images, tmp_path, capsys
):
    """In one sentence, before anything is written."""
    argv = [*SMALL, "--out", tmp_path / "run", *options.split()]
    assert sentence in refusal(capsys, script, *argv)
    assert not any(tmp_path.iterdir())


def number_options():
    """A script and an option of it that takes a number, for all of them."""
    options = []
    for script in SCRIPTS:
        defaults = {**DEFAULTS, **OWN_DEFAULTS[script.METHOD], "num_labeled": 4000}
        if script is not fixmatch_scar:
            del defaults["mu"]
        for name, value in defaults.items():
            if type(value) in (int, float):
                options.append((script, "--" + name.replace("_", "-")))
    return options


NUMBERS = number_options()


@pytest.mark.parametrize(
    "script, option", NUMBERS, ids=[script.METHOD + option for script, option in NUMBERS]
)
def test_negative_and_infinite_numbers_are_refused(script, option, capsys):
    sentence = refusal(capsys, script, option, -1)
    assert sentence.startswith(f"{option} must be a finite number and not negative: -1")
    assert option in refusal(capsys, script, option, "inf")


@pytest.mark.parametrize(
    "options",
    ["--eps 0", "--eps 255", "--ema-decay 0", "--ema-decay 1", "--image-size 16", "--lr 0"],
)
def test_the_ends_of_a_range_are_accepted(options):
    vat_scar.parse_args(options.split())


@pytest.mark.parametrize("options", ["--alpha 0", "--alpha 0.01"])
def test_mixmatch_takes_alpha_0_and_from_0_01(options):
    mixmatch_scar.parse_args(options.split())


def test_fixmatch_takes_a_threshold_of_1():
    assert fixmatch_scar.parse_args(["--threshold", "1"]).threshold == 1


def test_tensorboard_without_the_package_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vat_scar.importlib.util, "find_spec", lambda name: None)
    assert "pip install tensorboard" in refusal(capsys, vat_scar, "--tensorboard")


def test_cuda_without_a_gpu_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no NVIDIA GPU" in refusal(capsys, vat_scar, "--device", "cuda")


def test_a_torch_without_cuda_refuses_it_in_a_sentence(monkeypatch, capsys):
    """torch.cuda of a build for CPUs raises where it is asked for more than whether it is there."""

    def fail(*inputs, **options):
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("is_bf16_supported", "get_device_name", "set_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, fail)
    assert "no NVIDIA GPU" in refusal(capsys, vat_scar, "--device", "cuda")
    assert vat_scar.parse_args([]).device == "cpu"


def test_a_batch_that_the_processes_do_not_divide_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(vat_scar, "WORLD_SIZE", 3)
    sentence = refusal(capsys, vat_scar, "--batch-size", 4)
    assert sentence == "--batch-size 4 is not divisible by 3 processes"


# ------------------------------------------------------------------------------------ the whole run


def snapshot(value):
    """Tensors and models as they are now."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value)
    if isinstance(value, list):
        return [snapshot(part) for part in value]
    return value.clone() if torch.is_tensor(value) else value


WATCHED = [
    "load_images",
    "image_names",
    "split_labeled",
    "select_clean",
    "batch_loss",
    "update_average",
    "predict",
    "evaluate",
    "draw_batches",
    "average_over_processes",
    "selection_picture",
]


def halve(tensors):
    """An average over two processes of which the other has nothing but zeros."""
    for tensor in tensors:
        tensor.mul_(0.5)


def watch(script, out, few, *options, average_over_processes=None):
    """Runs main on the few images; returns what it returned, printed and called.

    calls[name] has for each call of a function in WATCHED the arguments by their names, as they
    were then, the result, and the state of torch's generator when it was called. The clock shows
    at its n-th reading n * n * n seconds.
    """
    calls = {name: [] for name in WATCHED}

    def watching(name, function):
        signature = inspect.signature(function)

        def call(*inputs, **named):
            arguments = signature.bind(*inputs, **named).arguments
            noted = SimpleNamespace(**{key: snapshot(value) for key, value in arguments.items()})
            noted.generator_state = torch.get_rng_state()
            calls[name].append(noted)
            noted.result = function(*inputs, **named)
            return noted.result

        return call

    functions = {name: getattr(script, name) for name in WATCHED}
    functions["load_images"] = lambda data, data_dir, size: few
    functions["image_names"] = lambda data, data_dir: (SHAPES, [], ["a", "b", "c", "d", "e", "f"])
    if average_over_processes is not None:
        functions["average_over_processes"] = average_over_processes
    readings = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(readings) ** 3))
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(script, "time", clock)
        for name, function in functions.items():
            patch.setattr(script, name, watching(name, function))
        result = run(script, out, *options)
    return SimpleNamespace(
        calls=calls,
        unlabeled_draws=calls["draw_batches"][::2],  # an epoch's first
        labeled_draws=calls["draw_batches"][1::2],
        result=result,
        printed=printed.getvalue(),
        out=out,
    )


OPTIONS = (
    "--data-dir pictures --seed 3 --val 50 --table2-eps 0.5 --lr 0.004 --weight-decay 0.3 "
    "--lambda-u 0.6 --ema-decay 0.15"
).split()
EPS = {"vat": 8.5, "mixmatch": 8.5, "fixmatch": 2.5}  # at which about half are kept
STEPS = [(phase, t) for phase in ("pretrain", "finetune") for t in range(6)]  # of a run


@pytest.fixture(scope="module", params=SCRIPTS, ids=NAMES)
def watched(request, few, tmp_path_factory):
    """A watched run with each option at a value of its own: 2 phases of 2 epochs of 3 steps.

    Averages over processes are halved.
    """
    script = request.param
    eps = EPS[script.METHOD]
    options = [*OPTIONS, "--eps", str(eps), *LOSS_OPTIONS[script.METHOD][0].split()]
    out = tmp_path_factory.mktemp("watched") / "run"
    run = watch(script, out, few, *options, average_over_processes=halve)
    run.script = script
    run.eps = eps
    run.args = script.parse_args([*SMALL, *options, "--out", str(run.out)])
    run.x, run.y = few[:2]
    run.labeled, pool = split_labeled(run.y, 100, 3)
    held_out, rest = split_labeled(run.y[pool], 50, 3)
    run.unlabeled = pool[rest]
    run.held_out = pool[held_out]
    run.theta = load_model(run.out / "pretrain.pt")
    run.final = load_model(run.out / "model.pt")
    run.keep, run.pseudo = run.calls["select_clean"][0].result
    assert 30 < run.keep.sum() < 120
    return run


def test_images_are_those_of_the_options(watched):
    (call,) = watched.calls["load_images"]
    assert (call.data, call.data_dir, call.size) == ("synthetic", "pictures", 24)


def test_names_are_those_of_the_options_images(watched):
    (call,) = watched.calls["image_names"]
    assert (call.data, call.data_dir) == ("synthetic", "pictures")


def test_labels_are_chosen_by_number_and_seed(watched):
    call = watched.calls["split_labeled"][0]
    assert (call.num_labeled, call.seed, call.classes) == (100, 3, SHAPES)
    assert not hasattr(call, "option")  # its default
    same(call.y, watched.y)


def test_validation_images_are_chosen_from_the_unlabeled_ones(watched):
    call = watched.calls["split_labeled"][1]
    assert (call.num_labeled, call.seed, call.classes) == (50, 3, SHAPES)
    assert call.option == "after --num-labeled 100, --val"
    pool = torch.cat([watched.unlabeled, watched.held_out]).sort().values
    same(call.y, watched.y[pool])


def test_the_run_says_what_it_works_on(watched):
    assert watched.printed.startswith(
        "Reading the images of synthetic\n"
        "10 classes; 100 labeled, 150 unlabeled and 50 validation images\n"
        "Files left out: 6 (a, b, c, d, e)\n"
        f"WRN-10-1 on cpu in fp32; files in {watched.out}\n"
    )


def test_a_run_says_that_it_reads_images_before_it_does(tmp_path, monkeypatch, capsys):
    def load(*options):
        raise ValueError("there are none")

    monkeypatch.setattr(vat_scar, "load_images", load)
    with pytest.raises(SystemExit):
        run(vat_scar, tmp_path / "run")
    assert capsys.readouterr().out == "Reading the images of synthetic\n"


def test_initial_weights_follow_from_the_seed(watched):
    torch.manual_seed(3)
    expected = WideResNet(10, 10, 1)
    same(watched.calls["batch_loss"][0].model.state_dict(), expected.state_dict())


def test_the_network_has_its_channels_last(watched):
    weight = watched.calls["batch_loss"][0].model.blocks[2].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_the_average_starts_as_the_model(watched):
    model = watched.calls["batch_loss"][0].model
    average = watched.calls["update_average"][0].average
    same(average.state_dict(), model.state_dict())


def test_the_average_needs_no_gradient(watched):
    for call in watched.calls["update_average"]:
        assert not any(p.requires_grad for p in call.average.parameters())


def test_each_step_gets_the_options(watched):
    assert len(watched.calls["batch_loss"]) == len(STEPS)
    for call in watched.calls["batch_loss"]:
        assert vars(call.args) == vars(watched.args)


def expected_rates(run, phase, t):
    """lr and lambda_u of a step, of 6 in a phase."""
    if run.script is fixmatch_scar:
        return 0.004 * math.cos(7 * math.pi * t / (16 * 6)), 0.6
    if run.script is mixmatch_scar:
        return 0.004, 0.6 * (4 * t / 2**20 if phase == "pretrain" else 1)
    return 0.004, 0.6 * (min(1, t / 2.4) if phase == "pretrain" else 1)


def test_each_step_has_its_lambda_u(watched):
    for (phase, t), call in zip(STEPS, watched.calls["batch_loss"], strict=True):
        _, lambda_u = expected_rates(watched, phase, t)
        assert call.lambda_u.item() == pytest.approx(lambda_u), (phase, t)


def test_each_step_is_the_optimizers_by_hand(watched):
    """From the loss's gradient, averaged over processes: lr of the step, weight decay, momentum;
    the optimizer begins anew in each phase."""
    for (phase, t), call, update in zip(
        STEPS, watched.calls["batch_loss"], watched.calls["update_average"], strict=True
    ):
        if t == 0:
            state = {}
        model = copy.deepcopy(call.model)
        torch.set_rng_state(call.generator_state)
        loss, _ = watched.script.batch_loss(
            model, call.x_l, call.y_l, call.x_u, call.lambda_u, call.args
        )
        loss.backward()
        gradients = {name: 0.5 * p.grad for name, p in model.named_parameters()}
        lr, _ = expected_rates(watched, phase, t)
        weights = {name: p.detach() for name, p in call.model.named_parameters()}
        expected = by_hand(watched.script, weights, gradients, state, t, lr, 0.3)
        for name, p in update.model.named_parameters():
            where = f"{phase}, step {t}: {name}"
            close(p, expected[name], rtol=1e-3, atol=1e-4, msg=lambda text: f"{where}: {text}")


def test_each_step_is_in_training_mode(watched):
    for call in watched.calls["batch_loss"]:
        assert all(module.training for module in call.model.modules())


def test_each_step_goes_on_where_the_last_one_ended(watched):
    """But for the first of fine-tuning, and for buffers that evaluation must not touch."""
    for i in range(1, 12):
        if i != 6:
            before = watched.calls["update_average"][i - 1].model
            same(watched.calls["batch_loss"][i].model.state_dict(), before.state_dict())


def test_the_average_follows_at_a_decay_that_warms_up_in_each_phase(watched):
    for (phase, t), call in zip(STEPS, watched.calls["update_average"], strict=True):
        expected = min(0.15, (1 + t) / (10 + t))
        assert call.decay.item() == pytest.approx(expected), (phase, t)


def test_the_average_is_updated_by_each_step(watched):
    """As update_average does it with that step's model; the last is model.pt."""
    calls = watched.calls["update_average"]
    for i, call in enumerate(calls):
        average = copy.deepcopy(call.average)
        watched.script.update_average(average, call.model, call.decay)
        following = watched.final if i == 11 else calls[i + 1].average
        close(average.state_dict(), following.state_dict())


def test_each_step_gets_the_images_that_were_drawn(watched):
    """Batches of unlabeled images are drawn first in each epoch, then those of labeled ones."""
    for i, call in enumerate(watched.calls["batch_loss"]):
        epoch, step = divmod(i, 3)
        same(call.x_u, watched.x[watched.unlabeled_draws[epoch].result[step]])
        same(call.x_l, watched.x[watched.labeled_draws[epoch].result[step]])


def test_batches_have_their_sizes(watched):
    mu = 2 if watched.script is fixmatch_scar else 1
    for call in watched.calls["batch_loss"]:
        assert (len(call.x_l), len(call.y_l), len(call.x_u)) == (4, 4, 4 * mu)


def test_unlabeled_batches_are_drawn_from_the_pool_in_both_phases(watched):
    for call in watched.unlabeled_draws:
        same(call.pool, watched.unlabeled)


def test_pretraining_draws_the_labeled_images(watched):
    for call in watched.labeled_draws[:2]:
        same(call.pool, watched.labeled)


def test_fine_tuning_draws_labeled_and_kept_images(watched):
    expected = torch.cat([watched.labeled, watched.unlabeled[watched.keep]]).sort().values
    for call in watched.labeled_draws[2:]:
        same(call.pool, expected)


def test_labeled_images_keep_their_labels_and_kept_ones_get_pseudo_labels(watched):
    labels = torch.full_like(watched.y, -1)
    labels[watched.labeled] = watched.y[watched.labeled]
    labels[watched.unlabeled[watched.keep]] = watched.pseudo[watched.keep]
    for i, call in enumerate(watched.calls["batch_loss"]):
        epoch, step = divmod(i, 3)
        same(call.y_l, labels[watched.labeled_draws[epoch].result[step]])


def test_no_two_epochs_draw_the_same_batches(watched):
    """Neither of labeled images nor of unlabeled ones."""
    draws = [call.result.tolist() for call in watched.calls["draw_batches"]]
    assert len(set(map(str, draws))) == 8


def test_no_two_steps_augment_alike(watched):
    states = [call.generator_state for call in watched.calls["batch_loss"]]
    assert len({state.numpy().tobytes() for state in states}) == 12


def test_batches_and_augmentation_have_seeds_of_their_own(watched):
    """torch's own generator does not draw the batches."""
    for call in watched.calls["draw_batches"]:
        assert call.generator is not torch.default_generator
        augmentation_seed = torch.Generator()
        augmentation_seed.set_state(call.generator_state)
        assert call.generator.initial_seed() != augmentation_seed.initial_seed()


def test_fine_tuning_starts_from_theta(watched):
    """Both the model and its average."""
    weights = watched.calls["batch_loss"][6].model.state_dict()
    same(weights, watched.theta.state_dict())
    same(watched.calls["update_average"][6].average.state_dict(), watched.theta.state_dict())


def test_theta_selects_from_the_unlabeled_images_as_they_are(watched):
    call = watched.calls["select_clean"][0]
    assert call.eps == watched.eps / 255
    same(call.x, watched.x[watched.unlabeled])
    same(call.model.state_dict(), watched.theta.state_dict())


def test_the_selection_is_counted_by_true_labels(watched):
    stats = watched.script.selection_stats(
        watched.keep, watched.pseudo, watched.y[watched.unlabeled]
    )
    selection = watched.result["selection"]
    assert {name: selection[name] for name in stats} == stats


def test_the_result_counts_added_images_by_class(watched):
    selection = watched.result["selection"]
    assert selection["unlabeled"] == 150 and selection["added"] == watched.keep.sum()
    labels = watched.pseudo[watched.keep].tolist()
    assert selection["kept_per_class"] == [labels.count(label) for label in range(10)]


def test_a_run_says_that_it_attacks_images_before_it_does(
    few_images, tmp_path, monkeypatch, capsys
):
    def select_clean(model, x, eps):
        raise Killed

    monkeypatch.setattr(vat_scar, "select_clean", select_clean)
    with pytest.raises(Killed):
        run(vat_scar, tmp_path / "run")
    assert capsys.readouterr().out.endswith("\nAttacking the 200 unlabeled images\n")


def test_the_run_says_what_it_selected(watched):
    accuracy = watched.result["pretrain_accuracy"]
    sentence = f"Pretraining reached {accuracy:.2f} % accuracy; {watched.keep.sum()} of 150"
    assert f"\n{sentence} unlabeled images join the labeled set\n" in watched.printed


def test_the_picture_is_of_the_selection(watched):
    (call,) = watched.calls["selection_picture"]
    same(call.x, watched.x[watched.unlabeled])
    same(call.y, watched.y[watched.unlabeled])
    same(call.keep, watched.keep)
    same(call.pseudo, watched.pseudo)
    assert call.classes == SHAPES
    with Image.open(watched.out / "selection.png") as image:
        assert image.tobytes() == call.result.tobytes()


def test_accuracies_are_of_the_held_out_images(watched):
    assert len(watched.calls["evaluate"]) == 5
    for call in watched.calls["evaluate"]:
        same(call.x, watched.x[watched.held_out])
        same(call.y, watched.y[watched.held_out])


def test_accuracies_are_of_the_moving_average(watched):
    """After each epoch, and theta~'s once more for the report."""
    updates = watched.calls["update_average"]
    averages = [updates[3].average, watched.theta, watched.theta, updates[9].average, watched.final]
    for call, average in zip(watched.calls["evaluate"], averages, strict=True):
        same(call.model.state_dict(), average.state_dict())


def test_the_result_has_thetas_accuracy_and_the_final_one(watched):
    _, _, theta, _, final = [call.result for call in watched.calls["evaluate"]]
    assert watched.result["pretrain_accuracy"] == theta
    assert watched.result["final_accuracy"] == final


def test_table_2_is_of_theta_on_the_held_out_images(watched):
    """At --table2-eps and --eps, after the selection itself."""
    calls = watched.calls["select_clean"][1:]
    assert [call.eps for call in calls] == [0.5 / 255, watched.eps / 255]
    for call in calls:
        same(call.model.state_dict(), watched.theta.state_dict())
        same(call.x, watched.x[watched.held_out])


def test_table_2_is_counted_by_true_labels(watched):
    script, y = watched.script, watched.y[watched.held_out]
    for eps, call, row in zip(
        [0.5, watched.eps], watched.calls["select_clean"][1:], watched.result["table2"], strict=True
    ):
        stats = script.without_nan(script.selection_stats(*call.result, y))
        assert row == {"eps": eps, **stats}


def test_metrics_csv_has_a_row_for_each_epoch(watched):
    rows = read_rows(watched.out / "metrics.csv")
    epochs = [(row["phase"], row["epoch"]) for row in rows]
    assert epochs == [("pretrain", "1"), ("pretrain", "2"), ("finetune", "1"), ("finetune", "2")]


def test_metrics_csv_has_the_means_over_steps_and_processes(watched):
    rows = read_rows(watched.out / "metrics.csv")
    results = [call.result for call in watched.calls["batch_loss"]]
    steps = [{"loss": loss, **metrics} for loss, metrics in results]
    for i, row in enumerate(rows):
        for name in steps[0]:
            mean = sum(step[name].item() for step in steps[3 * i : 3 * i + 3]) / 3
            assert float(row[name]) == pytest.approx(0.5 * mean, rel=1e-5, abs=1e-9), (i, name)


def test_metrics_csv_has_the_accuracy_of_each_epoch(watched):
    accuracies = [float(row["accuracy"]) for row in read_rows(watched.out / "metrics.csv")]
    evaluated = [call.result for call in watched.calls["evaluate"]]
    assert accuracies == evaluated[:2] + evaluated[3:]


def test_metrics_csv_has_the_lr_of_the_last_step(watched):
    for i, row in enumerate(read_rows(watched.out / "metrics.csv")):
        lr, _ = expected_rates(watched, *STEPS[3 * i + 2])
        assert float(row["lr"]) == pytest.approx(lr)


# the clock is read 4 times in each epoch: as it begins, before the steps, after them, at its end
MS_PER_STEP = [1000 * ((4 * i + 2) ** 3 - (4 * i + 1) ** 3) / 3 for i in range(4)]
SECONDS = [(4 * i + 3) ** 3 - (4 * i) ** 3 for i in range(4)]


def test_metrics_csv_has_the_time_of_each_epoch(watched):
    rows = read_rows(watched.out / "metrics.csv")
    assert [float(row["ms_per_step"]) for row in rows] == pytest.approx(MS_PER_STEP)
    assert [float(row["seconds"]) for row in rows] == SECONDS


def test_the_result_has_the_times_of_the_run(watched):
    assert watched.result["ms_per_step"] == pytest.approx(median(MS_PER_STEP))
    assert watched.result["seconds"] == sum(SECONDS)
    images = 12 if watched.script is fixmatch_scar else 8
    assert watched.result["images_per_second"] == pytest.approx(1000 * images / median(MS_PER_STEP))


def printed_epochs(printed):
    """The tables that a run prints while it trains: a list of the names and of the cells."""
    lines = re.findall(r"^(?:pretrain|finetune|       epoch) .*$", printed, re.MULTILINE)
    return [re.split(r" {2,}", re.sub(r"(?<=[a-z]) +(?=\d)", " ", line).strip()) for line in lines]


def test_each_epoch_prints_a_line_below_the_names(watched):
    lines = printed_epochs(watched.printed)
    names = lines[0]
    assert lines[3] == names and len(lines) == 6  # each phase has its heading
    rows = read_rows(watched.out / "metrics.csv")
    for line, row in zip(lines[1:3] + lines[4:], rows, strict=True):
        cells = dict(zip(names, line, strict=True))
        assert cells["epoch"] == f"{row['phase']} {row['epoch']}"
        assert cells["accuracy"] == f"{float(row['accuracy']):.2f}"
        assert cells["ms/step"] == f"{float(row['ms_per_step']):.0f}"
        for name in list(row)[list(row).index("loss") : list(row).index("accuracy")]:
            assert cells[name.removeprefix("loss_")] == f"{float(row[name]):.4f}"


def time_left(printed):
    return [line[-1] for line in printed_epochs(printed) if line[-1] != "left"]


def test_each_epoch_prints_the_time_left_at_its_pace(watched):
    """Three more epochs after the first, and so on."""
    expected = [f"{SECONDS[i] / 60 * (3 - i):.1f} min" for i in range(4)]
    assert time_left(watched.printed) == expected


@pytest.mark.parametrize(
    "seconds, left", [(3, "0.1 min"), (5399, "90.0 min"), (5400, "1.5 h"), (36000, "10.0 h")]
)
def test_the_time_left_is_in_minutes_then_in_hours(seconds, left):
    row = {"phase": "pretrain", "epoch": 1, "loss": 1, "accuracy": 50, "ms_per_step": 4.1}
    _, line = vat_scar.progress_lines(row, ["loss"], seconds)
    assert line.endswith(f"  {left}")


def test_an_epochs_numbers_stand_below_their_names():
    row = {"phase": "finetune", "epoch": 12, "loss": 1.98768, "loss_unlabeled": 0.5}
    row.update({"mask_rate": 0.25, "accuracy": 9.5, "ms_per_step": 103.6})
    lines = vat_scar.progress_lines(row, ["loss", "loss_unlabeled", "mask_rate"], 60)
    assert lines == (
        "       epoch    loss  unlabeled  mask_rate  accuracy  ms/step      left",
        "finetune  12  1.9877     0.5000     0.2500      9.50      104   1.0 min",
    )


def test_a_run_ends_with_its_tables(watched, capsys):
    watched.script.print_tables(watched.result, watched.out)
    assert watched.printed.endswith(capsys.readouterr().out)


def test_a_run_leaves_its_files(watched):
    assert {path.name for path in watched.out.iterdir()} == {
        "args.json", "checkpoint.pt", "metrics.csv", f"{watched.script.METHOD}_scar.py", "model.pt",
        "pretrain.pt", "result.json", "selection.csv", "selection.png",
    }  # fmt: skip


def test_args_json_has_the_options_and_what_was_read(watched, few):
    args = json.loads((watched.out / "args.json").read_text())
    assert args == {
        "method": watched.script.METHOD,
        **vars(watched.args),
        "classes": SHAPES,
        "images": f"300 + 100, hash {watched.script.fingerprint(few, [SHAPES, []])}",
        "pretrained_weights": None,
    }


def test_the_result_says_which_images_and_which_theta(watched):
    args = json.loads((watched.out / "args.json").read_text())
    assert watched.result["images"] == args["images"]
    weights = torch.load(watched.out / "pretrain.pt").values()
    assert watched.result["theta"] == watched.script.fingerprint(weights)


def test_result_json_is_strict_and_what_main_returns(watched):
    text = (watched.out / "result.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == watched.result  # no NaN


def test_the_result_has_the_command_as_a_shell_takes_it(few_images, tmp_path, monkeypatch):
    options = [*SMALL, "--epochs", "1", "--out", str(tmp_path / "my runs")]
    monkeypatch.setattr(sys, "argv", ["any/where/vat_scar.py", *options])
    monkeypatch.chdir(HERE)
    words = " ".join(options[:-1])
    assert vat_scar.main()["command"] == f"python vat_scar.py {words} '{tmp_path / 'my runs'}'"


def test_the_result_has_the_command_that_main_was_given(few_images, tmp_path, monkeypatch):
    """From a notebook, whose own command line says nothing."""
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.chdir(HERE / "results")
    options = [*SMALL, "--epochs", "1", "--out", str(tmp_path / "run")]
    command = vat_scar.main(options)["command"]
    assert command == f"python ../vat_scar.py {' '.join(options)}"


def test_the_result_says_what_ran(watched):
    result = watched.result
    assert (result["method"], result["data"]) == (watched.script.METHOD, "synthetic")
    assert (result["select"], result["eps"], result["seed"]) == ("fgsm", watched.eps, 3)
    assert result["scored_on"] == "validation"
    assert result["args"] == vars(watched.args)
    assert watched.script.machine_info(watched.args).items() <= result.items()


def test_the_copy_of_the_script_is_the_script(watched):
    name = f"{watched.script.METHOD}_scar.py"
    assert (watched.out / name).read_bytes() == (HERE / name).read_bytes()


def test_selection_csv_has_a_row_for_each_unlabeled_image(watched):
    rows = read_rows(watched.out / "selection.csv")
    assert [int(row["file"]) for row in rows] == watched.unlabeled.tolist()
    assert [row["kept"] == "1" for row in rows] == watched.keep.tolist()


@pytest.mark.parametrize("prefix, index", [("", 0), ("final_", 1)], ids=["theta", "final"])
def test_selection_csv_has_each_models_labels(watched, prefix, index):
    """What predict gave for the unlabeled images."""
    rows = read_rows(watched.out / "selection.csv")
    call = [call for call in watched.calls["predict"] if len(call.x) == 150][index]
    same(call.model.state_dict(), [watched.theta, watched.final][index].state_dict())
    same(call.x, watched.x[watched.unlabeled])
    confidence, label = call.result.softmax(dim=1).max(dim=1)
    assert [row[f"{prefix}label"] for row in rows] == [SHAPES[i] for i in label]
    confidences = [float(row[f"{prefix}confidence"]) for row in rows]
    assert confidences == pytest.approx(confidence.tolist(), abs=2e-6)


# ------------------------------------------------------------------------- what each option acts on


def aspects(run):
    """What an option may change, by name; each value compares with == and is exact."""
    steps = run.calls["batch_loss"]
    rows = read_rows(run.out / "metrics.csv")
    theta = torch.load(run.out / "pretrain.pt")
    return {
        "initial weights": [p.tolist() for p in steps[0].model.parameters()],
        "labeled batches": [call.result.tolist() for call in run.labeled_draws[:2]],
        "unlabeled batches": [call.result.tolist() for call in run.unlabeled_draws[:2]],
        "augmentation": [call.generator_state.tolist() for call in steps[:6:3]],
        "pretrained weights": [p.tolist() for p in steps[5].model.parameters()],
        "theta": [tensor.tolist() for tensor in theta.values()],
        "selection": run.labeled_draws[2].pool.tolist(),
        "scored images": run.calls["evaluate"][0].x.tolist(),
        "Table 2's rows": [row["eps"] for row in run.result["table2"]],
        "fine-tuning": [row["loss"] for row in rows[2:]],
    }


@pytest.fixture(scope="module")
def usual(few, tmp_path_factory):
    """The aspects of a FixMatch run."""
    run = watch(fixmatch_scar, tmp_path_factory.mktemp("usual") / "run", few, *USUAL)
    return aspects(run)


USUAL = "--seed 3 --eps 2.5 --lr 0.01 --lambda-u 0.6 --threshold 0.2 --mu 2 --select fgsm".split()
TRAINING = {"pretrained weights", "theta", "fine-tuning"}
BATCHES = {"labeled batches", "unlabeled batches"}
ACTS_ON = {
    "--table2-eps 1 4": {"Table 2's rows"},
    "--eps 0": {"selection", "fine-tuning", "Table 2's rows"},
    "--select none": {"selection", "fine-tuning"},
    "--select confidence": {"selection", "fine-tuning"},
    "--ema-decay 0": {"theta", "fine-tuning"},
    "--lr 0.02": TRAINING,
    "--weight-decay 0.3": TRAINING,
    "--lambda-u 0.3": TRAINING,
    "--threshold 0.95": TRAINING,
    "--precision bf16": TRAINING,
    "--no-flip": TRAINING,
    "--batch-size 5": TRAINING | BATCHES,
    "--mu 3": TRAINING | {"unlabeled batches"},
    "--val 30": TRAINING | BATCHES | {"scored images"},
    "--num-labeled 90": TRAINING | BATCHES,
    "--seed 4": TRAINING | BATCHES | {"initial weights", "augmentation"},
    "--data-dir elsewhere": set(),
}


@pytest.mark.parametrize("option", ACTS_ON)
def test_an_option_acts_where_it_should_and_nowhere_else(option, usual, few, tmp_path):
    run = aspects(watch(fixmatch_scar, tmp_path / "run", few, *USUAL, *option.split()))
    changed = {name for name in run if run[name] != usual[name]}
    if "theta" in changed:
        changed.discard("selection")  # another theta~ may select the same images
    assert changed == ACTS_ON[option]


def test_bf16_moves_the_weights_nearly_as_float32_does(few, tmp_path):
    """In the first epoch."""
    moves = []
    for precision in ("fp32", "bf16"):
        run = watch(fixmatch_scar, tmp_path / precision, few, *USUAL, "--precision", precision)
        before, after = run.calls["batch_loss"][0].model, run.calls["batch_loss"][3].model
        pairs = zip(before.parameters(), after.parameters())
        moves.append(torch.cat([(new - old).flatten() for old, new in pairs]))
    assert 0 < (moves[1] - moves[0]).norm() < 0.2 * moves[0].norm()


def test_a_control_sees_the_unlabeled_images_that_scar_sees_in_the_same_views(few, tmp_path):
    """Started from SCAR's pretraining, without the images that SCAR added."""
    scar = watch(fixmatch_scar, tmp_path / "scar", few, *USUAL)
    theta = tmp_path / "scar" / "pretrain.pt"
    options = [*USUAL, "--select", "none", "--pretrained", theta]
    control = watch(fixmatch_scar, tmp_path / "control", few, *options)
    assert scar.result["selection"]["added"] > 0 == control.result["selection"]["added"]
    for ours, theirs in zip(scar.calls["batch_loss"][6:], control.calls["batch_loss"], strict=True):
        same(ours.x_u, theirs.x_u)
        same(ours.generator_state, theirs.generator_state)


@pytest.fixture(scope="module")
def theta(tmp_path_factory):
    """A pretrain.pt, of random weights."""
    path = tmp_path_factory.mktemp("theta") / "pretrain.pt"
    torch.manual_seed(5)
    torch.save(WideResNet(10, 10, 1).state_dict(), path)
    return path


@pytest.fixture
def from_theta(few, theta, tmp_path):
    """A watched run of --select from the theta~ given by --pretrained."""

    def start(script, select):
        options = ("--select", select, "--eps", 2, "--pretrained", theta)
        return watch(script, tmp_path / "run", few, *options)

    return start


@each_script
def test_pretrained_goes_straight_to_fine_tuning(script, from_theta):
    run = from_theta(script, "fgsm")
    assert [row["phase"] for row in read_rows(run.out / "metrics.csv")] == 2 * ["finetune"]


def test_pretrained_leaves_one_phases_time(from_theta):
    run = from_theta(vat_scar, "none")
    assert time_left(run.printed) == [f"{SECONDS[0] / 60:.1f} min", "0.0 min"]


@each_script
def test_pretrained_is_theta(script, from_theta, theta):
    run = from_theta(script, "fgsm")
    expected = load_model(theta).state_dict()
    same(run.calls["select_clean"][0].model.state_dict(), expected)
    same(run.calls["batch_loss"][0].model.state_dict(), expected)
    same(torch.load(run.out / "pretrain.pt"), expected)


def test_select_none_adds_nothing(from_theta):
    run = from_theta(fixmatch_scar, "none")
    labeled, _ = split_labeled(run.calls["split_labeled"][0].y, 100, 0)
    same(run.labeled_draws[0].pool, labeled)
    assert run.result["selection"]["added"] == 0


def test_select_confidence_adds_the_surest_as_many_as_fgsm_keeps(from_theta):
    run = from_theta(fixmatch_scar, "confidence")
    keep, _ = run.calls["select_clean"][0].result
    logits = run.calls["predict"][0].result
    surest = logits.softmax(dim=1).amax(dim=1).argsort(descending=True)[: keep.sum()]
    labeled, unlabeled = split_labeled(run.calls["split_labeled"][0].y, 100, 0)
    added = set(run.labeled_draws[0].pool.tolist()) - set(labeled.tolist())
    assert 5 < keep.sum() < 195 and added == set(unlabeled[surest].tolist())


def test_select_confidence_gives_thetas_labels(from_theta):
    run = from_theta(fixmatch_scar, "confidence")
    labeled, unlabeled = split_labeled(run.calls["split_labeled"][0].y, 100, 0)
    labels = run.calls["split_labeled"][0].y.clone()
    _, labels[unlabeled] = run.calls["select_clean"][0].result
    for i, call in enumerate(run.calls["batch_loss"]):
        epoch, step = divmod(i, 3)
        same(call.y_l, labels[run.labeled_draws[epoch].result[step]])


@pytest.fixture
def compiled(monkeypatch):
    """The functions that torch.compile got; it leaves them as they are."""
    functions = []
    monkeypatch.setattr(torch, "compile", lambda function: functions.append(function) or function)
    return functions


@pytest.mark.parametrize("option, times", [("--compile", 1), ("--no-compile", 0)])
def test_compile_compiles_the_loss(option, times, compiled, few_images, tmp_path):
    run(mixmatch_scar, tmp_path / "run", option, "--epochs", 1)
    assert compiled == times * [mixmatch_scar.batch_loss]


def test_a_compiled_run_is_the_run(few_images, tmp_path, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    losses = []
    for option in ("--compile", "--no-compile"):
        run(mixmatch_scar, tmp_path / option, option, "--epochs", 1, "--lr", 1e-4)
        losses.append([float(row["loss"]) for row in read_rows(tmp_path / option / "metrics.csv")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_each_epoch_begins_in_training_mode(few_images, tmp_path, monkeypatch):
    """Even if somebody's own evaluate leaves the model in eval mode."""
    models, modes, batch_loss, evaluate = [], [], vat_scar.batch_loss, vat_scar.evaluate

    def watching(model, *inputs):
        models.append(model)
        modes.append(model.training)
        return batch_loss(model, *inputs)

    monkeypatch.setattr(vat_scar, "batch_loss", watching)
    monkeypatch.setattr(vat_scar, "evaluate", lambda _, x, y: evaluate(models[-1], x, y))
    run(vat_scar, tmp_path / "run")
    assert modes == 12 * [True] and not models[-1].training


@pytest.fixture
def scalars(monkeypatch):
    """What the run writes to TensorBoard: (name, value, epoch); and the folder."""
    written = []

    def writer(folder):
        written.append(folder)
        return SimpleNamespace(
            add_scalar=lambda *row: written.append(row), flush=lambda: written.append("flush")
        )

    board = SimpleNamespace(SummaryWriter=writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr(vat_scar.importlib.util, "find_spec", lambda name: name == "tensorboard")
    return written


def test_tensorboard_gets_each_epochs_numbers(few_images, tmp_path, scalars):
    run(vat_scar, tmp_path / "run", "--tensorboard")
    assert scalars[0] == tmp_path / "run"
    expected = {tmp_path / "run", "flush"}
    for row in read_rows(tmp_path / "run" / "metrics.csv"):
        for name in row.keys() - {"phase", "epoch"}:
            expected.add((f"{row['phase']}/{name}", float(row[name]), int(row["epoch"])))
    assert set(scalars) == expected


def test_tensorboard_is_flushed_after_each_epoch(few_images, tmp_path, scalars):
    run(vat_scar, tmp_path / "run", "--tensorboard", "--epochs", 1)
    numbers = [row for row in scalars[1:] if row != "flush"]
    first = [row for row in numbers if row[0].startswith("pretrain")]
    assert scalars[1 + len(first)] == scalars[-1] == "flush"


def test_without_tensorboard_nothing_is_written_for_it(few_images, tmp_path, scalars):
    run(vat_scar, tmp_path / "run", "--epochs", 1)
    assert scalars == []


def test_an_epoch_shows_its_steps_on_a_terminal(few_images, tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    with redirect_stdout(terminal):
        run(vat_scar, tmp_path / "run", "--epochs", 1, "--steps-per-epoch", 12)
    shown = re.findall(r"(\w+) 1: step (\d+) of 12\x1b\[K\r", terminal.getvalue())
    assert shown == [(phase, step) for phase in ("pretrain", "finetune") for step in ("0", "10")]


@pytest.fixture
def quick(few_images, tmp_path, monkeypatch):
    """Runs VAT's main with a network of one parameter and a loss of no work.

    step(i) may change the metrics of the i-th step.
    """

    class OneParameter(nn.Module):
        def __init__(self, classes, depth, width):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.scale * x.mean(dim=(2, 3)).repeat(1, 4)[:, :10]

    def start(*options, step=lambda i: {}):
        steps = itertools.count()

        def batch_loss(model, x_l, y_l, x_u, lambda_u, args):
            return model.scale**2, step(next(steps))

        monkeypatch.setattr(vat_scar, "WideResNet", OneParameter)
        monkeypatch.setattr(vat_scar, "batch_loss", batch_loss)
        return run(vat_scar, tmp_path / "run", *options)

    return start


def test_the_averages_decay_warms_up_over_a_thousand_steps(quick, monkeypatch):
    """(1 + t) / (10 + t) reaches 0.991 at t = 990."""
    decays = []
    monkeypatch.setattr(vat_scar, "update_average", lambda *inputs: decays.append(inputs[2].item()))
    quick("--ema-decay", 0.991, "--epochs", 2, "--steps-per-epoch", 500)
    expected = [min(0.991, (1 + t) / (10 + t)) for t in range(1000)]
    assert expected[989] < 0.991 and decays == pytest.approx(2 * expected)


def test_seeds_of_epochs_phases_and_runs_are_all_different(quick, tmp_path, monkeypatch):
    """Of two runs with four epochs, for augmentation and for batches."""
    seeds = []
    seed_everywhere, draw_batches = torch.manual_seed, vat_scar.draw_batches

    def noting(pool, count, size, generator):
        seeds.append(generator.initial_seed())
        return draw_batches(pool, count, size, generator)

    monkeypatch.setattr(torch, "manual_seed", lambda n: seeds.append(n) or seed_everywhere(n))
    monkeypatch.setattr(vat_scar, "draw_batches", noting)
    for seed in (0, 1):
        quick("--seed", seed, "--epochs", 4, "--steps-per-epoch", 1)
        shutil.rmtree(tmp_path / "run")
    # the run's own seed, then for each epoch one for augmentation and one for both kinds of batches
    assert len(seeds) == 2 * (1 + 8 * 3)
    assert len(set(seeds)) == 2 * (1 + 8 * 2)


def test_metrics_are_summed_though_the_next_step_overwrites_them(quick, tmp_path):
    """As a CUDA graph does: 0, 1 and 2 in the first epoch."""
    metric = torch.zeros(())
    quick(step=lambda i: {"mine": metric.fill_(i)})
    means = [float(row["mine"]) for row in read_rows(tmp_path / "run" / "metrics.csv")]
    assert means == [1, 4, 7, 10]


def test_the_clock_is_read_after_the_device_has_finished(quick, monkeypatch):
    """Reading a metric waits for that."""
    events = []

    class Metric(torch.Tensor):
        def __float__(self):
            events.append("metric")
            return 0.0

    clock = SimpleNamespace(perf_counter=lambda: events.append("clock") or float(len(events)))
    monkeypatch.setattr(vat_scar, "time", clock)
    quick("--epochs", 1, step=lambda i: {"mine": torch.zeros(()).as_subclass(Metric)})
    assert events[:5] == ["clock", "clock", "metric", "clock", "clock"]


def test_large_sets_are_evaluated_whole(quick, images, tmp_path, monkeypatch):
    """1,100 to test on and 700 to train with, 600 of them unlabeled."""
    x, y, x_test, y_test = images
    many = x[:700, :, ::2, ::2], y[:700], x[:1100, :, ::2, ::2], y[:1100]
    monkeypatch.setattr(vat_scar, "load_images", lambda *args: many)
    seen = {}
    for name in ("evaluate", "table2_rows", "select_clean", "selection_picture", "predict"):
        function = getattr(vat_scar, name)

        def noting(*inputs, name=name, function=function):
            (x,) = [value for value in inputs if torch.is_tensor(value) and value.ndim == 4]
            seen.setdefault(name, []).append(len(x))
            return function(*inputs)

        monkeypatch.setattr(vat_scar, name, noting)
    quick("--epochs", 1)
    assert seen == {
        "select_clean": [600, 1100, 1100],
        "predict": [1100, 600, 1100, 1100, 600],
        "evaluate": [1100, 1100, 1100],
        "table2_rows": [1100],
        "selection_picture": [600],
    }
    assert len(read_rows(tmp_path / "run" / "selection.csv")) == 600


def test_validation_images_have_labels(quick, few, monkeypatch):
    """Where some unlabeled images have none."""
    x, y, x_test, y_test = few
    y = torch.where(torch.arange(300) < 200, y, -1)
    monkeypatch.setattr(vat_scar, "load_images", lambda *args: (x, y, x_test, y_test))
    scored, evaluate = [], vat_scar.evaluate
    monkeypatch.setattr(
        vat_scar, "evaluate", lambda *inputs: scored.append(inputs[2]) or evaluate(*inputs)
    )
    quick("--val", 30, "--epochs", 1)
    assert all(len(labels) == 30 and labels.min() >= 0 for labels in scored) and scored


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_with_a_sentence(
    loss, few_images, tmp_path, monkeypatch, capsys
):
    """Before the epoch's checkpoint."""

    def batch_loss(model, *inputs):
        return loss + 0 * model.linear.weight.sum(), {}  # without an effect on the weights

    monkeypatch.setattr(vat_scar, "batch_loss", batch_loss)
    sentence = refusal(capsys, vat_scar, *SMALL, "--out", tmp_path / "run")
    assert sentence == "pretrain 1: loss is nan or inf; lower --lr, change --out"
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("flag, value", [("allow_tf32", False), ("benchmark", True)])
def test_a_run_sets_cudnn(flag, value, precision, quick, monkeypatch):
    """TF32 off, for fgsm's signs, in bf16 too; the fastest convolutions are looked for."""
    monkeypatch.setattr(torch.backends.cudnn, flag, not value)
    quick("--epochs", 1, "--precision", precision)
    assert getattr(torch.backends.cudnn, flag) == value


class Plain(nn.Module):
    """Without batch norm, with a layer that is not used and a parameter without dimensions."""

    def __init__(self, classes, depth, width):
        super().__init__()
        self.linear, self.unused = nn.Linear(3 * 36, classes), nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * self.linear(F.avg_pool2d(x, 4).flatten(1))


def test_the_network_has_its_depth_and_width(few_images, tmp_path):
    options = "--depth 16 --width 2 --epochs 1 --steps-per-epoch 1".split()
    run(vat_scar, tmp_path / "run", *options)
    for name in ("pretrain.pt", "model.pt"):
        WideResNet(10, 16, 2).load_state_dict(torch.load(tmp_path / "run" / name))


@each_script
def test_another_network_trains(script, few_images, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "WideResNet", Plain)
    run(script, tmp_path / "run")
    assert torch.load(tmp_path / "run" / "model.pt")["scale"] != 1


@pytest.mark.parametrize("data", ["synthetic", "stl10"])
def test_num_labeled_is_4000_if_omitted(data, few_images, tmp_path, monkeypatch, capsys):
    """With a benchmark whose images have not all a label too."""
    x, y, x_test, y_test = few_images
    if data == "stl10":
        y = torch.where(torch.arange(300) < 200, y, -1)
    monkeypatch.setattr(vat_scar, "load_images", lambda *args: (x, y, x_test, y_test))
    argv = ["--data", data, *SIZE, *ON_CPU, "--out", tmp_path / "run"]
    sentence = refusal(capsys, vat_scar, *argv)
    assert sentence.startswith("--num-labeled 4000 is too many")


class NamedCuda(str):
    """A device of the CPU that says it is called cuda, so that main takes its steps for a GPU."""

    __hash__ = str.__hash__

    def __eq__(self, other):
        return other == "cuda"


@pytest.fixture
def as_on_cuda(few_images, tmp_path, monkeypatch):
    """A function that runs VAT's main as on a GPU, as far as it asks for its device's name.

    It returns the calls of torch.cuda and the functions that were captured.
    """
    seen = SimpleNamespace(streams=[], devices=[], captured=[])

    def start(*options):
        parse_args = vat_scar.parse_args

        def parse_args_for_cuda(argv):
            args = parse_args(argv)
            args.device = NamedCuda("cpu")
            return args

        monkeypatch.setattr(vat_scar, "parse_args", parse_args_for_cuda)
        monkeypatch.setattr(vat_scar, "machine_info", lambda args: {})
        monkeypatch.setattr(vat_scar, "capture", lambda step: seen.captured.append(step) or step)
        monkeypatch.setattr(torch, "compile", lambda function: function)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: "a new stream")
        monkeypatch.setattr(torch.cuda, "set_stream", seen.streams.append)
        monkeypatch.setattr(torch.cuda, "set_device", seen.devices.append)
        run(vat_scar, tmp_path / "run", "--select", "none", *options)
        return seen

    return start


def test_on_cuda_each_phase_captures_the_step(as_on_cuda):
    captured = as_on_cuda("--compile").captured
    assert [function.__name__ for function in captured] == 2 * ["training_step"]


def test_on_cuda_nothing_is_captured_with_no_compile(as_on_cuda):
    assert as_on_cuda("--no-compile").captured == []


def test_on_cuda_a_run_has_a_stream_of_its_own(as_on_cuda):
    assert as_on_cuda("--no-compile").streams == ["a new stream"]


def test_on_cuda_each_process_has_its_own_gpu_and_captures_nothing(as_on_cuda, monkeypatch):
    """No exchange between processes is recorded."""
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr(vat_scar, "WORLD_SIZE", 2)
    for name in ("init_process_group", "all_reduce", "broadcast"):
        monkeypatch.setattr(vat_scar.dist, name, lambda *inputs: None)
    seen = as_on_cuda("--compile")
    assert seen.devices == [5] and seen.captured == []


@needs_cuda
@each_script
def test_whole_run_on_cuda(script, few_images, tmp_path):
    """With a GPU's defaults; its weights load without a GPU."""
    options = [*DATA, *SIZE, "--steps-per-epoch", "8", "--out", str(tmp_path / "run")]
    result = script.main(options)
    assert result["args"]["compile"] and result["peak_memory_gib"] > 0
    for name in ("pretrain.pt", "model.pt"):
        weights = torch.load(tmp_path / "run" / name)
        assert {tensor.device.type for tensor in weights.values()} == {"cpu"}


@needs_cuda
@each_script
def test_captured_run_on_cuda_is_the_run(script, few_images, tmp_path, monkeypatch):
    """Whether the step is a CUDA graph or not, main ends in the same weights."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    options = ("--device", "cuda", "--compile", "--steps-per-epoch", 6, "--lr", 0.001)
    ends = []
    for name, capture in (("captured", script.capture), ("plain", lambda function: function)):
        monkeypatch.setattr(script, "capture", capture)
        run(script, tmp_path / name, *options)
        ends.append([load_model(tmp_path / name / f"{part}.pt") for part in ("pretrain", "model")])
    for captured, plain in zip(*ends):
        close(captured.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------- several processes as one


@pytest.fixture
def as_process(monkeypatch, few, tmp_path):
    """Runs main, watched, as one of several processes; what it would exchange is the caller's.

    all_reduce gets a tensor and changes it in place; broadcast the same, and a process's number.
    """

    def start(
        script,
        rank,
        *options,
        processes=2,
        out=None,
        all_reduce=lambda flat: None,
        broadcast=lambda *_: None,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(script.dist, "init_process_group", lambda: None)
            patch.setattr(script.dist, "all_reduce", all_reduce)
            patch.setattr(script.dist, "broadcast", broadcast)
            patch.setattr(script, "WORLD_SIZE", processes)
            patch.setattr(script, "RANK", rank)
            return watch(script, out or tmp_path / f"process {rank}", few, *options)

    return start


@each_script
def test_two_processes_share_each_batch(script, as_process, few, tmp_path):
    """Halves, of labeled and of unlabeled images, that are together the batch of one process."""
    options = ("--epochs", 1, "--select", "none")
    runs = [watch(script, tmp_path / "alone", few, *options)]
    runs += [as_process(script, rank, *options) for rank in (0, 1)]
    for alone, first, second in zip(*[run.calls["batch_loss"] for run in runs], strict=True):
        for part in ("x_l", "x_u"):
            whole, half, other = (
                image_bytes(getattr(call, part)) for call in (alone, first, second)
            )
            assert len(half) == len(other) == len(whole) / 2
            assert sorted(half + other) == sorted(whole)


def test_four_processes_augment_each_in_its_own_way(as_process):
    runs = [as_process(vat_scar, rank, "--epochs", 1, processes=4) for rank in range(4)]
    for calls in zip(*[run.calls["batch_loss"] for run in runs], strict=True):
        assert len({call.generator_state.numpy().tobytes() for call in calls}) == 4


def test_process_1_resumes_from_the_checkpoint(as_process):
    """It is process 0's. All epochs are done, so nothing is trained."""
    out = as_process(vat_scar, 0).out
    (out / "result.json").unlink()
    assert as_process(vat_scar, 1, out=out).calls["batch_loss"] == []


def test_process_1_starts_from_pretrained(as_process, theta):
    run = as_process(vat_scar, 1, "--pretrained", theta)
    same(run.calls["batch_loss"][0].model.state_dict(), load_model(theta).state_dict())


def test_images_per_second_are_those_of_all_processes(as_process):
    """--batch-size is what they share."""
    result = as_process(vat_scar, 0).result
    assert result["images_per_second"] == pytest.approx(1000 * 8 / result["ms_per_step"])


def test_process_0_gives_its_labels_to_all(as_process):
    """True ones and those of kept images, before fine-tuning draws from them."""
    given = []
    run = as_process(vat_scar, 0, broadcast=lambda labels, source: given.append(labels.clone()))
    (labels,) = given
    keep, pseudo = run.calls["select_clean"][0].result
    y = run.calls["split_labeled"][0].y
    labeled, unlabeled = run.calls["split_labeled"][0].result
    expected = torch.full_like(y, -1)
    expected[labeled] = y[labeled]
    expected[unlabeled[keep]] = pseudo[keep]
    same(labels, expected)


def test_process_1_fine_tunes_on_the_labels_of_process_0(as_process):
    theirs = torch.full((300,), -1)
    theirs[50:90] = 7

    def broadcast(labels, source):
        assert source == 0
        labels.copy_(theirs)

    run = as_process(vat_scar, 1, broadcast=broadcast)
    for call in run.labeled_draws[2:]:
        same(call.pool, torch.arange(50, 90))
    for call in run.calls["batch_loss"][6:]:
        assert call.y_l.tolist() == [7, 7]


def test_process_1_writes_and_prints_nothing(as_process, scalars):
    run = as_process(vat_scar, 1, "--tensorboard")
    assert not any(run.out.iterdir()) and run.printed == "" and scalars == []


@pytest.fixture
def exchanged(as_process, few, tmp_path, monkeypatch):
    """A step of one process, and the same of two with half the batch each, as process 0 sees it.

    Nothing depends on what else is in a batch: no batch norm, no MixUp, nothing drawn at random.
    """
    options = {"vat": "", "mixmatch": "--alpha 0", "fixmatch": "--threshold 0.1"}

    def direction(model, x, *rest):
        return F.normalize(x, dim=(1, 2, 3))

    def start(script):
        monkeypatch.setattr(script, "WideResNet", Plain)
        monkeypatch.setattr(script, "weak_augment", lambda x, flip: x)
        monkeypatch.setattr(script, "strong_augment", lambda x, flip: 255 - x, raising=False)
        monkeypatch.setattr(script, "vat_direction", direction, raising=False)
        monkeypatch.setattr(script, "schedule", lambda step, total, phase, args: (0.1, 0.6))
        argv = "--epochs 1 --steps-per-epoch 1 --select none".split()
        argv += options[script.METHOD].split()
        alone = watch(script, tmp_path / "alone", few, *argv)
        theirs = []
        as_process(script, 1, *argv, all_reduce=lambda flat: theirs.append(flat.clone()))
        both = as_process(script, 0, *argv, all_reduce=lambda flat: flat.add_(theirs.pop(0)))
        return alone, both

    return start


@each_script
def test_a_step_of_two_processes_is_that_of_one_with_the_whole_batch(script, exchanged):
    alone, both = exchanged(script)
    weights = [run.calls["update_average"][0].model.state_dict() for run in (alone, both)]
    before = alone.calls["batch_loss"][0].model.linear.weight
    assert (weights[0]["linear.weight"] - before).abs().mean() > 1e-4
    close(*weights, rtol=1e-4, atol=1e-5)


@each_script
def test_metrics_of_two_processes_are_those_of_one_with_the_whole_batch(script, exchanged):
    rows = [read_rows(run.out / "metrics.csv")[0] for run in exchanged(script)]
    for name in rows[0].keys() - {"phase", "ms_per_step", "seconds"}:
        assert float(rows[1][name]) == pytest.approx(float(rows[0][name]), rel=1e-4), name


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
    """A run of two real processes on a folder of images, on the CPU."""
    root = write_photos(tmp_path_factory.mktemp("torchrun") / "photos")
    out = root.parent / "two"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        f"--log-dir={root.parent}/logs",
    ]
    command += [HERE / "mixmatch_scar.py", *folder_options(root), "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(out=out, printed=done.stdout)


def test_torchrun_prints_the_tables_once(torchrun):
    assert torchrun.printed.count("Table 1") == 1


def test_torchrun_leaves_the_files_of_a_run(torchrun):
    assert len(list(torchrun.out.iterdir())) == 9
    assert len(read_rows(torchrun.out / "metrics.csv")) == 4
    assert json.loads((torchrun.out / "result.json").read_text())["ranks"] == 2


def test_rank_without_world_size_counts_for_nothing():
    command = [sys.executable, "-c", "import vat_scar; print(vat_scar.RANK, vat_scar.WORLD_SIZE)"]
    environment = {**os.environ, "RANK": "3"}
    environment.pop("WORLD_SIZE", None)
    assert subprocess.check_output(command, env=environment, cwd=HERE) == b"0 1\n"


# -------------------------------------------------------------------------- interruptions, resuming


class Killed(BaseException):
    """Nothing in the scripts handles it, as nothing handles SIGKILL."""


def kill_at(patch, owner, name, call):
    """The call-th call of owner's function kills the run."""
    function = getattr(owner, name)
    calls = itertools.count(1)

    def kill(*inputs):
        if next(calls) == call:
            raise Killed
        return function(*inputs)

    patch.setattr(owner, name, kill)


def without_times(rows):
    return [{k: v for k, v in row.items() if k not in ("ms_per_step", "seconds")} for row in rows]


def check_same_run(one, two):
    """Files and weights are the same to the last bit, but for times and paths."""
    names = [{path.name for path in out.glob("[!.]*")} for out in (one, two)]
    assert names[0] == names[1]
    for name in ("pretrain.pt", "model.pt"):
        same(torch.load(two / name), torch.load(one / name))
    for name in ("selection.csv", "selection.png"):
        assert (two / name).read_bytes() == (one / name).read_bytes(), name
    rows = [without_times(read_rows(out / "metrics.csv")) for out in (one, two)]
    assert rows[0] == rows[1]
    results = [json.loads((out / "result.json").read_text()) for out in (one, two)]
    for name in ("pretrain_accuracy", "final_accuracy", "selection", "table2"):
        assert results[0][name] == results[1][name], name


@pytest.fixture(scope="module")
def uninterrupted(few, tmp_path_factory):
    """The folder of a whole run of a script."""
    folders = {}

    def of(script):
        if script not in folders:
            folders[script] = tmp_path_factory.mktemp("whole") / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(script, "load_images", lambda *args: few)
                patch.setattr(script, "image_names", lambda *args: (SHAPES, [], []))
                run(script, folders[script], "--eps", 8)
        return folders[script]

    return of


@pytest.mark.parametrize("step", [2, 5, 8, 11])
@pytest.mark.parametrize("script", [mixmatch_scar, fixmatch_scar], ids=["mixmatch", "fixmatch"])
def test_a_run_killed_in_an_epoch_ends_as_if_it_had_not_been(
    script, step, uninterrupted, few_images, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, script, "batch_loss", step)
        run(script, tmp_path / "run", "--eps", 8)
    run(script, tmp_path / "run", "--eps", 8)
    check_same_run(uninterrupted(script), tmp_path / "run")


FILES = [  # in the order in which a run writes them
    "args.json", "vat_scar.py", "metrics 1", "checkpoint 1", "metrics 2", "checkpoint 2",
    "pretrain.pt", "selection.png", "metrics 3", "checkpoint 3", "metrics 4", "checkpoint 4",
    "model.pt", "selection.csv", "result.json",
]  # fmt: skip


@pytest.mark.parametrize("number", range(1, 16), ids=FILES)
def test_a_run_killed_as_it_writes_a_file_ends_as_if_it_had_not_been(
    number, uninterrupted, few_images, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, os, "replace", number)
        run(vat_scar, tmp_path / "run", "--eps", 8)
    run(vat_scar, tmp_path / "run", "--eps", 8)
    check_same_run(uninterrupted(vat_scar), tmp_path / "run")


@pytest.mark.parametrize("step, where", [(5, "pretrain epoch 1"), (11, "finetune epoch 1")])
def test_a_resumed_run_trains_only_the_remaining_epochs(
    step, where, few_images, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, vat_scar, "batch_loss", step)
        run(vat_scar, tmp_path / "run")
    capsys.readouterr()
    run(vat_scar, tmp_path / "run")
    printed = capsys.readouterr().out
    assert f"\nResuming after {where}\n" in printed
    epochs = re.findall(r"^(?:pretrain|finetune)   \d", printed, re.MULTILINE)
    assert len(epochs) == 4 - step // 3
    assert len(re.findall("^ +epoch ", printed, re.MULTILINE)) == 2 - step // 6  # headings


def test_a_run_killed_in_the_control_resumes_from_its_theta(
    theta, few_images, tmp_path, monkeypatch
):
    """From its checkpoint, not from --pretrained again."""
    options = ("--select", "none", "--pretrained", theta)
    run(vat_scar, tmp_path / "whole", *options)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, vat_scar, "batch_loss", 5)
        run(vat_scar, tmp_path / "run", *options)
    run(vat_scar, tmp_path / "run", *options)
    check_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_second_run_on_the_folder_changes_nothing(
    uninterrupted, few_images, tmp_path, monkeypatch
):
    """It starts during the first run's second epoch, resumes its checkpoint and finishes first."""
    out, evaluate, results = tmp_path / "run", vat_scar.evaluate, []

    def second_starts(*inputs):
        if (out / "metrics.csv").exists() and not results:
            monkeypatch.setattr(vat_scar, "evaluate", evaluate)
            results.append(run(vat_scar, out, "--eps", 8))
        return evaluate(*inputs)

    monkeypatch.setattr(vat_scar, "evaluate", second_starts)
    run(vat_scar, out, "--eps", 8)
    assert len(results) == 1
    check_same_run(uninterrupted(vat_scar), out)


def test_a_finished_run_is_printed_and_not_trained(uninterrupted, few_images, monkeypatch, capsys):
    out = uninterrupted(vat_scar)
    before = {path: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(vat_scar, "batch_loss", pytest.fail)
    result = run(vat_scar, out, "--eps", 8)
    assert result == json.loads((out / "result.json").read_text())
    assert "Table 1" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("option", ["--data-dir=elsewhere", "--compile", "--tensorboard"])
def test_a_run_resumes_with_another(option, unfinished, few_images, scalars, compiled):
    expected = read_rows(unfinished / "metrics.csv")[-1]["accuracy"]
    result = run(vat_scar, unfinished, "--eps", 8, option)
    assert result["final_accuracy"] == float(expected)
    args = vat_scar.parse_args([*SMALL, "--out", str(unfinished), "--eps", "8", option])
    assert result["args"] == vars(args)


def test_omitted_options_are_settled_before_settings_are_compared(
    uninterrupted, few_images, monkeypatch
):
    """Without a GPU, ON_CPU says what is so anyway."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = uninterrupted(vat_scar)
    expected = json.loads((out / "result.json").read_text())
    assert vat_scar.main([*DATA, *SIZE, "--eps", "8", "--out", str(out)]) == expected


OTHER_SETTINGS = {
    "data": "cifar10",
    "image_size": 28,
    "flip": False,
    "num_labeled": 90,
    "val": 40,
    "seed": 4,
    "depth": 16,
    "width": 2,
    "epochs": 3,
    "steps_per_epoch": 4,
    "batch_size": 6,
    "lr": 0.5,
    "weight_decay": 0.4,
    "ema_decay": 0.9,
    "lambda_u": 0.2,
    "eps": 7.0,
    "select": "none",
    "table2_eps": [2.0],
    "precision": "bf16",
    "xi": 0.5,
    "vat_eps": 2.0,
    "power_iterations": 2,
    "entropy_weight": 0.1,
}


def command_line(settings):
    words = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        if value is False:
            words.append(f"--no-{option}")
        elif isinstance(value, list):
            words += [f"--{option}", *map(str, value)]
        else:
            words += [f"--{option}", str(value)]
    return words


OTHER_METHODS_SETTINGS = [
    (mixmatch_scar, "temperature", 0.6),
    (mixmatch_scar, "alpha", 0.8),
    (fixmatch_scar, "mu", 3),
    (fixmatch_scar, "threshold", 0.2),
]


@pytest.mark.parametrize(
    "script, name, now", OTHER_METHODS_SETTINGS, ids=[row[1] for row in OTHER_METHODS_SETTINGS]
)
def test_another_runs_folder_is_refused_by_the_methods_setting(
    script, name, now, uninterrupted, few_images, capsys
):
    argv = [*SMALL, "--eps", 8, "--out", uninterrupted(script), *command_line({name: now})]
    assert f"({name} was" in refusal(capsys, script, *argv)


def test_a_folder_of_a_version_without_a_setting_is_refused(unfinished, few_images, capsys):
    args = json.loads((unfinished / "args.json").read_text())
    del args["val"]
    (unfinished / "args.json").write_text(json.dumps(args))
    sentence = refusal(capsys, vat_scar, *SMALL, "--eps", 8, "--out", unfinished)
    assert "(val was None, now 0)" in sentence


def test_a_run_that_was_begun_on_a_gpu_goes_on_without(unfinished, few_images):
    """And args.json tells how it was begun."""
    text = (unfinished / "args.json").read_text()
    assert '"device": "cpu"' in text
    text = text.replace('"device": "cpu"', '"device": "cuda"')
    (unfinished / "args.json").write_text(text)
    run(vat_scar, unfinished, "--eps", 8)
    assert (unfinished / "result.json").exists()
    assert (unfinished / "args.json").read_text() == text


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_another_runs_folder_is_refused_by_the_settings_name(
    name, uninterrupted, few_images, capsys
):
    out = uninterrupted(vat_scar)
    before = {path: path.read_bytes() for path in out.iterdir()}
    was = json.loads((out / "args.json").read_text())[name]
    now = OTHER_SETTINGS[name]
    argv = [*SMALL, "--eps", 8, "--out", out, *command_line({name: now})]
    sentence = refusal(capsys, vat_scar, *argv)
    assert f"({name} was {was}, now {now})" in sentence
    assert before == {path: path.read_bytes() for path in out.iterdir()}


@each_script
def test_no_setting_is_forgotten(script):
    """Each option stands in one of these lists."""
    may_differ = {"device", "out", "data_dir", "compile", "tensorboard", "pretrained"}
    others = {name for _, name, _ in OTHER_METHODS_SETTINGS}
    listed = may_differ | others | OTHER_SETTINGS.keys()
    assert vars(script.parse_args([])).keys() <= listed


def test_another_method_and_other_classes_are_refused(
    uninterrupted, few_images, monkeypatch, capsys
):
    argv = [*SMALL, "--out", uninterrupted(vat_scar)]
    assert "method was vat, now mixmatch" in refusal(capsys, mixmatch_scar, *argv)
    monkeypatch.setattr(vat_scar, "image_names", lambda *args: (["cat"] * 10, [], []))
    sentence = refusal(capsys, vat_scar, *argv, "--eps", 8)
    assert f"classes was {str(SHAPES)[:100]}, now ['cat', 'cat'" in sentence


def test_a_refusal_is_short_however_many_classes_there_are(unfinished, few_images, capsys):
    args = json.loads((unfinished / "args.json").read_text())
    args["classes"] = [f"class {i}" for i in range(5000)]
    (unfinished / "args.json").write_text(json.dumps(args))
    sentence = refusal(capsys, vat_scar, *SMALL, "--eps", 8, "--out", unfinished)
    assert "classes was ['class 0'," in sentence and len(sentence) < 500


THETAS_SETTINGS = "data image_size flip num_labeled val seed depth width".split()


@pytest.mark.parametrize("name", THETAS_SETTINGS)
def test_another_runs_theta_is_refused_by_the_settings_name(
    name, uninterrupted, few_images, tmp_path, capsys
):
    """Its network, its images or their split were others."""
    out = uninterrupted(vat_scar)
    was = json.loads((out / "args.json").read_text())[name]
    now = OTHER_SETTINGS[name]
    other = command_line({name: now})
    argv = [*SMALL, "--pretrained", out / "pretrain.pt", "--out", tmp_path / "run", *other]
    sentence = refusal(capsys, vat_scar, *argv)
    assert sentence.startswith(
        f"{out} holds a run with other settings ({name} was {was}, now {now})"
    )
    assert not any(tmp_path.iterdir())


@pytest.fixture
def other_images(few, few_images, monkeypatch):
    """Changes one thing of what VAT's run reads."""

    def change(what):
        x, y, x_test, y_test = [tensor.clone() for tensor in few]
        files = []
        if what == "a training pixel":
            x[250, 1, 5, 7] ^= 1
        elif what == "a training label":
            y[250] = (y[250] + 1) % 10
        elif what == "a test pixel":
            x_test[99, 2, 23, 23] ^= 1
        elif what == "a test label":
            y_test[99] = (y_test[99] + 1) % 10
        elif what == "an image more":
            x, y = torch.cat([x, x[:1]]), torch.cat([y, y[:1]])
        elif what == "the order":
            x, y = x.flip(0), y.flip(0)
        else:
            files = [f"{i}.png" for i in range(300)]
        monkeypatch.setattr(vat_scar, "load_images", lambda *args: (x, y, x_test, y_test))
        monkeypatch.setattr(vat_scar, "image_names", lambda *args: (SHAPES, files, []))

    return change


CHANGES = [
    "a training pixel", "a training label", "a test pixel", "a test label", "an image more",
    "the order", "file names",
]  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_an_interrupted_run_does_not_go_on_with_other_images(
    what, other_images, unfinished, capsys
):
    before = {path: path.read_bytes() for path in unfinished.iterdir()}
    other_images(what)
    sentence = refusal(capsys, vat_scar, *SMALL, "--eps", 8, "--out", unfinished)
    assert sentence.startswith(
        f"{unfinished} holds a run with other settings (images was 300 + 100, hash "
    )
    assert before == {path: path.read_bytes() for path in unfinished.iterdir()}


@pytest.mark.parametrize("what", CHANGES)
def test_a_finished_run_is_not_printed_for_other_images(what, other_images, uninterrupted, capsys):
    out = uninterrupted(vat_scar)
    other_images(what)
    sentence = refusal(capsys, vat_scar, *SMALL, "--eps", 8, "--out", out)
    assert "(images was 300 + 100, hash " in sentence
    assert "Table 1" not in capsys.readouterr().out


@pytest.mark.parametrize("what", CHANGES)
def test_theta_of_other_images_is_refused(what, other_images, uninterrupted, tmp_path, capsys):
    other_images(what)
    theta = uninterrupted(vat_scar) / "pretrain.pt"
    sentence = refusal(capsys, vat_scar, *SMALL, "--pretrained", theta, "--out", tmp_path / "run")
    assert sentence.startswith(
        f"{theta.parent} holds a run with other settings (images was 300 + 100, hash "
    )
    assert not any(tmp_path.iterdir())


@pytest.fixture
def control(uninterrupted, few_images, tmp_path):
    """A function that runs VAT's control from a theta~, in one folder."""

    def start(theta):
        return run(vat_scar, tmp_path / "control", "--select", "none", "--pretrained", theta)

    return start


def test_a_control_has_the_theta_of_its_scar_run(uninterrupted, control):
    scar = json.loads((uninterrupted(vat_scar) / "result.json").read_text())
    assert control(uninterrupted(vat_scar) / "pretrain.pt")["theta"] == scar["theta"]


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_goes_on_from_its_theta_wherever_that_is_now(
    finished, uninterrupted, control, tmp_path, monkeypatch
):
    """As it was given, by a relative path, in a folder that was moved, or as a copy."""
    theta = uninterrupted(vat_scar) / "pretrain.pt"
    expected = control(theta)["final_accuracy"]
    shutil.copytree(theta.parent, tmp_path / "moved")
    shutil.copy(theta, tmp_path / "theta.pt")
    monkeypatch.chdir(tmp_path)
    for path in (theta, "moved/pretrain.pt", tmp_path / "moved" / "." / "pretrain.pt", "theta.pt"):
        if not finished:
            (tmp_path / "control" / "result.json").unlink()
        assert control(path)["final_accuracy"] == expected


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_does_not_go_on_from_another_theta(
    finished, uninterrupted, control, tmp_path, capsys
):
    """The run that pretrained it was deleted and run again, say."""
    theta = tmp_path / "theta.pt"
    shutil.copy(uninterrupted(vat_scar) / "pretrain.pt", theta)
    control(theta)
    if not finished:
        (tmp_path / "control" / "result.json").unlink()
    weights = torch.load(theta)
    weights["linear.bias"][3] += 1e-6
    torch.save(weights, theta)
    with pytest.raises(
        SystemExit, match=r"control holds a run with other settings \(pretrained_weights was"
    ):
        control(theta)


def test_another_folder_with_the_same_classes_is_refused(tmp_path, capsys):
    """By a finished run, and as a start from its theta~; the tables of neither are the other's."""
    mine, theirs = [write_photos(tmp_path / name / "images") for name in ("mine", "theirs")]
    with Image.open(theirs / "train" / "ant" / "0 0.png") as image:
        image.rotate(180).save(theirs / "train" / "ant" / "0 0.png")
    out = tmp_path / "run"
    vat_scar.main([*folder_options(mine), "--epochs", "1", "--out", str(out)])
    capsys.readouterr()
    for more in (["--out", out], ["--pretrained", out / "pretrain.pt", "--out", tmp_path / "new"]):
        sentence = refusal(capsys, vat_scar, *folder_options(theirs), "--epochs", 1, *more)
        assert re.search(r"\(images was 22 \+ 6, hash \w{16}, now 22 \+ 6, hash \w{16}\)", sentence)
    assert not (tmp_path / "new").exists()


def test_a_theta_that_does_not_say_what_it_was_trained_on_is_told(
    uninterrupted, few_images, tmp_path, capsys
):
    theta = uninterrupted(vat_scar) / "pretrain.pt"
    note = "No args.json beside {}: its images cannot be checked\n"
    run(vat_scar, tmp_path / "one", "--pretrained", theta)
    assert "args.json" not in capsys.readouterr().out
    shutil.copy(theta, tmp_path)
    run(vat_scar, tmp_path / "other", "--pretrained", tmp_path / "pretrain.pt")
    assert note.format(tmp_path / "pretrain.pt") in capsys.readouterr().out


def test_a_run_that_pretrained_does_not_go_on_from_a_theta(uninterrupted, few_images, capsys):
    out = uninterrupted(vat_scar)
    theta = out / "pretrain.pt"
    sentence = refusal(capsys, vat_scar, *SMALL, "--eps", 8, "--out", out, "--pretrained", theta)
    assert "(pretrained_weights was None, now " in sentence


def test_theta_of_another_method_or_other_classes_is_refused(
    uninterrupted, few_images, tmp_path, monkeypatch, capsys
):
    theta = uninterrupted(vat_scar) / "pretrain.pt"
    argv = [*SMALL, "--pretrained", theta, "--out", tmp_path / "run"]
    assert "(method was vat, now fixmatch)" in refusal(capsys, fixmatch_scar, *argv)
    monkeypatch.setattr(vat_scar, "image_names", lambda *args: (["cat"] * 10, [], []))
    assert f"(classes was {str(SHAPES)[:100]}, now" in refusal(capsys, vat_scar, *argv)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--depth=16", "--width=2"])
def test_theta_without_its_run_must_fit_the_network(
    option, uninterrupted, few_images, tmp_path, capsys
):
    """A file that somebody copied tells nothing but its weights."""
    theta = tmp_path / "theta.pt"
    shutil.copy(uninterrupted(vat_scar) / "pretrain.pt", theta)
    argv = [*SMALL, "--pretrained", theta, "--out", tmp_path / "run", option]
    assert refusal(capsys, vat_scar, *argv) == f"{theta} does not hold weights of this network"


def test_pretrained_refuses_a_checkpoint(uninterrupted, few_images, tmp_path, capsys):
    checkpoint = uninterrupted(vat_scar) / "checkpoint.pt"
    argv = [*SMALL, "--pretrained", checkpoint, "--out", tmp_path / "run"]
    sentence = refusal(capsys, vat_scar, *argv)
    assert sentence == f"{checkpoint} does not hold weights of this network"


def test_theta_may_be_fine_tuned_in_other_ways(uninterrupted, few_images, tmp_path):
    """With all that is not its network, its images or their split at another value."""
    theta = uninterrupted(vat_scar) / "pretrain.pt"
    others = {name: now for name, now in OTHER_SETTINGS.items() if name not in THETAS_SETTINGS}
    assert {"epochs", "lr", "lambda_u", "vat_eps", "batch_size"} <= others.keys()
    result = run(vat_scar, tmp_path / "run", "--pretrained", theta, *command_line(others))
    assert others.items() <= result["args"].items()
    assert len(read_rows(tmp_path / "run" / "metrics.csv")) == 3


def test_a_folder_that_holds_no_run_is_refused(few_images, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    sentence = refusal(capsys, vat_scar, *SMALL, "--out", tmp_path)
    assert sentence == f"{tmp_path} is not empty and holds no run; choose another --out"


def test_folders_above_a_runs_folder_are_made(quick, tmp_path):
    quick("--epochs", 1, "--out", tmp_path / "not" / "yet" / "there")
    assert (tmp_path / "not" / "yet" / "there" / "result.json").exists()


def test_a_folder_with_hidden_files_is_taken(few_images, tmp_path):
    (tmp_path / ".DS_Store").write_text("")
    run(vat_scar, tmp_path, "--epochs", 1)
    assert (tmp_path / "result.json").exists()


def test_a_folder_that_cannot_be_made_is_refused(few_images, tmp_path, capsys):
    (tmp_path / "a file").write_text("")
    sentence = refusal(capsys, vat_scar, *SMALL, "--out", tmp_path / "a file")
    assert sentence.startswith(f"cannot write to {tmp_path / 'a file'}")


@pytest.fixture
def unfinished(uninterrupted, tmp_path):
    """A VAT run that lacks its last file, so that it goes on from its checkpoint."""
    out = tmp_path / "run"
    shutil.copytree(uninterrupted(vat_scar), out)
    (out / "result.json").unlink()
    return out


@pytest.mark.parametrize("fault", ["cut off", "empty", "pickled code"])
@pytest.mark.parametrize("name", ["checkpoint.pt", "pretrain.pt", "args.json"])
def test_a_damaged_file_is_named_and_left_alone(
    name, fault, unfinished, few_images, tmp_path, capsys
):
    path = unfinished / name
    whole = path.read_bytes()
    torch.save(SimpleNamespace(), tmp_path / "code")  # unpickled, it could run anything
    damaged = {
        "cut off": whole[: len(whole) // 2],
        "empty": b"",
        "pickled code": (tmp_path / "code").read_bytes(),
    }
    path.write_bytes(damaged[fault])
    argv = [*SMALL, "--eps", 8, "--out", unfinished]
    if name == "pretrain.pt":
        argv = [*SMALL, "--pretrained", path, "--out", tmp_path / "new"]
    sentence = refusal(capsys, vat_scar, *argv)
    assert f"cannot read {path}" in sentence and "weights_only" not in sentence
    assert path.read_bytes() == damaged[fault]


@pytest.mark.parametrize("fault", ["of another version", "of other images", "of another network"])
def test_a_checkpoint_that_does_not_fit_is_refused(fault, unfinished, few_images, capsys):
    checkpoint = torch.load(unfinished / "checkpoint.pt")
    if fault == "of another version":
        checkpoint = {"rows": [], "learner": []}
    elif fault == "of other images":
        checkpoint["labels"] = checkpoint["labels"][:7]
    else:
        del checkpoint["model"]["bn.weight"]
    torch.save(checkpoint, unfinished / "checkpoint.pt")
    sentence = refusal(capsys, vat_scar, *SMALL, "--eps", 8, "--out", unfinished)
    assert sentence.startswith(f"{unfinished}/checkpoint.pt does not fit")


def test_the_scripts_copy_is_not_overwritten_on_resume(unfinished, few_images):
    (unfinished / "vat_scar.py").write_text("as it was")
    run(vat_scar, unfinished, "--eps", 8)
    assert (unfinished / "vat_scar.py").read_text() == "as it was"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), OSError("No space left on device")]
)
def test_errors_in_training_keep_their_traceback(error, few_images, tmp_path, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(vat_scar, "batch_loss", fail)
    with pytest.raises(type(error), match=str(error)):
        run(vat_scar, tmp_path / "run")


def test_errors_of_compilation_come_whole(few_images, tmp_path, monkeypatch):
    def fail(graph, inputs):
        raise RuntimeError("no pattern matches")

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fail))
    with pytest.raises(Exception, match="no pattern matches"):
        run(mixmatch_scar, tmp_path / "run", "--compile")


# ----------------------------------------------------------------------------- images from a folder


@each_script
def test_a_run_learns(script, tmp_path):
    """Red from green images, from 12 labels."""
    root = write_photos(tmp_path / "photos")
    options = "--steps-per-epoch 25 --lr 0.01".split()
    result = script.main([*folder_options(root), *options, "--out", str(tmp_path / "run")])
    assert result["pretrain_accuracy"] == result["final_accuracy"] == 100


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory):
    """A VAT run on a folder with unlabeled/, of classes and folders with odd names."""
    root = write_photos(tmp_path_factory.mktemp("folder") / "bild er", ("Käfer, rot", "bee"))
    (root / "train" / "bee" / "notes.txt").write_text("notes")
    out = root.parent / "run"
    printed = io.StringIO()
    with redirect_stdout(printed):
        result = vat_scar.main([*folder_options(root), "--image-size", "30", "--out", str(out)])
    rows = read_rows(out / "selection.csv")
    return SimpleNamespace(root=root, out=out, printed=printed.getvalue(), result=result, rows=rows)


def test_all_labels_of_a_folder_with_unlabeled_images_are_used(folder_run):
    assert "2 classes; 12 labeled, 10 unlabeled and 6 test images\n" in folder_run.printed


def test_files_that_are_left_out_are_named(folder_run):
    assert "Files left out: 1 (train/bee/notes.txt)\n" in folder_run.printed


def test_class_names_are_those_of_the_folders(folder_run):
    args = json.loads((folder_run.out / "args.json").read_text())
    assert args["classes"] == ["Käfer, rot", "bee"]


def test_selection_csv_names_the_unlabeled_files(folder_run):
    files = sorted(row["file"] for row in folder_run.rows)
    assert files == [f"unlabeled/deep er/{i} {n}.png" for i in range(2) for n in range(5)]


def test_selection_csv_names_each_file_beside_its_own_label(folder_run):
    """Each image read once more, alone."""
    model = load_model(folder_run.out / "model.pt", 2)
    for row in folder_run.rows:
        image = common._read_image(folder_run.root / row["file"], 30)
        logits = vat_scar.predict(model, image[None])
        confidence, label = logits.softmax(dim=1)[0].max(dim=0)
        assert row["final_label"] == ["Käfer, rot", "bee"][label]
        assert float(row["final_confidence"]) == pytest.approx(confidence.item(), abs=1e-5)


def test_kept_per_class_has_a_number_for_each_class(folder_run):
    counts = folder_run.result["selection"]
    assert len(counts["kept_per_class"]) == 2 and sum(counts["kept_per_class"]) == counts["added"]


def test_images_without_a_label_are_added_and_not_counted_as_right(folder_run):
    counts = folder_run.result["selection"]
    assert counts["added"] == sum(int(row["kept"]) for row in folder_run.rows) > 0
    assert counts["kept"] == counts["rejected"] == 0


def test_rates_that_are_not_known_are_null(folder_run):
    """JSON has no nan."""
    text = (folder_run.out / "result.json").read_text()
    selection = json.loads(text, parse_constant=pytest.fail)["selection"]
    assert selection["sensitivity"] is None and selection["specificity"] is None


def test_selection_csv_names_labeled_images_beyond_num_labeled_too(photos, tmp_path):
    """4 of 12 labels are not used; these images are not the last of the labeled ones."""
    options = ["--num-labeled", "8", "--out", str(tmp_path / "run")]
    vat_scar.main([*folder_options(photos), *options])
    _, y, *_ = load_images("folder", photos, 24)
    _, files, _ = common.image_names("folder", photos)
    _, unlabeled = split_labeled(y, 8, 0)
    rows = read_rows(tmp_path / "run" / "selection.csv")
    assert len(rows) == 14 and [row["file"] for row in rows] == [files[n] for n in unlabeled]


def test_a_folder_without_unlabeled_images_has_4000_labels_unless_told(tmp_path, capsys):
    root = write_photos(tmp_path / "photos")
    shutil.rmtree(root / "unlabeled")
    sentence = refusal(capsys, vat_scar, *folder_options(root), "--out", tmp_path / "run")
    assert sentence == "--num-labeled 4000 is too many: 12 labels are available"


def test_a_folders_labels_are_its_classes_in_order(photos):
    x, y, x_test, y_test = load_images("folder", photos, 24)
    assert y.tolist() == 6 * [0] + 6 * [1] + 10 * [-1] and y_test.tolist() == 3 * [0] + 3 * [1]
    assert x.shape == (22, 3, 24, 24) and x_test.shape == (6, 3, 24, 24)
    assert x.dtype == x_test.dtype == torch.uint8 and y.dtype == y_test.dtype == torch.int64
    for images, labels in ((x, y), (x_test, y_test)):
        color = images.float().mean((2, 3)).argmax(1)  # red ants, green bees
        assert torch.equal(color[labels >= 0], labels[labels >= 0])


def test_a_folders_images_are_resized_as_pillow_does(photos):
    """To train with, and to test on: these are sorted as their names are."""
    x, _, x_test, _ = load_images("folder", photos, 50)
    _, files, _ = common.image_names("folder", photos)
    tests = sorted((photos / "test").glob("*/*"))
    for images, paths in ((x, [photos / name for name in files]), (x_test, tests)):
        assert len(images) == len(paths)
        for path, ours in zip(paths, images):
            with Image.open(path) as image:
                expected = np.asarray(image.resize((50, 50)))
            assert (ours.permute(1, 2, 0).numpy() == expected).all(), path


def test_folders_below_a_class_belong_to_it(photos):
    ants = photos / "train" / "ant"
    (ants / "more").mkdir()
    (ants / "0 1.png").rename(ants / "more" / "0 1.png")
    _, files, left_out = common.image_names("folder", photos)
    _, y, *_ = load_images("folder", photos)
    assert y[files.index("train/ant/more/0 1.png")] == 0 and left_out == []


@pytest.mark.parametrize(
    "name, mode",
    [("a.gif", "P"), ("a.bmp", "RGB"), ("a.PNG", "RGBA"), ("a.tiff", "CMYK"), ("a.webp", "L")],
)
def test_a_folder_is_read_whatever_its_files_kinds(name, mode, photos):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    image.save(photos / "train" / "bee" / name, lossless=True)
    x, *_ = load_images("folder", photos)
    _, files, _ = common.image_names("folder", photos)
    ours = x[files.index(f"train/bee/{name}")].permute(1, 2, 0).numpy()
    assert np.abs(ours - np.asarray(image.convert("RGB"), int)).max() <= 2


@pytest.mark.parametrize(
    "orientation, turned",
    [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90),
     (8, Image.Transpose.ROTATE_270)],
)  # fmt: skip
def test_an_image_is_turned_as_its_exif_orientation_says(orientation, turned, photos):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = photos / "train" / "ant" / "turned.png"
    Image.fromarray(pixels).transpose(turned).save(path, exif=exif)
    x, *_ = load_images("folder", photos)
    _, files, _ = common.image_names("folder", photos)
    ours = x[files.index("train/ant/turned.png")].permute(1, 2, 0).numpy()
    assert (ours == pixels).all()


@pytest.fixture
def odd_photos(photos):
    """With what is no image, a second way to one, hidden files and a loop."""
    ants = photos / "train" / "ant"
    (ants / "notes.txt").write_text("notes")
    (ants / "twice.png").symlink_to(ants / "0 0.png")
    (photos / "unlabeled" / "too.png").symlink_to(ants / "0 0.png")
    (ants / "loop").symlink_to(photos / "train")
    (ants / "album.png").symlink_to(photos / "test")
    (ants / "paper.pdf").write_text("Pillow writes these, and cannot read them")
    (photos / "train" / "readme").write_text("notes")
    (photos / "train" / ".hidden").mkdir()
    shutil.copy(ants / "0 0.png", photos / "train" / ".hidden" / "0.png")
    (ants / ".hidden").mkdir()
    shutil.copy(ants / "0 0.png", ants / ".hidden" / "0.png")
    return photos


def test_what_is_left_out_of_a_folder_is_told(odd_photos):
    """But not hidden files."""
    _, _, left_out = common.image_names("folder", odd_photos)
    names = ("album.png", "loop", "notes.txt", "paper.pdf", "twice.png")
    in_ant = [f"train/ant/{name}" for name in names]
    assert sorted(left_out) == [*in_ant, "train/readme", "unlabeled/too.png"]


def test_each_image_of_a_folder_is_read_once(odd_photos):
    classes, files, _ = common.image_names("folder", odd_photos)
    assert classes == ["ant", "bee"] and len(files) == len(set(files)) == 22
    _, y, *_ = load_images("folder", odd_photos)
    assert y.tolist() == 6 * [0] + 6 * [1] + 10 * [-1]


def take_out(root, *parts):
    for part in parts:
        shutil.rmtree(root / part)


def rename_all(folder, suffix):
    for path in list(folder.iterdir()):
        path.rename(path.with_suffix(suffix))


BAD_FOLDERS = {
    "other classes": (
        lambda root: (root / "test" / "bee").rename(root / "test" / "wasp"),
        "photos/test (wasp): rename them, or remove them",
    ),
    "of other kinds": (
        lambda root: rename_all(root / "train" / "bee", ".heic"),
        "train/bee has no image (it has 6 .heic): put some there, or remove the folder",
    ),
    "unlabeled is a file": (
        lambda root: (take_out(root, "unlabeled"), (root / "unlabeled").write_text("")),
        "unlabeled (Not a directory): it must be a readable folder",
    ),
    "one class": (
        lambda root: take_out(root, "train/bee", "test/bee"),
        "train needs two or more class folders; it has 1",
    ),
    "test is a file": (
        lambda root: (take_out(root, "test"), (root / "test").write_text("")),
        "test (Not a directory): it must be a readable folder",
    ),
    "no train": (
        lambda root: take_out(root, "train"),
        "train needs two or more class folders; it has 0",
    ),
    "empty test": (lambda root: take_out(root, "test/ant", "test/bee"), "test has no class folder"),
    "empty class": (
        lambda root: [path.unlink() for path in (root / "test" / "bee").iterdir()],
        "test/bee has no image (it has nothing): put some there, or remove the folder",
    ),
    "empty unlabeled": (
        lambda root: take_out(root, "unlabeled/deep er"),
        "unlabeled has no image (it has nothing): put some there",
    ),
}


@pytest.mark.parametrize("fault", BAD_FOLDERS)
def test_a_bad_folder_is_refused(fault, photos):
    spoil, sentence = BAD_FOLDERS[fault]
    spoil(photos)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_images("folder", photos)


def test_a_folder_that_cannot_be_read_is_refused(photos, monkeypatch):
    """Wherever it is; nobody would miss its images otherwise."""
    scandir = os.scandir
    for folder in ("train", "test/bee", "unlabeled", "unlabeled/deep er"):

        def refuse(path, folder=folder):
            if Path(path) == photos / folder:
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        sentence = re.escape(f"cannot read {photos / folder} (Permission denied): it must")
        with pytest.raises(ValueError, match=sentence):
            load_images("folder", photos)


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", "lost+found"])
def test_folders_of_file_servers_and_archives_are_left_out(name, photos):
    """As a class, in a class, and deeper."""
    before = common.image_names("folder", photos)
    expected = []
    for place in ("train", "test", "train/ant", "unlabeled/deep er"):
        folder = photos / place / name
        (folder / "0 0.png").mkdir(parents=True)
        shutil.copy(photos / "train" / "ant" / "0 0.png", folder / "0 0.png" / "thumb.png")
        expected.append(f"{place}/{name}")
    classes, files, left_out = common.image_names("folder", photos)
    assert (classes, files) == before[:2] and sorted(left_out) == sorted(expected)


def test_a_link_to_itself_is_refused(photos):
    (photos / "train" / "loop").symlink_to(photos / "train" / "loop")
    with pytest.raises(ValueError, match="cannot read .*loop .Too many levels of symbolic links."):
        load_images("folder", photos)


def test_a_folder_without_test_images_is_scored_on_training_images(photos, tmp_path, capsys):
    take_out(photos, "test")
    *_, x_test, y_test = load_images("folder", photos, 24)
    assert (x_test.shape, x_test.dtype) == ((0, 3, 24, 24), torch.uint8)
    assert (y_test.shape, y_test.dtype) == ((0,), torch.int64)
    options = [*folder_options(photos), "--out", tmp_path / "run", "--num-labeled", 8]
    assert refusal(capsys, vat_scar, *options) == (
        f"{photos} has no test/: use --val N to hold images out"
    )
    result = vat_scar.main([*map(str, options), "--val", "4"])
    assert result["scored_on"] == "validation"
    assert "2 classes; 8 labeled, 10 unlabeled and 4 validation images" in capsys.readouterr().out


def test_test_images_of_some_classes_are_enough(photos, tmp_path, capsys):
    """Those that have none are named; labels are train's."""
    shutil.rmtree(photos / "test" / "ant")
    *_, y_test = load_images("folder", photos)
    assert y_test.tolist() == [1, 1, 1]
    options = [*folder_options(photos), "--epochs", "1", "--out", str(tmp_path / "run")]
    vat_scar.main(options)
    assert "\nClasses without test images: 1 of 2 (ant)\n" in capsys.readouterr().out


def test_a_pool_that_lacks_a_class_is_told(photos, tmp_path, capsys):
    """Both ants are among the labels. What is in unlabeled/ may be ants."""
    for n in range(4):
        (photos / "train" / "ant" / f"0 {n}.png").unlink()
    options = [*folder_options(photos), "--num-labeled", "4", "--epochs", "1", "--out"]
    vat_scar.main([*options, str(tmp_path / "one")])
    assert "Classes without" not in capsys.readouterr().out
    shutil.rmtree(photos / "unlabeled")
    vat_scar.main([*options, str(tmp_path / "other")])
    assert "\nClasses without unlabeled images: 1 of 2 (ant)\n" in capsys.readouterr().out


def test_what_is_transparent_becomes_white(photos):
    """In each mode that knows it; a black drawing on it would be all black otherwise."""
    drawing = Image.new("LA", (8, 8), (0, 0))
    drawing.putpixel((2, 3), (0, 255))
    drawing.putpixel((4, 4), (0, 51))
    expected = np.full((8, 8, 3), 255, np.uint8)
    expected[3, 2] = 0
    ants = photos / "train" / "ant"
    drawing.save(ants / "a.png")
    drawing.convert("RGBA").save(ants / "b.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((2, 3), 0)
    palette.save(ants / "c.png", transparency=1)
    gray = Image.new("L", (8, 8), 9)
    gray.putpixel((2, 3), 0)
    gray.save(ants / "d.png", transparency=9)
    for name, a_fifth in (("a", 204), ("b", 204), ("c", 255), ("d", 255)):
        expected[4, 4] = a_fifth
        pixels = common._read_image(ants / f"{name}.png", 8).permute(1, 2, 0).numpy()
        assert (pixels == expected).all(), name


def odd_name(text):
    """A file's name that is not UTF-8, as Python has it."""
    return os.fsdecode(text.encode("latin-1"))


@pytest.fixture
def odd_names(photos):
    """Names of images, of classes, and of a file that is left out, in Latin-1."""
    for part in ("train", "test"):
        (photos / part / "bee").rename(photos / part / odd_name("Bär"))
    (photos / "unlabeled" / "deep er" / "0 0.png").rename(photos / "unlabeled" / odd_name("é.png"))
    (photos / "train" / "ant" / odd_name("ü.txt")).write_text("")
    return photos.rename(photos.with_name(odd_name("Grüße")))


def test_names_need_not_be_utf_8(odd_names, tmp_path):
    """They are written as they are, and shown, by a command of its own, to its end."""
    out = tmp_path / odd_name("läuft")
    command = [sys.executable, HERE / "vat_scar.py", *folder_options(odd_names), "--out", out]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    for _ in range(2):  # the second prints what the first one found
        done = subprocess.run(command, env=environment, capture_output=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert b"Table 1: test accuracy (%) on Gr\\udcfc\\udcdfe\n" in done.stdout
    rows = (out / "selection.csv").read_bytes().splitlines()
    assert len(rows) == 11 and rows[1].startswith(b"unlabeled/deep er/0 1.png,")
    assert rows[-1].startswith(b"unlabeled/\xe9.png,")
    assert {row.split(b",")[1] for row in rows[1:]} <= {b"ant", b"B\xe4r"}
    tables = [sys.executable, HERE / "results" / "tables.py", tmp_path]
    done = subprocess.run(tables, env=environment, capture_output=True, timeout=600)
    assert done.returncode == 0 and b"## Gr\\udcfc\\udcdfe, 12 labels" in done.stdout, done.stderr


def test_files_that_are_left_out_are_named_whatever_their_names(odd_names, tmp_path):
    command = [sys.executable, HERE / "vat_scar.py", *folder_options(odd_names)]
    command += ["--epochs", "1", "--out", tmp_path / "run"]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=600)
    assert b"Files left out: 1 (train/ant/\\udcfc.txt)\n" in done.stdout


def test_reading_shows_how_far_it_is_on_a_terminal(photos, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    with redirect_stdout(terminal):
        common._read_files(photos, 201 * [("train/ant/0 0.png", 1)], 24)
    counts = re.findall(r"reading images: (\d+) of 201\x1b\[K\r", terminal.getvalue())
    assert counts == ["0", "100", "200"]


def test_reading_prints_nothing_elsewhere(photos, capsys):
    load_images("folder", photos)
    assert capsys.readouterr().out == ""


def test_damaged_images_are_named_together(photos):
    for name in ("train/ant/0 1.png", "train/bee/1 2.png", "unlabeled/deep er/0 3.png"):
        (photos / name).write_bytes(b"")
    with pytest.raises(ValueError, match="^damaged or unsupported images: 3 of 22; ") as error:
        load_images("folder", photos)
    for name in ("train/ant/0 1.png", "train/bee/1 2.png", "unlabeled/deep er/0 3.png"):
        assert f"cannot read {photos / name} (cannot identify image" in str(error.value)


def test_validation_images_need_labels_that_are_left(photos, tmp_path, capsys):
    """With unlabeled/ all labels are training's if --num-labeled does not say otherwise."""
    argv = [*folder_options(photos), "--out", tmp_path / "run", "--val", 4]
    sentence = refusal(capsys, vat_scar, *argv)
    assert sentence == "after --num-labeled 12, --val 4 is too many: 0 labels are available"
    result = vat_scar.main([str(word) for word in [*argv, "--num-labeled", 8]])
    assert result["table2"][0]["kept"] + result["table2"][0]["rejected"] == 4


def test_a_folder_that_changes_while_it_is_read_is_refused(photos, monkeypatch, tmp_path, capsys):
    """Labels and names would be shifted."""
    load = vat_scar.load_images

    def load_and_add(data, data_dir, size):
        images = load(data, data_dir, size)
        shutil.copy(
            photos / "train" / "ant" / "0 0.png", photos / "train" / "ant" / "a new one.png"
        )
        return images

    monkeypatch.setattr(vat_scar, "load_images", load_and_add)
    sentence = refusal(capsys, vat_scar, *folder_options(photos), "--out", tmp_path / "run")
    assert sentence == f"{photos} changed while it was read: run the command again"


def test_unknown_data_is_refused():
    with pytest.raises(ValueError, match="unknown data imagenet: choose cifar10, .*synthetic"):
        load_images("imagenet", "data")


def whole_image(kind):
    """An image file's 3,000 bytes or more."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def huge_image():
    """A PNG file whose header says 20,000 x 20,000."""
    content = bytearray(whole_image("png"))
    content[16:24] = struct.pack(">II", 20000, 20000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return content


DAMAGED = {
    "deep gray.png": lambda path: Image.fromarray(np.full((32, 32), 15, np.uint16)).save(path),
    "deep float.tiff": lambda path: Image.fromarray(np.ones((32, 32), np.float32)).save(path),
    "huge.png": lambda path: path.write_bytes(huge_image()),
    "text.png": lambda path: path.write_text("hello"),
    "cut off.png": lambda path: path.write_bytes(whole_image("png")[:20]),
    "half.png": lambda path: path.write_bytes(whole_image("png")[:2000]),
    "half.jpg": lambda path: path.write_bytes(whole_image("jpeg")[:2000]),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_images_that_are_damaged_deep_or_huge_are_refused(name, tmp_path):
    """More than 8 bits a channel would be cut off; 20,000 x 20,000 pixels would fill the memory."""
    DAMAGED[name](tmp_path / name)
    with pytest.raises(ValueError, match=re.escape(f"cannot read {tmp_path / name}")) as error:
        common._read_image(tmp_path / name, 32)
    assert name.startswith("deep") == ("more than 8 bits" in str(error.value))


PIXELS = np.random.default_rng(0).integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)


def fake_benchmark(layout, labels_name, words):
    """Like torchvision's classes: four images to train with, four others to test on."""

    def read(root, word):
        assert root == "some/data"
        part = slice(0, 4) if words.index(word) == 0 else slice(4, 8)
        labels = np.arange(-1, 7)[part]
        return SimpleNamespace(data=PIXELS[part].transpose(layout), **{labels_name: labels})

    return read


@pytest.mark.parametrize(
    "name, kind, layout, labels_name, words",
    [
        ("cifar10", "CIFAR10", (0, 2, 3, 1), "targets", [True, False]),
        ("cifar100", "CIFAR100", (0, 2, 3, 1), "targets", [True, False]),
        ("svhn", "SVHN", (0, 1, 2, 3), "labels", ["train", "test"]),
        ("stl10", "STL10", (0, 1, 2, 3), "labels", ["train+unlabeled", "test"]),
    ],
)
def test_benchmarks_are_read_by_torchvision(name, kind, layout, labels_name, words, monkeypatch):
    """Training and test images, channels first, under the labels of their own."""
    original, *rest = common.BENCHMARKS[name]
    assert original is getattr(torchvision.datasets, kind)
    fake = fake_benchmark(layout, labels_name, words)
    monkeypatch.setitem(common.BENCHMARKS, name, (fake, *rest))
    x, y, x_test, y_test = load_images(name, "some/data")
    assert (x.numpy() == PIXELS[:4]).all() and y.tolist() == [-1, 0, 1, 2]
    assert (x_test.numpy() == PIXELS[4:]).all() and y_test.tolist() == [3, 4, 5, 6]
    assert y.dtype == torch.int64 and x.is_contiguous()


def test_class_names_come_from_torchvision_or_are_digits(monkeypatch):
    for classes in ({"classes": ["cat", "dog"]}, {}):
        dataset = SimpleNamespace(data=PIXELS, labels=np.arange(8), **classes)
        fake = (lambda *args, **options: dataset, "train", "test", "a file")
        monkeypatch.setitem(common.BENCHMARKS, "svhn", fake)
        names, files, left_out = common.image_names("svhn", "some/data")
        assert names == classes.get("classes", list("0123456789")) and files == left_out == []


@pytest.mark.parametrize(
    "error, sentence",
    [
        (
            OSError("no network"),
            "cifar10 is not in .* could not be downloaded .no network.: put cifar",
        ),
        (RuntimeError("File not found"), "cifar10 is not in .* --data synthetic, which needs none"),
        (ImportError("no scipy"), "--data cifar10: no scipy; install it"),
    ],
)
def test_a_benchmark_that_cannot_be_had_is_refused(error, sentence, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.setitem(common.BENCHMARKS, "cifar10", (fail, *common.BENCHMARKS["cifar10"][1:]))
    with pytest.raises(ValueError, match=sentence):
        load_images("cifar10", tmp_path / "data")


def test_a_failed_download_removes_nothing(tmp_path, monkeypatch):
    """Neither what was in the folder nor what somebody puts there meanwhile."""
    folder = tmp_path / "data"

    def fail(root, word, download=False):
        if not download:
            raise RuntimeError("Dataset not found")
        (folder / "mine.txt").write_text("mine")
        raise OSError("no network")

    monkeypatch.setitem(common.BENCHMARKS, "cifar10", (fail, *common.BENCHMARKS["cifar10"][1:]))
    folder.mkdir(parents=True)
    (folder / ".lock").write_text("mine, too")
    with pytest.raises(ValueError, match="could not be downloaded .no network."):
        load_images("cifar10", folder)
    assert (folder / "mine.txt").read_text() == "mine"
    assert (folder / ".lock").read_text() == "mine, too"


def test_the_home_directory_is_meant_by_a_tilde(tmp_path, monkeypatch):
    """As torchvision takes it; no folder of that name is made."""

    def fail(root, word, download=False):
        raise RuntimeError("Dataset not found")

    monkeypatch.setitem(common.BENCHMARKS, "cifar10", (fail, *common.BENCHMARKS["cifar10"][1:]))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cifar10 is not in ~/data"):
        load_images("cifar10", "~/data")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_where_files_cannot_be_locked_a_download_goes_on(tmp_path, monkeypatch):
    def cannot(*inputs):
        raise OSError(37, "No locks available")

    def kind(root, word, download=False):
        if not download:
            raise RuntimeError("Dataset not found")
        return SimpleNamespace(data=PIXELS, labels=np.arange(8))

    monkeypatch.setattr(fcntl, "flock", cannot)
    monkeypatch.setitem(common.BENCHMARKS, "svhn", (kind, "train", "test", "a file"))
    x, *_ = load_images("svhn", tmp_path)
    assert (x.numpy() == PIXELS).all()


def test_of_runs_that_start_together_one_downloads(tmp_path, monkeypatch):
    """The others wait for it, and read what it has unpacked."""
    downloads, readers = [], []

    data_dir = tmp_path / "not" / "yet" / "there"

    def slow(root, word, download=False):
        archive = Path(root, "archive")
        if not archive.exists():
            if not download:
                raise RuntimeError("Dataset not found")
            downloads.append(word)
            time.sleep(0.3)
            assert not archive.exists()
            archive.write_text("whole")
        readers.append(archive.read_text())
        return SimpleNamespace(data=PIXELS, labels=np.arange(8))

    monkeypatch.setitem(common.BENCHMARKS, "svhn", (slow, "train", "test", "a file"))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: load_images("svhn", data_dir), range(4)))
    assert downloads == ["train"] and readers == 8 * ["whole"]


def test_images_that_are_there_are_read_without_writing(tmp_path, monkeypatch):
    """From a folder that only others may write to."""
    dataset = SimpleNamespace(data=PIXELS, labels=np.arange(8))
    monkeypatch.setitem(
        common.BENCHMARKS, "svhn", (lambda root, word: dataset, "train", "test", "a file")
    )
    load_images("svhn", tmp_path)
    assert not any(tmp_path.iterdir())


# --------------------------------------------------------------------------------------- the tables


def module_of_results(name):
    """A script in results/ as a module."""
    spec = importlib.util.spec_from_file_location(name, HERE / "results" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tables():
    return module_of_results("tables")


SETTINGS = {
    "num_labeled": 40,
    "depth": 10,
    "width": 1,
    "epochs": 2,
    "steps_per_epoch": 3,
    "batch_size": 4,
    "val": 0,
    "image_size": 32,
    "lr": 0.03,
    "pretrained": None,
}


def counts(right, kept, wrong, rejected):
    return {"kept": kept, "kept_correct": right, "rejected": rejected, "rejected_wrong": wrong}


def write_run(root, name, before, after, theta=None, args=None, **changes):
    """The result.json of a finished FixMatch run, from the pretraining of the run called theta."""
    args = {**SETTINGS, **(args or {})}
    if theta is not None:
        args["pretrained"] = "elsewhere/pretrain.pt"
    result = {
        "method": "fixmatch",
        "theta": f"the hash of {theta or name}'s",
        "data": "CIFAR-10",
        "select": "fgsm",
        "eps": 1.0,
        "seed": 0,
        "pretrain_accuracy": before,
        "final_accuracy": after,
        "selection": counts(40, 50, 0, 0),
        "table2": [{"eps": 1.0, **counts(9, 10, 2, 8)}],
        "device": "a CPU",
        "ranks": 1,
        "seconds": 1800,
        "versions": {"torch": "2.11"},
        "args": args,
        **changes,
    }
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / name / "result.json").write_text(json.dumps(result))


@pytest.fixture
def made(tables, tmp_path, capsys):
    """Runs tables.py over tmp_path: its exit code, what it printed, the cells of the tables.

    rows[first cell] is a dictionary by the table's head.
    """

    def make():
        code = tables.main([str(tmp_path)])
        printed = capsys.readouterr()
        rows = {}
        head = None
        for line in printed.out.splitlines():
            if not line.startswith("|"):
                head = None
                continue
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if head is None:
                head = cells
            elif cells[0] != "---":
                rows[cells[0]] = dict(zip(head[1:], cells[1:], strict=True))
        return SimpleNamespace(code=code, text=printed.out, errors=printed.err, rows=rows)

    return make


@pytest.fixture
def three_seeds(tmp_path):
    """SCAR with three seeds, of which two have a control."""
    for seed, before, scar, control in ((0, 80, 84, 82), (1, 82, 85, 84), (2, 90, 99, None)):
        write_run(
            tmp_path, f"scar{seed}", before, scar, seed=seed,
            selection=counts([40, 41, 45][seed], 50, 0, 0),
            table2=[{"eps": 1.0, **counts([6, 7, 9][seed], 10, [5, 4, 2][seed], 20)}],
        )  # fmt: skip
        if control is not None:
            options = {"theta": f"scar{seed}", "select": "none", "seed": seed}
            write_run(tmp_path, f"control{seed}", before, control, **options)
    return tmp_path


SCAR = "FixMatch + SCAR (eps 1)"
CONTROL = "FixMatch + nothing (control)"
PPV = "sensitivity: right among kept (PPV)"
NPV = "specificity: wrong among rejected (NPV)"


def test_table_1_has_mean_and_deviation_of_pretraining(three_seeds, made):
    """80, 82, 90: mean 84, deviations -4, -2, 6, so sqrt(56 / 2) = 5.29."""
    assert made().rows["FixMatch"]["ours"] == "84.00 ± 5.29 (n = 3)"


def test_table_1_has_mean_and_deviation_of_scar(three_seeds, made):
    """84, 85, 99: mean 89.33, sqrt(140.67 / 2) = 8.39."""
    assert made().rows[SCAR]["ours"] == "89.33 ± 8.39 (n = 3)"


def test_table_1_has_the_control(three_seeds, made):
    """82 and 84, from 80 and 82."""
    row = made().rows[CONTROL]
    assert row["ours"] == "83.00 ± 1.41 (n = 2)"
    assert row["gain over pretraining"] == "+2.00 ± 0.00 (n = 2)"


def test_gains_over_pretraining_are_of_each_seed(three_seeds, made):
    """4, 3, 9: mean 5.33, sqrt(20.67 / 2) = 3.21."""
    assert made().rows[SCAR]["gain over pretraining"] == "+5.33 ± 3.21 (n = 3)"


def test_gains_over_the_control_are_of_seeds_that_have_one(three_seeds, made):
    """84 - 82 and 85 - 84; the third seed has none."""
    assert made().rows[SCAR]["gain over control"] == "+1.50 ± 0.71 (n = 2)"


def test_a_loss_against_the_control_is_negative(tmp_path, made):
    write_run(tmp_path, "scar", 80, 81)
    write_run(tmp_path, "control", 80, 83.5, theta="scar", select="none")
    assert made().rows[SCAR]["gain over control"] == "-2.50 (n = 1)"


def test_controls_are_paired_by_theta(tmp_path, made):
    """Two pretrainings of seed 0 at different lr, each with its control."""
    for lr, scar, control in ((0.1, 84, 82), (0.2, 94, 95)):
        write_run(tmp_path, f"scar{lr}", 80, scar, args={"lr": lr})
        options = {"theta": f"scar{lr}", "select": "none", "args": {"lr": lr}}
        write_run(tmp_path, f"control{lr}", 80, control, **options)
    rows = made().rows
    assert rows["FixMatch, lr 0.1 + SCAR (eps 1)"]["gain over control"] == "+2.00 (n = 1)"
    assert rows["FixMatch, lr 0.2 + SCAR (eps 1)"]["gain over control"] == "-1.00 (n = 1)"


def test_thetas_are_told_apart_by_their_weights_not_by_their_folders(tmp_path, made):
    """scar was deleted and run again; the old one's control must not count for the new one."""
    write_run(tmp_path, "control", 80, 81, theta="the old scar", select="none")
    write_run(tmp_path, "scar", 90, 94)
    made_tables = made()
    assert made_tables.rows[SCAR]["gain over control"] == "-"
    assert CONTROL not in made_tables.rows
    assert "- left out: control; no run here pretrained its theta~" in made_tables.text
    write_run(tmp_path, "another-control", 90, 91, theta="scar", select="none")
    assert made().rows[SCAR]["gain over control"] == "+3.00 (n = 1)"


def test_results_of_earlier_versions_are_paired_by_their_folders(tmp_path, made):
    """They have no hash."""
    write_run(tmp_path, "scar", 80, 84)
    write_run(tmp_path, "control", 80, 81, theta="scar", select="none")
    for name, pretrained in (("scar", None), ("control", "runs/scar/pretrain.pt")):
        path = tmp_path / name / "result.json"
        result = json.loads(path.read_text())
        del result["theta"]
        result["args"]["pretrained"] = pretrained
        path.write_text(json.dumps(result))
    assert made().rows[SCAR]["gain over control"] == "+3.00 (n = 1)"


def test_scar_without_a_control_is_named(three_seeds, made):
    note = f"- {SCAR}: left out of the gain over control, because no control with these "
    assert f"{note}settings starts from the same theta~: scar2\n" in made().text
    write_run(three_seeds, "control2", 90, 92, theta="scar2", select="none", seed=2)
    assert "no control" not in made().text


def test_another_selection_without_a_control_is_named_too(tmp_path, made):
    write_run(tmp_path, "scar", 80, 84)
    write_run(tmp_path, "surest", 80, 84, theta="scar", select="confidence")
    row = "FixMatch + the most confident (as many as eps 1 keeps)"
    assert f"- {row}: left out of the gain over control, " in made().text


def test_labels_added_come_from_the_selection(three_seeds, made):
    """40, 41, 45 of 50: 80, 82, 90 percent, which is 84 and sqrt(56 / 2)."""
    added = made().rows[SCAR]["labels added, right (%)"]
    assert added == "84.00 ± 5.29 (n = 3), on average 42.0/50.0"
    assert made().rows[CONTROL]["labels added, right (%)"] == ""


def test_table_2_is_measured_on_theta(three_seeds, made):
    """6, 7, 9 of 10 kept are right; 5, 4, 2 of 20 rejected are wrong."""
    row = made().rows["FixMatch (eps 1)"]
    assert row[PPV] == "73.33 ± 15.28 (n = 3), on average 7.3/10.0"
    assert row[NPV] == "18.33 ± 7.64 (n = 3), on average 3.7/20.0"


def test_table_2_has_the_rows_of_any_seed_in_order(tmp_path, made):
    """Each of the seeds that measured it; controls measure theta~ too, and do not count."""
    rows = {1: counts(1, 4, 1, 5), 2: counts(2, 4, 2, 5), 3: counts(3, 4, 3, 5)}
    for seed, eps_values in ((0, [3]), (1, [1, 3])):
        table2 = [{"eps": float(eps), **rows[eps]} for eps in eps_values]
        write_run(tmp_path, f"scar{seed}", 80, 84, seed=seed, table2=table2)
    options = {"theta": "scar0", "select": "none", "table2": [{"eps": 2.0, **rows[2]}]}
    write_run(tmp_path, "control", 80, 82, **options)
    rows = made().rows
    assert [name for name in rows if "(eps" in name and "+" not in name] == [
        "FixMatch (eps 1)",
        "FixMatch (eps 3)",
    ]
    assert rows["FixMatch (eps 1)"][PPV] == "25.00 (1/4)"
    assert rows["FixMatch (eps 3)"][NPV] == "60.00 ± 0.00 (n = 2), on average 3.0/5.0"


def test_one_seed_has_no_deviation(tmp_path, made):
    write_run(tmp_path, "scar", 80, 84)
    rows = made().rows
    assert rows[SCAR]["ours"] == "84.00 (n = 1)"
    assert rows[SCAR]["labels added, right (%)"] == "80.00 (40/50)"
    assert rows["FixMatch (eps 1)"][PPV] == "90.00 (9/10)"
    assert rows["FixMatch (eps 1)"][NPV] == "25.00 (2/8)"
    assert rows[SCAR]["gain over control"] == "-"


def test_a_rate_may_be_0(tmp_path, made):
    write_run(tmp_path, "scar", 80, 84, selection=counts(0, 4, 3, 9))
    assert made().rows[SCAR]["labels added, right (%)"] == "0.00 (0/4)"


def test_where_nothing_was_kept_there_is_no_rate(tmp_path, made):
    """With several seeds the rate is of those that kept something."""
    write_run(tmp_path, "scar0", 80, 84, selection=counts(0, 0, 3, 9))
    assert made().rows[SCAR]["labels added, right (%)"] == "none (0/0)"
    write_run(tmp_path, "scar1", 80, 84, seed=1, selection=counts(3, 4, 3, 9))
    added = made().rows[SCAR]["labels added, right (%)"]
    assert added == "75.00 (n = 1), on average 1.5/2.0"


@pytest.mark.parametrize(
    "known, cell",
    [
        (counts(0, 0, 0, 0), "85 whose true label is unknown"),
        (counts(6, 8, 0, 0), "75.00 (6/8), and 77 whose true label is unknown"),
        (counts(60, 85, 0, 0), "70.59 (60/85)"),
    ],
    ids=["none", "some", "all"],
)
def test_labels_added_of_unknown_truth_are_counted(known, cell, tmp_path, made):
    """Of 85 images that joined, none, 8, or all have a true label."""
    write_run(tmp_path, "scar", 80, 84, selection={**known, "added": 85})
    assert made().rows[SCAR]["labels added, right (%)"] == cell


def test_labels_added_of_unknown_truth_are_a_mean_over_seeds(tmp_path, made):
    for seed in (0, 1):
        selection = {**counts(0, 0, 0, 0), "added": 80 + 5 * seed}
        write_run(tmp_path, f"scar{seed}", 80, 84, seed=seed, selection=selection)
    assert made().rows[SCAR]["labels added, right (%)"] == "82.5 whose true label is unknown"


@pytest.mark.parametrize(
    "method, name, eps, paper",
    [
        ("vat", "VAT", 1, ["85.25", "86.79", "92.22 (7587/8227)", "47.10 (835/1773)"]),
        ("vat", "VAT", 2, ["85.25", "86.79", "95.76 (6543/6833)", "37.42 (1185/3167)"]),
        ("vat", "VAT", 3, ["85.25", "86.79", "97.48 (5494/5636)", "30.55 (1333/4364)"]),
        ("vat", "VAT", 4, ["85.25", "86.79", "98.35 (4716/4795)", "26.81 (1396/5205)"]),
        ("vat", "VAT", 6, ["85.25", "86.79", "98.93 (3684/3724)", "22.86 (1435/6276)"]),
        ("mixmatch", "MixMatch", 1, ["89.99", "92.99", "98.91 (6054/6124)", "24.13 (936/3879)"]),
        ("fixmatch", "FixMatch", 1, ["94.13", "95.17", "99.59 (6385/6411)", "15.63 (561/3589)"]),
        ("fixmatch", "FixMatch", 2, ["94.13", "95.17", "", ""]),
    ],
)
def test_the_papers_figures_stand_beside_ours(method, name, eps, paper, tmp_path, made):
    table2 = [{"eps": float(eps), **counts(9, 10, 2, 8)}]
    write_run(tmp_path, "scar", 80, 84, method=method, eps=float(eps), table2=table2)
    rows = made().rows
    row = rows[f"{name} (eps {eps})"]
    assert [
        rows[name]["paper"],
        rows[f"{name} + SCAR (eps {eps})"]["paper"],
        row["sensitivity, paper"],
        row["specificity, paper"],
    ] == paper


def test_the_papers_figures_do_not_stand_beside_those_of_other_data(tmp_path, made):
    write_run(tmp_path, "scar", 80, 84, data="CIFAR-10 (JPEG)")
    assert "94.13" not in made().text and "paper" not in made().rows[SCAR]


def test_controls_have_no_figure_of_the_paper(tmp_path, made):
    write_run(tmp_path, "scar", 80, 84)
    for select, eps in (("none", 1.0), ("confidence", 1.0), ("fgsm", 0.0)):
        write_run(tmp_path, f"{select}", 80, 84, theta="scar", select=select, eps=eps)
    rows = made().rows
    with_figure = {name for name, row in rows.items() if row.get("paper")}
    assert with_figure == {"FixMatch", SCAR}


def test_rows_are_in_the_tables_order(tmp_path, made):
    """Methods as in the paper; of each what was added: nothing, all, SCAR's, the most confident."""
    for method in ("fixmatch", "vat"):
        write_run(tmp_path, f"{method}-scar", 80, 84, method=method)
        for select, eps in (("confidence", 1.0), ("none", 1.0), ("fgsm", 0.0)):
            options = {"theta": f"{method}-scar", "select": select, "eps": eps, "method": method}
            write_run(tmp_path, f"{method}-{select}", 80, 85, **options)
    rows = [
        "{}",
        "{} + nothing (control)",
        "{} + every pseudo-label (eps 0)",
        "{} + SCAR (eps 1)",
        "{} + the most confident (as many as eps 1 keeps)",
    ]
    expected = [row.format(name) for name in ("VAT", "FixMatch") for row in rows]
    expected += ["VAT (eps 1)", "FixMatch (eps 1)"]
    assert list(made().rows) == expected


def test_another_setting_has_rows_of_its_own(tmp_path, made):
    """No mean of runs that differ in what changes a result."""
    write_run(tmp_path, "a", 80, 84)
    write_run(tmp_path, "b", 90, 91, seed=1, args={"lr": 0.1})
    rows = made().rows
    assert rows["FixMatch, lr 0.03"]["ours"] == "80.00 (n = 1)"
    assert rows["FixMatch, lr 0.1 + SCAR (eps 1)"]["ours"] == "91.00 (n = 1)"


@pytest.mark.parametrize("processes", [1, 2])
def test_runs_of_several_processes_have_rows_of_their_own(processes, tmp_path, made):
    write_run(tmp_path, "a", 80, 84)
    write_run(tmp_path, "b", 90, 91, seed=1, ranks=processes)
    assert ("FixMatch, ranks 2" in made().rows) == (processes == 2)


@pytest.mark.parametrize(
    "name", ["out", "data_dir", "device", "compile", "tensorboard", "table2_eps"]
)
def test_a_setting_that_changes_no_result_makes_no_row(name, tmp_path, made):
    write_run(tmp_path, "a", 80, 84, args={name: "this"})
    write_run(tmp_path, "b", 90, 94, seed=1, args={name: "that"})
    assert made().rows[SCAR]["ours"] == "89.00 ± 7.07 (n = 2)"


@pytest.mark.parametrize(
    "setting, head",
    [
        ({"num_labeled": 50}, "CIFAR-10, 50 labels, WRN-10-1, 2 + 2 epochs of 3 steps, batch 4"),
        ({"depth": 16}, "CIFAR-10, 40 labels, WRN-16-1, 2 + 2 epochs of 3 steps, batch 4"),
        ({"width": 2}, "CIFAR-10, 40 labels, WRN-10-2, 2 + 2 epochs of 3 steps, batch 4"),
        ({"epochs": 5}, "CIFAR-10, 40 labels, WRN-10-1, 5 + 5 epochs of 3 steps, batch 4"),
        ({"steps_per_epoch": 7}, "CIFAR-10, 40 labels, WRN-10-1, 2 + 2 epochs of 7 steps, batch 4"),
        ({"batch_size": 8}, "CIFAR-10, 40 labels, WRN-10-1, 2 + 2 epochs of 3 steps, batch 8"),
        (
            {"image_size": 48},
            "CIFAR-10, 40 labels, WRN-10-1, 2 + 2 epochs of 3 steps, batch 4, 48 x 48 pixels",
        ),
        (
            {"val": 9},
            "CIFAR-10, 40 labels, WRN-10-1, 2 + 2 epochs of 3 steps, batch 4, "
            "scored on 9 validation images",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_runs_of_another_kind_have_tables_of_their_own(setting, head, tmp_path, made):
    write_run(tmp_path, "a", 80, 84)
    write_run(tmp_path, "b", 90, 91, seed=1, args=setting)
    text = made().text
    usual = "CIFAR-10, 40 labels, WRN-10-1, 2 + 2 epochs of 3 steps, batch 4"
    heads = re.findall("^## (.*)$", text, re.MULTILINE)
    assert sorted(heads) == sorted([usual, head])
    parts = dict(zip(heads, text.split("## ")[1:]))
    assert "84.00 (n = 1)" in parts[usual] and "91.00 (n = 1)" in parts[head]
    assert ("validation" in parts[head]) == ("val" in setting)


def test_other_data_have_tables_of_their_own(tmp_path, made):
    write_run(tmp_path, "a", 80, 84)
    write_run(tmp_path, "b", 90, 91, seed=1, data="svhn")
    assert len(re.findall("^## (?:CIFAR-10|svhn), ", made().text, re.MULTILINE)) == 2


def test_other_images_under_the_same_name_have_tables_of_their_own(tmp_path, made):
    """And say which they are."""
    write_run(tmp_path, "a", 80, 84, data="images", images="12 + 6, hash 17")
    write_run(tmp_path, "b", 90, 91, seed=1, data="images", images="12 + 6, hash 18")
    text = made().text
    assert len(re.findall("^## images, ", text, re.MULTILINE)) == 2
    for images in ("12 + 6, hash 17", "12 + 6, hash 18"):
        assert text.count(f"- 0.5 hours on a CPU, torch 2.11; images {images}\n") == 1


@pytest.fixture
def another_length(tmp_path):
    """From one pretraining of an epoch of 3 steps: SCAR as long, and both for 5 epochs of 9."""
    args = {"epochs": 1}
    write_run(tmp_path, "a", 80, 84, args=args)
    longer = {"epochs": 5, "steps_per_epoch": 9, "batch_size": 8}
    write_run(tmp_path, "b", 80, 88, theta="a", args=longer)
    write_run(tmp_path, "c", 80, 87, theta="a", args=longer, select="none")
    return tmp_path


def test_a_fine_tuning_of_another_length_is_titled_by_both(another_length, made):
    heads = re.findall("^## CIFAR-10, 40 labels, WRN-10-1, (.*)$", made().text, re.MULTILINE)
    assert heads == [
        "1 + 1 epochs of 3 steps, batch 4",
        "1 + 5 epochs of 3 then 9 steps, batch 4 then 8",
    ]


def test_a_fine_tuning_of_another_length_has_its_own_rows(another_length, made):
    """The pretraining's accuracy too, and the gain over a control as long."""
    _, same_length, longer = made().text.split("## ")
    assert "| FixMatch | 94.13 | 80.00 (n = 1) |" in same_length
    assert "| FixMatch | 94.13 | 80.00 (n = 1) |" in longer
    assert "| 88.00 (n = 1) | +8.00 (n = 1) | +1.00 (n = 1) |" in longer
    assert "88.00" not in same_length and "84.00" not in longer


def test_a_setting_of_the_fine_tuning_alone_is_named_beside_the_pretrainings(tmp_path, made):
    write_run(tmp_path, "a", 80, 84)
    write_run(tmp_path, "b", 80, 83, theta="a", args={"lr": 0.1})
    rows = made().rows
    assert rows["FixMatch, lr 0.03 + SCAR (eps 1)"]["ours"] == "84.00 (n = 1)"
    assert rows["FixMatch, lr 0.03 then 0.1 + SCAR (eps 1)"]["ours"] == "83.00 (n = 1)"
    assert "FixMatch, lr 0.03" in rows and "FixMatch, lr 0.03 then 0.1" not in rows


@pytest.mark.parametrize("before, now, label", [(7, 1, "mu 7 then 1"), (1, 7, "mu 1 then 7")])
def test_a_setting_that_another_method_lacks_is_named_where_it_changes(
    before, now, label, tmp_path, made
):
    write_run(tmp_path, "a", 80, 84, args={"mu": before})
    write_run(tmp_path, "b", 80, 83, theta="a", args={"mu": now})
    assert made().rows[f"FixMatch, {label} + SCAR (eps 1)"]["ours"] == "83.00 (n = 1)"


def test_a_control_on_a_copy_of_the_images_is_the_control(tmp_path, made):
    """In a folder of another name."""
    write_run(tmp_path, "scar", 80, 84, data="mine", images="12 + 6, hash 17")
    options = {"theta": "scar", "select": "none", "images": "12 + 6, hash 17"}
    write_run(tmp_path, "control", 80, 83, data="copy", **options)
    assert made().rows[SCAR]["gain over control"] == "+1.00 (n = 1)"


@pytest.fixture
def a_seed_twice(tmp_path):
    """Two pretrainings of seed 0, each with SCAR and a control, and one of seed 1."""
    for name, seed, before, scar, control in (
        ("a", 0, 80, 84, 83), ("b", 0, 90, 99, 91), ("c", 1, 80, 86, 83)
    ):  # fmt: skip
        right = {"a": 40, "b": 10, "c": 30}[name]
        write_run(tmp_path, name, before, scar, seed=seed, selection=counts(right, 50, 0, 0))
        options = {"theta": name, "select": "none", "seed": seed}
        write_run(tmp_path, f"{name}-control", before, control, **options)
    return tmp_path


def test_only_the_first_run_of_a_seed_counts(a_seed_twice, made):
    """By its folder's name, in every column."""
    row = made().rows[SCAR]
    assert row["ours"] == "85.00 ± 1.41 (n = 2)"
    assert row["gain over pretraining"] == "+5.00 ± 1.41 (n = 2)"
    assert row["gain over control"] == "+2.00 ± 1.41 (n = 2)"
    assert row["labels added, right (%)"] == "70.00 ± 14.14 (n = 2), on average 35.0/50.0"
    assert made().rows["FixMatch"]["ours"] == "80.00 ± 0.00 (n = 2)"
    assert made().rows[CONTROL]["ours"] == "83.00 ± 0.00 (n = 2)"


def test_a_seed_that_was_run_twice_is_noted(a_seed_twice, made):
    assert f"- {SCAR}: 3 runs; only the first of each seed counts\n" in made().text


def test_a_control_of_another_pretraining_of_the_seed_does_not_count(tmp_path, made):
    """Of the first pretraining there is no control."""
    write_run(tmp_path, "a", 80, 84)
    write_run(tmp_path, "b", 90, 99)
    write_run(tmp_path, "b-control", 90, 91, theta="b", select="none")
    assert made().rows[SCAR]["gain over control"] == "-"


def test_of_two_controls_of_one_theta_the_first_counts(tmp_path, made):
    """In its own row as in SCAR's gain."""
    write_run(tmp_path, "scar", 80, 84)
    for name, after in (("control-a", 81), ("control-b", 83)):
        write_run(tmp_path, name, 80, after, theta="scar", select="none")
    rows = made().rows
    assert rows[CONTROL]["ours"] == "81.00 (n = 1)"
    assert rows[SCAR]["gain over control"] == "+3.00 (n = 1)"


def test_each_eps_has_a_row(tmp_path, made):
    write_run(tmp_path, "scar", 80, 84)
    write_run(tmp_path, "scar4", 80, 82, theta="scar", eps=4.0)
    rows = made().rows
    assert rows[SCAR]["ours"] == "84.00 (n = 1)"
    assert rows["FixMatch + SCAR (eps 4)"]["ours"] == "82.00 (n = 1)"


def test_controls_are_one_row_whatever_their_eps(tmp_path, made):
    """It selects nothing."""
    for seed, eps, after in ((0, 1.0, 81), (1, 4.0, 83)):
        write_run(tmp_path, f"scar{seed}", 80, 84, seed=seed)
        options = {"theta": f"scar{seed}", "select": "none", "seed": seed, "eps": eps}
        write_run(tmp_path, f"control{seed}", 80, after, **options)
    assert made().rows[CONTROL]["ours"] == "82.00 ± 1.41 (n = 2)"


def test_runs_in_folders_below_are_another_studys(tmp_path, made):
    write_run(tmp_path, "scar", 80, 84)
    write_run(tmp_path / "small", "other", 10, 20, seed=1)
    assert made().rows[SCAR]["ours"] == "84.00 (n = 1)"


def test_a_run_whose_pretraining_is_not_there_is_left_out_by_name(three_seeds, made):
    write_run(three_seeds, "stray", 10, 20, theta="lost", select="confidence", seed=7)
    made_tables = made()
    note = "no run here pretrained its theta~ (--pretrained elsewhere/pretrain.pt)"
    assert f"- left out: stray; {note}\n" in made_tables.text
    assert "20.00 (n = 1)" not in made_tables.text


def test_settings_and_seeds_are_listed_below_the_tables(three_seeds, made):
    assert "- FixMatch: lr 0.03, ranks 1; seeds 0 1 2\n" in made().text


def test_hours_and_machines_are_listed_below_the_tables(tmp_path, made):
    write_run(tmp_path, "a", 80, 84, seconds=3600)
    write_run(tmp_path, "b", 80, 84, seed=1, seconds=5400, device="a GPU")
    assert made().text.endswith("- 2.5 hours on a CPU, torch 2.11; a GPU, torch 2.11\n")


def test_tables_are_kept_as_printed(three_seeds, made):
    printed = made().text
    assert (three_seeds / "tables.md").read_text(encoding="utf-8") == printed


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"method": "fixmatch"}', "no val"])
def test_a_damaged_result_is_named_and_the_others_make_the_tables(damage, three_seeds, made):
    write_run(three_seeds, "damaged", 80, 84)
    path = three_seeds / "damaged" / "result.json"
    if damage == "no val":
        result = json.loads(path.read_text())
        del result["args"]["val"]
        damage = json.dumps(result)
    path.write_text(damage)
    made_tables = made()
    assert made_tables.code == 1 and SCAR in made_tables.rows
    assert f"error: {three_seeds}/damaged/result.json is damaged" in made_tables.errors


def test_no_run_is_an_error(tmp_path, made):
    made_tables = made()
    assert made_tables.code == 1 and "has no finished run" in made_tables.errors
    assert not any(tmp_path.iterdir())


def test_a_runs_own_result_makes_the_tables(watched, tables, capsys):
    """What main writes has all that tables.py reads."""
    root = watched.out.parent
    assert tables.main([str(root)]) == 0
    (root / "tables.md").unlink()
    name = {"vat": "VAT", "mixmatch": "MixMatch", "fixmatch": "FixMatch"}[watched.script.METHOD]
    accuracy = f"{watched.result['final_accuracy']:.2f}"
    assert f"| {name} + SCAR (eps {watched.eps}) | {accuracy} (n = 1) |" in capsys.readouterr().out


STUDIES = sorted({path.parent.parent for path in HERE.glob("results/*/*/result.json")})
assert STUDIES
each_study = pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)


@each_study
def test_results_have_the_tables_of_their_files(study, tables, tmp_path, capsys):
    shutil.copytree(study, tmp_path / "study")
    assert tables.main([str(tmp_path / "study")]) == 0
    text = (HERE / "results" / "README.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in text


@each_study
def test_results_have_the_numbers_of_confidence(study):
    text = (HERE / "results" / "README.md").read_text(encoding="utf-8")
    rows = read_rows(study / "confidence.csv")
    assert rows
    for folder in {row["run"] for row in rows}:
        result = json.loads((study / folder / "result.json").read_text(encoding="utf-8"))
        title = {"vat": "VAT", "mixmatch": "MixMatch", "fixmatch": "FixMatch"}[result["method"]]
        own = [row for row in rows if row["run"] == folder]
        for row, table2 in zip(own, result["table2"], strict=True):
            measured = [str(table2[name]) for name in ("kept", "kept_correct")]
            assert [row["kept"], row["fgsm_correct"]] == measured
            assert float(row["eps"]) == table2["eps"]
        numbers = [f"{int(row['kept']):,}" for row in own]
        assert f"| {title}: number kept | {' | '.join(numbers)} |" in text
        for name, column in {"FGSM": "fgsm_correct", "confidence": "confidence_correct"}.items():
            right = [f"{100 * int(row[column]) / int(row['kept']):.2f}" for row in own]
            assert f"| {title}: {name} | {' | '.join(right)} |" in text


# ----------------------------------------------------------------------------------- the comparison


class Recalled(nn.Module):
    """A network whose only weights, named by its size, are the logits that it gives its images."""

    def __init__(self, classes, depth, width):
        super().__init__()
        self.register_parameter(f"{depth}-{width}", nn.Parameter(torch.empty(200, classes)))

    def forward(self, x):
        assert x.shape == (200, 3, 8, 8)
        (logits,) = self.parameters()
        return logits


@pytest.fixture
def compare(monkeypatch):
    """results/compare.py with 200 test images and networks of type Recalled."""
    monkeypatch.syspath_prepend(HERE / "results")  # as for a command: it imports tables
    module = module_of_results("compare")
    x = torch.zeros(200, 3, 8, 8, dtype=torch.uint8)
    y = torch.arange(200) % 10
    files = {
        ("folder", "mine", 8): (x[:7], y[:7], x, y),
        ("folder", "moved", 8): (x[:7], y[:7], x, y),
        ("folder", "fewer", 8): (x[:7], y[:7], x[:90], y[:90]),
        ("folder", "shuffled", 8): (x[:7], y[:7], x, y.flip(0)),
    }
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "load_images", lambda *args: files[args])
    monkeypatch.setattr(module, "image_names", lambda data, data_dir: (SHAPES, [], []))
    monkeypatch.setattr(module, "WideResNet", Recalled)
    return module


@pytest.fixture
def family(tmp_path):
    """Runs in a folder, and in `.logits` those of their weights files, by run and file."""
    y = torch.arange(200) % 10
    generator = torch.Generator().manual_seed(0)
    found = {}

    def weights(run, name, size):
        logits = torch.randn(200, 10, generator=generator)
        logits[torch.arange(200), y] += 2
        found[run, name] = logits
        torch.save({size: logits}, tmp_path / run / name)

    def add(run, theta=None, eps_of_table2=(1,), args=None, **changes):
        own = {**SETTINGS, "data": "folder", "data_dir": "mine", "image_size": 8, **(args or {})}
        size = f"{own['depth']}-{own['width']}"
        kept = {0: 200, 0.5: 80, 1: 60, 2: 25, 255: 0}
        table2 = [
            {"eps": eps, **counts(kept[eps] // 2, kept[eps], 0, 200 - kept[eps])}
            for eps in eps_of_table2
        ]
        (tmp_path / run).mkdir()
        if theta is None:
            weights(run, "pretrain.pt", size)
        else:
            found[run, "pretrain.pt"] = found[theta, "pretrain.pt"]
        weights(run, "model.pt", size)
        before, after = [
            100 * float((found[run, name].argmax(dim=1) == y).double().mean())
            for name in ("pretrain.pt", "model.pt")
        ]
        write_run(tmp_path, run, before, after, theta, own, table2=table2, **changes)
        path = tmp_path / run / "result.json"
        result = json.loads(path.read_text())
        result["theta"] = vat_scar.fingerprint([found[run, "pretrain.pt"]])
        path.write_text(json.dumps(result))

    add("scar", eps_of_table2=(0, 0.5, 1, 2, 255))
    add("all", "scar", eps=0.0, eps_of_table2=(0, 0.5, 1, 2, 255))
    add("control", "scar", select="none")
    add("control2", "scar", select="none")
    add("longer", "scar", args={"epochs": 3})
    add("other_lr", "scar", args={"lr": 0.01})
    add("other", eps_of_table2=(1, 2), args={"depth": 16, "width": 3})
    add("val", args={"val": 50})
    return SimpleNamespace(root=tmp_path, y=y, logits=found)


def compare_family(compare, family, capsys, *options):
    """compare.py over the family: its exit code, the cells of its two tables, what it printed."""
    code = compare.main([str(family.root), *options])
    printed = capsys.readouterr()
    tables = printed.out.split("\n\n")[:2]
    gains, shares = [
        [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()[2:]]
        for table in tables
    ]
    return SimpleNamespace(code=code, gains=gains, shares=shares, out=printed.out, err=printed.err)


def expected_gain(family, after, before):
    """From the definition of McNemar's test."""
    gained = lost = 0
    for a, b, label in zip(family.logits[after], family.logits[before], family.y, strict=True):
        gained += bool(a.argmax() == label and b.argmax() != label)
        lost += bool(a.argmax() != label and b.argmax() == label)
    return f"{(gained - lost) / 2:+.2f} (z = {(gained - lost) / math.sqrt(gained + lost):.1f})"


def test_compare_finds_each_runs_gain_over_its_theta(compare, family, capsys):
    gains = {row[0]: row[1] for row in compare_family(compare, family, capsys).gains}
    names = ["scar", "all", "control", "control2", "longer", "other_lr", "other"]
    expected = {
        name: expected_gain(family, (name, "model.pt"), (name, "pretrain.pt")) for name in names
    }
    assert gains == expected
    assert len(set(expected.values())) > 2


def test_compare_finds_the_gain_over_the_control_of_the_same_settings(compare, family, capsys):
    gains = {row[0]: row[2] for row in compare_family(compare, family, capsys).gains}
    expected = {
        name: expected_gain(family, (name, "model.pt"), ("control", "model.pt"))
        for name in ("scar", "all")
    }
    others = dict.fromkeys(["control", "control2", "longer", "other_lr", "other"], "-")
    assert gains == {**expected, **others}
    assert expected["scar"] != expected["all"]


def test_compare_chooses_as_many_by_confidence_as_fgsm_keeps(compare, family, capsys):
    shares = compare_family(compare, family, capsys).shares
    rows = read_rows(family.root / "confidence.csv")
    expected, expected_cells = [], []
    for name, numbers in {
        "scar": {"0": 200, "0.5": 80, "1": 60, "2": 25, "255": 0},
        "other": {"1": 60, "2": 25},
    }.items():
        logits = family.logits[name, "pretrain.pt"]
        confidence = logits.softmax(dim=1).amax(dim=1)
        right = (logits.argmax(dim=1) == family.y)[confidence.argsort(descending=True)]
        for eps, kept in numbers.items():
            counted = kept, kept // 2, int(right[:kept].sum())
            names = ["run", "eps", "kept", "fgsm_correct", "confidence_correct"]
            expected.append(dict(zip(names, [name, eps, *map(str, counted)], strict=True)))
            cells = ["none (0/0)", "none (0/0)"]
            if kept > 0:
                cells = [f"{100 * part / kept:.2f} ({part}/{kept})" for part in counted[1:]]
            expected_cells.append([name, eps, *cells])
    assert rows == expected
    assert shares == expected_cells


def test_compare_leaves_out_what_was_not_scored_on_test_images(compare, family, capsys):
    compared = compare_family(compare, family, capsys)
    assert compared.code == 0
    assert compared.out.endswith("\n\n- left out: val; it was not scored on the test images\n")


def test_compare_predicts_without_tf32_as_the_runs_do(compare, family, capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    compare_family(compare, family, capsys)
    assert not torch.backends.cudnn.allow_tf32


def test_compare_says_so_where_no_run_was_scored_on_test_images(compare, family, capsys):
    for name in ("scar", "other"):  # then the theta~ of the others is missing, too
        shutil.rmtree(family.root / name)
    assert compare.main([str(family.root)]) == 1
    printed = capsys.readouterr()
    assert printed.err == f"error: no run in {family.root} was scored on the test images\n"
    lines = printed.out.splitlines()
    assert lines[-1] == "- left out: val; it was not scored on the test images"
    assert lines[0].startswith("- left out: all; no run here pretrained its theta~")
    assert len(lines) == 6 and not (family.root / "confidence.csv").exists()


def test_models_that_agree_have_no_z(compare):
    right = torch.tensor([True, False, True])
    assert compare.gain(right, right) == "+0.00"


def refusal_of_compare(compare, family, *options):
    """The sentence with which compare.py ends; it leaves no file."""
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(family.root), *options])
    assert not (family.root / "confidence.csv").exists()
    return stopped.value.code


def make_right(family, count):
    """Makes `count` images right that the model of the run `scar` has wrong; returns its file."""
    path = family.root / "scar" / "model.pt"
    logits = family.logits["scar", "model.pt"]
    wrong = (logits.argmax(dim=1) != family.y).nonzero()[:count, 0]
    logits[wrong, family.y[wrong]] += 100
    torch.save({"10-1": logits}, path)
    return path


def test_compare_takes_two_images_for_rounding(compare, family):
    make_right(family, 2)
    assert compare.main([str(family.root)]) == 0


def test_compare_refuses_an_accuracy_that_is_not_the_runs(compare, family):
    path = make_right(family, 3)
    right = int((family.logits["scar", "model.pt"].argmax(dim=1) == family.y).sum())
    assert refusal_of_compare(compare, family) == (
        f"error: {path} classifies {right} test images correctly, in its run {right - 3}: the "
        "weights or the images in mine are not those of the run"
    )


def test_compare_refuses_other_images(compare, family):
    sentence = refusal_of_compare(compare, family, "--data-dir", "shuffled")
    assert sentence.endswith("the images in shuffled are not those of the run")


def test_compare_refuses_another_number_of_images(compare, family):
    sentence = "error: scar had 200 test images; fewer has 90"
    assert refusal_of_compare(compare, family, "--data-dir", "fewer") == sentence


def test_compare_reads_images_that_were_moved(compare, family, capsys):
    here = compare_family(compare, family, capsys)
    moved = compare_family(compare, family, capsys, "--data-dir", "moved")
    assert "Reading the images of folder in moved" in moved.err
    assert moved.out == here.out


def test_compare_refuses_another_theta_of_the_same_accuracy(compare, family):
    path = family.root / "scar" / "pretrain.pt"
    torch.save({"10-1": family.logits["scar", "pretrain.pt"] + 1}, path)
    sentence = f"error: {path} is not the theta~ of its run"
    assert refusal_of_compare(compare, family) == sentence


def test_compare_refuses_weights_of_another_network(compare, family):
    path = family.root / "scar" / "pretrain.pt"
    torch.save({"10-1": torch.zeros(3, 10)}, path)
    sentence = f"error: {path} does not hold the weights of its run"
    assert refusal_of_compare(compare, family) == sentence


@pytest.mark.parametrize("name", ["scar/pretrain.pt", "control/model.pt"])
def test_compare_names_missing_weights_before_it_begins(compare, family, name, capsys):
    (family.root / name).unlink()
    sentence = f"error: {family.root}/{name} is missing; move its run elsewhere"
    assert refusal_of_compare(compare, family) == sentence
    assert capsys.readouterr().out == ""


def test_compare_names_missing_images(compare, family, monkeypatch):
    monkeypatch.setattr(compare, "load_images", load_images)
    assert refusal_of_compare(compare, family).startswith("error: mine")


def test_compare_names_a_damaged_result_and_compares_the_others(compare, family, capsys):
    (family.root / "all" / "result.json").write_text("{")
    compared = compare_family(compare, family, capsys)
    assert compared.code == 1
    assert compared.err.splitlines()[-1].startswith(
        f"error: {family.root}/all/result.json is damaged"
    )
    names = {"scar", "control", "control2", "longer", "other_lr", "other"}
    assert {row[0] for row in compared.gains} == names


def test_compare_without_runs_prints_no_empty_tables(compare, tmp_path, capsys):
    assert compare.main([str(tmp_path)]) == 1
    printed = capsys.readouterr()
    sentence = f"error: {tmp_path} has no finished run whose pretraining is there, too\n"
    assert (printed.out, printed.err) == ("", sentence)
    assert not any(tmp_path.iterdir())


def test_compare_runs_as_a_command(tmp_path):
    """On a run as it stands, whose weights and images it reads again, and whatever its name."""
    small = ["--data", "synthetic", *SIZE, *ON_CPU, "--num-labeled", "5000", "--select", "none"]
    out = os.fsdecode(os.fsencode(tmp_path) + b"/run \xff")
    with redirect_stdout(io.StringIO()):
        result = mixmatch_scar.main([*small, "--lr", "0.01", "--out", out])
    command = [sys.executable, HERE / "results" / "compare.py", tmp_path]
    done = subprocess.run(command, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b"Reading the images of synthetic in data\n"
    points = result["final_accuracy"] - result["pretrain_accuracy"]
    assert rf"| run \udcff | {points:+.2f} ".encode() in done.stdout
    assert b"\nrun \xff,1," in (tmp_path / "confidence.csv").read_bytes()


# --------------------------------------------------------------------------------------- the figure


def drawn(axes):
    """The curves that a plot on these axes shows: line style, color, x, y."""
    curves = []
    for call in axes.plot.call_args_list:
        if "label" not in call.kwargs:  # the others are for the legend
            x, y, style = call.args
            curves.append((style, call.kwargs["color"], list(x), list(y)))
    return curves


def test_figure_shows_the_numbers_of_the_study(monkeypatch):
    """Without matplotlib, whose functions are replaced."""
    pyplot, left, right = MagicMock(), MagicMock(), MagicMock()
    figure = MagicMock()
    pyplot.subplots.return_value = figure, (left, right)
    monkeypatch.setitem(sys.modules, "matplotlib", MagicMock(pyplot=pyplot))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    plot = module_of_results("plot")
    study = HERE / "results" / "h100"
    plot.main(study, "figure.svg")
    accuracy, share = [], []
    for method, color in {"fixmatch": "C2", "mixmatch": "C1", "vat": "C0"}.items():
        for kind, style in {"fgsm": "-", "none": "--"}.items():
            folder = study / f"{method}__cifar10-jpeg__{kind}__seed0"
            result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            rows = read_rows(folder / "metrics.csv")
            before = [float(row["accuracy"]) for row in rows if row["phase"] == "pretrain"]
            after = [float(row["accuracy"]) for row in rows if row["phase"] == "finetune"]
            after = [result["pretrain_accuracy"], *after]
            accuracy.append(("-", color, list(range(1, len(before) + 1)), before))
            accuracy.append((style, color, list(range(9, 19)), after))
        own = [row for row in read_rows(study / "confidence.csv") if row["run"].startswith(method)]
        for column, style in {"fgsm_correct": "-", "confidence_correct": "--"}.items():
            percents = [100 * int(row[column]) / int(row["kept"]) for row in own]
            share.append((style, color, [1, 2, 3, 4, 6], percents))
    assert drawn(left) == accuracy
    assert drawn(right) == share
    figure.savefig.assert_called_once_with("figure.svg", metadata={"Date": None})


# --------------------------------------------------------------------------- the README, run_all.sh


def options_of(script, capsys):
    """The options that --help names."""
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    return set(re.findall(r"--[a-z][a-z0-9-]+", capsys.readouterr().out))


@each_script
def test_help_shows_the_default_of_each_option(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    text = capsys.readouterr().out
    assert "None" not in text
    entries = {}
    for entry in re.split(r"\n  (?=-)", text):
        entries[entry.split()[0].strip(",")] = " ".join(entry.split())
    defaults = {**DEFAULTS, **OWN_DEFAULTS[script.METHOD], "device": "auto", "precision": "auto"}
    for name in ["pretrained", "tensorboard"] + ["mu"] * (script is not fixmatch_scar):
        del defaults[name]
    for name, default in defaults.items():
        shown = re.search(r"\(default: ([^)]+)\)", entries["--" + name.replace("_", "-")])[1]
        if type(default) in (int, float):
            assert float(shown) == default, name
        elif name == "table2_eps":
            assert [float(eps) for eps in shown.split()] == default
        elif name in ("data", "data_dir", "select", "device", "precision"):
            assert shown == default, name


@each_script
def test_a_scripts_header_for_uv_has_the_requirements(script):
    text = Path(script.__file__).read_text(encoding="utf-8")
    header = re.match(
        r'# /// script\n# requires-python = ">=(.*)"\n# dependencies = (.*)\n# ///\n', text
    )
    lines = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert json.loads(header[2]) == [line for line in lines if not line.startswith("#")]
    assert f"Python {header[1]} or later" in (HERE / "README.md").read_text(encoding="utf-8")


def test_readme_names_options_that_exist(capsys):
    known = {"--nproc-per-node", "--array", "--gpus", "--time", "--wrap"}.union(
        *[options_of(script, capsys) for script in SCRIPTS]
    )
    assert (
        set(re.findall(r"--[a-z][a-z0-9-]+", (HERE / "README.md").read_text(encoding="utf-8")))
        <= known
    )


def test_readmes_commands_are_taken():
    scripts = {f"{script.METHOD}_scar.py": script for script in SCRIPTS}
    text = (HERE / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^python (\w+_scar\.py .*)$", text, re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        script, *argv = shlex.split(command)
        scripts[script].parse_args(argv)


def readmes_code(word):
    """The one block of Python in the README that has the word in it."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if word in block
    ]
    return code


def test_readmes_code_to_copy_runs():
    names = {}
    exec(readmes_code("x_adv"), names)
    same(names["inverted"], 255 - names["x_u"])  # what the name says
    assert names["stats"]["kept"] == names["keep"].sum() and names["most_confident"].sum() == 4


def test_readmes_drawn_images_are_a_folder_to_train_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(readmes_code("mine/train"), {})
    x, y, x_test, _ = load_images("folder", "mine")
    assert len(x_test) == 200 and (y >= 0).sum() == 200 and len(x) == 1300


def test_readmes_code_for_a_model_classifies(images, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs" / "fixmatch__cifar10__fgsm-eps1__seed0"
    folder.mkdir(parents=True)
    model = WideResNet(10, 10, 1).eval()
    torch.save(model.state_dict(), folder / "model.pt")
    settings = {"classes": SHAPES, "depth": 10, "width": 1, "image_size": 24}
    (folder / "args.json").write_text(json.dumps(settings))
    picture = Image.fromarray(images[0][0].permute(1, 2, 0).numpy())
    picture.save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(readmes_code("model.pt"), names)
    pixels = torch.from_numpy(np.array(picture.resize((24, 24)))).permute(2, 0, 1)[None]
    same(names["x"], to_float(pixels), check_stride=False)
    assert capsys.readouterr().out == f"{SHAPES[model(to_float(pixels)).argmax()]}\n"


@each_script
def test_a_scripts_own_commands_are_taken(script):
    """Those at its head."""
    text = script.__doc__.replace("\\\n", " ")
    commands = re.findall(rf"^ +python {script.METHOD}_scar\.py (.*)$", text, re.MULTILINE)
    assert len(commands) == 2
    scar, control = [script.parse_args(shlex.split(command)) for command in commands]
    assert (scar.epochs, scar.select, scar.pretrained) == (200, "fgsm", None)
    assert (control.epochs, control.select) == (200, "none")
    assert control.pretrained == f"{scar.out}/pretrain.pt"


RUN_ALLS_VARIABLES = (
    "SEEDS EPOCHS DATA DATA_DIR OUT GPUS METHODS CONTROLS PYTHON CONTROL_FOLLOWS"
).split()


def environment_for_run_all(**variables):
    """This process's, with no other of run_all.sh's variables than these."""
    others = {name: v for name, v in os.environ.items() if name not in RUN_ALLS_VARIABLES}
    return {**others, "PYTHON": sys.executable, "LC_ALL": "C.UTF-8", **variables}


def run_all(*options, **variables):
    command = ["bash", str(HERE / "run_all.sh"), *map(str, options)]
    return subprocess.run(
        command,
        env=environment_for_run_all(**variables),
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )


@pytest.mark.parametrize(
    "variable, value",
    [("EPOCHS", "0"), ("SEEDS", "*"), ("SEEDS", ""), ("METHODS", "x"), ("CONTROLS", "x")],
)
def test_run_all_refuses_variables(variable, value, tmp_path):
    done = run_all(OUT=str(tmp_path / "out"), **{variable: value})
    assert done.returncode == 2 and re.fullmatch("error: .*\n", done.stderr)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option",
    ["--seed=3", "--epochs", "--data", "--data-dir=x", "--out", "--select", "--pretrained"],
)
def test_run_all_refuses_options_that_it_sets_itself(option, tmp_path):
    done = run_all(option, OUT=str(tmp_path / "out"))
    assert done.returncode == 2 and "is set by DATA, " in done.stderr
    assert not any(tmp_path.iterdir())


def test_run_all_makes_the_tables(three_seeds, tables, capsys):
    done = run_all(OUT=str(three_seeds), METHODS="")
    assert done.returncode == 0, done.stderr
    tables.main([str(three_seeds)])
    assert done.stdout == "\n" + capsys.readouterr().out


def test_run_all_fails_where_the_tables_lack_a_damaged_file(three_seeds):
    (three_seeds / "scar2" / "result.json").write_text("")
    done = run_all(OUT=str(three_seeds), METHODS="")
    assert done.returncode == 1 and "is damaged" in done.stderr


def fake_python(tmp_path, body=""):
    """Notes the command lines of the scripts; makes no tables."""
    lines = [
        "#!/usr/bin/env bash",
        "case $1 in *tables.py) exit 0 ;; esac",
        f'echo "$@ ${{CUDA_VISIBLE_DEVICES:-all}}" >> "{tmp_path}/log"',
        body,
    ]
    fake = tmp_path / "python"
    fake.write_text("\n".join(lines) + "\n")
    fake.chmod(0o755)
    return {"PYTHON": str(fake), "OUT": str(tmp_path / "out")}


def commands_of(tmp_path, *options, body="", **variables):
    """The commands that run_all.sh gives, each as the script's name and what it parses."""
    done = run_all(*options, **fake_python(tmp_path, body), **variables)
    commands = []
    assert (tmp_path / "log").exists(), done.stderr
    for line in (tmp_path / "log").read_text().splitlines():
        script, *words, gpu = line.split()
        method = Path(script).stem.removesuffix("_scar")
        args = SCRIPTS[NAMES.index(method)].parse_args(words)
        commands.append(SimpleNamespace(method=method, gpu=gpu, **vars(args)))
    return done, commands


def test_run_all_runs_each_method_and_its_control_for_each_seed(tmp_path):
    done, commands = commands_of(tmp_path)
    assert done.returncode == 0
    assert [(c.seed, c.method, c.select) for c in commands] == [
        (seed, method, select)
        for seed in (0, 1, 2)
        for method in ("vat", "mixmatch", "fixmatch")
        for select in ("fgsm", "none")
    ]


def test_run_all_takes_the_papers_eps(tmp_path):
    _, commands = commands_of(tmp_path, SEEDS="0")
    assert [c.eps for c in commands] == [6, 6, 1, 1, 1, 1]


@pytest.mark.parametrize("words", [["--eps", 2], ["--eps=2"]], ids=str)
def test_run_all_takes_eps_from_its_options(words, tmp_path):
    _, commands = commands_of(tmp_path, *words, SEEDS="0")
    assert [c.eps for c in commands] == 6 * [2]


def test_run_alls_control_eps0_is_at_0_whatever_the_options_say(tmp_path):
    _, commands = commands_of(tmp_path, "--eps", 2, SEEDS="0", METHODS="vat", CONTROLS="eps0")
    assert [c.eps for c in commands] == [2, 0]


def test_run_all_runs_the_papers_epochs_on_cifar_10(tmp_path):
    _, commands = commands_of(tmp_path, SEEDS="0")
    for c in commands:
        assert (c.epochs, c.data, c.data_dir) == (200, "cifar10", "data")


def test_run_all_hands_variables_and_options_on(tmp_path):
    variables = {"EPOCHS": "7", "DATA": "svhn", "DATA_DIR": "some/data", "SEEDS": "3"}
    _, commands = commands_of(tmp_path, "--width", 1, **variables)
    assert len(commands) == 6
    for c in commands:
        assert (c.epochs, c.data, c.data_dir, c.seed, c.width) == (7, "svhn", "some/data", 3, 1)


def test_run_all_names_folders_as_the_scripts_do(tmp_path):
    _, commands = commands_of(tmp_path, SEEDS="3", METHODS="vat", DATA="svhn")
    assert [Path(c.out).name for c in commands] == [
        "vat__svhn__fgsm-eps6__seed3",
        "vat__svhn__none-eps6__seed3",
    ]
    assert {Path(c.out).parent for c in commands} == {tmp_path / "out"}


def test_run_all_names_folders_of_own_images_as_the_scripts_do(tmp_path):
    variables = {"DATA": "folder", "DATA_DIR": "some/cats/"}
    _, commands = commands_of(tmp_path, SEEDS="3", METHODS="vat", **variables)
    assert Path(commands[0].out).name == "vat__cats__fgsm-eps6__seed3"


def test_run_alls_controls_start_from_scars_pretraining(tmp_path):
    controls = "none confidence eps0"
    _, commands = commands_of(tmp_path, SEEDS="3", METHODS="mixmatch", CONTROLS=controls)
    kinds = [("fgsm", 1), ("none", 1), ("confidence", 1), ("fgsm", 0)]
    assert [(c.select, c.eps) for c in commands] == kinds
    assert commands[0].pretrained is None
    for c in commands[1:]:
        assert c.pretrained == f"{commands[0].out}/pretrain.pt"


@pytest.mark.parametrize("controls, told", [("eps0 none", "1"), ("eps0", "")])
def test_run_all_tells_the_scripts_where_the_control_runs_anyway(controls, told, tmp_path):
    body = f'echo "$CONTROL_FOLLOWS" >> "{tmp_path}/told"'
    commands_of(tmp_path, body=body, SEEDS="0", METHODS="vat", CONTROLS=controls)
    assert set((tmp_path / "told").read_text().splitlines()) == {told}


def test_run_all_goes_on_after_a_failure(tmp_path):
    """Without the control of what failed."""
    body = "case $1 in *vat*) exit 1 ;; esac"
    done, commands = commands_of(tmp_path, body=body, SEEDS="3")
    assert done.returncode == 1 and "failed: vat, seed 3" in done.stderr
    assert [c.method for c in commands] == ["vat", *2 * ["mixmatch"], *2 * ["fixmatch"]]


def test_run_all_fails_where_a_control_fails(tmp_path):
    body = "case $* in *mixmatch*none*) exit 1 ;; esac"
    done, commands = commands_of(tmp_path, body=body, SEEDS="3")
    assert done.returncode == 1 and "failed: mixmatch, seed 3" in done.stderr
    assert len(commands) == 6


def test_run_all_fails_where_a_run_on_a_gpu_fails(tmp_path):
    body = "case $1 in *vat*) exit 1 ;; esac"
    done, _ = commands_of(tmp_path, body=body, SEEDS="3", GPUS="4 7")
    assert done.returncode == 1 and "failed" in done.stderr


def test_run_all_spreads_over_gpus(tmp_path):
    """A control is on the GPU of its pretraining, after it; options reach all."""
    done, commands = commands_of(tmp_path, "--width", 1, SEEDS="0", GPUS="4 7")
    assert done.returncode == 0
    on = {"4": [], "7": []}
    for c in commands:
        on[c.gpu].append((c.method, c.select))
        assert c.width == 1
    assert on["7"] == [("mixmatch", "fgsm"), ("mixmatch", "none")]
    assert on["4"] == [
        (method, select) for method in ("vat", "fixmatch") for select in ("fgsm", "none")
    ]


def test_run_all_runs_one_at_a_time_on_each_gpu(tmp_path):
    """What starts on it ends before the next one starts."""
    log = f'"{tmp_path}/on-$CUDA_VISIBLE_DEVICES"'
    body = f"echo start >> {log}; sleep 0.2; echo end >> {log}"
    commands_of(tmp_path, body=body, SEEDS="0 1", GPUS="4 7")
    for gpu in (4, 7):
        assert (tmp_path / f"on-{gpu}").read_text() == 6 * "start\nend\n"


def test_run_all_without_gpus_leaves_them_to_the_scripts(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    body = f'echo "${{CUDA_VISIBLE_DEVICES-unset}}" >> "{tmp_path}/gpus"'
    commands_of(tmp_path, body=body, SEEDS="0", METHODS="vat")
    assert (tmp_path / "gpus").read_text() == "unset\nunset\n"


def test_run_all_with_one_gpu_runs_all_on_it(tmp_path):
    _, commands = commands_of(tmp_path, SEEDS="0", METHODS="vat", GPUS="3")
    assert [c.gpu for c in commands] == ["3", "3"]


def test_run_all_stopped_ends_its_runs(tmp_path):
    pid = tmp_path / "pid"
    variables = fake_python(tmp_path, f'echo $$ > "{pid}"; exec sleep 600')
    command = ["bash", str(HERE / "run_all.sh")]
    environment = environment_for_run_all(**variables)
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not pid.exists() or not pid.read_text().strip():
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.05)
    child.terminate()
    _, stderr = child.communicate(timeout=600)
    assert "rerun the command to resume" in stderr and child.returncode == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
