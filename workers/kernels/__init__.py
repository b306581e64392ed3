"""The native kernels: C++ for the CPU, built on first use, and the Python that stands around them."""
