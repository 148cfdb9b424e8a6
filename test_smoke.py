"""The tests: no network, no GPU; those for CUDA skip themselves where there is none."""

import ast
import copy
import csv
import importlib
import inspect
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
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

import common
import fixmatch_scar
import mixmatch_scar
import vat_scar
from common import WideResNet, fgsm, load_images, split_labeled
from fixmatch_scar import RANDAUGMENT_OPS, fixmatch_loss, randaugment_op, strong_augment, to_float
from mixmatch_scar import mixmatch_loss
from vat_scar import vat_direction, vat_loss

SCRIPTS = [vat_scar, mixmatch_scar, fixmatch_scar]
HERE = Path(__file__).parent
OTHER_FILES = {"selection.csv"}
OWN = {"parse_args", "unlabeled_batch_size", "make_optimizer", "schedule", "batch_loss"}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
each_script = pytest.mark.parametrize("script", SCRIPTS)
close = torch.testing.assert_close


def test_what_the_scripts_share_is_the_same_text():
    """So what holds for a shared function in one script holds in all three."""
    texts = {}
    for script in SCRIPTS:
        for name, function in inspect.getmembers(script, inspect.isfunction):
            if function.__module__ == script.__name__ and name not in OWN:
                texts.setdefault(name, set()).add(inspect.getsource(function))
    assert [name for name, versions in texts.items() if len(versions) > 1] == []


@pytest.fixture(scope="session")
def images():
    """The synthetic set: (x_train, y_train, x_test, y_test)."""
    return load_images("synthetic", None)


# ----------------------------------------------------------------------- network, data, split, FGSM


def test_size_and_initial_weights():
    model = WideResNet(10, 28, 2)
    assert sum(p.numel() for p in model.parameters()) == 1_467_610
    for layer, variance in ((model.blocks[-1].conv2, 2 / (9 * 128)), (model.linear, 2 / 138)):
        assert layer.weight.std().item() == pytest.approx(math.sqrt(variance), rel=0.1)
    assert not model.linear.bias.any()
    for depth in (4, 9, 27):
        with pytest.raises(ValueError, match="6n \\+ 4"):
            WideResNet(10, depth, 1)


@pytest.mark.parametrize("training", [False, True])
def test_wiring(training):
    """WRN-16-2 against the same network straight from its description, on a state_dict."""
    torch.manual_seed(0)
    model = WideResNet(7, 16, 2).double()
    w = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in w.values():  # statistics and scales unlike their initial ones
        if tensor.ndim == 1:
            tensor.uniform_(0.5, 2)
    model.load_state_dict(w)

    def bn_lrelu(x, name):
        mean, var = w[f"{name}.running_mean"].clone(), w[f"{name}.running_var"].clone()
        x = F.batch_norm(x, mean, var, w[f"{name}.weight"], w[f"{name}.bias"], training)
        return torch.where(x > 0, x, 0.1 * x)

    def conv(x, name, stride=1):
        weight = w[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    images = torch.rand(5, 3, 32, 32, dtype=torch.double)
    x = conv(images, "conv")
    for i in range(6):
        stride, block = 2 if i in (2, 4) else 1, f"blocks.{i}"
        y = bn_lrelu(x, f"{block}.bn1")
        residual = y if i == 0 else x
        if i in (0, 2, 4):
            residual = conv(residual, f"{block}.shortcut", stride)
        y = bn_lrelu(conv(y, f"{block}.conv1", stride), f"{block}.bn2")
        x = residual + conv(y, f"{block}.conv2")
    logits = bn_lrelu(x, "bn").mean((2, 3)) @ w["linear.weight"].T + w["linear.bias"]
    close(model.train(training)(images), logits)


def test_synthetic_images_and_split(images):
    for x, y, count in ((*images[:2], 600), (*images[2:], 100)):
        assert x.shape == (10 * count, 3, 32, 32) and x.dtype == torch.uint8
        assert y.dtype == torch.int64 and torch.bincount(y).tolist() == [count] * 10
    assert torch.equal(load_images("synthetic", "nowhere")[0], images[0])
    y = images[1]
    labeled, unlabeled = split_labeled(y, 43, 0)
    assert sorted(torch.cat([labeled, unlabeled]).tolist()) == list(range(6000))
    assert sorted(torch.bincount(y[labeled]).tolist()) == [4] * 7 + [5] * 3
    assert torch.equal(labeled, split_labeled(y, 43, 0)[0])
    assert not torch.equal(labeled, split_labeled(y, 43, 1)[0])
    for count, sentence in ((2, "too few"), (12, "class 2 has 2 images"), (22, "no unlabeled")):
        with pytest.raises(ValueError, match=sentence):
            split_labeled(torch.tensor([0] * 10 + [1] * 10 + [2] * 2), count, 0)


def test_fgsm_is_its_formula_and_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = WideResNet(10, 10, 1).train()
    model.blocks[1].eval()  # a frozen block
    before, frozen, expected = copy.deepcopy(model), copy.deepcopy(model).eval(), []
    x, y = torch.rand(6, 3, 32, 32), torch.arange(6)
    for image, label in zip(x.split(1), y.split(1)):
        image = image.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(frozen(image), label), image)
        expected.append((image + 0.02 * gradient.sign()).clamp(0, 1).detach())
    with torch.no_grad():
        attacked = fgsm(model, x, y, 0.02)
    with pytest.raises(RuntimeError):
        fgsm(model, torch.rand(6, 4, 32, 32), y, 0.02)
    # a gradient component can be so near zero that its sign is a matter of rounding
    assert (attacked != torch.cat(expected)).float().mean() < 1e-3
    assert not attacked.requires_grad and all(p.grad is None for p in model.parameters())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    close(model.state_dict(), before.state_dict(), rtol=0, atol=0)


def test_fgsm_is_exact_for_a_confident_model_under_autocast():
    class Confident(nn.Module):
        def forward(self, x):
            score = x.mean((2, 3)) @ torch.tensor([401.0, -1.0, 100.0])  # so that p(y) is 1
            backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv
            seen.extend([x.dtype, score.dtype, *(backend.fp32_precision for backend in backends)])
            return torch.stack([score, -score], 1)

    seen, x = [], torch.full((2, 3, 8, 8), 0.4)
    with torch.autocast("cpu", torch.bfloat16):
        attacked = fgsm(Confident(), x, torch.tensor([0, 0]), 0.1)
    close(attacked, x + 0.1 * torch.tensor([-1, 1, -1]).view(3, 1, 1))
    assert seen == [torch.float32, torch.float32, "ieee", "ieee"]
    assert torch.backends.cudnn.conv.fp32_precision != "ieee"


@needs_cuda
def test_fgsm_on_cuda_is_that_of_the_cpu(images):
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
    x[160:170] = torch.arange(30).view(10, 3, 1, 1) * 8  # one colour
    x, op = x.repeat_interleave(14, 0), torch.arange(14).repeat(200)
    level = torch.rand(2800, generator=torch.Generator().manual_seed(0))
    level[:14], level[14:28] = 0, 1
    return x, op, level, randaugment_op(x, op, level)


@pytest.mark.parametrize("index", range(14), ids=[name for name, *_ in PILLOW])
def test_randaugment_is_pillows(one_batch, index):
    name, low, high, operation = PILLOW[index]
    assert RANDAUGMENT_OPS[index] == (name, low, high) and len(RANDAUGMENT_OPS) == 14
    x, _, level, ours = (part[index::14] for part in one_batch)
    difference = []
    for image, value, our in zip(x, (low + (high - low) * level.double()).tolist(), ours):
        pillows = operation(Image.fromarray(image.permute(1, 2, 0).numpy()), value)
        difference.append(abs(our.permute(1, 2, 0).numpy() - np.asarray(pillows, int)).max(2))
    if name.startswith(("Rotate", "Shear", "Translate")):
        assert (np.stack(difference) > 0).mean() <= 0.01
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


