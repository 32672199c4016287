"""PSNR, SSIM and the Fréchet distance against independent libraries, slow specifications and their own laws."""
import math
import time

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, strategies as st
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import metrics


def image(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def real(name):
    return torch.from_numpy(getattr(data, name)().astype(np.float32) / 255).permute(2, 0, 1)[None]


def reference_ssim(x, y):
    return structural_similarity(x[0].permute(1, 2, 0).double().numpy(), y[0].permute(1, 2, 0).double().numpy(), data_range=1.0, channel_axis=-1,
                                 gaussian_weights=True, sigma=1.5, use_sample_covariance=False)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_psnr_and_ssim_agree_with_scikit_image_on_photos(name, noise):
    x = real(name)
    y = (x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert metrics.psnr(x, y).item() == pytest.approx(peak_signal_noise_ratio(x.double().numpy(), y.double().numpy(), data_range=1), abs=1e-5)
    assert metrics.ssim(x, y).item() == pytest.approx(reference_ssim(x, y), abs=1e-5)


@given(seed=st.integers(0, 999), h=st.integers(11, 40), w=st.integers(11, 40), c=st.sampled_from([1, 3]), flat=st.sampled_from([0.0, 0.9, 0.999]))
def test_ssim_agrees_with_scikit_image_on_random_and_nearly_flat_images(seed, h, w, c, flat):
    x, y = (flat + (1 - flat) * image(seed + k, 1, c, h, w) for k in (0, 1))
    assert metrics.ssim(x, y).item() == pytest.approx(reference_ssim(x, y), abs=1e-5)
    assert metrics.psnr(x, y).item() == pytest.approx(peak_signal_noise_ratio(x.double().numpy(), y.double().numpy(), data_range=1), abs=1e-5)


def test_known_values():
    x = torch.zeros(1, 1, 16, 16)
    assert metrics.psnr(x, x + 0.1).item() == pytest.approx(20, abs=1e-5)
    assert metrics.psnr(10 * x, 10 * x + 1, peak=10).item() == pytest.approx(20, abs=1e-5)
    assert metrics.psnr(x, x).item() == math.inf
    assert metrics.ssim(x, x + 1).item() == pytest.approx(0.01 ** 2 / (1 + 0.01 ** 2), rel=1e-4)


@given(seed=st.integers(0, 99))
def test_laws_of_ssim(seed):
    x, y = image(seed, 3, 3, 20, 20), image(seed + 100, 3, 3, 20, 20)
    assert torch.allclose(metrics.ssim(x, x), torch.ones(3))
    assert torch.allclose(metrics.ssim(x, y), metrics.ssim(y, x), atol=1e-6)
    assert torch.allclose(metrics.ssim(x, y), metrics.ssim(255 * x, 255 * y, peak=255), atol=1e-5)
    for measure in (metrics.psnr, metrics.ssim):                                            # a batch is its images
        assert torch.allclose(measure(x, y), torch.cat([measure(x[i:i + 1], y[i:i + 1]) for i in range(3)]), atol=1e-6)


def test_both_are_differentiable():
    for measure in (metrics.psnr, metrics.ssim):
        x = image(0, 2, 1, 13, 13).double().requires_grad_()
        assert torch.autograd.gradcheck(lambda v: measure(v, image(1, 2, 1, 13, 13).double()), (0.2 + 0.6 * x,))


@pytest.mark.parametrize("x, y, message", [
    (torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 17), "differ in shape"),
    (torch.zeros(16, 16), torch.zeros(16, 16), "float tensors"),
    (torch.zeros(1, 1, 16, 16, dtype=torch.uint8), torch.zeros(1, 1, 16, 16, dtype=torch.uint8), "float tensors"),
    (torch.full((1, 1, 16, 16), 255.), torch.zeros(1, 1, 16, 16), "must lie in"),
    (torch.full((1, 1, 16, 16), math.nan), torch.zeros(1, 1, 16, 16), "must lie in")])
def test_wrong_inputs_are_refused_in_a_sentence(x, y, message):
    for measure in (metrics.psnr, metrics.ssim):
        with pytest.raises(ValueError, match=message):
            measure(x, y)
    with pytest.raises(ValueError, match="at least 11"):
        metrics.ssim(torch.zeros(1, 1, 10, 30), torch.zeros(1, 1, 10, 30))


def reference_frechet(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T))
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root.real)


@given(seed=st.integers(0, 999), d=st.integers(2, 12), shift=st.floats(0, 3))
def test_frechet_agrees_with_scipy(seed, d, shift):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g)
    a, b = torch.randn(60, d, generator=g) @ mix, torch.randn(80, d, generator=g) + shift
    assert metrics.frechet(a, b) == pytest.approx(reference_frechet(a, b), rel=1e-6, abs=1e-6)


def test_frechet_of_singular_covariances_and_its_laws():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(10, 3, generator=g) @ torch.randn(3, 40, generator=g)                 # rank 3, fewer points than axes
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet(a, a + 2) == pytest.approx(160, rel=1e-6)
    b = torch.randn(12, 40, generator=g)
    assert metrics.frechet(a, b) == pytest.approx(metrics.frechet(b, a), rel=1e-9)
    x, y = torch.randn(50, 1, generator=g), 3 * torch.randn(70, 1, generator=g) + 1              # one axis: closed form
    assert metrics.frechet(x, y) == pytest.approx(float((x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2), rel=1e-5)
    for wrong in ((a, b[:, :5]), (a[:1], b), (a[0], b[0])):
        with pytest.raises(ValueError, match="frechet needs"):
            metrics.frechet(*wrong)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite features"):
            metrics.frechet(a, torch.full_like(a, bad))


def test_ssim_is_faster_than_scikit_image(record_property):
    x = real("astronaut")
    y = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)

    def seconds(f):
        f(), (times := [])
        for _ in range(3):
            began = time.perf_counter()
            f()
            times.append(time.perf_counter() - began)
        return min(times)
    ratio = seconds(lambda: reference_ssim(x, y)) / seconds(lambda: metrics.ssim(x, y))
    print(f"SSIM of 512 × 512 colour: {ratio:.1f} times as fast as scikit-image")
    assert ratio > 1
