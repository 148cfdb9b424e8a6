"""The tests: no network, no GPU; those for CUDA skip themselves where there is none."""

import ast
import copy
import csv
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import fixmatch_scar
import mixmatch_scar
import vat_scar
from common import WideResNet, fgsm, load_images, split_labeled
from fixmatch_scar import RANDAUGMENT_OPS, fixmatch_loss, randaugment_op
from mixmatch_scar import mixmatch_loss
from vat_scar import vat_direction, vat_loss

SCRIPTS = [vat_scar, mixmatch_scar, fixmatch_scar]
HERE = Path(__file__).parent
SMALL = (
    "--data synthetic --depth 10 --width 1 --num-labeled 100 --batch-size 4 --epochs 2 "
    "--steps-per-epoch 4"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(scope="session")
def images():
    """The synthetic set: (x_train, y_train, x_test, y_test)."""
    return load_images("synthetic", None)


@pytest.fixture
def few_images(images, monkeypatch):
    """Makes the scripts see 300 training and 100 test images of the synthetic set, for speed."""
    x_train, y_train, x_test, y_test = images
    few = x_train[:300], y_train[:300], x_test[:100], y_test[:100]
    for script in SCRIPTS:
        monkeypatch.setattr(script, "load_images", lambda data, data_dir: few)
    return few


def plain_net():
    """A small network without batch norm, so that images do not influence each other."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 15 * 15, 10)
    )


# ------------------------------------------------------------------------------------------ network


def test_parameter_count():
    assert sum(p.numel() for p in WideResNet(10, 28, 2).parameters()) == 1_467_610


def plain_wide_resnet(weights, x, depth, training):
    """The network once more, straight from its description, on a state_dict."""

    def bn_lrelu(x, name):
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        if training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        x = x * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]
        return torch.where(x > 0, x, 0.1 * x)

    x = F.conv2d(x, weights["conv.weight"], padding=1)
    per_group = (depth - 4) // 6
    for i in range(3 * per_group):
        stride = 2 if i in (per_group, 2 * per_group) else 1
        y = bn_lrelu(x, f"blocks.{i}.bn1")
        residual = y if i == 0 else x
        if f"blocks.{i}.shortcut.weight" in weights:
            residual = F.conv2d(residual, weights[f"blocks.{i}.shortcut.weight"], stride=stride)
        y = F.conv2d(y, weights[f"blocks.{i}.conv1.weight"], stride=stride, padding=1)
        y = F.conv2d(bn_lrelu(y, f"blocks.{i}.bn2"), weights[f"blocks.{i}.conv2.weight"], padding=1)
        x = residual + y
    x = bn_lrelu(x, "bn").mean((2, 3))
    return x @ weights["linear.weight"].T + weights["linear.bias"]


@pytest.mark.parametrize("depth, width", [(10, 1), (16, 2)])
@pytest.mark.parametrize("training", [False, True])
def test_wiring(depth, width, training):
    torch.manual_seed(0)
    model = WideResNet(7, depth, width).double()
    for module in model.modules():  # statistics and scales unlike their initial ones
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.rand(5, 3, 32, 32, dtype=torch.double)
    expected = plain_wide_resnet(weights, x, depth, training)
    torch.testing.assert_close(model.train(training)(x), expected)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_gradients_reach_every_parameter(script, images, precision):
    """Also under autocast, which hands weights on from a forward to the next."""
    torch.manual_seed(0)
    model = WideResNet(10, 10, 1)
    args = script.parse_args(["--precision", precision])
    x, y = images[0][:8], images[1][:8]
    loss, _ = script.batch_loss(model, x, y, x, 1.0, args)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_initial_weights():
    torch.manual_seed(0)
    model = WideResNet(10, 28, 2)
    weight = model.blocks[-1].conv2.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.02)
    assert model.linear.weight.std().item() == pytest.approx(math.sqrt(2 / (128 + 10)), rel=0.1)
    assert not model.linear.bias.any()


@pytest.mark.parametrize("depth", [4, 9, 11, 27])
def test_depth_must_be_6n_plus_4(depth):
    with pytest.raises(ValueError, match="6n \\+ 4"):
        WideResNet(10, depth, 1)


# ----------------------------------------------------------------------------------- data and split


def test_synthetic_images(images):
    x_train, y_train, x_test, y_test = images
    assert x_train.shape == (6000, 3, 32, 32) and x_test.shape == (1000, 3, 32, 32)
    assert x_train.dtype == torch.uint8 and y_train.dtype == torch.int64
    assert torch.bincount(y_train).tolist() == [600] * 10
    assert torch.bincount(y_test).tolist() == [100] * 10
    assert torch.equal(load_images("synthetic", "nowhere")[0], x_train)


def write_folder(root, classes=("ant", "bee")):
    for part in ("train", "test"):
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(3):
                pixels = np.full((32, 32, 3), 60 * label + 10 * i, np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def test_folder_images(tmp_path):
    root = write_folder(tmp_path)
    Image.new("L", (50, 40), 200).save(root / "test" / "bee" / "9.jpg")  # grey, another size
    x_train, y_train, x_test, y_test = load_images("folder", root)
    assert y_train.tolist() == [0, 0, 0, 1, 1, 1] and y_test.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert x_train[:, 1, 7, 9].tolist() == [0, 10, 20, 60, 70, 80]
    assert x_test.shape == (7, 3, 32, 32) and (x_test[-1].int() - 200).abs().max() <= 1


def test_cifar10_archive(tmp_path, monkeypatch):
    """load_images hands on what torchvision's CIFAR10 holds, channels first."""

    class FakeCifar10:
        def __init__(self, root, train, download):
            self.data = np.arange(2 * 32 * 32 * 3).reshape(2, 32, 32, 3).astype(np.uint8)
            self.targets = [3, 5] if train else [7, 1]

    monkeypatch.setattr(common, "CIFAR10", FakeCifar10)
    x_train, y_train, _, y_test = load_images("cifar10", tmp_path)
    assert y_train.tolist() == [3, 5] and y_test.tolist() == [7, 1]
    assert torch.equal(
        x_train[1, 2], torch.from_numpy(FakeCifar10("", True, True).data[1, :, :, 2])
    )


def test_split_is_balanced_disjoint_and_complete():
    y = torch.arange(10).repeat(50)
    labeled, unlabeled = split_labeled(y, 43, 0)
    assert sorted(torch.cat([labeled, unlabeled]).tolist()) == list(range(500))
    assert len(labeled) == 43 and sorted(torch.bincount(y[labeled]).tolist()) == [4] * 7 + [5] * 3
    assert torch.equal(labeled, split_labeled(y, 43, 0)[0])
    assert not torch.equal(labeled, split_labeled(y, 43, 1)[0])


@pytest.mark.parametrize(
    "num_labeled, sentence", [(2, "too few"), (12, "class 2 has 2 images"), (22, "no unlabeled")]
)
def test_split_refuses(num_labeled, sentence):
    y = torch.tensor([0] * 10 + [1] * 10 + [2] * 2)
    with pytest.raises(ValueError, match=sentence):
        split_labeled(y, num_labeled, 0)


# --------------------------------------------------------------------------------------------- FGSM


def test_fgsm_is_its_formula():
    model = plain_net()
    x, y, eps = torch.rand(6, 3, 32, 32), torch.arange(6), 0.02
    expected = []
    for image, label in zip(x, y):
        image = image[None].clone().requires_grad_()
        F.cross_entropy(model(image), label[None]).backward()
        expected.append((image + eps * image.grad.sign()).clamp(0, 1).detach())
    for parameter in model.parameters():
        parameter.grad = None
    attacked = fgsm(model, x, y, eps)
    # a gradient component can be so near zero that its sign is a matter of rounding
    assert (attacked != torch.cat(expected)).float().mean() < 1e-3
    assert (attacked - x).abs().max() <= eps + 1e-6 and attacked.min() >= 0 and attacked.max() <= 1
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not attacked.requires_grad


def test_fgsm_moves_images_of_a_very_confident_model():
    class Confident(nn.Module):
        def forward(self, x):
            score = 1e3 * (x.mean((1, 2, 3)) - 0.4)  # margin 200: float32 softmax is exactly 1
            return torch.stack([score, -score], 1)

    x = torch.full((2, 3, 32, 32), 0.5)
    attacked = fgsm(Confident(), x, torch.tensor([0, 0]), 0.1)
    torch.testing.assert_close(attacked, torch.full_like(x, 0.4))


def test_fgsm_computes_in_full_precision():
    """Whatever the caller does: autocast around it, TF32 allowed."""

    class Witness(nn.Conv2d):
        def forward(self, x):
            backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv
            seen.append([backend.fp32_precision for backend in backends])
            return super().forward(x).mean((2, 3))

    torch.manual_seed(0)
    seen, model, x, y = [], Witness(3, 10, 3), torch.rand(4, 3, 8, 8), torch.arange(4)
    expected = fgsm(model, x, y, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        attacked = fgsm(model, x, y, 0.1)
    assert attacked.dtype == torch.float32 and torch.equal(attacked, expected)
    assert seen == [["ieee", "ieee"]] * 2


def test_fgsm_leaves_the_model_as_it_was():
    model = WideResNet(10, 10, 1).train()
    model.blocks[1].eval()  # a frozen block
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    precision = torch.backends.cudnn.conv.fp32_precision
    with torch.no_grad():
        fgsm(model, torch.rand(2, 3, 32, 32), torch.tensor([1, 2]), 0.1)
    with pytest.raises(RuntimeError):
        fgsm(model, torch.rand(2, 4, 32, 32), torch.tensor([1, 2]), 0.1)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.backends.cudnn.conv.fp32_precision == precision


# ------------------------------------------------------------------------------------- augmentation


def pillow_op(image, name, value):
    """The reference: RandAugment's operations by Pillow alone."""
    width, height = image.size

    def affine(*coefficients):
        return image.transform(image.size, Image.Transform.AFFINE, coefficients)

    operations = {
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Brightness": lambda: ImageEnhance.Brightness(image).enhance(value),
        "Color": lambda: ImageEnhance.Color(image).enhance(value),
        "Contrast": lambda: ImageEnhance.Contrast(image).enhance(value),
        "Equalize": lambda: ImageOps.equalize(image),
        "Identity": lambda: image,
        "Posterize": lambda: ImageOps.posterize(image, int(value)),
        "Rotate": lambda: image.rotate(value),
        "Sharpness": lambda: ImageEnhance.Sharpness(image).enhance(value),
        "ShearX": lambda: affine(1, value, 0, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, value, 1, 0),
        "Solarize": lambda: ImageOps.solarize(image, 256 * value),
        "TranslateX": lambda: affine(1, 0, value * width, 0, 1, 0),
        "TranslateY": lambda: affine(1, 0, 0, 0, 1, value * height),
    }
    return operations[name]()


@pytest.fixture(scope="module")
def varied_images(images):
    """Images of different contrast, smoothness and range, some of one colour."""
    x = images[0][:240].clone()
    x[40:80] = F.avg_pool2d(x[40:80].float(), 5, 1, 2).to(torch.uint8)  # smooth
    x[80:120] = x[80:120] // 8 + 90  # faint
    x[120:160] = x[120:160] // 64 * 85  # four levels, from 0 to 255
    x[160:170] = torch.arange(30).view(10, 3, 1, 1) * 8  # one colour
    return x


@pytest.mark.parametrize("index", range(14), ids=[name for name, _, _ in RANDAUGMENT_OPS])
def test_randaugment_is_pillows(varied_images, index):
    x = varied_images
    name, low, high = RANDAUGMENT_OPS[index]
    level = torch.rand(len(x), generator=torch.Generator().manual_seed(index))
    level[:2] = torch.tensor([0.0, 1.0])
    ours = randaugment_op(x, torch.full((len(x),), index), level).permute(0, 2, 3, 1).int()
    assert ours.shape == (len(x), 32, 32, 3)
    pillows = []
    for image, value in zip(
        x.permute(0, 2, 3, 1).numpy(), (low + (high - low) * level.double()).tolist()
    ):
        pillows.append(np.asarray(pillow_op(Image.fromarray(image), name, value)))
    difference = (ours - torch.from_numpy(np.stack(pillows)).int()).abs()
    pixels_off = (difference.amax(3) > 0).float().mean().item()
    if name.startswith(("Rotate", "Shear", "Translate")):
        assert pixels_off <= 0.01
    else:
        assert difference.max() <= 1 and pixels_off <= 0.001
    if name != "Identity":
        assert (ours != x.permute(0, 2, 3, 1)).any()


def test_randaugment_mixes_operations_in_a_batch(varied_images):
    """An image gets its own operation, whatever the others get."""
    x = varied_images[:140]
    op, level = torch.arange(140) % 14, torch.linspace(0, 1, 140)
    together = randaugment_op(x, op, level)
    alone = [randaugment_op(x[i : i + 1], op[i : i + 1], level[i : i + 1]) for i in range(140)]
    assert torch.equal(together, torch.cat(alone))


def test_randaugment_ops_are_table_12():
    assert [name for name, _, _ in RANDAUGMENT_OPS] == (
        "AutoContrast Brightness Color Contrast Equalize Identity Posterize Rotate Sharpness "
        "ShearX ShearY Solarize TranslateX TranslateY"
    ).split()


@pytest.mark.parametrize("script", SCRIPTS)
def test_weak_augment_flips_and_moves(script):
    """Every output is one of the 2 * 9 * 9 crops of the reflected image; all of them occur."""
    image = torch.arange(3 * 32 * 32).view(3, 32, 32).remainder(251).to(torch.uint8)
    padded = F.pad(image.float()[None], (4, 4, 4, 4), mode="reflect")[0].to(torch.uint8)
    crops = {}
    for flip in (False, True):
        for i in range(9):
            for j in range(9):
                crop = padded[:, i : i + 32, j : j + 32]
                crops[(crop.flip(2) if flip else crop).numpy().tobytes()] = (flip, i, j)
    torch.manual_seed(0)
    outputs = script.weak_augment(image.expand(4000, 3, 32, 32))
    seen = [crops[output.numpy().tobytes()] for output in outputs]
    assert len(set(seen)) == 162
    assert 0.45 < np.mean([flip for flip, _, _ in seen]) < 0.55


def test_strong_augment_cuts_a_square_out(images, monkeypatch):
    monkeypatch.setattr(fixmatch_scar, "randaugment_op", lambda x, op, level: x)
    x = images[0][:500] // 2 + 128  # so that 127 is the square's alone
    torch.manual_seed(0)
    weak = fixmatch_scar.weak_augment(x)
    torch.manual_seed(0)
    cut = fixmatch_scar.strong_augment(x)
    hit = (cut == 127).all(1)
    assert torch.equal(torch.where(hit[:, None], weak, cut), weak)
    rows, columns = hit.any(2).sum(1), hit.any(1).sum(1)
    assert torch.equal(hit.sum((1, 2)), rows * columns)  # a rectangle
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(8, 17))


def test_strong_augment_draws_for_each_image(images):
    x = images[0][:1].expand(400, 3, 32, 32)
    torch.manual_seed(0)
    views = fixmatch_scar.strong_augment(x)
    assert views.dtype == torch.uint8 and views.shape == x.shape
    assert len({view.numpy().tobytes() for view in views}) > 390


# ---------------------------------------------------------------------------------- MixMatch's loss


def test_mixmatch_loss_and_gradient_sample_by_sample():
    model = plain_net().double()
    with torch.no_grad():
        model[3].weight *= 8  # predictions that differ from each other
    torch.manual_seed(2)
    x_l, x_u1, x_u2 = torch.rand(3, 4, 3, 32, 32, dtype=torch.double)
    y_l = torch.tensor([3, 1, 4, 1])
    mix, perm = 0.5 + 0.5 * torch.rand(12, dtype=torch.double), torch.randperm(12)
    temperature, lambda_u = 0.4, 0.6

    x, target = list(x_l) + list(x_u1) + list(x_u2), []
    for label in y_l:
        target.append([float(c == label) for c in range(10)])
    guesses = []
    for first, second in zip(x_u1, x_u2):
        probs = [torch.softmax(model(view[None])[0], 0).tolist() for view in (first, second)]
        mean = [(a + b) / 2 for a, b in zip(*probs)]
        sharp = [p ** (1 / temperature) for p in mean]
        guesses.append([p / sum(sharp) for p in sharp])
    target += guesses + guesses
    labeled, unlabeled = [], []
    for i in range(12):
        j, share = perm[i], mix[i].item()
        mixed = share * x[i] + (1 - share) * x[j]
        mixed_target = [share * a + (1 - share) * b for a, b in zip(target[i], target[j])]
        log_prob = torch.log_softmax(model(mixed[None])[0], 0)
        if i < 4:
            labeled.append(-sum(t * q for t, q in zip(mixed_target, log_prob)))
        else:
            unlabeled.append(sum((t - q.exp()) ** 2 for t, q in zip(mixed_target, log_prob)) / 10)
    expected = sum(labeled) / 4 + lambda_u * sum(unlabeled) / 8
    expected_gradient = torch.autograd.grad(expected, list(model.parameters()))

    loss, metrics = mixmatch_loss(
        model, x_l, y_l, x_u1, x_u2, temperature, 0.75, lambda_u, mix=mix, perm=perm
    )
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    together = metrics["loss_labeled"] + lambda_u * metrics["loss_unlabeled"]
    torch.testing.assert_close(together, loss.detach())
    assert not any(metric.requires_grad for metric in metrics.values())


def test_mixmatch_without_mixup_is_two_plain_terms():
    """alpha 0; a temperature near 0 makes the guess the more probable class, without nan."""
    model = plain_net()
    torch.manual_seed(2)
    x_l, x_u = torch.rand(2, 4, 3, 32, 32)
    y_l = torch.tensor([3, 1, 4, 1])
    _, metrics = mixmatch_loss(model, x_l, y_l, x_u, x_u, 1e-3, 0.0, 1.0)
    prob = model(x_u).softmax(1)
    guess = F.one_hot(prob.argmax(1), 10)
    torch.testing.assert_close(metrics["loss_labeled"], F.cross_entropy(model(x_l), y_l).detach())
    torch.testing.assert_close(metrics["loss_unlabeled"], ((prob - guess) ** 2).mean().detach())


def test_mixup_draws():
    """One draw an image, the image's own share the larger one, the mean that of Beta's formula."""
    torch.manual_seed(0)
    mix = mixmatch_scar.draw_mix(200_000, 0.75, torch.device("cpu"))
    assert mix.shape == (200_000,) and 0.5 <= mix.min() and mix.max() <= 1
    density = torch.linspace(0.5, 1, 200_001, dtype=torch.double)[1:-1]
    weight = (density * (1 - density)) ** (0.75 - 1)
    assert mix.mean().item() == pytest.approx(
        ((density * weight).sum() / weight.sum()).item(), abs=3e-3
    )
    assert (mixmatch_scar.draw_mix(5, 0.0, torch.device("cpu")) == 1).all()


def test_mixmatch_mixes_labeled_and_unlabeled_images(monkeypatch):
    """Drawn mixtures have partners from all three parts."""
    seen = []

    class Witness(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.mean((2, 3)) @ torch.eye(3, 10)

    parts = [torch.zeros(200, 3, 4, 4) + torch.eye(3)[i].view(3, 1, 1) for i in range(3)]
    torch.manual_seed(0)
    mixmatch_loss(Witness(), parts[0], torch.zeros(200).long(), *parts[1:], 0.5, 0.75, 1.0)
    mixed = seen[-1].mean((2, 3)).view(3, 200, 3)  # part, image, share of each part
    torch.testing.assert_close(mixed.sum(2), torch.ones(3, 200))
    for part in range(3):
        assert (mixed[part, :, part] >= 0.5 - 1e-6).all()
        assert ((mixed[part] > 1e-3).float().mean(0) > 0.2).all()


# --------------------------------------------------------------------------------------- VAT's loss


def kl_to(model, prob):
    """r -> KL(prob to p(x + r)) of one image, as in VAT's paper."""

    def divergence(image):
        log_prob = torch.log_softmax(model(image[None])[0], 0)
        return sum(p * (p.log() - q) for p, q in zip(prob, log_prob))

    return divergence


def test_vat_loss_and_gradient_sample_by_sample():
    model = plain_net().double()
    torch.manual_seed(2)
    x_l, x_u, d0 = torch.rand(3, 4, 3, 32, 32, dtype=torch.double)
    d0 -= 0.5
    y_l = torch.tensor([3, 1, 4, 1])
    xi, radius, lambda_u, entropy_weight = 0.01, 2.0, 0.6, 0.2

    labeled = [-torch.log_softmax(model(x[None])[0], 0)[y] for x, y in zip(x_l, y_l)]
    divergences, entropies = [], []
    for x, start in zip(x_u, d0):
        prob = torch.softmax(model(x[None])[0], 0)
        kl = kl_to(model, prob.detach())
        r = (xi * start / start.norm()).requires_grad_()
        (gradient,) = torch.autograd.grad(kl(x + r), r)
        divergences.append(kl(x + radius * gradient / gradient.norm()))
        entropies.append(-(prob * prob.log()).sum())
    expected = sum(labeled) / 4 + lambda_u * sum(divergences) / 4
    expected += entropy_weight * sum(entropies) / 4
    expected_gradient = torch.autograd.grad(expected, list(model.parameters()))

    for factor in (1.0, 100.0):  # of a start only the direction counts
        loss, metrics = vat_loss(
            model, x_l, y_l, x_u, xi, radius, 1, lambda_u, entropy_weight, d0=factor * d0
        )
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)
    assert metrics["loss_unlabeled"].item() == pytest.approx(sum(divergences).item() / 4, rel=1e-4)
    assert metrics["entropy"].item() == pytest.approx(sum(entropies).item() / 4, rel=1e-4)
    assert not any(metric.requires_grad for metric in metrics.values())


def smooth_net():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 5), nn.Flatten()
    ).double()


