"""HDR video (PQ and HLG, as phones record it) to the sRGB that pictures, detectors and networks are made for.

A signal of ITU-R BT.2100 is made linear light, in units of the 203 nits of diffuse white (ITU-R BT.2408), its primaries
of BT.2020 those of BT.709, and what is brighter than a knee is bent below 1. What is darker comes out as an SDR camera
would have it: BT.2408 puts SDR white at the same 203 nits.
"""

from __future__ import annotations

import functools

import cv2
import numpy as np

PQ, HLG = 16, 18  # FFmpeg's color_trc: SMPTE ST 2084 and ARIB STD-B67
DIFFUSE_WHITE = 203.0  # nits
HLG_PEAK, HLG_GAMMA = 1000.0, 1.2  # nits, and system gamma, of the display that HLG is graded on
KNEE = 0.8  # of diffuse white: what is darker stays as it is
_PEAK = 10.0  # of diffuse white: much less is 255 already
ROWS = 64  # converted at once: what lies between the steps stays in the processor's cache

_TO_709 = np.array(  # ITU-R BT.2087
    [
        [1.660491, -0.587641, -0.072850],
        [-0.124550, 1.132900, -0.008349],
        [-0.018151, -0.100579, 1.118730],
    ],
    np.float32,
)
_LUMINANCE = np.array([[0.2627, 0.6780, 0.0593]], np.float32)  # of BT.2020 primaries


def to_srgb(signal: np.ndarray, transfer: int) -> np.ndarray:
    """The picture that an SDR screen shows of an HDR signal.

    Args:
        signal: (H, W, 3) uint16 RGB of BT.2020 primaries, full range.
        transfer: PQ or HLG.

    Returns:
        (H, W, 3) uint8 sRGB. Grey stays grey; diffuse white is 247, and what is brighter lies above it.
    """
    picture = np.empty(signal.shape, np.uint8)
    to_linear, to_code = _linear_table(transfer), _code_table()
    for first in range(0, len(signal), ROWS):
        light = np.take(to_linear, signal[first : first + ROWS])
        if transfer == HLG:
            # The display's part, of the scene's luminance rather than of each channel, or hues would change.
            gain = cv2.pow(cv2.transform(light, _LUMINANCE), HLG_GAMMA - 1)
            light = cv2.multiply(light, cv2.merge([gain] * 3), scale=HLG_PEAK / DIFFUSE_WHITE)
        light = cv2.transform(light, _TO_709)
        np.clip(light, 0, _PEAK, out=light)  # what BT.709 has no colour for
        light *= 1 / _PEAK
        cv2.sqrt(light, light)  # as steps of equal size would be too coarse for the shadows
        light *= 65535
        picture[first : first + ROWS] = np.take(to_code, light.astype(np.uint16))
    return picture


def _shoulder(light: np.ndarray) -> np.ndarray:
    """Light in units of diffuse white, of which what is above KNEE nears 1 exponentially, without a kink."""
    room = 1 - KNEE
    return np.where(light < KNEE, light, 1 - room * np.exp(-np.maximum(light - KNEE, 0) / room))


@functools.cache
def _linear_table(transfer: int) -> np.ndarray:
    """(65536,) float32: of PQ a display's light in units of diffuse white, of HLG the scene's in [0, 1] (BT.2100)."""
    signal = np.arange(65536) / 65535
    if transfer == HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
        return scene.astype(np.float32)
    m1, m2, c1, c2, c3 = 1305 / 8192, 2523 / 32, 107 / 128, 2413 / 128, 2392 / 128
    power = signal ** (1 / m2)
    nits = 10_000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)
    return (nits / DIFFUSE_WHITE).astype(np.float32)


@functools.cache
def _code_table() -> np.ndarray:
    """(65536,) uint8 sRGB (IEC 61966-2-1) of the square root of light in [0, _PEAK]."""
    light = _shoulder((np.arange(65536) / 65535) ** 2 * _PEAK)
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(255 * srgb).astype(np.uint8)
