"""The tests need no network and no GPU; those for CUDA are skipped where there is none.

There are two kinds. Public functions are compared with a plain computation of the same thing. Runs
are compared with `plain_run`, a second program that does what a run should do, without speed,
resuming, files or processes; the files of a run must equal what it says. The rest interrupts runs,
spreads them over processes, gives them what they must refuse, and adds up tables.
"""

import contextlib
import copy
import csv
import importlib.util
import inspect
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
import weakref
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import common
import fixmatch_scar
import mixmatch_scar
import vat_scar
from common import SHAPES, WideResNet, fgsm, load_images, load_split, split_labeled
from fixmatch_scar import RANDAUGMENT_OPS, fixmatch_loss, randaugment_op, strong_augment, to_float
from mixmatch_scar import mixmatch_loss
from vat_scar import vat_direction, vat_loss

SCRIPTS = [vat_scar, mixmatch_scar, fixmatch_scar]
NAMES = [script.METHOD for script in SCRIPTS]
HERE = Path(__file__).parent
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
close = torch.testing.assert_close
same = partial(torch.testing.assert_close, rtol=0, atol=0)
nearly_same = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)


@pytest.fixture(autouse=True)
def cudnn_as_the_scripts_set_it(monkeypatch):
    """And as it was, after each test."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)


@pytest.fixture(scope="session")
def images():
    """The synthetic set: (x_train, y_train, x_test, y_test)."""
    return load_images("synthetic", None)


def name_of(value):
    """A parameter in a test's name."""
    return getattr(value, "METHOD", str(value))


def module_at(path):
    """The file as a module of its own."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def image_bytes(batch):
    """Each image as something that a set can hold."""
    return [image.numpy().tobytes() for image in batch]


def test_what_the_scripts_share_is_the_same_text():
    """So what holds for a shared function in one script holds in all three."""
    own = {"parse_args", "make_optimizer", "schedule", "batch_loss"}
    texts = {"from main to the end": set(), "processes": set()}
    for script in SCRIPTS:
        text = Path(script.__file__).read_text(encoding="utf-8")
        texts["from main to the end"].add(text.partition("\ndef main(")[2])
        texts["processes"].add(str(re.findall("^(?:WORLD_SIZE|RANK) = .*", text, re.MULTILINE)))
        for name, function in inspect.getmembers(script, inspect.isfunction):
            if function.__module__ == script.__name__ and name not in own:
                texts.setdefault(name, set()).add(inspect.getsource(function))
    assert [name for name, versions in texts.items() if len(versions) > 1] == []


# -------------------------------------------------------------------------------------- the network


def test_wide_resnet_is_28_2_and_has_its_number_of_parameters():
    assert sum(p.numel() for p in WideResNet().parameters()) == 1_467_610


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


# ---------------------------------------------------------------------- synthetic images, the split


@pytest.mark.parametrize("part, count", [(0, 600), (2, 100)], ids=["train", "test"])
def test_synthetic_images_are_balanced_and_those_to_test_on_are_others(images, part, count):
    x, y = images[part : part + 2]
    assert x.shape == (10 * count, 3, 32, 32) and x.dtype == torch.uint8
    assert y.dtype == torch.int64 and torch.bincount(y).tolist() == [count] * 10
    assert not set(image_bytes(x)) & set(image_bytes(images[2 - part]))


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
    here = {
        name: (mean[row : row + 2, column : column + 2].mean() - ground).item()
        for name, mean in zip(SHAPES, brightness)
    }
    assert {name for name in SHAPES if here[name] < 0.3 * here["disk"]} == dark


@pytest.mark.parametrize("size", [20, 48])
def test_synthetic_images_are_the_same_every_time_and_resized_as_pillow_does(images, size):
    resized = load_images("synthetic", "nowhere", size)
    same(resized[1::2], images[1::2])  # the labels
    for part in (0, 2):  # to train with and to test on
        assert resized[part].shape == (len(images[part]), 3, size, size)
        for image, ours in zip(images[part][:20], resized[part]):
            pillows = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size))
            difference = ours.permute(1, 2, 0).numpy() - np.asarray(pillows, int)
            assert np.abs(difference).max() <= 2


def test_split_takes_equal_numbers_of_each_class_by_seed_and_every_image_once(images):
    """43 labels for ten classes: 4 each, and one more for three that are drawn."""
    y, counts, seen = images[1], set(), []
    for seed in (0, 0, 1, 2, 3):
        labeled, unlabeled = split_labeled(y, 43, seed)
        assert labeled.dtype == unlabeled.dtype == torch.int64
        assert labeled.tolist() == sorted(labeled.tolist())
        assert unlabeled.tolist() == sorted(set(range(6000)) - set(labeled.tolist()))
        counts.add(str(torch.bincount(y[labeled], minlength=10).tolist()))
        assert sorted(torch.bincount(y[labeled], minlength=10).tolist()) == 7 * [4] + 3 * [5]
        seen.append(set(labeled.tolist()))
    assert seen[0] == seen[1] and len(seen[0] & seen[2]) < 10 and len(counts) > 1


def test_split_leaves_images_without_a_label_unlabeled():
    """All 12 labels may be taken then, however uneven the classes are."""
    y = torch.tensor([0] * 7 + [1] * 5 + [-1] * 4)
    labeled, unlabeled = split_labeled(y, 12, 0)
    assert labeled.tolist() == list(range(12)) and unlabeled.tolist() == [12, 13, 14, 15]


@pytest.mark.parametrize(
    "y, count, sentence",
    [
        ([0] * 10 + [1] * 10 + [2] * 2, 2, "2 is too few: there are 3 classes"),
        ([0] * 10 + [1] * 10 + [2] * 2, 12, "12 takes 4 of class red, which has 2"),
        ([0] * 10 + [1] * 10 + [2] * 2, 22, "22 leaves no unlabeled image: 21 at most"),
        ([0] * 10 + [1] * 10 + [2] * 2, 23, "23 is too many: 22 labels are available"),
        # labels alone would not tell that there is a third class
        ([0] * 2 + [1] * 2 + [-1] * 2, 3, "3 takes 1 of class red, which has 0"),
        ([0] * 2 + [1] * 2 + [-1] * 2, 4, "4 takes 1 of class red, which has 0"),
    ],
)
def test_split_refuses(y, count, sentence):
    with pytest.raises(ValueError, match=f"^--val {sentence}"):
        split_labeled(torch.tensor(y), count, 0, ["blue", "green", "red"], "--val")


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


def test_fgsm_matches_its_formula(attacked):
    """x + eps * sign(gradient of cross-entropy), clipped to [0, 1], image by image."""
    model, expected = attacked.before.eval(), []
    for image, label in zip(attacked.x.split(1), attacked.y.split(1)):
        image = image.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(image), label), image)
        expected.append((image + 0.02 * gradient.sign()).clamp(0, 1).detach())
    # a gradient component can be so near zero that its sign is a matter of rounding
    assert (attacked.result != torch.cat(expected)).float().mean() < 1e-3


def test_fgsm_leaves_the_model_as_it_was(attacked):
    """Its modes, its statistics, and no gradient."""
    modes = [[m.training for m in model.modules()] for model in (attacked.model, attacked.before)]
    assert modes[0] == modes[1]
    same(attacked.model.state_dict(), attacked.before.state_dict())
    assert not attacked.result.requires_grad and not attacked.x.requires_grad
    assert all(p.grad is None for p in attacked.model.parameters())


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
    """To the bit where this was written; another processor may round floats differently."""
    name, low, high, operation = PILLOW[index]
    x, _, level, ours = (part[index::14] for part in one_batch)
    difference = []
    for image, value, our in zip(x, (low + (high - low) * level.double()).tolist(), ours):
        pillows = operation(Image.fromarray(image.permute(1, 2, 0).numpy()), value)
        difference.append(abs(our.permute(1, 2, 0).numpy() - np.asarray(pillows, int)).max(2))
    geometric = name.startswith(("Rotate", "Shear", "Translate"))
    assert geometric or np.max(difference) <= 1
    assert np.mean(np.stack(difference) > 0) <= (1e-3 if geometric else 1e-4)
    assert torch.equal(ours, x) == (name == "Identity")


@pytest.mark.parametrize("h, w", [(32, 32), (48, 40)])
@pytest.mark.parametrize("options", [{}, {"flip": False}], ids=["flip", "no flip"])
def test_weak_augment_draws_from_all_flips_and_translations(h, w, options):
    """Each of 4,000 views of an image is one of its crops, reflected at the borders, or a crop's
    mirror image; all of them occur, half of them mirrored."""
    image, pads = torch.arange(3 * h * w).view(3, h, w) % 251, [w // 8, w // 8, h // 8, h // 8]
    crops = F.pad(image.float(), pads, mode="reflect").byte().unfold(1, h, 1).unfold(2, w, 1)
    crops = crops.permute(1, 2, 0, 3, 4).flatten(0, 1)
    torch.manual_seed(0)
    x = image.byte().expand(4000, 3, h, w)
    views = image_bytes(fixmatch_scar.weak_augment(x, **options))
    upright, mirrored = set(image_bytes(crops)), set()
    if not options:
        mirrored = set(image_bytes(crops.flip(3)))
    assert set(views) == upright | mirrored
    share = np.mean([view in mirrored for view in views])
    assert share == pytest.approx(0.0 if options else 0.5, abs=0.05)


@pytest.mark.parametrize("h, w, options", [(32, 32, {}), (50, 38, {"flip": False})])
def test_strong_augment_is_a_weak_view_two_operations_and_a_gray_square(images, h, w, options):
    """With the same draws; the square, half the side long, is pasted image by image."""
    x = F.interpolate(images[0][:200], (h, w))
    torch.manual_seed(0)
    ours = strong_augment(x, **options)
    torch.manual_seed(0)
    expected = fixmatch_scar.weak_augment(x, **options)
    for _ in range(2):
        op, level = torch.randint(14, (200,)), torch.rand(200)
        expected = randaugment_op(expected, op, level)
    centers = torch.randint(h, (200,)).tolist(), torch.randint(w, (200,)).tolist()
    for image, row, column in zip(expected, *centers):
        rows = slice(max(0, row - h // 4), row + h // 4)
        image[:, rows, max(0, column - w // 4) : column + w // 4] = 127
    same(ours, expected)


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
    assert to_float(result) is result  # floats stay as they are


# --------------------------------------------------------------------------------- the three losses

Y = torch.tensor([3, 1, 4, 1])  # labels


def plain_net(scale):
    """Seven classes, without batch norm, so that images stay apart; the larger scale, the more
    confident. It seeds torch's generator, for what the test draws next, too."""
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


@pytest.mark.parametrize("alpha", [0.3, 0.0])
def test_mixmatch_draws_a_share_and_a_partner_for_each_image_of_all_views(alpha):
    """With alpha 0 it mixes nothing."""
    model = plain_net(8)
    x_l, x_u, x_v = torch.rand(3, 4, 3, 32, 32, dtype=torch.double)
    loss = partial(mixmatch_loss, model, x_l, Y, x_u, x_v, 0.4, alpha, 0.6)
    torch.manual_seed(0)
    drawn = loss()
    torch.manual_seed(0)
    mix = mixmatch_scar.draw_mix(12, alpha, x_l.device) if alpha > 0 else torch.ones(12)
    perm = torch.rand(12).argsort()
    close(drawn, loss(mix=mix, perm=perm))
    assert (abs(drawn[0] - loss(mix=mix, perm=perm.flip(0))[0]) > 1e-3) == (alpha > 0)


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
    assert (direction - start)[1:].flatten(1).norm(dim=1).min() > 0.1


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


def losses_of(script, model):
    """The method's loss of three batches of 4 x 4 images, of which each is brighter than the one
    before; and what batch norm should see of them: (images, with gradient, moves statistics)."""
    torch.manual_seed(1)
    a, b, c = torch.rand(3, 4, 3, 4, 4) * torch.tensor([1, 2, 3]).view(3, 1, 1, 1, 1)
    if script is vat_scar:
        result = vat_loss(model, a, Y, b, 1.0, 3.0, 0, 0.6, 0.2, d0=c)
        perturbed = b + 3 * F.normalize(c, dim=(1, 2, 3))
        return result, [(a, True, True), (b, True, False), (perturbed, True, False)]
    if script is mixmatch_scar:
        result = mixmatch_loss(model, a, Y, b, c, 0.5, 0.0, 0.6)
        return result, [(torch.cat([b, c]), False, False), (torch.cat([a, b, c]), True, True)]
    result = fixmatch_loss(model, a, Y, b, c, 0.1, 0.6)
    return result, [(torch.cat([a, c]), True, True), (b, False, True)]


@each_script
def test_batch_norm_sees_the_images_that_the_design_says(script):
    """VAT's three batches apart; MixMatch's both views, then all; FixMatch's labeled with strong
    views, then weak ones. Only some of these forwards move the running statistics."""
    model, bn = Noting(), nn.BatchNorm2d(3)
    _, expected = losses_of(script, model)
    same(model.forwards, [(x, True, gradient) for x, gradient, _ in expected])
    for x, _, moves in expected:
        if moves:
            bn(x)
    for name, statistic in bn.named_buffers():
        close(model.bn.get_buffer(name), statistic)


@each_script
def test_losses_of_bf16_logits_are_computed_in_float32(script):
    """As if the model had given the same numbers as float32."""
    losses = []
    for dtype in (torch.bfloat16, torch.float32):
        model = Noting()
        model.forward = lambda x: model.linear(x.flatten(1)).bfloat16().to(dtype)
        (loss, metrics), _ = losses_of(script, model)
        losses.append({"loss": loss, **metrics})
    assert {value.dtype for value in losses[0].values()} == {torch.float32}
    close(*losses)