def test_vat_direction_is_power_iteration_on_the_hessian():
    """One iteration: the Hessian's product with d0. Many: the Hessian's top eigenvector."""
    model = smooth_net()
    x, d0 = torch.rand(6, 3, 4, 4, dtype=torch.double), torch.randn(6, 3, 4, 4).double()
    prob = model(x).softmax(1).detach()
    once = vat_direction(model, x, prob, 1e-4, 1, d0)
    often = vat_direction(model, x, prob, 1e-4, 200, d0)
    torch.testing.assert_close(once.flatten(1).norm(dim=1), torch.ones(6).double())
    assert not once.requires_grad
    for i in range(6):
        kl = kl_to(model, prob[i])

        def gradient(r):
            r = r.detach().requires_grad_()
            return torch.autograd.grad(kl(x[i] + r), r)[0]

        h = 1e-4 * d0[i] / d0[i].norm()
        product = gradient(h) - gradient(-h)
        torch.testing.assert_close(once[i], product / product.norm(), rtol=0, atol=2e-4)

        basis = 1e-5 * torch.eye(48).double().view(48, 3, 4, 4)
        hessian = torch.stack([(gradient(b) - gradient(-b)).flatten() for b in basis])
        top = torch.linalg.eigh((hessian + hessian.T) / 2).eigenvectors[:, -1]
        assert abs(top @ often[i].flatten()).item() > 0.999


def test_vat_direction_without_a_gradient_is_where_it_started():
    class Constant(nn.Module):
        def forward(self, x):
            return 0 * x.mean((2, 3))

    x = torch.rand(2, 3, 4, 4)
    d = vat_direction(Constant(), x, torch.full((2, 3), 1 / 3), 0.1, 1, torch.ones_like(x))
    torch.testing.assert_close(d, torch.full_like(x, 1 / math.sqrt(48)))
    d = vat_direction(plain_net(), torch.rand(2, 3, 32, 32), torch.rand(2, 10), 0.1, 0)
    torch.testing.assert_close(d.flatten(1).norm(dim=1), torch.ones(2))


@pytest.fixture(scope="module")
def trained(images):
    """A WideResNet after a minute's worth of training: no plaything, no random weights."""
    torch.manual_seed(0)
    model = WideResNet(10, 10, 1)
    optimizer = torch.optim.Adam(model.parameters(), 0.004)
    x, y = vat_scar.to_float(images[0]), images[1]
    for batch in torch.randperm(6000).view(-1, 60):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_vat_direction_is_a_direction_in_any_precision(trained, images, precision):
    """By default it is that of float64, and reaches several times the KL of a random one."""
    args = vat_scar.parse_args([])
    forward = vat_scar.forward_untracked
    x = vat_scar.to_float(images[2][:100])
    torch.manual_seed(0)
    d0, random = torch.randn_like(x), vat_scar.unit(torch.randn_like(x))
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            prob = forward(trained, x).float().softmax(1)
            found = vat_direction(trained, x, prob, args.xi, args.power_iterations, d0)
        exact, x, d0 = copy.deepcopy(trained).double(), x.double(), d0.double()
        log_prob = forward(exact, x).log_softmax(1)
        best = vat_direction(exact, x, log_prob.exp(), args.xi, args.power_iterations, d0)

        def reached(d):
            moved = forward(exact, x + args.vat_eps * d).log_softmax(1)
            return F.kl_div(moved, log_prob, reduction="batchmean", log_target=True).item()

    assert found.dtype == torch.float32
    assert reached(found) > 5 * reached(random)
    assert (found * best).sum((1, 2, 3)).mean().item() > 0.8


def test_which_forward_moves_the_running_statistics(images):
    """MixMatch: that of the mixed images. VAT: that of the labeled ones."""
    x, y = vat_scar.to_float(images[0][:24]), images[1][:8]
    x_l, x_u1, x_u2 = x.split(8)
    mix, perm = torch.linspace(0.5, 1, 24), torch.arange(24).flip(0)
    mixed = mix.view(-1, 1, 1, 1) * x + (1 - mix.view(-1, 1, 1, 1)) * x[perm]
    for moved_by, loss, parts, given in (
        (mixed, mixmatch_loss, (x_l, y, x_u1, x_u2, 0.5, 0.75, 1.0), {"mix": mix, "perm": perm}),
        (x_l, vat_loss, (x_l, y, x_u1, 1.0, 3.0, 1, 1.0, 0.1), {}),
    ):
        torch.manual_seed(0)
        model = WideResNet(10, 10, 1).train()
        expected = copy.deepcopy(model)
        expected(moved_by)
        loss(model, *parts, **given)[0].backward()
        for name, buffer in expected.named_buffers():
            torch.testing.assert_close(model.get_buffer(name), buffer, msg=f"{loss} {name}")


def test_vat_sees_the_same_unlabeled_images_in_training_mode(images):
    """Clean, probing and perturbed forward: the unlabeled images alone, with batch statistics."""
    seen = []

    class Witness(nn.BatchNorm2d):
        def forward(self, x):
            seen.append((self.training, x.detach()))
            return super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(Witness(3), nn.Flatten(), nn.Linear(3072, 10)).train()
    x_l, x_u = vat_scar.to_float(images[0][:24]).split(8)[:2]
    vat_loss(model, x_l, images[1][:8], x_u, 0.5, 3.0, 1, 1.0, 0.0)
    assert [training for training, _ in seen] == [True] * 4
    moved = [(x - x_u).flatten(1).norm(dim=1) for _, x in seen[1:]]
    for distance, expected in zip(moved, (0.0, 0.5, 3.0)):
        torch.testing.assert_close(distance, torch.full((8,), expected), rtol=1e-4, atol=1e-6)
    assert torch.equal(seen[0][1], x_l)


def test_mixmatch_guesses_each_view_on_its_own(images):
    """So its batch statistics are those of one view, as in MixMatch's code."""
    sizes = []
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3072, 10)).train()
    model.register_forward_hook(lambda module, x, logits: sizes.append(len(logits)))
    x_l, x_u1, x_u2 = vat_scar.to_float(images[0][:24]).split(8)
    mixmatch_loss(model, x_l, images[1][:8], x_u1, x_u2, 0.5, 0.75, 1.0)
    assert sizes == [8, 8, 24]


@pytest.mark.parametrize("scale", [300, 1500])
def test_vat_direction_of_a_very_confident_model(scale):
    """Predictions of 1 - 1e-20 and beyond still have a direction, that of float64."""
    model = plain_net()
    with torch.no_grad():
        model[3].weight *= scale
        x, d0 = torch.rand(2, 8, 3, 32, 32)
        prob = model(x).softmax(1)
    d = vat_direction(model, x, prob, 0.1, 1, d0)
    torch.testing.assert_close(d.flatten(1).norm(dim=1), torch.ones(8))
    model = model.double()
    exact = vat_direction(model, x.double(), model(x.double()).softmax(1).detach(), 0.1, 1, d0)
    assert (d * exact).sum((1, 2, 3)).min().item() > 0.99


