// A fake libcuda.so.1 on host memory, for tests of the real driver code on machines without a GPU:
// cuda-bindings (12.x and 13.x) and whatever else speaks the driver API loads it in place of NVIDIA's.
// Kernels run in the emulator. Settings: fake_device.h. What tests ask of it: the edge_fake_* functions at
// the end.
#include "emulator/fake_stream.h"

using namespace fake;

#define API extern "C" __attribute__((visibility("default")))
typedef unsigned long long Address;

namespace {

struct Context {
    int device;
    bool primary;
};
Context primary{0, true};
int primary_users = 0;
std::set<Context*> contexts;
thread_local std::vector<Context*> current;

Context* here() { return current.empty() ? nullptr : current.back(); }
bool alive(Context* c) { return c == &primary ? primary_users > 0 : contexts.count(c) != 0; }

// Counts the call, and gives what every call may give.
Result enter(const char* name, bool context) {
    if (Result r = count(name)) return r;
    if (!initialized) return kNotInitialized;
    if (context && (here() == nullptr || !alive(here()))) return kInvalidContext;
    return sticky;
}

// All that belongs to the context goes with it, a fault too.
void end_context() {
    run_everything();
    check_memory();
    counts["leaked allocations"] += blocks.size();
    release_all();
    const auto mine = streams;
    for (Stream* stream : mine) forget_stream(stream);
    legacy.queue.clear();
    events.clear();
    for (Graph* graph : graphs) delete graph;
    for (Exec* exec : execs) delete exec;
    graphs.clear();
    execs.clear();
    while (!modules.empty()) unload_module(*modules.begin());
    sticky = kOk;
}

Result synchronized(Result r) {
    ++counts["syncs"];
    return r != kOk ? r : check_guards();
}

}  // namespace

#define ENTER(name, context)                                \
    const std::lock_guard<std::recursive_mutex> held(lock); \
    if (Result r = enter(name, context)) return r

// --- start, device, context ---

