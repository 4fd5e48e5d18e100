// How cuda-bindings finds the functions of fake_driver.cpp (which includes this at its end), and what tests
// ask of it.
#pragma once

namespace {

struct Symbol {
    const char* name;
    int since;  // the CUDA version that brought this form of it
    void* function;
};
#define FORM(name, since, function) {#name, since, reinterpret_cast<void*>(function)}
#define PLAIN(name) FORM(name, 2000, name)
const Symbol kSymbols[] = {
    PLAIN(cuInit),
    PLAIN(cuDriverGetVersion),
    PLAIN(cuGetErrorName),
    PLAIN(cuGetErrorString),
    PLAIN(cuDeviceGetCount),
    PLAIN(cuDeviceGet),
    PLAIN(cuDeviceGetName),
    FORM(cuDeviceGetUuid, 9020, cuDeviceGetUuid_v2),
    PLAIN(cuDeviceGetAttribute),
    PLAIN(cuDeviceComputeCapability),
    FORM(cuDeviceTotalMem, 3020, cuDeviceTotalMem_v2),
    PLAIN(cuDevicePrimaryCtxRetain),
    FORM(cuDevicePrimaryCtxRelease, 7000, cuDevicePrimaryCtxRelease_v2),
    FORM(cuDevicePrimaryCtxReset, 7000, cuDevicePrimaryCtxReset_v2),
    PLAIN(cuDevicePrimaryCtxGetState),
    FORM(cuCtxCreate, 3020, cuCtxCreate_v2),
    FORM(cuCtxCreate, 11040, cuCtxCreate_v3),
    FORM(cuCtxCreate, 12050, cuCtxCreate_v4),
    FORM(cuCtxDestroy, 4000, cuCtxDestroy_v2),
    FORM(cuCtxPushCurrent, 4000, cuCtxPushCurrent_v2),
    FORM(cuCtxPopCurrent, 4000, cuCtxPopCurrent_v2),
    PLAIN(cuCtxSetCurrent),
    PLAIN(cuCtxGetCurrent),
    PLAIN(cuCtxGetDevice),
    PLAIN(cuCtxGetApiVersion),
    PLAIN(cuCtxSynchronize),
    FORM(cuMemGetInfo, 3020, cuMemGetInfo_v2),
    FORM(cuMemAlloc, 3020, cuMemAlloc_v2),
    FORM(cuMemFree, 3020, cuMemFree_v2),
    PLAIN(cuMemHostAlloc),
    FORM(cuMemAllocHost, 3020, cuMemAllocHost_v2),
    PLAIN(cuMemFreeHost),
    FORM(cuMemHostRegister, 6050, cuMemHostRegister_v2),
    PLAIN(cuMemHostUnregister),
    FORM(cuMemHostGetDevicePointer, 3020, cuMemHostGetDevicePointer_v2),
    FORM(cuMemcpyHtoD, 3020, cuMemcpyHtoD_v2),
    FORM(cuMemcpyDtoH, 3020, cuMemcpyDtoH_v2),
    FORM(cuMemcpyDtoD, 3020, cuMemcpyDtoD_v2),
    FORM(cuMemcpyHtoDAsync, 3020, cuMemcpyHtoDAsync_v2),
    FORM(cuMemcpyDtoHAsync, 3020, cuMemcpyDtoHAsync_v2),
    FORM(cuMemcpyDtoDAsync, 3020, cuMemcpyDtoDAsync_v2),
    PLAIN(cuMemcpyAsync),
    FORM(cuMemsetD8, 3020, cuMemsetD8_v2),
    PLAIN(cuMemsetD8Async),
    FORM(cuMemsetD32, 3020, cuMemsetD32_v2),
    PLAIN(cuMemsetD32Async),
    PLAIN(cuPointerGetAttribute),
    PLAIN(cuModuleLoadData),
    PLAIN(cuModuleLoadDataEx),
    PLAIN(cuModuleUnload),
    PLAIN(cuModuleGetFunction),
    PLAIN(cuFuncGetAttribute),
    PLAIN(cuFuncSetAttribute),
    PLAIN(cuFuncSetCacheConfig),
    PLAIN(cuOccupancyMaxActiveBlocksPerMultiprocessor),
    PLAIN(cuLaunchKernel),
    FORM(cuLaunchKernelEx, 11060, cuLaunchKernelEx),
    PLAIN(cuStreamCreate),
    PLAIN(cuStreamCreateWithPriority),
    FORM(cuStreamDestroy, 4000, cuStreamDestroy_v2),
    PLAIN(cuStreamSynchronize),
    PLAIN(cuStreamQuery),
    PLAIN(cuStreamWaitEvent),
    FORM(cuStreamIsCapturing, 10000, cuStreamIsCapturing),
    FORM(cuThreadExchangeStreamCaptureMode, 10010, cuThreadExchangeStreamCaptureMode),
    PLAIN(cuEventCreate),
    FORM(cuEventDestroy, 4000, cuEventDestroy_v2),
    PLAIN(cuEventRecord),
    PLAIN(cuEventSynchronize),
    PLAIN(cuEventQuery),
    PLAIN(cuEventElapsedTime),
    FORM(cuEventElapsedTime, 12080, cuEventElapsedTime_v2),
    FORM(cuStreamBeginCapture, 10010, cuStreamBeginCapture_v2),
    FORM(cuStreamEndCapture, 10000, cuStreamEndCapture),
    FORM(cuGraphCreate, 10000, cuGraphCreate),
    FORM(cuGraphDestroy, 10000, cuGraphDestroy),
    FORM(cuGraphGetNodes, 10000, cuGraphGetNodes),
    FORM(cuGraphInstantiate, 12000, cuGraphInstantiateWithFlags),
    FORM(cuGraphInstantiateWithFlags, 11040, cuGraphInstantiateWithFlags),
    FORM(cuGraphExecUpdate, 10020, cuGraphExecUpdate),
    FORM(cuGraphExecUpdate, 12000, cuGraphExecUpdate_v2),
    FORM(cuGraphUpload, 11010, cuGraphUpload),
    FORM(cuGraphLaunch, 10000, cuGraphLaunch),
    FORM(cuGraphExecDestroy, 10000, cuGraphExecDestroy),
};
#undef PLAIN
#undef FORM

}  // namespace