# --------------------------------------------------------------------------------- SCAR's selection


class Brightness(nn.Module):
    """Two classes: whether an image's mean is above one half; in training mode it is useless.

    Notes how many images it gets at once.
    """

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3, affine=False)
        self.at_once = []

    def forward(self, x):
        self.at_once.append(len(x))
        mean = self.bn(x).mean(dim=(1, 2, 3)) - 0.5
        return torch.stack([-mean, mean], dim=1)


@pytest.fixture
def gray_images():
    """510 uint8 images, more than go through the model at once: 85 times six levels of gray."""
    values = torch.tensor([0, 120, 126, 127, 129, 255], dtype=torch.uint8)
    return values.repeat(85).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)


@pytest.mark.parametrize("scale", [None, 255], ids=["uint8", "float"])
def test_select_clean_keeps_what_withstands_the_attack(gray_images, scale):
    """Black is attacked to 3, which stays dark; 126 to 129, which does not. The model is left in
    eval mode, its statistics alone."""
    x = gray_images if scale is None else gray_images / scale
    model = Brightness().train()
    keep, pseudo = vat_scar.select_clean(model, x, 3 / 255)
    assert pseudo.tolist() == 85 * [0, 0, 0, 0, 1, 1]
    assert keep.tolist() == 85 * [True, True, False, False, False, True]
    assert not model.training and model.bn.num_batches_tracked == 0
    assert vat_scar.select_clean(model, x, 0.0)[0].all()


def test_select_clean_is_algorithm_1_with_ten_classes(images):
    """Each image alone: its label, the attack away from that, the label again."""
    torch.manual_seed(5)
    model, x = WideResNet(10, 10, 1).eval(), images[0][:60]
    keep, pseudo = vat_scar.select_clean(model, x, 1.5 / 255)
    same_label, withstands = [], []
    for image, label in zip((x.float() / 255).split(1), pseudo.split(1)):
        same_label.append(model(image).argmax(dim=1) == label)
        attacked = fgsm(model, image, label, 1.5 / 255)
        withstands.append(model(attacked).argmax(dim=1) == label)
    assert 15 < keep.sum() < 45
    # rounding may decide on an image
    assert torch.cat(same_label).sum() >= 59
    assert (keep == torch.cat(withstands)).sum() >= 59


