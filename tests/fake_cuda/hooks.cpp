// Autograd asks the CUDA hooks whether a device has a context before it runs a node there; without a driver torch's own
// answer is an error. Preloaded, this answer takes its place: no context, nothing to set. For fake tensors only.
#include <ATen/detail/CUDAHooksInterface.h>

namespace {
struct NoDriver final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return false; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
};
}  // namespace

namespace at::detail {
__attribute__((visibility("default"))) const CUDAHooksInterface& getCUDAHooks() {
  static const NoDriver hooks;
  return hooks;
}
}  // namespace at::detail
