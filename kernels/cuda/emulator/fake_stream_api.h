// Modules, launches, streams, events and graphs of the driver API; a part of fake_driver.cpp.
#pragma once

namespace {

Result launch(const Function* f, const unsigned (&grid)[3], const unsigned (&block)[3], unsigned shared,
              void* handle, void** params, void** extra) {
    Stream* stream = stream_of(handle);
    if (stream == nullptr || functions.count(f) == 0) return kInvalidHandle;
    const void* record = nullptr;
    if (params != nullptr) {
        record = params[0];
    } else if (extra != nullptr) {  // CU_LAUNCH_PARAM_BUFFER_POINTER 1, _BUFFER_SIZE 2, _END 0
        for (int i = 0; extra[i] != nullptr; i += 2) {
            const auto key = reinterpret_cast<uintptr_t>(extra[i]);
            if (key == 1) record = extra[i + 1];
            if (key == 2 && *static_cast<size_t*>(extra[i + 1]) != f->record_bytes)
                return refuse(kInvalidValue, "kernel %s takes a record of %zu bytes, not %zu",
                              f->symbol.c_str(), f->record_bytes, *static_cast<size_t*>(extra[i + 1]));
        }
    }
    if (record == nullptr) return kInvalidValue;
    for (int i = 0; i < 3; ++i)
        if (grid[i] == 0 || grid[i] > static_cast<unsigned>(attribute(5 + i)))
            return refuse(kInvalidValue, "kernel %s: a grid of %u x %u x %u", f->symbol.c_str(), grid[0],
                          grid[1], grid[2]);
    if (block[0] != f->threads || block[1] != 1 || block[2] != 1)
        return refuse(kInvalidValue, "kernel %s is made for blocks of %u threads, not %u x %u x %u",
                      f->symbol.c_str(), f->threads, block[0], block[1], block[2]);
    if (shared > static_cast<unsigned>(f->shared_allowed))
        return refuse(kInvalidValue, "kernel %s may have %d bytes of shared memory, not %u",
                      f->symbol.c_str(), f->shared_allowed, shared);
    Op op{Kind::kKernel};
    op.function = f;
    op.symbol = f->symbol;
    std::copy(grid, grid + 3, op.grid);
    op.shared = shared;
    const auto* bytes = static_cast<const uint8_t*>(record);
    op.bytes.assign(bytes, bytes + f->record_bytes);
    return enqueue(*stream, std::move(op));
}

}  // namespace

API Result cuModuleLoadData(Module** out, const void* image) {
    ENTER("cuModuleLoadData", true);
    return load_module(image, out);
}
API Result cuModuleLoadDataEx(Module** out, const void* image, unsigned, int*, void**) {
    ENTER("cuModuleLoadDataEx", true);
    return load_module(image, out);
}
API Result cuModuleUnload(Module* module) {
    ENTER("cuModuleUnload", true);
    if (Result r = run_everything()) return r;
    return unload_module(module);
}
API Result cuModuleGetFunction(Function** out, Module* module, const char* symbol) {
    ENTER("cuModuleGetFunction", true);
    return find_function(module, symbol, out);
}
API Result cuFuncGetAttribute(int* value, int which, Function* function) {
    ENTER("cuFuncGetAttribute", true);
    if (functions.count(function) == 0) return kInvalidHandle;
    switch (which) {
        case 0:  // MAX_THREADS_PER_BLOCK
            *value = static_cast<int>(function->threads);
            break;
        case 4:  // NUM_REGS
            *value = 32;
            break;
        case 5:  // PTX_VERSION
        case 6:  // BINARY_VERSION
            *value = sm();
            break;
        case 8:  // MAX_DYNAMIC_SHARED_SIZE_BYTES
            *value = function->shared_allowed;
            break;
        default:
            *value = 0;
    }
    return kOk;
}
API Result cuFuncSetAttribute(Function* function, int which, int value) {
    ENTER("cuFuncSetAttribute", true);
    if (functions.count(function) == 0) return kInvalidHandle;
    if (which == 9) return kOk;  // PREFERRED_SHARED_MEMORY_CARVEOUT
    if (which != 8 || value < 0 || value > shared_limit()) return kInvalidValue;
    function->shared_allowed = value;
    return kOk;
}
API Result cuFuncSetCacheConfig(Function*, int) {
    ENTER("cuFuncSetCacheConfig", true);
    return kOk;
}
API Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function* function, int threads,
                                                       size_t shared) {
    ENTER("cuOccupancyMaxActiveBlocksPerMultiprocessor", true);
    if (functions.count(function) == 0) return kInvalidHandle;
    const int by_threads = attribute(39) / std::max(threads, 1);
    const int by_shared = shared == 0 ? 16 : attribute(81) / static_cast<int>(shared + 1024);
    *blocks = std::min({16, by_threads, by_shared});
    return kOk;
}
API Result cuLaunchKernel(Function* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                          unsigned bz, unsigned shared, void* stream, void** params, void** extra) {
    ENTER("cuLaunchKernel", true);
    return launch(f, {gx, gy, gz}, {bx, by, bz}, shared, stream, params, extra);
}
struct LaunchConfig {
    unsigned grid[3], block[3], shared;
    void* stream;
    void* attributes;
    unsigned attribute_count;
};
API Result cuLaunchKernelEx(const LaunchConfig* config, Function* f, void** params, void** extra) {
    ENTER("cuLaunchKernelEx", true);
    return launch(f, config->grid, config->block, config->shared, config->stream, params, extra);
}

