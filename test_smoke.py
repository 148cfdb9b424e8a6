"""The tests: no network, no GPU; those for CUDA skip themselves where there is none."""

import copy
import csv
import importlib.util
import inspect
import json
import math
import os
import re
import shlex
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
OWN = {"parse_args", "make_optimizer", "schedule", "batch_loss"}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
each_script = pytest.mark.parametrize("script", SCRIPTS)
close = torch.testing.assert_close


def test_what_the_scripts_share_is_the_same_text():
    """So what holds for a shared function in one script holds in all three."""
    texts = {}
    for script in SCRIPTS:
        _, rest = Path(script.__file__).read_text().split("Helpers, the same in every script\n")
        texts.setdefault("from the helpers to the end", set()).add(rest)
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
    # a gradient component can be so near zero that its sign is a matter of rounding
    assert (attacked != torch.cat(expected)).float().mean() < 1e-3
    assert not attacked.requires_grad and all(p.grad is None for p in model.parameters())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    close(model.state_dict(), before.state_dict(), rtol=0, atol=0)


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
    loss, metrics = result
    gradients = [torch.autograd.grad(value, model.parameters()) for value in (loss, expected)]
    close(*gradients, rtol=1e-3, atol=1e-5)
    for ours, plain in zip((loss, *metrics.values()), (expected, *parts)):
        assert ours.item() == pytest.approx(torch.as_tensor(plain).item(), rel=1e-3)
    assert not any(metric.requires_grad for metric in metrics.values())


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


@pytest.mark.parametrize("alpha", [0.01, 0.03, 0.1, 0.75, 4.0, 100.0])
def test_draw_mix(alpha):
    """Distributed as numpy's, the image's own share the larger one; underflow makes no 1/2."""
    torch.manual_seed(0)
    mix = mixmatch_scar.draw_mix(200_000, alpha, torch.device("cpu")).numpy()
    share = np.random.default_rng(0).beta(alpha, alpha, 200_000)
    assert mix.shape == (200_000,) and 0.5 <= mix.min() and mix.max() <= 1
    assert (mix == 0.5).sum() <= 5
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
    check_loss(model, result, labeled + 0.7 * unlabeled, [labeled, unlabeled, 7 / 12])


@each_script
def test_batch_loss_hands_each_view_to_its_place(script, monkeypatch):
    """weak_augment adds 1 and strong_augment 2, so that a view tells where it comes from."""
    seen, y = [], torch.arange(4)
    monkeypatch.setattr(script, "weak_augment", lambda x: x + 1)
    monkeypatch.setattr(script, "strong_augment", lambda x: x + 2, raising=False)
    monkeypatch.setattr(
        script,
        f"{script.METHOD}_loss",
        lambda model, *inputs, **options: seen.extend([*inputs, *options.values()]),
    )
    x_l, x_u = (torch.full((4, 3, 8, 8), value, dtype=torch.uint8) for value in (10, 100))
    script.batch_loss(None, x_l, y, x_u, 0.123, script.parse_args(["--precision", "fp32"]))
    views = [round(255 * float(x.mean())) for x in seen if torch.is_tensor(x) and x.ndim == 4]
    expected = {"vat": [11, 101], "mixmatch": [11, 101, 101], "fixmatch": [11, 101, 102]}
    assert views == expected[script.METHOD] and seen[1] is y
    assert 0.123 in [value for value in seen if isinstance(value, float)]


def test_schedules():
    args = vat_scar.parse_args([])
    weights = [vat_scar.schedule(i, 10, "pretrain", args)[1] for i in (0, 2, 4, 9)]
    assert weights == pytest.approx([0, 0.15, 0.3, 0.3])
    assert vat_scar.schedule(0, 10, "finetune", args) == (0.002, 0.3)
    args = mixmatch_scar.parse_args(["--lambda-u", "75"])
    for i, total, phase, done in ((50, 100, "pretrain", 50), (50, 100, "finetune", 150)):
        expected = pytest.approx((0.002, 75 * done / 16384))
        assert mixmatch_scar.schedule(i, total, phase, args) == expected
    assert mixmatch_scar.schedule(0, 20000, "finetune", args) == (0.002, 75)
    args = fixmatch_scar.parse_args([])
    rates = [fixmatch_scar.schedule(i, 16, "finetune", args)[0] for i in (0, 8)]
    assert rates == pytest.approx([0.03, 0.03 * math.cos(7 * math.pi / 32)])


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
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert 0.98 < F.cosine_similarity(*gradients, dim=0) < 0.99999


@each_script
def test_batch_loss_compiles(script, images):
    """Whole, so that nothing in it waits for a device; but for VAT's direction, a gradient."""
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


