"""The photometric chain of a view as a few GPU kernels, bit for bit what Pillow and torchvision make of the crop.

DALI's operators have no exact hue and take a kernel for each arithmetic operation; here a view is four launches on the
crops that DALI leaves on the device::

    gray_sum   reads the crops: what contrast needs to know of the whole image
    colour     jitter in each sample's own order, grayscale, flip; and, of samples without blur, the finished view
    blur       along x, in place; then along y, to the finished view: only samples with blur

Solarizing, normalising and casting are part of whichever launch comes last for a sample. The flip comes before the
blur, not after it: the blur is symmetric and integer, so the two commute exactly. The kernels: `fused_kernels.py`.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dali_pipes.sampling import SampleParams
from dali_pipes.views import IMAGENET_MEAN, IMAGENET_STD, ViewSpec

OUTPUTS = ("uint8", "float16", "bfloat16", "float32")

# What the kernels know of a sample; 4 bytes a field, so that a kernel finds field k at word k.
RECORD = np.dtype(
    [(name, np.int32) for name in ("jitter", "first", "second", "third", "fourth", "before_contrast", "hue")]
    + [(name, np.float32) for name in ("brightness", "contrast", "saturation")]
    + [(name, np.int32) for name in ("grayscale", "flip", "solarize", "blur", "tap_0", "tap_1", "tap_2", "gray_sum")]
)
_PASSES = 3  # of Pillow's box, along each axis
_WHOLE = 1 << 24  # the weight 1 in Pillow's fixed point
_LARGEST = 2047  # side of a view: twice the sum of its gray values is an int32
_PIXELS, _LINES = 512, 128  # a program's share, four warps each; not yet tuned on a GPU


class FusedView:
    """Turns the crops of one view into the finished view, on the GPU.

    Args:
        spec: the view; its crop has been done, and its probabilities and strengths are in the parameters.
        output: "uint8": RGB; "float16", "bfloat16", "float32": bit for bit torchvision's `ToTensor` and `Normalize`
            with ImageNet's mean and deviation on the CPU, then rounded to that type.
        device: a CUDA device, with its index.

    Raises:
        ImportError: Triton is not installed.
        ValueError: an argument is out of range; a sigma of the spec needs more than the kernel's five taps.
    """

    def __init__(self, spec: ViewSpec, output: str, device: torch.device) -> None:
        if output not in OUTPUTS:
            raise ValueError(f"output {output!r} is none of {', '.join(OUTPUTS)}")
        check_spec(spec)
        self._spec, self._device, self._dtype = spec, device, getattr(torch, output)
        self._kernels = _kernels(device)
        self._table = _normalised(self._dtype).to(device)

    def __call__(
        self, crops: torch.Tensor, params: SampleParams, stream: torch.cuda.Stream | None = None
    ) -> torch.Tensor:
        """One view of N images; the host waits for nothing, but for the compiler at the first call.

        Args:
            crops: uint8 (N, size, size, 3), contiguous, on the device; not changed. They must be ready for work queued
                on the stream, and stay as they are until that work is done, as DALI's outputs do that are bound to it.
            params: of the N images.
            stream: where the work is queued (default: the current one). The current one is made to wait for it.

        Returns:
            (N, 3, size, size) with channels_last strides, of type `output`, ready for work on the current stream.

        Raises:
            ValueError: the crops are not as described.
        """
        self._check(crops, len(params))
        if self._device.type != "cuda":  # Triton's interpreter
            return self._launch(crops, params)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(stream or current):
            view = self._launch(crops, params)
        if stream is not None:
            current.wait_stream(stream)
            view.record_stream(current)
        return view

    def _check(self, crops: torch.Tensor, count: int) -> None:
        shape = (count, self._spec.size, self._spec.size, 3)
        if crops.dtype != torch.uint8 or crops.shape != shape or not crops.is_contiguous():
            raise ValueError(f"crops are {crops.dtype} {tuple(crops.shape)}; give contiguous uint8 of shape {shape}")
        if crops.device != self._device:
            raise ValueError(f"crops are on {crops.device}; give them on {self._device}")

    def _launch(self, crops: torch.Tensor, params: SampleParams) -> torch.Tensor:
        spec, kernels, table, count, size = self._spec, self._kernels, self._table, len(crops), self._spec.size
        records = _upload(pack(params, spec), self._device)
        view = torch.empty(crops.shape, dtype=self._dtype, device=self._device)
        normalise = self._dtype != torch.uint8
        unblurred = torch.empty_like(crops) if normalise and spec.blur > 0 else view
        tiles, lines = (-(-size * size // _PIXELS), count), (-(-3 * size // _LINES), count)
        # A fused multiply-add rounds once where Pillow rounds twice: at a factor of 4/3, 5 % of pairs differ.
        exact = {"enable_fp_fusion": False, "num_warps": 4}
        if spec.jitter > 0:
            kernels.gray_sum[tiles](crops, records, size, _PIXELS, **exact)
        kernels.colour[tiles](crops, unblurred, view, table, records, size, normalise, _PIXELS, **exact)
        if spec.blur > 0:
            kernels.blur[lines](unblurred, unblurred, table, records, size, True, False, _LINES, **exact)
            kernels.blur[lines](unblurred, view, table, records, size, False, normalise, _LINES, **exact)
        return view.permute(0, 3, 1, 2)


class FusedViews:
    """All views of a batch, on a CUDA stream of their own: they overlap with the next decoding and with training.

    The host waits for nothing: the stream waits for DALI, and the current stream for this one.

    Args:
        specs: of the views; see `FusedView`, also for the errors.
        output: likewise.
        device: likewise.
    """

    def __init__(self, specs: Sequence[ViewSpec], output: str, device: torch.device) -> None:
        self._views = [FusedView(spec, output, device) for spec in specs]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._in_use: deque[tuple[torch.cuda.Event, Sequence[torch.Tensor]]] = deque()

    def __call__(self, crops: Sequence[torch.Tensor], drawn: Sequence[SampleParams]) -> tuple[torch.Tensor, ...]:
        """The views of these crops, which must be ready for work queued on `stream`; see `FusedView`."""
        views = zip(self._views, crops, drawn, strict=True)
        made = tuple(view(crop, params, self.stream) for view, crop, params in views)
        if self.stream is not None:
            # The crops are DALI's memory: it has them back when the kernels are known to be done.
            self._in_use.append((self.stream.record_event(), crops))
            while self._in_use and self._in_use[0][0].query():
                self._in_use.popleft()
        return made

    def release(self) -> None:
        """Wait until all kernels are done, and give DALI the last crops back."""
        try:
            if self.stream is not None:
                self.stream.synchronize()
        finally:
            self._in_use.clear()


def check_spec(spec: ViewSpec) -> None:
    """Whether the kernels can make such a view.

    Raises:
        ValueError: it is too large, or a sigma needs more than five taps.
    """
    if spec.size > _LARGEST:
        raise ValueError(f"view size {spec.size} is too large for the fused kernels; use at most {_LARGEST}")
    if spec.blur > 0:
        box_taps(np.array(spec.sigma))


def interpreted() -> bool:
    """Whether Triton, if there, runs kernels on the CPU in this process: TRITON_INTERPRET=1 was set at its import."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def pack(params: SampleParams, spec: ViewSpec) -> NDArray[np.void]:
    """(N,) of `RECORD`: the parameters as the kernels take them. The crop box is not in it.

    Raises:
        ValueError: a sigma needs more than five taps.
    """
    records = np.zeros(len(params), RECORD)
    records["jitter"], records["grayscale"], records["flip"] = params.jitter, params.grayscale, params.flip
    for place, name in enumerate(("first", "second", "third", "fourth")):
        # 4 is nothing: ColorJitter, too, leaves a hue of strength 0 out, whose way through HSV changes colours.
        records[name] = np.where((params.order[:, place] == 3) & (spec.hue == 0), 4, params.order[:, place])
    records["before_contrast"] = (params.order == 1).argmax(1)
    records["brightness"], records["contrast"] = params.brightness, params.contrast
    records["saturation"] = params.saturation
    records["hue"] = np.trunc(params.hue * 255).astype(np.int32) & 255  # adjust_hue: int32, then wraps in an 8-bit hue
    records["solarize"] = np.where(params.solarize, spec.solarize_threshold, 256)
    records["blur"] = params.blur
    taps = box_taps(np.where(params.blur, params.sigma, 1.0))  # without blur any sigma will do
    records["tap_0"], records["tap_1"], records["tap_2"] = taps
    return records


