"""What CUDA's result codes mean: each becomes a typed error with its name and what was being done."""

from __future__ import annotations

from edge_runtime.errors import BackendUnavailable, BadEngineFile, DeviceMismatch, DoesNotFit, EdgeError

OUT_OF_MEMORY = 2
NOT_FOUND = 500
# The context takes no more calls after these (CUresult in cuda.h)
LOST = {
    4: "CUDA_ERROR_DEINITIALIZED",
    201: "CUDA_ERROR_INVALID_CONTEXT",
    214: "CUDA_ERROR_ECC_UNCORRECTABLE",
    220: "CUDA_ERROR_NVLINK_UNCORRECTABLE",
    226: "CUDA_ERROR_CONTAINED",
    700: "CUDA_ERROR_ILLEGAL_ADDRESS",
    702: "CUDA_ERROR_LAUNCH_TIMEOUT",
    709: "CUDA_ERROR_CONTEXT_IS_DESTROYED",
    710: "CUDA_ERROR_ASSERT",
    714: "CUDA_ERROR_HARDWARE_STACK_ERROR",
    715: "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    716: "CUDA_ERROR_MISALIGNED_ADDRESS",
    717: "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    718: "CUDA_ERROR_INVALID_PC",
    719: "CUDA_ERROR_LAUNCH_FAILED",
    721: "CUDA_ERROR_TENSOR_MEMORY_LEAK",
    999: "CUDA_ERROR_UNKNOWN",
}
# The driver cannot run this device code
_WRONG_CODE = {
    200: "CUDA_ERROR_INVALID_IMAGE",
    209: "CUDA_ERROR_NO_BINARY_FOR_GPU",
    218: "CUDA_ERROR_INVALID_PTX",
    221: "CUDA_ERROR_JIT_COMPILER_NOT_FOUND",
    222: "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
    223: "CUDA_ERROR_JIT_COMPILATION_DISABLED",
}
# There is no GPU to be had, by what a user can do about it
_NO_DEVICE = {
    3: "the driver is not started",
    34: "libcuda.so.1 is the toolkit's stub; remove it from LD_LIBRARY_PATH",
    46: "another process holds the GPU for itself; end it, or set its compute mode to default",
    100: "no GPU is visible; see nvidia-smi and CUDA_VISIBLE_DEVICES, in a container give it --gpus",
    101: "there is no GPU of that number; see nvidia-smi and CUDA_VISIBLE_DEVICES",
    802: "the driver is still starting (on NVSwitch machines it waits for the fabric manager)",
    803: "libcuda.so.1 and the kernel module are of different releases; restart after a driver update",
    804: "this GPU does not take the forward compatibility package; remove it from LD_LIBRARY_PATH",
}
_MORE = "the system log, dmesg, may say more: look for NVRM and Xid"
CLOSED = "this CUDA driver is closed"
PIP = (
    "pip install 'cuda-bindings==12.9.*' for a CUDA 12 driver, 'cuda-bindings>=13' for a newer one, "
    "or pip install pycuda"
)


def failure(
    code: int,
    name: str,
    doing: str,
    *,
    need: int = 0,
    have: int = 0,
    source: str = "",
    device: str = "",
    code_for: str = "",
) -> EdgeError:
    """The error for a nonzero result `code` called `name`.

    doing: what was asked of the driver ("allocating 4096 bytes"). need, have, source: bytes, for memory that
    ran out; need 0 where the driver did not say. device: name and capability of the GPU. code_for: what the
    device code was compiled for.
    """
    if code == OUT_OF_MEMORY:
        free = f" of {have} free ({source})" if source else ""
        return DoesNotFit(
            f"{name} while {doing}: the GPU has not the {f'{need} bytes' if need else 'memory'}{free}; close "
            "what else uses the GPU, or plan for fewer pages, tokens or a smaller context",
            need=need,
            have=have,
            source=source,
        )
    if code in _WRONG_CODE:
        made = f"device code for {code_for}" if code_for else "device code"
        return DeviceMismatch(
            f"{name} while {doing}: the engine's {made} does not run on {device or 'this GPU'}; build the "
            "engine for this machine (edge-build --profile auto), or update the GPU's driver"
        )
    if code in LOST:
        return BackendUnavailable(
            f"{name} while {doing}: the CUDA context is lost; close the engine and open it again, "
            f"in a new process if that fails too ({_MORE})"
        )
    if code in _NO_DEVICE:
        return BackendUnavailable(f"{name} while {doing}: {_NO_DEVICE[code]}")
    if code == NOT_FOUND:
        return BadEngineFile(
            f"{name} while {doing}: the engine's device code lacks it; build the engine again"
        )
    return BackendUnavailable(f"{name} while {doing} ({_MORE})")


def is_lost(code: int) -> bool:
    """Whether every later call in this context fails as well."""
    return code in LOST
