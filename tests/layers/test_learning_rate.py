"""Learning-rate schedules equal PyTorch's schedulers where it has them, and new ones can be registered."""

import pytest

from colossal_mpi import OptionError
from colossal_mpi.layers.optim import LEARNING_RATES, LearningRateSchedule, learning_rate, register_learning_rate

TOTAL = 20


def torchs(make):
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler, rates = make(torch.optim.lr_scheduler)(optimizer), []
    for _ in range(TOTAL):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


CASES = {
    "linear": (
        LearningRateSchedule("linear", 2.0, TOTAL, floor=0.25),
        lambda s: lambda o: s.LinearLR(o, start_factor=1.0, end_factor=0.25, total_iters=TOTAL),
    ),
    "cosine": (
        LearningRateSchedule("cosine", 2.0, TOTAL, floor=0.1),
        lambda s: lambda o: s.CosineAnnealingLR(o, TOTAL, eta_min=0.2),
    ),
    "polynomial": (
        LearningRateSchedule("polynomial", 2.0, TOTAL, power=2.5),
        lambda s: lambda o: s.PolynomialLR(o, total_iters=TOTAL, power=2.5),
    ),
    "multi-step": (
        LearningRateSchedule("multi-step", 2.0, TOTAL, milestones=(5, 11), gamma=0.3),
        lambda s: lambda o: s.MultiStepLR(o, [5, 11], gamma=0.3),
    ),
    "one-cycle": (
        LearningRateSchedule("one-cycle", 2.0, TOTAL - 1, warmup=6, floor=4e-6),
        lambda s: lambda o: s.OneCycleLR(o, 2.0, TOTAL, pct_start=7 / 20, cycle_momentum=False),
    ),
    "constant": (LearningRateSchedule("constant", 2.0, TOTAL), lambda s: lambda o: s.ConstantLR(o, factor=1.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_rate_is_pytorchs(name):
    rate, make = CASES[name]
    assert [rate(step) for step in range(TOTAL)] == pytest.approx(torchs(make), rel=1e-12)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "polynomial", "wsd"])
def test_a_warm_up_rises_to_the_peak_and_the_end_is_the_floor(name):
    floor = {} if name == "constant" else {"floor": 0.5}
    rate = LearningRateSchedule(name, 3.0, TOTAL, warmup=4, **floor)
    rates = [rate(step) for step in range(TOTAL + 5)]
    assert rates[:5] == pytest.approx([0.75, 1.5, 2.25, 3.0, 3.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[TOTAL:] == [rates[TOTAL]] * 5
    assert rates[TOTAL] == (3.0 if name == "constant" else 1.5)


def test_wsd_is_stable_then_falls():
    rate = LearningRateSchedule("wsd", 1.0, 14, warmup=4, decay=0.4)
    assert [rate(step) for step in range(4, 15)] == pytest.approx([1.0] * 7 + [0.75, 0.5, 0.25, 0.0])


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("wsd", {"warmup": -1}, "warmup=-1 must be 0 or more"),
        ("wsd", {"total": 0}, "total=0 1 or more"),
        ("wsd", {"floor": 2.0}, "floor=2.0 must be from 0 to 1"),
        ("wsd", {"decay": 0.0}, "decay=0.0 must be above 0"),
        ("polynomial", {"power": -1.0}, "power=-1.0 must be 0 or more"),
        ("wsd", {"power": 1.0}, "no option power; use floor, decay"),
        ("constant", {"floor": 0.1}, "no option floor; it has none"),
    ],
)
def test_numbers_out_of_range_and_unknown_options_are_refused(name, options, says):
    with pytest.raises(OptionError, match=says):
        LearningRateSchedule(name, **{"peak": 1.0, "total": 10} | options)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(OptionError, match="learning rate 'step': use one of 'constant', 'linear'"):
        LearningRateSchedule("step", 1.0, 10)


def test_a_schedule_from_outside_is_found_by_name_with_its_options(monkeypatch):
    monkeypatch.setattr(learning_rate, "LEARNING_RATES", dict(LEARNING_RATES))

    @register_learning_rate("root")
    def root(step, progress, *, power: float = 0.5):
        """Fall with a root of what is left.

        Parameters
        ----------
        power : float
            Exponent of the share that is left,
            0 or more.
        """
        return (1 - progress) ** power

    kind = learning_rate.LEARNING_RATES["root"]
    assert LearningRateSchedule("root", 2.0, 4, power=2.0)(2) == 0.5
    assert kind.description == "Fall with a root of what is left."
    assert (kind.options["power"].default, kind.options["power"].annotation) == (0.5, float)
    assert kind.options["power"].description == "Exponent of the share that is left, 0 or more."
