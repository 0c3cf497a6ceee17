"""A saboteur that leaves out one reduction at a time, to test the tests."""

from colossal_mpi import comm
from colossal_mpi.comm import transport


class Saboteur:
    """While armed, it logs the sums over ranks, and leaves out the other ranks' terms in number `victim`."""

    def __init__(self, monkeypatch):
        self.armed, self.victim, self.inside, self.log = False, None, False, []
        for name in ("allreduce", "reduce_scatter"):
            wrapped = self.wrap(getattr(comm, name))
            for module in (comm, transport):  # called by layers, and by redistributions
                monkeypatch.setattr(module, name, wrapped)

    def arm(self, victim):
        self.armed, self.victim, self.log = True, victim, []

    def wrap(self, function):
        def reduction(block, grid, axes, *rest):
            if self.inside or not self.armed or grid.extent(axes) == 1 or comm.MAX in rest:
                return function(block, grid, axes, *rest)
            number, self.inside = len(self.log), True
            self.log.append((function.__name__, grid.ordered(axes)))
            result = function(block, grid, axes, *rest)
            self.inside = False
            if number != self.victim:
                return result
            if function.__name__ == "allreduce":
                return block
            start = sum(rest[0][: grid.comm(axes).rank])
            return block[start : start + result.size]

        return reduction