def box_taps(sigma: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Weights at distance 0, 1 and 2 of the box that Pillow's GaussianBlur repeats, in 1 / 2^24: arrays of N.

    The formula is Gwosdek et al.'s (2011), each step in the precision that Pillow's BoxBlur.c has there.

    Raises:
        ValueError: a sigma's box reaches further.
    """
    single = np.float32
    variance = sigma.astype(single) * sigma.astype(single) / single(_PASSES)
    length = np.sqrt(12.0 * variance.astype(np.float64) + 1.0).astype(single)
    whole = np.floor((length.astype(np.float64) - 1.0) / 2.0).astype(single)
    end = (single(2) * whole + single(1)) * (whole * (whole + single(1)) - single(3) * variance)
    end /= single(6) * (variance - (whole + single(1)) * (whole + single(1)))
    radius = whole + end
    reach = radius.astype(np.int64)
    if (reach > 1).any():
        raise ValueError(f"sigma {sigma.max():g} is too wide for the fused blur; use below 2.44, or the DALI operators")
    inner = (single(_WHOLE) / (radius * single(2) + single(1))).astype(np.int64)
    outer = (_WHOLE - (2 * reach + 1) * inner) // 2
    return inner, np.where(reach == 1, inner, outer), np.where(reach == 1, outer, 0)


def _upload(records: NDArray[np.void], device: torch.device) -> torch.Tensor:
    """int32 (N, fields) on the device. Torch keeps the pinned memory until the copy is done."""
    words = records.view(np.int32).reshape(len(records), -1)
    host = torch.empty(words.shape, dtype=torch.int32, pin_memory=device.type == "cuda")
    host.numpy()[:] = words
    return host.to(device, non_blocking=True)


def _normalised(dtype: torch.dtype) -> torch.Tensor:
    """(3, 256): what each value of each channel becomes. From the CPU: torch on CUDA divides by multiplying."""
    values = torch.arange(256)
    if dtype == torch.uint8:
        return values.expand(3, 256).to(dtype).contiguous()
    mean, deviation = torch.tensor(IMAGENET_MEAN)[:, None], torch.tensor(IMAGENET_STD)[:, None]
    return ((values.to(torch.float32) / 255 - mean) / deviation).to(dtype)


def _kernels(device: torch.device) -> Any:
    try:
        from dali_pipes import fused_kernels
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ImportError(
            "the fused augmentation needs triton, which comes with torch's CUDA builds; use the DALI operators"
        ) from None
    if device.type != "cuda" and not fused_kernels.INTERPRETED:
        raise ValueError(f"device {device} runs no Triton kernels; use cuda, or the DALI operators")
    return fused_kernels
