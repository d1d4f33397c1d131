"""Kernels for a CPU in C++, compiled where they run (`build`): what XLA's own leave on the table there."""
