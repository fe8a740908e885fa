// Runs a model that export_model.py packaged: `score model.pt2 tokens.txt` prints the mean loss of the
// tokens.
//
// No Python takes part. The package calls torch.ops.liger operators by name; linking LigerOps::operators is
// what registers them.

#include <cmath>
#include <cstdint>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <iterator>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: " << argv[0] << " MODEL.pt2 TOKENS.txt\n";
    return 2;
  }
  try {
    std::ifstream file(argv[2]);
    TORCH_CHECK(file, "cannot read ", argv[2]);
    std::vector<int64_t> ids{std::istream_iterator<int64_t>(file), std::istream_iterator<int64_t>()};
    TORCH_CHECK(ids.size() >= 2, argv[2], " holds ", ids.size(), " token ids; a prediction needs two");

    torch::inductor::AOTIModelPackageLoader model(argv[1]);
    const std::string device = model.get_metadata()["AOTI_DEVICE_KEY"];
    const torch::Tensor tokens =
        torch::from_blob(ids.data(), {1, static_cast<int64_t>(ids.size())}, torch::kInt64)
            .to(torch::Device(device));

    const double loss = model.run({tokens}).at(0).item<double>();
    std::cout << std::fixed << std::setprecision(6) << "loss " << loss << " over " << ids.size() - 1
              << " predictions, perplexity " << std::setprecision(1) << std::exp(loss) << "\n";
  } catch (const c10::Error& error) {
    std::cerr << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
