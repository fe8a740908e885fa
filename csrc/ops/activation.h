#pragma once

namespace liger {

// The activations of the gated linear units; formulas: ops/glu.h.
enum class Activation { kSilu, kGeluTanh, kGelu };

}  // namespace liger