@pytest.mark.parametrize("h, w", [(32, 32), (48, 40)])
def test_weak_augment_flips_and_moves(h, w):
    """Each view is a crop of the reflected image, or of its mirror image; all of them occur."""
    image, pads = torch.arange(3 * h * w).view(3, h, w) % 251, [w // 8, w // 8, h // 8, h // 8]
    crops = F.pad(image.float(), pads, mode="reflect").byte().unfold(1, h, 1).unfold(2, w, 1)
    crops = crops.permute(1, 2, 0, 3, 4).flatten(0, 1)
    names = {c.numpy().tobytes(): i for i, c in enumerate(torch.cat([crops, crops.flip(3)]))}
    torch.manual_seed(0)
    views = fixmatch_scar.weak_augment(image.byte().expand(4000, 3, h, w))
    seen = [names[view.numpy().tobytes()] for view in views]
    assert set(seen) == set(range(2 * len(crops)))
    assert 0.45 < np.mean(np.array(seen) < len(crops)) < 0.55


@pytest.mark.parametrize("h, w", [(32, 32), (48, 40)])
def test_strong_augment(h, w, monkeypatch):
    """A weak view, two operations drawn for each image, then a square cut out."""
    x = (torch.arange(3 * h * w) % 100).byte().view(3, h, w).expand(500, 3, h, w)  # below 127
    assert len({view.numpy().tobytes() for view in strong_augment(x)}) > 450
    drawn, views = [], []
    monkeypatch.setattr(fixmatch_scar, "randaugment_op", lambda x, *draws: drawn.append(draws) or x)
    for augment in (fixmatch_scar.weak_augment, strong_augment):
        torch.manual_seed(0)
        views.append(augment(x))
    hit = (views[1] == 127).all(1)
    assert torch.equal(views[1], views[0].masked_fill(hit[:, None], 127))
    rows, columns = hit.any(2).sum(1), hit.any(1).sum(1)
    assert torch.equal(hit.sum((1, 2)), rows * columns)  # a rectangle, where the border cuts it
    assert set(rows.tolist()) == set(range(h // 4, h // 2 + 1))
    assert set(columns.tolist()) == set(range(w // 4, w // 2 + 1))
    assert len(drawn) == 2 and not torch.equal(drawn[0][0], drawn[1][0])
    for op, level in drawn:
        assert torch.bincount(op, minlength=14).min() > 10 and op.max() == 13
        assert 0 <= level.min() < 0.05 and 0.95 < level.max() <= 1


def test_augmentations_refuse_what_is_no_uint8_image():
    op = partial(randaugment_op, op=torch.zeros(2).long(), level=torch.zeros(2))
    for augment in (fixmatch_scar.weak_augment, strong_augment, op):
        for x in (
            torch.zeros(2, 3, 8, 8),
            torch.zeros(3, 8, 8).byte(),
            torch.zeros(2, 1, 8, 8).byte(),
        ):
            with pytest.raises(ValueError):
                augment(x)


# --------------------------------------------------------------------------------- the three losses

Y = torch.tensor([3, 1, 4, 1])  # labels


def plain_net(scale):
    """Without batch norm, so that images stay apart; the larger scale, the more confident."""
    torch.manual_seed(1)
    conv, linear = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8 * 15 * 15, 10)
    linear.weight.data *= scale
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), linear).double()


def prob_of(model, image):
    return model(image[None])[0].softmax(0)


def kl_to(model, prob, image):
    """KL(prob to p(image)), as in VAT's paper."""
    return (prob * (prob.log() - prob_of(model, image).log())).sum()


def check_loss(model, result, expected, parts):
    """The loss, its gradient and its metrics are those of the plain computation."""
    gradients = [torch.autograd.grad(loss, model.parameters()) for loss in (result[0], expected)]
    close(*gradients, rtol=1e-3, atol=1e-5)
    expected = [float(value.detach()) for value in (expected, *parts)]
    assert [float(value) for value in (result[0].detach(), *result[1].values())] == pytest.approx(
        expected, rel=1e-3
    )
    assert not any(metric.requires_grad for metric in result[1].values())


def test_mixmatch_loss_sample_by_sample():
    model = plain_net(8)
    x = torch.rand(12, 3, 32, 32, dtype=torch.double)
    x_l, x_u, x_v = x.split(4)
    mix, perm = 0.5 + 0.5 * torch.rand(12, dtype=torch.double), torch.randperm(12)
    sharp = [((prob_of(model, a) + prob_of(model, b)) / 2) ** 2.5 for a, b in zip(x_u, x_v)]
    guesses = [(power / power.sum()).detach() for power in sharp]
    target = [*F.one_hot(Y, 10).double(), *guesses, *guesses]
    labeled = unlabeled = 0
    for i, j in enumerate(perm):
        prob = prob_of(model, mix[i] * x[i] + (1 - mix[i]) * x[j])
        mixed_target = mix[i] * target[i] + (1 - mix[i]) * target[j]
        if i < 4:
            labeled -= (mixed_target * prob.log()).sum() / 4
        else:
            unlabeled += ((mixed_target - prob) ** 2).mean() / 8
    loss = partial(mixmatch_loss, model, x_l, Y, x_u, x_v, 0.4)
    expected = labeled + 0.6 * unlabeled
    check_loss(model, loss(0.75, 0.6, mix=mix, perm=perm), expected, [labeled, unlabeled])
    close(loss(0.0, 0.6), loss(0.75, 0.6, mix=torch.ones(12), perm=perm))  # alpha 0: no MixUp


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 0.1, 0.75, 4.0, 100.0])
def test_draw_mix(alpha):
    """It is distributed as numpy's, the image's own share the larger one."""
    torch.manual_seed(0)
    mix = mixmatch_scar.draw_mix(200_000, alpha, torch.device("cpu")).numpy()
    share = np.random.default_rng(0).beta(alpha, alpha, 200_000)
    assert mix.shape == (200_000,) and 0.5 <= mix.min() and mix.max() <= 1
    for at_most in (0.51, 0.55, 0.6, 0.75, 0.9, 0.99, 0.9999):
        expected = (np.maximum(share, 1 - share) <= at_most).mean()
        assert (mix <= at_most).mean() == pytest.approx(expected, abs=6e-3)


def test_vat_loss_sample_by_sample():
    model = plain_net(1)
    x_l, x_u, d0 = torch.rand(3, 4, 3, 32, 32, dtype=torch.double)
    labeled = divergence = entropy = 0
    for x, y, image, start in zip(x_l, Y, x_u, d0 - 0.5):
        labeled -= prob_of(model, x)[y].log() / 4
        prob = prob_of(model, image)
        entropy -= (prob * prob.log()).sum() / 4
        r = (0.01 * start / start.norm()).requires_grad_()
        (gradient,) = torch.autograd.grad(kl_to(model, prob.detach(), image + r), r)
        divergence += kl_to(model, prob.detach(), image + 2 * gradient / gradient.norm()) / 4
    result = vat_loss(model, x_l, Y, x_u, 0.01, 2.0, 1, 0.6, 0.2, d0=100 * (d0 - 0.5))
    expected = labeled + 0.6 * divergence + 0.2 * entropy
    check_loss(model, result, expected, [labeled, divergence, entropy])


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


@pytest.mark.parametrize("scale", [300, 800])
def test_vat_direction_at_the_extremes(scale):
    """Predictions of 1 - 1e-20 and beyond still have a direction, that of float64; without a
    gradient, or without an iteration, it is where it began."""
    model = plain_net(scale)
    x, d0 = torch.rand(2, 8, 3, 32, 32, dtype=torch.double)
    exact = vat_direction(model, x, model(x).softmax(1).detach(), 0.1, 1, d0)
    model, x, d0 = model.float(), x.float(), d0.float()
    d = vat_direction(model, x, model(x).softmax(1).detach(), 0.1, 1, d0)
    assert (d * exact).sum((1, 2, 3)).min().item() > 0.99
    model[3].weight.data *= 0
    for iterations in (0, 1):
        d = vat_direction(model, x, torch.rand(8, 10), 0.1, iterations, d0)
        close(d, d0 / d0.flatten(1).norm(dim=1).view(8, 1, 1, 1))


def test_fixmatch_loss_sample_by_sample():
    model = plain_net(25)  # confident on some images, not on others
    x_l, x_weak, x_strong = torch.rand(28, 3, 32, 32, dtype=torch.double).split([4, 12, 12])
    labeled = sum(-prob_of(model, x)[y].log() / 4 for x, y in zip(x_l, Y))
    probs = [prob_of(model, weak) for weak in x_weak]
    threshold = model(x_weak).softmax(1).amax(1).median().item() - 1e-5
    unlabeled, share = 0, torch.zeros(())
    for prob, strong in zip(probs, x_strong):
        if prob.max() > threshold:
            share += 1 / 12
            unlabeled -= prob_of(model, strong)[prob.argmax()].log() / 12
    assert 0.1 < share < 0.9
    result = fixmatch_loss(model, x_l, Y, x_weak, x_strong, threshold, 0.7)
    check_loss(model, result, labeled + 0.7 * unlabeled, [labeled, unlabeled, share])


