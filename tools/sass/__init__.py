"""Decides whether the compiled CUDA kernels hold what the source promises, on their machine code, without a GPU.

``python -m tools.sass.report`` compiles csrc/cuda for every architecture, prints what ptxas and the SASS say, and exits
with 1 where a rule does not hold; CI runs it on every change. The simulator that runs the CUDA tests executes wgmma and
copies at once, so that nothing but this sees a missing wait or fence.

compiled: kernels as nvcc, ptxas and cuobjdump give them. flow: their code as a graph, and what holds on every path.
values: what registers hold, as far as the rules need it. rules: waits and fences. report: which rule a kernel has to
hold, and the tables.
"""
