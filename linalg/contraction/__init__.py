"""The one distributed matrix product, `contract`, for every map of grid axes to the letters m, n and k.

``linalg.matmul`` and every layer call `contract`. It checks its operands, plans from which ranks the panels of each
operand come, multiplies the panels that meet with the local gemm, and reduces partial sums into the layout of the
result.
"""