def test_forward_untracked_is_a_training_forward(images):
    model = WideResNet(10, 10, 1).train()
    x = vat_scar.to_float(images[0][:8])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    logits = vat_scar.forward_untracked(model, x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    torch.testing.assert_close(logits, model(x))
    assert any(not torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


# ---------------------------------------------------------------------------------- FixMatch's loss


def test_fixmatch_loss_and_gradient_sample_by_sample():
    model = plain_net()
    with torch.no_grad():
        model[3].weight *= 25  # confident on some images, not on others
    torch.manual_seed(2)
    x_l, y_l = torch.rand(4, 3, 32, 32), torch.tensor([3, 1, 4, 1])
    x_weak, x_strong = torch.rand(12, 3, 32, 32), torch.rand(12, 3, 32, 32)
    threshold, lambda_u = 0.7, 0.6

    labeled = [-torch.log_softmax(model(x[None])[0], 0)[y] for x, y in zip(x_l, y_l)]
    unlabeled, counted = [], 0
    for weak, strong in zip(x_weak, x_strong):
        prob = torch.softmax(model(weak[None])[0], 0).detach()
        if prob.max() >= threshold:
            counted += 1
            unlabeled.append(-torch.log_softmax(model(strong[None])[0], 0)[prob.argmax()])
    assert 0 < counted < 12
    expected = sum(labeled) / 4 + lambda_u * sum(unlabeled) / 12
    expected_gradient = torch.autograd.grad(expected, list(model.parameters()))

    loss, metrics = fixmatch_loss(model, x_l, y_l, x_weak, x_strong, threshold, lambda_u)
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    assert metrics["mask_rate"].item() == pytest.approx(counted / 12)
    torch.testing.assert_close(
        metrics["loss_labeled"] + lambda_u * metrics["loss_unlabeled"], loss.detach()
    )
    assert not any(metric.requires_grad for metric in metrics.values())


def test_fixmatch_mask_includes_the_threshold():
    class Undecided(nn.Module):  # two equal logits: a confidence of exactly 1/2
        def forward(self, x):
            return torch.zeros(len(x), 2)

    x = torch.zeros(4, 3, 8, 8)
    for threshold, rate in ((0.5, 1.0), (0.51, 0.0)):
        _, metrics = fixmatch_loss(Undecided(), x, torch.zeros(4).long(), x, x, threshold, 1.0)
        assert metrics["mask_rate"] == rate


# -------------------------------------------------------------- from the loss to the training step


def step_inputs(script, index_l, index_u, step, total_steps, args):
    """What training_step gets at a step of pretraining, as train_epoch makes it."""
    numbers = (
        *script.schedule(step, total_steps, "pretrain", args),
        script.average_decay(step, args),
    )
    return torch.tensor(index_l), torch.tensor(index_u), *torch.tensor(numbers).unbind()


@pytest.mark.parametrize("script", [mixmatch_scar, vat_scar])
def test_batch_loss_hands_each_view_to_its_place_in(script, monkeypatch):
    seen = []
    monkeypatch.setattr(script, f"{script.METHOD}_loss", lambda *args: seen.append(args))
    draws = iter(range(1, 9))
    monkeypatch.setattr(script, "weak_augment", lambda x: x + next(draws))
    args = script.parse_args(["--batch-size", "2"])
    x_l = torch.full((2, 3, 4, 4), 10, dtype=torch.uint8)
    x_u = torch.full((2, 3, 4, 4), 20, dtype=torch.uint8)
    script.batch_loss("model", x_l, torch.tensor([3, 4]), x_u, 0.3, args)
    (model, first, y_l, *rest) = seen[0]
    views = [part for part in rest if isinstance(part, torch.Tensor)]
    assert model == "model" and y_l.tolist() == [3, 4]
    levels = [round(255 * view.mean().item(), 3) for view in (first, *views)]
    if script is mixmatch_scar:
        assert levels == [11, 22, 23] and rest[2:] == [0.5, 0.75, 0.3]
    else:
        assert levels == [11, 22] and rest[1:] == [1.0, 3.0, 1, 0.3, 0.0]


@pytest.mark.parametrize(
    "script, total, ramp", [(mixmatch_scar, 204_800, 16_384), (mixmatch_scar, 1000, 400),
                            (vat_scar, 204_800, 81_920), (vat_scar, 1000, 400)]
)  # fmt: skip
def test_ramp_of_the_unlabeled_loss(script, total, ramp):
    """Linear from 0, full after the ramp, full from the first step of fine-tuning; constant lr."""
    args = script.parse_args([])
    assert args.lambda_u == {"mixmatch": 0.75, "vat": 0.3}[script.METHOD]
    for step, share in ((0, 0), (ramp // 4, 0.25), (ramp // 2, 0.5), (ramp, 1), (total - 1, 1)):
        lr, lambda_u = script.schedule(step, total, "pretrain", args)
        assert (lr, lambda_u) == (0.002, pytest.approx(share * args.lambda_u))
    assert script.schedule(0, total, "finetune", args) == (0.002, args.lambda_u)


@pytest.mark.parametrize("script", [mixmatch_scar, vat_scar])
def test_adam_and_weight_decay_by_hand(script):
    """Two training steps on one matrix and its bias, and their average."""
    args = script.parse_args(["--epochs", "1", "--steps-per-epoch", "4", "--lr", "0.1"])
    model, average = nn.Linear(3, 2), nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in (*model.parameters(), *average.parameters()):
            parameter.fill_(1.0)
    run = SimpleNamespace(
        model=model,
        average=average,
        optimizer=script.make_optimizer(model, args),
        # gradient 2 everywhere
        batch_loss=lambda model, *_: (2 * sum(p.sum() for p in model.parameters()), {}),
        images=torch.zeros(1),
        labels=torch.zeros(1),
    )
    weight, bias, averaged = 1.0, 1.0, [1.0, 1.0]
    for step in range(2):
        script.training_step(run, args, *step_inputs(script, [0], [0], step, 4, args))
        update = 0.1 * 2 / (2 + 1e-8)  # a constant gradient: Adam's moments are 2 and 4
        weight, bias = (weight - update) * (1 - 0.02 * 0.1), bias - update
        decay = (1 + step) / (10 + step)
        averaged = [decay * a + (1 - decay) * b for a, b in zip(averaged, (weight, bias))]
    for module, expected in ((model, (weight, bias)), (average, averaged)):
        # AdamW decays before its update: lr^2 * weight_decay = 2e-4 apart at this large lr
        torch.testing.assert_close(
            module.weight, torch.full((2, 3), expected[0]), rtol=0, atol=8e-4
        )
        torch.testing.assert_close(module.bias, torch.full((2,), expected[1]))
    assert abs(model.weight[0, 0] - model.bias[0]).item() > 2e-3  # so there was a decay


def test_batch_loss_hands_each_view_to_its_place(monkeypatch):
    seen = {}

    def spy(model, x_l, y_l, x_weak, x_strong, threshold, lambda_u):
        seen.update(x_l=x_l, y_l=y_l, weak=x_weak, strong=x_strong, t=threshold, u=lambda_u)

    monkeypatch.setattr(fixmatch_scar, "fixmatch_loss", spy)
    monkeypatch.setattr(fixmatch_scar, "weak_augment", lambda x: x + 1)
    monkeypatch.setattr(fixmatch_scar, "strong_augment", lambda x: x + 2)
    args = fixmatch_scar.parse_args(["--threshold", "0.8"])
    x_l = torch.full((2, 3, 4, 4), 10, dtype=torch.uint8)
    x_u = torch.full((6, 3, 4, 4), 20, dtype=torch.uint8)
    fixmatch_scar.batch_loss(None, x_l, torch.tensor([3, 4]), x_u, 0.3, args)
    shapes = {
        name: (len(seen[name]), round(255 * seen[name].mean().item(), 3))
        for name in ("x_l", "weak", "strong")
    }
    assert shapes == {"x_l": (2, 11), "weak": (6, 21), "strong": (6, 22)}
    assert seen["y_l"].tolist() == [3, 4] and (seen["t"], seen["u"]) == (0.8, 0.3)


def test_fixmatch_schedule_optimizer_and_average():
    args = fixmatch_scar.parse_args([])
    lr = [fixmatch_scar.schedule(step, 100, "pretrain", args)[0] for step in (0, 50, 99)]
    assert lr == pytest.approx([0.03 * math.cos(7 * math.pi * k / 1600) for k in (0, 50, 99)])
    model, average = WideResNet(10, 10, 1), WideResNet(10, 10, 1)
    decayed = [
        p
        for g in fixmatch_scar.make_optimizer(model, args).param_groups
        if g["weight_decay"]
        for p in g["params"]
    ]
    modules = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert {id(p) for p in decayed} == {id(m.weight) for m in modules}
    model.bn.running_mean += 1
    model.bn.num_batches_tracked += 7
    before = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    fixmatch_scar.update_average(average, model, 0.9)
    for name, tensor in average.state_dict().items():
        theirs = model.state_dict()[name]
        torch.testing.assert_close(
            tensor, 0.9 * before[name] + 0.1 * theirs if tensor.is_floating_point() else theirs
        )


def test_training_step_by_hand():
    """Two steps of SGD with Nesterov momentum and decay on one weight matrix, and their average."""
    args = fixmatch_scar.parse_args(["--epochs", "1", "--steps-per-epoch", "4", "--lr", "0.1"])
    model, average = nn.Linear(3, 2), nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in (*model.parameters(), *average.parameters()):
            parameter.fill_(1.0)
    run = SimpleNamespace(
        model=model,
        average=average,
        optimizer=fixmatch_scar.make_optimizer(model, args),
        # gradient 2 everywhere
        batch_loss=lambda model, *_: (2 * sum(p.sum() for p in model.parameters()), {"rate": 3}),
        images=torch.zeros(1),
        labels=torch.zeros(1),
    )
    weight, bias, momenta, averaged = 1.0, 1.0, [0.0, 0.0], [1.0, 1.0]
    for step in range(2):
        inputs = step_inputs(fixmatch_scar, [0], [0], step, 4, args)
        metrics = fixmatch_scar.training_step(run, args, *inputs)
        assert metrics["loss"].item() == pytest.approx(2 * (6 * weight + 2 * bias))
        assert metrics["rate"] == 3 and not metrics["loss"].requires_grad
        lr = 0.1 * math.cos(7 * math.pi * step / (16 * 4))
        gradients = [2 + 5e-4 * weight, 2.0]
        momenta = [0.9 * m + g for m, g in zip(momenta, gradients)]
        weight -= lr * (gradients[0] + 0.9 * momenta[0])
        bias -= lr * (gradients[1] + 0.9 * momenta[1])
        decay = (1 + step) / (10 + step)
        averaged = [decay * a + (1 - decay) * b for a, b in zip(averaged, (weight, bias))]
    for module, expected in ((model, (weight, bias)), (average, averaged)):
        torch.testing.assert_close(module.weight, torch.full((2, 3), expected[0]))
        torch.testing.assert_close(module.bias, torch.full((2,), expected[1]))


# -------------------------------------------------------------------------------------------- speed


def small_run(script, images, *options):
    """(run, args) as train_epoch gets them, on 200 images, the first 40 of them labeled."""
    args = script.parse_args(["--depth", "10", "--width", "1", "--batch-size", "4", *options])
    torch.manual_seed(0)
    model = WideResNet(10, 10, 1)
    labels = images[1][:200].clone()
    labels[40:] = -1
    return SimpleNamespace(
        model=model,
        average=copy.deepcopy(model).requires_grad_(False).eval(),
        optimizer=script.make_optimizer(model, args),
        images=images[0][:200],
        labels=labels,
        batch_loss=script.batch_loss,
    ), args


def draw_inputs(script, args, steps):
    """Inputs of consecutive training steps for small_run."""
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        index_l = torch.randint(40, (args.batch_size,), generator=generator)
        index_u = torch.randint(200, (script.unlabeled_batch_size(args),), generator=generator)
        yield step_inputs(script, index_l.tolist(), index_u.tolist(), step, steps, args)


WAITS = {"item", "tolist", "numpy", "cpu", "nonzero", "unique", "masked_select", "__bool__",
         "__int__", "__float__", "__index__"}  # fmt: skip


class NoWaiting(torch.overrides.TorchFunctionMode):
    """Refuses what would make the CPU wait for a GPU, or send it something."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        assert name not in WAITS, f"{name} waits for the device"
        assert name not in ("tensor", "as_tensor", "from_numpy"), f"{name} copies to the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_step_never_waits_for_the_device(script, images):
    """Under FakeTensorMode there are no values: whatever asks for one, or whose shape depends on
    one, fails, in the backward pass, the optimizer and the average too."""
    run, args = small_run(script, images)
    steps = list(draw_inputs(script, args, 2))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for inputs in steps:
            inputs = [mode.from_tensor(tensor) for tensor in inputs]
            with NoWaiting():
                metrics = script.training_step(run, args, *inputs)
        assert isinstance(metrics["loss"], FakeTensor)
        with NoWaiting(), pytest.raises(AssertionError, match="item waits"):
            metrics["loss"].item()
        with pytest.raises(Exception, match="nonzero"):
            torch.nonzero(metrics["loss"])


@pytest.mark.parametrize(
    "script, precision", [*((script, "fp32") for script in SCRIPTS), (vat_scar, "bf16")]
)
def test_loss_is_one_compiled_graph(script, images, precision):
    """Augmentation and loss, with batch norm and VAT's direction, once for the whole ramp; nothing
    in the graph asks for a value, and its numbers are those of the loss as it is."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    results = []
    torch._dynamo.reset()
    for compiled in (True, False):
        run, args = small_run(script, images, "--precision", precision)
        if compiled:
            run.batch_loss = torch.compile(script.batch_loss, fullgraph=True, backend=backend)
        for i, inputs in enumerate(draw_inputs(script, args, 2)):
            torch.manual_seed(i)
            script.training_step(run, args, *inputs)
        results.append(torch.cat([t.flatten() for t in run.model.state_dict().values()]))
    assert len(graphs) == 1
    called = {str(getattr(node.target, "__name__", node.target)) for node in graphs[0].graph.nodes}
    assert "conv2d" in called and not called & WAITS
    tolerance = {"fp32": 1e-6, "bf16": 1e-2}[precision]
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


class Recorder(TorchDispatchMode):
    """A CUDA graph's stand-in on the CPU: keeps every operation, with the very tensors that it
    read and wrote, and does them again. So what a captured step would keep fixed, it keeps fixed.
    """

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, outputs))
        return outputs

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, outputs in self.operations:
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(outputs), tree_leaves(again)):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@pytest.mark.parametrize("script", SCRIPTS)
def test_captured_step_is_the_step(script, images, monkeypatch):
    """Learning rate, ramp, decay and images of each replay are its own; fresh random numbers too.

    Capturing works on CUDA alone, so here a recorder stands in for the graph. As capturing computes
    nothing, and recording does, the state goes back to what it was before.
    """
    recorders = []

    def recording(graph, stream):
        recorders.append(graph)
        return graph

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    results = []
    for captured in (True, False):
        run, args = small_run(script, images)
        step = partial(script.training_step, run, args)
        losses = []
        for i, inputs in enumerate(draw_inputs(script, args, 6)):
            if captured and i == 3:
                state = [run.model.state_dict(), run.average.state_dict()]
                state += run.optimizer.state.values()
                before = copy.deepcopy(state)
                step = script.capture(run, args, inputs)
                for now, then in zip(state, before):
                    for name in now:
                        now[name].copy_(then[name])
            torch.manual_seed(i)
            losses.append(step(*inputs)["loss"].item())
        weights = [t.flatten() for m in (run.model, run.average) for t in m.state_dict().values()]
        results.append((torch.tensor(losses), torch.cat(weights)))
    assert len(recorders) == 1 and len(recorders[0].operations) > 500
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_no_graph_is_a_notice(images, monkeypatch, capsys):
    def fails(graph, stream):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nhints")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", fails)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    run, args = small_run(vat_scar, images)
    inputs = list(draw_inputs(vat_scar, args, 1))[0]
    step = vat_scar.capture(run, args, inputs)
    assert capsys.readouterr().out == (
        "no CUDA graph here, going on without it "
        "(CUDA error: operation not permitted when stream is capturing)\n"
    )
    assert step(*inputs)["loss"] > 0


