// Fused chains as operators of ONNX Runtime, in the domain com.tdpass.
//
// What a node computes is all in its name and attributes, so that a model can say it in standard operators as
// well; each source says how the names that it adds are made.
#include "operator.h"

// What ONNX Runtime looks for in a library of operators.
extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(
    ort::SessionOptions* options, const ort::ApiBase* base) {
  using namespace tdpass_ort;
  the_api = base->api(ort::API_VERSION);
  if (!the_api)
    return base->api(1)->create_status(ort::FAIL, "the operators of tdpass need ONNX Runtime 1.20 or newer");
  return guarded([&] {
    static ort::CustomOpDomain* const domain = [] {
      ort::CustomOpDomain* made = nullptr;
      check(the_api->create_domain("com.tdpass", &made));
      Operators all;
      for (auto add : {add_float_chains, add_int8_chains, add_weight_only, add_sparse, add_recurrent})
        add(all);
      for (const ort::CustomOp* op : all) check(the_api->add_to_domain(made, op));
      return made;
    }();
    check(the_api->add_domain(options, domain));
  });
}
