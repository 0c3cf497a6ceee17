"""Factorizations and the products that they need: QR, least squares, symmetric products, the polar factor.

``linalg`` exports them, and the Muon optimizer calls the polar factor. They call `contract`, the collectives of
``comm``, and LAPACK through the array library of the blocks.
"""

from colossal_mpi.linalg.factor.lstsq import lstsq
from colossal_mpi.linalg.factor.polar import newton_schulz
from colossal_mpi.linalg.factor.qr import QR, qr
from colossal_mpi.linalg.factor.syrk import gram, herk, syrk

__all__ = ["QR", "gram", "herk", "lstsq", "newton_schulz", "qr", "syrk"]
