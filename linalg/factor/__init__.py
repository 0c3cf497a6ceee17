"""Factorizations and what they are built from: QR, least squares, symmetric products, the polar factor.

``linalg`` exports them and the Muon optimizer uses the polar factor. They call `contract`, collectives of ``comm`` and
the LAPACK of the array library for blocks.
"""