@pytest.mark.parametrize("side, at_once", [(16, 256), (32, 64), (96, 7), (300, 1)])
def test_the_model_gets_as_many_pixels_at_once_as_64_or_128_small_images_have(side, at_once):
    """In select_clean and in predict: large images need no more memory there than in training."""
    x = torch.zeros(at_once + 1, 3, side, side, dtype=torch.uint8)
    model = Brightness()
    vat_scar.select_clean(model, x, 1 / 255)
    assert model.at_once == 3 * [at_once] + 3 * [1]  # the labels, the attack, the labels again
    model = Brightness()
    vat_scar.predict(model, torch.cat([x, x]))
    assert model.at_once[0] == max(1, 128 * 32 * 32 // side**2)


def test_select_confident_takes_the_most_confident():
    """In float32 the second and the third both have a confidence of 1."""
    logits = torch.tensor([[9.0, 0.0, 0.0], [18.0, 0.0, 0.0], [20.0, 0.0, 0.0], [0.0, 0.1, 0.0]])
    assert vat_scar.select_confident(logits, 1).tolist() == [False, False, True, False]
    assert vat_scar.select_confident(logits, 3).tolist() == [True, True, True, False]


def test_selection_stats_are_equations_5_and_6():
    """Table 2's VAT at eps 1: 7587 of 8227 right, 835 of 1773 wrong. 20 more have no label, and do
    not count, kept or not."""
    keep = torch.arange(10020) < 8227
    y = torch.zeros(10020, dtype=torch.int64)
    y[-20:] = -1
    pseudo = torch.zeros_like(y)
    pseudo[7587:8227] = 1
    pseudo[8227 : 8227 + 835] = 1
    for kept in (keep, keep | (y < 0)):
        stats = vat_scar.selection_stats(kept, pseudo, y)
        assert round(stats.pop("sensitivity"), 2) == 92.22
        assert round(stats.pop("specificity"), 2) == 47.10
        counts = {"kept": 8227, "kept_correct": 7587, "rejected": 1773, "rejected_wrong": 835}
        assert stats == counts


def test_evaluate_is_accuracy_in_percent(gray_images):
    """Black, 120 and white are called dark, dark, bright; one of three labels is right."""
    for x in (gray_images[[0, 1, 5]], gray_images[[0, 1, 5]] / 255):
        accuracy = vat_scar.evaluate(Brightness(), x, torch.tensor([1, 0, 0]))
        assert accuracy == pytest.approx(100 / 3)


# ----------------------------------------------------- optimizer, schedule, moving average, batches


@each_script
def test_make_optimizer_matches_its_formula(script):
    """200 steps with gradients that get smaller; weights decay, biases do not."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = script.make_optimizer(model, SimpleNamespace(lr=0.01, weight_decay=0.5))
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in plain.items()}
    for t in range(1, 201):
        for name, p in model.named_parameters():
            p.grad = gradient = torch.randn_like(p) / t
            decay = 0.5 if name == "weight" else 0.0
            m, v = state[name]
            if script is fixmatch_scar:  # SGD, Nesterov momentum, L2
                gradient = gradient + decay * plain[name]
                m = 0.9 * m + gradient
                plain[name] = plain[name] - 0.01 * (gradient + 0.9 * m)
            else:  # Adam, decoupled decay
                m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
                change = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
                plain[name] = plain[name] * (1 - 0.01 * decay) - 0.01 * change
            state[name] = m, v
        optimizer.step()
    close(dict(model.named_parameters()), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size, last", [(64, 16384), (16, 65536)])
def test_mixmatchs_lambda_u_rises_over_the_first_1048576_images(batch_size, last):
    """However long the run is. (The runs below are too short to see the end of it.)"""
    args = SimpleNamespace(lr=0.5, lambda_u=75, batch_size=batch_size)
    for step, ramp in ((0, 0), (last // 4, 0.25), (last, 1), (last + 1000, 1)):
        for total in (last // 2, 2 * last):
            assert mixmatch_scar.schedule(step, total, "pretrain", args) == (0.5, 75 * ramp)


def test_update_average_averages_weights_and_statistics_and_copies_counters():
    average, model = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    for i, tensor in enumerate(average.state_dict().values()):
        tensor.fill_(i)
    for i, tensor in enumerate(model.state_dict().values()):
        tensor.fill_(10 * i + 10)
    before = copy.deepcopy(model.state_dict())
    vat_scar.update_average(average, model, torch.tensor(0.8))
    for i, name in enumerate(["weight", "bias", "running_mean", "running_var"]):
        close(average.state_dict()[name], torch.full((2,), 0.8 * i + 0.2 * (10 * i + 10)))
    assert average.num_batches_tracked == 50
    same(model.state_dict(), before)


def draw(seed=0, count=14):
    """Batches of 5 from 7 images."""
    generator = torch.Generator().manual_seed(seed)
    return vat_scar.draw_batches(torch.arange(10, 17), count, 5, generator)


def test_draw_batches_takes_each_image_once_a_pass_and_shuffles_each_pass_anew():
    passes = draw().view(10, 7)
    same(passes.sort(dim=1).values, torch.arange(10, 17).expand(10, 7))
    assert len(set(map(str, passes.tolist()))) == 10
    assert draw(count=3).shape == (3, 5)  # it may end within a pass


def test_draw_batches_draws_from_its_generator():
    same(draw(seed=1), draw(seed=1))
    assert not torch.equal(draw(seed=1), draw(seed=2))


# ----------------------------------------------------------------------- options and their defaults

# fmt: off
DEFAULTS = {
    "data": "cifar10", "data_dir": "data", "image_size": 32, "flip": True, "num_labeled": None,
    "val": 0, "seed": 0, "depth": 28, "width": 2, "epochs": 200, "steps_per_epoch": 1024,
    "batch_size": 64, "ema_decay": 0.999, "select": "fgsm", "table2_eps": [1, 2, 3, 4, 6],
    "pretrained": None, "device": "cpu", "precision": "fp32", "compile": False,
    "tensorboard": False,
}
OWN_DEFAULTS = {
    "vat": {
        "mu": 1, "lr": 0.002, "weight_decay": 0.02, "lambda_u": 0.3, "eps": 6, "xi": 1,
        "vat_eps": 3, "power_iterations": 1, "entropy_weight": 0,
    },
    "mixmatch": {
        "mu": 1, "lr": 0.002, "weight_decay": 0.02, "lambda_u": 0.75, "eps": 1,
        "temperature": 0.5, "alpha": 0.75,
    },
    "fixmatch": {
        "mu": 7, "lr": 0.03, "weight_decay": 5e-4, "lambda_u": 1, "eps": 1, "threshold": 0.95,
    },
}
# fmt: on


def defaults_of(script):
    own = OWN_DEFAULTS[script.METHOD]
    return {**DEFAULTS, **own, "out": f"runs/{script.METHOD}__cifar10__fgsm-eps{own['eps']}__seed0"}


def words(settings):
    """The command line that asks for these settings."""
    result = []
    for name, value in settings.items():
        option = "--" + name.replace("_", "-")
        if value is True:
            result.append(option)
        elif value is False:
            result.append(option.replace("--", "--no-"))
        elif isinstance(value, list):
            result += [option, *map(str, value)]
        elif value is not None:
            result += [option, str(value)]
    return result


@each_script
def test_defaults_are_the_designs_whatever_the_data(script):
    """But for svhn's digits, which are not flipped unless that is asked for."""
    expected = defaults_of(script)
    assert vars(script.parse_args(["--device", "cpu"])) == expected
    expected["out"] = "mine"
    for data in ("cifar100", "svhn", "stl10", "folder", "synthetic"):
        argv = ["--device", "cpu", "--out", "mine", "--data", data]
        expected.update(data=data, flip=data != "svhn")
        assert vars(script.parse_args(argv)) == expected
        assert vars(script.parse_args([*argv, "--flip"])) == {**expected, "flip": True}


@pytest.mark.parametrize(
    "options, out",
    [
        ("--data svhn --eps 2.5 --seed 4", "runs/vat__svhn__fgsm-eps2.5__seed4"),
        ("--select none --eps 3", "runs/vat__cifar10__none-eps3__seed0"),
        ("--data folder --data-dir some/cats", "runs/vat__cats__fgsm-eps6__seed0"),
        ("--data folder --data-dir .", f"runs/vat__{Path.cwd().name}__fgsm-eps6__seed0"),
    ],
)
def test_the_run_folder_names_method_data_selection_and_seed(options, out):
    assert vat_scar.parse_args(options.split()).out == out


@pytest.mark.parametrize("bf16", [True, False])
@each_script
def test_auto_means_cuda_compiled_and_bf16_where_the_gpu_has_it(script, bf16, monkeypatch):
    """A GPU without bf16 emulates it, and gets fp32. What is asked for stays."""

    def is_bf16_supported(including_emulation=True):
        return bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    for options, expected in {
        "": ("cuda", "bf16" if bf16 else "fp32", True),
        "--no-compile --precision fp32 --device cuda": ("cuda", "fp32", False),
        "--device cpu": ("cpu", "fp32", False),
        "--device cpu --precision bf16 --compile": ("cpu", "bf16", True),
    }.items():
        args = script.parse_args(options.split())
        assert (args.device, args.precision, args.compile) == expected, options


# ------------------------------------------------------------------------ the second, plain program


def plain_rates(method, o, phase, t):
    """lr, lambda_u and the average's decay at step t of a phase."""
    total = o.epochs * o.steps_per_epoch
    lr, ramp = o.lr, 1.0
    if method == "fixmatch":
        lr = o.lr * math.cos(7 * math.pi * t / (16 * total))
    elif method == "mixmatch" and phase == "pretrain":
        ramp = min(1.0, t * o.batch_size / 2**20)
    elif method == "vat" and phase == "pretrain":
        ramp = min(1.0, t / (0.4 * total))
    return lr, ramp * o.lambda_u, min(o.ema_decay, (1 + t) / (10 + t))


def plain_loss(script, model, x_l, y_l, x_u, lambda_u, o):
    """The loss of uint8 images, and its metrics."""

    def weak(x):
        return to_float(script.weak_augment(x, flip=o.flip))

    device = x_l.device.type
    bf16 = partial(torch.autocast, device, torch.bfloat16, enabled=o.precision == "bf16")
    if script is vat_scar:
        x_l, x_u = weak(x_l), weak(x_u)
        search = o.xi, o.vat_eps, o.power_iterations
        with bf16():
            return vat_loss(model, x_l, y_l, x_u, *search, lambda_u, o.entropy_weight)
    if script is mixmatch_scar:
        x_l, x_u1, x_u2 = weak(x_l), weak(x_u), weak(x_u)
        with bf16(cache_enabled=False):
            return mixmatch_loss(model, x_l, y_l, x_u1, x_u2, o.temperature, o.alpha, lambda_u)
    x_weak, x_strong, x_l = weak(x_u), to_float(strong_augment(x_u, flip=o.flip)), weak(x_l)
    with bf16():
        return fixmatch_loss(model, x_l, y_l, x_weak, x_strong, o.threshold, lambda_u)


def plain_counts(keep, pseudo, y):
    """Table 2's numbers, image by image; those without a label do not count."""
    kept, rejected = [], []  # whether the label is right; whether it is wrong
    for is_kept, label, true_label in zip(keep.tolist(), pseudo.tolist(), y.tolist()):
        if true_label >= 0 and is_kept:
            kept.append(label == true_label)
        elif true_label >= 0:
            rejected.append(label != true_label)
    return {
        "kept": len(kept),
        "kept_correct": sum(kept),
        "rejected": len(rejected),
        "rejected_wrong": sum(rejected),
        "sensitivity": 100 * sum(kept) / len(kept) if kept else None,
        "specificity": 100 * sum(rejected) / len(rejected) if rejected else None,
    }


def plain_names(o, count, count_test):
    """The names of the training images, of those to test on, and of the classes."""
    if o.data != "folder":
        classes = list("0123456789") if o.data == "svhn" else SHAPES
        return list(map(str, range(count))), list(map(str, range(count_test))), classes
    root = Path(o.data_dir)
    classes = sorted(path.name for path in (root / "train").iterdir())
    files = sorted(root.glob("train/*/*")) + sorted(root.glob("unlabeled/**/*.png"))
    names = [file.relative_to(root).as_posix() for file in files]
    return names, [f.relative_to(root).as_posix() for f in sorted(root.glob("test/*/*"))], classes


def plain_run(script, settings, network=WideResNet, processes=1):
    """What a run with these settings should do, from its options to its last weights.

    It draws by the same seeds, and takes the script's augmentation, loss, optimizer, average,
    batches and selection, which are tested above; all else is its own. Several processes take
    turns in each step.
    """
    o = SimpleNamespace(**{**defaults_of(script), **settings})
    x, y, x_test, y_test = load_images(o.data, o.data_dir, o.image_size)
    names, names_test, classes = plain_names(o, len(x), len(x_test))
    if o.num_labeled is None:
        o.num_labeled = int((y >= 0).sum()) if o.data == "folder" else 4000
    labeled, unlabeled = split_labeled(y, o.num_labeled, o.seed)
    if o.val > 0:
        held_out, rest = split_labeled(y[unlabeled], o.val, o.seed)
        x_test, y_test = x[unlabeled[held_out]], y[unlabeled[held_out]]
        names_test = [names[n] for n in unlabeled[held_out]]
        unlabeled = unlabeled[rest]
    labels = torch.full_like(y, -1)
    labels[labeled] = y[labeled]
    torch.manual_seed(o.seed)
    model = network(len(classes), o.depth, o.width).to(memory_format=torch.channels_last)
    average = copy.deepcopy(model)
    rows = []

    def logits_of(images):
        with torch.no_grad():
            return average.eval()(to_float(images))

    def accuracy():
        return 100 * int((logits_of(x_test).argmax(dim=1) == y_test).sum()) / len(y_test)

    def train(phase):
        optimizer = script.make_optimizer(model, o)
        known, steps = (labels >= 0).nonzero()[:, 0], o.steps_per_epoch
        for epoch in range(1, o.epochs + 1):
            seeds = np.random.SeedSequence([o.seed, phase == "finetune", epoch]).generate_state(2)
            generator = torch.Generator().manual_seed(int(seeds[1]))
            batches_u = script.draw_batches(unlabeled, steps, o.mu * o.batch_size, generator)
            batches_l = script.draw_batches(known, steps, o.batch_size, generator)
            states = []  # of torch's generator, in each process
            for n in range(processes):
                torch.manual_seed(int(seeds[0]) + n)
                states.append(torch.get_rng_state())
            means = {}
            for i in range(steps):
                t = (epoch - 1) * steps + i
                lr, lambda_u, decay = plain_rates(script.METHOD, o, phase, t)
                model.train()
                for n in range(processes):
                    torch.set_rng_state(states[n])
                    index_l, index_u = batches_l[i, n::processes], batches_u[i, n::processes]
                    batch = x[index_l], labels[index_l], x[index_u]
                    loss, metrics = plain_loss(script, model, *batch, torch.tensor(lambda_u), o)
                    (loss / processes).backward()
                    states[n] = torch.get_rng_state()
                    for name, value in {"loss": loss, **metrics}.items():
                        means[name] = means.get(name, 0) + value.item() / processes / steps
                for group in optimizer.param_groups:
                    group["lr"] = torch.tensor(lr)
                optimizer.step()
                optimizer.zero_grad()
                script.update_average(average, model, torch.tensor(decay))
            row = {"phase": phase, "epoch": str(epoch), "lr": lr, **means, "accuracy": accuracy()}
            rows.append(row)

    if o.pretrained is None:
        train("pretrain")
    else:
        average.load_state_dict(torch.load(o.pretrained))
    theta, theta_accuracy = copy.deepcopy(average.state_dict()), accuracy()
    keep, pseudo = script.select_clean(average, x[unlabeled], o.eps / 255)
    logits = logits_of(x[unlabeled])
    if o.select == "none":
        keep = torch.zeros_like(keep)
    elif o.select == "confidence":
        keep = script.select_confident(logits, int(keep.sum()))
    table2, test_logits = [], logits_of(x_test)
    surest = test_logits.double().softmax(dim=1).amax(dim=1).argsort(descending=True)
    for eps in sorted({*o.table2_eps, o.eps}):
        withstands, label = script.select_clean(average, x_test, eps / 255)
        row = {"eps": eps, **plain_counts(withstands, label, y_test)}
        as_many = surest[: row["kept"]]
        row["confidence_correct"] = int((label[as_many] == y_test[as_many]).sum())
        table2.append(row)
    labels[unlabeled] = torch.where(keep, pseudo, -1)
    model.load_state_dict(theta)
    train("finetune")

    final = logits_of(x[unlabeled])
    selection = {
        "file": [names[n] for n in unlabeled],
        "label": [classes[label] for label in pseudo],
        "confidence": logits.softmax(dim=1).amax(dim=1).tolist(),
        "kept": [str(int(kept)) for kept in keep],
        "final_label": [classes[label] for label in final.argmax(dim=1)],
        "final_confidence": final.softmax(dim=1).amax(dim=1).tolist(),
    }
    test = {
        "file": names_test,
        "true_label": [classes[label] for label in y_test],
        "label": [classes[label] for label in test_logits.argmax(dim=1)],
        "final_label": [classes[label] for label in logits_of(x_test).argmax(dim=1)],
    }
    per_class = pseudo[keep].bincount(minlength=len(classes)).tolist()
    added = {"unlabeled": len(unlabeled), "added": int(keep.sum()), "kept_per_class": per_class}
    result = {
        "method": script.METHOD,
        "data": Path(o.data_dir).name if o.data == "folder" else o.data,
        "scored_on": "validation" if o.val > 0 else "test",
        "select": o.select,
        "eps": o.eps,
        "seed": o.seed,
        "ranks": processes,
        "pretrain_accuracy": theta_accuracy,
        "selection": {**added, **plain_counts(keep, pseudo, y[unlabeled])},
        "table2": table2,
        "final_accuracy": accuracy(),
        "args": vars(o),
    }
    weights = {"pretrain.pt": theta, "model.pt": average.state_dict()}
    if o.pretrained is not None:
        del weights["pretrain.pt"]  # it is where it was
    tables = {"selection.csv": selection, "test.csv": test}
    return SimpleNamespace(
        weights=weights, rows=rows, tables=tables, result=result, classes=classes
    )


# ------------------------------------------------------------------- runs against the plain program


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of noisy images of five colors: 120 to train with, 60 to test on, 30 unlabeled."""
    colors = {"blue": (0, 0, 1), "cyan": (0, 1, 1), "green": (0, 1, 0), "red": (1, 0, 0)}
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("images") / "pictures"
    for name, color in {**colors, "white": (1, 1, 1)}.items():
        for part, count in ((f"train/{name}", 24), (f"test/{name}", 12), ("unlabeled", 6)):
            (root / part).mkdir(parents=True, exist_ok=True)
            for n in range(count):
                pixels = 80 + 100 * np.array(color) + rng.normal(0, 15, 3)
                pixels = pixels + rng.normal(0, 20, (24, 24, 3)) + 2 * np.arange(24)[:, None]
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(root / part / f"{name} {n}.png")
    return root


# fmt: off
TINY = {
    "data": "folder", "num_labeled": 20, "image_size": 16, "depth": 10, "width": 1, "epochs": 2,
    "steps_per_epoch": 3, "batch_size": 4, "table2_eps": [1.0], "device": "cpu",
    "precision": "fp32", "compile": False,
}
OWN = {  # of each method, at values of their own; the step of FGSM is one that rejects some
    "vat": {"xi": 0.9, "vat_eps": 2.5, "power_iterations": 2, "entropy_weight": 0.1, "eps": 4.0},
    "mixmatch": {"temperature": 0.6, "alpha": 0.8, "eps": 7.0},
    "fixmatch": {"mu": 2, "threshold": 0.3, "eps": 3.0},
}
EVERY = {  # what the methods have in common; the width is another set's
    "num_labeled": 33, "val": 21, "seed": 3, "flip": False, "image_size": 18, "depth": 16,
    "epochs": 3, "steps_per_epoch": 2, "batch_size": 6, "lr": 0.004, "weight_decay": 0.3,
    "ema_decay": 0.15, "lambda_u": 0.6, "eps": 4.5, "table2_eps": [3.0, 0.5],
}
SETS = {  # decays of the average below its warm-up's, where theta~ shall have learned
    "defaults": {},
    "its own options": {},
    "every option": EVERY,
    "other lengths": {"epochs": 4, "steps_per_epoch": 1, "width": 2, "lambda_u": 2.0},
    "the control": {"select": "none", "seed": 1},
    "the most confident": {"select": "confidence", "seed": 5, "ema_decay": 0.3},
    "every pseudo-label": {"eps": 0.0, "seed": 6},
    "bf16": {"precision": "bf16", "ema_decay": 0.2},
    "all labels": {"num_labeled": None, "ema_decay": 0.2},
    "many passes": {"num_labeled": 5, "batch_size": 8, "epochs": 1, "steps_per_epoch": 7},
    "no average": {"ema_decay": 0.0, "batch_size": 5, "lr": 0.001},
    "its warm-up": {"ema_decay": 1.0, "lr": 0.01, "weight_decay": 0.0, "eps": 12.0, "seed": 2},
}
# fmt: on


@pytest.fixture
def tiny(pictures, tmp_path):
    """The settings of a tiny run."""
    return {**TINY, "data_dir": str(pictures), "out": str(tmp_path / "run")}


def run(script, settings):
    return script.main(words(settings))


def read_rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def check_run(expected, out, exactly=True):
    """The files in the folder `out` are those of the plain program.

    Labels first, then rows, then weights: what differs first says where to look. exactly: False
    where other operations compute the same.
    """
    mean = partial(pytest.approx, rel=2e-5, abs=1e-9)  # summed up in another order
    rounded = partial(pytest.approx, abs=3e-6)  # to six digits
    weights = same
    if not exactly:
        mean = rounded = partial(pytest.approx, rel=2e-3, abs=1e-3)
        weights = nearly_same
    for file, columns in expected.tables.items():
        rows = read_rows(out / file)
        assert rows[0].keys() == columns.keys()
        for name, values in columns.items():
            written = [row[name] for row in rows]
            if name.endswith("confidence"):
                assert [float(text) for text in written] == rounded(values), name
            else:
                assert written == values, (file, name)
    for row, plain in zip(read_rows(out / "metrics.csv"), expected.rows, strict=True):
        assert row.keys() - plain.keys() == {"ms_per_step", "seconds"}
        for name, value in plain.items():
            if isinstance(value, float):
                value, row[name] = mean(value), float(row[name])
            assert row[name] == value, (row["phase"], row["epoch"], name)
    result = json.loads((out / "result.json").read_text(), parse_constant=pytest.fail)  # no NaN
    for name, value in expected.result.items():
        assert result[name] == value, name
    settings = json.loads((out / "args.json").read_text())
    for name, value in {**expected.result["args"], "classes": expected.classes}.items():
        assert settings[name] == value, name
    assert result["images"] == settings["images"]
    for name, plain in expected.weights.items():
        weights(torch.load(out / name), plain)


@pytest.mark.parametrize("name", SETS)
@each_script
def test_a_run_matches_the_plain_program(script, name, tiny, tmp_path):
    own = OWN[script.METHOD] if name != "defaults" else {}
    settings = {**tiny, **own, **SETS[name]}
    result = run(script, settings)
    check_run(plain_run(script, settings), tmp_path / "run")
    assert result == result_of(settings)
    selection = result["selection"]
    if name not in ("the control", "every pseudo-label"):  # else it would show little
        assert 0 < selection["added"] < selection["unlabeled"]


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """A function: the settings of a finished run of a script; `out` is its folder."""
    runs = {}

    def of(script):
        if script not in runs:
            out = str(tmp_path_factory.mktemp("finished") / "run")
            settings = {**TINY, **OWN[script.METHOD], "data_dir": str(pictures), "out": out}
            run(script, settings)
            runs[script] = settings
        return runs[script]

    return of


def theta_of(settings):
    return settings["out"] + "/pretrain.pt"


def result_of(settings):
    return json.loads(Path(settings["out"], "result.json").read_text())


@each_script
def test_a_run_from_pretrained_matches_the_plain_program(script, finished, tmp_path):
    """With other settings than the pretraining's. A theta~ is known by its hash."""
    more = {"epochs": 1, "lr": 0.003, "batch_size": 6, "select": "confidence"}
    settings = {**finished(script), **more, "pretrained": theta_of(finished(script))}
    settings["out"] = str(tmp_path / "run")
    run(script, settings)
    check_run(plain_run(script, settings), tmp_path / "run")
    assert result_of(settings)["theta"] == result_of(finished(script))["theta"]
    other = {**finished(script), "seed": 9, "out": str(tmp_path / "other")}
    run(script, other)
    assert result_of(settings)["theta"] != result_of(other)["theta"]


@each_script
def test_compiling_compiles_the_loss_and_changes_nothing(script, tiny, tmp_path, monkeypatch):
    """Without graph breaks, which would wait for the device; VAT's inner gradient needs one."""
    torch.compiler.reset()
    compile = partial(torch.compile, fullgraph=script is not vat_scar, backend="aot_eager")
    calls = []

    def noting(function):
        compiled = compile(function)
        return lambda *inputs: calls.append(1) or compiled(*inputs)

    monkeypatch.setattr(torch, "compile", noting)
    settings = {**tiny, **OWN[script.METHOD], "lr": 1e-4, "compile": True}
    run(script, settings)
    assert len(calls) == 12  # steps
    expected = plain_run(script, settings)
    check_run(expected, tmp_path / "run", exactly=False)


@pytest.fixture
def board(tmp_path, monkeypatch):
    """What a run writes to TensorBoard, as (name, value, epoch); a stand-in for the package."""
    (tmp_path / "packages" / "tensorboard").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    written = []
    writer = SimpleNamespace(add_scalar=lambda *row: written.append(row), flush=lambda: None)
    module = SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return written


def test_tensorboard_gets_each_epochs_numbers_and_changes_nothing(tiny, tmp_path, board):
    settings = {**tiny, "tensorboard": True}
    run(mixmatch_scar, settings)
    check_run(plain_run(mixmatch_scar, settings), tmp_path / "run")
    expected = [
        (f"{row['phase']}/{name}", float(row[name]), int(row["epoch"]))
        for row in read_rows(tmp_path / "run" / "metrics.csv")
        for name in row.keys() - {"phase", "epoch"}
    ]
    assert sorted(board) == sorted(expected)


def test_selection_png_shows_kept_images_left_of_rejected_ones_and_labels_in_order(finished):
    """Up to eight of each."""
    settings = finished(mixmatch_scar)
    picture = np.asarray(Image.open(Path(settings["out"], "selection.png")).convert("RGB"))
    rows, shown = read_rows(Path(settings["out"], "selection.csv")), []
    for row in rows:
        image = np.asarray(Image.open(Path(settings["data_dir"], row["file"])).resize((16, 16)))
        for y, x in np.argwhere((picture[:-15, :-15] == image[0, 0]).all(axis=2)):
            if (picture[y : y + 16, x : x + 16] == image).all():
                shown.append((row["kept"], row["label"], x, y))
    counts = Counter((row["kept"], row["label"]) for row in rows)
    expected = {kind: min(8, count) for kind, count in counts.items()}
    assert Counter((kept, label) for kept, label, *_ in shown) == expected
    for (kept, label, x, y), (kept2, label2, x2, y2) in itertools.product(shown, shown):
        if kept > kept2:
            assert x < x2
        if label < label2:
            assert y < y2


@contextlib.contextmanager
def after_each_step(function):
    """Calls the function after each step of an optimizer."""
    handle = register_optimizer_step_post_hook(lambda *_: function())
    try:
        yield
    finally:
        handle.remove()


def test_times_are_those_of_steps_and_epochs(tiny, tmp_path, monkeypatch):
    """Of the 12 steps the t-th takes t * t seconds, a measurement of accuracy half a second."""
    clock, step = [0.0], itertools.count(1)
    monkeypatch.setattr(time, "perf_counter", lambda: sum(clock))

    def after_forward(module, *_):
        if isinstance(module, WideResNet) and not module.training:
            clock.append(0.5)

    handle = nn.modules.module.register_module_forward_hook(after_forward)
    with after_each_step(lambda: clock.append(next(step) ** 2)):
        result = run(fixmatch_scar, {**tiny, "mu": 2})
    handle.remove()
    rows = read_rows(tmp_path / "run" / "metrics.csv")
    steps = [1 + 4 + 9, 16 + 25 + 36, 49 + 64 + 81, 100 + 121 + 144]
    ms_per_step = [1000 * seconds / 3 for seconds in steps]
    assert [float(row["ms_per_step"]) for row in rows] == pytest.approx(ms_per_step)
    assert [float(row["seconds"]) for row in rows] == [seconds + 0.5 for seconds in steps]
    assert result["seconds"] == sum(steps) + 2
    assert result["ms_per_step"] == pytest.approx(np.median(ms_per_step))


def test_a_run_says_what_it_ran_on_and_keeps_its_script(finished):
    result = result_of(finished(vat_scar))
    assert "CPU" in result["device"] and result["peak_memory_gib"] is None
    modules = {"torch": torch, "torchvision": torchvision, "numpy": np, "pillow": Image}
    for name, module in modules.items():
        assert result["versions"][name] == module.__version__
    python, script, *argv = shlex.split(result["command"])
    assert (python, script) == ("python", "vat_scar.py")
    assert argv == words(finished(vat_scar))
    copied = Path(finished(vat_scar)["out"], "vat_scar.py")
    assert copied.read_bytes() == (HERE / "vat_scar.py").read_bytes()


def test_a_run_sets_cudnn(tiny, monkeypatch):
    """TF32 off, for fgsm's signs; the fastest convolutions are looked for."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    run(vat_scar, {**tiny, "epochs": 1})
    assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.allow_tf32


# -------------------------------------------------------------------------- interruptions, resuming


class Killed(BaseException):
    """Nothing in the scripts handles it, as nothing handles SIGKILL."""


def killer(number):
    """A function whose number-th call kills the run."""
    calls = itertools.count(1)

    def kill():
        if next(calls) == number:
            raise Killed

    return kill


def check_same_run(before, settings):
    """Two runs left the same files, to the last bit, but for times, paths and the checkpoint."""
    one, two = Path(before["out"]), Path(settings["out"])
    names = {path.name for path in two.glob("[!.]*")}
    assert names == {path.name for path in one.iterdir()}
    for name in names - {"args.json", "checkpoint.pt", "result.json", "metrics.csv"}:
        if name.endswith(".pt"):
            same(torch.load(two / name), torch.load(one / name))
        else:
            assert (two / name).read_bytes() == (one / name).read_bytes(), name
    rows = [*read_rows(one / "metrics.csv"), result_of(before)]
    others = [*read_rows(two / "metrics.csv"), result_of(settings)]
    for row, other in zip(rows, others, strict=True):
        for name in row.keys() - {"ms_per_step", "seconds", "command", "args"}:
            assert row[name] == other[name], name


@pytest.mark.parametrize("number", range(1, 17))
def test_a_run_killed_as_it_writes_a_file_ends_as_if_it_had_not_been(
    number, finished, tmp_path, monkeypatch
):
    """Before the file is moved into place. The 16th is result.json, and the last."""
    settings, replace, kill = {**finished(mixmatch_scar)}, os.replace, killer(number)
    settings["out"] = str(tmp_path / "run")

    def kill_or_replace(source, target):
        assert str(os.getpid()) in Path(source).name  # no other run's
        kill()
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", kill_or_replace)
        run(mixmatch_scar, settings)
    if number == 16:
        left = {path.name for path in (tmp_path / "run").glob("[!.]*")}
        assert left == {path.name for path in Path(finished(mixmatch_scar)["out"]).iterdir()} - {
            "result.json"
        }
    run(mixmatch_scar, settings)
    check_same_run(finished(mixmatch_scar), settings)


@pytest.mark.parametrize(
    "script, step, steps_left",
    [(vat_scar, 8, 6), (mixmatch_scar, 5, 9), (fixmatch_scar, 11, 3)],
    ids=name_of,
)
def test_a_run_killed_in_a_step_ends_as_if_it_had_not_been(
    script, step, steps_left, finished, tmp_path
):
    """It goes on after the last whole epoch of three steps. VAT's is a control, from the theta~ of
    another run."""
    whole, steps = finished(script), []
    if script is vat_scar:
        control = {"select": "none", "pretrained": theta_of(whole), "epochs": 4}
        whole = {**whole, **control, "out": str(tmp_path / "whole")}
        run(script, whole)
    settings = {**whole, "out": str(tmp_path / "run")}
    with after_each_step(killer(step)), pytest.raises(Killed):
        run(script, settings)
    with after_each_step(lambda: steps.append(1)):
        run(script, settings)
    check_same_run(whole, settings)
    assert len(steps) == steps_left


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_finished_run_is_printed_and_not_trained(finished, capsys):
    settings = finished(vat_scar)
    before = contents(settings["out"])
    with after_each_step(pytest.fail):
        result = run(vat_scar, settings)
    assert result == result_of(settings) and contents(settings["out"]) == before
    assert f"{result['final_accuracy']:.2f}" in capsys.readouterr().out


@pytest.fixture
def unfinished(finished, tmp_path):
    """A function: the settings of a run that lacks its last file, so that it goes on."""

    def of(script):
        settings = {**finished(script), "out": str(tmp_path / "run")}
        shutil.copytree(finished(script)["out"], settings["out"])
        Path(settings["out"], "result.json").unlink()
        return settings

    return of


@pytest.mark.parametrize("other", [{"compile": True}, {"tensorboard": True}, "moved", "on a GPU"])
def test_a_run_goes_on_with_what_changes_no_result(other, unfinished, finished, board, tmp_path):
    """Options for speed; its images elsewhere; what was begun on a GPU. What it wrote as it began
    stays."""
    settings = unfinished(vat_scar)
    args, script = Path(settings["out"], "args.json"), Path(settings["out"], "vat_scar.py")
    script.write_text("as it was")
    if other == "moved":
        shutil.copytree(settings["data_dir"], tmp_path / "pictures")
        other = {"data_dir": str(tmp_path / "pictures")}
    if other == "on a GPU":
        args.write_text(args.read_text().replace('"device": "cpu"', '"device": "cuda"'))
        other = {}
    before = args.read_text()
    result = run(vat_scar, {**settings, **other})
    assert result["final_accuracy"] == result_of(finished(vat_scar))["final_accuracy"]
    assert result["args"] == {**result_of(finished(vat_scar))["args"], **settings, **other}
    assert args.read_text() == before and script.read_text() == "as it was"


def test_a_resumed_run_keeps_and_reports_the_labels_that_it_began_with(unfinished, finished):
    """Another device may select other images, and label them otherwise."""
    settings = unfinished(vat_scar)
    path = Path(settings["out"], "checkpoint.pt")
    checkpoint, rows = torch.load(path), read_rows(path.with_name("selection.csv"))
    split = load_split("folder", settings["data_dir"], 16, settings["num_labeled"])
    one, other = [i for i, row in enumerate(rows) if row["kept"] == "1"][:2]
    label = (split.classes.index(rows[other]["label"]) + 1) % 5
    checkpoint["labels"][split.unlabeled[one]] = -1
    checkpoint["labels"][split.unlabeled[other]] = label
    torch.save(checkpoint, path)
    result = run(vat_scar, settings)
    assert result["selection"]["added"] == result_of(finished(vat_scar))["selection"]["added"] - 1
    rows[one]["kept"], rows[other]["label"] = "0", split.classes[label]
    assert read_rows(path.with_name("selection.csv")) == rows


# ---------------------------------------------------------------------------------- what is refused


def refusal(capsys, script, argv):
    """The one sentence with which a run ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        script.main(argv if isinstance(argv, list) else words(argv))
    sentence = stopped.value.code  # sys.exit's, which Python prints; argparse prints its own
    if sentence == 2:
        sentence = capsys.readouterr().err
    sentence = sentence.partition("error:")[2].strip()
    assert sentence and "\n" not in sentence
    return sentence


BAD_OPTIONS = {  # the sentence names the first option, or has these words
    vat_scar: [
        ("--depth 27", "depth must be"), "--data imagenet", "--select all", "--epoch 3",
        "--width 0", "--epochs 0", "--steps-per-epoch 0", "--batch-size 0", "--image-size 0",
        "--eps 256", "--table2-eps 1 -2", "--table2-eps nan", "--ema-decay 1.5", "--xi 0",
        "--num-labeled 4", ("--num-labeled 110 --val 11", "--val 11"),
        ("--pretrained no/theta.pt", "no/theta.pt holds no weights"),
        ("--lr 1e30", "pretrain 1: loss is nan or inf"),
    ],
    mixmatch_scar: ["--temperature 0", "--alpha 0.001"],
    fixmatch_scar: ["--threshold 2", "--mu 0"],
}  # fmt: skip


def bad_options():
    """Those, and numbers that are negative or not finite; for each script, with the words."""
    for script in SCRIPTS:
        for bad in BAD_OPTIONS[script]:
            options, sentence = bad if isinstance(bad, tuple) else (bad, bad.split()[0])
            yield script, options, sentence
        for name, default in {**DEFAULTS, **OWN_DEFAULTS[script.METHOD]}.items():
            option = "--" + name.replace("_", "-")
            if type(default) in (int, float) and (name != "mu" or script is fixmatch_scar):
                yield script, f"{option} -1", option
                yield script, f"{option} inf", option


@pytest.mark.parametrize("script, options, sentence", list(bad_options()), ids=name_of)
def test_bad_options_are_refused_before_anything_is_written(
    script, options, sentence, tiny, tmp_path, capsys
):
    """Or, where only training shows it, before the first checkpoint is."""
    assert sentence in refusal(capsys, script, [*words(tiny), *options.split()])
    written = "checkpoint.pt" if options == "--lr 1e30" else "*"
    assert not list(tmp_path.glob(f"run/{written}"))


@pytest.mark.parametrize("script, options", [
    (vat_scar, "--eps 0 --ema-decay 0 --image-size 16 --lr 0"),
    (vat_scar, "--eps 255 --ema-decay 1 --power-iterations 0"),
    (mixmatch_scar, "--alpha 0.01"), (mixmatch_scar, "--alpha 0"), (fixmatch_scar, "--threshold 1"),
], ids=name_of)  # fmt: skip
def test_the_ends_of_a_range_are_accepted(script, options):
    script.parse_args(options.split())


def other_settings(script):
    """Another value than a finished run's for each option that its folder must agree in."""
    own = {name: OWN_DEFAULTS[script.METHOD][name] for name in OWN[script.METHOD]}
    others = {"data": "synthetic", "width": 2, "select": "none", "precision": "bf16"}
    return {**own, **EVERY, **others}


@each_script
def test_another_runs_folder_is_refused_by_each_setting_that_differs(script, finished, capsys):
    """No option is forgotten, but for speed and for where the files are."""
    settings, other = finished(script), other_settings(script)
    before = contents(settings["out"])
    sentence = refusal(capsys, script, {**settings, **other, "compile": True})
    differences = re.findall(r"(\w+) was ", sentence)
    assert sorted(differences) == sorted([*other, "classes", "images"])
    may_differ = {"device", "out", "data_dir", "compile", "tensorboard", "pretrained"}
    options = vars(script.parse_args([])).keys() - may_differ
    assert options - {"mu"} == other.keys() - {"mu"}  # which is an option of FixMatch's alone
    assert contents(settings["out"]) == before


def test_another_runs_theta_is_refused_by_each_setting_that_differs(finished, tmp_path, capsys):
    """Its network, its images or their split were others. What else differs is not among them."""
    settings = {**finished(vat_scar), **other_settings(vat_scar), "out": str(tmp_path / "run")}
    settings["pretrained"] = theta_of(finished(vat_scar))
    differences = re.findall(r"(\w+) was ", refusal(capsys, vat_scar, settings))
    expected = "data images classes image_size flip num_labeled val seed depth width"
    assert sorted(differences) == sorted(expected.split())
    mixmatch = {name: settings[name] for name in settings if name not in OWN["vat"]}
    assert "(method was vat, now mixmatch" in refusal(capsys, mixmatch_scar, mixmatch)
    assert not any(tmp_path.iterdir())


def change_pixel(path):
    pixels = np.array(Image.open(path))
    pixels[5, 7, 1] ^= 128
    Image.fromarray(pixels).save(path)


IMAGE, TEST_IMAGE = "train/red/red 3.png", "test/red/red 3.png"
LAST_BLUE = "test/blue/blue 9.png"  # its pixels stay where they are if it becomes the first cyan
CHANGES = {  # what may have become of a folder of images
    "a training pixel": lambda root: change_pixel(root / IMAGE),
    "an unlabeled pixel": lambda root: change_pixel(root / "unlabeled" / "red 3.png"),
    "a test pixel": lambda root: change_pixel(root / TEST_IMAGE),
    "a label": lambda root: (root / IMAGE).rename(root / "train" / "cyan" / "x.png"),
    "a test label": lambda root: (root / LAST_BLUE).rename(root / "test" / "cyan" / "0.png"),
    "an image more": lambda root: shutil.copy(root / IMAGE, root / "unlabeled" / "x.png"),
    "a file's name": lambda root: (root / IMAGE).rename(root / "train" / "red" / "red 3x.png"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_and_its_theta_do_not_go_on_with_other_images(what, finished, tmp_path, capsys):
    shutil.copytree(finished(vat_scar)["data_dir"], tmp_path / "pictures")
    CHANGES[what](tmp_path / "pictures")
    settings = {**finished(vat_scar), "data_dir": str(tmp_path / "pictures")}
    before = contents(settings["out"])
    control = {**settings, "pretrained": theta_of(settings), "out": str(tmp_path / "run")}
    for refused in (settings, control):
        assert "(images was 150 + 60, hash" in refusal(capsys, vat_scar, refused)
    assert contents(settings["out"]) == before and not (tmp_path / "run").exists()


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_control_does_not_go_on_from_another_theta(is_finished, finished, tmp_path, capsys):
    """The run that pretrained it was deleted and run again, say."""
    theta = tmp_path / "theta.pt"
    shutil.copy(theta_of(finished(vat_scar)), theta)
    settings = {**finished(vat_scar), "out": str(tmp_path / "control"), "pretrained": str(theta)}
    run(vat_scar, settings)
    if not is_finished:
        (tmp_path / "control" / "result.json").unlink()
    weights = torch.load(theta)
    weights["linear.bias"][3] += 1e-6
    torch.save(weights, theta)
    assert "(pretrained_weights was " in refusal(capsys, vat_scar, settings)


def test_a_run_that_pretrained_does_not_go_on_from_a_theta(finished, capsys):
    settings = {**finished(vat_scar), "pretrained": theta_of(finished(vat_scar))}
    assert "(pretrained_weights was None" in refusal(capsys, vat_scar, settings)


@pytest.mark.parametrize("name, width", [("pretrain.pt", 2), ("checkpoint.pt", 1)])
def test_a_theta_without_its_run_must_fit_the_network(name, width, finished, tmp_path, capsys):
    """A file that somebody copied tells nothing but its weights."""
    theta = shutil.copy(Path(finished(vat_scar)["out"], name), tmp_path / "theta.pt")
    settings = {**finished(vat_scar), "out": str(tmp_path / "run"), "width": width}
    settings["pretrained"] = str(theta)
    assert f"{theta} holds no weights" in refusal(capsys, vat_scar, settings)


def test_a_folder_that_holds_no_run_is_refused_unless_it_seems_empty(tiny, tmp_path, capsys):
    tiny.update(out=str(tmp_path), epochs=1)
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds no run" in refusal(capsys, vat_scar, tiny)
    (tmp_path / "notes.txt").rename(tmp_path / ".notes")
    run(vat_scar, tiny)
    assert (tmp_path / "result.json").exists() and (tmp_path / ".notes").exists()


@pytest.mark.parametrize("fault", ["cut off", "empty", "pickled code"])
@pytest.mark.parametrize("name", ["checkpoint.pt", "args.json", "pretrain.pt", "a theta"])
def test_a_damaged_file_ends_a_run_and_is_left_alone(name, fault, unfinished, tmp_path, capsys):
    """The error is torch's or json's, but for another run's theta~. Pickled code is not run."""

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    settings = unfinished(vat_scar)
    path = Path(settings["out"], name.replace("a theta", "pretrain.pt"))
    torch.save(Code(), tmp_path / "code")
    damaged = {"cut off": path.read_bytes()[: path.stat().st_size // 2], "empty": b""}
    damaged["pickled code"] = (tmp_path / "code").read_bytes()
    path.write_bytes(damaged[fault])
    if name == "a theta":
        settings.update(pretrained=str(path), out=str(tmp_path / "new"))
        assert f"{path} holds no weights" in refusal(capsys, vat_scar, settings)
    with pytest.raises((Exception, SystemExit)):
        run(vat_scar, settings)
    assert path.read_bytes() == damaged[fault]
    assert not (tmp_path / "ran").exists() and not (tmp_path / "new").exists()


# ------------------------------------------------------------------------- several processes as one

NETWORK = '''
import os

forwards = iter(range(10**6))


class WideResNet(nn.Module):
    """No batch norm, a layer that is not used, a parameter without dimensions.

    In eval mode process 1 of torchrun mistakes each class for the next one, so that only what
    process 0 selects, measures and writes is right. Training fails at the forward pass STOP.
    """

    def __init__(self, num_classes, depth, width):
        super().__init__()
        self.linear, self.unused = nn.Linear(3 * 16, num_classes), nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        logits = self.scale * self.linear(9 * F.adaptive_avg_pool2d(x, 4).flatten(1) - 5)
        if self.training:
            assert next(forwards) != int(os.environ.get("STOP", -1))
            return logits
        return logits.roll(int(os.environ.get("RANK", 0)), dims=1)
'''


def torchrun(script, settings, folder, stop):
    """Runs a copy of the script with the network above in two processes; what torchrun says."""
    folder.mkdir(exist_ok=True)
    shutil.copy(script.__file__, folder)
    text = Path(common.__file__).read_text(encoding="utf-8")
    (folder / "common.py").write_text(text + NETWORK, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", f"--log-dir={folder}/logs"]
    command += [folder / Path(script.__file__).name, *words(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STOP": str(stop)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def plain_network():
    names = dict(vars(common))
    exec(NETWORK, names)
    return names["WideResNet"]


@pytest.fixture
def stopped(tiny, tmp_path):
    """The settings of a FixMatch run of two processes, which failed in its last epoch."""
    settings = {**tiny, **OWN["fixmatch"], "eps": 20.0, "threshold": 0.8}
    assert torchrun(fixmatch_scar, settings, tmp_path / "scripts", stop=20).returncode != 0
    assert len(read_rows(tmp_path / "run" / "metrics.csv")) == 3
    return settings


def test_a_run_of_two_processes_matches_the_plain_program(stopped, tmp_path):
    """Started again, too. Each process has its share of every batch and draws its own augmentation;
    gradients and metrics are averaged; labels, accuracies and files are those of process 0."""
    done = torchrun(fixmatch_scar, stopped, tmp_path / "scripts", stop=-1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Table 1") == 1
    expected = plain_run(fixmatch_scar, stopped, plain_network(), processes=2)
    check_run(expected, tmp_path / "run", exactly=False)
    assert 10 < expected.result["selection"]["added"] < 120


def test_two_processes_end_with_the_weights_of_one(tiny, tmp_path):
    """As the plain program has it. Nothing depends on what else is in a batch, and nothing is
    drawn: images of one color each, MixMatch without MixUp."""
    shutil.copytree(tiny["data_dir"], tmp_path / "pictures")
    for path in (tmp_path / "pictures").rglob("*.png"):
        Image.open(path).resize((1, 1)).resize((24, 24)).save(path)
    settings = {**tiny, "data_dir": str(tmp_path / "pictures"), "alpha": 0.0, "lambda_u": 500.0}
    one, two = (plain_run(mixmatch_scar, settings, plain_network(), n) for n in (1, 2))
    nearly_same(one.weights, two.weights)


@pytest.fixture
def as_process(monkeypatch):
    """A function that makes VAT's script one of two processes, which exchanges nothing."""
    for name in ("init_process_group", "all_reduce", "broadcast"):
        monkeypatch.setattr(torch.distributed, name, lambda *_: None)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # as it is, after the test

    def start(rank):
        monkeypatch.setattr(vat_scar, "WORLD_SIZE", 2)
        monkeypatch.setattr(vat_scar, "RANK", rank)

    return start


def test_process_1_writes_and_prints_nothing(tiny, as_process, tmp_path, board, capsys):
    as_process(1)
    run(vat_scar, {**tiny, "tensorboard": True})
    assert not list(tmp_path.glob("run/*")) and board == []
    assert capsys.readouterr().out == ""


def test_a_batch_that_the_processes_do_not_divide_is_refused(tiny, as_process, capsys):
    as_process(0)
    assert "--batch-size 5" in refusal(capsys, vat_scar, {**tiny, "batch_size": 5})


def test_rank_without_world_size_counts_for_nothing(monkeypatch):
    """Clusters set it for purposes of their own."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert module_at(HERE / "vat_scar.py").RANK == 0


# --------------------------------------------------------------------------------------------- CUDA


@pytest.fixture
def cuda_graph(monkeypatch):
    """CUDA graphs on a CPU. While one records, a function may note how to compute its outputs.

    notes: what replay() calls; recorded: an entry for each recording; recording: while it lasts. A
    graph must be gone, and with it its memory, when the next one is recorded.
    """
    seen = SimpleNamespace(notes=[], recorded=[], recording=False)
    graphs = weakref.WeakSet()

    class Graph:
        def __init__(self):
            graphs.add(self)

        def replay(self):
            for compute in seen.notes:
                compute()

    @contextlib.contextmanager
    def graph(graph, stream):
        assert list(graphs) == [graph]
        seen.recorded.append(stream)
        seen.recording = True
        yield
        seen.recording = False

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "a stream")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return seen


def test_capture_calls_three_times_then_records_once_and_leaves_its_inputs_alone(cuda_graph):
    calls = []

    def function(a, b):
        if not cuda_graph.recording:
            calls.append("called")
            return {"sum": 10 * a + b}
        calls.append("recorded")
        result = torch.full((), math.nan)
        cuda_graph.notes.append(lambda: result.copy_(10 * a + b))
        return {"sum": result}

    captured = vat_scar.capture(function)
    inputs = [torch.tensor(float(i)) for i in range(7)]
    for a, b in itertools.pairwise(inputs):
        assert captured(a, b)["sum"] == 10 * a + b
    assert inputs == [0, 1, 2, 3, 4, 5, 6]
    assert calls == 3 * ["called"] + ["recorded"] and cuda_graph.recorded == ["a stream"]


class NamedCuda(str):
    """A device of the CPU that says it is called cuda, so that main takes its steps for a GPU."""

    __hash__ = str.__hash__

    def __eq__(self, other):
        return other == "cuda"


@pytest.mark.parametrize("compile, processes, graphs", [(True, 1, 2), (False, 1, 0), (True, 2, 0)])
def test_on_cuda_a_run_has_a_stream_and_each_phase_a_graph(
    compile, processes, graphs, tiny, cuda_graph, monkeypatch, request
):
    """Without a GPU there is no other way to see it. No exchange between processes is recorded;
    each has a GPU of its own."""
    if processes == 2:
        request.getfixturevalue("as_process")(0)
    parse_args, streams, devices = vat_scar.parse_args, [], []

    def parse_args_for_cuda(argv):
        args = parse_args(argv)
        args.device = NamedCuda("cpu")
        return args

    monkeypatch.setattr(vat_scar, "parse_args", parse_args_for_cuda)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "a new stream")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**29)
    monkeypatch.setenv("LOCAL_RANK", "5")
    result = run(vat_scar, {**tiny, "compile": compile, "steps_per_epoch": 5})
    assert len(cuda_graph.recorded) == graphs and streams == ["a new stream"]
    assert devices == [5] * (processes - 1)
    assert (result["device"], result["peak_memory_gib"]) == ("a GPU", 1.5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@each_script
def test_bf16_gives_every_parameter_nearly_the_gradient_of_fp32(script, device, images):
    """A forward under no_grad comes first in MixMatch: autocast must not reuse its casts."""
    gradients = []
    x, y = images[0].to(device), images[1].to(device)
    for precision in ("fp32", "bf16"):
        o = SimpleNamespace(**{**defaults_of(script), "precision": precision})
        torch.manual_seed(0)
        model = WideResNet(10, 10, 1).to(device)
        loss, _ = plain_loss(script, model, x[:16], y[:16], x[16:32], 1.0, o)
        loss.backward()
        gradients.append({name: p.grad.flatten() for name, p in model.named_parameters()})
    fp32, bf16 = gradients
    for name in fp32:
        assert F.cosine_similarity(fp32[name], bf16[name], dim=0) > 0.9, name
    assert not torch.equal(fp32["conv.weight"], bf16["conv.weight"])


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


@needs_cuda
def test_predict_and_fgsm_on_cuda_are_those_of_the_cpu(images):
    """In float32."""
    torch.manual_seed(0)
    model, x, y = WideResNet(10, 10, 1), to_float(images[2][:100]), images[3][:100]
    logits, attacked = vat_scar.predict(model, x), fgsm(model, x, y, 0.02)
    model.cuda()
    close(vat_scar.predict(model, x.cuda()).cpu(), logits, rtol=1e-3, atol=1e-3)
    differences = (fgsm(model, x.cuda(), y.cuda(), 0.02).cpu() - attacked).abs() > 1e-6
    assert differences.float().mean() < 2e-3


@needs_cuda
@each_script
def test_whole_run_on_cuda(script, tiny, tmp_path):
    """With a GPU's defaults; its weights load without a GPU."""
    for name in ("device", "precision", "compile"):
        del tiny[name]
    result = run(script, {**tiny, "steps_per_epoch": 8})
    assert result["args"]["compile"] and result["peak_memory_gib"] > 0
    for name in ("pretrain.pt", "model.pt"):
        weights = torch.load(tmp_path / "run" / name)
        assert {tensor.device.type for tensor in weights.values()} == {"cpu"}


@needs_cuda
@each_script
def test_captured_run_on_cuda_is_the_run(script, tiny, tmp_path, monkeypatch):
    """Whether the step is a CUDA graph or not, a run ends in the same metrics and weights."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    ends = []
    for name, compile in (("captured", True), ("plain", False)):
        own = {"device": "cuda", "compile": compile, "out": str(tmp_path / name)}
        run(script, {**tiny, "steps_per_epoch": 6, "lr": 0.001, **own})
        rows = read_rows(tmp_path / name / "metrics.csv")
        losses = [float(row["loss"]) for row in rows]
        weights = [torch.load(tmp_path / name / part) for part in ("pretrain.pt", "model.pt")]
        ends.append([torch.tensor(losses), *weights])
    for captured, plain in zip(*ends):
        close(captured, plain, rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------- images from a folder


def read_folder(root, size=32):
    """The images of a folder, by name: (pixels [size, size, 3], label)."""
    split, images = load_split("folder", root, size), {}
    for names, x, y in (
        (split.names, split.x, split.y),
        (split.names_test, split.x_test, split.y_test),
    ):
        for name, image, label in zip(names, x, y.tolist(), strict=True):
            images[name] = image.permute(1, 2, 0).numpy(), label
    return images


@pytest.fixture
def photos(tmp_path):
    """Ants and bees, of several sizes: 12 to train with, 6 to test on, 10 without a label."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("ant", "bee")):
        for part, count in ((f"train/{name}", 6), (f"test/{name}", 3), ("unlabeled/deep er", 5)):
            (tmp_path / "photos" / part).mkdir(parents=True, exist_ok=True)
            for n in range(count):
                pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize((48, 40) if n % 2 else (100, 100))
                image.save(tmp_path / "photos" / part / f"{label} {n}.png")
    return tmp_path / "photos"


def test_a_folders_images_are_resized_as_pillow_does_and_labeled_by_their_classes(photos):
    images = read_folder(photos, 50)
    assert images.keys() == {path.relative_to(photos).as_posix() for path in photos.rglob("*.png")}
    for name, (ours, label) in images.items():
        assert label == {"ant": 0, "bee": 1, "deep er": -1}[Path(name).parent.name]
        expected = np.asarray(Image.open(photos / name).resize((50, 50)))
        assert (ours == expected).all(), name
    _, y, x_test, y_test = load_images("folder", photos, 50)
    assert y.tolist() == 6 * [0] + 6 * [1] + 10 * [-1]
    assert x_test.dtype == torch.uint8 and y_test.dtype == torch.int64


def test_each_image_of_a_folder_is_read_once_and_what_is_left_out_is_counted(photos, capsys):
    """What is no image, a second way to one, links to folders, thumbnails; but not hidden files.
    Folders below a class belong to it."""
    ants = photos / "train" / "ant"
    (ants / "more").mkdir()
    (ants / "0 1.png").rename(ants / "more" / "0 1.png")
    (ants / "notes.txt").write_text("notes")
    (ants / "paper.pdf").write_text("Pillow writes these, and cannot read them")
    (ants / "twice.png").symlink_to(ants / "0 0.png")
    (photos / "unlabeled" / "too.png").symlink_to(ants / "0 0.png")
    (ants / "loop").symlink_to(photos / "train")
    (ants / "album.png").symlink_to(photos / "test")
    (photos / "train" / "readme").write_text("notes")
    for name in ("train/.hidden", "train/ant/.hidden", "train/@eaDir", "train/ant/__MACOSX"):
        (photos / name).mkdir()
        shutil.copy(ants / "0 0.png", photos / name / "0.png")
    (photos / "unlabeled" / "lost+found").mkdir()
    images = read_folder(photos)
    labels = Counter(label for _, label in images.values())
    assert labels == {0: 9, 1: 9, -1: 10} and images["train/ant/more/0 1.png"][1] == 0
    # six things in ant, train/@eaDir, train/readme, unlabeled/lost+found, unlabeled/too.png
    assert "left out: 10 (" in capsys.readouterr().out


def test_images_of_a_folder_become_rgb_upright_and_opaque(photos):
    """Five kinds of files, and three EXIF orientations. What is transparent turns white, in each
    mode that knows it: a black drawing on it would be all black otherwise."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image, bees, expected = Image.fromarray(pixels), photos / "train" / "bee", {}
    modes = {"gif": "P", "bmp": "RGB", "PNG": "RGBA", "tiff": "CMYK", "webp": "L"}
    for name, mode in modes.items():
        image.convert(mode).save(bees / f"a.{name}", lossless=True)
        expected[f"a.{name}"] = np.asarray(image.convert(mode).convert("RGB"))
    for orientation, turned in {3: "ROTATE_180", 6: "ROTATE_90", 8: "ROTATE_270"}.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        name = f"{turned}.png"
        image.transpose(Image.Transpose[turned]).save(bees / name, exif=exif)
        expected[name] = pixels
    drawing = Image.new("LA", (32, 32), (0, 0))
    drawing.putpixel((2, 3), (0, 255))
    drawing.putpixel((4, 5), (0, 51))
    drawing.save(bees / "LA.png")
    drawing.convert("RGBA").save(bees / "RGBA.png")
    drawing = Image.new("L", (32, 32), 9)
    drawing.putpixel((2, 3), 0)
    for mode in ("L", "P"):
        drawing.convert(mode).save(bees / f"{mode}.png", transparency=9)
    for name, a_fifth in {"LA": 204, "RGBA": 204, "P": 255, "L": 255}.items():
        expected[f"{name}.png"] = np.full((32, 32, 3), 255, np.uint8)
        expected[f"{name}.png"][3, 2], expected[f"{name}.png"][5, 4] = 0, a_fifth
    images = read_folder(photos)
    for name, plain in expected.items():
        ours, _ = images[f"train/bee/{name}"]
        assert (ours == plain).all(), name


BAD_FOLDERS = [  # what is done to ants and bees, words of the sentence
    (lambda root: (root / "test/bee").rename(root / "test/wasp"), "test (wasp)"),
    (lambda root: [p.rename(p.with_suffix(".heic")) for p in (root / "train/bee").iterdir()],
     "train/bee has no image (it has 6 .heic)"),
    (lambda root: [p.unlink() for p in (root / "test/bee").iterdir()], "test/bee has no image"),
    (lambda root: shutil.rmtree(root / "unlabeled/deep er"), "unlabeled has no image"),
    (lambda root: (shutil.rmtree(root / "train/bee"), shutil.rmtree(root / "test/bee")),
     "train needs two or more class folders; it has 1"),
    (lambda root: shutil.rmtree(root / "train"), "train needs two or more class folders"),
    (lambda root: (shutil.rmtree(root / "test"), (root / "test").mkdir()),
     "test has no class folder"),
    (lambda root: (shutil.rmtree(root / "test"), (root / "test").write_text("")), "cannot read"),
    (lambda root: (shutil.rmtree(root / "unlabeled"), (root / "unlabeled").write_text("")),
     "cannot read"),
    (lambda root: (root / "train/loop").symlink_to(root / "train/loop"), "cannot read"),
    (lambda root: (root / "train/ant" / os.fsdecode(b"\xff.png")).touch(),
     "train/ant has a name that is not UTF-8: rename '\\udcff.png'"),
]  # fmt: skip


@pytest.mark.parametrize("spoil, sentence", BAD_FOLDERS, ids=[row[1] for row in BAD_FOLDERS])
def test_a_bad_folder_is_refused(spoil, sentence, photos):
    spoil(photos)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_images("folder", photos)


def test_images_that_are_damaged_deep_or_huge_are_named_together(photos):
    """More than 8 bits a channel would be cut off; 20,000 x 20,000 pixels would fill the memory."""
    Image.fromarray(np.full((32, 32), 15, np.uint16)).save(photos / "train/ant/deep gray.png")
    Image.fromarray(np.ones((32, 32), np.float32)).save(photos / "train/bee/deep float.tiff")
    (photos / "test/bee/empty.png").write_bytes(b"")
    whole = bytearray((photos / "train/ant/0 0.png").read_bytes())
    (photos / "unlabeled/half.png").write_bytes(whole[: len(whole) // 2])
    whole[16:24] = struct.pack(">II", 20000, 20000)  # what its header says, with a checksum
    whole[29:33] = struct.pack(">I", zlib.crc32(whole[12:29]))
    (photos / "unlabeled/huge.png").write_bytes(whole)
    with pytest.raises(ValueError, match="images: 4 of 26") as error:
        load_images("folder", photos)
    for name in ("ant/deep gray.png", "bee/deep float.tiff", "huge.png", "half.png"):
        assert f"{name} (" in str(error.value)
    for path in [*photos.glob("train/*/deep*"), *photos.glob("unlabeled/h*")]:
        path.unlink()
    with pytest.raises(ValueError, match="images: 1 of 7; .*empty.png"):
        load_images("folder", photos)


def tiny_photos(photos, tmp_path, **others):
    return {**TINY, "data_dir": str(photos), "out": str(tmp_path / "run"), "epochs": 1, **others}


def test_a_folder_without_test_images_is_scored_on_training_images(photos, tmp_path, capsys):
    shutil.rmtree(photos / "test")
    settings = tiny_photos(photos, tmp_path, num_labeled=8)
    assert "has no test/: use --val" in refusal(capsys, vat_scar, settings)
    run(vat_scar, {**settings, "val": 4})
    check_run(plain_run(vat_scar, {**settings, "val": 4}), tmp_path / "run")


def test_a_folder_without_unlabeled_images_and_some_test_images_is_enough(photos, tmp_path, capsys):
    """Labels are train's; images that are not labeled are the unlabeled ones. All of a class may be
    labeled, and none of it be tested on."""
    shutil.rmtree(photos / "unlabeled")
    shutil.rmtree(photos / "test" / "ant")
    for n in range(5):
        (photos / "train" / "ant" / f"0 {n}.png").unlink()
    settings = tiny_photos(photos, tmp_path, num_labeled=2)
    no_number = {**settings, "num_labeled": None}
    assert "--num-labeled 4000 is too many" in refusal(capsys, vat_scar, no_number)
    run(vat_scar, settings)
    absent = re.findall("^Classes without.*", capsys.readouterr().out, re.MULTILINE)
    assert [line.count("(ant)") for line in absent] == [1, 1]
    check_run(plain_run(vat_scar, settings), tmp_path / "run")


# ------------------------------------------------------------------------- benchmarks, by stand-ins


def stand_in(name, kind, monkeypatch):
    """Makes `kind` what is called in place of torchvision's class for this data set."""
    monkeypatch.setitem(common.BENCHMARKS, name, (kind, *common.BENCHMARKS[name][1:]))


def dataset(count=8, layout=(0, 1, 2, 3), labels="labels", **more):
    """What torchvision's classes read, with random images, and with SVHN's strides."""
    x = np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    x = x.swapaxes(2, 3).copy().swapaxes(2, 3)
    more[labels] = np.arange(count) % 10
    return SimpleNamespace(data=x.transpose(layout), **more)


@pytest.mark.parametrize(
    "name, kind, layout, labels, parts",
    [
        ("cifar10", "CIFAR10", (0, 2, 3, 1), "targets", [True, False]),
        ("cifar100", "CIFAR100", (0, 2, 3, 1), "targets", [True, False]),
        ("svhn", "SVHN", (0, 1, 2, 3), "labels", ["train", "test"]),
        ("stl10", "STL10", (0, 1, 2, 3), "labels", ["train+unlabeled", "test"]),
    ],
)
def test_benchmarks_are_read_by_torchvision(name, kind, layout, labels, parts, monkeypatch):
    """Training and test images, channels first, under labels of their own."""

    def read(root, part):
        assert root == "some/data"
        return dataset(4 + parts.index(part), layout, labels)

    assert common.BENCHMARKS[name][0] is getattr(torchvision.datasets, kind)
    stand_in(name, read, monkeypatch)
    x, y, x_test, y_test = load_images(name, "some/data")
    same(x, torch.from_numpy(dataset(4).data))
    same(x_test, torch.from_numpy(dataset(5).data))
    assert (y.tolist(), y_test.tolist()) == ([0, 1, 2, 3], [0, 1, 2, 3, 4])
    assert y.dtype == torch.int64 and x.is_contiguous()


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_a_run_on_a_benchmark_matches_the_plain_program(name, tiny, tmp_path, monkeypatch):
    """Its classes have torchvision's names, or are digits. SVHN's are not flipped."""
    classes = {"classes": SHAPES} if name == "cifar10" else {}
    stand_in(name, lambda root, part: dataset(90, **classes), monkeypatch)
    settings = {**tiny, "data": name, "flip": None}
    run(mixmatch_scar, settings)
    expected = plain_run(mixmatch_scar, {**settings, "flip": name == "cifar10"})
    check_run(expected, tmp_path / "run")


@pytest.mark.parametrize("name", ["cifar10", "stl10"])
def test_a_benchmark_has_4000_labels_unless_told(name, tiny, monkeypatch, capsys):
    """Where some images have none, too."""
    labels = np.where(np.arange(90) < 50, np.arange(90) % 10, -1)
    both = SimpleNamespace(data=dataset(90).data, labels=labels)
    stand_in(name, lambda root, part: both, monkeypatch)
    sentence = refusal(capsys, vat_scar, {**tiny, "data": name, "num_labeled": None})
    assert sentence.startswith("--num-labeled 4000 is too many: 50 labels")


@pytest.mark.parametrize(
    "error, sentence",
    [
        (OSError("no network"), "cifar10 is not in .* could not be downloaded .no network."),
        (RuntimeError("File not found"), "cifar10 is not in .* --data synthetic, which needs none"),
        (ImportError("no scipy"), "--data cifar10: no scipy; install it"),
    ],
)
def test_an_unavailable_benchmark_is_refused(error, sentence, tmp_path, monkeypatch):
    """What was in its folder stays. A tilde means the home directory, as for torchvision."""

    def fail(root, part, download=False):
        if not download and not isinstance(error, ImportError):
            raise RuntimeError("Dataset not found")
        raise error

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".lock").write_text("mine")
    stand_in("cifar10", fail, monkeypatch)
    with pytest.raises(ValueError, match=sentence):
        load_images("cifar10", "~/data")
    assert (tmp_path / "data" / ".lock").read_text() == "mine"


def test_of_runs_that_start_together_one_downloads(tmp_path, monkeypatch):
    """The others wait, and read what it has unpacked. What is there is read without writing."""
    downloads, archive = [], tmp_path / "not" / "yet" / "there" / "archive"

    def slow(root, part, download=False):
        if not archive.exists():
            if not download:
                raise RuntimeError("Dataset not found")
            downloads.append(part)
            time.sleep(0.2)
            assert not archive.exists()
            archive.write_text("whole")
        return dataset()

    stand_in("svhn", slow, monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: load_images("svhn", archive.parent), range(4)))
    assert downloads == ["train"]
    (archive.parent / ".lock").unlink()
    load_images("svhn", archive.parent)
    assert not (archive.parent / ".lock").exists()


# --------------------------------------------------------------------------------------- the tables


@pytest.fixture(scope="session")
def tables():
    return module_at(HERE / "results" / "tables.py")


def counts(right, kept, wrong, rejected, **more):
    named = {"kept": kept, "kept_correct": right, "rejected": rejected, "rejected_wrong": wrong}
    return {**named, **more}


def accuracy(right):
    return 100 * right.count("1") / len(right)


def write_run(root, name, before, after, args=(), **changes):
    """What a finished FixMatch run leaves for the tables, on images that are named by two classes.

    before, after: a 1 for each image that theta~, the final model, took for what it is, or a 0.
    """
    # fmt: off
    settings = {
        "data": "cifar10", "image_size": 32, "num_labeled": 4000, "val": 0, "depth": 28,
        "width": 2, "epochs": 2, "lr": 0.03, "seed": 0, "out": name, "pretrained": None,
    }
    result = {
        "method": "fixmatch", "data": "cifar10", "images": "a hash", "scored_on": "test",
        "select": "fgsm", "eps": 1.0, "seed": 0, "theta": before,
        "pretrain_accuracy": accuracy(before), "final_accuracy": accuracy(after),
        "selection": counts(40, 50, 0, 0, added=50),
        "table2": [{"eps": 1.0, **counts(9, 10, 2, 8, confidence_correct=8)}],
        "device": "a CPU", "ranks": 1, "seconds": 1800, "versions": {"torch": "2.11"},
        "args": {**settings, **dict(args)},
    }
    # fmt: on
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({**result, **changes}))
    lines = ["file,true_label,label,final_label"]
    for n, (first, last) in enumerate(zip(before, after)):
        true = "ab"[n % 2]
        wrong = "ba"[n % 2]
        lines.append(f"{n}.png,{true},{(wrong, true)[int(first)]},{(wrong, true)[int(last)]}")
    (folder / "test.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def made(tables, tmp_path, capsys):
    """Runs tables.py over tmp_path: its exit code, what it printed, the rows of its tables."""

    def make():
        code = tables.main([str(tmp_path)])
        text = capsys.readouterr().out
        assert (tmp_path / "tables.md").read_text(encoding="utf-8") == text
        rows, heading = {}, []
        for line in text.splitlines():
            if line.startswith("| "):
                cells = [cell.strip() for cell in line[1:-1].split("|")]
                heading = cells if cells[0].startswith("Table") else heading
                rows[cells[0]] = dict(zip(heading[1:], cells[1:]))
        return SimpleNamespace(code=code, text=text, rows=rows)

    return make


SCAR = "FixMatch + SCAR (eps 1)"
CONTROL = "FixMatch + nothing (control)"


def test_tables_have_means_deviations_and_gains_paired_by_theta(tmp_path, made):
    """Of ten images theta~ has 5, 4, 6 right, SCAR 8, 5, 5, the control 7 and 4; seed 10 has none.

    SCAR over theta~: 3 images and none the other way, 2 and 1, 0 and 1, so z = 3 / sqrt(3) and so
    on. Over the control 2 and 1, 2 and 1. The control over theta~: 2 and 0, 0 and 0.
    """
    theta = {0: "1111100000", 3: "1111000000", 10: "1111110000"}
    scar = {0: "1111111100", 3: "0111110000", 10: "1111100000"}
    control = {0: "1111110010", 3: "1111000000"}
    # right and kept; right by confidence; wrong and rejected
    table2 = {0: (9, 10, 10, 1, 2), 3: (15, 20, 10, 1, 4), 10: (30, 30, 15, 0, 0)}
    added = {0: (40, 50), 3: (30, 40), 10: (45, 45)}
    for seed in theta:
        right, kept, confident, wrong, rejected = table2[seed]
        row = {"eps": 1.0, **counts(right, kept, wrong, rejected, confidence_correct=confident)}
        selection = counts(*added[seed], 0, 0, added=added[seed][1])
        more = {"seed": seed, "table2": [row]}
        write_run(tmp_path, f"scar{seed}", theta[seed], scar[seed], selection=selection, **more)
        if seed in control:
            eps = 1.0 if seed == 0 else 0.0  # means nothing here
            more |= {"select": "none", "eps": eps, "selection": counts(0, 0, 0, 0, added=0)}
            write_run(tmp_path, f"{9 - seed}control", theta[seed], control[seed], **more)
    result = made()
    assert result.code == 0 and "error" not in result.text
    assert result.rows["FixMatch"] == {
        "seeds": "0 3 10", "paper": "94.13", "ours": "50.00 ± 10.00", "gain over pretraining": "",
        "z": "", "gain over control": "", "labels added": "", "correct, where known (%)": "",
    }  # fmt: skip
    heading = "| Table 1: accuracy (%) | seeds | paper | ours | gain over pretraining | z |"
    heading += " gain over control | z | labels added | correct, where known (%) |\n"
    assert heading in result.text
    line = "| 0 3 10 | 95.17 | 60.00 ± 17.32 | 10.00 ± 20.00 | 1.7, 0.6, -1.0 |"
    line += " 10.00 ± 0.00 (seeds 0 3) | 0.6, 0.6 | 45 ± 5 | 85.00 ± 13.23 |"
    assert f"| {SCAR} {line}\n" in result.text
    line = "| 0 3 |  | 55.00 ± 21.21 | 10.00 ± 14.14 | 1.4, 0.0 |  |  | 0 ± 0 |  |"
    assert f"| {CONTROL} {line}\n" in result.text
    assert result.rows["FixMatch (eps 1)"] == {
        "seeds": "0 3 10",
        "sensitivity, paper": "99.59 (6385/6411)",
        "specificity, paper": "15.63 (561/3589)",
        "images kept": "20 ± 10",
        "correct among kept (%): sensitivity": "88.33 ± 12.58",
        "correct among as many by confidence (%)": "66.67 ± 28.87",
        "wrong among rejected (%): specificity": "37.50 ± 17.68",
    }
    assert re.search(r"- FixMatch: .*lr 0.03, .*; on a CPU, torch 2.11\n", result.text)
    missing = re.findall("- missing: (.*)\n", result.text)
    assert missing == ["a control from the theta~ of scar10"]


PAPER = {  # Table 1: accuracy; Table 2: sensitivity and specificity
    "VAT": ("85.25",),
    "VAT + SCAR (eps 6)": ("86.79",),
    "MixMatch": ("89.99",),
    "MixMatch + SCAR (eps 1)": ("92.99",),
    "FixMatch": ("94.13",),
    "FixMatch + SCAR (eps 1)": ("95.17",),
    "VAT (eps 1)": ("92.22 (7587/8227)", "47.10 (835/1773)"),
    "VAT (eps 2)": ("95.76 (6543/6833)", "37.42 (1185/3167)"),
    "VAT (eps 3)": ("97.48 (5494/5636)", "30.55 (1333/4364)"),
    "VAT (eps 4)": ("98.35 (4716/4795)", "26.81 (1396/5205)"),
    "VAT (eps 6)": ("98.93 (3684/3724)", "22.86 (1435/6276)"),
    "MixMatch (eps 1)": ("98.91 (6054/6124)", "24.13 (936/3879)"),
    "FixMatch (eps 1)": ("99.59 (6385/6411)", "15.63 (561/3589)"),
}


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"data": "folder"},
        {"val": 5},
        {"num_labeled": 250},
        {"image_size": 16},
        {"depth": 10},
        {"width": 1},
    ],
    ids=str,
)
def test_rows_are_in_the_papers_order_beside_its_figures_if_its_settings_are_the_same(
    other, tmp_path, made
):
    """Of each method: theta~, the control, every pseudo-label, SCAR, the most confident."""
    expected = {"Table 1: accuracy (%)": [], "Table 2": []}
    for name in ("VAT", "MixMatch", "FixMatch"):
        for n, (select, eps) in enumerate(
            [("confidence", 1.0), ("none", 1.0), ("fgsm", 0.0), ("fgsm", 6.0), ("fgsm", 1.0)]
        ):
            more = {"method": name.lower(), "select": select, "eps": eps, "args": other}
            more["table2"] = [{"eps": 6 - n, **counts(9, 10, 2, 8, confidence_correct=8)}]
            write_run(tmp_path, f"{name}{n}", "10", "11", **more)
        expected["Table 1: accuracy (%)"] += [
            name,
            f"{name} + nothing (control)",
            f"{name} + every pseudo-label (eps 0)",
            f"{name} + SCAR (eps 1)",
            f"{name} + SCAR (eps 6)",
            f"{name} + the most confident (as many as eps 1 keeps)",
        ]
        expected["Table 2"] += [f"{name} (eps {eps})" for eps in (2, 3, 4, 5, 6)]
    result = made()
    assert list(result.rows) == [
        name for heading, rows in expected.items() for name in (heading, *rows)
    ]
    for name, row in result.rows.items():
        columns = [column for column in row if "paper" in column]
        figures = tuple(row[column] for column in columns)
        if "Table" not in name:
            assert figures == (() if other else PAPER.get(name, ("",) * len(columns))), name


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"args": {"epochs": 5}}, "epochs: 2 (a); 5 (b)\n"),
        ({"args": {"lr": 0.1}}, "lr: 0.03 (a); 0.1 (b)"),
        ({"args": {"width": 1}}, "width: 2 (a); 1 (b)"),
        ({"images": "another"}, "images: a hash (a); another (b)"),
        ({"ranks": 2}, "ranks: 1 (a); 2 (b)"),
        ({"seed": 0, "theta": "another"}, "theta~ of seed 0: 10 (a); another (b)"),
        ({"theta": "10", "select": "confidence"}, "seed of theta~ 10: 0 (a); 1 (b)"),
        ({"seed": 0, "theta": "10"}, f"folder of {SCAR} from theta~ 10: a (a); b (b)"),
    ],
    ids=str,
)
def test_runs_that_differ_are_named_and_not_averaged(change, sentence, tmp_path, made):
    """The method is left out; others are not."""
    write_run(tmp_path, "a", "10", "11")
    write_run(tmp_path, "b", "01", "11", **{"seed": 1, **change})
    write_run(tmp_path, "c", "10", "11", method="vat")
    result = made()
    assert result.code == 1 and result.text.count("error: ") == 1
    assert f"FixMatch is left out; its runs differ in {sentence}" in result.text
    assert "| FixMatch" not in result.text and "| VAT |" in result.text


