"""How far is one image from another, and one set of images from another? How noisy is a photo?

PSNR counts squared error, SSIM compares local structure, the Fréchet distance compares two sets of
features. Images are float tensors (B, C, H, W) in [0, peak]. PSNR and SSIM give every image in a batch its
own number and can be differentiated.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

# Wang et al. 2004: side and standard deviation, in pixels, of the Gaussian window
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
# … and two constants that keep the ratios finite where mean or contrast vanishes
SSIM_K1, SSIM_K2 = 0.01, 0.03


def psnr(x: Tensor, y: Tensor, peak: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio, 10 log₁₀(peak² / mean squared error), in dB.

    x, y: (B, C, H, W) in [0, peak] → (B,); ∞ where the images are equal. The mean runs over pixels and
    channels. Raises ValueError for inputs that are not two such tensors of one shape.
    """
    _check(x, y, peak)
    return 10 * torch.log10(peak ** 2 / (x - y).square().mean((1, 2, 3)))


def ssim(x: Tensor, y: Tensor, peak: float = 1.0) -> Tensor:
    """Structural similarity (Wang et al. 2004, Eq. 13): 1 for equal images, about 0 for unrelated ones.

    x, y: (B, C, H, W) in [0, peak] → (B,). Convention: only windows that lie wholly inside the image
    count, each channel is compared on its own, and the mean runs over windows and channels. Raises
    ValueError as `psnr` does, and for images smaller than the window.
    """
    _check(x, y, peak)
    if min(x.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs sides of {SSIM_WINDOW} pixels, got {tuple(x.shape)}: enlarge it")
    # E[x²] − E[x]² loses digits where the mean is large; a common offset does not change variances.
    offset = y.mean((2, 3), keepdim=True).detach()
    x, y = x - offset, y - offset
    mean_x, mean_y, xx, yy, xy = _blur(torch.stack([x, y, x * x, y * y, x * y])).unbind()
    var_x, var_y, cov = xx - mean_x ** 2, yy - mean_y ** 2, xy - mean_x * mean_y
    mean_x, mean_y = mean_x + offset, mean_y + offset
    c1, c2 = (SSIM_K1 * peak) ** 2, (SSIM_K2 * peak) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x ** 2 + mean_y ** 2 + c1)
    contrast_and_structure = (2 * cov + c2) / (var_x + var_y + c2)
    return (luminance * contrast_and_structure).mean((1, 2, 3))


def frechet(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Fréchet distance of Gaussians fitted to two sets of features (Heusel et al. 2017, Eq. 6).

    (n, d), (m, d) → |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½), not negative. Biased upwards, about in
    proportion to 1/n + 1/m: compare only sets of equal size, and print the distance of real from real beside
    it. Any rank is fine: with Σ = L Lᵀ the last trace is the sum of the singular values of L_aᵀ L_b, and no
    root of a non-symmetric matrix is taken. Raises ValueError for other shapes and for features that are not
    finite.
    """
    a, b = features_a.double(), features_b.double()
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError("frechet needs two sets (n, d) of at least 2 features of one length, "
                         f"got {tuple(a.shape)} and {tuple(b.shape)}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("frechet needs finite features, found NaN or infinity: "
                         "look at the pictures or the network behind them")
    mean_gap = (a.mean(0) - b.mean(0)).square().sum()
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    overlap = torch.linalg.svdvals(root_a.T @ root_b).sum()
    return float((mean_gap + root_a.square().sum() + root_b.square().sum() - 2 * overlap).clamp(min=0))


def noise_level(y: Tensor) -> float:
    """One σ for all photos y (B, C, H, W): median absolute diagonal difference / 0.6745 (Donoho & Johnstone
    1994). White noise gives these differences its own σ; 0.6745 is the median of |N(0, 1)|; edges are rare.
    """
    diagonal = (y[..., :-1, :-1] - y[..., 1:, :-1] - y[..., :-1, 1:] + y[..., 1:, 1:]) / 2
    return float(diagonal.abs().median() / 0.6745)


def entropy(index: Tensor, options: int) -> float:
    """How evenly index (n,) uses 0 … options − 1: the entropy of the frequencies, divided by log(options).

    1: all equally often; 0: only one occurs.
    """
    share = torch.bincount(index, minlength=options) / len(index)
    return float(-torch.special.xlogy(share, share).sum() / torch.tensor(float(options)).log())


def _covariance_root(features: Tensor) -> Tensor:
    """L with L Lᵀ = the (unbiased) covariance, (d, d)."""
    values, vectors = torch.linalg.eigh(torch.cov(features.T).reshape(features.shape[1], -1))
    return vectors * values.clamp(min=0).sqrt()


def _blur(x: Tensor) -> Tensor:
    """Gaussian-weighted local means over the last two axes, whole windows only."""
    offsets = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    weights = torch.exp(-offsets ** 2 / (2 * SSIM_SIGMA ** 2))
    weights = (weights / weights.sum()).expand(x[..., 0, 0].numel(), 1, 1, SSIM_WINDOW)
    # Every map is a channel of its own, so one grouped convolution does them all.
    flat = x.reshape(1, -1, *x.shape[-2:])
    flat = F.conv2d(flat, weights.transpose(2, 3), groups=flat.shape[1])
    flat = F.conv2d(flat, weights, groups=flat.shape[1])
    return flat.reshape(*x.shape[:-2], *flat.shape[-2:])


def _check(x: Tensor, y: Tensor, peak: float) -> None:
    for image in (x, y):
        fine = isinstance(image, Tensor) and image.is_floating_point() and image.dim() == 4
        if not fine or not image.numel():
            raise ValueError("images must be float tensors (B, C, H, W), not empty: "
                             "convert with .float() and add the missing axes")
        low, high = torch.aminmax(image.detach())
        # Written as "not inside", so that NaN fails as well.
        if not (low >= -1e-3 * peak and high <= peak * (1 + 1e-3)):
            raise ValueError(f"pixel values must lie in [0, {peak:g}], found {low:.4g} … {high:.4g}: "
                             "rescale or clamp them")
    if x.shape != y.shape:
        raise ValueError(f"images differ in shape, {tuple(x.shape)} and {tuple(y.shape)}: "
                         "crop or resize one of them")
