// Trains a classifier on operators called through PyTorch's dispatcher: the ones, with the gradients, that
// Python calls as torch.ops.liger.rms_norm and torch.ops.liger.fused_linear_cross_entropy.

#include <iostream>
#include <map>
#include <string>
#include <vector>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/torch.h>

namespace {

// Calls an operator with its first arguments by position and others by name; the rest take their defaults, as
// in Python. `python -m liger_ops info` lists the operators, docs/operators.md their arguments.
torch::jit::Stack call(const std::string& name, torch::jit::Stack arguments,
    const std::map<std::string, c10::IValue>& named = {}) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
  const auto& schema = op.schema().arguments();
  for (size_t i = arguments.size(); i < schema.size(); ++i) {
    const auto given = named.find(schema[i].name());
    arguments.push_back(given != named.end() ? given->second : schema[i].default_value().value());
  }
  op.callBoxed(arguments);
  return arguments;
}

}  // namespace

int main() {
  torch::manual_seed(0);
  const torch::Device device(torch::cuda::is_available() ? torch::kCUDA : torch::kCPU);
  const int64_t rows = 512, hidden = 64, classes = 1000;

  // Points around one centre for each class.
  const torch::Tensor target =
      torch::randint(classes, {rows}, torch::TensorOptions(torch::kInt64).device(device));
  const torch::Tensor centres = torch::randn({classes, hidden}, device);
  const torch::Tensor x = centres.index_select(0, target) + 0.1 * torch::randn({rows, hidden}, device);

  torch::Tensor scale = torch::ones({hidden}, device).requires_grad_();
  torch::Tensor head = (0.02 * torch::randn({classes, hidden}, device)).requires_grad_();
  torch::optim::AdamW optimizer({scale, head}, torch::optim::AdamWOptions(0.02));

  double first = 0, last = 0;
  for (int step = 0; step < 100; ++step) {
    optimizer.zero_grad();
    const torch::Tensor y = call("liger::rms_norm", {x, scale}).at(0).toTensor();
    const torch::Tensor loss =
        call("liger::fused_linear_cross_entropy", {y, head, target}, {{"label_smoothing", 0.01}})
            .at(0)
            .toTensor();
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    if (step == 0) {
      first = last;
    }
  }
  std::cout << "loss " << first << " -> " << last << " on " << device << "\n";
  return last < 0.5 * first ? 0 : 1;
}
