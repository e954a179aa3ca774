// The momentum update without Python: on the CPU, and where the library has CUDA kernels on a GPU too; both must agree.
// The pattern is the same for every op: fill an argument struct with views of your arrays, call, look at the Status. On a GPU
// the caller also gives a stream and a workspace; a call allocates nothing and does not wait.
// Exit status: 0 all well; 77 the CPU alone, as there is no CUDA device; 1 something failed.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <vector>

#include "dnc/momentum.h"
#if defined(DNC_WITH_CUDA)
#include <cuda_runtime.h>
#endif

namespace {

constexpr int64_t N = 4096, M = 60, D = 64;  // pixels, sub-centroids, channels
constexpr double kMomentum = 0.9;

// A contiguous array that somebody else owns, of host or device memory.
dnc::View view(const void* data, dnc::DType dtype, std::initializer_list<int64_t> size) {
  dnc::View v;
  v.data = const_cast<void*>(data), v.dtype = dtype;
  for (int64_t s : size) v.size[v.ndim++] = s;
  int64_t stride = 1;
  for (int i = v.ndim - 1; i >= 0; i--) v.stride[i] = stride, stride *= v.size[i];
  return v;
}

void check(const char* what, const dnc::Status& s) {
  if (s.ok()) return;
  std::printf("%s failed: %s\n", what, s.what);
  std::exit(EXIT_FAILURE);
}

std::vector<float> on_cpu(std::vector<float> centroids, const std::vector<float>& x, const std::vector<int64_t>& cluster) {
  std::vector<float> sums(M * D);
  std::vector<int64_t> counts(M);
  const dnc::View total = view(sums.data(), dnc::DType::float32, {M, D});
  const dnc::View count = view(counts.data(), dnc::DType::int64, {M});
  check("cluster_sums", dnc::cluster_sums({.x = view(x.data(), dnc::DType::float32, {N, D}),
                                           .cluster = view(cluster.data(), dnc::DType::int64, {N}),
                                           .sums = total,
                                           .counts = count,
                                           .threads = 2}));
  check("apply_momentum", dnc::apply_momentum({.centroids = view(centroids.data(), dnc::DType::float32, {M, D}),
                                               .sums = total,
                                               .counts = count,
                                               .momentum = kMomentum}));
  return centroids;
}

#if defined(DNC_WITH_CUDA)
void check(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("%s failed: %s\n", what, cudaGetErrorString(error));
  std::exit(EXIT_FAILURE);
}

// Device memory, freed with the object.
class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes) { check("cudaMalloc", cudaMalloc(&data_, std::max<size_t>(bytes, 1))); }
  ~DeviceMemory() { (void)cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  void* get() const { return data_; }

 private:
  void* data_ = nullptr;
};

std::vector<float> on_gpu(std::vector<float> centroids, const std::vector<float>& x, const std::vector<int64_t>& cluster) {
  const size_t centroid_bytes = centroids.size() * sizeof(float), x_bytes = x.size() * sizeof(float);
  const size_t cluster_bytes = cluster.size() * sizeof(int64_t);
  const DeviceMemory p(centroid_bytes), features(x_bytes), owner(cluster_bytes);
  cudaStream_t stream;
  check("cudaStreamCreate", cudaStreamCreate(&stream));
  check("copy of centroids", cudaMemcpyAsync(p.get(), centroids.data(), centroid_bytes, cudaMemcpyHostToDevice, stream));
  check("copy of x", cudaMemcpyAsync(features.get(), x.data(), x_bytes, cudaMemcpyHostToDevice, stream));
  check("copy of cluster", cudaMemcpyAsync(owner.get(), cluster.data(), cluster_bytes, cudaMemcpyHostToDevice, stream));

  const dnc::MomentumUpdate update{.centroids = view(p.get(), dnc::DType::float32, {M, D}),
                                   .x = view(features.get(), dnc::DType::float32, {N, D}),
                                   .cluster = view(owner.get(), dnc::DType::int64, {N}),
                                   .momentum = kMomentum};
  const size_t bytes = dnc::cuda::momentum_update_workspace(update);  // of shapes and dtypes alone: ask once, keep it
  const DeviceMemory workspace(bytes);
  check("momentum_update",
        dnc::cuda::momentum_update(update, {.workspace = workspace.get(), .bytes = bytes, .stream = stream}));

  check("copy back", cudaMemcpyAsync(centroids.data(), p.get(), centroid_bytes, cudaMemcpyDeviceToHost, stream));
  check("cudaStreamSynchronize", cudaStreamSynchronize(stream));  // before the memory is freed
  check("cudaStreamDestroy", cudaStreamDestroy(stream));
  return centroids;
}
#endif

}  // namespace

int main() {
  std::srand(1);
  std::vector<float> centroids(M * D), x(N * D);
  for (std::vector<float>* a : {&centroids, &x}) {
    for (float& f : *a) f = float(std::rand()) / float(RAND_MAX) - 0.5f;
  }
  std::vector<int64_t> cluster(N);
  for (int64_t n = 0; n < N; n++) cluster[n] = n % 7 == 0 ? -1 : n * 31 % M;  // -1: left out

  const std::vector<float> expected = on_cpu(centroids, x, cluster);
  double length = 0;
  for (int64_t d = 0; d < D; d++) length += double(expected[d]) * expected[d];
  std::printf("CPU: %lld sub-centroids moved; the first has length %.6f\n", (long long)M, std::sqrt(length));
  if (!(std::fabs(length - 1) < 1e-5)) return EXIT_FAILURE;
#if defined(DNC_WITH_CUDA)
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("GPU: there is no CUDA device\n");
    return 77;
  }
  const std::vector<float> result = on_gpu(centroids, x, cluster);
  double worst = 0;
  for (size_t i = 0; i < result.size(); i++) {
    const double error = std::fabs(double(result[i]) - expected[i]);
    if (!(error <= worst)) worst = error;  // a NaN is the worst
  }
  std::printf("GPU: differs from the CPU by at most %.1e\n", worst);
  return worst < 1e-5 ? EXIT_SUCCESS : EXIT_FAILURE;  // 60 float32 roundings of unit rows
#else
  std::printf("GPU: this library was built without CUDA kernels\n");
  return EXIT_SUCCESS;
#endif
}
