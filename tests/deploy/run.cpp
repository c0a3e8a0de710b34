// Loads the operators and a compiled package, runs it on the numbers of a file and prints what comes out: no Python anywhere.
//
//   run OPS.so PACKAGE.pt2 INPUT.f32 SIZE...
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <ATen/ops/from_blob.h>

#include <cstdio>
#include <fstream>
#include <numeric>
#include <string>
#include <vector>

int main(int count, char** words) {
  if (!dlopen(words[1], RTLD_NOW)) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  std::vector<int64_t> sizes;
  for (int k = 4; k < count; k++) sizes.push_back(std::stoll(words[k]));
  std::vector<float> numbers(std::accumulate(sizes.begin(), sizes.end(), int64_t(1), std::multiplies<int64_t>()));
  std::ifstream(words[3], std::ios::binary).read(reinterpret_cast<char*>(numbers.data()), numbers.size() * sizeof(float));

  torch::inductor::AOTIModelPackageLoader package(words[2]);
  const std::vector<at::Tensor> outputs = package.run({at::from_blob(numbers.data(), sizes)});
  for (const at::Tensor& output : outputs) {
    const at::Tensor flat = output.contiguous();
    for (int64_t k = 0; k < flat.numel(); k++) std::printf("%.9g\n", flat.data_ptr<float>()[k]);
  }
}