def test_without_a_compiler_a_run_goes_on(tmp_path):
    """torch.compile looks for a C++ compiler in CXX; a wrong one is as good as none."""
    environment = {**os.environ, "CXX": "no-such-compiler", "OMP_NUM_THREADS": "1",
                   "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}  # fmt: skip
    options = "--compile --device cpu --epochs 1 --table2-eps 6 --select none --out run"
    command = [sys.executable, HERE / "vat_scar.py", *SMALL.split(), *options.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    notices = [line for line in done.stdout.splitlines() if line.startswith("no torch.compile")]
    assert len(notices) == 1 and "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["args"]["compile"] is False


def test_trying_the_compiled_loss_changes_nothing(images, monkeypatch):
    for script in SCRIPTS:
        run, args = small_run(script, images)
        before = copy.deepcopy(run.model.state_dict())
        monkeypatch.setattr(torch, "compile", lambda function: function)
        assert script.compile_loss(run, args) is script.batch_loss
        for name, tensor in run.model.state_dict().items():
            assert torch.equal(tensor, before[name])
        assert all(parameter.grad is None for parameter in run.model.parameters())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_randaugment_is_pillows(varied_images):
    """test_randaugment_is_pillows has Pillow's images for the function as it is; this, as compiled
    by torch.compile, gives the same."""
    x, generator = varied_images.repeat(14, 1, 1, 1), torch.Generator().manual_seed(0)
    op = torch.arange(14).repeat_interleave(len(varied_images))
    level = torch.rand(len(x), generator=generator)
    plain = randaugment_op(x, op, level)
    torch._dynamo.reset()
    compiled = torch.compile(randaugment_op, fullgraph=True)(x, op, level)
    off = (plain != compiled).any(1).float().mean((1, 2)).view(14, -1).mean(1)
    assert off.max() <= 0.001, off


@pytest.mark.parametrize("script", SCRIPTS)
def test_augmentations_compile_as_one_graph(script, images):
    for augment in [script.weak_augment, getattr(script, "strong_augment", script.weak_augment)]:
        torch._dynamo.reset()
        views = []
        for function in (augment, torch.compile(augment, fullgraph=True, backend="aot_eager")):
            torch.manual_seed(0)
            views.append(function(images[0][:50]))
        assert torch.equal(*views)


def test_speed_measures_variants_in_turns(monkeypatch, capsys):
    """results/speed.py, from which the README has its table."""
    monkeypatch.setattr(sys, "path", [str(HERE / "results"), *sys.path])
    options = "--variants plain,split,joint --depth 10 --width 1 --batch-size 2 --mu 1 --steps 1"
    monkeypatch.setattr(sys, "argv", ["speed.py", *options.split(), "--workers", "1"])
    monkeypatch.setattr(fixmatch_scar, "to_float", fixmatch_scar.to_float)  # which it replaces
    __import__("speed").main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "| " in line]
    assert [row[0].strip("| ") for row in rows] == ["variant", "plain", "split", "joint"]
    assert rows[1][3].strip("| ") == "1.00" and all(float(row[1]) > 0 for row in rows[1:])


@needs_cuda
@pytest.mark.parametrize("script", SCRIPTS)
def test_step_on_cuda_captured_and_without_waiting(script, images):
    """Six steps in float32: plain, compiled, compiled and captured; losses and weights agree."""
    results = []
    for variant in ("plain", "compiled", "captured"):
        run, args = small_run(script, images, "--precision", "fp32")
        for name in ("model", "average"):
            getattr(run, name).cuda()
        run.optimizer = script.make_optimizer(run.model, args)
        run.images, run.labels = run.images.cuda(), run.labels.cuda()
        if variant != "plain":  # random numbers that are those of the plain one
            torch._dynamo.reset()
            run.batch_loss = torch.compile(script.batch_loss, fullgraph=True, backend="aot_eager")
        steps = [[tensor.cuda() for tensor in inputs] for inputs in draw_inputs(script, args, 6)]
        step = partial(script.training_step, run, args)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        losses = []
        with torch.cuda.stream(stream):
            for i, inputs in enumerate(steps):
                if variant == "captured" and i == 3:
                    step = script.capture(run, args, inputs)
                torch.manual_seed(i)
                torch.cuda.set_sync_debug_mode("error" if i >= 3 else "default")
                loss = step(*inputs)["loss"]
                torch.cuda.set_sync_debug_mode("default")
                losses.append(loss.item())
        if variant == "captured":
            assert not isinstance(step, partial)
        weights = [t.flatten() for t in run.average.state_dict().values()]
        results.append((torch.tensor(losses), torch.cat(weights).cpu()))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-3, atol=1e-3)


@needs_cuda
def test_compiled_randaugment_on_cuda_is_that_of_the_cpu(varied_images):
    x, op = varied_images.repeat(14, 1, 1, 1), torch.arange(14).repeat_interleave(240)
    level = torch.rand(len(x), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(randaugment_op, fullgraph=True)(x.cuda(), op.cuda(), level.cuda())
    off = (randaugment_op(x, op, level) != compiled.cpu()).any(1).float().mean((1, 2))
    assert off.view(14, -1).mean(1).max() <= 0.01, off


# --------------------------------------------------------------------------------- SCAR's selection


class Brightness(nn.Module):
    """Class 1 above a mean of 0.5, else class 0; no parameters. FGSM flips what is within eps."""

    def forward(self, x):
        score = 100 * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack([-score, score], 1)


@pytest.mark.parametrize("script", SCRIPTS)
def test_select_clean_on_a_known_model(script):
    grey = torch.arange(20, 240, dtype=torch.uint8)
    x = grey.view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    keep, pseudo = script.select_clean(Brightness(), x, 10 / 255)
    assert pseudo.tolist() == (grey > 127).long().tolist()
    assert keep.tolist() == ((grey.float() - 127.5).abs() > 10).tolist()
    assert script.select_clean(Brightness(), x, 0.0)[0].all()


@pytest.mark.parametrize("script", SCRIPTS)
def test_selection_goes_in_chunks_and_leaves_the_model_alone(script):
    x = torch.randint(0, 256, (4100, 3, 8, 8), dtype=torch.uint8)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10)
    ).train()
    keep, pseudo = script.select_clean(model, x, 0.01)
    assert all(module.training for module in model.modules())
    assert (
        keep.shape == pseudo.shape == (4100,)
        and keep.dtype == torch.bool
        and pseudo.dtype == torch.int64
    )
    part_keep, part_pseudo = script.select_clean(model, x[3990:4010], 0.01)
    assert torch.equal(keep[3990:4010], part_keep) and torch.equal(pseudo[3990:4010], part_pseudo)
    assert script.evaluate(model, x, pseudo) == 100.0


@pytest.mark.parametrize("script", SCRIPTS)
def test_select_confident_takes_the_surest(script):
    grey = torch.tensor(
        [0, 130, 255, 120, 60, 250]
    )  # in float32 the ends have the same confidence, 1
    x = grey.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    for count, expected in ((0, []), (2, [0, 2]), (3, [0, 2, 5]), (6, range(6))):
        keep = script.select_confident(Brightness(), x, count)
        assert torch.nonzero(keep).squeeze(1).tolist() == list(expected)


# Rows of Table 2: kept correct, kept, rejected wrong, rejected, and the percentages as printed. Two
# do not add up in the paper and are left out: MixMatch (6124 + 3879 is not 10,000), and VAT at
# eps 4 (its specificity, 1396/5205, is 26.82 and not 26.81).
PAPER_COUNTS = [
    (7587, 8227, 835, 1773, 92.22, 47.10),
    (6543, 6833, 1185, 3167, 95.76, 37.42),
    (5494, 5636, 1333, 4364, 97.48, 30.55),
    (3684, 3724, 1435, 6276, 98.93, 22.86),
    (6385, 6411, 561, 3589, 99.59, 15.63),
]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "kept_correct, kept, rejected_wrong, rejected, sensitivity, specificity", PAPER_COUNTS
)
def test_equations_5_and_6(
    script, kept_correct, kept, rejected_wrong, rejected, sensitivity, specificity
):
    keep = torch.arange(kept + rejected) < kept
    correct = torch.ones(kept + rejected, dtype=torch.bool)
    correct[kept_correct:kept] = False
    correct[kept : kept + rejected_wrong] = False
    y = torch.arange(kept + rejected) % 10
    stats = script.selection_stats(keep, torch.where(correct, y, (y + 1) % 10), y)
    # the paper cuts or rounds the second digit
    assert stats["sensitivity"] == pytest.approx(sensitivity, abs=0.01)
    assert stats["specificity"] == pytest.approx(specificity, abs=0.01)
    counts = [stats[name] for name in ("kept_correct", "kept", "rejected_wrong", "rejected")]
    assert counts == [kept_correct, kept, rejected_wrong, rejected]
    assert stats["kept_correct"] + stats["rejected"] - stats["rejected_wrong"] == int(correct.sum())


@pytest.mark.parametrize("script", SCRIPTS)
def test_selection_stats_of_nothing(script):
    stats = script.selection_stats(
        torch.zeros(3, dtype=torch.bool), torch.zeros(3).long(), torch.zeros(3).long()
    )
    assert math.isnan(stats["sensitivity"]) and stats["specificity"] == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_draw_batches_takes_each_image_once_a_pass(script):
    pool = torch.arange(100, 120)
    batches = script.draw_batches(pool, 7, 6, torch.Generator().manual_seed(0))
    assert batches.shape == (7, 6)
    flat = batches.flatten().tolist()
    assert sorted(flat[:20]) == sorted(flat[20:40]) == pool.tolist() and flat[:20] != flat[20:40]


# ------------------------------------------------------------------------------------ the whole run


def interrupt_at(monkeypatch, script, function, call):
    """Makes the n-th call of one of the script's functions end as Ctrl-C would."""
    original, calls = getattr(script, function), []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(script, function, interrupted)


def read_rows(out):
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("script", SCRIPTS)
def test_resumed_run_is_the_uninterrupted_one(script, few_images, tmp_path, monkeypatch, capsys):
    """Stopped in pretraining, in the selection, in fine-tuning, it ends with the same weights."""
    one_go = script.main([*SMALL.split(), "--out", str(tmp_path / "one_go")])
    command = [*SMALL.split(), "--out", str(tmp_path / "in_pieces")]
    for function, call in (("training_step", 6), ("select_clean", 1), ("training_step", 7)):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            interrupt_at(patch, script, function, call)
            script.main(command)
        assert stopped.value.code == 130
        assert not (tmp_path / "in_pieces" / "result.json").exists()
    capsys.readouterr()
    in_pieces = script.main(command)
    assert "going on after finetune epoch 1" in capsys.readouterr().out

    for name in ("pretrain.pt", "model.pt"):
        first, second = (
            torch.load(tmp_path / run / name, weights_only=True) for run in ("one_go", "in_pieces")
        )
        assert all(torch.equal(first[key], second[key]) for key in first | second)
    timing = {"ms_per_step", "images_per_second", "seconds", "command", "args"}
    assert {k: v for k, v in one_go.items() if k not in timing} == {
        k: v for k, v in in_pieces.items() if k not in timing
    }
    timing = {"ms_per_step", "seconds"}
    first, second = (
        [{k: v for k, v in row.items() if k not in timing} for row in read_rows(tmp_path / run)]
        for run in ("one_go", "in_pieces")
    )
    assert first == second
    assert [(row["phase"], row["epoch"]) for row in first] == [
        ("pretrain", "1"),
        ("pretrain", "2"),
        ("finetune", "1"),
        ("finetune", "2"),
    ]

    # the schedule starts again with fine-tuning; the row has the rate of the epoch's last step
    args = script.parse_args(command)
    last_steps = [(3, "pretrain"), (7, "pretrain"), (3, "finetune"), (7, "finetune")]
    expected = [script.schedule(step, 8, phase, args)[0] for step, phase in last_steps]
    assert [float(row["lr"]) for row in first] == pytest.approx(expected)

    # a finished run shows its result and trains no more
    interrupt_at(monkeypatch, script, "training_step", 1)
    assert script.main(command) == in_pieces
    assert "Table 1" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_fine_tunings_from_one_pretraining_differ_in_the_selection_alone(
    script, few_images, tmp_path, monkeypatch
):
    unlabeled_batches, at_start, phases = {}, {}, []
    training_step, train_epoch = script.training_step, script.train_epoch

    def epoch_spy(run, phase, *rest, **options):
        phases.append(phase)
        return train_epoch(run, phase, *rest, **options)

    def step_spy(run, args, index_l, index_u, lr, lambda_u, decay):
        key = args.select, args.eps, phases[-1]
        unlabeled_batches.setdefault(key, []).append((index_u, torch.get_rng_state()))
        if key not in at_start:
            weights = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
            average = {name: tensor.clone() for name, tensor in run.average.state_dict().items()}
            momentum = len(run.optimizer.state)
            at_start[key] = decay.item(), run.labels.clone(), weights, average, momentum
        assert (run.labels[index_l] >= 0).all()
        return training_step(run, args, index_l, index_u, lr, lambda_u, decay)

    monkeypatch.setattr(script, "train_epoch", epoch_spy)
    monkeypatch.setattr(script, "training_step", step_spy)
    results = {}
    for select, eps in (("fgsm", 2.0), ("none", 2.0), ("confidence", 2.0), ("fgsm", 0.0)):
        out = tmp_path / f"{select}{eps:g}"
        options = ["--select", select, "--eps", str(eps), "--table2-eps", "1", "--out", str(out)]
        if results:
            options += ["--pretrained", str(tmp_path / "fgsm2" / "pretrain.pt")]
        results[select, eps] = script.main([*SMALL.split(), *options])
    first = results["fgsm", 2.0]
    assert len({result["pretrain_accuracy"] for result in results.values()}) == 1
    assert 0 < first["selection"]["kept"] < 200
    assert results["none", 2.0]["selection"]["kept"] == 0
    assert results["confidence", 2.0]["selection"]["kept"] == first["selection"]["kept"]
    assert results["fgsm", 0.0]["selection"]["kept"] == first["selection"]["unlabeled"] == 200
    assert [row["eps"] for row in first["table2"]] == [1.0, 2.0]
    for batches in (unlabeled_batches[select, eps, "finetune"] for select, eps in results):
        for (index_u, state), (index_first, state_first) in zip(
            batches, unlabeled_batches["fgsm", 2.0, "finetune"], strict=True
        ):
            assert torch.equal(index_u, index_first) and torch.equal(state, state_first)

    # each starts from theta~, with a new optimizer, knowing the true labels and those of the kept
    theta = WideResNet(10, 10, 1)
    theta_weights = torch.load(tmp_path / "fgsm2" / "pretrain.pt", weights_only=True)
    theta.load_state_dict(theta_weights)
    x, y = few_images[:2]
    labeled, pool = split_labeled(y, 100, 0)
    for select, eps in results:
        keep, pseudo = script.select_clean(theta, x[pool], eps / 255)
        if select == "none":
            keep[:] = False
        if select == "confidence":
            keep = script.select_confident(theta, x[pool], int(keep.sum()))
        known = torch.full_like(y, -1)
        known[labeled], known[pool[keep]] = y[labeled], pseudo[keep]
        decay, labels, weights, average, momentum = at_start[select, eps, "finetune"]
        assert decay == pytest.approx(0.1)  # that of the first step
        assert momentum == 0 and torch.equal(labels, known)
        for name, tensor in theta_weights.items():
            assert torch.equal(weights[name], tensor) and torch.equal(average[name], tensor)
    known_before = at_start["fgsm", 2.0, "pretrain"][1] >= 0
    assert torch.nonzero(known_before).squeeze(1).tolist() == labeled.tolist()
    rows = read_rows(tmp_path / "none2")
    assert [row["phase"] for row in rows] == ["finetune", "finetune"]


