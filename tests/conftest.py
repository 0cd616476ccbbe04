"""Fixtures for every test: each owner of state is audited when the test ends."""

import os
import pkgutil
from collections import deque
from importlib import import_module

import pytest
from hypothesis import HealthCheck, settings

import pagedkv.core

# The models of the tests are tiny: a second thread only makes them wait for each other, and on a
# busy machine that takes longer than the work. Read by torch when it is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# xformers' kernels for CUDA run on CPU tensors, slowly. Read by triton when it is first imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=60,
    stateful_step_count=30,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=False,
    report_multiple_bugs=False,
)
settings.load_profile("ci")


def owners():
    """Every class of the control plane that can be audited."""
    for module in pkgutil.iter_modules(pagedkv.core.__path__, "pagedkv.core."):
        for value in vars(import_module(module.name)).values():
            here = isinstance(value, type) and value.__module__ == module.name
            if here and hasattr(value, "audit"):
                yield value


OWNERS = tuple(owners())


class Auditor:
    """Remembers the owners of state that a test makes.

    It holds them strongly: a test's locals are gone when its fixtures end, so weak references
    would find nothing left to audit. Property tests make thousands; the oldest are audited as
    soon as there are too many to keep.
    """

    keep = 500

    def __init__(self) -> None:
        self.owners: deque[object] = deque()

    def record(self, owner: object) -> None:
        self.owners.append(owner)
        if len(self.owners) > self.keep:
            self.owners.popleft().audit()

    def excuse(self, *owners: object) -> None:
        """Leave out owners that a test has broken on purpose."""
        self.owners = deque(o for o in self.owners if not any(o is broken for broken in owners))

    def audit(self) -> None:
        for owner in self.owners:
            owner.audit()


@pytest.fixture(autouse=True)
def auditor(monkeypatch):
    recorder = Auditor()

    def recording(construct):
        def construct_and_record(self, *args, **kwargs):
            construct(self, *args, **kwargs)
            recorder.record(self)

        return construct_and_record

    for owner in OWNERS:
        monkeypatch.setattr(owner, "__init__", recording(owner.__init__))
    yield recorder
    recorder.audit()