# ------------------------------------------------------------- from the loss to the training step


def test_fixmatch_mask_includes_the_threshold():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 2))
    nn.init.zeros_(model[1].weight), nn.init.zeros_(model[1].bias)  # confidence 0.5 exactly
    x = torch.rand(4, 3, 4, 4)
    for threshold, rate in ((0.5, 1.0), (0.5001, 0.0)):
        _, metrics = fixmatch_loss(model, x, torch.tensor([0, 1, 0, 1]), x, x, threshold, 1.0)
        assert float(metrics["mask_rate"]) == rate


@each_script
def test_batch_loss_hands_each_view_to_its_place(script, monkeypatch):
    """weak_augment adds 1 and strong_augment 2, so that a view tells where it comes from."""
    seen = []
    monkeypatch.setattr(script, "weak_augment", lambda x: x + 1)
    monkeypatch.setattr(script, "strong_augment", lambda x: x + 2, raising=False)
    name = f"{script.METHOD}_loss"
    monkeypatch.setattr(script, name, lambda model, *inputs: seen.extend(inputs))
    x_l, x_u = (torch.full((4, 3, 8, 8), value, dtype=torch.uint8) for value in (10, 100))
    script.batch_loss(
        None, x_l, torch.arange(4), x_u, 0.5, script.parse_args(["--precision", "fp32"])
    )
    views = [round(255 * float(x.mean())) for x in seen if torch.is_tensor(x) and x.ndim == 4]
    assert (
        views
        == {"vat": [11, 101], "mixmatch": [11, 101, 101], "fixmatch": [11, 101, 102]}[script.METHOD]
    )
    assert seen[1].tolist() == [0, 1, 2, 3] and 0.5 in [v for v in seen if isinstance(v, float)]


def test_schedules():
    args = vat_scar.parse_args([])
    assert [vat_scar.schedule(i, 10, "pretrain", args)[1] for i in (0, 2, 4, 9)] == pytest.approx(
        [0, 0.15, 0.3, 0.3]
    )
    assert vat_scar.schedule(0, 10, "finetune", args) == (0.002, 0.3)
    args = mixmatch_scar.parse_args(["--lambda-u", "75"])
    for i, total, phase, weight in (
        (0, 100, "pretrain", 0), (50, 100, "pretrain", 75 * 50 / 16384),
        (50, 100, "finetune", 75 * 150 / 16384), (0, 20000, "finetune", 75),
    ):  # fmt: skip
        assert mixmatch_scar.schedule(i, total, phase, args) == pytest.approx((0.002, weight))
    args = fixmatch_scar.parse_args([])
    rates = [fixmatch_scar.schedule(i, 16, "finetune", args)[0] for i in (0, 8)]
    assert rates == pytest.approx([0.03, 0.03 * math.cos(7 * math.pi / 32)])


@each_script
def test_training_step_by_hand(script, images):
    """Gradient, optimizer with the step's own lr, weight decay, average: two steps of each."""
    args = script.parse_args(["--precision", "fp32", "--lr", "1"])
    torch.manual_seed(0)
    model = WideResNet(10, 10, 1)
    twin, average = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = script.make_optimizer(model, args)
    learner = script.Learner(model, average, optimizer, script.batch_loss)
    data = SimpleNamespace(images=images[0], labels=images[1])
    index_l, index_u, lr = torch.arange(4), torch.arange(100, 104), torch.tensor(0.01)
    expected, state = copy.deepcopy(average.state_dict()), {}
    for t in (1, 2):
        torch.manual_seed(t)
        metrics = script.training_step(
            learner, data, args, index_l, index_u, lr, torch.tensor(0.5), torch.tensor(0.9)
        )
        torch.manual_seed(t)
        twin.zero_grad()
        loss, _ = script.batch_loss(
            twin, images[0][index_l], images[1][index_l], images[0][index_u], 0.5, args
        )
        loss.backward()
        close(metrics["loss"], loss.detach())
        with torch.no_grad():
            for name, p in twin.named_parameters():
                decay = args.weight_decay if p.ndim > 1 else 0.0
                if script is fixmatch_scar:
                    gradient = p.grad + decay * p
                    state[name] = 0.9 * state.get(name, 0) + gradient
                    p -= 0.01 * (gradient + 0.9 * state[name])
                else:
                    p *= 1 - 0.01 * decay
                    m, v = state.get(name, (0, 0))
                    m, v = 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad**2
                    state[name] = m, v
                    p -= 0.01 * m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        twin.load_state_dict(model.state_dict() | dict(twin.named_parameters()))  # its statistics
        close(dict(model.named_parameters()), dict(twin.named_parameters()), rtol=1e-3, atol=1e-4)
        for name, value in model.state_dict().items():
            old = expected[name]
            expected[name] = 0.9 * old + 0.1 * value if value.is_floating_point() else value
        close(average.state_dict(), expected)
    assert all(p.grad is None for p in model.parameters())


@each_script
def test_which_forward_moves_the_running_statistics(script, images):
    """Once a step, in all methods: forwards on other images leave them as they are."""
    model, args = WideResNet(10, 10, 1), script.parse_args(["--precision", "fp32"])
    x, y, batch = images[0][:4], images[1][:4], images[0][4:8]
    script.batch_loss(model, x, y, batch, 0.5, args)
    moves = 2 if script is fixmatch_scar else 1  # and the weak views
    assert int(model.bn.num_batches_tracked) == moves


@each_script
def test_loss_compiles_as_one_graph(script, images):
    """Nothing in it waits for a value: that would break the graph."""
    args, model = script.parse_args(["--precision", "fp32"]), WideResNet(10, 10, 1)
    inputs = images[0][:4], images[1][:4], images[0][4:8], torch.tensor(0.5)
    whole = script is not vat_scar  # whose direction needs a gradient in between
    compiled = torch.compile(script.batch_loss, fullgraph=whole, backend="aot_eager")
    loss, _ = compiled(model, *inputs, args)
    loss.backward()
    assert loss.isfinite() and model.conv.weight.grad.isfinite().all()


@needs_cuda
@each_script
def test_captured_step_on_cuda_is_the_step(script, images):
    """From one state: plain and captured steps move weights, average and statistics alike."""
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    args = script.parse_args(["--device", "cuda", "--precision", "fp32", "--batch-size", "8"])
    x, y = images[0].cuda(), images[1].cuda()
    data, ends = SimpleNamespace(images=x, labels=y), []
    with torch.cuda.stream(torch.cuda.Stream()):
        for wrap in (script.capture, lambda function: function):
            torch.manual_seed(0)
            model = WideResNet(10, 10, 1).cuda()
            start = copy.deepcopy(model.state_dict())
            optimizer = script.make_optimizer(model, args)
            learner = script.Learner(model, copy.deepcopy(model), optimizer, script.batch_loss)
            step = wrap(partial(script.training_step, learner, data, args))
            index_l = torch.arange(8, device="cuda")
            index_u = torch.arange(100, 100 + 8 * args.mu, device="cuda")
            numbers = [torch.tensor(v, device="cuda") for v in (0.0, 0.5, 0.9)]
            for _ in range(3):  # lr 0: warms up without moving the weights
                step(index_l, index_u, *numbers)
            model.load_state_dict(start), learner.average.load_state_dict(start)
            torch.manual_seed(1)
            loss = float(step(index_l, index_u, numbers[0] + 0.001, *numbers[1:])["loss"])
            ends.append((loss, model.state_dict(), learner.average.state_dict()))
    assert ends[0][0] == pytest.approx(ends[1][0], abs=0.05)  # a graph draws its own augmentation
    for first, second in zip(ends[0][1:], ends[1][1:]):
        for name in first:
            assert not first[name].is_floating_point() or not torch.equal(first[name], start[name])
            close(first[name], second[name], rtol=0.1, atol=0.01)


# --------------------------------------------------------------------------------- SCAR's selection


class Brightness(nn.Module):
    """Two classes: whether an image's mean is above one half."""

    def forward(self, x):
        mean = x.mean(dim=(1, 2, 3)) - 0.5
        return torch.stack([-mean, mean], dim=1)


