"""PSNR, SSIM and the Fréchet distance against independent libraries, closed forms and their own laws."""
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import metrics

SQUARE = torch.zeros(1, 1, 16, 16)


def image(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 999), h=st.integers(11, 40), w=st.integers(11, 40), c=st.sampled_from([1, 3]),
       flat=st.sampled_from([0.0, 0.9, 0.999]))
def test_psnr_and_ssim_agree_with_scikit_image_on_random_and_nearly_flat_images(seed, h, w, c, flat):
    x, y = (flat + (1 - flat) * image(seed + k, 1, c, h, w) for k in (0, 1))
    a, b = (v[0].permute(1, 2, 0).double().numpy() for v in (x, y))
    similarity = structural_similarity(a, b, data_range=1.0, channel_axis=-1, gaussian_weights=True,
                                       sigma=1.5, use_sample_covariance=False)
    assert metrics.ssim(x, y).item() == pytest.approx(similarity, abs=1e-5)
    assert metrics.psnr(x, y).item() == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-5)


def test_known_values():
    """Equal images are infinitely alike, and rounding just outside the range is allowed."""
    assert metrics.psnr(SQUARE, SQUARE).item() == math.inf
    assert metrics.psnr(SQUARE - 0.0005, SQUARE + 1.0005).item() == pytest.approx(0, abs=0.01)
    assert metrics.ssim(SQUARE, SQUARE + 1).item() == pytest.approx(0.01 ** 2 / (1 + 0.01 ** 2), rel=1e-4)


@given(seed=st.integers(0, 99))
def test_the_peak_is_a_unit_and_a_batch_is_its_images(seed):
    x, y = image(seed, 3, 3, 20, 20), image(seed + 100, 3, 3, 20, 20)
    for measure in (metrics.psnr, metrics.ssim):
        assert torch.allclose(measure(x, y), measure(255 * x, 255 * y, peak=255), atol=1e-5)
        singles = torch.cat([measure(x[i:i + 1], y[i:i + 1]) for i in range(3)])
        assert torch.allclose(measure(x, y), singles, atol=1e-6)


@pytest.mark.parametrize("x, y, message", [
    (SQUARE, torch.zeros(1, 1, 16, 17), "differ in shape"), (SQUARE, SQUARE[0, 0], "float tensors"),
    (SQUARE.byte(), SQUARE.byte(), "float tensors"), (SQUARE[:0], SQUARE[:0], "not empty"),
    (SQUARE[..., :0], SQUARE[..., :0], "not empty"), (SQUARE, SQUARE + 1.002, "must lie in"),
    (SQUARE - 0.002, SQUARE, "must lie in"), (SQUARE, SQUARE * math.nan, "must lie in")])
def test_wrong_inputs_are_refused_in_a_sentence(x, y, message):
    for measure in (metrics.psnr, metrics.ssim):
        with pytest.raises(ValueError, match=message):
            measure(x, y)
    with pytest.raises(ValueError, match="sides of 11"):
        metrics.ssim(SQUARE[..., :10], SQUARE[..., :10])


@given(seed=st.integers(0, 999), d=st.integers(1, 12), shift=st.floats(0, 3))
def test_frechet_agrees_with_a_matrix_root_from_scipy(seed, d, shift):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(60, d, generator=g) @ torch.randn(d, d, generator=g)
    b = torch.randn(80, d, generator=g) + shift
    cov_a, cov_b = (np.atleast_2d(np.cov(v.double().numpy().T)) for v in (a, b))
    mean_gap = (a.double().mean(0) - b.double().mean(0)).square().sum().item()
    expected = mean_gap + np.trace(cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b).real)
    assert metrics.frechet(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_noise_level_is_that_of_white_noise_and_edges_are_rare():
    noise = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    steps = (torch.arange(128) // 32 / 4).expand(2, 3, 128, 128) + 0.2 * torch.linspace(0, 1, 128)[:, None]
    for sigma in (0.02, 0.1):
        assert metrics.noise_level(steps + sigma * noise) == pytest.approx(sigma, rel=0.02)
    assert metrics.noise_level(steps) < 1e-6