@pytest.mark.parametrize("script", SCRIPTS[:1])  # the text is the same in all
def test_every_epoch_phase_and_seed_draws_its_own(script, few_images, tmp_path, monkeypatch):
    batches = []
    original = script.training_step

    def spy(run, args, index_l, index_u, *numbers):
        batches.append(index_u.numpy().tobytes())
        return original(run, args, index_l, index_u, *numbers)

    monkeypatch.setattr(script, "training_step", spy)
    for seed in ("0", "1"):
        options = ["--seed", seed, "--table2-eps", "1", "--out", str(tmp_path / seed)]
        script.main([*SMALL.split(), *options])
    assert len(batches) == len(set(batches)) == 2 * 2 * 2 * 4  # seeds, phases, epochs, steps
    weights = [torch.load(tmp_path / seed / "pretrain.pt", weights_only=True) for seed in "01"]
    assert not torch.equal(weights[0]["conv.weight"], weights[1]["conv.weight"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_sigterm_stops_with_a_sentence(script, few_images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "train_epoch", lambda *args, **kwargs: script.stop(15, None))
    with pytest.raises(SystemExit) as stopped:
        script.main([*SMALL.split(), "--out", str(tmp_path / "run")])
    assert stopped.value.code == 143
    assert (
        capsys.readouterr().err
        == "stopped; the same command goes on after the last finished epoch\n"
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_resuming_with_other_images_is_refused(script, few_images, tmp_path, monkeypatch, capsys):
    command = [*SMALL.split(), "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_at(patch, script, "training_step", 6)
        script.main(command)
    x_train, y_train, x_test, y_test = few_images
    other = x_train.flip(0), y_train.flip(0), x_test, y_test
    monkeypatch.setattr(script, "load_images", lambda data, data_dir: other)
    capsys.readouterr()
    assert "other images" in refusal(capsys, *command, script=script)


@pytest.mark.parametrize("script", SCRIPTS[:1])  # the text is the same in all
def test_true_share_of_labeled_batches(script, few_images, tmp_path):
    """In fine-tuning every batch has its share; while nothing is selected, all labels are true."""
    args = script.parse_args(
        [
            *SMALL.split(),
            "--batch-size",
            "10",
            "--true-share",
            "0.3",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    run = script.prepare(args)
    true = torch.zeros(300, dtype=torch.bool)
    true[run.labeled] = True

    def shares():
        batches = script.draw_labeled(run, 50, args, torch.Generator().manual_seed(0))
        assert batches.shape == (50, 10) and (run.labels[batches] >= 0).all()
        return true[batches].sum(1)

    assert (shares() == 10).all()
    run.labels[run.unlabeled[:90]] = 0
    assert (shares() == 3).all()
    args.true_share = 1.0
    assert (shares() == 10).all()
    args.true_share = None
    assert 4 < shares().float().mean() < 6.5 and len(shares().unique()) > 3  # 100 of 190
    run.lock.close()


@pytest.mark.parametrize("script", SCRIPTS)
def test_labels_of_unlabeled_images_are_not_used(script, images, few_images, tmp_path, monkeypatch):
    """With other true labels on the unlabeled images, theta~ and the final model are the same."""
    x_train, y_train, x_test, y_test = few_images
    labeled, _ = split_labeled(y_train, 100, 0)
    finals = []
    for shift in (0, 1):
        wrong = (y_train + shift) % 10
        wrong[labeled] = y_train[labeled]
        monkeypatch.setattr(
            script, "load_images", lambda data, data_dir: (x_train, wrong, x_test, y_test)
        )
        monkeypatch.setattr(
            script,
            "split_labeled",
            lambda y, num_labeled, seed: split_labeled(y_train, num_labeled, seed),
        )
        script.main([*SMALL.split(), "--table2-eps", "1", "--out", str(tmp_path / str(shift))])
        finals.append(torch.load(tmp_path / str(shift) / "model.pt", weights_only=True))
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


def test_whole_run_learns_selects_and_leaves_its_files(images, tmp_path, monkeypatch, capsys):
    """The README's small run, shorter and with a part of the synthetic images."""
    some = images[0][:2000], images[1][:2000], images[2][:500], images[3][:500]
    monkeypatch.setattr(fixmatch_scar, "load_images", lambda data, data_dir: some)
    command = (
        "--data synthetic --num-labeled 500 --depth 10 --width 1 --batch-size 32 --mu 1 "
        "--epochs 2 --steps-per-epoch 75 --table2-eps 1 4"
    )
    result = fixmatch_scar.main([*command.split(), "--out", str(tmp_path / "run")])
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "args.json",
        "fixmatch_scar.py",
        "checkpoint.pt",
        "lock",
        "pretrain.pt",
        "model.pt",
        "selection.png",
        "metrics.csv",
        "result.json",
    }
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert (
        result["method"] == "fixmatch"
        and result["data"] == "synthetic"
        and result["scored_on"] == "test"
    )
    assert (
        result["pretrain_accuracy"] > 40 and result["final_accuracy"] > result["pretrain_accuracy"]
    )

    selection, (weak_attack, strong_attack) = result["selection"], result["table2"]
    assert selection["kept"] + selection["rejected"] == selection["unlabeled"] == 1500
    assert selection["kept"] == sum(selection["kept_per_class"]) > 0 and selection["rejected"] > 0
    assert selection["kept_correct"] / selection["kept"] > result["pretrain_accuracy"] / 100
    assert (
        weak_attack["kept"] > strong_attack["kept"]
        and weak_attack["sensitivity"] < strong_attack["sensitivity"]
    )
    for row in result["table2"]:
        right = row["kept_correct"] + row["rejected"] - row["rejected_wrong"]
        assert right == pytest.approx(5 * result["pretrain_accuracy"])

    output = capsys.readouterr().out
    assert "94.13" in output and "95.17" in output and "99.59 (6385/6411)" in output
    assert (
        f"{result['final_accuracy']:.2f}" in output
        and "a step: about" in output
        and "\r" not in output
    )
    rows = read_rows(tmp_path / "run")
    assert list(rows[0]) == [
        "phase",
        "epoch",
        "lr",
        "loss",
        "loss_labeled",
        "loss_unlabeled",
        "mask_rate",
        "accuracy",
        "ms_per_step",
        "seconds",
    ]
    assert float(rows[-1]["accuracy"]) == result["final_accuracy"]

    # what the README shows: load model.pt and classify
    model = WideResNet(10, 10, 1)
    model.load_state_dict(torch.load(tmp_path / "run" / "model.pt", weights_only=True))
    assert fixmatch_scar.evaluate(model, *some[2:]) == pytest.approx(
        result["final_accuracy"], abs=0.2
    )


def test_validation_images_come_from_the_unlabeled_pool(few_images, tmp_path):
    result = fixmatch_scar.main(
        [*SMALL.split(), "--val", "50", "--table2-eps", "1", "--out", str(tmp_path / "run")]
    )
    assert result["scored_on"] == "validation"
    assert result["selection"]["unlabeled"] == 150
    assert sum(result["table2"][0][name] for name in ("kept", "rejected")) == 50


def test_mcnemar(few_images, tmp_path, monkeypatch, capsys):
    """results/mcnemar.py: what only one model gets right, on the images its run was scored on."""
    monkeypatch.setattr(sys, "path", [str(HERE / "results"), *sys.path])
    mcnemar = __import__("mcnemar")
    monkeypatch.setattr(mcnemar, "load_images", lambda data, data_dir: few_images)
    first, other = (
        torch.tensor([1] * a + [0] * b, dtype=torch.bool) for a, b in ((6, 19), (0, 25))
    )
    other[6:15] = True
    assert mcnemar.compare(first, other) == (6, 9, 12.0, 3 / 15**0.5)
    assert mcnemar.compare(first, first) == (0, 0, 0.0, 0.0)

    out = tmp_path / "run"
    options = [*SMALL.split(), "--epochs", "3", "--steps-per-epoch", "20", "--table2-eps", "6"]
    result = vat_scar.main([*options, "--val", "50", "--out", str(out)])
    constant = torch.load(out / "pretrain.pt")
    constant["linear.bias"][3] = 1e6  # right on the 5 images of class 3
    torch.save(constant, out / "constant.pt")
    mcnemar.main([f"{out}/model.pt", f"{out}/constant.pt"])
    final, other = capsys.readouterr().out.splitlines()[-2:]
    assert f"{out}/model.pt: {result['final_accuracy']:.2f} % of 50 images" == final
    assert result["final_accuracy"] != 10
    assert f": {10 - result['final_accuracy']:+.2f} points, " in other

    tested = tmp_path / "tested"
    vat_scar.main([*options, "--epochs", "1", "--steps-per-epoch", "1", "--out", str(tested)])
    for model in (tested / "model.pt", tmp_path / "model.pt"):
        with pytest.raises(SystemExit, match="scored on other images|there is no file"):
            mcnemar.main([f"{out}/model.pt", str(model)])


def test_attack(few_images, tmp_path, monkeypatch, capsys):
    """results/attack.py: PGD stays within eps and is no weaker than FGSM; the counts add up."""
    monkeypatch.setattr(sys, "path", [str(HERE / "results"), *sys.path])
    attack = __import__("attack")
    monkeypatch.setattr(__import__("mcnemar"), "load_images", lambda data, data_dir: few_images)
    out = tmp_path / "run"
    result = vat_scar.main([*SMALL.split(), "--table2-eps", "2", "--eps", "2", "--out", str(out)])
    model = WideResNet(10, 10, 1).eval()
    model.load_state_dict(torch.load(out / "pretrain.pt"))
    x, y = vat_scar.to_float(few_images[2]), few_images[3]
    fgsm_x, pgd_x = fgsm(model, x, y, 8 / 255), attack.pgd(model, x, y, 8 / 255)
    assert (pgd_x - x).abs().max() <= 8 / 255 + 1e-6 and 0 <= pgd_x.min() and pgd_x.max() <= 1
    with torch.no_grad():
        losses = [F.cross_entropy(model(images), y).item() for images in (x, fgsm_x, pgd_x)]
    assert losses[0] < losses[1] < losses[2]

    attack.main([f"{out}/pretrain.pt", "--eps", "2"])
    _, by_fgsm, by_pgd = capsys.readouterr().out.splitlines()[-3:]
    row = result["table2"][0]
    assert f"eps 2 fgsm keeps {row['kept']}, {row['kept_correct']} of them right" in by_fgsm
    spread = json.loads(by_pgd.partition("predicted ")[2])
    assert len(spread) == 10 and sum(spread) == len(y)
    (tmp_path / "result.json").write_text("[]")
    for model in (tmp_path / "pretrain.pt", tmp_path / "nowhere" / "pretrain.pt"):
        with pytest.raises(SystemExit, match="damaged|there is no file"):
            attack.main([str(model)])


def test_plot(tmp_path, monkeypatch):
    """results/plot.py draws the README's figure as it stands in the repository."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "path", [str(HERE / "results"), *sys.path])
    __import__("plot").main(HERE / "results" / "table1", tmp_path / "table1.svg")
    drawn = (tmp_path / "table1.svg").read_text()
    for text in ("FixMatch", "MixMatch", "VAT", "test accuracy (%)", "control: nothing added"):
        assert (
            f">{text}</text>" in drawn
            and f">{text}</text>" in (HERE / "results" / "table1.svg").read_text()
        )
    with pytest.raises(SystemExit, match="no finished runs"):
        __import__("plot").main(tmp_path, tmp_path / "none.svg")


def test_tensorboard(few_images, tmp_path):
    pytest.importorskip("tensorboard")
    fixmatch_scar.main(
        [*SMALL.split(), "--tensorboard", "--table2-eps", "1", "--out", str(tmp_path / "run")]
    )
    assert list((tmp_path / "run").glob("events*"))


@needs_cuda
@pytest.mark.parametrize("script", SCRIPTS)
def test_whole_run_on_cuda(script, few_images, tmp_path, capsys):
    for compiled in ("--compile", "--no-compile"):
        out = tmp_path / compiled
        result = script.main(
            [*SMALL.split(), "--device", "cuda", compiled, "--table2-eps", "1", "--out", str(out)]
        )
        assert result["peak_memory_gib"] > 0
        output = capsys.readouterr().out
        assert "going on without it" not in output  # compiled and captured, if so asked


@needs_cuda
def test_fgsm_on_cuda_is_that_of_the_cpu():
    torch.manual_seed(0)
    model, x, y = WideResNet(10, 10, 1), torch.rand(16, 3, 32, 32), torch.arange(16) % 10
    on_cpu = fgsm(model, x, y, 0.05)
    on_cuda = fgsm(model.cuda(), x.cuda(), y.cuda(), 0.05).cpu()
    assert ((on_cpu - on_cuda).abs() > 1e-6).float().mean() < 0.01


@needs_cuda
@pytest.mark.parametrize("index", range(14), ids=[name for name, _, _ in RANDAUGMENT_OPS])
def test_randaugment_on_cuda_is_that_of_the_cpu(varied_images, index):
    x, level = varied_images, torch.linspace(0, 1, len(varied_images))
    op = torch.full((len(x),), index)
    difference = (
        randaugment_op(x.cuda(), op.cuda(), level.cuda()).cpu().int()
        - randaugment_op(x, op, level).int()
    )
    assert (difference != 0).any(1).float().mean() <= 0.01


# ---------------------------------------------------------------------------------------- bad input


def refusal(capsys, *argv, script=fixmatch_scar, code=2):
    """The one sentence with which a command line is turned down."""
    with pytest.raises(SystemExit) as stopped:
        script.main([str(word) for word in argv])
    assert stopped.value.code == code
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.count("error:") == 1
    sentence = error.split("error:")[1].strip()
    assert sentence and "\n" not in sentence
    return sentence


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--depth 27", "6n + 4"),
        ("--depth 4", "6n + 4"),
        ("--width 0", "--width"),
        ("--width 1000000000000", "--width"),
        ("--lambda-u 1e39", "--lambda-u"),
        ("--eps -1", "--eps"),
        ("--eps nan", "--eps"),
        ("--table2-eps 1 -2", "--table2-eps"),
        ("--epochs 0", "--epochs"),
        ("--steps-per-epoch 0", "--steps-per-epoch"),
        ("--batch-size 0", "--batch-size"),
        ("--lr 0", "--lr"),
        ("--lr inf", "--lr"),
        ("--weight-decay -1", "--weight-decay"),
        ("--ema-decay 1", "--ema-decay"),
        ("--lambda-u -1", "--lambda-u"),
        ("--val -1", "--val"),
        ("--seed -1", "--seed"),
        ("--num-labeled 0", "--num-labeled"),
        ("--num-labeled 9", "too few"),
        ("--num-labeled 6000", "no unlabeled image"),
        ("--num-labeled 5990 --val 10", "no unlabeled image"),
        ("--val 5", "--val 5: "),
        ("--data imagenet", "imagenet"),
        ("--epoch 3", "--epoch"),
        ("--pretrained=", "--pretrained"),
        ("--pretrained nowhere/pretrain.pt", "nowhere/pretrain.pt"),
        ("--pretrained README.md", "README.md"),
    ],
)
def test_refuses(script, options, sentence, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "load_images", lambda data, data_dir: images)
    command = ["--data", "synthetic", "--out", tmp_path / "run", *options.split()]
    assert sentence in refusal(capsys, *command, script=script)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "script, options",
    [
        (fixmatch_scar, "--mu 0"),
        (fixmatch_scar, "--threshold 0"),
        (fixmatch_scar, "--threshold 1.01"),
        (mixmatch_scar, "--temperature 0"),
        (mixmatch_scar, "--temperature nan"),
        (mixmatch_scar, "--alpha -0.1"),
        (mixmatch_scar, "--alpha inf"),
        (vat_scar, "--vat-eps 0"),
        (vat_scar, "--vat-eps -3"),
        (vat_scar, "--xi 0"),
        (vat_scar, "--xi nan"),
        (vat_scar, "--power-iterations -1"),
        (vat_scar, "--entropy-weight -1"),
        (vat_scar, "--mu 2"),  # another method's option
    ],
)
def test_refuses_what_only_one_method_has(script, options, tmp_path, capsys):
    sentence = refusal(capsys, *options.split(), "--out", tmp_path / "run", script=script)
    assert options.split()[0] in sentence


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_refuses_cuda_without_one(tmp_path, capsys):
    assert "--device cpu" in refusal(
        capsys, "--data", "synthetic", "--device", "cuda", "--out", tmp_path / "run"
    )


def test_refuses_missing_cifar10(tmp_path, monkeypatch, capsys):
    def no_network(root, *args, **kwargs):
        Path(root).mkdir()  # as torchvision does first
        raise OSError("no network")

    monkeypatch.setattr(common, "CIFAR10", no_network)
    sentence = refusal(capsys, "--data-dir", tmp_path / "data", "--out", tmp_path / "run")
    assert "--data synthetic" in sentence and "--data folder" in sentence
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "fault", ["no test", "one class", "other classes", "empty class", "unreadable", "too few"]
)
def test_refuses_folder(fault, tmp_path, capsys):
    root = write_folder(tmp_path / "data")
    sentence = {
        "no test": "no folder test",
        "one class": "has one class, ant",
        "other classes": "wasp",
        "empty class": "wasp",
        "too few": "class 0",
    }.get(fault)
    if fault == "no test":
        (root / "test").rename(root / "check")
    elif fault == "one class":
        shutil.rmtree(root / "train" / "bee")
        shutil.rmtree(root / "test" / "bee")
    elif fault == "other classes":
        (root / "test" / "bee").rename(root / "test" / "wasp")
    elif fault == "empty class":
        (root / "train" / "wasp").mkdir()
    elif fault == "unreadable":
        broken = root / "train" / "ant" / "1.png"
        broken.write_bytes(broken.read_bytes()[:60])
        sentence = str(broken)
    command = [
        "--data",
        "folder",
        "--data-dir",
        root,
        "--num-labeled",
        8 if fault == "too few" else 2,
    ]
    if fault == "too few":
        (root / "train" / "ant" / "0.png").unlink()
        for i in range(10, 20):
            Image.new("RGB", (32, 32)).save(root / "train" / "bee" / f"{i}.png")
    assert sentence in refusal(capsys, *command, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_refuses_a_folder_that_is_not_this_run(few_images, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("precious")
    assert "is a file" in refusal(capsys, *SMALL.split(), "--out", file)
    assert "is a file" in refusal(capsys, *SMALL.split(), "--out", file / "below")
    assert "not empty" in refusal(capsys, *SMALL.split(), "--out", tmp_path)
    assert file.read_text() == "precious" and list(tmp_path.iterdir()) == [file]

    out = tmp_path / "run"
    fixmatch_scar.main([*SMALL.split(), "--table2-eps", "1", "--out", str(out)])
    before = {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    sentence = refusal(
        capsys, *SMALL.split(), "--table2-eps", "1", "--lr", 0.1, "--seed", 5, "--out", out
    )
    assert "lr was 0.03, now 0.1" in sentence and "seed was 0, now 5" in sentence
    assert before == {path: path.read_bytes() for path in out.iterdir()}
    assert "WRN-16-1" in refusal(
        capsys,
        *SMALL.split(),
        "--depth",
        16,
        "--pretrained",
        out / "pretrain.pt",
        "--out",
        tmp_path / "other",
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_keeps_the_last_checkpoint(few_images, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_at(patch, fixmatch_scar, "training_step", 6)
        fixmatch_scar.main([*SMALL.split(), "--out", str(out)])
    before = (out / "checkpoint.pt").read_bytes()
    (out / "checkpoint.pt.partial").symlink_to("/dev/full")
    capsys.readouterr()
    assert "No space left" in refusal(capsys, *SMALL.split(), "--out", out, code=1)
    assert (out / "checkpoint.pt").read_bytes() == before


def test_another_process_while_the_images_are_loaded(few_images, tmp_path, monkeypatch, capsys):
    """What it wrote is not overwritten with what was read before."""
    command = [*SMALL.split(), "--table2-eps", "1", "--out", str(tmp_path / "run")]
    calls = []

    def slow(data, data_dir):
        calls.append(None)
        if len(calls) == 1:
            fixmatch_scar.main(command)
            capsys.readouterr()
        return few_images

    monkeypatch.setattr(fixmatch_scar, "load_images", slow)
    assert "another process has just written" in refusal(capsys, *command)
    assert fixmatch_scar.main(command)["final_accuracy"] >= 0
    assert len(read_rows(tmp_path / "run")) == 4


def test_stops_when_the_weights_are_not_finite(few_images, tmp_path, monkeypatch, capsys):
    """Also when the very last step has done it, whose loss was still fine."""
    original = vat_scar.training_step

    def last_step_overflows(run, args, *inputs):
        metrics = original(run, args, *inputs)
        if inputs[-1] > 0.3:  # the average's decay at the fourth step
            run.average.linear.bias.data.fill_(math.inf)
        return metrics

    monkeypatch.setattr(vat_scar, "training_step", last_step_overflows)
    command = [*SMALL.split(), "--out", tmp_path / "run"]
    assert "pretrain epoch 1" in refusal(capsys, *command, script=vat_scar, code=1)


def test_stops_when_the_loss_is_not_finite(few_images, tmp_path, capsys):
    with np.errstate(all="ignore"):
        sentence = refusal(capsys, *SMALL.split(), "--lr", 1e30, "--out", tmp_path / "run", code=1)
    assert "not finite" in sentence and "--lr" in sentence


# --------------------------------------------------------------------------- more than one process


def torchrun(call, *options):
    """Runs a function of this file in two processes, as torchrun would start a script."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", *options, "--no-python", sys.executable, "-c"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, f"import test_smoke; test_smoke.{call}"],
        cwd=HERE, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip


def see_few_images(patch):
    """The fixture few_images, for the processes of torchrun."""
    x_train, y_train, x_test, y_test = load_images("synthetic", None)
    few = x_train[:300], y_train[:300], x_test[:100], y_test[:100]
    for script in SCRIPTS:
        patch.setattr(script, "load_images", lambda data, data_dir: few)
    return few


def global_batch(script, images):
    """Loss and gradient of a training step on this process's share of a batch.

    What would depend on the other images of a process is out: batch norm is in eval mode, nothing
    is augmented or mixed, and VAT's search starts at the image.
    """
    options = {"fixmatch": ["--threshold", "0.1"], "mixmatch": ["--alpha", "0"], "vat": []}
    run, args = small_run(script, images, *options[script.METHOD])
    run.model.eval()
    rank, count = script.ranks()
    index_l, index_u, *numbers = next(draw_inputs(script, args, 1))
    numbers[1] += 1  # lambda_u, which starts at 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "weak_augment", lambda x: x)
        patch.setattr(script, "strong_augment", lambda x: x // 2, raising=False)
        patch.setattr(torch, "randn_like", lambda x: x - 0.5)
        inputs = index_l[rank::count], index_u[rank::count], *numbers
        metrics = script.training_step(run, args, *inputs)
    script.average_over_ranks([metrics["loss"]])
    return metrics["loss"], torch.cat([p.grad.flatten() for p in run.model.parameters()])


def on_two_ranks(root):
    """What the tests below look at, in one go, as starting processes takes long."""
    rank, root = int(os.environ["RANK"]), Path(root)
    with pytest.MonkeyPatch.context() as patch:
        images = see_few_images(patch)
        patch.setattr(torch.distributed, "destroy_process_group", lambda: None)
        for script in SCRIPTS:
            options = ["--epochs", "1", "--table2-eps", "1", "--pretrained", root / "pretrain.pt"]
            options += ["--out", root / f"{script.METHOD}2"]
            result = script.main([*SMALL.split(), *map(str, options)])
            assert result["ranks"] == 2
            loss, gradient = global_batch(script, images)
            if rank == 0:
                torch.save((loss, gradient), root / f"{script.METHOD}.pt")
        assert torch.distributed.get_backend() == "gloo"

        run, args = small_run(vat_scar, images)
        run.model.bn.running_mean.fill_(rank)
        vat_scar.settle_ranks(run)
        assert (run.model.bn.running_mean == 0.5).all()
        if rank == 1:
            run.average.linear.bias += 1e-6
        with pytest.raises(FloatingPointError, match="different weights"):
            vat_scar.settle_ranks(run)
        with pytest.raises(SystemExit) as refused:
            vat_scar.main([*SMALL.split(), "--batch-size", "5", "--out", str(root / "refused")])
        assert refused.value.code == 2

        result = fixmatch_scar.main([*SMALL.split(), "--out", str(root / "one_then_two")])
        assert result["ranks"] == 2
        interrupt_at(patch, fixmatch_scar, "training_step", 14)
        with pytest.raises(SystemExit):
            fixmatch_scar.main([*SMALL.split(), "--out", str(root / "two_then_one")])


@pytest.fixture(scope="module")
def two_ranks(images, tmp_path_factory):
    """The folder that on_two_ranks leaves."""
    root = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    torch.save(WideResNet(10, 10, 1).state_dict(), root / "pretrain.pt")
    with pytest.MonkeyPatch.context() as patch:
        see_few_images(patch)
        interrupt_at(patch, fixmatch_scar, "training_step", 7)
        with pytest.raises(SystemExit):
            fixmatch_scar.main([*SMALL.split(), "--out", str(root / "one_then_two")])
    done = torchrun(f"on_two_ranks({str(root)!r})")
    assert done.returncode == 0, done.stderr
    return root, done


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_ranks_keep_what_one_process_keeps(script, two_ranks, few_images, tmp_path):
    root = two_ranks[0]
    options = ["--epochs", "1", "--table2-eps", "1", "--pretrained", root / "pretrain.pt"]
    one = script.main([*SMALL.split(), *map(str, options), "--out", str(tmp_path / "run")])
    two = json.loads((root / f"{script.METHOD}2" / "result.json").read_text())
    assert (one["ranks"], two["ranks"]) == (1, 2) and "--nproc-per-node 2" in two["command"]
    assert one["selection"] == two["selection"] and one["table2"] == two["table2"]
    assert one["selection"]["kept"] > 0
    labels = [
        torch.load(path / "checkpoint.pt", weights_only=True)["labels"]
        for path in (tmp_path / "run", root / f"{script.METHOD}2")
    ]
    assert torch.equal(*labels)


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_ranks_have_the_gradient_of_the_whole_batch(script, two_ranks, images):
    loss, gradient = torch.load(two_ranks[0] / f"{script.METHOD}.pt", weights_only=True)
    expected_loss, expected_gradient = global_batch(script, images)
    assert gradient.abs().max() > 1e-2
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


def test_runs_go_on_with_another_number_of_ranks(two_ranks, few_images):
    root, done = two_ranks
    two_then_one = fixmatch_scar.main([*SMALL.split(), "--out", str(root / "two_then_one")])
    assert two_then_one["ranks"] == 1
    for name in ("one_then_two", "two_then_one"):
        epochs = [(row["phase"], row["epoch"]) for row in read_rows(root / name)]
        assert epochs == [(phase, n) for phase in ("pretrain", "finetune") for n in "12"]
    # process 0 alone speaks
    assert done.stdout.count("pretrain     2 ") == 2 and "2 processes on" in done.stdout
    assert "error: --batch-size 5 must be a multiple of 2 processes" in done.stderr
    assert not (root / "refused").exists()


def rank_1_dies(root):
    """A run whose process 1 is killed in the second epoch, the first time."""
    signal.signal(signal.SIGTERM, vat_scar.stop)
    with pytest.MonkeyPatch.context() as patch:
        see_few_images(patch)
        original, calls = vat_scar.training_step, []

        def step(*args):
            calls.append(None)
            if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
                if len(calls) == 7:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        patch.setattr(vat_scar, "training_step", step)
        vat_scar.main([*SMALL.split(), "--table2-eps", "1", "--out", f"{root}/run"])


def test_a_killed_rank_ends_the_others_and_restarts_go_on(tmp_path):
    started = time.time()
    done = torchrun(f"rank_1_dies({str(tmp_path)!r})", "--max-restarts", "1")
    assert done.returncode == 0, done.stderr
    assert time.time() - started < 120
    # process 0 hears of it from its connection, or from torchrun, whichever comes first
    sentences = "error: another process has ended", "stopped; the same command goes on"
    assert any(sentence in done.stderr for sentence in sentences)
    assert "going on after pretrain epoch 1" in done.stdout
    assert [row["epoch"] for row in read_rows(tmp_path / "run")] == list("1212")


# ------------------------------------------------------------------ faults, interruptions, bad data

# Runs a script in forked children, kills them at random moments, then lets one go on to the end. On
# the way it is also killed once before its first file, in the selection, and in pretraining and in
# fine-tuning with a checkpoint half written and with one written but not yet moved into place.
KILLER = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)  # a forked child would wait for the threads that stayed behind
import {script} as script
from common import load_images

x, y, x_test, y_test = load_images("synthetic", None)
few = x[:300], y[:300], x_test[:100], y_test[:100]
script.load_images = lambda data, data_dir: few
originals = script.json.dumps, script.select_clean, os.fsync, os.replace

def passed(place):  # how often the run has been here, killed or not
    with open({out!r} + "/" + place, "a") as file:
        file.write("x")
        return file.tell()

def hook(place, original, times, applies=lambda *args: True, before=lambda *args: None):
    def hooked(*args, **kwargs):
        if applies(*args) and passed(place) in times:
            before(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return hooked

def child(folder, killed):
    pid = os.fork()
    if pid:
        return pid
    sys.stdout = open(os.devnull, "w")
    if killed:
        dumps, select_clean, fsync, replace = originals
        script.json.dumps = hook("dumps", dumps, [1])
        script.select_clean = hook("select_clean", select_clean, [1])
        def is_checkpoint(file):
            return os.readlink(f"/proc/self/fd/{{file}}").endswith("checkpoint.pt.partial")
        def cut_off(file):
            os.ftruncate(file, os.fstat(file).st_size // 2)
        script.os.fsync = hook("fsync", fsync, [2, 8], is_checkpoint, cut_off)
        script.os.replace = hook(
            "replace", replace, [2, 6], lambda _, path: path.name == "checkpoint.pt"
        )
    script.main({argv} + ["--out", {out!r} + "/" + folder])
    os._exit(0)

started = time.time()
assert os.waitpid(child("one_go", False), 0)[1] == 0
length = time.time() - started
random.seed(0)
survived = {{"pretraining": 0, "fine-tuning": 0}}
status, random_kills = signal.SIGKILL, {kills}
while status == signal.SIGKILL:
    pid = child("killed", True)
    if random_kills:
        random_kills -= 1
        time.sleep(random.uniform(0, length / 4))
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if status == signal.SIGKILL:
        tuning = os.path.exists({out!r} + "/killed/pretrain.pt")
        survived["fine-tuning" if tuning else "pretraining"] += 1
assert status == 0, status
print(survived, "one run takes", round(length, 1), "s")
print(sum(survived.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize("script", SCRIPTS[: 3 if "KILLS" in os.environ else 1])
def test_killed_at_any_moment_it_ends_the_same(script, tmp_path):
    """KILLS=40 does it for all three scripts, with so many kills at random moments."""
    program = KILLER.format(
        script=script.__name__,
        argv=[*SMALL.split(), "--epochs", "4", "--table2-eps", "1"],
        out=str(tmp_path),
        kills=os.environ.get("KILLS", 6),
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(script.METHOD, done.stdout)
    assert int(done.stdout.split()[-1]) >= 6
    for name in ("pretrain.pt", "model.pt"):
        one_go, killed = (
            torch.load(tmp_path / run / name, weights_only=True) for run in ("one_go", "killed")
        )
        assert all(torch.equal(one_go[key], killed[key]) for key in one_go | killed)
    epochs = [(row["phase"], row["epoch"]) for row in read_rows(tmp_path / "killed")]
    assert epochs == [(phase, f"{n}") for phase in ("pretrain", "finetune") for n in range(1, 5)]


@pytest.mark.parametrize("script", SCRIPTS[:1])  # the text is the same in all
def test_second_process_on_a_run_folder_leaves(script, few_images, tmp_path, monkeypatch, capsys):
    command = [*SMALL.split(), "--out", str(tmp_path / "run")]
    sentences, original = [], script.training_step

    def second_process(*args):
        if not sentences:
            sentences.append(None)
            sentences[0] = refusal(capsys, *command, script=script)
        return original(*args)

    monkeypatch.setattr(script, "training_step", second_process)
    assert script.main(command)["final_accuracy"] >= 0
    assert "in use by another process" in sentences[0]


class Hostile:
    """Unpickled without care, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def stopped_runs(images, tmp_path_factory):
    """A folder with runs that were stopped in fine-tuning, and the command that makes another."""
    root = tmp_path_factory.mktemp("stopped")
    x_train, y_train, x_test, y_test = images
    few = x_train[:300], y_train[:300], x_test[:100], y_test[:100]
    command = [*SMALL.split(), "--table2-eps", "1"]
    for script, name, options in (
        (fixmatch_scar, "mine", []),
        (fixmatch_scar, "slow", ["--lr", "0.01"]),
        (fixmatch_scar, "seed", ["--seed", "1"]),
        (vat_scar, "vat", []),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(script, "load_images", lambda data, data_dir: few)
            interrupt_at(patch, script, "training_step", 14)
            script.main([*command, *options, "--out", str(root / name)])
    return root, command


@pytest.fixture
def stopped(stopped_runs, few_images, tmp_path, capsys):
    """A copy of stopped_runs for one test."""
    shutil.copytree(stopped_runs[0], tmp_path / "runs")
    return tmp_path / "runs", stopped_runs[1]


@pytest.mark.parametrize("fault", ["cut off", "empty", "text", "hostile", "a list", "weights"])
@pytest.mark.parametrize("name", ["checkpoint.pt", "pretrain.pt", "result.json", "args.json"])
def test_damaged_files_are_named_and_left_alone(name, fault, stopped, capsys):
    root, command = stopped
    command = [*command, "--out", str(root / "mine")]
    if name == "args.json":
        (root / "mine" / "checkpoint.pt").unlink()  # without which it is not needed
    if name == "pretrain.pt":
        (root / "mine" / "args.json").unlink()  # which would tell more
        command[-1:] = [str(root / "other"), "--pretrained", str(root / "mine" / name)]
    path = root / "mine" / name
    whole = path.read_bytes() if path.exists() else b"{}"
    faults = {"cut off": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}
    if fault == "hostile":
        torch.save(Hostile(root.parent / "harm"), path)
    elif fault == "a list":
        path.write_text("[1, 2]")
        if path.suffix == ".pt":
            torch.save([1, 2], path)
    elif fault == "weights":  # a good file, but another kind
        torch.save({"weight": torch.ones(2)}, path)
    else:
        path.write_bytes(faults[fault])
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert str(path) in refusal(capsys, *command)
    assert before == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert not (root.parent / "harm").exists()


def test_checkpoints_of_another_run_are_refused(stopped, few_images, monkeypatch, capsys):
    """Another method's or setting's, put into a run folder, or given as --pretrained."""
    root, command = stopped
    mine = root / "mine" / "checkpoint.pt"
    whole = mine.read_bytes()
    resume = [*command, "--out", str(root / "mine")]
    for other, sentence in (("vat", "method was vat"), ("slow", "lr was 0.01, now 0.03")):
        mine.write_bytes((root / other / "checkpoint.pt").read_bytes())
        assert sentence in refusal(capsys, *resume)
    checkpoint = torch.load(root / "slow" / "checkpoint.pt", weights_only=True)
    checkpoint["given"]["lr"], checkpoint["model"] = 0.03, {}
    torch.save(checkpoint, mine)
    assert "checkpoint.pt does not fit this run" in refusal(capsys, *resume)
    mine.write_bytes(whole)
    assert fixmatch_scar.main(resume)["seed"] == 0

    new = [*command, "--out", str(root / "new"), "--pretrained"]
    for other, sentence in (("vat", "method was vat"), ("seed", "seed was 1, now 0")):
        assert sentence in refusal(capsys, *new, root / other / "pretrain.pt")
    x_train, y_train, x_test, y_test = few_images
    with monkeypatch.context() as patch:
        others = x_train, y_train, 255 - x_test, y_test
        patch.setattr(fixmatch_scar, "load_images", lambda data, data_dir: others)
        assert "images_crc32 was" in refusal(capsys, *new, root / "mine" / "pretrain.pt")
    weights = torch.load(root / "mine" / "pretrain.pt", weights_only=True)
    weights["conv.weight"][0] = math.nan
    torch.save(weights, root / "nan.pt")
    assert "not finite" in refusal(capsys, *new, root / "nan.pt")
    assert not (root / "new").exists()


@pytest.mark.parametrize("kept", [False, True], ids=["nothing", "everything"])
def test_selection_of_nothing_or_everything(kept, few_images, tmp_path, monkeypatch, capsys):
    original = vat_scar.select_clean

    def all_or_nothing(model, x, eps):
        keep, pseudo = original(model, x, eps)
        return torch.full_like(keep, kept), pseudo

    monkeypatch.setattr(vat_scar, "select_clean", all_or_nothing)
    result = vat_scar.main([*SMALL.split(), "--table2-eps", "1", "--out", str(tmp_path / "run")])
    assert result["selection"]["kept"] == (200 if kept else 0)
    assert ("200 images (100.00 %)" if kept else "adds nothing") in capsys.readouterr().out
    with Image.open(tmp_path / "run" / "selection.png") as picture:
        assert picture.size == (17 * 38 + 2, 10 * 38 + 2)
    strict = (tmp_path / "run" / "result.json").read_text()
    assert "NaN" not in strict and json.loads(strict)["table2"][0]["kept"] == (100 if kept else 0)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        MemoryError(),
    ],
)
def test_out_of_memory_is_a_sentence(error, few_images, tmp_path, monkeypatch, capsys):
    def no_memory(*args):
        raise error

    monkeypatch.setattr(vat_scar, "training_step", no_memory)
    command = [*SMALL.split(), "--out", tmp_path / "run"]
    assert "lower --batch-size" in refusal(capsys, *command, script=vat_scar, code=1)


def test_images_of_every_kind_are_read_or_refused(tmp_path):
    """What is not an 8-bit image, or not a whole one, is named; everything else is read."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    grey = image.convert("L")
    image.save(tmp_path / "plain.png")
    image.convert("RGBA").save(tmp_path / "rgba.png")
    grey.save(tmp_path / "grey.png")
    grey.convert("1").save(tmp_path / "black and white.png")
    image.convert("CMYK").save(tmp_path / "cmyk.tiff")
    image.quantize(256).save(tmp_path / "palette.png")
    turned = image.rotate(90)
    image.save(tmp_path / "animated.png", save_all=True, append_images=[turned])
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "tiny.png")
    Image.new("RGB", (4000, 3000), (9, 8, 7)).save(tmp_path / "large.jpg")
    read = {path.stem: common._read_image(path) for path in tmp_path.iterdir()}
    assert all(array.shape == (32, 32, 3) and array.dtype == np.uint8 for array in read.values())
    for name in ("plain", "rgba", "animated"):
        assert (read[name] == pixels).all(), name
    assert (read["grey"] == np.asarray(grey)[:, :, None]).all()
    assert np.abs(read["cmyk"].astype(int) - pixels).max() <= 2
    assert np.abs(read["palette"].astype(int) - pixels).mean() < 20
    for name in ("tiny", "large"):
        assert np.abs(read[name].astype(int) - [9, 8, 7]).max() <= 2

    bad = tmp_path / "bad"
    bad.mkdir()
    Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 60).save(bad / "16 bit.png")
    Image.fromarray(np.ones((32, 32), np.float32)).save(bad / "float.tiff")
    Image.new("1", (20000, 20000)).save(bad / "bomb.png")
    (bad / "text.png").write_text("hello")
    (bad / "empty.png").touch()
    whole = (tmp_path / "plain.png").read_bytes()
    (bad / "cut off.png").write_bytes(whole[: len(whole) // 2])
    for path in bad.iterdir():
        with pytest.raises(ValueError, match=str(path)) as error:
            common._read_image(path)
        assert "\n" not in str(error.value)


def test_any_command_line_is_parsed_or_refused(few_images, tmp_path, capsys):
    """Random ones: arguments, or exit code 2 with one sentence; then a few of them run.

    COMMAND_LINES=3334 tries so many for each script.
    """
    tries = int(os.environ.get("COMMAND_LINES", 400))
    values = [
        "0", "1", "2", "-1", "3", "10", "16", "0.5", "1e-3", "1e400", "-1e400", "nan", "inf",
        "99999999999999999999", "9" * 5000, "1_0", "0x10", "", " ", "--", "-", "é", "\t",
        "cpu", "cuda", "auto", "fgsm", "none", "confidence", "synthetic", "folder", "bf16", "fp32",
        "-inf", "1 2", "%s", "{}", "../..",
    ]  # fmt: skip
    rng, accepted = np.random.default_rng(0), []
    for script in SCRIPTS:
        with pytest.raises(SystemExit):
            script.parse_args(["--help"])
        names = sorted(set(re.findall(r"--[a-z][a-z0-9-]+", capsys.readouterr().out)) - {"--help"})
        assert len(names) > 25
        for _ in range(tries):
            argv = []
            for _ in range(rng.integers(1, 6)):
                argv.append(str(rng.choice(names)))
                argv += [str(value) for value in rng.choice(values, rng.integers(0, 3))]
            try:
                accepted.append((script, argv, script.parse_args(argv)))
            except SystemExit as refused:
                error = capsys.readouterr().err
                assert refused.code == 2 and error.count("error: ") == 1, argv
                assert error.split("error: ")[1].strip() and error.count("\n") == 2, argv
    assert len(accepted) > tries / 20

    ran = 0
    for script, argv, args in accepted:
        if args.tensorboard or args.compile or args.device == "cuda" or args.precision == "bf16":
            continue  # not everywhere
        small = {"depth": 10, "width": 2, "epochs": 2, "steps_per_epoch": 3, "batch_size": 10}
        if args.data == "folder" or args.out or any(
            getattr(args, name) > most for name, most in small.items() if f"--{name}" in argv
        ):  # fmt: skip
            continue
        sizes = (
            "--data synthetic --depth 10 --width 1 --epochs 1 --steps-per-epoch 1 --batch-size 2"
        )
        command = [*argv, *sizes.split(), "--num-labeled", "20", "--out", str(tmp_path / f"{ran}")]
        try:
            assert script.main(command)["final_accuracy"] >= 0
        except SystemExit as refused:
            assert refused.code in (1, 2), argv
            assert capsys.readouterr().err.count("error: ") == 1, argv
        ran += 1
        if ran == 5:
            break
    assert ran == 5


# ------------------------------------------------------------------------------------- run_all.sh


def run_all(*options, **variables):
    """run_all.sh with the Python of the tests, unless PYTHON is given: (exit code, out, err)."""
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    command = ["bash", str(HERE / "run_all.sh"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def write_result(root, method, select, seed, before, after, pretrained=None, eps=1.0, **other):
    """A result.json as a script leaves it, in a run folder of its own; `other` goes to its args."""
    args = vars(vars(sys.modules[f"{method}_scar"])["parse_args"]([]))
    args = {**args, "seed": seed, "select": select, "eps": eps, "pretrained": pretrained, **other}
    folder = root / f"run{len(list(root.glob('run*'))):02}"
    folder.mkdir(parents=True)
    table2_eps = sorted({1.0, 6.0} | sys.modules[f"{method}_scar"].PAPER_TABLE2.keys())
    result = {
        "method": method,
        "data": "CIFAR-10 (JPEG)",
        "scored_on": "validation" if args["val"] else "test",
        "select": select,
        "eps": eps,
        "seed": seed,
        "pretrain_accuracy": before,
        "final_accuracy": after,
        "selection": {"kept": 0 if select == "none" else 40000, "kept_correct": 30000 + seed},
        "seconds": 1800.0,
        "table2": [
            {
                "eps": given,
                "kept": 8000 if given < 6 else 0,
                "kept_correct": 7000 + 100 * seed if given < 6 else 0,
                "rejected": 2000 if given < 6 else 10000,
                "rejected_wrong": 500 if given < 6 else 1500,
            }
            for given in table2_eps
        ],
        "device": "a device",
        "ranks": 1,
        "versions": {"torch": "2.0"},
        "args": args,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    return folder / "result.json"


def cells(text, start):
    """The cells of the tables' one row whose first cell is `start`."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    (row,) = [row for row in rows if row and row[0] == start]
    return row[1:]


def test_tables_of_known_results(tmp_path):
    """Means, paired differences and counts by hand; what must not share a mean does not."""

    def fixmatch(select, seed, before, after, theta=None, **other):
        theta = theta and f"{tmp_path}/{theta}/pretrain.pt"
        return write_result(tmp_path, "fixmatch", select, seed, before, after, theta, **other)

    for seed, before, after, control in ((0, 80, 83, 82), (1, 82, 84, 84), (2, 84, 88, 83)):
        theta = fixmatch("fgsm", seed, before, after).parent.name
        # scored elsewhere a theta~ may differ by an image: the name of its run is what counts
        fixmatch("none", seed, before + 0.01, control, theta)
        fixmatch("fgsm", seed, before, after + 1, theta, eps=2.0)
    fixmatch("none", 3, 70, 71, "elsewhere")
    lonely = fixmatch("fgsm", 0, 10, 11, lambda_u=2.0).parent.name
    fixmatch("none", 0, 10, 12, lonely, lambda_u=2.0, lr=0.5)
    fixmatch("fgsm", 0, 20, 21, epochs=3)
    tuned = fixmatch("fgsm", 0, 30, 31, val=100).parent.name
    fixmatch("fgsm", 0, 30, 33, tuned, val=100, reselect=2, true_share=0.25)
    fixmatch("none", 0, 30, 35, tuned, val=100)
    twin = fixmatch("fgsm", 0, 40, 41).parent.name  # a second run of seed 0
    fixmatch("none", 0, 40, 42, twin)
    for number, other in enumerate(({"precision": "bf16"}, {"weight_decay": 0.1}, {"mu": 3})):
        fixmatch("fgsm", 0, 50 + number, 50, **other)
    write_result(tmp_path, "vat", "fgsm", 5, 85.5, 86.25, eps=6.0)
    code, whole, error = run_all(METHODS="", OUT=str(tmp_path))
    assert code == 0 and error == ""
    assert whole == (tmp_path / "tables.md").read_text() + "\n"

    short, text, tried = sorted(
        whole.split("\n## "), key=lambda part: ("200 + 200" in part, "validation" in part)
    )
    assert cells(short, "FixMatch")[1] == "20.00 (n = 1)"
    assert "batch 64, scored on 100 validation images\n" in tried
    assert "test accuracy" not in tried and "the test images" not in tried
    assert "; 1.5 hours" in tried
    assert cells(tried, "FixMatch + SCAR (eps 1, reselect 2, true_share 0.25)") == [
        "95.17", "33.00 (n = 1)", "+3.00 (n = 1)", "-2.00 (n = 1)", "75.00 (30000/40000)"
    ]  # fmt: skip
    usual = "lambda_u 1.0, lr 0.03, mu 7, precision auto, {}weight_decay 0.0005"
    name = f"FixMatch, {usual.format('')}"
    assert cells(text, name) == ["94.13", "82.00 ± 2.00 (n = 3)", "", "", ""]
    assert cells(text, f"{name} + SCAR (eps 1)") == [
        "95.17", "85.00 ± 2.65 (n = 3)", "+3.00 ± 1.00 (n = 3)", "+2.00 ± 2.65 (n = 3)",
        "75.00 ± 0.00 (n = 3), on average 30001.0/40000.0",
    ]  # fmt: skip
    assert cells(text, f"{name} + SCAR (eps 2)")[1] == "86.00 ± 2.65 (n = 3)"
    assert cells(text, f"{name} + nothing (control)") == [
        "", "83.00 ± 1.00 (n = 3)", "+0.99 ± 1.73 (n = 3)", "", ""
    ]  # fmt: skip
    other = name.replace("lambda_u 1.0", "lambda_u 2.0")
    assert cells(text, f"{other} + SCAR (eps 1)") == [
        "95.17", "11.00 (n = 1)", "+1.00 (n = 1)", "-", "75.00 (30000/40000)"
    ]  # fmt: skip
    other = other.replace("lr 0.03", "lr 0.5").replace("weight", "theta~ lr 0.03, weight")
    assert cells(text, f"{other} + nothing (control)")[1] == "12.00 (n = 1)"
    assert all(f"{before}.00 (n = 1)" in text for before in (50, 51, 52))
    assert cells(text, "VAT + SCAR (eps 6)")[:4] == [
        "86.79", "86.25 (n = 1)", "+0.75 (n = 1)", "-"
    ]  # fmt: skip
    assert cells(text, "VAT (eps 1)") == [
        "92.22 (7587/8227)", "47.10 (835/1773)", "93.75 (7500/8000)", "25.00 (500/2000)"
    ]  # fmt: skip
    assert cells(text, "VAT (eps 6)")[2:] == ["none (0/0)", "15.00 (1500/10000)"]
    assert cells(text, f"{name} (eps 1)") == [
        "99.59 (6385/6411)", "15.63 (561/3589)", "88.75 ± 1.25 (n = 3), on average 7100.0/8000.0",
        "25.00 ± 0.00 (n = 3), on average 500.0/2000.0",
    ]  # fmt: skip
    assert "- VAT: " in text and "vat_eps 3.0, " in text and "; seeds 5\n" in text
    assert "(its pretraining, elsewhere, is not counted in " in whole
    assert f"(its pretraining, {twin}, is not counted in " in whole
    assert "the same run as run00" in whole
    assert not any(f"{number}.00" in whole for number in (40, 42))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:300],
        lambda text: "[1, 2]",
        lambda text: text.replace('"final_accuracy": 93.0', '"final_accuracy": NaN'),
        lambda text: text.replace('"final_accuracy": 93.0', '"final_accuracy": 8300'),
        lambda text: text.replace('"final_accuracy": 93.0', '"final_accuracy": null'),
        lambda text: text.replace('"kept": 8000', '"kept": null'),
        lambda text: text.replace('"kept": 8000', '"kept": 10'),
        lambda text: text.replace('"select": "fgsm"', '"select": "fgms"'),
        lambda text: text.replace('"selection"', '"selected"'),
        lambda text: text.replace('"seed": 1, "pre', '"pre'),
        lambda text: text.replace('"method": "mix', '"method": "re'),
    ],
)
def test_tables_name_what_they_cannot_read(damage, tmp_path):
    write_result(tmp_path, "mixmatch", "fgsm", 0, 90.0, 93.0)
    odd = write_result(tmp_path, "mixmatch", "fgsm", 1, 90.0, 93.0)
    whole = odd.read_text()
    odd.write_text(damage(whole))
    assert odd.read_text() != whole
    code, text, error = run_all(METHODS="", OUT=str(tmp_path))
    assert code == 1 and error.startswith(f"error: {odd} is damaged") and error.count("\n") == 1
    assert cells(text, "MixMatch + SCAR (eps 1)")[1] == "93.00 (n = 1)"


def test_tables_of_nothing_leave_the_old_ones(tmp_path):
    (tmp_path / "tables.md").write_text("precious")
    code, out, error = run_all(METHODS="", OUT=str(tmp_path))
    assert (code, out) == (1, "") and error.startswith("error: there is no finished run")
    assert (tmp_path / "tables.md").read_text() == "precious"


def test_tables_have_the_papers_numbers_of_the_scripts(tmp_path):
    for script in SCRIPTS:
        write_result(tmp_path, script.METHOD, "fgsm", 0, 1.0, 2.0)
    _, text, _ = run_all(METHODS="", OUT=str(tmp_path))
    for script in SCRIPTS:
        first, last = cells(text, script.TITLE), cells(text, f"{script.TITLE} + SCAR (eps 1)")
        assert (first[0], last[0]) == script.PAPER_TABLE1
        for eps in (1.0, 2.0, 3.0, 4.0, 6.0)[: None if script is vat_scar else 1]:
            assert cells(text, f"{script.TITLE} (eps {eps:g})")[:2] == [*script.PAPER_TABLE2[eps]]


@pytest.mark.parametrize(
    "folder", sorted({path.parts[-3] for path in HERE.glob("results/*/*/result.json")})
)
def test_readme_has_the_tables_of_the_results(folder, tmp_path):
    """Every line of the tables that results/<folder> gives stands in the README."""
    shutil.copytree(HERE / "results" / folder, tmp_path / folder)
    code, text, _ = run_all(METHODS="", OUT=str(tmp_path / folder))
    lines = [line for line in text.splitlines() if line.startswith(("|", "- "))]
    assert code == 0 and len(lines) > 9
    readme = (HERE / "README.md").read_text().splitlines()
    assert [line for line in lines if line not in readme] == []


@pytest.mark.parametrize(
    "variables, options, sentence",
    [
        ({"METHODS": "vat fixmach"}, [], "no method 'fixmach'"),
        ({"DATA": "cifar100"}, [], "DATA=cifar100"),
        ({"SEEDS": "0 one"}, [], "not 'one'"),
        ({"CONTROLS": "none eps1"}, [], "no 'eps1'"),
        ({"TAG": "../elsewhere"}, [], "TAG=../elsewhere"),
        ({"CONTROLS": "eps0"}, ["--eps", "0.0"], "--eps 0 is what"),
        ({"EPOCHS": "many"}, [], "not 'many'"),
        ({"OUT": "file/runs"}, [], "OUT=file/runs cannot be written"),
        ({"OUT": "nowhere", "METHODS": ""}, [], "OUT=nowhere: there is no such folder"),
        ({"PYTHON": "no-python"}, [], "PYTHON=no-python"),
        ({}, ["--epochs=3"], "--epochs: set"),
        ({}, ["--mu", "2", "--data", "synthetic"], "--data: set"),
        ({}, ["--out", "elsewhere"], "--out differs"),
    ],
)
def test_run_all_refuses(variables, options, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("precious")
    code, out, error = run_all(*options, **variables)
    assert (code, out) == (2, "") and error.startswith("error: ") and error.count("\n") == 1
    assert sentence in error and list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_run_all_refuses_an_unknown_gpu(tmp_path):
    code, _, error = run_all(GPUS="0,7", DATA="synthetic", OUT=str(tmp_path / "runs"))
    assert code == 2 and error.startswith("error: GPUS=0 7: PyTorch can use 0 of them")


def test_run_all_has_help():
    code, text, error = run_all("--eps", "2", "--help", METHODS="vat")
    assert code == 0 and "GPUS=" in text and "Exit code" in text and "#" not in text


FAKE_PYTHON = """#!/usr/bin/env bash
case $1 in
    -c) echo 2; exit ;;
    -) exec "{python}" "$@" ;;
esac
echo "start $(basename "$1") $CUDA_VISIBLE_DEVICES ${{*:2}}" >> "{log}"
sleep 0.4
echo "end $(basename "$1") $CUDA_VISIBLE_DEVICES ${{*:2}}" >> "{log}"
case $* in *{fails}*) exit 1 ;; esac
"""


def script_args(started):
    """The arguments in a line of the stand-in's log, without a GPU."""
    return vat_scar.parse_args(started.split()[2:])


def fake_python(tmp_path, fails):
    """A stand-in for the scripts that takes 0.4 s and fails when its options hold `fails`."""
    path, log = tmp_path / "python", tmp_path / "log"
    path.write_text(FAKE_PYTHON.format(python=sys.executable, log=log, fails=fails))
    path.chmod(0o755)
    return path, log


def test_run_all_goes_on_after_a_failed_run(tmp_path):
    path, log = fake_python(tmp_path, fails="mixmatch_scar.py*fgsm")
    code, _, error = run_all(
        "--eps", "2.50", PYTHON=str(path), DATA="synthetic", OUT=str(tmp_path / "runs/"), SEEDS="4"
    )
    assert code == 1 and "failed: mixmatch, seed 4 (so its controls were not run)" in error
    starts = [line.split() for line in log.read_text().splitlines() if line.startswith("start")]
    assert [(words[1], words[words.index("--select") + 1]) for words in starts] == [
        ("vat_scar.py", "fgsm"),
        ("vat_scar.py", "none"),
        ("mixmatch_scar.py", "fgsm"),
        ("fixmatch_scar.py", "fgsm"),
        ("fixmatch_scar.py", "none"),
    ]
    scar, control = (words for words in starts if words[1] == "fixmatch_scar.py")
    folder = f"{tmp_path}/runs/fixmatch__synthetic__fgsm-eps2.5__seed4"
    assert scar[scar.index("--out") + 1] == folder
    assert control[control.index("--pretrained") + 1] == f"{folder}/pretrain.pt"


def test_run_all_runs_the_controls_that_it_is_told(tmp_path):
    """All from the same theta~, in folders with the scripts' own names and TAG; one may fail."""
    path, log = fake_python(tmp_path, fails="confidence")
    out = tmp_path / "runs"
    variables = {"PYTHON": str(path), "DATA": "synthetic", "OUT": str(out), "METHODS": "vat"}
    variables |= {"CONTROLS": "confidence eps0 none", "SEEDS": "4"}
    for tag, end in (("", ""), ("again", "__again")):
        log.write_text("")
        code, _, error = run_all("--eps", "3", TAG=tag, **variables)
        assert code == 1 and "failed: a control of vat, seed 4\n" in error
        starts = [line for line in log.read_text().splitlines() if line.startswith("start")]
        theta = f"{out}/vat__synthetic__fgsm-eps3__seed4{end}"
        given = [script_args(line) for line in starts]
        assert [args.out for args in given] == [
            theta, *(f"{out}/vat__synthetic__{row}__seed4{end}" for row in (
                "confidence-eps3", "fgsm-eps0", "none-eps3"))
        ]  # fmt: skip
        assert [args.pretrained for args in given] == [None, *3 * [f"{theta}/pretrain.pt"]]
        for args in given:
            own_name = f"vat__synthetic__{args.select}-eps{args.eps:g}__seed4"
            assert Path(args.out).name == own_name + end


def test_settings_are_those_of_their_results(monkeypatch):
    """results/settings.sh gives the scripts the settings that results/settings was run with."""
    environment = {**os.environ, "PYTHON": "echo"}
    command = ["bash", str(HERE / "results" / "settings.sh")]
    echoed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    given = {}
    for line in echoed.stdout.splitlines():
        if "--data" in line:
            options = line[line.index("--data") :].split()
            name = Path(options[options.index("--out") + 1]).name
            script = {script.METHOD: script for script in SCRIPTS}[name.partition("__")[0]]
            given[name] = vars(script.parse_args(options))
    kept = {path.parent.name: path for path in HERE.glob("results/settings/*/result.json")
            if "reselect" not in path.parent.name}  # fmt: skip
    assert given.keys() == kept.keys()
    for name, path in kept.items():
        was = json.loads(path.read_text())["args"]
        settled = {"device", "precision", "compile"}
        assert was.pop("reselect", 0) == 0  # an option that has gone
        assert {key: was[key] for key in was.keys() - settled} == {
            key: given[name][key] for key in given[name].keys() - settled
        }


def test_run_all_has_one_run_on_each_gpu(tmp_path):
    path, log = fake_python(tmp_path, fails="nothing")
    code, out, error = run_all(
        PYTHON=str(path), DATA="synthetic", OUT=str(tmp_path / "runs"), GPUS="0 1"
    )
    assert code == 1 and error.startswith("error: there is no finished run")  # stand-ins leave none
    assert out.count("output in") == 9
    busy, most, used = set(), 0, []
    for line in log.read_text().splitlines():
        event, _, gpu, *_ = line.split()
        assert (gpu in busy) == (event == "end")
        busy ^= {gpu}
        most = max(most, len(busy))
        used.append(gpu)
    assert most == 2 and set(used) == {"0", "1"} and len(used) == 2 * 2 * 9


@pytest.mark.parametrize("given, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_run_all_stops_its_runs_when_told_to(given, code, tmp_path):
    path, log = fake_python(tmp_path, fails="nothing")
    path.write_text(path.read_text().replace("sleep 0.4", "exec sleep 60"))
    environment = {**os.environ, "PYTHON": str(path), "DATA": "synthetic"}
    environment["OUT"] = str(tmp_path / "runs")
    command = ["bash", str(HERE / "run_all.sh")]
    running = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # "&" may have it ignored
    )  # fmt: skip
    while not log.exists():
        time.sleep(0.05)
    running.send_signal(given)
    _, error = running.communicate(timeout=20)
    assert running.returncode == code and "the same command goes on" in error
    assert "end" not in log.read_text()


def test_run_all_killed_and_given_again(tmp_path):
    """Real runs on a few images: killed in the first one, finished by the second call."""
    data, out = tmp_path / "few", tmp_path / "runs"
    write_folder(data)
    variables = {"SEEDS": "0", "EPOCHS": "2", "DATA": "folder", "OMP_NUM_THREADS": "1"}
    variables |= {"DATA_DIR": str(data), "OUT": str(out), "METHODS": "mixmatch"}
    options = "--num-labeled 2 --depth 10 --width 1 --batch-size 2 --steps-per-epoch 2".split()
    options += ["--table2-eps", "1"]
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    command = ["bash", str(HERE / "run_all.sh"), *options]
    running = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    while not list(out.glob("*/checkpoint.pt")):
        assert running.poll() is None
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not list(out.glob("*/result.json"))

    code, text, error = run_all(*options, **variables)
    assert (code, error) == (0, "") and "going on after pretrain epoch" in text
    assert {path.parent.name for path in out.glob("*/result.json")} == {
        f"mixmatch__few__{select}-eps1__seed0" for select in ("fgsm", "none")
    }
    tables = (out / "tables.md").read_text()
    assert cells(tables, "MixMatch + nothing (control)")[1].endswith("(n = 1)")
    assert tables.rstrip() in text
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
    code, text, _ = run_all(*options, **variables)
    assert code == 0 and tables.rstrip() in text and "finetune     1" not in text
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*/*")}


# ---------------------------------------------------------------------------------------- the house


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_keeps_the_rules(script):
    """It imports the three packages alone, fits 100 columns, and documents every function."""
    text = Path(script.__file__).read_text()
    allowed = {*sys.stdlib_module_names, "torch", "torchvision", "numpy", "common"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        if isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in allowed
    assert max(len(line) for line in text.splitlines()) <= 100
    for node in ast.parse(text).body:
        assert not isinstance(node, ast.FunctionDef) or ast.get_docstring(node), node.name


OWN = {  # what is the method's own: it differs from script to script, and nothing else does
    "METHOD", "TITLE", "PAPER_TABLE1", "PAPER_TABLE2",
    "parse_args", "unlabeled_batch_size", "make_optimizer", "schedule", "batch_loss",
}  # fmt: skip


@pytest.mark.parametrize("first, second", list(itertools.combinations(SCRIPTS, 2)))
def test_scripts_share_everything_else_letter_for_letter(first, second):
    """The same name means the same text, decorators included; the plumbing is all the same."""
    named, plumbing = [], []
    for script in (first, second):
        text = Path(script.__file__).read_text()
        plumbing.append(text[text.index("# Plumbing, the same in every script") :])
        parts = {}
        for node in ast.parse(text).body:
            start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            source = text.splitlines()[start - 1 : node.end_lineno]
            for name in [getattr(node, "name", None), *bound_names(node)]:
                parts[name] = source
        named.append(parts)
    assert plumbing[0] == plumbing[1]
    shared = named[0].keys() & named[1].keys() - OWN - {None}
    assert len(shared) > 30
    assert [name for name in shared if named[0][name] != named[1][name]] == []


def bound_names(node):
    """The names to which a top-level assignment gives values."""
    return [
        name.id
        for target in getattr(node, "targets", [])
        for name in ast.walk(target)
        if isinstance(name, ast.Name)
    ]