// --- streams and events ---

API Result cuStreamCreate(Stream** out, unsigned flags) {
    ENTER("cuStreamCreate", true);
    *out = new Stream;
    (*out)->blocking = (flags & 1) == 0;
    streams.insert(*out);
    return kOk;
}
API Result cuStreamCreateWithPriority(Stream** out, unsigned flags, int) {
    return cuStreamCreate(out, flags);
}
API Result cuStreamDestroy_v2(void* handle) {
    ENTER("cuStreamDestroy", true);
    Stream* stream = stream_of(handle);
    if (stream == nullptr || stream == &legacy) return kInvalidHandle;
    const Result r = run_stream(*stream);
    forget_stream(stream);
    return r;
}
API Result cuStreamSynchronize(void* handle) {
    ENTER("cuStreamSynchronize", true);
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return kInvalidHandle;
    if (stream->capture != nullptr) return break_capture(*stream, kCaptureUnsupported);
    return synchronized(stream == &legacy ? run_blocking() : run_stream(*stream));
}
API Result cuStreamQuery(void* handle) {
    ENTER("cuStreamQuery", true);
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return kInvalidHandle;
    if (stream->capture != nullptr) return break_capture(*stream, kCaptureUnsupported);
    if (stream->queue.empty()) return kOk;
    const Result r = run_one(*stream);  // so that who asks again and again sees an end
    return r != kOk ? r : kNotReady;
}
API Result cuStreamWaitEvent(void* handle, void* event, unsigned) {
    ENTER("cuStreamWaitEvent", true);
    Stream* stream = stream_of(handle);
    const auto found = event_of(event);
    return stream == nullptr || found == nullptr ? kInvalidHandle : wait(*stream, found);
}
API Result cuStreamIsCapturing(void* handle, int* status) {
    ENTER("cuStreamIsCapturing", true);
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return kInvalidHandle;
    *status = stream->capture == nullptr ? 0 : stream->capture->broken ? 2 : 1;
    return kOk;
}
API Result cuThreadExchangeStreamCaptureMode(int* mode) {
    ENTER("cuThreadExchangeStreamCaptureMode", true);
    *mode = 0;
    return kOk;
}
API Result cuEventCreate(void** out, unsigned) {
    ENTER("cuEventCreate", true);
    auto made = std::make_shared<Event>();
    events[made.get()] = made;
    *out = made.get();
    return kOk;
}
API Result cuEventDestroy_v2(void* handle) {
    ENTER("cuEventDestroy", true);
    return events.erase(static_cast<Event*>(handle)) != 0 ? kOk : kInvalidHandle;
}
API Result cuEventRecord(void* handle, void* on) {
    ENTER("cuEventRecord", true);
    Stream* stream = stream_of(on);
    const auto event = event_of(handle);
    return stream == nullptr || event == nullptr ? kInvalidHandle : record(event, *stream);
}
API Result cuEventSynchronize(void* handle) {
    ENTER("cuEventSynchronize", true);
    const auto event = event_of(handle);
    if (event == nullptr) return kInvalidHandle;
    if (event->captured != nullptr) return 907;
    return synchronized(event->done < event->recorded && event->stream != nullptr ? run_stream(*event->stream)
                                                                                  : kOk);
}
API Result cuEventQuery(void* handle) {
    ENTER("cuEventQuery", true);
    const auto event = event_of(handle);
    if (event == nullptr) return kInvalidHandle;
    if (event->captured != nullptr) return 907;
    if (event->done >= event->recorded || event->stream == nullptr) return kOk;
    const Result r = run_one(*event->stream);
    return r != kOk ? r : kNotReady;
}
API Result cuEventElapsedTime(float* ms, void* first, void* last) {
    ENTER("cuEventElapsedTime", true);
    const auto a = event_of(first), b = event_of(last);
    if (a == nullptr || b == nullptr || a->recorded == 0 || b->recorded == 0) return kInvalidHandle;
    if (a->done < a->recorded || b->done < b->recorded) return kNotReady;
    *ms = std::chrono::duration<float, std::milli>(b->when - a->when).count();
    return kOk;
}
API Result cuEventElapsedTime_v2(float* ms, void* first, void* last) {
    return cuEventElapsedTime(ms, first, last);
}

