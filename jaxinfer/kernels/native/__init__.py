"""C++ kernels for CPUs, compiled on the machine they run on (`build`), where XLA's own are slow."""
