// In place of OpenMP's header: inside ONNX Runtime the threads are the session's, and two pools on the same
// cores ruin each other.
#pragma once

inline int omp_get_max_threads() { return 1; }