def test_select_clean_on_a_known_model():
    """510 images, so that they go through it in two chunks; uint8 and float ones."""
    values = torch.tensor([0, 120, 126, 127, 129, 255], dtype=torch.uint8)
    x, model = values.repeat(85).view(-1, 1, 1, 1).expand(-1, 3, 4, 4), Brightness().train()
    for images in (x, x / 255):
        keep, pseudo = vat_scar.select_clean(model, images, 3 / 255)
        assert pseudo.tolist() == 85 * [0, 0, 0, 0, 1, 1]
        assert keep.tolist() == 85 * [True, True, False, False, False, True]
    assert vat_scar.select_clean(model, x, 0.0)[0].all()
    assert not model.training and model.bn.num_batches_tracked == 0


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
    assert [*stats.values()][:4] == [8227, 7587, 1773, 835]
    assert round(stats["sensitivity"], 2) == 92.22 and round(stats["specificity"], 2) == 47.10
    assert math.isnan(vat_scar.selection_stats(keep & False, pseudo, y)["sensitivity"])


# ------------------------------------------------------------------------------------ the whole run

SMALL = (
    "--data synthetic --num-labeled 100 --depth 10 --width 1 --batch-size 4 --epochs 2 "
    "--steps-per-epoch 3 --table2-eps 1 --precision fp32 --no-compile"
).split()


@pytest.fixture(scope="session")
def few(images):
    """300 images to train with and 100 to test on."""
    return images[0][:300], images[1][:300], images[2][:100], images[3][:100]


@pytest.fixture
def few_images(few, monkeypatch):
    """The few images as what every script loads."""
    for script in SCRIPTS:
        monkeypatch.setattr(script, "load_images", lambda *args: few)
    return few


def run(script, out, *options):
    return script.main([*SMALL, *map(str, options), "--out", str(out)])


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
    with open(path) as file:
        return list(csv.DictReader(file))


def load_model(path, classes=10):
    model = WideResNet(classes, 10, 1).eval()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def test_draw_batches_takes_each_image_once_a_pass():
    pool = torch.arange(10, 17)
    order = vat_scar.draw_batches(pool, 7, 5, torch.Generator().manual_seed(0)).flatten()
    assert all(torch.equal(one_pass.sort().values, pool) for one_pass in order.split(7))


def snapshot(value):
    """A tensor or a model as it is now."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value)
    return value.clone() if torch.is_tensor(value) else value


WATCHED = ["batch_loss", "update_average", "draw_batches", "evaluate", "select_clean"]
OPTIONS = "--eps 8 --val 50 --lambda-u 0.6 --ema-decay 0.15".split()


@pytest.fixture(scope="module", params=SCRIPTS, ids=[script.METHOD for script in SCRIPTS])
def watched(request, few, tmp_path_factory):
    """A run of main, and for each function watched what it was called with, call by call.

    Two phases of two epochs of three steps. Averages over processes are halved, as if a second
    process had nothing but zeros.
    """
    script, out = request.param, tmp_path_factory.mktemp("watched") / "run"
    calls = {name: [] for name in WATCHED}

    def watch(name):
        function = getattr(script, name)

        def watching(*inputs):
            call = SimpleNamespace(inputs=[snapshot(value) for value in inputs])
            call.rng = torch.get_rng_state()
            calls[name].append(call)
            call.result = function(*inputs)
            return call.result

        return watching

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "average_over_processes", lambda x: torch._foreach_mul_(x, 0.5))
        patch.setattr(script, "load_images", lambda *args: few)
        for name in WATCHED:
            patch.setattr(script, name, watch(name))
        result = run(script, out, *OPTIONS)
    labeled, pool = split_labeled(few[1], 100, 0)
    held_out, rest = split_labeled(few[1][pool], 50, 0)
    args = script.parse_args([*SMALL, *OPTIONS])
    return SimpleNamespace(
        script=script, out=out, calls=calls, result=result, args=args, images=few[0], y=few[1],
        labeled=labeled, unlabeled=pool[rest], held_out=pool[held_out],
        theta=load_model(out / "pretrain.pt"), final=load_model(out / "model.pt"),
    )  # fmt: skip


def expected_lambda_u(run, step, phase):
    """At the run's steps, 6 a phase."""
    if run.script is mixmatch_scar:
        return 0.6 * (step + (6 if phase == "finetune" else 0)) / 16384
    if run.script is vat_scar and phase == "pretrain":
        return 0.6 * min(1, step / 2.4)
    return 0.6


def test_each_step_has_its_lambda_u_and_the_options(watched):
    for i, call in enumerate(watched.calls["batch_loss"]):
        lambda_u, args = call.inputs[4:]
        phase = "pretrain" if i < 6 else "finetune"
        assert lambda_u.item() == pytest.approx(expected_lambda_u(watched, i % 6, phase))
        assert vars(args) | {"out": None} == vars(watched.args) | {"out": None}


