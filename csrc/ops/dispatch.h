#pragma once

// Typed handles to the library's own operators, and what the Autograd and Autocast kernels share.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <type_traits>

namespace liger {

// The handle of `liger::<name>` for the C++ signature of `function`. Keep the result in a local static: the
// lookup takes a lock.
template <typename Function>
auto find_operator(const char* name, Function* /*signature*/) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

// Continues an operator from its Autograd kernel, which was called with `keys`: the kernels below, and
// whatever they call, record nothing for differentiation.
template <typename Handle, typename... Args>
auto redispatch_below_autograd(const Handle& op, c10::DispatchKeySet keys, const Args&... args) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.redispatch(keys & c10::after_autograd_keyset, args...);
}

// Opens the way past Autocast: whatever runs below keeps the dtypes it is given.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

// WithoutAutocast<op>::call is the Autocast kernel of an operator that keeps its dtypes; `op` calls through
// the dispatcher.
template <auto* Op, typename Function = std::remove_pointer_t<decltype(Op)>>
struct WithoutAutocast;

template <auto* Op, typename Result, typename... Args>
struct WithoutAutocast<Op, Result(Args...)> {
  static Result call(Args... args) {
    NoAutocast guard;
    return Op(args...);
  }
};

// OnDevice<function, device>::call is the kernel of one device for an operator that is written once:
// function(device, args...), `device` holding the pieces in which devices differ.
template <auto* Function, auto& Device, typename Type = std::remove_pointer_t<decltype(Function)>>
struct OnDevice;

template <auto* Function, auto& Device, typename Result, typename Pieces, typename... Args>
struct OnDevice<Function, Device, Result(Pieces, Args...)> {
  static Result call(Args... args) { return Function(Device, args...); }
};

}  // namespace liger
