// The part of ONNX Runtime's C interface that the operators here use; its wheel ships no headers.
//
// That interface is a table of functions that only ever grows at its end, so a place in it is fixed.  Of a
// custom operator ONNX Runtime reads as many fields as `version` says: 16 brought kernels that can fail.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t API_VERSION = 20, OP_VERSION = 16;

struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct ShapeInfo;
struct CustomOp;

enum Code { FAIL = 1, INVALID_ARGUMENT = 2 };
enum ElementType { ANY = 0, FLOAT = 1, UINT8 = 2, INT8 = 3, FLOAT16 = 10, BFLOAT16 = 16 };
enum Characteristic { REQUIRED = 0, VARIADIC = 2 };
enum MemoryType { DEFAULT_MEMORY = 0 };

struct Api {
  Status* (*create_status)(Code code, const char* message);
  void* unused_1[25];
  Status* (*create_domain)(const char* name, CustomOpDomain** domain);
  Status* (*add_to_domain)(CustomOpDomain* domain, const CustomOp* op);
  Status* (*add_domain)(SessionOptions* options, CustomOpDomain* domain);
  void* unused_29[22];
  Status* (*tensor_data)(Value* value, void** data);
  void* unused_52[8];
  Status* (*element_type)(const ShapeInfo* info, int* type);
  Status* (*axis_count)(const ShapeInfo* info, size_t* count);
  Status* (*sizes)(const ShapeInfo* info, int64_t* sizes, size_t count);
  void* unused_63[2];
  Status* (*shape_info)(const Value* value, ShapeInfo** info);
  void* unused_66[20];
  Status* (*attribute_integer)(const KernelInfo* info, const char* name, int64_t* value);
  void* unused_87[3];
  Status* (*input)(const KernelContext* context, size_t index, const Value** value);
  Status* (*output)(KernelContext* context, size_t index, const int64_t* sizes, size_t count, Value** value);
  void* unused_92;
  void (*release_status)(Status* status);
  void* unused_94[5];
  void (*release_shape_info)(ShapeInfo* info);
  void* unused_100[63];
  Status* (*attribute_integers)(const KernelInfo* info, const char* name, int64_t* values, size_t* count);
  void* unused_164[85];
  Status* (*constant_input)(const KernelInfo* info, size_t index, int* is_constant, const Value** value);
  void* unused_250[24];
  Status* (*parallel_for)(const KernelContext* context, void (*task)(void* argument, size_t index),
      size_t tasks, size_t batches, void* argument);
};

#define TDPASS_AT(field, place) \
  static_assert(offsetof(Api, field) == (place) * sizeof(void*), "ONNX Runtime's table")
TDPASS_AT(create_domain, 26);
TDPASS_AT(tensor_data, 51);
TDPASS_AT(element_type, 60);
TDPASS_AT(axis_count, 61);
TDPASS_AT(shape_info, 65);
TDPASS_AT(attribute_integer, 86);
TDPASS_AT(input, 90);
TDPASS_AT(release_status, 93);
TDPASS_AT(release_shape_info, 99);
TDPASS_AT(attribute_integers, 163);
TDPASS_AT(constant_input, 249);
TDPASS_AT(parallel_for, 274);
#undef TDPASS_AT

struct ApiBase {
  const Api* (*api)(uint32_t version);
  const char* (*version)();
};

// What ONNX Runtime calls of an operator; the fields that OP_VERSION has.
struct CustomOp {
  uint32_t version;
  void* (*create_unchecked)(const CustomOp* op, const Api* api, const KernelInfo* info);
  const char* (*name)(const CustomOp* op);
  const char* (*provider)(const CustomOp* op);
  ElementType (*input_type)(const CustomOp* op, size_t index);
  size_t (*inputs)(const CustomOp* op);
  ElementType (*output_type)(const CustomOp* op, size_t index);
  size_t (*outputs)(const CustomOp* op);
  void (*compute_unchecked)(void* kernel, KernelContext* context);
  void (*destroy)(void* kernel);
  Characteristic (*input_characteristic)(const CustomOp* op, size_t index);
  Characteristic (*output_characteristic)(const CustomOp* op, size_t index);
  MemoryType (*input_memory)(const CustomOp* op, size_t index);
  int (*least_inputs)(const CustomOp* op);
  int (*inputs_alike)(const CustomOp* op);
  int (*least_outputs)(const CustomOp* op);
  int (*outputs_alike)(const CustomOp* op);
  Status* (*create)(const CustomOp* op, const Api* api, const KernelInfo* info, void** kernel);
  Status* (*compute)(void* kernel, KernelContext* context);
};

}  // namespace ort
