// 2:4 products for many tokens on sm_90a. The contract is in sparse_gemm.h.
//
// y^T [outputs,tokens] = W x^T by CUTLASS 3's collective for wgmma.sp: TMA, a warp-specialised pipeline, tiles of 128 x
// 128 outputs and 128 inputs. Bound by the tensor cores: 2 tokens inputs outputs operations, of which half are skipped.
// CUTLASS's layout of the values is the canonical one. That of the metadata, a function of the kernel, is made at each
// call by `lay_out`, inputs outputs / 8 bytes read and written: 11 MB, 3.4 us at 3.35 TB/s, for 4096 x 11008.
//
// Registers and shared memory are CUTLASS's. Outside the emulator, which has neither TMA nor wgmma.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "sparse_gemm.h"

namespace pyprune {
namespace {

using namespace cute;

template <typename Element>
struct SparseProduct {
  static constexpr int kAlignment = 128 / cutlass::sizeof_bits<Element>::value;
  using Tile = Shape<_128, _128, _128>;
  using Cluster = Shape<_1, _2, _1>;
  using Problem = Shape<int, int, int, int>;
  using RowMajor = cutlass::layout::RowMajor;
  using ColumnMajor = cutlass::layout::ColumnMajor;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, ColumnMajor, kAlignment, Element,
      ColumnMajor, kAlignment, cutlass::epilogue::collective::EpilogueScheduleAuto>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, RowMajor, 2 * kAlignment, Element,
      ColumnMajor, kAlignment, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::collective::KernelScheduleAuto>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Problem, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using Config = typename Mainloop::SparseConfig;

  Problem problem;

  explicit SparseProduct(const SparseShape& s)
      : problem(static_cast<int>(s.outputs), static_cast<int>(s.tokens), static_cast<int>(s.inputs), 1) {}

  auto metadata_layout() const { return Config::fill_layoutE(problem); }
  int64_t metadata_bytes() const { return round_up(static_cast<int64_t>(cosize(metadata_layout())) / 8, 256); }

  typename Gemm::Arguments arguments(const void* x, const void* values, const void* metadata, void* y) const {
    typename Kernel::StrideB x_stride{};  // [tokens, inputs], batches apart; as is y^T [outputs, tokens].
    get<0>(x_stride) = get<2>(problem);
    typename Kernel::StrideD y_stride{};
    get<1>(y_stride) = get<0>(problem);
    using ElementA = typename Mainloop::ArrayElementA;
    return {cutlass::gemm::GemmUniversalMode::kGemm,
            problem,
            {reinterpret_cast<const ElementA*>(values), Config::fill_layoutA(problem), static_cast<const Element*>(x),
             x_stride, reinterpret_cast<const typename Mainloop::ElementE*>(metadata), metadata_layout()},
            {{1.0f, 0.0f}, nullptr, {}, static_cast<Element*>(y), y_stride}};
  }
};

constexpr int kThreads = 256;

// The canonical metadata [rows, row_bytes] where CUTLASS wants it: a byte of it is eight columns.
template <typename Layout>
__global__ void __launch_bounds__(kThreads)
    lay_out(const uint8_t* metadata, int row_bytes, Layout layout, uint8_t* out) {
  const int row = blockIdx.x;
  for (int byte = threadIdx.x; byte < row_bytes; byte += kThreads) {
    out[layout(row, byte * 8, 0) / 8] = metadata[int64_t{row} * row_bytes + byte];
  }
}

bool valid(const SparseShape& s) {
  return 0 < s.tokens && 0 < s.inputs && 0 < s.outputs && s.tokens <= INT32_MAX && s.inputs <= INT32_MAX &&
         s.outputs <= INT32_MAX && s.inputs % 16 == 0 && s.outputs % 8 == 0;
}

template <typename Body>
int with_element(const SparseShape& s, int dtype, Body body) {
  if (!valid(s)) return cudaErrorInvalidValue;
  if (dtype == kBFloat16) return body(SparseProduct<cutlass::bfloat16_t>(s));
  if (dtype == kFloat16) return body(SparseProduct<cutlass::half_t>(s));
  return cudaErrorInvalidValue;
}

}  // namespace

int nm_linear_cutlass_workspace(SparseShape s, int dtype, int64_t* bytes) {
  return with_element(s, dtype, [&](auto product) -> int {
    using Gemm = typename decltype(product)::Gemm;
    const auto arguments = product.arguments(nullptr, nullptr, nullptr, nullptr);
    *bytes = product.metadata_bytes() + static_cast<int64_t>(Gemm::get_workspace_size(arguments));
    return cudaSuccess;
  });
}

int nm_linear_cutlass(SparseShape s, int dtype, const void* x, const void* values, const uint8_t* metadata, void* y,
                      void* workspace, void* stream) {
  return with_element(s, dtype, [&](auto product) -> int {
    using Gemm = typename decltype(product)::Gemm;
    const auto queue = static_cast<cudaStream_t>(stream);
    auto* laid_out = static_cast<uint8_t*>(workspace);
    const int64_t bytes = product.metadata_bytes();
    cudaError_t error = cudaMemsetAsync(laid_out, 0, bytes, queue);  // What lies past the weight.
    if (error != cudaSuccess) return error;
    lay_out<<<static_cast<unsigned>(s.outputs), kThreads, 0, queue>>>(metadata, static_cast<int>(s.inputs / 8),
                                                                      product.metadata_layout(), laid_out);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    const auto arguments = product.arguments(x, values, laid_out, y);
    Gemm gemm;
    if (gemm.can_implement(arguments) != cutlass::Status::kSuccess ||
        gemm.initialize(arguments, laid_out + bytes, queue) != cutlass::Status::kSuccess) {
      return cudaErrorInvalidValue;
    }
    return gemm.run(queue) == cutlass::Status::kSuccess ? cudaSuccess : cudaErrorLaunchFailure;
  });
}

}  // namespace pyprune