// The newest form of a function that is no newer than the caller's CUDA and the driver. status: 0 found, 1
// unknown, 2 the driver is too old.
API Result cuGetProcAddress_v2(const char* name, void** out, int version, uint64_t, int* status) {
    const Symbol* best = nullptr;
    bool known = false;
    for (const Symbol& s : kSymbols) {
        if (std::strcmp(s.name, name) != 0) continue;
        known = true;
        if (s.since <= version && s.since <= driver_version() && (best == nullptr || s.since > best->since))
            best = &s;
    }
    const char* own = "cuGetProcAddress";
    *out = best != nullptr ? best->function : nullptr;
    if (std::strcmp(name, own) == 0) {
        *out = reinterpret_cast<void*>(cuGetProcAddress_v2);
        known = true;
    }
    if (status != nullptr) *status = *out != nullptr ? 0 : known ? 2 : 1;
    return *out != nullptr ? kOk : kNotFound;
}
API Result cuGetProcAddress(const char* name, void** out, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, out, version, flags, nullptr);
}

// NVRTC looks for a cache of the driver's in one of these tables, and takes it for granted that it may ask.
API Result cuGetExportTable(const void** table, const void*) {
    *table = nullptr;
    return kNotFound;
}

// Calls so far of an API function (without _v2), or of: "kernels" run, "kernel <symbol>", "syncs" (calls that
// wait), "HtoD", "DtoH", "DtoD", "fills" (run), "HtoD bytes" and so on, "leaked allocations" (at a context's
// end).
API uint64_t edge_fake_count(const char* name) {
    const std::lock_guard<std::recursive_mutex> held(lock);
    const auto found = counts.find(name);
    return found == counts.end() ? 0 : found->second;
}
// Guards of all allocations and the poison of freed ones: 0, or 700 with words in edge_fake_fault.
API Result edge_fake_check() {
    const std::lock_guard<std::recursive_mutex> held(lock);
    return check_memory();
}
// What fault the context has had, "" for none.
API const char* edge_fake_fault() {
    const std::lock_guard<std::recursive_mutex> held(lock);
    return fault.c_str();
}
// As EDGE_FAKE_FAIL, counted from now; "" plans none. False if the text is not name:n:code,...
API bool edge_fake_fail(const char* text) {
    const std::lock_guard<std::recursive_mutex> held(lock);
    return plan_failures(text);
}
API size_t edge_fake_used() {
    const std::lock_guard<std::recursive_mutex> held(lock);
    return used_bytes;
}
// As a process that has just begun: no contexts, counts or faults. Handles given out before are void.
API void edge_fake_reset() {
    const std::lock_guard<std::recursive_mutex> held(lock);
    sticky = kOk;
    end_context();
    sticky = kOk;
    fault.clear();
    counts.clear();
    failures.clear();
    for (Context* context : contexts) delete context;
    contexts.clear();
    current.clear();
    pinned.clear();
    for (const auto& [address, memory] : host_own) std::free(memory);
    host_own.clear();
    primary_users = 0;
    initialized = false;
}
