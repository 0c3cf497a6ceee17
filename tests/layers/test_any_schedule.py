"""Generated pipelines: every schedule is sound for any number of stages, chunks and microbatches."""

from hypothesis import given
from hypothesis import strategies as st

from colossal_mpi.layers.pipeline.schedule import SCHEDULES, program
from colossal_mpi.layers.pipeline.simulation import verify
from tests.generated import examples


@examples(4)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 9), st.integers(1, 12), st.integers(2, 4))
def test_every_schedule_is_sound(schedule, stages, microbatches, chunks):
    kind = SCHEDULES[schedule]
    chunks = chunks if kind.interleaved else 1
    found = verify([list(program(schedule, stages, microbatches, stage, chunks)) for stage in range(stages)])
    assert max(found.live) <= microbatches * chunks