def test_each_step_is_the_optimizers_by_hand(watched):
    """Gradients averaged over processes, lr of the step, weight decay, momentum; in each phase the
    optimizer begins anew. Batch norm's statistics move with the labeled images alone, and with
    FixMatch's views."""
    script, args = watched.script, watched.args
    for i, (call, update) in enumerate(
        zip(watched.calls["batch_loss"], watched.calls["update_average"])
    ):
        if i % 6 == 0:
            state = {}
        t = i % 6 + 1
        before, x_l, y_l, x_u, lambda_u, _ = call.inputs
        twin = copy.deepcopy(before)
        after = dict(update.inputs[1].named_parameters())
        batches = [part.bn.num_batches_tracked.item() for part in (twin, update.inputs[1])]
        assert batches[1] - batches[0] == (2 if script is fixmatch_scar else 1)
        torch.set_rng_state(call.rng)
        loss, _ = script.batch_loss(twin, x_l, y_l, x_u, lambda_u, args)
        (0.5 * loss).backward()
        lr = args.lr
        if script is fixmatch_scar:
            lr = 0.03 * math.cos(7 * math.pi * (t - 1) / (16 * 6))
        with torch.no_grad():
            for name, p in twin.named_parameters():
                decay = args.weight_decay if p.ndim > 1 else 0.0
                if script is fixmatch_scar:
                    gradient = p.grad + decay * p
                    state[name] = 0.9 * state.get(name, 0) + gradient
                    p -= lr * (gradient + 0.9 * state[name])
                else:
                    p *= 1 - lr * decay
                    m, v = state.get(name, (0, 0))
                    m, v = 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad**2
                    state[name] = m, v
                    p -= lr * m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        close(after, dict(twin.named_parameters()), rtol=1e-3, atol=1e-4)


def test_average_follows_the_model(watched):
    """Weights and float buffers at min(--ema-decay, (1 + t) / (10 + t)); counters are copied."""
    updates = watched.calls["update_average"]
    for i, update in enumerate(updates):
        average, model, decay = update.inputs
        assert decay.item() == pytest.approx([0.1, 0.15][min(i % 6, 1)])
        following = watched.theta if i == 5 else watched.final
        if i % 6 < 5:
            following = updates[i + 1].inputs[0]
        for name, value in following.state_dict().items():
            before, new = average.state_dict()[name], model.state_dict()[name]
            expected = decay * before + (1 - decay) * new if value.is_floating_point() else new
            close(value, expected)


def test_fine_tuning_starts_from_theta(watched):
    """Weights and average are the averaged model at the end of pretraining."""
    model, average = watched.calls["batch_loss"][6].inputs[0], watched.calls["update_average"][6]
    for part in (model, average.inputs[0]):
        close(dict(part.named_parameters()), dict(watched.theta.named_parameters()))
    close(average.inputs[0].state_dict(), watched.theta.state_dict(), rtol=0, atol=0)


def test_training_sees_the_known_labels_and_kept_images_alone(watched):
    """Labeled images in pretraining; the kept ones too in fine-tuning, under theta~'s label."""
    keep, pseudo = watched.script.select_clean(
        watched.theta, watched.images[watched.unlabeled], 8 / 255
    )
    assert 5 < keep.sum() < 145
    known = dict(zip(watched.labeled.tolist(), watched.y[watched.labeled].tolist()))
    added = dict(zip(watched.unlabeled[keep].tolist(), pseudo[keep].tolist()))
    place = {image.numpy().tobytes(): i for i, image in enumerate(watched.images)}
    seen = {"pretrain": set(), "finetune": set()}
    for i, call in enumerate(watched.calls["batch_loss"]):
        _, x_l, y_l, x_u, _, _ = call.inputs
        assert len(x_l) == len(y_l) == 4 and len(x_u) == 4 * watched.args.mu
        phase = "pretrain" if i < 6 else "finetune"
        for image, label in zip(x_l, y_l):
            seen[phase].add((place[image.numpy().tobytes()], label.item()))
        assert {place[image.numpy().tobytes()] for image in x_u} <= set(watched.unlabeled.tolist())
    assert seen["pretrain"] <= known.items()
    assert seen["finetune"] <= (known | added).items()
    assert len(seen["finetune"] & added.items()) > 3 and len(seen["finetune"] & known.items()) > 3
    counts = watched.result["selection"]
    assert counts["added"] == counts["kept"] == sum(counts["kept_per_class"]) == keep.sum()


def test_no_two_epochs_draw_the_same(watched):
    for name, count in (("batch_loss", 12), ("draw_batches", 8)):
        draws = [call.rng for call in watched.calls[name]]
        if name == "draw_batches":
            draws = [call.result for call in watched.calls[name]]
        assert len({str(draw.tolist()) for draw in draws}) == count


def test_scores_are_the_averages_on_the_held_out_images(watched):
    """theta~'s accuracy and Table 2, each epoch's accuracy, the final one."""
    x, y, result = watched.images[watched.held_out], watched.y[watched.held_out], watched.result
    updates = watched.calls["update_average"]
    averages = [updates[3].inputs[0], watched.theta, watched.theta, updates[9].inputs[0]]
    for call, average in zip(watched.calls["evaluate"], averages + [watched.final], strict=True):
        assert torch.equal(call.inputs[1], x) and torch.equal(call.inputs[2], y)
        close(call.inputs[0].state_dict(), average.state_dict(), rtol=0, atol=0)
    rows = read_rows(watched.out / "metrics.csv")
    assert [(row["phase"], row["epoch"]) for row in rows] == [
        ("pretrain", "1"), ("pretrain", "2"), ("finetune", "1"), ("finetune", "2"),
    ]  # fmt: skip
    theta, final = (watched.script.evaluate(m, x, y) for m in (watched.theta, watched.final))
    assert float(rows[1]["accuracy"]) == result["pretrain_accuracy"] == theta
    assert float(rows[3]["accuracy"]) == result["final_accuracy"] == final
    assert result["scored_on"] == "validation" and result["data"] == "synthetic"
    assert [row["eps"] for row in result["table2"]] == [1, 8]
    for row in result["table2"]:
        keep, pseudo = watched.script.select_clean(watched.theta, x, row["eps"] / 255)
        stats = watched.script.selection_stats(keep, pseudo, y)
        expected = {name: None if math.isnan(value) else value for name, value in stats.items()}
        assert {**row, **expected} == row