def test_select_clean_on_a_known_model():
    values = torch.tensor([0, 120, 126, 127, 128, 129, 135, 255], dtype=torch.uint8)
    x = values.view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    for images in (x, x / 255):
        keep, pseudo = vat_scar.select_clean(Brightness(), images, 3 / 255)
        assert pseudo.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
        assert keep.tolist() == [True, True, False, False, False, False, True, True]
    assert vat_scar.select_clean(Brightness(), x, 0.0)[0].all()


def test_selection_goes_in_chunks_and_leaves_the_model_alone(images):
    model = WideResNet(10, 10, 1).train()
    model.bn.eval()
    before = copy.deepcopy(model.state_dict())
    keep, pseudo = vat_scar.select_clean(model, images[0][:510], 4 / 255)
    again = vat_scar.select_clean(model, images[0][495:510], 4 / 255)
    assert torch.equal(keep[495:], again[0]) and torch.equal(pseudo[495:], again[1])
    assert model.training and model.conv.training and not model.bn.training
    close(model.state_dict(), before, rtol=0, atol=0)


def test_select_confident_takes_the_surest():
    logits = torch.tensor([[9.0, 0.0, 0.0], [60.0, 1.0, 0.0], [80.0, 0.0, 0.0], [0.0, 0.1, 0.0]])
    keep = vat_scar.select_confident(logits, 2)  # in float32 both have a confidence of 1
    assert keep.tolist() == [False, True, True, False]


def test_equations_5_and_6():
    """Table 2's VAT at eps 1: 7587 of 8227, 835 of 1773; images without a label do not count."""
    keep = torch.arange(10020) < 8227
    y = torch.zeros(10020, dtype=torch.int64)
    y[-20:] = -1
    pseudo = torch.zeros_like(y)
    pseudo[7587:8227] = 1
    pseudo[8227 : 8227 + 835] = 1
    stats = vat_scar.selection_stats(keep, pseudo, y)
    assert (stats["kept"], stats["rejected"]) == (8227, 1773)
    assert round(stats["sensitivity"], 2) == 92.22 and round(stats["specificity"], 2) == 47.10
    nothing = vat_scar.selection_stats(keep & False, pseudo, y)
    assert math.isnan(nothing["sensitivity"]) and nothing["kept"] == 0


def test_draw_batches_takes_each_image_once_a_pass():
    pool = torch.arange(10, 17)
    batches = vat_scar.draw_batches(pool, 7, 5, torch.Generator().manual_seed(0)).flatten()
    for start in range(0, 35, 7):
        assert batches[start : start + 7].sort().values.equal(pool)


# ------------------------------------------------------------------------------------ the whole run

SMALL = (
    "--data synthetic --num-labeled 100 --depth 10 --width 1 --batch-size 4 --epochs 2 "
    "--steps-per-epoch 3 --table2-eps 1 --precision fp32 --no-compile"
).split()


@pytest.fixture
def few_images(images, monkeypatch):
    """300 images to train with and 100 to test on, for every script."""
    few = images[0][:300], images[1][:300], images[2][:100], images[3][:100]
    for script in SCRIPTS:
        monkeypatch.setattr(script, "load_images", lambda *args: few)
    return few


def run(script, out, *options):
    return script.main([*SMALL, *map(str, options), "--out", str(out)])


def refusal(capsys, script, *argv, code=2):
    """The one sentence with which a command line is turned down."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        script.main([str(word) for word in argv])
    assert stopped.value.code == code
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    sentence = error.split("error:")[1].strip()
    assert sentence and "\n" not in sentence
    return sentence


def stop_at(monkeypatch, script, name, call, error=KeyboardInterrupt):
    """Raises the error in the given call of one of the script's functions."""
    original, calls = getattr(script, name), []

    def stopping(*args):
        calls.append(None)
        if len(calls) == call:
            raise error
        return original(*args)

    monkeypatch.setattr(script, name, stopping)


def read_rows(out):
    with open(out / "metrics.csv") as file:
        return list(csv.DictReader(file))


def same_weights(first, second):
    first, second = (torch.load(path, weights_only=True) for path in (first, second))
    return all(torch.equal(first[name], second[name]) for name in first | second)


@pytest.mark.parametrize("script", SCRIPTS)
def test_stopped_runs_end_as_uninterrupted_ones(script, few_images, tmp_path, monkeypatch, capsys):
    whole = run(script, tmp_path / "whole")
    for name, call in (("training_step", 5), ("select_clean", 2), ("training_step", 5)):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            stop_at(patch, script, name, call)
            run(script, tmp_path / "stopped")
        assert stopped.value.code == 130 and "goes on" in capsys.readouterr().err
    result = run(script, tmp_path / "stopped")
    assert same_weights(tmp_path / "whole" / "model.pt", tmp_path / "stopped" / "model.pt")
    assert same_weights(tmp_path / "whole" / "pretrain.pt", tmp_path / "stopped" / "pretrain.pt")
    rows = read_rows(tmp_path / "stopped")
    assert [(r["phase"], r["epoch"]) for r in rows] == [
        (phase, epoch) for phase in ("pretrain", "finetune") for epoch in ("1", "2")
    ]
    assert [r["loss"] for r in rows] == [r["loss"] for r in read_rows(tmp_path / "whole")]
    for name in ("pretrain_accuracy", "final_accuracy", "selection", "table2"):
        assert json.dumps(result[name]) == json.dumps(whole[name])  # nan is nan
    assert run(script, tmp_path / "stopped") == json.loads(
        (tmp_path / "stopped" / "result.json").read_text()
    )  # finished: it is read


@pytest.mark.parametrize("script", SCRIPTS)
def test_fine_tuning_starts_from_theta(script, few_images, tmp_path, monkeypatch):
    """Weights and average are theta~, the optimizer is new, the counter begins again, and the
    labeled images are the given and the selected ones under their labels."""
    seen, original = [], script.train_epoch

    def looking(step, learner, data, phase, epoch, args):
        seen.append(
            (phase, learner, copy.deepcopy(learner.model.state_dict()), data.labels.clone())
        )
        states = len(learner.optimizer.state)
        row = original(step, learner, data, phase, epoch, args)
        assert (states == 0) == (epoch == 1) and row["epoch"] == epoch
        return row

    monkeypatch.setattr(script, "train_epoch", looking)
    decays, update = [], script.update_average
    monkeypatch.setattr(
        script,
        "update_average",
        lambda a, m, decay: (decays.append(float(decay)), update(a, m, decay)),
    )
    result = run(script, tmp_path / "scar", "--eps", "8")
    assert decays == pytest.approx(2 * [(1 + t) / (10 + t) for t in range(6)])
    theta = torch.load(tmp_path / "scar" / "pretrain.pt", weights_only=True)
    phase, learner, weights, labels = seen[2]
    assert phase == "finetune" and all(torch.equal(weights[name], theta[name]) for name in theta)
    x, y, *_ = few_images
    model = common.WideResNet(10, 10, 1).eval()
    model.load_state_dict(theta)
    labeled, unlabeled = common.split_labeled(y, 100, 0)
    keep, pseudo = script.select_clean(model, x[unlabeled], 8 / 255)
    assert 5 < keep.sum() < 195
    assert torch.equal(labels[labeled], y[labeled])
    assert torch.equal(labels[unlabeled], torch.where(keep, pseudo, -1))
    assert (seen[0][3] >= 0).sum() == 100 and result["selection"]["kept"] == int(keep.sum())

    # the controls, from the same theta~
    for select in ("none", "confidence"):
        options = ("--select", select, "--pretrained", tmp_path / "scar" / "pretrain.pt")
        del seen[:]
        control = run(script, tmp_path / select, "--eps", "8", *options)
        known = int((seen[0][3] >= 0).sum()) - 100
        assert known == (0 if select == "none" else int(keep.sum()))
        assert control["pretrain_accuracy"] == result["pretrain_accuracy"] and len(seen) == 2
    logits = script.predict(model, x[unlabeled])
    most = logits.log_softmax(1).amax(1).topk(int(keep.sum())).indices
    assert (seen[0][3][unlabeled][most] == logits.argmax(1)[most]).all()


