"""Give MPI device memory and see whether this process survives it: the child of `colossal_mpi.platform.cuda_aware`.

It runs as a program and imports nothing of the package, whose guards and settings are made for a job.
"""

import signal
import sys

_SIZES = (1, 1 << 18)  # elements: MPI copies small messages on another path than large ones
_SECONDS = 120  # after which this process ends, even if its parent is gone


def main(device: int) -> None:
    """Send arrays on a device to this same process and compare the received values."""
    signal.alarm(_SECONDS)
    import cupy
    from mpi4py import MPI

    cupy.cuda.Device(device).use()
    for size in _SIZES:
        sent = cupy.arange(1, size + 1, dtype="float64")
        received = cupy.zeros_like(sent)
        cupy.cuda.get_current_stream().synchronize()
        print("exchanging", flush=True)
        MPI.COMM_SELF.Sendrecv(sent, 0, 0, received, 0, 0)
        if not bool((sent == received).all()):
            sys.exit("other values arrived")
    print("done", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