def test_metrics_csv_has_the_means_over_steps_and_processes(watched):
    steps = [{"loss": loss, **more} for loss, more in
             (call.result for call in watched.calls["batch_loss"])]  # fmt: skip
    for i, row in enumerate(read_rows(watched.out / "metrics.csv")):
        for name in steps[0]:
            mean = sum(step[name].item() for step in steps[3 * i : 3 * i + 3]) / 3
            assert float(row[name]) == pytest.approx(0.5 * mean, rel=1e-5, abs=1e-9)


def test_a_run_leaves_its_files(watched):
    assert {path.name for path in watched.out.iterdir()} == {
        "args.json", "checkpoint.pt", "metrics.csv", f"{watched.script.METHOD}_scar.py", "model.pt",
        "pretrain.pt", "result.json", "selection.csv", "selection.png",
    }  # fmt: skip
    text = (watched.out / "result.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == watched.result  # no NaN
    copied = (watched.out / f"{watched.script.METHOD}_scar.py").read_text()
    assert copied == Path(watched.script.__file__).read_text()


@pytest.mark.parametrize("select", ["none", "confidence"])
@each_script
def test_controls_start_from_theta_and_add_their_own(
    script, select, few_images, tmp_path, monkeypatch
):
    """Nothing, or as many as fgsm keeps at --eps, the most confident ones."""
    theta = WideResNet(10, 10, 1)
    torch.save(theta.state_dict(), tmp_path / "theta.pt")
    pools, draw = [], script.draw_batches
    monkeypatch.setattr(script, "draw_batches", lambda *x: pools.append(x[0]) or draw(*x))
    options = ("--select", select, "--eps", 8, "--pretrained", tmp_path / "theta.pt")
    result = run(script, tmp_path / "run", *options)
    x, y, x_test, y_test = few_images
    labeled, unlabeled = split_labeled(y, 100, 0)
    expected = labeled
    if select == "confidence":
        keep, _ = script.select_clean(theta, x[unlabeled], 8 / 255)
        sure = script.select_confident(script.predict(theta, x[unlabeled]), int(keep.sum()))
        expected = torch.cat([labeled, unlabeled[sure]]).sort().values
    assert len(pools) == 4 and torch.equal(pools[0], unlabeled)
    assert torch.equal(pools[1], expected) and torch.equal(pools[3], expected)
    assert result["selection"]["added"] == len(expected) - 100
    assert result["pretrain_accuracy"] == script.evaluate(theta, x_test, y_test)
    assert (result["selection"]["sensitivity"] is None) == (select == "none")


def test_each_epoch_begins_in_training_mode(few_images, tmp_path, monkeypatch):
    """So whoever evaluates the model itself, which leaves it in eval mode, trains on rightly."""
    models, modes, batch_loss, evaluate = [], [], vat_scar.batch_loss, vat_scar.evaluate

    def watching(model, *inputs):
        models.append(model)
        modes.append(model.training)
        return batch_loss(model, *inputs)

    monkeypatch.setattr(vat_scar, "batch_loss", watching)
    monkeypatch.setattr(vat_scar, "evaluate", lambda _, x, y: evaluate(models[-1], x, y))
    run(vat_scar, tmp_path / "run")
    assert modes == 12 * [True] and not models[-1].training


def test_tensorboard_gets_each_epochs_numbers(few_images, tmp_path, monkeypatch):
    scalars = []
    writer = SimpleNamespace(add_scalar=lambda *scalar: scalars.append(scalar), flush=lambda: None)
    board = SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr(vat_scar.importlib.util, "find_spec", lambda name: name == "tensorboard")
    result = run(vat_scar, tmp_path / "run", "--tensorboard")
    assert ("finetune/accuracy", result["final_accuracy"], 2) in scalars
    assert {name for name, _, _ in scalars} >= {"pretrain/loss", "pretrain/lr", "pretrain/entropy"}


def test_somebodys_network_trains(few_images, tmp_path, monkeypatch):
    """Without batch norm, with a layer that is not used and a parameter without dimensions."""

    class Plain(nn.Module):
        def __init__(self, classes, depth, width):
            super().__init__()
            self.linear, self.unused = nn.Linear(3 * 64, classes), nn.Linear(2, 2)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.scale * self.linear(F.avg_pool2d(x, 4).flatten(1))

    for script in SCRIPTS:
        monkeypatch.setattr(script, "WideResNet", Plain)
        run(script, tmp_path / script.METHOD)
        weights = torch.load(tmp_path / script.METHOD / "model.pt")
        assert weights["scale"] != 1


@needs_cuda
@each_script
def test_whole_run_on_cuda(script, few_images, tmp_path):
    """Compiled, captured and in bf16 by default; its weights load without a GPU."""
    options = [*SMALL[:-3], "--steps-per-epoch", "8", "--out", str(tmp_path / "run")]
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


# ------------------------------------------------------------------------- bad input, interruptions


def test_refuses_options(few_images, tmp_path, capsys):
    table = {
        "--depth 27": "--depth must be 6n + 4",
        "--data imagenet": "invalid choice: 'imagenet'",
        "--epoch 3": "unrecognized arguments: --epoch",
        "--epochs 2.5": "--epochs: invalid int value: '2.5'",
        "--num-labeled 9": "too few",
        "--num-labeled 290 --val 10": "no unlabeled image",
        "--pretrained=": "cannot read .",
        "--pretrained nowhere/theta.pt": "cannot read nowhere/theta.pt: No such file or directory",
        "--eps 256": "--eps and --table2-eps must be from 0 to 255",
        "--table2-eps 1 -2": "--eps and --table2-eps must be from 0 to 255",
        "--table2-eps nan": "--eps and --table2-eps must be from 0 to 255",
        "--ema-decay 1.5": "--ema-decay must be from 0 to 1",
        "--threshold 2": "--threshold is a probability",
        "--image-size 8": "--image-size must be at least 16",
    }
    for option in ("width", "epochs", "steps-per-epoch", "batch-size", "mu"):
        table[f"--{option} 0"] = f"--{option} must be at least 1"
    for option in ("lr inf", "eps nan", "lambda-u -1", "weight-decay -1", "seed -1", "val -1"):
        table[f"--{option}"] = f"--{option.split()[0]} must be a finite number and not negative"
    if not torch.cuda.is_available():
        table["--device cuda"] = "no NVIDIA GPU"
    if importlib.util.find_spec("tensorboard") is None:
        table["--tensorboard"] = "pip install tensorboard"
    for options, sentence in table.items():
        argv = [*SMALL, "--out", tmp_path / "run", *options.split()]
        assert sentence in refusal(capsys, fixmatch_scar, *argv)
    for script, option in ((mixmatch_scar, "--alpha"), (vat_scar, "--xi")):
        argv = [*SMALL, "--out", tmp_path / "run", option, {"--alpha": 1e-3, "--xi": 0}[option]]
        assert f"{option} must be" in refusal(capsys, script, *argv)
    assert not any(tmp_path.iterdir())


def test_refuses_folders_files_and_settings_of_other_runs(few_images, tmp_path, capsys):
    mine = tmp_path / "mine"
    run(fixmatch_scar, mine)
    assert "holds no run" in refusal(capsys, fixmatch_scar, *SMALL, "--out", tmp_path)
    (tmp_path / "a file").write_text("")
    assert "cannot write to" in refusal(capsys, fixmatch_scar, *SMALL, "--out", tmp_path / "a file")
    before = {path: path.read_bytes() for path in mine.iterdir()}
    sentence = refusal(capsys, fixmatch_scar, *SMALL, "--lr", 0.1, "--seed", 5, "--out", mine)
    assert "lr was 0.03, now 0.1" in sentence and "seed was 0, now 5" in sentence
    assert before == {path: path.read_bytes() for path in mine.iterdir()}
    new = [*SMALL, "--out", tmp_path / "new", "--pretrained", mine / "pretrain.pt"]
    assert "method was fixmatch, now vat" in refusal(capsys, vat_scar, *new)
    assert "seed was 0, now 5" in refusal(capsys, fixmatch_scar, *new, "--seed", 5)
    assert "no weights of this network" in refusal(capsys, fixmatch_scar, *new, "--depth", 16)
    same = [*SMALL, "--pretrained", mine / "pretrain.pt", "--out", mine]
    assert "pretrained was None" in refusal(capsys, fixmatch_scar, *same)
    assert not (tmp_path / "new").exists()


def test_auto_and_omitted_options_are_settled_before_settings_are_compared(few_images, tmp_path):
    """What is given by its name is the same run; a finished one is printed, not trained."""
    argv = [word for word in SMALL if word not in ("--precision", "fp32", "--no-compile")]
    argv += ["--out", str(tmp_path / "run"), "--device", "cpu"]
    result = vat_scar.main(argv)
    assert (result["args"]["precision"], result["args"]["compile"]) == ("fp32", False)
    assert vat_scar.main([*argv, "--precision", "fp32", "--compile"]) == result
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    assert (args["precision"], args["device"]) == ("fp32", "cpu")


def test_damaged_files_are_named_and_left_alone(few_images, tmp_path, capsys):
    out, argv = tmp_path / "run", [*SMALL, "--out", tmp_path / "run"]
    run(vat_scar, out)
    (out / "result.json").unlink()  # so it is not finished
    torch.save(SimpleNamespace(), tmp_path / "code")  # pickled, it could run anything
    new = [*SMALL, "--out", tmp_path / "new", "--pretrained", out / "pretrain.pt"]
    for name, command in (("checkpoint.pt", argv), ("pretrain.pt", new), ("args.json", argv)):
        path = out / name
        whole = path.read_bytes()
        for fault in (whole[: len(whole) // 2], b"", (tmp_path / "code").read_bytes()):
            path.write_bytes(fault)
            sentence = refusal(capsys, vat_scar, *command)
            assert f"cannot read {path}" in sentence and "weights_only" not in sentence
            assert path.read_bytes() == fault
        path.write_bytes(whole)
    state = torch.load(out / "checkpoint.pt")
    for earlier in ({"rows": [], "learner": []}, {**state, "labels": state["labels"][:7]}):
        torch.save(earlier, out / "checkpoint.pt")
        assert "from another version" in refusal(capsys, vat_scar, *argv)
    torch.save(state, out / "checkpoint.pt")
    assert run(vat_scar, out)["final_accuracy"] >= 0


def test_a_loss_that_is_not_finite_ends_the_run_with_a_sentence(few_images, tmp_path, capsys):
    argv = [*SMALL, "--lr", 1e30, "--out", tmp_path / "run"]
    assert "pretrain 1: loss not finite" in refusal(capsys, vat_scar, *argv)


def test_errors_in_training_keep_their_traceback(few_images, tmp_path, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(vat_scar, "batch_loss", fail)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), OSError("No space left on device")):
        with pytest.raises(type(error), match=str(error)):
            run(vat_scar, tmp_path / "run")


def test_compile_reaches_the_loss_and_its_errors_come_whole(few_images, tmp_path, monkeypatch):
    def fail(graph, inputs):
        raise RuntimeError("no pattern matches")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fail))
    with pytest.raises(Exception, match="no pattern matches"):
        run(mixmatch_scar, tmp_path / "run", "--compile")


