"""Where a model is computed: the processor, a graphics card, or "auto": one card or all, whatever the model takes.

A card calibrates in bfloat16: samples of a Fisher matrix are noisy by a few percent anyway, of which rounding adds a
fraction, without a bias. All that is measured by small differences stays float32, without the 10-bit products
(TF32) that cards have for it: divergences of good files, swaps. Tuning's steps have them where errors are larger.
"""

import re

import torch

from dynq.errors import DynqError

CPU, AUTO = "cpu", "auto"


def cards() -> list[str]:
    """The graphics cards of this machine."""
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def single(device: str) -> str:
    """A single device: the first card where that is left open, the processor where there is none."""
    return (cards() or [CPU])[0] if device == AUTO else device


def check_device(device: str) -> None:
    """DynqError where that is no device, or one that this machine has not."""
    if not re.fullmatch(r"cpu|auto|cuda(:\d+)?", device):
        raise DynqError(f"device {device!r}: there are cpu, cuda or cuda:0, cuda:1 and so on, and auto")
    try:
        torch.zeros(1, device=single(device)).item()
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).strip().splitlines()[0]
        raise DynqError(f"device {device!r} is not there: {reason}; take --device cpu") from error


def calibration_dtype(device: str) -> str:
    """What a model is held in to be calibrated, as `load_model` takes it."""
    place = torch.device(single(device))
    return "bfloat16" if place.type == "cuda" and has_bfloat16(place) else "float32"


def has_bfloat16(device: torch.device | str = CPU) -> bool:
    """Whether bfloat16 is multiplied as such; where it is emulated, it is no faster than float32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and bool(native)


def free(device: torch.device | str) -> int:
    """Bytes that tensors can still take on a card."""
    of_all, _ = torch.cuda.mem_get_info(device)
    return of_all + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
