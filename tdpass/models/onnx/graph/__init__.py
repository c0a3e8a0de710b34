"""ONNX graphs as data: tensors, shapes, names, functions, bodies, and what their operators compute."""