def test_true_labels_of_unlabeled_images_change_nothing(few_images, tmp_path, monkeypatch):
    run(fixmatch_scar, tmp_path / "true")
    x, y, *scored = few_images
    unlabeled = common.split_labeled(y, 100, 0)[1]
    other = y.clone()
    other[unlabeled] = (y[unlabeled] + 1) % 10
    monkeypatch.setattr(fixmatch_scar, "load_images", lambda *args: (x, other, *scored))
    monkeypatch.setattr(
        fixmatch_scar, "split_labeled", lambda *args: common.split_labeled(y, *args[1:])
    )
    run(fixmatch_scar, tmp_path / "other")
    assert same_weights(tmp_path / "true" / "model.pt", tmp_path / "other" / "model.pt")


def test_every_phase_epoch_and_seed_draws_its_own(few_images, tmp_path, monkeypatch):
    batches, original = [], fixmatch_scar.training_step

    def looking(learner, data, args, index_l, index_u, *numbers):
        batches.append((index_u.tolist(), data.images[index_l].sum().item()))
        return original(learner, data, args, index_l, index_u, *numbers)

    monkeypatch.setattr(fixmatch_scar, "training_step", looking)
    run(fixmatch_scar, tmp_path / "0")
    run(fixmatch_scar, tmp_path / "1", "--seed", 1)
    assert len({str(batch) for batch in batches}) == 24


def test_whole_run_learns_selects_and_leaves_its_files(images, tmp_path, monkeypatch, capsys):
    few = [part[:1500] for part in images[:2]] + [part[:300] for part in images[2:]]
    monkeypatch.setattr(mixmatch_scar, "load_images", lambda *args: few)
    out = tmp_path / "run"
    options = "--num-labeled 250 --batch-size 16 --epochs 2 --steps-per-epoch 30".split()
    result = run(mixmatch_scar, out, *options)
    assert result["pretrain_accuracy"] > 15
    names = {"args.json", "checkpoint.pt", "lock", "metrics.csv", "mixmatch_scar.py", "model.pt"}
    assert {path.name for path in out.iterdir()} == {
        *names, "pretrain.pt", "result.json", "selection.png", *OTHER_FILES
    }  # fmt: skip
    strict = json.loads((out / "result.json").read_text(), parse_constant=pytest.fail)
    assert strict["table2"][0]["eps"] == 1.0 and strict["data"] == "synthetic"
    model = common.WideResNet(10, 10, 1)
    model.load_state_dict(torch.load(out / "model.pt", weights_only=True))
    assert mixmatch_scar.evaluate(model, *few[2:]) == result["final_accuracy"]
    assert read_rows(out)[-1]["accuracy"] == str(result["final_accuracy"])
    counts = result["selection"]
    assert sum(counts["kept_per_class"]) == counts["kept"] > counts["kept_correct"] > 0
    printed = capsys.readouterr().out
    assert "--select none --pretrained" in printed and "94.13" not in printed
    with Image.open(out / "selection.png") as picture:
        assert picture.size[1] == 16 + 10 * 38


def test_papers_figures_stand_beside_cifar10_alone(few_images, tmp_path, capsys):
    result = run(fixmatch_scar, tmp_path / "run")
    for name, shown in (("CIFAR-10", True), ("CIFAR-10 (JPEG)", False), ("synthetic", False)):
        capsys.readouterr()
        fixmatch_scar.print_tables({**result, "data": name}, tmp_path)
        printed = capsys.readouterr().out
        assert all((figure in printed) == shown for figure in ("94.13", "95.17", "99.59"))


def test_validation_images_come_from_the_unlabeled_pool(few_images, tmp_path):
    result = run(vat_scar, tmp_path / "run", "--val", 50)
    assert result["scored_on"] == "validation" and result["selection"]["unlabeled"] == 150
    assert result["table2"][0]["kept"] + result["table2"][0]["rejected"] == 50


def test_tensorboard(few_images, tmp_path):
    pytest.importorskip("tensorboard")
    run(vat_scar, tmp_path / "run", "--tensorboard")
    assert list((tmp_path / "run").glob("events*"))


@needs_cuda
@pytest.mark.parametrize("script", SCRIPTS)
def test_whole_run_on_cuda(script, few_images, tmp_path):
    argv = [*SMALL[:-3], "--steps-per-epoch", "8", "--out", str(tmp_path / "run")]
    result = script.main(argv)
    assert result["args"]["compile"] and result["peak_memory_gib"] > 0


