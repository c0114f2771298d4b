// Which instruction set the kernels of the CPU use.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vlmo_kernels {

// Ascending: a machine that has one has all before it.
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3, amx = 4 };

inline const char* name(Isa isa) {
  constexpr const char* names[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};
  return names[static_cast<int>(isa)];
}

// What the processor and the operating system offer.
inline Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) {
    return Isa::portable;
  }
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))) {
    return Isa::avx2;
  }
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
#if defined(__linux__)
  // Tile registers are large, so Linux gives them to a process that asks: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  const bool tiles = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
  if (tiles && syscall(SYS_arch_prctl, 0x1023, 18) == 0) return Isa::amx;
#endif
  return Isa::avx512bf16;
#else
  return Isa::portable;
#endif
}

// What the kernels use: what is there, or less where VLMO_KERNELS_ISA names less. Read at every call, so that one
// process can compare them.
inline Isa isa() {
  static const Isa there = detect_isa();
  const char* wanted = std::getenv("VLMO_KERNELS_ISA");
  for (int i = 0; wanted && i < static_cast<int>(there); ++i) {
    if (std::strcmp(wanted, name(static_cast<Isa>(i))) == 0) return static_cast<Isa>(i);
  }
  return there;
}

}  // namespace vlmo_kernels