// --- graphs ---

API Result cuStreamBeginCapture_v2(void* handle, int mode) {
    ENTER("cuStreamBeginCapture", true);
    Stream* stream = stream_of(handle);
    return stream == nullptr ? kInvalidHandle : begin_capture(*stream, mode);
}
API Result cuStreamEndCapture(void* handle, Graph** out) {
    ENTER("cuStreamEndCapture", true);
    Stream* stream = stream_of(handle);
    return stream == nullptr ? kInvalidHandle : end_capture(*stream, out);
}
API Result cuGraphCreate(Graph** out, unsigned) {
    ENTER("cuGraphCreate", true);
    graphs.insert(*out = new Graph);
    return kOk;
}
API Result cuGraphDestroy(Graph* graph) {
    ENTER("cuGraphDestroy", true);
    if (graphs.erase(graph) == 0) return kInvalidHandle;
    delete graph;
    return kOk;
}
API Result cuGraphGetNodes(Graph* graph, void** nodes, size_t* n) {
    ENTER("cuGraphGetNodes", true);
    if (graphs.count(graph) == 0) return kInvalidHandle;
    for (size_t i = 0; nodes != nullptr && i < *n && i < graph->ops.size(); ++i) nodes[i] = &graph->ops[i];
    *n = graph->ops.size();
    return kOk;
}
API Result cuGraphInstantiateWithFlags(Exec** out, Graph* graph, unsigned long long) {
    ENTER("cuGraphInstantiate", true);
    if (graphs.count(graph) == 0) return kInvalidHandle;
    execs.insert(*out = new Exec{std::make_shared<const Ops>(graph->ops)});
    return kOk;
}
API Result cuGraphExecUpdate(Exec* exec, Graph* graph, void** node, int* outcome) {
    ENTER("cuGraphExecUpdate", true);
    if (graphs.count(graph) == 0 || execs.count(exec) == 0) return kInvalidHandle;
    const bool done = update(*exec, *graph);
    if (node != nullptr) *node = nullptr;
    if (outcome != nullptr) *outcome = done ? 0 : 2;  // ERROR_TOPOLOGY_CHANGED
    return done ? kOk : kUpdateFailure;
}
struct UpdateInfo {
    int result;
    void* error_node;
    void* error_from_node;
};
API Result cuGraphExecUpdate_v2(Exec* exec, Graph* graph, UpdateInfo* info) {
    *info = {};
    return cuGraphExecUpdate(exec, graph, nullptr, &info->result);
}
API Result cuGraphUpload(Exec* exec, void*) {
    ENTER("cuGraphUpload", true);
    return execs.count(exec) != 0 ? kOk : kInvalidHandle;
}
API Result cuGraphLaunch(Exec* exec, void* handle) {
    ENTER("cuGraphLaunch", true);
    Stream* stream = stream_of(handle);
    if (stream == nullptr || execs.count(exec) == 0) return kInvalidHandle;
    Op op{Kind::kGraph};
    op.graph = exec->ops;
    return enqueue(*stream, std::move(op));
}
API Result cuGraphExecDestroy(Exec* exec) {
    ENTER("cuGraphExecDestroy", true);
    if (execs.erase(exec) == 0) return kInvalidHandle;
    delete exec;
    return kOk;
}
