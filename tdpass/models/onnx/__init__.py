"""The ONNX front end: files, graphs, sites, a runner in torch, and rewriting with onnx_ir."""