def test_runs_may_differ_in_what_changes_no_result(tmp_path, made):
    write_run(tmp_path, "a", "10", "11")
    free = dict.fromkeys("out data_dir device compile tensorboard table2_eps pretrained".split(), 0)
    write_run(tmp_path, "b", "00", "11", seed=1, args=free)
    result = made()
    assert result.code == 0 and result.rows[SCAR]["seeds"] == "0 1"
    assert "- missing: the run that pretrained the theta~ of b\n" in result.text


def test_other_data_and_validation_images_have_tables_of_their_own(tmp_path, made):
    write_run(tmp_path, "a", "10", "11")
    write_run(tmp_path, "b", "10", "11", scored_on="validation", args={"val": 5})
    write_run(tmp_path, "c", "10", "11", data="cifar10-jpeg")
    result = made()
    titles = ["CIFAR-10 (JPEG), test images", "cifar10, test images", "cifar10, validation images"]
    assert re.findall("## (.*)\n", result.text) == titles and result.code == 0


def test_labels_that_cannot_be_checked_are_counted_as_added_alone(tmp_path, made):
    write_run(tmp_path, "a", "10", "11", selection=counts(6, 8, 0, 0, added=85))
    row = made().rows[SCAR]
    assert (row["labels added"], row["correct, where known (%)"]) == ("85", "75.00")