API Result cuInit(unsigned) {
    const std::lock_guard<std::recursive_mutex> held(lock);
    if (Result r = count("cuInit")) return r;
    if (devices() < 1) return kNoDevice;
    initialized = true;
    return kOk;
}
API Result cuDriverGetVersion(int* version) {
    const std::lock_guard<std::recursive_mutex> held(lock);
    *version = driver_version();
    return count("cuDriverGetVersion");
}
API Result cuGetErrorName(Result code, const char** name) {
    for (const ErrorText& e : kErrors)
        if (e.code == code) return *name = e.name, kOk;
    return *name = nullptr, kInvalidValue;
}
API Result cuGetErrorString(Result code, const char** text) {
    for (const ErrorText& e : kErrors)
        if (e.code == code) return *text = e.text, kOk;
    return *text = nullptr, kInvalidValue;
}
API Result cuDeviceGetCount(int* n) {
    ENTER("cuDeviceGetCount", false);
    *n = devices();
    return kOk;
}
API Result cuDeviceGet(int* device, int ordinal) {
    ENTER("cuDeviceGet", false);
    *device = ordinal;
    return ordinal >= 0 && ordinal < devices() ? kOk : kInvalidDevice;
}
API Result cuDeviceGetName(char* name, int n, int) {
    ENTER("cuDeviceGetName", false);
    std::snprintf(name, static_cast<size_t>(n), "%s", setting("EDGE_FAKE_NAME", "Fake GPU"));
    return kOk;
}
API Result cuDeviceGetUuid_v2(char* uuid, int) {
    ENTER("cuDeviceGetUuid", false);
    std::memcpy(uuid, "edge-fake-device", 16);
    return kOk;
}
API Result cuDeviceGetAttribute(int* value, int which, int) {
    ENTER("cuDeviceGetAttribute", false);
    *value = attribute(which);
    return kOk;
}
API Result cuDeviceComputeCapability(int* major, int* minor, int) {
    ENTER("cuDeviceComputeCapability", false);
    *major = sm() / 10;
    *minor = sm() % 10;
    return kOk;
}
API Result cuDeviceTotalMem_v2(size_t* bytes, int) {
    ENTER("cuDeviceTotalMem", false);
    *bytes = memory_bytes();
    return kOk;
}
API Result cuDevicePrimaryCtxRetain(void** context, int device) {
    ENTER("cuDevicePrimaryCtxRetain", false);
    if (device < 0 || device >= devices()) return kInvalidDevice;
    ++primary_users;
    *context = &primary;
    return kOk;
}
API Result cuDevicePrimaryCtxRelease_v2(int) {
    const std::lock_guard<std::recursive_mutex> held(lock);
    if (Result r = count("cuDevicePrimaryCtxRelease")) return r;
    if (primary_users == 0) return kInvalidContext;
    if (--primary_users == 0) end_context();
    return kOk;
}
API Result cuDevicePrimaryCtxReset_v2(int) {
    const std::lock_guard<std::recursive_mutex> held(lock);
    if (Result r = count("cuDevicePrimaryCtxReset")) return r;
    end_context();
    return kOk;
}
API Result cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
    ENTER("cuDevicePrimaryCtxGetState", false);
    *flags = 0;
    *active = primary_users > 0;
    return kOk;
}
API Result cuCtxCreate_v2(void** context, unsigned, int device) {
    ENTER("cuCtxCreate", false);
    if (device < 0 || device >= devices()) return kInvalidDevice;
    auto* made = new Context{device, false};
    contexts.insert(made);
    current.push_back(made);
    *context = made;
    return kOk;
}
API Result cuCtxCreate_v3(void** context, void*, int, unsigned flags, int device) {
    return cuCtxCreate_v2(context, flags, device);
}
API Result cuCtxCreate_v4(void** context, void*, unsigned flags, int device) {
    return cuCtxCreate_v2(context, flags, device);
}
API Result cuCtxDestroy_v2(void* context) {
    const std::lock_guard<std::recursive_mutex> held(lock);
    if (Result r = count("cuCtxDestroy")) return r;
    auto* c = static_cast<Context*>(context);
    if (contexts.erase(c) == 0) return kInvalidContext;
    if (here() == c) current.pop_back();
    if (primary_users == 0 && contexts.empty()) end_context();
    delete c;
    return kOk;
}
// As pycuda ends a context; each has but one user here.
API Result cuCtxDetach(void* context) { return cuCtxDestroy_v2(context); }
API Result cuCtxPushCurrent_v2(void* context) {
    ENTER("cuCtxPushCurrent", false);
    if (!alive(static_cast<Context*>(context))) return kInvalidContext;
    current.push_back(static_cast<Context*>(context));
    return kOk;
}
API Result cuCtxPopCurrent_v2(void** context) {
    const std::lock_guard<std::recursive_mutex> held(lock);
    if (Result r = count("cuCtxPopCurrent")) return r;
    if (current.empty()) return kInvalidContext;
    if (context != nullptr) *context = current.back();
    current.pop_back();
    return kOk;
}
API Result cuCtxSetCurrent(void* context) {
    ENTER("cuCtxSetCurrent", false);
    if (!current.empty()) current.pop_back();
    if (context != nullptr) current.push_back(static_cast<Context*>(context));
    return kOk;
}
API Result cuCtxGetCurrent(void** context) {
    const std::lock_guard<std::recursive_mutex> held(lock);
    if (Result r = count("cuCtxGetCurrent")) return r;
    *context = here();
    return kOk;
}
API Result cuCtxGetDevice(int* device) {
    ENTER("cuCtxGetDevice", true);
    *device = here()->device;
    return kOk;
}
API Result cuCtxGetApiVersion(void*, unsigned* version) {
    ENTER("cuCtxGetApiVersion", false);
    *version = 3020;
    return kOk;
}
API Result cuCtxSynchronize() {
    ENTER("cuCtxSynchronize", true);
    if (Result r = unsafe_now()) return r;
    return synchronized(run_everything());
}

#include "emulator/fake_memory_api.h"
#include "emulator/fake_stream_api.h"
#include "emulator/fake_symbols.h"