# ------------------------------------------------------------------------- bad input, interruptions


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--depth 27", "6n + 4"),
        ("--depth 4", "6n + 4"),
        ("--width 0", "--width"),
        ("--lambda-u 1e39", "--lambda-u"),
        ("--eps nan", "--eps"),
        ("--table2-eps 1 -2", "--table2-eps"),
        ("--epochs 0", "--epochs"),
        ("--steps-per-epoch 1.5", "--steps-per-epoch"),
        ("--lr 0", "--lr"),
        ("--lr inf", "--lr"),
        ("--weight-decay -1", "--weight-decay"),
        ("--ema-decay 1", "--ema-decay"),
        ("--seed -1", "--seed"),
        ("--num-labeled 9", "too few"),
        ("--num-labeled 300", "no unlabeled image"),
        ("--num-labeled 290 --val 10", "no unlabeled image"),
        ("--val 5", "too few"),
        ("--data imagenet", "imagenet"),
        ("--epoch 3", "--epoch"),
        ("--mu 0", "--mu"),
        ("--threshold 1.01", "--threshold"),
        ("--pretrained=", "empty name"),
        ("--pretrained nowhere/pretrain.pt", "nowhere/pretrain.pt"),
        ("--pretrained README.md", "README.md"),
    ],
)
def test_refuses(options, sentence, few_images, tmp_path, capsys):
    out = ["--out", tmp_path / "run"]
    assert sentence in refusal(capsys, fixmatch_scar, *SMALL, *out, *options.split())
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "script, options",
    [
        (mixmatch_scar, "--temperature 0"),
        (mixmatch_scar, "--alpha -0.1"),
        (vat_scar, "--vat-eps 0"),
        (vat_scar, "--xi nan"),
        (vat_scar, "--power-iterations -1"),
        (vat_scar, "--mu 2"),  # another method's option
    ],
)
def test_refuses_what_only_one_method_has(script, options, capsys):
    assert options.split()[0] in refusal(capsys, script, *options.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_refuses_cuda_without_one(tmp_path, capsys):
    options = (*SMALL, "--device", "cuda", "--out", tmp_path / "run")
    assert "--device cpu" in refusal(capsys, vat_scar, *options)


def test_refuses_folders_files_and_settings_of_other_runs(few_images, tmp_path, capsys):
    mine, vat, other = tmp_path / "mine", tmp_path / "vat", tmp_path / "other"
    other.mkdir()
    (other / "file").write_text("precious")
    sentence = refusal(capsys, fixmatch_scar, *SMALL, "--out", other)
    assert "holds no run" in sentence and (other / "file").read_text() == "precious"
    refusal(capsys, fixmatch_scar, *SMALL, "--out", other / "file")
    run(fixmatch_scar, mine)
    run(vat_scar, vat, "--seed", 3)
    before = {path: path.read_bytes() for path in mine.iterdir()}
    sentence = refusal(capsys, fixmatch_scar, *SMALL, "--lr", 0.1, "--seed", 5, "--out", mine)
    assert "lr was 0.03, now 0.1" in sentence and "seed was 0, now 5" in sentence
    assert before == {path: path.read_bytes() for path in mine.iterdir()}
    new = [*SMALL, "--out", tmp_path / "new", "--pretrained"]
    sentence = refusal(capsys, fixmatch_scar, *new, vat / "pretrain.pt")
    assert "method was vat" in sentence and "seed was 3" in sentence
    assert "WRN-16-1" in refusal(capsys, fixmatch_scar, *new, mine / "pretrain.pt", "--depth", 16)
    weights = torch.load(mine / "pretrain.pt", weights_only=True)
    weights["conv.weight"][0] = math.nan
    torch.save(weights, tmp_path / "nan.pt")
    assert "not finite" in refusal(capsys, fixmatch_scar, *new, tmp_path / "nan.pt")
    (mine / "result.json").unlink()
    shutil.copy(vat / "checkpoint.pt", mine)
    assert "method was vat" in refusal(capsys, fixmatch_scar, *SMALL, "--out", mine)
    assert not (tmp_path / "new").exists()


class Hostile:
    """Unpickled without care, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_damaged_files_are_named_and_left_alone(few_images, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, vat_scar, "training_step", 8)
        run(vat_scar, out)
    for name in ("checkpoint.pt", "pretrain.pt", "result.json", "args.json"):
        path = out / name
        whole = path.read_bytes() if path.exists() else b"{}"
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        faults = [whole[:middle], b"", b"hello", b"[1, 2]"]
        if path.suffix == ".pt":
            faults += [flipped, Hostile(tmp_path / "harm"), [1, 2]]
        argv = [*SMALL, "--out", out]
        if name == "pretrain.pt":
            argv = [*SMALL, "--out", tmp_path / "new", "--pretrained", path]
        for fault in faults:
            path.write_bytes(fault) if isinstance(fault, bytes) else torch.save(fault, path)
            before = {path: path.read_bytes() for path in out.iterdir()}
            sentence = refusal(capsys, vat_scar, *argv)
            assert str(path) in sentence, (name, fault)
            assert before == {path: path.read_bytes() for path in out.iterdir()}
        path.write_bytes(whole) if whole != b"{}" else path.unlink()
    assert not (tmp_path / "harm").exists()
    assert run(vat_scar, out)["final_accuracy"] >= 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_keeps_the_last_checkpoint(few_images, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, vat_scar, "training_step", 5)
        run(vat_scar, out)
    before = (out / "checkpoint.pt").read_bytes()
    (out / "checkpoint.pt.partial").symlink_to("/dev/full")
    sentence = refusal(capsys, vat_scar, *SMALL, "--out", out, code=1)
    assert "No space left" in sentence and str(out) in sentence
    assert (out / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    "error, sentence",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "--batch-size"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED in cublasCreate"), "--batch-size"),
        (MemoryError(), "--batch-size"),
        (FloatingPointError("not finite; lower --lr"), "--lr"),
    ],
)
def test_failures_in_training_are_sentences(
    error, sentence, few_images, tmp_path, monkeypatch, capsys
):
    stop_at(monkeypatch, vat_scar, "training_step", 1, error)
    assert sentence in refusal(capsys, vat_scar, *SMALL, "--out", tmp_path / "run", code=1)


def test_failed_compile_says_why(few_images, tmp_path, monkeypatch, capsys):
    def backend(graph, inputs):
        raise RuntimeError("not all inputs found in match.kwargs")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    options = ("--compile", "--out", tmp_path / "run")
    sentence = refusal(capsys, fixmatch_scar, *SMALL, *options, code=1)
    assert "not all inputs found in match.kwargs" in sentence and "--no-compile" in sentence


def test_stops_when_loss_or_weights_are_not_finite(few_images, tmp_path, monkeypatch, capsys):
    with np.errstate(all="ignore"):
        options = ("--lr", 1e30, "--out", tmp_path / "loss")
        assert "pretrain epoch 1" in refusal(capsys, fixmatch_scar, *SMALL, *options, code=1)

    def overflow(average, model, decay):
        average.linear.bias.data.fill_(math.inf)

    monkeypatch.setattr(vat_scar, "update_average", overflow)
    options = ("--out", tmp_path / "weights")
    assert "not finite" in refusal(capsys, vat_scar, *SMALL, *options, code=1)


@pytest.mark.parametrize("kept", [False, True], ids=["nothing", "everything"])
def test_selection_of_nothing_or_everything(kept, few_images, tmp_path, monkeypatch):
    original = vat_scar.select_clean

    def all_or_nothing(model, x, eps):
        keep, pseudo = original(model, x, eps)
        return torch.full_like(keep, kept), pseudo

    monkeypatch.setattr(vat_scar, "select_clean", all_or_nothing)
    run(vat_scar, tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text(), parse_constant=pytest.fail)
    assert result["selection"]["kept"] == (200 if kept else 0)
    assert (result["table2"][0]["sensitivity"] is None) == (not kept)


def test_second_process_on_a_run_folder_leaves(few_images, tmp_path, monkeypatch, capsys):
    sentences, original = [], vat_scar.training_step

    def second_process(*args):
        if not sentences:
            sentences.append(None)
            sentences[0] = refusal(capsys, vat_scar, *SMALL, "--out", tmp_path / "run")
        return original(*args)

    monkeypatch.setattr(vat_scar, "training_step", second_process)
    assert run(vat_scar, tmp_path / "run")["final_accuracy"] >= 0
    assert "in use by another process" in sentences[0]


KILLED = """
import os, random, signal, sys
import torch
import vat_scar as script
from common import load_images
torch.set_num_threads(1)
x, y, *scored = load_images("synthetic", None)
few = x[:300], y[:300], scored[0][:100], scored[1][:100]
script.load_images = lambda *args: few
out, argv = sys.argv[1], sys.argv[2:]

def child(folder, killed_at):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    writes, replace = 0, os.replace
    def killing(partial, path):  # between writing a file and moving it, or just after
        nonlocal writes
        writes += 1
        if 2 * writes == killed_at:
            os.truncate(partial, os.path.getsize(partial) // 2)
        if 2 * writes == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(partial, path)
        if 2 * writes + 1 == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
    os.replace = killing
    script.main(argv + ["--out", f"{out}/{folder}"])
    os._exit(0)

assert child("whole", None) == 0
kills = 0
for killed_at in range(2, 16):  # each time it gets further
    kills += child("killed", killed_at) == signal.SIGKILL
assert child("killed", None) == 0
print(kills)
"""


def test_killed_at_any_write_it_ends_the_same(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path, *SMALL], cwd=HERE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 8
    for name in ("pretrain.pt", "model.pt"):
        assert same_weights(tmp_path / "whole" / name, tmp_path / "killed" / name)
    assert [row["epoch"] for row in read_rows(tmp_path / "killed")] == ["1", "2", "1", "2"]


def test_sigterm_stops_with_a_line(tmp_path):
    argv = [*SMALL, "--epochs", "1000", "--out", str(tmp_path / "run")]
    child = subprocess.Popen(
        [sys.executable, HERE / "vat_scar.py", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    for line in child.stdout:
        if line.startswith(b"pretrain"):
            break
    child.terminate()
    assert b"stopped; the same command goes on" in child.communicate()[1]
    assert child.returncode == 143


def test_two_processes_are_one_run(tmp_path, images):
    """torchrun with two processes on the CPU: the files of one run, and a gradient of both."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-port", str(20000 + os.getpid() % 20000), str(HERE / "mixmatch_scar.py")]
    argv = [*SMALL, "--device", "cpu", "--val", "100", "--out", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *argv], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Table 1") == 1
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["ranks"] == 2 and len(read_rows(tmp_path / "two")) == 4
    theta = common.WideResNet(10, 10, 1).eval()
    theta.load_state_dict(torch.load(tmp_path / "two" / "pretrain.pt", weights_only=True))
    unlabeled = common.split_labeled(images[1], 100, 0)[1]
    rest = unlabeled[common.split_labeled(images[1][unlabeled], 100, 0)[1]]
    keep, _ = mixmatch_scar.select_clean(theta, images[0][rest], 1 / 255)
    assert abs(result["selection"]["kept"] - int(keep.sum())) <= 2  # threads may round otherwise


GRADIENT = """
import sys, torch
import torch.distributed as dist
import vat_scar as script
dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Linear(4, 3)
x = torch.randn(8, 4)[script.RANK :: 2]
model(x).square().mean().backward()
script.average_over_ranks([p.grad for p in model.parameters()])
if script.RANK == 1:
    torch.save([p.grad for p in model.parameters()], sys.argv[1])
dist.destroy_process_group()
"""


def test_two_processes_have_the_gradient_of_the_whole_batch(tmp_path):
    (tmp_path / "gradient.py").write_text(GRADIENT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-port", str(20001 + os.getpid() % 20000), tmp_path / "gradient.py"]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, tmp_path / "gradient.pt"], env=environment, check=True)
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    model(torch.randn(8, 4)).square().mean().backward()
    for ours, theirs in zip(model.parameters(), torch.load(tmp_path / "gradient.pt")):
        torch.testing.assert_close(ours.grad, theirs)


# ---------------------------------------------------------------------------------------- the house


@pytest.mark.parametrize("first, second", [(vat_scar, mixmatch_scar), (vat_scar, fixmatch_scar)])
def test_scripts_share_everything_else_letter_for_letter(first, second):
    own = {"parse_args", "make_optimizer", "schedule", "batch_loss"}
    texts = [Path(script.__file__).read_text() for script in (first, second)]
    banner = "# Plumbing, the same in every script"
    assert texts[0].split(banner)[1] == texts[1].split(banner)[1]
    sources = [
        {node.name: ast.get_source_segment(text, node) for node in ast.parse(text).body
         if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for text in texts
    ]  # fmt: skip
    for name in sources[0].keys() & sources[1].keys() - own:
        assert sources[0][name] == sources[1][name], name


def test_readme_names_options_and_files_that_exist(capsys):
    readme = (HERE / "README.md").read_text()
    options = set()
    for script in SCRIPTS:
        with pytest.raises(SystemExit):
            script.parse_args(["--help"])
        options |= set(re.findall(r"--[a-z][a-z0-9-]+", capsys.readouterr().out))
    foreign = {"--nproc-per-node"}
    assert set(re.findall(r"--[a-z][a-z0-9-]+", readme)) - foreign <= options
    for line in re.findall(r"^python (\w+_scar\.py .*)$", readme, re.MULTILINE):
        script, *argv = shlex.split(line)
        assert importlib.import_module(script[:-3]).parse_args(argv)


# ------------------------------------------------------------------------- images of many kinds


def write_photos(root, classes=("ant", "bee"), per_class=6):
    """train/, test/ of one bright colour a class and, without labels, unlabeled/ below folders."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(classes):
        for part, count in (("train", per_class), ("test", 3), ("unlabeled/deep er", 5)):
            folder = root / part / (name if part != "unlabeled/deep er" else "")
            folder.mkdir(parents=True, exist_ok=True)
            for n in range(count):
                pixels = rng.integers(0, 60, (40, 48, 3)) + 180 * (np.arange(3) == i)
                size = (48, 40) if n % 2 else (100, 100)
                image = Image.fromarray(pixels.astype(np.uint8)).resize(size)
                image.save(folder / f"{i} {n}.png")
    return root


def test_run_on_a_folder_with_unlabeled_images(tmp_path, capsys):
    root, out = write_photos(tmp_path / "bild er", ("Käfer, rot", "bee")), tmp_path / "run"
    argv = [*SMALL[:2], *SMALL[4:], "--data", "folder", "--data-dir", str(root)]  # all 12 labels
    result = vat_scar.main([*argv, "--image-size", "30", "--out", str(out)])
    assert "2 classes: Käfer, rot, bee" in capsys.readouterr().out
    assert result["args"]["num_labeled"] == 12 and result["selection"]["without_label"] == 10
    assert result["selection"]["kept"] == result["selection"]["rejected"] == 0
    classes = json.loads((out / "args.json").read_text())["classes"]
    x, y, *_ = common.load_images("folder", root, 30)
    assert x.shape == (22, 3, 30, 30) and (y == -1).sum() == 10
    with open(out / "selection.csv") as file:
        rows = list(csv.DictReader(file))
    assert all((root / row["file"]).is_file() for row in rows) and len(rows) == 10
    for name, label, confidence in (
        ("pretrain.pt", "label", "confidence"),
        ("model.pt", "final_label", "final_confidence"),
    ):
        model = common.WideResNet(2, 10, 1).eval()
        model.load_state_dict(torch.load(out / name, weights_only=True))
        prob = vat_scar.predict(model, x[y == -1]).softmax(dim=1)
        assert [row[label] for row in rows] == [classes[i] for i in prob.argmax(1)]
        assert [float(row[confidence]) for row in rows] == pytest.approx(
            prob.amax(1).tolist(), abs=1e-5
        )
        if name == "pretrain.pt":
            keep, _ = vat_scar.select_clean(model, x[y == -1], 6 / 255)
            assert [row["kept"] for row in rows] == [str(int(kept)) for kept in keep]


def test_folder_reads_every_kind_and_says_what_it_leaves_out(tmp_path):
    root = write_photos(tmp_path)
    red = Image.new("RGB", (32, 32), (200, 0, 0))
    for kind in ("gif", "jfif", "webp", "bmp", "tiff"):
        red.save(root / "train" / "ant" / f"z.{kind}", "JPEG" if kind == "jfif" else None)
    turned = Image.new("RGB", (32, 32))
    turned.paste((255, 255, 255), (0, 0, 32, 16))  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    turned.save(root / "train" / "bee" / "z.jpg", exif=exif, quality=95)
    (root / "train" / "ant" / "notes.txt").write_text("notes")
    for part in ("train", "test"):
        hidden = root / part / ".ipynb_checkpoints"
        hidden.mkdir()
        red.save(hidden / "0.png")
    (root / "train" / "ant" / "loop").symlink_to(root / "train")
    (root / "train" / "ant" / "twice.png").symlink_to(root / "train" / "ant" / "0 0.png")
    classes, files, left_out = common.image_names("folder", root)
    assert classes == ["ant", "bee"] and len(files) == 6 + 5 + 6 + 1 + 10
    assert set(left_out) == {f"train/ant/{name}" for name in ("loop", "notes.txt", "twice.png")}
    x, y, *_ = common.load_images("folder", root)
    assert len(x) == len(files)
    image = x[files.index("train/bee/z.jpg")]
    assert image[:, 20:].min() > 230 and image[:, :12].max() < 25
    with pytest.raises(ValueError, match="bee has 7 images.*--num-labeled"):
        common.split_labeled(y, 16, 0, classes)
    labeled, unlabeled = common.split_labeled(y, 12, 0)
    assert y[labeled].min() >= 0 and (y[unlabeled] == -1).sum() == 10


@pytest.mark.parametrize("fault", ["no test", "one class", "other classes", "empty", "no pile"])
def test_refuses_folders(fault, tmp_path):
    root = write_photos(tmp_path)
    if fault == "no test":
        shutil.rmtree(root / "test")
    elif fault == "one class":
        shutil.rmtree(root / "train" / "bee")
    elif fault == "other classes":
        (root / "test" / "bee").rename(root / "test" / "wasp")
    elif fault == "empty":
        (root / "train" / "wasp").mkdir()
        (root / "test" / "wasp").mkdir()
    else:
        shutil.rmtree(root / "unlabeled")
        (root / "unlabeled").mkdir()
    with pytest.raises(ValueError) as error:
        common.load_images("folder", root)
    assert str(root) in str(error.value) and "\n" not in str(error.value)


def test_images_of_every_kind_are_read_or_refused(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for name, kind in (("rgba.png", "RGBA"), ("grey.png", "L"), ("cmyk.tiff", "CMYK")):
        image.convert(kind).save(tmp_path / name)
        read = common._read_image(tmp_path / name)
        assert read.shape == (32, 32, 3)
        assert np.abs(read - np.asarray(image.convert(kind).convert("RGB")).astype(int)).max() <= 2
    bad = tmp_path / "bad"
    bad.mkdir()
    deep = np.full((32, 32), 15, np.uint16)
    Image.fromarray(deep).save(bad / "grey 16.png")
    Image.fromarray(np.ones((32, 32), np.float32)).save(bad / "float.tiff")
    for name, channels, colour in (("rgb", 3, 2), ("rgba", 4, 6), ("grey alpha", 2, 4)):
        (bad / f"{name} 16.png").write_bytes(png_of_16_bits(channels, colour))
    Image.new("1", (20000, 20000)).save(bad / "bomb.png")
    (bad / "text.png").write_text("hello")
    whole = (tmp_path / "rgba.png").read_bytes()
    (bad / "cut off.png").write_bytes(whole[: len(whole) // 2])
    for path in bad.iterdir():
        with pytest.raises(ValueError, match=path.name) as error:
            common._read_image(path)
        assert "\n" not in str(error.value) and (
            "16" not in path.name or "8 bits" in str(error.value)
        )


def png_of_16_bits(channels, colour):
    """A PNG of 32 x 32 pixels, all 15: Pillow does not write these kinds."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 32, 32, 16, colour, 0, 0, 0)
    rows = (b"\0" + struct.pack(f">{32 * channels}H", *[15] * 32 * channels)) * 32
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_benchmarks_as_torchvision_reads_them(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        content = {"data": pixels, "fine_labels": [0, 1, 2, 3, 4, 99]}
        (folder / name).write_bytes(pickle.dumps(content))
    names = [f"name {i}" for i in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    monkeypatch.setattr(common.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)
    x, y, x_test, _ = common.load_images("cifar100", tmp_path)
    assert (x.flatten(1).numpy() == pixels).all() and y.tolist() == [0, 1, 2, 3, 4, 99]
    assert common.image_names("cifar100", tmp_path)[0] == names
    assert common.load_images("cifar100", tmp_path, 48)[0].shape == (6, 3, 48, 48)

    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 96, 96), dtype=np.uint8)
    for name in ("train_X.bin", "test_X.bin", "unlabeled_X.bin"):
        pixels.transpose(0, 1, 3, 2).tofile(folder / name)  # by columns
    for name in ("train_y.bin", "test_y.bin"):
        np.array([1, 2, 3, 10], np.uint8).tofile(folder / name)
    (folder / "class_names.txt").write_text("\n".join(names[:10]))
    monkeypatch.setattr(common.STL10, "_check_integrity", lambda self: True)
    x, y, _, y_test = common.load_images("stl10", tmp_path, 96)
    assert (x[:4].numpy() == pixels).all() and y.tolist() == [0, 1, 2, 9, -1, -1, -1, -1]

    svhn = SimpleNamespace(data=pixels[:, :, :32, :32], labels=np.array([0, 5, 9, 1]))
    monkeypatch.setitem(common.BENCHMARKS, "svhn", (lambda *args, **kw: svhn, "train", "test", ""))
    assert common.load_images("svhn", tmp_path)[1].tolist() == [0, 5, 9, 1]
    assert common.image_names("svhn", tmp_path)[0] == list("0123456789")


@pytest.mark.parametrize("data", ["cifar10", "svhn"])
def test_what_cannot_be_had_is_a_sentence(data, tmp_path, monkeypatch, capsys):
    def missing(root, *args, **kwargs):
        Path(root).mkdir()  # as torchvision does first
        raise OSError("no network") if data == "cifar10" else ImportError("scipy is not installed")

    monkeypatch.setitem(common.BENCHMARKS, data, (missing, *common.BENCHMARKS[data][1:]))
    options = ("--data", data, "--data-dir", tmp_path / "data", "--out", tmp_path / "run")
    sentence = refusal(capsys, fixmatch_scar, *options)
    assert data in sentence and ("--data synthetic" in sentence or "scipy" in sentence)


# ------------------------------------------------------------------------ run_all.sh and its tables


def run_all(*options, **variables):
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    command = ["bash", str(HERE / "run_all.sh"), *map(str, options)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def write_result(root, select, seed, before, after, data="CIFAR-10", eps=1.0, **args):
    """A finished FixMatch run in root, from the theta~ of its fgsm run."""
    args = {"num_labeled": 40, "depth": 10, "width": 1, "epochs": 2, "steps_per_epoch": 3,
            "batch_size": 4, "val": 0, "lr": 0.03, "pretrained": None, **args}  # fmt: skip
    if select != "fgsm":
        args["pretrained"] = f"elsewhere/fgsm-{seed}/pretrain.pt"
    counts = {"kept": 50, "kept_correct": 40, "rejected": 50, "rejected_wrong": 30}
    result = {"method": "fixmatch", "data": data, "select": select, "eps": eps, "seed": seed,
              "pretrain_accuracy": before, "final_accuracy": after, "selection": counts,
              "table2": [{"eps": eps, **counts}], "device": "a CPU", "ranks": 1, "seconds": 60,
              "versions": {"torch": "2.11"}, "args": args}  # fmt: skip
    folder = root / f"{select}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result))
    return folder / "result.json"


def test_tables_of_known_results(tmp_path):
    for seed, before, scar, control in ((0, 80, 84, 82), (1, 82, 85, 84)):
        write_result(tmp_path, "fgsm", seed, before, scar)
        write_result(tmp_path, "none", seed, before, control)
    write_result(tmp_path, "confidence", 7, 80, 90)  # its theta~ is not there
    done = run_all(OUT=str(tmp_path), METHODS="")
    assert done.returncode == 0, done.stderr
    lines = {line.split("|")[1].strip(): line for line in done.stdout.splitlines() if "|" in line}
    assert "81.00 ± 1.41 (n = 2)" in lines["FixMatch"] and "94.13" in lines["FixMatch"]
    scar = lines["FixMatch + SCAR (eps 1)"]
    assert "84.50 ± 0.71" in scar and "+3.50 ± 0.71" in scar and "+1.50 ± 0.71" in scar
    assert "80.00" in lines["FixMatch (eps 1)"] and "60.00" in lines["FixMatch (eps 1)"]
    assert "confidence-7" in done.stdout and "90.00" not in done.stdout
    assert (tmp_path / "tables.md").read_text().strip() in done.stdout

    write_result(tmp_path / "other", "fgsm", 0, 80, 84, data="CIFAR-10 (JPEG)")
    write_result(tmp_path / "other", "fgsm", 1, 90, 91, data="CIFAR-10 (JPEG)", lr=0.1)
    done = run_all(OUT=str(tmp_path / "other"), METHODS="")
    assert "94.13" not in done.stdout and "80.00 (n = 1)" in done.stdout  # not one mean of both
    (tmp_path / "other" / "fgsm-1" / "result.json").write_text("{}")
    done = run_all(OUT=str(tmp_path / "other"), METHODS="")
    assert done.returncode == 1 and "fgsm-1" in done.stderr and "80.00" in done.stdout


def test_results_have_the_tables_of_their_files(tmp_path):
    text = (HERE / "results" / "README.md").read_text()
    for folder in ("cpu", "h100"):
        shutil.copytree(HERE / "results" / folder, tmp_path / folder)
        done = run_all(OUT=str(tmp_path / folder), METHODS="")
        assert done.returncode == 0 and done.stdout.strip() in text


@pytest.mark.parametrize(
    "name, value",
    [("EPOCHS", "0"), ("EPOCHS", ""), ("SEEDS", ""), ("SEEDS", "*"), ("METHODS", "x"),
     ("CONTROLS", "x"), ("", "--seed=3")],
)  # fmt: skip
def test_run_all_refuses(name, value, tmp_path):
    out = {"OUT": str(tmp_path / "out")}
    done = run_all(**out, **{name: value}) if name else run_all(value, **out)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def fake_python(tmp_path, body):
    """Notes the command lines of the scripts; makes the tables as they are made."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/bash\ncase $1 in *tables.py) exit 0 ;; esac\n'
                    f'echo "$@ gpu=$CUDA_VISIBLE_DEVICES" >> {tmp_path}/log\n{body}\n')  # fmt: skip
    fake.chmod(0o755)
    return {"PYTHON": str(fake), "OUT": str(tmp_path / "out")}


def test_run_all_runs_scar_and_controls_and_goes_on_after_a_failure(tmp_path):
    variables = fake_python(tmp_path, "case $1 in *vat*) exit 1 ;; esac")
    done = run_all("--width", 1, **variables, SEEDS="3", CONTROLS="none confidence eps0")
    assert done.returncode == 1 and "failed: vat, seed 3" in done.stderr
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 1 + 4 + 4 and "--eps 6" in lines[0]
    for i, (select, eps) in enumerate((("fgsm", 1), ("none", 1), ("confidence", 1), ("fgsm", 0))):
        assert f"--select {select} " in lines[1 + i] and f"--eps {eps} " in lines[1 + i]
        assert ("out/mixmatch__cifar10__fgsm-eps1__seed3/pretrain.pt" in lines[1 + i]) == (i > 0)


def test_run_all_uses_each_gpu(tmp_path):
    done = run_all(**fake_python(tmp_path, "sleep 0.2"), SEEDS="0 1", GPUS="4 5", METHODS="vat")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "log").read_text().splitlines()
    assert sorted(line.split("gpu=")[1] for line in lines) == ["4", "4", "5", "5"]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_run_all_stopped_ends_its_runs(number, code, tmp_path):
    environment = {
        **os.environ,
        **fake_python(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 60"),
    }
    command = [sys.executable, "-c", "import os, signal as s, sys; s.signal(s.SIGINT, "
               "s.SIG_DFL); os.execvp('bash', sys.argv[1:])", "bash", "run_all.sh"]  # fmt: skip
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, cwd=HERE)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        time.sleep(0.05)
    child.send_signal(number)
    assert b"goes on" in child.communicate(timeout=20)[1] and child.returncode == code
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
