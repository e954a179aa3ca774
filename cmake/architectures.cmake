# What nvcc compiles for.

# dnc_architectures(OUT ARCH...): the names of DNC_CUDA_ARCHS, made sure of. 90 becomes 90a: wgmma and setmaxnreg are in no other
# code for compute capability 9.0, and a kernel without them traps. `native` becomes what DNC_NATIVE_CAPABILITIES names (as in
# "80 90"), each with the instructions of its own that it has from 9.0 on.
function(dnc_architectures out)
  set(archs "")
  foreach(arch IN LISTS ARGN)
    if(arch STREQUAL "native")
      foreach(capability IN LISTS DNC_NATIVE_CAPABILITIES)
        if(capability GREATER_EQUAL 90)
          string(APPEND capability "a")
        endif()
        list(APPEND archs ${capability}-real)
      endforeach()
    elseif(NOT arch MATCHES "^([0-9][0-9]+)([af]?)(-real|-virtual)?$")
      message(FATAL_ERROR "DNC_CUDA_ARCHS must be like 80-real;90a-real;100, or native; got ${arch}")
    elseif(CMAKE_MATCH_1 LESS 80)
      message(FATAL_ERROR "DNC_CUDA_ARCHS: the CUDA kernels need compute capability 8.0 or later; got ${arch}")
    elseif(CMAKE_MATCH_1 EQUAL 90)
      list(APPEND archs 90a${CMAKE_MATCH_3})
    else()
      list(APPEND archs ${arch})
    endif()
  endforeach()
  list(REMOVE_DUPLICATES archs)
  set(${out} ${archs} PARENT_SCOPE)
endfunction()

# dnc_native_capabilities(OUT): those of this machine's GPUs, such as 90. CUDA must be enabled.
function(dnc_native_capabilities out)
  set(program ${CMAKE_CURRENT_BINARY_DIR}/capabilities.cu)
  file(WRITE ${program} [[
#include <cstdio>
int main() {
  int devices = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDeviceCount(&devices);
  for (int i = 0; i < devices && error == cudaSuccess; i++) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, i);
    std::printf("%s%d%d", i > 0 ? ";" : "", major, minor);
  }
  if (error != cudaSuccess) std::printf("%s", cudaGetErrorString(error));
  return error != cudaSuccess || devices == 0;
}
]])
  unset(dnc_failed CACHE)  # the machine may have got another GPU since
  try_run(dnc_failed compiled ${CMAKE_CURRENT_BINARY_DIR}/capabilities ${program} RUN_OUTPUT_VARIABLE found)
  if(NOT compiled OR NOT dnc_failed EQUAL 0)
    message(FATAL_ERROR "DNC_KERNELS_CUDA_ARCHS=native, but this machine has no GPU that CUDA can use (${found}): name the "
                        "architecture of the GPU that is to run the kernels, such as 80-real or 90a-real")
  endif()
  list(REMOVE_DUPLICATES found)
  set(${out} ${found} PARENT_SCOPE)
endfunction()
