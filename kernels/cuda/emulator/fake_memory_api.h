// Memory and copies of the driver API; a part of fake_driver.cpp.
#pragma once

namespace {

Result copy_now(Op op) {
    if (Result r = unsafe_now()) return r;
    if (Result r = run_blocking()) return r;
    if (op.from_device ? !within(op.from, op.n) : op.from == 0) return kInvalidValue;
    if (op.to_device ? !within(op.to, op.n) : op.to == 0) return kInvalidValue;
    if (!op.from_device)
        op.bytes.assign(reinterpret_cast<uint8_t*>(op.from), reinterpret_cast<uint8_t*>(op.from) + op.n);
    const Access access;
    return op.n == 0 ? kOk : synchronized(run_op(op));
}

Result copy_later(Op op, void* handle) {
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return kInvalidHandle;
    if (op.n == 0) return kOk;
    if ((op.from_device && !within(op.from, op.n)) || (op.to_device && !within(op.to, op.n)))
        return kInvalidValue;
    const bool host = !op.from_device || !op.to_device;
    const void* memory = reinterpret_cast<const void*>(op.from_device ? op.to : op.from);
    if (!host || is_pinned(memory, op.n)) return enqueue(*stream, std::move(op));
    // Pageable memory: read before the call returns; written only once all before it has run
    if (stream->capture != nullptr) return break_capture(*stream, kCaptureUnsupported);
    if (!op.from_device) {
        const auto* from = static_cast<const uint8_t*>(memory);
        op.bytes.assign(from, from + op.n);
        return enqueue(*stream, std::move(op));
    }
    if (Result r = enqueue(*stream, std::move(op))) return r;
    return synchronized(run_stream(*stream));
}

Op copy_of(Address to, bool to_device, Address from, bool from_device, size_t n) {
    Op op{Kind::kCopy};
    op.to = to;
    op.from = from;
    op.to_device = to_device;
    op.from_device = from_device;
    op.n = n;
    return op;
}
Address address_of(const void* p) { return reinterpret_cast<Address>(p); }

Result fill(Address to, uint32_t value, int width, size_t n, void* handle, bool now) {
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return kInvalidHandle;
    if (!within(to, n * static_cast<size_t>(width)) || to % static_cast<unsigned>(width) != 0)
        return kInvalidValue;
    Op op{Kind::kFill};
    op.to = to;
    op.value = value;
    op.width = width;
    op.n = n;
    if (now)
        if (Result r = unsafe_now()) return r;
    return enqueue(*stream, std::move(op));
}

}  // namespace

