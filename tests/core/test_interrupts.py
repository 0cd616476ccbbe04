"""Ctrl-C while a step is decided or taken in: the scheduler ends that first."""

import signal
import threading

import pytest

from pagedkv.core.engine import Engine

from .test_retention import POLICIES, SPREAD, Run, assert_same, make_config, make_request

PLACES = {
    "when blocks are given": ("manager", "grow"),
    "when requests are let in": ("_intake", "admit"),
    "when one policy's scores are observed": ("retention", "_score"),
    "when all is observed": ("retention", "observe"),
    "when it is counted": ("manager", "advance"),
    "when one policy's round is held": ("retention", "_round"),
    "when somebody is charged": ("tenants", "charge"),
    "when siblings have forked": ("_roster", "fork_siblings"),
    "when sequences end": ("_roster", "end"),
}


class Interrupted(Run):
    """A run with five interrupts at one place; there is progress between them."""

    def __init__(self, place, config, requests):
        self.place, self.num_interrupts, self.engine = place, 0, None
        super().__init__(config, requests)

    def step(self):
        if self.engine is None:
            self.engine = Engine(self.scheduler, self.device)
            commit = self.scheduler.commit

            def told(*args):
                output = commit(*args)
                self.end(output.finished)
                return output

            self.scheduler.commit = told
        owner, name = PLACES[self.place]
        owner = getattr(self.scheduler, owner)
        call = getattr(owner, name)

        def interrupt(*args, **options):
            signal.raise_signal(signal.SIGINT)
            found = call(*args, **options)
            signal.raise_signal(signal.SIGINT)  # pressed twice
            return found

        if len(self.plans) % 7 == 6 and self.num_interrupts < 5:
            setattr(owner, name, interrupt)
        try:
            plan, _, _ = self.engine.step()
        except KeyboardInterrupt:
            self.num_interrupts += 1
            plan = None
        finally:
            vars(owner).pop(name, None)
        self.plans.append(plan)
        self.scheduler.audit()


@pytest.fixture(autouse=True)
def handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "it was not put back"
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("place", PLACES)
def test_a_step_that_is_interrupted_is_taken_in_first(place):
    chosen = ["full", "h2o", "ema", "streaming", "token ema", "token lobo", "lift"]
    requests = [
        make_request(
            i, 20 + 3 * i, (POLICIES | SPREAD)[name], n=1 + (name == "lift"), max_tokens=30
        )
        for i, name in enumerate(chosen)
    ]
    config = make_config(1000, max_num_batched_tokens=50, max_num_seqs=16)
    run = Interrupted(place, config, requests)
    assert run.num_interrupts
    for request in requests:
        assert_same(run, request)
    plain = Run(config, requests)
    assert run.scheduler.tenants.served.tolist() == plain.scheduler.tenants.served.tolist()


def test_the_executor_is_interrupted_at_once_and_its_plan_is_given_up():
    class Slow:
        def execute(self, plan):
            signal.raise_signal(signal.SIGINT)
            pytest.fail("it went on")

    run = Run(make_config(1000), [])
    run.add(make_request(0, 20, "full"))
    with pytest.raises(KeyboardInterrupt):
        Engine(run.scheduler, Slow()).step()
    assert run.scheduler.schedule().num_tokens == 20


def test_other_threads_are_left_alone():
    run = Run(make_config(1000), [])
    run.add(make_request(0, 20, "full", max_tokens=2))
    worker = threading.Thread(target=lambda: [*Engine(run.scheduler, run.device).run()])
    worker.start()
    worker.join()
    assert not run.scheduler.has_unfinished()
