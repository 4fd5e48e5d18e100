// Streams, events, captures and graphs. What is queued runs as late as CUDA allows: when something waits for
// it. So host code that reads a result, or changes an input in pinned memory, without having waited is found
// out. Blocking streams and the legacy stream wait for each other; non-blocking ones wait for what they are
// told.
#pragma once

#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

#include "emulator/fake_memory.h"
#include "emulator/fake_module.h"

namespace fake {

struct Stream;
struct Op;
using Ops = std::vector<Op>;

struct Event {
    uint64_t recorded = 0, done = 0;  // counted
    std::chrono::steady_clock::time_point when;
    Stream* stream = nullptr;          // where it was recorded last
    struct Graph* captured = nullptr;  // by which capture, in place of a real record
};

enum class Kind { kKernel, kCopy, kFill, kRecord, kWait, kGraph };

struct Op {
    explicit Op(Kind k) : kind(k) {}
    Kind kind;
    const Function* function = nullptr;
    std::string symbol;
    unsigned grid[3] = {1, 1, 1};
    size_t shared = 0;
    std::vector<uint8_t> bytes;  // kernel: its record; copy from pageable memory: what was there
    uintptr_t to = 0, from = 0;  // copy; fill
    bool to_device = true, from_device = true;
    size_t n = 0;        // bytes of a copy; elements of a fill
    uint32_t value = 0;  // of a fill
    int width = 1;       // of its elements, bytes
    std::shared_ptr<Event> event;
    uint64_t ticket = 0;  // of a record, or of that which is waited for
    Stream* stream = nullptr;
    std::shared_ptr<const Ops> graph;
};

struct Graph {
    Ops ops;
};
struct Exec {
    std::shared_ptr<const Ops> ops;
};
struct Capture {
    Graph* graph;
    Stream* origin;
    std::thread::id thread;
    int mode;  // 0 global, 1 thread-local, 2 relaxed
    bool broken = false;
};
struct Stream {
    bool blocking = true;
    std::deque<Op> queue;
    std::shared_ptr<Capture> capture;
};

inline Stream legacy;
inline std::set<Stream*> streams;  // that were made, but not the legacy one
inline std::map<Event*, std::shared_ptr<Event>> events;
inline std::set<Graph*> graphs;
inline std::set<Exec*> execs;

// NULL for a handle that is none. 1 and 2 name the legacy stream and a thread's own, which is one here.
inline Stream* stream_of(void* handle) {
    if (reinterpret_cast<uintptr_t>(handle) <= 2) return &legacy;
    auto* stream = static_cast<Stream*>(handle);
    return streams.count(stream) != 0 ? stream : nullptr;
}
inline std::shared_ptr<Event> event_of(void* handle) {
    const auto found = events.find(static_cast<Event*>(handle));
    return found == events.end() ? nullptr : found->second;
}

Result run_stream(Stream& stream);

inline Result run_kernel(const Op& op) {
    if (functions.count(op.function) == 0)
        return raise_fault(kIllegalAddress, "kernel %s runs after its module was unloaded",
                           op.symbol.c_str());
    ++counts["kernels"];
    ++counts["kernel " + op.symbol];
    const char* wrong = op.function->run(op.grid[0], op.grid[1], op.grid[2], op.shared, op.bytes.data());
    if (wrong != nullptr) return raise_fault(kLaunchFailed, "kernel %s: %s", op.symbol.c_str(), wrong);
    if (blocks.size() <= 64 && check_guards() != kOk) {
        fault += " (by kernel " + op.symbol + ")";
        return sticky;
    }
    return kOk;
}

inline Result run_copy(const Op& op) {
    if ((op.to_device && !within(op.to, op.n)) || (op.from_device && !within(op.from, op.n)))
        return raise_fault(kIllegalAddress, "a copy of %zu bytes runs where no allocation is, or is any more",
                           op.n);
    const void* from = op.bytes.empty() ? reinterpret_cast<const void*>(op.from) : op.bytes.data();
    if (!op.from_device && op.bytes.empty() && !is_pinned(from, op.n))
        return raise_fault(kIllegalAddress, "a copy of %zu bytes reads host memory that is no more pinned",
                           op.n);
    const std::string way = op.to_device ? (op.from_device ? "DtoD" : "HtoD") : "DtoH";
    ++counts[way];
    counts[way + " bytes"] += op.n;
    std::memmove(reinterpret_cast<void*>(op.to), from, op.n);
    return kOk;
}

inline Result run_fill(const Op& op) {
    if (!within(op.to, op.n * static_cast<size_t>(op.width)))
        return raise_fault(kIllegalAddress, "a fill of %zu bytes runs where no allocation is", op.n);
    ++counts["fills"];
    char* at = reinterpret_cast<char*>(op.to);
    for (size_t i = 0; i < op.n; ++i)
        std::memcpy(at + i * static_cast<size_t>(op.width), &op.value, static_cast<size_t>(op.width));
    return kOk;
}

inline Result run_op(const Op& op) {
    switch (op.kind) {
        case Kind::kKernel:
            return run_kernel(op);
        case Kind::kCopy:
            return run_copy(op);
        case Kind::kFill:
            return run_fill(op);
        case Kind::kRecord:
            op.event->done = std::max(op.event->done, op.ticket);
            op.event->when = std::chrono::steady_clock::now();
            return kOk;
        case Kind::kWait:
            return op.event->done >= op.ticket || op.stream == nullptr ? kOk : run_stream(*op.stream);
        case Kind::kGraph:
            for (const Op& one : *op.graph)
                if (Result r = run_op(one)) return r;
            return kOk;
    }
    return kOk;
}

// One operation; what waits behind a fault never runs.
inline Result run_one(Stream& stream) {
    const Access access;
    const Op op = std::move(stream.queue.front());
    stream.queue.pop_front();
    const Result r = sticky != kOk ? sticky : run_op(op);
    if (r != kOk) stream.queue.clear();
    return r;
}
inline Result run_stream(Stream& stream) {
    if (stream.queue.empty()) return kOk;
    const Access access;
    while (!stream.queue.empty())
        if (Result r = run_one(stream)) return r;
    return kOk;
}
inline Result run_blocking() {
    for (Stream* stream : streams)
        if (stream->blocking)
            if (Result r = run_stream(*stream)) return r;
    return run_stream(legacy);
}
inline Result run_everything() {
    for (Stream* stream : streams)
        if (Result r = run_stream(*stream)) return r;
    return run_stream(legacy);
}

// --- capture ---

inline Result break_capture(Stream& stream, Result code) {
    stream.capture->broken = true;
    return code;
}

// Error of a call that may not be made while a capture is under way (mode 0: of any thread; 1: of this one).
inline Result unsafe_now() {
    for (Stream* stream : streams) {
        if (stream->capture == nullptr || stream->capture->mode == 2) continue;
        if (stream->capture->mode == 1 && stream->capture->thread != std::this_thread::get_id()) continue;
        return break_capture(*stream, kCaptureUnsupported);
    }
    return kOk;
}

inline Result enqueue(Stream& stream, Op op) {
    if (stream.capture != nullptr) {
        if (stream.capture->broken) return kCaptureInvalidated;
        stream.capture->graph->ops.push_back(std::move(op));
        return kOk;
    }
    if (&stream == &legacy) {
        for (Stream* other : streams)
            if (other->capture != nullptr && other->blocking) return break_capture(*other, kCaptureImplicit);
        for (Stream* other : streams)
            if (other->blocking)
                if (Result r = run_stream(*other)) return r;
    } else if (stream.blocking) {
        if (Result r = run_stream(legacy)) return r;
    }
    stream.queue.push_back(std::move(op));
    return number("EDGE_FAKE_EAGER", 0) != 0 ? run_stream(stream) : kOk;
}

inline Result begin_capture(Stream& stream, int mode) {
    if (&stream == &legacy) return kCaptureImplicit;
    if (stream.capture != nullptr || mode < 0 || mode > 2) return kInvalidValue;
    auto* graph = new Graph;
    graphs.insert(graph);
    stream.capture.reset(new Capture{graph, &stream, std::this_thread::get_id(), mode});
    return kOk;
}

inline Result end_capture(Stream& stream, Graph** out) {
    *out = nullptr;
    if (stream.capture == nullptr) return kInvalidValue;
    const std::shared_ptr<Capture> capture = stream.capture;
    if (capture->origin != &stream) return kCaptureUnmatched;
    if (capture->mode != 2 && capture->thread != std::this_thread::get_id()) return 908;  // WRONG_THREAD
    for (Stream* other : streams)
        if (other->capture == capture) other->capture = nullptr;
    if (capture->broken) {
        graphs.erase(capture->graph);
        delete capture->graph;
        return kCaptureInvalidated;
    }
    *out = capture->graph;
    return kOk;
}

inline Result record(const std::shared_ptr<Event>& event, Stream& stream) {
    if (stream.capture != nullptr) {
        event->captured = stream.capture->graph;
        event->stream = &stream;
        return stream.capture->broken ? kCaptureInvalidated : kOk;
    }
    event->captured = nullptr;
    event->stream = &stream;
    Op op{Kind::kRecord};
    op.event = event;
    op.ticket = ++event->recorded;
    return enqueue(stream, std::move(op));
}

inline Result wait(Stream& stream, const std::shared_ptr<Event>& event) {
    if (event->captured != nullptr) {  // the stream joins that capture
        if (event->stream == nullptr || event->stream->capture == nullptr) return 907;  // CAPTURED_EVENT
        if (stream.capture != nullptr && stream.capture != event->stream->capture) return 902;  // MERGE
        stream.capture = event->stream->capture;
        return kOk;
    }
    if (stream.capture != nullptr) return break_capture(stream, 905);  // ISOLATION
    if (event->recorded == 0) return kOk;
    Op op{Kind::kWait};
    op.event = event;
    op.ticket = event->recorded;
    op.stream = event->stream;
    return enqueue(stream, std::move(op));
}

// An exec takes over another graph of the same shape: as many operations, of the same kinds and kernels.
inline bool update(Exec& exec, const Graph& graph) {
    const Ops& old = *exec.ops;
    if (old.size() != graph.ops.size()) return false;
    for (size_t i = 0; i < old.size(); ++i)
        if (old[i].kind != graph.ops[i].kind || old[i].symbol != graph.ops[i].symbol) return false;
    exec.ops = std::make_shared<const Ops>(graph.ops);
    return true;
}

// Streams are gone; what still names them as the place of a record has run.
inline void forget_stream(Stream* stream) {
    streams.erase(stream);
    for (auto& [handle, event] : events)
        if (event->stream == stream) event->stream = nullptr;
    for (Stream* other : streams)
        for (Op& op : other->queue)
            if (op.stream == stream) op.stream = nullptr;
    for (Op& op : legacy.queue)
        if (op.stream == stream) op.stream = nullptr;
    delete stream;
}

}  // namespace fake
