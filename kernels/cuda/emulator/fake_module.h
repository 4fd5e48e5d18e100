// Module images: real cubins and PTX, checked as a driver checks them. What runs is the same source compiled
// for the emulator: EDGE_FAKE_MODULES/<FNV-1a 64 of the image, 16 hex digits>.so.
#pragma once

#include <dlfcn.h>

#include <memory>
#include <set>

#include "emulator/fake_device.h"

namespace fake {

struct Module;
struct Function {
    Module* module;
    std::string symbol;
    const char* (*run)(unsigned, unsigned, unsigned, size_t, const void*);
    size_t record_bytes;
    unsigned threads;
    int shared_allowed;
};
struct Module {
    void* library;
    std::map<std::string, std::unique_ptr<Function>> functions;
};

inline std::set<Module*> modules;
inline std::set<const Function*> functions;

inline uint64_t fnv1a(const uint8_t* data, size_t n) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < n; ++i) hash = (hash ^ data[i]) * 0x100000001b3u;
    return hash;
}

template <class T>
T read_at(const uint8_t* image, size_t offset) {
    T value;
    std::memcpy(&value, image + offset, sizeof value);
    return value;
}

// Jetson's and Thor's, which run only code for just themselves, and whose code runs on nothing else
inline bool is_tegra(int sm) { return sm == 72 || sm == 87 || sm == 101 || sm == 110; }

// Bytes of a cubin (ELF); 0 with the error in `wrong` if it cannot run on this device.
inline size_t cubin_bytes(const uint8_t* image, Result* wrong) {
    const auto machine = read_at<uint16_t>(image, 18);
    if (machine != 190) {
        *wrong = refuse(kInvalidImage, "an ELF file for machine %d is no cubin", machine);
        return 0;
    }
    const int abi = image[8];
    const auto flags = read_at<uint32_t>(image, 48);
    const int made_for = abi >= 8 ? flags >> 8 & 0xff : flags & 0xff, here = sm();
    const bool same = made_for == here;
    const bool near =
        made_for / 10 == here / 10 && made_for <= here && !is_tegra(made_for) && !is_tegra(here);
    if (!same && !near) {
        *wrong = refuse(kNoBinary, "a cubin for sm_%d does not run on sm_%d", made_for, here);
        return 0;
    }
    if (abi >= 8 && driver_version() < 13000) {
        *wrong = refuse(kInvalidImage, "a cubin made by CUDA 13 does not load in a driver for CUDA %d",
                        driver_version());
        return 0;
    }
    const size_t programs =
        read_at<uint64_t>(image, 32) + size_t{read_at<uint16_t>(image, 54)} * read_at<uint16_t>(image, 56);
    const size_t sections =
        read_at<uint64_t>(image, 40) + size_t{read_at<uint16_t>(image, 58)} * read_at<uint16_t>(image, 60);
    return programs > sections ? programs : sections;
}

// Newest CUDA that reads a PTX version no later: 8.5 came with 12.5 (12.6 has it too), 8.8 with 12.9.
inline int driver_of_ptx(int major, int minor) {
    if (major == 8) return 12000 + 10 * (minor <= 5 ? minor : minor + 1);
    return major < 8 ? 11000 : 1000 * (major + 4) + 10 * minor;
}

inline size_t ptx_bytes(const char* text, Result* wrong) {
    const char* version = std::strstr(text, ".version");
    const char* target = std::strstr(text, ".target");
    int major = 0, minor = 0, made_for = 0;
    if (version == nullptr || target == nullptr ||
        std::sscanf(version, ".version %d.%d", &major, &minor) != 2 ||
        std::sscanf(target, ".target sm_%d", &made_for) != 1) {
        *wrong = refuse(kInvalidImage, "the image is neither a cubin nor PTX");
        return 0;
    }
    if (driver_of_ptx(major, minor) > driver_version()) {
        *wrong = refuse(kUnsupportedPtx, "PTX %d.%d is newer than a driver for CUDA %d", major, minor,
                        driver_version());
        return 0;
    }
    if (made_for > sm()) {
        *wrong = refuse(kInvalidPtx, "PTX for sm_%d does not run on sm_%d", made_for, sm());
        return 0;
    }
    return std::strlen(text);
}

inline Result load_module(const void* image, Module** out) {
    const auto* bytes = static_cast<const uint8_t*>(image);
    Result wrong = kOk;
    const bool cubin = std::memcmp(bytes,
                                   "\x7f"
                                   "ELF",
                                   4) == 0;
    const size_t n = cubin ? cubin_bytes(bytes, &wrong) : ptx_bytes(static_cast<const char*>(image), &wrong);
    if (n == 0) return wrong;
    char name[32];
    std::snprintf(name, sizeof name, "%016llx.so", static_cast<unsigned long long>(fnv1a(bytes, n)));
    const std::string path = std::string(setting("EDGE_FAKE_MODULES", ".")) + "/" + name;
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
        return refuse(cubin ? kNoBinary : kInvalidPtx, "no emulated module of this image: %s", dlerror());
    *out = new Module{library, {}};
    modules.insert(*out);
    return kOk;
}

inline Result find_function(Module* module, const char* symbol, Function** out) {
    if (modules.count(module) == 0) return kInvalidHandle;
    std::unique_ptr<Function>& made = module->functions[symbol];
    if (made == nullptr) {
        const auto find = [&](const char* prefix) {
            return dlsym(module->library, (prefix + std::string(symbol)).c_str());
        };
        void* run = find("emu_");
        const auto* record = static_cast<const size_t*>(find("emu_size_"));
        const auto* threads = static_cast<const unsigned*>(find("emu_threads_"));
        if (run == nullptr || record == nullptr || threads == nullptr) {
            module->functions.erase(symbol);
            return kNotFound;
        }
        made.reset(new Function{module, symbol, reinterpret_cast<decltype(Function::run)>(run), *record,
                                *threads, kSharedDefault});
        functions.insert(made.get());
    }
    *out = made.get();
    return kOk;
}

// The library stays loaded: graphs may still name its kernels, and it is small.
inline Result unload_module(Module* module) {
    if (modules.erase(module) == 0) return kInvalidHandle;
    for (const auto& [symbol, function] : module->functions) functions.erase(function.get());
    delete module;
    return kOk;
}

}  // namespace fake