def test_the_scripts_copy_is_of_the_beginning(few_images, tmp_path):
    run(vat_scar, tmp_path / "run")
    (tmp_path / "run" / "vat_scar.py").write_text("as it was")
    (tmp_path / "run" / "result.json").unlink()
    run(vat_scar, tmp_path / "run")
    assert (tmp_path / "run" / "vat_scar.py").read_text() == "as it was"


def test_a_run_switches_tf32_off(few_images, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    run(vat_scar, tmp_path / "run", "--epochs", 1)
    assert not torch.backends.cudnn.allow_tf32


def test_a_second_run_on_the_folder_changes_nothing(few_images, tmp_path, monkeypatch):
    """It starts in the first one's second epoch, goes on from its checkpoint and ends before it."""
    one, two = tmp_path / "one", tmp_path / "two"
    results, evaluate = [], vat_scar.evaluate

    def second_starts(*inputs):
        if (two / "metrics.csv").exists() and not results:
            monkeypatch.setattr(vat_scar, "evaluate", evaluate)
            results.append(run(vat_scar, two))
        return evaluate(*inputs)

    run(vat_scar, one)
    monkeypatch.setattr(vat_scar, "evaluate", second_starts)
    results.append(run(vat_scar, two))
    assert [len(result["table2"]) for result in results] == [2, 2]
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert (two / "selection.csv").read_text() == (one / "selection.csv").read_text()
    for name in ("pretrain.pt", "model.pt"):
        close(torch.load(two / name), torch.load(one / name), rtol=0, atol=0)
    losses = [[row["loss"] for row in read_rows(out / "metrics.csv")] for out in (one, two)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def write_photos(root, classes=("ant", "bee")):
    """train/, test/ of one bright colour a class and, without labels, unlabeled/ below folders."""
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
    return [*SMALL[4:], "--data", "folder", "--data-dir", str(root)]


def test_a_stopped_run_goes_on_and_learns(tmp_path):
    """SIGTERM in pretraining, SIGKILL in fine-tuning; it ends with the uninterrupted weights."""
    options = [*folder_options(write_photos(tmp_path / "photos")), "--steps-per-epoch", "20"]
    command = [sys.executable, HERE / "vat_scar.py", *options, "--out", tmp_path / "stopped"]
    for phase, number in (("pretrain", signal.SIGTERM), ("finetune", signal.SIGKILL)):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not child.stdout.readline().startswith(phase):
            assert child.poll() is None
        child.send_signal(number)
        child.communicate()
        assert child.returncode == -number
    outs = tmp_path / "whole", tmp_path / "stopped"
    results = [vat_scar.main([*options, "--out", str(out)]) for out in outs]
    assert results[0]["final_accuracy"] == results[1]["final_accuracy"] > 90
    for name in ("pretrain.pt", "model.pt"):
        weights = [load_model(out / name, 2).state_dict() for out in outs]
        close(*weights, rtol=0, atol=0)
    losses = [[row["loss"] for row in read_rows(out / "metrics.csv")] for out in outs]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert vat_scar.main([*options, "--out", str(outs[0])]) == results[0]  # finished: printed alone


def test_two_processes_are_one_run(tmp_path):
    """torchrun with two processes on the CPU: the files and the tables of one run."""
    root, out = write_photos(tmp_path / "photos"), tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(20000 + os.getpid() % 20000), HERE / "mixmatch_scar.py"]
    command += [*folder_options(root), "--device", "cpu", "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("Table 1") == 1, done.stderr
    result = json.loads((out / "result.json").read_text())
    assert result["ranks"] == 2 and len(read_rows(out / "metrics.csv")) == 4
    x, y, *_ = load_images("folder", root)
    keep, _ = mixmatch_scar.select_clean(load_model(out / "pretrain.pt", 2), x[y < 0], 1 / 255)
    assert abs(result["selection"]["added"] - int(keep.sum())) <= 1  # threads may round otherwise


def test_average_over_processes(monkeypatch):
    """The mean of what this process has and, in its stead, what the exchange adds."""
    ours, theirs = [torch.ones(2, 3), torch.zeros(4), torch.tensor(1.0)], torch.arange(11.0)
    monkeypatch.setattr(vat_scar, "WORLD_SIZE", 2)
    monkeypatch.setattr(vat_scar.dist, "all_reduce", lambda flat: flat.add_(theirs))
    vat_scar.average_over_processes(ours)
    close(ours, [(1 + theirs[:6].view(2, 3)) / 2, theirs[6:10] / 2, torch.tensor(5.5)])


def test_processes_that_do_not_divide_the_batch_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vat_scar, "WORLD_SIZE", 3)
    argv = [*SMALL, "--out", tmp_path / "run"]
    assert "--batch-size 4 does not divide among 3" in refusal(capsys, vat_scar, *argv)


@each_script
def test_two_processes_share_each_batch(script, few_images, tmp_path, monkeypatch):
    """Disjoint halves, augmented each in its own way; process 0's labels are everybody's."""
    for name in ("init_process_group", "all_reduce"):
        monkeypatch.setattr(script.dist, name, lambda *args: None)
    monkeypatch.setattr(script, "average_over_processes", lambda tensors: None)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    seen, broadcasts, batch_loss = [], [], script.batch_loss
    monkeypatch.setattr(script.dist, "broadcast", lambda *args: broadcasts.append(args))

    def watching(*inputs):
        seen.append((inputs[1].flatten(1).tolist(), inputs[3].flatten(1).tolist(), inputs[2]))
        seen.append(torch.get_rng_state().tolist())
        return batch_loss(*inputs)

    monkeypatch.setattr(script, "batch_loss", watching)
    for world_size, rank in ((1, 0), (2, 0), (2, 1)):
        monkeypatch.setattr(script, "WORLD_SIZE", world_size)
        monkeypatch.setattr(script, "RANK", rank)
        run(script, tmp_path / f"{world_size}{rank}", "--epochs", 1, "--select", "none")
    whole, first, second = seen[:12], seen[12:24], seen[24:]
    for i in range(0, 12, 2):
        for part in range(2):
            assert len(first[i][part]) == len(second[i][part]) == len(whole[i][part]) / 2
            assert sorted(first[i][part] + second[i][part]) == sorted(whole[i][part])
        assert first[i + 1] != second[i + 1]
    assert [source for _, source in broadcasts] == [0, 0]
    labeled, _ = split_labeled(few_images[1], 100, 0)
    assert all(torch.equal((labels >= 0).nonzero()[:, 0], labeled) for labels, _ in broadcasts)
    assert not (tmp_path / "21").exists() or not any((tmp_path / "21").iterdir())


def test_rank_without_world_size_counts_for_nothing():
    command = [sys.executable, "-c", "import vat_scar; print(vat_scar.RANK, vat_scar.WORLD_SIZE)"]
    environment = {**os.environ, "RANK": "3"}
    assert subprocess.check_output(command, env=environment, cwd=HERE) == b"0 1\n"


def test_run_on_a_folder_with_unlabeled_images(tmp_path, capsys):
    root, out = write_photos(tmp_path / "bild er", ("Käfer, rot", "bee")), tmp_path / "run"
    (root / "train" / "bee" / "notes.txt").write_text("notes")
    result = vat_scar.main([*folder_options(root), "--image-size", "30", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "2 classes; 12 labeled, 10 unlabeled and 6 test images\n" in printed
    assert "1 files left out: train/bee/notes.txt\n" in printed
    counts, classes = result["selection"], json.loads((out / "args.json").read_text())["classes"]
    assert classes == ["Käfer, rot", "bee"]
    rows, (x, y, *_) = read_rows(out / "selection.csv"), load_images("folder", root, 30)
    x = x[y == -1]
    assert all((root / row["file"]).is_file() for row in rows) and len(rows) == 10
    for name, column in (("pretrain.pt", ""), ("model.pt", "final_")):
        prob = vat_scar.predict(load_model(out / name, 2), x).softmax(dim=1)
        confidences = [float(row[f"{column}confidence"]) for row in rows]
        assert confidences == pytest.approx(prob.amax(1).tolist(), abs=1e-5)
        assert [row[f"{column}label"] for row in rows] == [classes[i] for i in prob.argmax(1)]
    keep, _ = vat_scar.select_clean(load_model(out / "pretrain.pt", 2), x, 6 / 255)
    assert [row["kept"] for row in rows] == [str(int(kept)) for kept in keep]
    assert counts["added"] == int(keep.sum()) and counts["kept"] == counts["rejected"] == 0


def test_folder_reads_every_kind_and_says_what_it_leaves_out(tmp_path):
    root = write_photos(tmp_path)
    ants, bees = root / "train" / "ant", root / "train" / "bee"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    kinds = {"z.gif": "P", "z.bmp": "RGB", "z.png": "RGBA", "z.tiff": "CMYK", "z.webp": "L"}
    for name, kind in kinds.items():
        image.convert(kind).save(bees / name, lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    image.rotate(180).save(bees / "z turned.png", exif=exif)
    (ants / "notes.txt").write_text("notes")
    (root / "train" / ".hidden").mkdir()
    image.save(root / "train" / ".hidden" / "0.png")
    (ants / "loop").symlink_to(root / "train")
    (ants / "twice.png").symlink_to(ants / "0 0.png")
    classes, files, left_out = common.image_names("folder", root)
    assert set(left_out) == {f"train/ant/{name}" for name in ("loop", "notes.txt", "twice.png")}
    x, y, *_ = load_images("folder", root)
    assert y.tolist() == 6 * [0] + 12 * [1] + 10 * [-1] and len(files) == len(x)
    for name, kind in {**kinds, "z turned.png": "RGB"}.items():
        expected = np.asarray(image.convert(kind).convert("RGB")).transpose(2, 0, 1)
        assert np.abs(x[files.index(f"train/bee/{name}")].numpy() - expected.astype(int)).max() <= 2
    with pytest.raises(ValueError, match="ant has 6 images.*--num-labeled"):
        split_labeled(y, 16, 0, classes)
    labeled, unlabeled = split_labeled(y, 18, 0)
    assert y[labeled].min() >= 0 and (y[unlabeled] == -1).sum() == 10
    (root / "test" / "bee").rename(root / "test" / "wasp")
    with pytest.raises(ValueError, match="only one has bee, wasp"):
        load_images("folder", root)


def test_images_that_are_damaged_or_deep_are_refused(tmp_path):
    """More than 8 bits a channel would be cut off; 20,000 x 20,000 pixels would fill the memory."""
    Image.fromarray(np.full((32, 32), 15, np.uint16)).save(tmp_path / "deep grey.png")
    Image.fromarray(np.ones((32, 32), np.float32)).save(tmp_path / "deep float.tiff")
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    (tmp_path / "text.png").write_text("hello")
    whole = (tmp_path / "deep grey.png").read_bytes()
    (tmp_path / "cut off.png").write_bytes(whole[: len(whole) // 2])
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=f"cannot read {path}") as error:
            common._read_image(path, 32)
        assert "deep" not in path.name or "8 bits" in str(error.value)


def test_benchmarks(tmp_path, monkeypatch):
    """torchvision's CIFAR has the channels last, SVHN first, and its labels by another name."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    cifar = SimpleNamespace(data=pixels.transpose(0, 2, 3, 1), targets=[0, 1, 2, 9])
    svhn = SimpleNamespace(data=pixels, labels=np.array([0, 1, 2, 9]))
    for name, dataset in (("cifar10", cifar), ("svhn", svhn)):
        words = common.BENCHMARKS[name][1:]
        monkeypatch.setitem(common.BENCHMARKS, name, (lambda *args, **kw: dataset, *words))
        x, y, *_ = load_images(name, tmp_path)
        assert (x.numpy() == pixels).all() and y.tolist() == [0, 1, 2, 9]


# --------------------------------------------------------------------------- the README, run_all.sh


def test_readme_names_options_and_commands_that_exist(capsys):
    readme, known = (HERE / "README.md").read_text(), {"--nproc-per-node"}
    scripts = {f"{script.METHOD}_scar.py": script for script in SCRIPTS}
    for script in SCRIPTS:
        with pytest.raises(SystemExit):
            script.parse_args(["--help"])
        known |= set(re.findall(r"--[a-z][a-z0-9-]+", capsys.readouterr().out))
    assert set(re.findall(r"--[a-z][a-z0-9-]+", readme)) <= known
    for line in re.findall(r"^python (\w+_scar\.py .*)$", readme, re.MULTILINE):
        script, *argv = shlex.split(line)
        assert scripts[script].parse_args(argv)


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


def test_results_have_the_tables_of_their_files(tmp_path):
    text = (HERE / "results" / "README.md").read_text()
    for folder in ("cpu", "h100"):
        shutil.copytree(HERE / "results" / folder, tmp_path / folder)
        done = run_all(OUT=str(tmp_path / folder), METHODS="")
        assert done.returncode == 0 and done.stdout.strip() in text


def test_run_all_refuses(tmp_path):
    out = {"OUT": str(tmp_path / "out")}
    for wrong in ({"EPOCHS": "0"}, {"SEEDS": "*"}, {"METHODS": "x"}):
        done = run_all(**out, **wrong)
        assert done.returncode == 2 and re.fullmatch("error: .*\n", done.stderr)
    assert run_all("--seed=3", **out).returncode == 2 and not any(tmp_path.iterdir())


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


def test_run_all_stopped_ends_its_runs(tmp_path):
    pid = tmp_path / "pid"
    environment = {**os.environ, **fake_python(tmp_path, f"echo $$ > {pid}; exec sleep 60")}
    command = ["bash", str(HERE / "run_all.sh")]
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    while not pid.exists() or not pid.read_text().strip():
        time.sleep(0.05)
    child.terminate()
    assert b"goes on" in child.communicate(timeout=20)[1] and child.returncode == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