def test_a_damaged_result_is_named_and_the_others_make_the_tables(tmp_path, made):
    damages = ["", "{}", "[]", '{"method": "fixmatch"}']
    for n, damage in enumerate(damages):
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / "result.json").write_text(damage)
    write_run(tmp_path, "null", "10", "11", final_accuracy=None)
    write_run(tmp_path, "scar", "10", "11")
    result = made()
    assert result.code == 1 and SCAR in result.rows
    for name in ("0", "1", "2", "3", "null"):
        assert f"error: {tmp_path}/{name}/result.json is damaged" in result.text


def test_a_folder_without_finished_runs_is_refused(tables, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        tables.main([str(tmp_path)])
    assert refused.value.code == 2
    assert f"{tmp_path} holds no finished run" in capsys.readouterr().err


STUDIES = sorted({path.parent.parent for path in HERE.glob("results/*/*/result.json")})
assert STUDIES


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_results_have_the_tables_of_their_files(study, tables, tmp_path, capsys):
    shutil.copytree(study, tmp_path / "study")
    assert tables.main([str(tmp_path / "study")]) == 0
    printed = capsys.readouterr().out.split("\n\n")
    text = (HERE / "results" / "README.md").read_text(encoding="utf-8")
    assert printed[1].startswith("| Table 1") and printed[1] in text
    assert printed[2].startswith("| Table 2") and printed[2] in text


# --------------------------------------------------------------------------- the README, run_all.sh

README = (HERE / "README.md").read_text(encoding="utf-8")


@each_script
def test_a_scripts_header_has_the_requirements_and_commands_that_are_taken(script):
    """SCAR and its control."""
    text = Path(script.__file__).read_text(encoding="utf-8")
    header = re.match(
        r'# /// script\n# requires-python = ">=(.*)"\n# dependencies = (.*)\n# ///\n', text
    )
    lines = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert json.loads(header[2]) == [line for line in lines if not line.startswith("#")]
    assert f"Python {header[1]} or later" in README
    commands = re.findall(r"^ +python \w+_scar\.py (.*)$", script.__doc__.replace("\\\n", ""), re.M)
    scar, control = [script.parse_args(shlex.split(command)) for command in commands]
    assert (scar.epochs, scar.select, scar.pretrained) == (200, "fgsm", None)
    assert (control.epochs, control.select) == (200, "none")
    assert control.pretrained == f"{scar.out}/pretrain.pt"


def test_readmes_options_and_commands_are_taken():
    known = {"--nproc-per-node", "--array", "--gpus", "--time", "--wrap", "--help"}
    known |= {"--no-flip", "--no-compile"}
    for script in SCRIPTS:
        known |= {"--" + name.replace("_", "-") for name in vars(script.parse_args([]))}
    assert set(re.findall(r"--[a-z][a-z0-9-]+", README)) <= known
    commands = re.findall(r"^python (\w+)_scar\.py (.*)$", README.replace("\\\n", " "), re.M)
    assert len(commands) == 5
    for method, options in commands:
        SCRIPTS[NAMES.index(method)].parse_args(shlex.split(options))


def readmes_code(word):
    """The one block of Python in the README that has the word in it."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (code,) = [block for block in blocks if word in block]
    return code


def test_readmes_code_to_copy_runs():
    names = {}
    exec(readmes_code("x_adv"), names)
    assert 0 < (names["x_adv"] - to_float(names["x_test"][:8])).abs().max() < 1.001 / 255
    assert names["stats"]["kept"] == names["keep"].sum() and names["most_confident"].sum() == 4


def test_readmes_code_for_a_model_classifies(finished, tmp_path, monkeypatch, capsys):
    settings = finished(fixmatch_scar)
    shutil.copytree(settings["out"], tmp_path / "runs" / "fixmatch__cifar10__fgsm-eps1__seed0")
    row = read_rows(Path(settings["out"], "selection.csv"))[17]
    shutil.copy(Path(settings["data_dir"], row["file"]), tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    exec(readmes_code("model.pt"), {})
    assert capsys.readouterr().out.splitlines()[-1] == row["final_label"]


def start_run_all(*options, **variables):
    """Starts run_all.sh with these of its variables and no other."""
    names = "SEEDS EPOCHS DATA DATA_DIR OUT GPUS METHODS CONTROLS PYTHON".split()
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment.update({"PYTHON": sys.executable, "LC_ALL": "C.UTF-8", **variables})
    command = ["bash", str(HERE / "run_all.sh"), *map(str, options)]
    return subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, encoding="utf-8")


def run_all(*options, **variables):
    """Its exit code, output and errors."""
    child = start_run_all(*options, **variables)
    out, errors = child.communicate(timeout=300)
    return SimpleNamespace(code=child.returncode, out=out, errors=errors)


@pytest.mark.parametrize(
    "option",
    "--data --data-dir=x --epochs --seed=3 --select --eps=2 --pretrained --out".split(),
)
def test_run_all_refuses_options_that_it_sets_itself(option, tmp_path):
    done = run_all("--width", 1, option, OUT=str(tmp_path / "out"))
    assert done.code == 2 and re.fullmatch("error: .*\n", done.errors)
    assert not any(tmp_path.iterdir())


def test_run_all_makes_runs_a_control_and_the_tables(pictures, tmp_path):
    """By the scripts, on own images, in folders that are named as the scripts name them."""
    settings = {name: TINY[name] for name in TINY if name not in ("data", "epochs")}
    variables = {"SEEDS": "3", "METHODS": "vat", "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    variables |= {"DATA": "folder", "DATA_DIR": f"{pictures}/", "EPOCHS": "1"}
    done = run_all(*words(settings), **variables)
    assert done.code == 0, done.errors
    assert done.out.endswith((tmp_path / "tables.md").read_text(encoding="utf-8"))
    folders = ["vat__pictures__fgsm-eps6__seed3", "vat__pictures__none-eps6__seed3"]
    assert sorted(path.parent.name for path in tmp_path.glob("*/result.json")) == folders
    assert "| VAT + SCAR (eps 6) |" in done.out and "| VAT + nothing (control) |" in done.out


@pytest.fixture
def commands(tmp_path):
    """Runs run_all.sh with a stand-in for Python, and adds the commands that it gave.

    body: what the stand-in does besides noting its command.
    """

    def start(*options, body="", **variables):
        lines = ["#!/usr/bin/env bash", "case $1 in *tables.py) exit 0 ;; esac"]
        lines += [f'echo "$@ ${{CUDA_VISIBLE_DEVICES-all}}" >> "{tmp_path}/log"', body]
        (tmp_path / "python").write_text("\n".join(lines) + "\n")
        (tmp_path / "python").chmod(0o755)
        own = {"PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "out")}
        done = run_all(*options, **own, **variables)
        done.given = []
        for line in (tmp_path / "log").read_text().splitlines():
            script, *argv, gpu = line.split()
            method = Path(script).stem.removesuffix("_scar")
            args = SCRIPTS[NAMES.index(method)].parse_args(argv)
            done.given.append(SimpleNamespace(method=method, gpu=gpu, **vars(args)))
        return done

    return start


def test_run_all_runs_the_papers_experiments(commands, monkeypatch):
    """Each method and its control for three seeds, 200 epochs on CIFAR-10, at the paper's eps.

    What the README's first commands have trained is what it finds: same settings, same folder.
    """
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    done = commands()
    assert done.code == 0
    assert [(c.seed, c.method, c.eps, c.select) for c in done.given] == [
        (seed, method, eps, select)
        for seed in (0, 1, 2)
        for method, eps in (("vat", 6), ("mixmatch", 1), ("fixmatch", 1))
        for select in ("fgsm", "none")
    ]
    for c in done.given:
        assert (c.epochs, c.data, c.data_dir, c.gpu) == (200, "cifar10", "data", "all")
    commands_alone = re.findall(r"^python (\w+)_scar\.py (--eps . --epochs 200)$", README, re.M)
    assert len(commands_alone) == 3
    for method, options in commands_alone:
        alone = vars(SCRIPTS[NAMES.index(method)].parse_args(options.split()))
        (same,) = [c for c in done.given if (c.method, c.seed, c.select) == (method, 0, "fgsm")]
        out = str(Path(same.out).parent / Path(alone["out"]).name)
        assert {**alone, "out": out, "method": method, "gpu": "all"} == vars(same)


def test_run_all_hands_variables_and_options_on(commands):
    """Controls start from SCAR's pretraining; eps6, SCAR's own with VAT, is not repeated."""
    more = {"DATA": "svhn", "DATA_DIR": "some/data", "EPOCHS": "7", "SEEDS": "3", "GPUS": "5"}
    more |= {"CONTROLS": "none confidence eps0 eps6 eps2.5", "METHODS": "vat"}
    given = commands("--width", 1, "--table2-eps", 2, **more).given
    kinds = [("fgsm", 6), ("none", 6), ("confidence", 6), ("fgsm", 0), ("fgsm", 2.5)]
    assert [(c.select, c.eps) for c in given] == kinds
    theta = f"{given[0].out}/pretrain.pt"
    for c, pretrained in zip(given, [None, theta, theta, theta, theta]):
        assert (c.epochs, c.data, c.data_dir, c.seed) == (7, "svhn", "some/data", 3)
        assert (c.width, c.pretrained, c.gpu) == (1, pretrained, "5")
        assert Path(c.out).name == f"vat__svhn__{c.select}-eps{c.eps:g}__seed3"
        assert c.table2_eps == ([2.0] if pretrained is None else [1.0])  # theta~'s is known


@pytest.mark.parametrize("gpus", ["", "4 7"])
@pytest.mark.parametrize("what, count", [("*vat*", 5), ("*mixmatch*none*", 6)])
def test_run_all_goes_on_after_a_failure_and_fails(what, count, gpus, commands):
    """But not with the control of what failed."""
    done = commands(body=f"case $* in {what}) exit 1 ;; esac", SEEDS="3", GPUS=gpus)
    assert done.code == 1 and len(done.given) == count
    assert f"failed: {what.strip('*').split('*')[0]} 3\n" in done.errors


def test_run_all_spreads_over_gpus_one_run_at_a_time_on_each(commands, tmp_path):
    """A control is on the GPU of its pretraining, after it."""
    log = f'"{tmp_path}/on-$CUDA_VISIBLE_DEVICES"'
    body = f"echo start >> {log}; sleep 0.1; echo end >> {log}"
    given = commands(body=body, SEEDS="0 1", GPUS="4,7").given
    assert len(given) == 12
    for gpu in ("4", "7"):
        own = [(c.method, c.seed, c.select) for c in given if c.gpu == gpu]
        assert own and (tmp_path / f"on-{gpu}").read_text() == len(own) * "start\nend\n"
        for scar, control in zip(own[::2], own[1::2]):
            assert scar[:2] == control[:2] and (scar[2], control[2]) == ("fgsm", "none")


@pytest.mark.parametrize("gpus", ["", "4 7"])
def test_run_all_stopped_ends_its_runs(gpus, tmp_path):
    (tmp_path / "python").write_text(f'#!/bin/sh\necho > "{tmp_path}/pid-$$"; exec sleep 600\n')
    (tmp_path / "python").chmod(0o755)
    child = start_run_all(PYTHON=str(tmp_path / "python"), OUT=str(tmp_path / "out"), GPUS=gpus)
    while len(pids := list(tmp_path.glob("pid-*"))) < max(1, len(gpus.split())):
        assert child.poll() is None
        time.sleep(0.05)
    child.terminate()
    _, errors = child.communicate(timeout=60)
    assert errors == "stopped; rerun the command to resume\n" and child.returncode == 1
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            for _ in range(200):  # a process takes a moment to end
                os.kill(int(pid.name.removeprefix("pid-")), 0)
                time.sleep(0.05)
