// The device that the fake driver plays, its errors, and the tests' hold on it: counts of calls, failures on
// demand.
//
// All settings are read from the environment when they are needed, so a test may change them as it goes:
//   EDGE_FAKE_DEVICES      how many GPUs there are; none by default, so a process that has loaded this
//   library for
//                          one test shows the next no GPU
//   EDGE_FAKE_CC           compute capability (8.7)
//   EDGE_FAKE_NAME         name ("Fake GPU")
//   EDGE_FAKE_DRIVER       newest CUDA that the driver runs (12060)
//   EDGE_FAKE_MEMORY       bytes of the device (1 GiB); EDGE_FAKE_LARGEST: of the largest block it will give
//   EDGE_FAKE_INTEGRATED   1: shares the host's memory
//   EDGE_FAKE_MODULES      folder of emulated modules (fake_module.h)
//   EDGE_FAKE_EAGER        1: streams run at once instead of at the latest moment (fake_stream.h)
//   EDGE_FAKE_PROTECT      1: the host cannot touch device memory but by the API
//   EDGE_FAKE_ABORT        1: a fault ends the process instead of failing every call after it
//   EDGE_FAKE_FAIL         "cuLaunchKernel:7:700,...": the 7th call from now on gives error 700
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

namespace fake {

using Result = int;

enum : Result {
    kOk = 0,
    kInvalidValue = 1,
    kOutOfMemory = 2,
    kNotInitialized = 3,
    kNoDevice = 100,
    kInvalidDevice = 101,
    kInvalidImage = 200,
    kInvalidContext = 201,
    kNoBinary = 209,
    kInvalidPtx = 218,
    kUnsupportedPtx = 222,
    kInvalidHandle = 400,
    kNotFound = 500,
    kNotReady = 600,
    kIllegalAddress = 700,
    kAlreadyRegistered = 712,
    kNotRegistered = 713,
    kLaunchFailed = 719,
    kNotSupported = 801,
    kCaptureUnsupported = 900,
    kCaptureInvalidated = 901,
    kCaptureUnmatched = 903,
    kCaptureImplicit = 906,
    kUpdateFailure = 910,
};

struct ErrorText {
    Result code;
    const char* name;
    const char* text;
};
constexpr ErrorText kErrors[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {4, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {218, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
     "the provided PTX was compiled with an unsupported toolchain."},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {702, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the memory is already mapped"},
    {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
     "pointer does not correspond to a registered memory region"},
    {716, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {903, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not initiated in this stream"},
    {906, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT", "operation would make the legacy stream depend on a capture"},
    {910, "CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE", "the graph update was not performed"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

inline std::recursive_mutex lock;
inline bool initialized = false;
inline Result sticky = kOk;  // a fault of the context: every later call fails with it
inline std::string fault;    // what it was, in words
inline std::map<std::string, uint64_t> counts;

inline const char* setting(const char* name, const char* otherwise) {
    const char* found = std::getenv(name);
    return found != nullptr && *found != 0 ? found : otherwise;
}
inline long long number(const char* name, long long otherwise) {
    const char* found = std::getenv(name);
    return found != nullptr && *found != 0 ? std::strtoll(found, nullptr, 0) : otherwise;
}

inline int devices() { return static_cast<int>(number("EDGE_FAKE_DEVICES", 0)); }
inline int driver_version() { return static_cast<int>(number("EDGE_FAKE_DRIVER", 12060)); }
inline size_t memory_bytes() { return static_cast<size_t>(number("EDGE_FAKE_MEMORY", 1ll << 30)); }
// 87 for "8.7"
inline int sm() {
    int major = 8, minor = 7;
    if (std::sscanf(setting("EDGE_FAKE_CC", "8.7"), "%d.%d", &major, &minor) != 2) minor = 0;
    return major * 10 + minor;
}

// Dynamic shared memory that a block may have if its kernel asks for it.
inline int shared_limit() {
    switch (sm()) {
        case 86:
        case 89:
        case 120:
        case 121:
            return 99 << 10;
        case 80:
        case 87:
            return 163 << 10;
        default:
            return sm() >= 90 ? 227 << 10 : 48 << 10;
    }
}
constexpr int kSharedDefault = 48 << 10;

// By CUdevice_attribute; what is not listed is 0.
inline int attribute(int which) {
    switch (which) {
        case 1:  // MAX_THREADS_PER_BLOCK
        case 2:  // MAX_BLOCK_DIM_X
        case 3:  // MAX_BLOCK_DIM_Y
            return 1024;
        case 4:  // MAX_BLOCK_DIM_Z
            return 64;
        case 5:  // MAX_GRID_DIM_X
            return 0x7fffffff;
        case 6:  // MAX_GRID_DIM_Y
        case 7:  // MAX_GRID_DIM_Z
            return 65535;
        case 8:  // MAX_SHARED_MEMORY_PER_BLOCK
            return kSharedDefault;
        case 10:  // WARP_SIZE
            return 32;
        case 12:  // MAX_REGISTERS_PER_BLOCK
        case 82:  // MAX_REGISTERS_PER_MULTIPROCESSOR
            return 65536;
        case 13:  // CLOCK_RATE, kHz
            return 1300000;
        case 16:  // MULTIPROCESSOR_COUNT
            return 16;
        case 18:  // INTEGRATED
            return static_cast<int>(number("EDGE_FAKE_INTEGRATED", 0));
        case 36:  // MEMORY_CLOCK_RATE, kHz
            return 3200000;
        case 37:  // GLOBAL_MEMORY_BUS_WIDTH, bits
            return 256;
        case 38:  // L2_CACHE_SIZE
            return 4 << 20;
        case 39:  // MAX_THREADS_PER_MULTIPROCESSOR
            return 1536;
        case 75:
            return sm() / 10;
        case 76:
            return sm() % 10;
        case 81:  // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
            return shared_limit() + 1024;
        case 97:  // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
            return shared_limit();
        case 15:   // GPU_OVERLAP
        case 19:   // CAN_MAP_HOST_MEMORY
        case 31:   // CONCURRENT_KERNELS
        case 40:   // ASYNC_ENGINE_COUNT
        case 41:   // UNIFIED_ADDRESSING
        case 78:   // STREAM_PRIORITIES_SUPPORTED
        case 91:   // CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
        case 99:   // HOST_REGISTER_SUPPORTED
        case 106:  // MAX_BLOCKS_PER_MULTIPROCESSOR
            return which == 106 ? 16 : 1;
        default:
            return 0;
    }
}

// A fault on the device: its code is the answer from now on, until the context ends.
__attribute__((format(printf, 2, 3))) inline Result raise_fault(Result code, const char* format, ...) {
    char text[1500];
    va_list list;
    va_start(list, format);
    std::vsnprintf(text, sizeof text, format, list);
    va_end(list);
    std::fprintf(stderr, "fake driver: %s\n", text);
    if (number("EDGE_FAKE_ABORT", 0) != 0) std::abort();
    if (sticky == kOk) {
        sticky = code;
        fault = text;
    }
    return code;
}
// Words for a refusal that has no other effect.
__attribute__((format(printf, 2, 3))) inline Result refuse(Result code, const char* format, ...) {
    va_list list;
    va_start(list, format);
    std::fprintf(stderr, "fake driver: ");
    std::vfprintf(stderr, format, list);
    std::fprintf(stderr, "\n");
    va_end(list);
    return code;
}

struct Failure {
    uint64_t at;  // count of calls at which it happens
    Result code;
};
inline std::multimap<std::string, Failure> failures;

inline bool plan_failures(const char* text) {
    failures.clear();
    for (const char* p = text; *p != 0;) {
        char name[128];
        unsigned long long nth = 0;
        int code = 0, used = 0;
        if (std::sscanf(p, "%127[^:,]:%llu:%d%n", name, &nth, &code, &used) != 3) return false;
        failures.insert({name, {counts[name] + nth, code}});
        p += used;
        if (*p == ',') ++p;
    }
    return true;
}

// Counts a call of an API function; the error planned for it, or none.
inline Result count(const char* name) {
    static bool read = false;
    if (!read) {
        read = true;
        if (!plan_failures(setting("EDGE_FAKE_FAIL", "")))
            refuse(kInvalidValue, "EDGE_FAKE_FAIL is not name:n:code");
    }
    const uint64_t now = ++counts[name];
    if (failures.empty()) return kOk;
    const auto range = failures.equal_range(name);
    for (auto it = range.first; it != range.second; ++it) {
        if (it->second.at != now) continue;
        const Result code = it->second.code;
        failures.erase(it);
        const bool lasts =
            code == 214 || (code >= 700 && code <= 719 && code != 701 && code != 712 && code != 713);
        return lasts ? raise_fault(code, "%s fails with %d, as asked for", name, code) : code;
    }
    return kOk;
}

}  // namespace fake
