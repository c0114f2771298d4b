// The Python module of the host planner: buffers in, buffers out, no tensors.
#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "vlmo_kernels/host_plan.h"

namespace py = pybind11;

namespace {

// A contiguous view of signed 64-bit integers, for example array('q').
class Int64s {
 public:
  explicit Int64s(const py::buffer& buffer) : info_(buffer.request()) {
    const char kind = info_.format.empty() ? '?' : info_.format.back();
    if (info_.ndim != 1 || info_.itemsize != 8 || (kind != 'q' && kind != 'l') || info_.strides[0] != 8) {
      throw py::type_error("host_planner: buffers must be contiguous 64-bit integers, such as array('q')");
    }
  }
  const std::int64_t* data() const { return static_cast<const std::int64_t*>(info_.ptr); }
  std::int64_t size() const { return info_.size; }

 private:
  py::buffer_info info_;
};

// Memory for the tables of one plan. Freed memory is kept for the next: the kernel takes longer to hand out fresh pages
// than the planner to fill them. Called with the interpreter's lock held.
std::shared_ptr<std::int32_t> allocate(std::size_t size) {
  struct Memory {
    std::unique_ptr<std::int32_t[]> data;
    std::size_t size;
  };
  constexpr std::size_t most_blocks = 4, most_entries = std::size_t{1} << 24;  // at most 256 MiB
  static auto& kept = *new std::vector<Memory>();  // outlives whatever holds a table when the process ends
  Memory found{nullptr, size};
  for (auto memory = kept.begin(); memory != kept.end(); ++memory) {
    if (memory->size >= size && memory->size / 2 <= size) {
      found = std::move(*memory);
      kept.erase(memory);
      break;
    }
  }
  if (!found.data) found.data.reset(new std::int32_t[size]);
  const std::size_t whole = found.size;
  return {found.data.release(), [whole](std::int32_t* data) {
            Memory freed{std::unique_ptr<std::int32_t[]>(data), whole};
            if (whole > most_entries) return;
            if (kept.size() == most_blocks) kept.erase(kept.begin());
            kept.push_back(std::move(freed));
          }};
}

// One table, as a writable buffer of int32.
struct Table {
  std::shared_ptr<std::int32_t> memory;
  std::int32_t* data;
  std::int64_t size;
};

py::tuple plan(
    const py::buffer& modality, const py::buffer& length, const py::buffer& runs_of_sample, const py::buffer& starts) {
  const Int64s modalities(modality), lengths(length), of_sample(runs_of_sample), first(starts);
  if (modalities.size() != lengths.size()) {
    throw py::value_error("host_planner: every run must have a modality and a length, got " +
                          std::to_string(modalities.size()) + " and " + std::to_string(lengths.size()));
  }
  const vlmo_kernels::Runs runs{modalities.data(), lengths.data(), lengths.size(), of_sample.data(), of_sample.size()};
  const vlmo_kernels::HostPlan found(runs, first.data(), first.size());
  const std::int64_t sizes[] = {found.batch() + 1, found.tokens(),     found.tokens(),
                                found.tokens(),    found.groups() + 1, found.batch() * found.length()};
  constexpr std::int64_t line = 16;  // tables begin on a cache line of 64 bytes
  std::int64_t sum = line;
  for (const std::int64_t size : sizes) sum += (size + line - 1) / line * line;
  const std::shared_ptr<std::int32_t> memory = allocate(static_cast<std::size_t>(sum));
  std::int32_t* at = memory.get() + (64 - reinterpret_cast<std::uintptr_t>(memory.get()) % 64) % 64 / 4;
  std::vector<Table> tables;
  for (const std::int64_t size : sizes) {
    tables.push_back({memory, at, size});
    at += (size + line - 1) / line * line;
  }
  found.fill({tables[0].data, tables[1].data, tables[2].data, tables[3].data, tables[4].data, tables[5].data});
  return py::make_tuple(found.length(), tables[0], tables[1], tables[2], tables[3], tables[4], tables[5]);
}

}  // namespace

PYBIND11_MODULE(host_planner, m) {
  m.doc() = "The plan of a batch from lengths known on the host.";
  py::class_<Table>(m, "Table", py::buffer_protocol()).def_buffer([](Table& t) {
    return py::buffer_info(t.data, t.size);
  });
  m.def("plan", &plan, py::arg("modality"), py::arg("length"), py::arg("runs_of_sample"), py::arg("starts"),
        "Tables of a batch; arguments are contiguous buffers of 64-bit integers.\n\n"
        "Args:\n"
        "    modality, length: of every run, sample after sample.\n"
        "    runs_of_sample: how many of them each sample has.\n"
        "    starts: for every modality the position of its first run in each sample, -1 for none.\n\n"
        "Returns:\n"
        "    The padded length N, then writable buffers of int32: cu_seqlens [B + 1], rows [T], positions [T],\n"
        "    sample_of_row [T], group_offsets [2 * modalities + 1], row_of_token [B * N].\n\n"
        "Raises:\n"
        "    ValueError: negative or too large numbers, sizes that do not fit, positions that collide.\n"
        "    TypeError: another kind of buffer.");
}
