// Types shared by every kernel of the library: element types, strided views, status. Knows nothing of Python or torch.
#pragma once
#include <cstddef>
#include <cstdint>

namespace dnc {

enum class DType : int32_t { float32, float64, float16, bfloat16, int64, int32, uint8 };

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// A strided array that the caller owns. Strides count elements and may be zero. ndim == 0: absent (a scalar is a view of one
// element).
struct View {
  void* data = nullptr;
  DType dtype = DType::float32;
  int32_t ndim = 0;
  int64_t size[4] = {0, 0, 0, 0};
  int64_t stride[4] = {0, 0, 0, 0};

  explicit operator bool() const { return ndim > 0; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; i++) n *= size[i];
    return n;
  }
  // Data of a contiguous view.
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// Feature maps seen as N = B*H*W pixels of D channels: a view [N,D] (then B = H = 1) or [B,D,H,W], any strides.
struct Pixels {
  char* data;
  DType dtype;
  int64_t B, H, W, D, sb, sh, sw, sd;
  explicit Pixels(const View& v) : data(static_cast<char*>(v.data)), dtype(v.dtype) {
    if (v.ndim == 4) {
      B = v.size[0], D = v.size[1], H = v.size[2], W = v.size[3];
      sb = v.stride[0], sd = v.stride[1], sh = v.stride[2], sw = v.stride[3];
      if (sh == W * sw) W *= H, H = 1;  // one run a sample: the common formats
      if (H == 1 && sb == W * sw) W *= B, B = 1;
    } else {
      B = H = 1, W = v.size[0], D = v.size[1], sb = sh = 0, sw = v.stride[0], sd = v.stride[1];
    }
  }
  int64_t N() const { return B * H * W; }
  int64_t offset(int64_t n) const {  // of channel 0 of pixel n, in elements
    const int64_t row = n / W;
    return row / H * sb + row % H * sh + n % W * sw;
  }
  // Pixels n, n+1, ... that lie sw apart: how many, at most `most`.
  int64_t run(int64_t n, int64_t most) const {
    const int64_t left = W - n % W;
    return left < most ? left : most;
  }
};

// What went wrong, if anything. `index` and `value` say where: "label 19 at pixel 7".
enum class Code : int32_t { ok, bad_argument, bad_label, out_of_memory, cuda_error };
struct Status {
  Code code = Code::ok;
  int64_t index = 0;
  int64_t value = 0;
  const char* what = "";  // a static string
  bool ok() const { return code == Code::ok; }
};
inline Status bad_argument(const char* what) { return {Code::bad_argument, 0, 0, what}; }

// Similarity of a pixel x and a sub-centroid p: <x,p>; <x,p>/(|x||p|); -|x-p|^2.
enum class Metric : int32_t { dot, cosine, sqeuclidean };

// The instruction sets this processor can run, best last. amx: bfloat16 pixels are multiplied on tile registers, which the
// operating system must let the process use; all else is avx512.
enum class Isa : int32_t { portable, avx2, avx512, amx };
Isa best_isa();         // what the processor supports
Isa current_isa();      // what kernels run with
bool set_isa(Isa isa);  // for calls that begin later, on any thread; false: not supported here, nothing changed

// 64-byte aligned memory, freed with the object. Not initialised. data == nullptr after a failed allocation.
struct Scratch {
  void* data;
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace dnc