API Result cuMemGetInfo_v2(size_t* available, size_t* total) {
    ENTER("cuMemGetInfo", true);
    *total = memory_bytes();
    *available = *total > used_bytes ? *total - used_bytes : 0;
    return kOk;
}
API Result cuMemAlloc_v2(Address* out, size_t n) {
    ENTER("cuMemAlloc", true);
    if (Result r = unsafe_now()) return r;
    uintptr_t address = 0;
    const Result r = allocate(n, &address);
    *out = address;
    return r;
}
API Result cuMemFree_v2(Address address) {
    ENTER("cuMemFree", true);
    if (Result r = unsafe_now()) return r;
    if (address == 0) return kOk;
    if (Result r = run_everything()) return r;
    return release(address);
}
API Result cuMemHostAlloc(void** out, size_t n, unsigned) {
    ENTER("cuMemHostAlloc", true);
    if (Result r = unsafe_now()) return r;
    if (n == 0 || posix_memalign(out, 4096, n) != 0) return n == 0 ? kInvalidValue : kOutOfMemory;
    std::memset(*out, 0xE5, n);
    pinned[reinterpret_cast<uintptr_t>(*out)] = n;
    host_own[reinterpret_cast<uintptr_t>(*out)] = *out;
    return kOk;
}
API Result cuMemAllocHost_v2(void** out, size_t n) { return cuMemHostAlloc(out, n, 0); }
API Result cuMemFreeHost(void* memory) {
    ENTER("cuMemFreeHost", true);
    if (Result r = run_everything()) return r;
    if (host_own.erase(reinterpret_cast<uintptr_t>(memory)) == 0) return kInvalidValue;
    pinned.erase(reinterpret_cast<uintptr_t>(memory));
    std::free(memory);
    return kOk;
}
API Result cuMemHostRegister_v2(void* memory, size_t n, unsigned) {
    ENTER("cuMemHostRegister", true);
    const auto address = reinterpret_cast<uintptr_t>(memory);
    if (memory == nullptr || n == 0) return kInvalidValue;
    if (overlaps_pinned(address, n)) return kAlreadyRegistered;
    pinned[address] = n;
    return kOk;
}
API Result cuMemHostUnregister(void* memory) {
    ENTER("cuMemHostUnregister", true);
    if (Result r = run_everything()) return r;
    const auto address = reinterpret_cast<uintptr_t>(memory);
    if (host_own.count(address) != 0 || pinned.erase(address) == 0) return kNotRegistered;
    return kOk;
}
API Result cuMemHostGetDevicePointer_v2(Address* out, void* memory, unsigned) {
    ENTER("cuMemHostGetDevicePointer", true);
    if (!is_pinned(memory, 1)) return kInvalidValue;
    *out = address_of(memory);
    return kOk;
}
API Result cuMemcpyHtoD_v2(Address to, const void* from, size_t n) {
    ENTER("cuMemcpyHtoD", true);
    return copy_now(copy_of(to, true, address_of(from), false, n));
}
API Result cuMemcpyDtoH_v2(void* to, Address from, size_t n) {
    ENTER("cuMemcpyDtoH", true);
    return copy_now(copy_of(address_of(to), false, from, true, n));
}
API Result cuMemcpyDtoD_v2(Address to, Address from, size_t n) {
    ENTER("cuMemcpyDtoD", true);
    return copy_now(copy_of(to, true, from, true, n));
}
API Result cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t n, void* stream) {
    ENTER("cuMemcpyHtoDAsync", true);
    return copy_later(copy_of(to, true, address_of(from), false, n), stream);
}
API Result cuMemcpyDtoHAsync_v2(void* to, Address from, size_t n, void* stream) {
    ENTER("cuMemcpyDtoHAsync", true);
    return copy_later(copy_of(address_of(to), false, from, true, n), stream);
}
API Result cuMemcpyDtoDAsync_v2(Address to, Address from, size_t n, void* stream) {
    ENTER("cuMemcpyDtoDAsync", true);
    return copy_later(copy_of(to, true, from, true, n), stream);
}
API Result cuMemcpyAsync(Address to, Address from, size_t n, void* stream) {
    ENTER("cuMemcpyAsync", true);
    return copy_later(copy_of(to, within(to, 1), from, within(from, 1), n), stream);
}
API Result cuMemsetD8_v2(Address to, unsigned char value, size_t n) {
    ENTER("cuMemsetD8", true);
    return fill(to, value, 1, n, nullptr, true);
}
API Result cuMemsetD8Async(Address to, unsigned char value, size_t n, void* stream) {
    ENTER("cuMemsetD8Async", true);
    return fill(to, value, 1, n, stream, false);
}
API Result cuMemsetD32_v2(Address to, unsigned value, size_t n) {
    ENTER("cuMemsetD32", true);
    return fill(to, value, 4, n, nullptr, true);
}
API Result cuMemsetD32Async(Address to, unsigned value, size_t n, void* stream) {
    ENTER("cuMemsetD32Async", true);
    return fill(to, value, 4, n, stream, false);
}
API Result cuPointerGetAttribute(void* out, int which, Address address) {
    ENTER("cuPointerGetAttribute", true);
    const bool device = within(address, 1), host = is_pinned(reinterpret_cast<void*>(address), 1);
    if (which != 2 || (!device && !host)) return kInvalidValue;  // MEMORY_TYPE: host 1, device 2
    *static_cast<unsigned*>(out) = device ? 2 : 1;
    return kOk;
}
