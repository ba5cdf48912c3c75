"""Random blob textures: strong contrast, grain of 1 to 4 m, tileable, all from a seed.

Blobs of 1 to 4 m survive a 64x64 camera and a small video VAE; grain below 0.5 m ruins what is learnt
(spec/training.md 8.6). Noise is filtered in the Fourier domain, hence periodic: a tile repeats without a seam.

Legend: N pixels a side of a tile; colours are RGB 0..255.
Source: spec/training.md 8.1, 8.6.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

Colour = tuple[int, int, int]


def blob_noise(rng: np.random.Generator, pixels: int, tile_m: float, grain_m: float) -> np.ndarray:
    """Periodic smooth noise whose blobs measure about `grain_m`: float64 [N, N], mean 0, standard deviation 1."""
    cycles_per_m = np.fft.fftfreq(pixels, d=tile_m / pixels)
    squared = cycles_per_m[:, None] ** 2 + cycles_per_m[None, : pixels // 2 + 1] ** 2
    spectrum = np.fft.rfft2(rng.standard_normal((pixels, pixels))) * np.exp(-0.5 * squared * (2.0 * grain_m) ** 2)
    spectrum[0, 0] = 0.0
    noise = np.fft.irfft2(spectrum, s=(pixels, pixels))
    return noise / noise.std()


def blob_texture(
    rng: np.random.Generator, palette: Sequence[Colour], *, pixels: int, tile_m: float, grains_m: Sequence[float]
) -> np.ndarray:
    """Blobs of the palette's first two colours, with patches of the others on top: float64 [N, N, 3], 0..255.

    Args:
        rng: source of the texture.
        palette: at least two colours.
        pixels, tile_m: side of the tile in pixels and in m.
        grains_m: blob sizes, coarse to fine; finer ones weigh less.
    """
    colours = np.array(palette, np.float64)
    field = np.zeros((pixels, pixels))
    for i, grain in enumerate(grains_m):
        field += 0.7**i * blob_noise(rng, pixels, tile_m, grain)
    texture = _blend(colours[0], colours[1], 3.5 * field / field.std())
    for colour in colours[2:]:
        patches = blob_noise(rng, pixels, tile_m, grains_m[0])
        texture = _blend(texture, colour, 8.0 * (patches - 1.0))
    shade = 1.0 + 0.10 * blob_noise(rng, pixels, tile_m, grains_m[-1])
    return np.clip(texture * shade[..., None], 0.0, 255.0)


def add_windows(texture: np.ndarray, rng: np.random.Generator, *, per_tile: int) -> np.ndarray:
    """Facade: a grid of `per_tile` x `per_tile` windows, each dark or lit: float64 [N, N, 3]."""
    pixels = texture.shape[0]
    cell = np.arange(pixels) * per_tile / pixels
    inside = ((cell % 1.0 > 0.26) & (cell % 1.0 < 0.74)).astype(np.float64)
    mask = inside[:, None] * inside[None, :]
    lit = rng.random((per_tile, per_tile)) < 0.3
    glass = np.where(lit[..., None], np.array([235.0, 220.0, 160.0]), np.array([38.0, 48.0, 66.0]))
    index = np.minimum(cell.astype(int), per_tile - 1)
    return texture + 0.85 * mask[..., None] * (glass[index][:, index] - texture)


def add_tiles(texture: np.ndarray, *, per_tile: int, contrast: float) -> np.ndarray:
    """Floor: a checker of `per_tile` fields a side, darkened by `contrast`: float64 [N, N, 3]."""
    cell = (np.arange(texture.shape[0]) * per_tile / texture.shape[0]).astype(int)
    dark = (cell[:, None] + cell[None, :]) % 2
    return texture * (1.0 - contrast * dark[..., None])


def encode_png(texture: np.ndarray) -> bytes:
    """PNG of a texture [N, N, 3] of 0..255, for MuJoCo's in-memory assets."""
    buffer = io.BytesIO()
    Image.fromarray(np.rint(texture).astype(np.uint8)).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _blend(low: np.ndarray, high: np.ndarray, logits: np.ndarray) -> np.ndarray:
    share = 1.0 / (1.0 + np.exp(-np.clip(logits, -30.0, 30.0)))
    return low + share[..., None] * (high - low)
