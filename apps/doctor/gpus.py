"""Check of the GPUs of each node, and of their assignment to ranks."""

from __future__ import annotations

from collections.abc import Sequence

from colossal_mpi.apps.doctor.facts import Facts, nodes
from colossal_mpi.apps.doctor.finding import GOOD, WARNING, Finding, named

_TOPIC = "GPUs"
_SHOWN = 8


def check(facts: Sequence[Facts]) -> list[Finding]:
    """Return findings about GPUs: which rank takes which, and what is wrong on which node."""
    if not any(one["gpus"]["installed"] or one["gpus"]["seen"] for one in facts):
        return [Finding(_TOPIC, GOOD, "none in these machines: blocks lie in host memory")]
    wrong = [found for node in nodes(facts) for found in (_unseen(node), _hidden(node), _shared(node)) if found]
    taken = [one for one in facts if one["gpus"]["taken"] is not None]
    return [*([Finding(_TOPIC, GOOD, _map(taken))] if taken else []), *wrong]


def _address(one: Facts) -> str:
    """Return the PCI address of the GPU that a rank uses."""
    assert one["gpus"]["taken"] is not None
    return one["gpus"]["seen"][one["gpus"]["taken"]][0]


def _map(taken: Sequence[Facts]) -> str:
    words = [f"rank {one['rank']}: {_address(one)} ({one['gpus']['seen'][0][1]})" for one in taken[:_SHOWN]]
    return "; ".join(words) + (f"; and {len(taken) - _SHOWN} more ranks" if len(taken) > _SHOWN else "")


def _unseen(node: Sequence[Facts]) -> Finding | None:
    blind = [one for one in node if one["gpus"]["installed"] and not one["gpus"]["seen"]]
    if not blind:
        return None
    first, ranks = blind[0], ", ".join(str(one["rank"]) for one in blind)
    text = f"{first['host']} has {len(first['gpus']['installed'])} GPUs and rank {ranks} sees none"
    if not any(name.startswith("cupy") for name in first["versions"]):
        return Finding(
            _TOPIC, WARNING, f"{text}: CuPy is not installed", "pip install colossal-mpi[cuda12] (or cuda13)"
        )
    if first["gpus"]["visible"] is not None:
        remedy = f"unset CUDA_VISIBLE_DEVICES, which is {first['gpus']['visible']!r}"
        return Finding(_TOPIC, WARNING, text, remedy)
    return Finding(
        _TOPIC, WARNING, text, "ask the scheduler for them (--gpus-per-node), or see whether nvidia-smi works"
    )


def _hidden(node: Sequence[Facts]) -> Finding | None:
    union = {address for one in node for address, _ in one["gpus"]["seen"]}
    narrow = [one for one in node if 0 < len(one["gpus"]["seen"]) < len(union)]
    if not narrow:
        return None
    text = (
        f"rank {narrow[0]['rank']} sees {len(narrow[0]['gpus']['seen'])} of the {len(union)} GPUs of the job on "
        f"{narrow[0]['host']}: MPI cannot copy from one GPU to another there"
    )
    remedy = "--gpus-per-node with --gpu-bind=none instead of --gpus-per-task: ranks choose by their number on the node"
    if narrow[0]["gpus"]["visible"] is not None:
        remedy += f"; CUDA_VISIBLE_DEVICES is {narrow[0]['gpus']['visible']!r}"
    return Finding(_TOPIC, WARNING, text, remedy)


def _shared(node: Sequence[Facts]) -> Finding | None:
    owners: dict[str, list[int]] = {}
    for one in node:
        if one["gpus"]["taken"] is not None:
            owners.setdefault(_address(one), []).append(one["rank"])
    crowded = [(address, ranks) for address, ranks in owners.items() if len(ranks) > 1]
    if not crowded:
        return None
    address, ranks = crowded[0]
    text = f"{named(ranks, 0)} share GPU {address} of {node[0]['host']}"
    return Finding(_TOPIC, WARNING, text, f"start {len(owners)} ranks on this node, one for each GPU")
