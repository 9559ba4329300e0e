"""The kernels of `fused.FusedView`, in Triton. Images are uint8 between operations, as in Pillow.

What makes them exact, and what a change must keep:

- no fused multiply-add: every launch passes enable_fp_fusion=False;
- `tl.div_rn` for float32: Triton's `/` is 2 ulp wide there (float64's is not);
- Pillow truncates where it blends, and rounds elsewhere;
- sums are of integers: the order of the atomic additions has no effect.

Grid: axis 1 is the sample, axis 0 its tiles. Branches on a record are the same for a whole program.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton compiles these functions: their arguments have no Python types.

import triton
import triton.language as tl

from dali_pipes.fused import RECORD

INTERPRETED = triton.knobs.runtime.interpret  # on the CPU, by NumPy, for tests


def _word(field: str) -> tl.constexpr:
    """Where a field stands in a sample's record."""
    assert RECORD.fields is not None
    return tl.constexpr(RECORD.fields[field][1] // 4)


_WORDS = tl.constexpr(RECORD.itemsize // 4)
_JITTER, _FIRST, _BEFORE_CONTRAST = _word("jitter"), _word("first"), _word("before_contrast")
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = (_word(name) for name in ("brightness", "contrast", "saturation", "hue"))
_GRAYSCALE, _FLIP, _SOLARIZE, _GRAY_SUM = (_word(name) for name in ("grayscale", "flip", "solarize", "gray_sum"))
_BLUR, _TAPS = _word("blur"), _word("tap_0")


@triton.jit
def gray_sum(crops, records, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Adds to each jittered sample's record the sum of the gray image that its contrast will see."""
    record = records + tl.program_id(1) * _WORDS
    if tl.load(record + _JITTER) != 0:
        r, g, b, _, _ = _pixels(crops, SIZE, TILE)
        # What lies outside the image is black, and stays black under all operations: it adds nothing.
        for place in range(0, tl.load(record + _BEFORE_CONTRAST)):
            r, g, b = _adjusted(r, g, b, place, record, tl.full((), 0, tl.int32))
        tl.atomic_add(record + _GRAY_SUM, tl.sum(_gray(r, g, b), 0))


@triton.jit
def colour(crops, unblurred, view, table, records, SIZE: tl.constexpr, NORMALISE: tl.constexpr, TILE: tl.constexpr):
    """Jitter, grayscale, flip: to `unblurred` for samples with blur; for the others finished, to `view`."""
    record = records + tl.program_id(1) * _WORDS
    r, g, b, i, inside = _pixels(crops, SIZE, TILE)
    if tl.load(record + _JITTER) != 0:
        count: tl.constexpr = SIZE * SIZE
        mean = (2 * tl.load(record + _GRAY_SUM) + count) // (2 * count)  # int(sum / count + 0.5)
        for place in range(0, 4):
            r, g, b = _adjusted(r, g, b, place, record, mean)
    if tl.load(record + _GRAYSCALE) != 0:
        gray = _gray(r, g, b)
        r, g, b = gray, gray, gray
    x = i % SIZE
    i = tl.where(tl.load(record + _FLIP) != 0, i + (SIZE - 1 - 2 * x), i)
    at = tl.program_id(1).to(tl.int64) * (3 * SIZE * SIZE) + 3 * i
    if tl.load(record + _BLUR) != 0:
        tl.store(unblurred + at, r.to(tl.uint8), inside)
        tl.store(unblurred + at + 1, g.to(tl.uint8), inside)
        tl.store(unblurred + at + 2, b.to(tl.uint8), inside)
    else:
        solarize = tl.load(record + _SOLARIZE)
        tl.store(view + at, _finished(r, 0, solarize, table, NORMALISE), inside)
        tl.store(view + at + 1, _finished(g, 1, solarize, table, NORMALISE), inside)
        tl.store(view + at + 2, _finished(b, 2, solarize, table, NORMALISE), inside)


@triton.jit
def blur(
    source,
    target,
    table,
    records,
    SIZE: tl.constexpr,
    ALONG_X: tl.constexpr,
    NORMALISE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Pillow's three box blurs along one axis in one sweep, of samples with blur; those along y are finished, too.

    A lane takes one channel of one row (or column), with the last five values of each pass in registers; each pass is
    two values behind the one before it. `source` may be `target`: a lane reads ahead of what it writes.
    """
    record = records + tl.program_id(1) * _WORDS
    if tl.load(record + _BLUR) != 0:
        solarize = tl.load(record + _SOLARIZE)
        w0 = tl.load(record + _TAPS).to(tl.uint32)
        w1 = tl.load(record + _TAPS + 1).to(tl.uint32)
        w2 = tl.load(record + _TAPS + 2).to(tl.uint32)
        line = tl.program_id(0) * TILE + tl.arange(0, TILE)
        inside = line < 3 * SIZE
        channel = line % 3
        step: tl.constexpr = 3 if ALONG_X else 3 * SIZE
        start = (line // 3) * (3 * SIZE) + channel if ALONG_X else line
        sample = tl.program_id(1).to(tl.int64) * (3 * SIZE * SIZE)
        z = tl.zeros((TILE,), tl.uint32)
        a, b, c = (z, z, z, z, z), (z, z, z, z, z), (z, z, z, z, z)
        # Four loads at once, before the stores that they would otherwise wait for.
        for t in range(0, SIZE + 6, 4):
            values = (
                _value(source + sample + start, t, step, inside, SIZE),
                _value(source + sample + start, t + 1, step, inside, SIZE),
                _value(source + sample + start, t + 2, step, inside, SIZE),
                _value(source + sample + start, t + 3, step, inside, SIZE),
            )
            for k in tl.static_range(4):
                a = _moved(a, values[k], t + k, SIZE)
                b = _moved(b, _weighted(a, w0, w1, w2), t + k - 2, SIZE)
                c = _moved(c, _weighted(b, w0, w1, w2), t + k - 4, SIZE)
                done = t + k - 6
                y = _weighted(c, w0, w1, w2).to(tl.int32)
                at = target + sample + start + done * step
                store = inside & (done >= 0) & (done < SIZE)
                if ALONG_X:
                    tl.store(at, y.to(tl.uint8), store)
                else:
                    tl.store(at, _finished(y, channel, solarize, table, NORMALISE), store)


@triton.jit
def _pixels(crops, SIZE: tl.constexpr, TILE: tl.constexpr):
    """R, G, B of this program's pixels, int32, black outside the image; their numbers, and which are inside."""
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = i < SIZE * SIZE
    at = crops + tl.program_id(1).to(tl.int64) * (3 * SIZE * SIZE) + 3 * i
    r = tl.load(at, inside, 0).to(tl.int32)
    g = tl.load(at + 1, inside, 0).to(tl.int32)
    b = tl.load(at + 2, inside, 0).to(tl.int32)
    return r, g, b, i, inside


@triton.jit
def _adjusted(r, g, b, place, record, mean):
    """The operation at that place of the sample's order: 0 brightness 1 contrast 2 saturation 3 hue 4 none."""
    operation = tl.load(record + _FIRST + place)
    if operation == 0:
        factor, black = _factor(record + _BRIGHTNESS), tl.zeros_like(r)
        r, g, b = _blend(black, r, factor), _blend(black, g, factor), _blend(black, b, factor)
    elif operation == 1:
        factor = _factor(record + _CONTRAST)
        r, g, b = _blend(mean, r, factor), _blend(mean, g, factor), _blend(mean, b, factor)
    elif operation == 2:
        factor = _factor(record + _SATURATION)
        gray = _gray(r, g, b)
        r, g, b = _blend(gray, r, factor), _blend(gray, g, factor), _blend(gray, b, factor)
    elif operation == 3:
        h, s = _hue_and_saturation(r, g, b)
        value = tl.maximum(r, tl.maximum(g, b))
        r, g, b = _from_hsv((h + tl.load(record + _HUE)) & 255, s, value)
    return r, g, b


@triton.jit
def _factor(field):
    return tl.load(field).to(tl.float32, bitcast=True)


@triton.jit
def _blend(a, b, factor):
    """Image.blend: one product and one sum, each rounded to float32; clipped; truncated."""
    mixed = a.to(tl.float32) + factor * (b - a).to(tl.float32)
    return tl.minimum(tl.maximum(mixed, 0.0), 255.0).to(tl.int32)


@triton.jit
def _gray(r, g, b):
    """Pillow's L."""
    return (r * 19595 + g * 38470 + b * 7471 + 32768) >> 16


@triton.jit
def _hue_and_saturation(r, g, b):
    """rgb2hsv of Pillow's Convert.c, as bytes: float32 where it has floats, float64 where C promotes them."""
    value = tl.maximum(r, tl.maximum(g, b))
    chroma = value - tl.minimum(r, tl.minimum(g, b))
    divisor = tl.maximum(chroma, 1).to(tl.float32)
    rc = tl.div_rn((value - r).to(tl.float32), divisor)
    gc = tl.div_rn((value - g).to(tl.float32), divisor)
    bc = tl.div_rn((value - b).to(tl.float32), divisor)
    if_green = (2.0 + rc.to(tl.float64) - bc.to(tl.float64)).to(tl.float32)
    if_blue = (4.0 + gc.to(tl.float64) - rc.to(tl.float64)).to(tl.float32)
    sixths = tl.where(r == value, bc - gc, tl.where(g == value, if_green, if_blue))
    turns = sixths.to(tl.float64) / 6.0 + 1.0
    turns = tl.where(turns >= 1.0, turns - 1.0, turns).to(tl.float32)  # fmod(turns, 1), which lie in [0, 2)
    share = tl.div_rn(chroma.to(tl.float32), tl.maximum(value, 1).to(tl.float32))
    hue = tl.where(chroma == 0, 0, (turns.to(tl.float64) * 255.0).to(tl.int32))
    return hue, (share.to(tl.float64) * 255.0).to(tl.int32)


@triton.jit
def _from_hsv(hue, saturation, value):
    """hsv2rgb of Pillow's Convert.c; likewise."""
    sector = hue * 6 // 255  # 0 to 6
    f = (hue.to(tl.float64) * 6.0 / 255.0 - sector.to(tl.float64)).to(tl.float32)
    s = tl.div_rn(saturation.to(tl.float32), 255.0)
    v = value.to(tl.float64)
    p = (v * (1.0 - s.to(tl.float64)) + 0.5).to(tl.int32)  # C's round(): never of a negative number
    q = (v * (1.0 - (s * f).to(tl.float64)) + 0.5).to(tl.int32)
    t = (v * (1.0 - s.to(tl.float64) * (1.0 - f.to(tl.float64))) + 0.5).to(tl.int32)
    k = tl.where(sector == 6, 0, sector)
    r = tl.where((k == 0) | (k == 5), value, tl.where(k == 1, q, tl.where(k == 4, t, p)))
    g = tl.where((k == 1) | (k == 2), value, tl.where(k == 3, q, tl.where(k == 0, t, p)))
    b = tl.where((k == 3) | (k == 4), value, tl.where(k == 5, q, tl.where(k == 2, t, p)))
    gray = saturation == 0
    return tl.where(gray, value, r), tl.where(gray, value, g), tl.where(gray, value, b)


@triton.jit
def _finished(value, channel, solarize, table, NORMALISE: tl.constexpr):
    """Solarized from that value on; looked up in the table of normalised values, or a byte."""
    value = tl.where(value >= solarize, 255 - value, value)
    if NORMALISE:
        return tl.load(table + channel * 256 + value)
    else:
        return value.to(tl.uint8)


@triton.jit
def _value(line, t, step: tl.constexpr, inside, SIZE: tl.constexpr):
    return tl.load(line + tl.minimum(t, SIZE - 1) * step, inside, 0).to(tl.uint32)


@triton.jit
def _moved(window, value, t, SIZE: tl.constexpr):
    """The window moved on to end at `t`; outside the line its first and last values are repeated."""
    value = tl.where(t > SIZE - 1, window[4], value)
    first = t <= 0
    return (
        tl.where(first, value, window[1]),
        tl.where(first, value, window[2]),
        tl.where(first, value, window[3]),
        tl.where(first, value, window[4]),
        value,
    )


@triton.jit
def _weighted(window, w0, w1, w2):
    """Pillow's fixed point: rounds once a pass."""
    total = window[2] * w0 + (window[1] + window[3]) * w1 + (window[0] + window[4]) * w2
    return (total + (1 << 23)) >> 24
