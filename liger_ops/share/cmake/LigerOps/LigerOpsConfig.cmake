# The operators for C++ programs:
#
#   find_package(Torch REQUIRED)
#   find_package(LigerOps REQUIRED)
#   target_link_libraries(program PRIVATE ${TORCH_LIBRARIES} LigerOps::operators)
#
# with -DCMAKE_PREFIX_PATH of torch.utils.cmake_prefix_path and liger_ops.cmake_prefix_path.

if(NOT TARGET LigerOps::operators)
  get_filename_component(_liger_ops_package "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
  file(GLOB _liger_ops_library "${_liger_ops_package}/_C*.so")
  list(LENGTH _liger_ops_library _liger_ops_count)
  if(NOT _liger_ops_count EQUAL 1)
    set(LigerOps_FOUND FALSE)
    set(LigerOps_NOT_FOUND_MESSAGE
        "expected one compiled library in ${_liger_ops_package}, found ${_liger_ops_count}")
    return()
  endif()
  add_library(LigerOps::operators SHARED IMPORTED)
  set_target_properties(
    LigerOps::operators
    PROPERTIES IMPORTED_LOCATION "${_liger_ops_library}"
               # A program finds the operators through PyTorch's dispatcher and uses no symbol of the library,
               # which the linker would therefore leave out.
               INTERFACE_LINK_OPTIONS "LINKER:--no-as-needed")
  unset(_liger_ops_package)
  unset(_liger_ops_library)
  unset(_liger_ops_count)
endif()
