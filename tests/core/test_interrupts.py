"""An interrupt while a step is taken in: it is computed again, and counts once."""

import pytest

from .test_retention import POLICIES, SPREAD, Run, assert_same, make_config, make_request

PLACES = {
    "before anything is observed": ("retention", "observe", False),
    "before one policy's scores are observed": ("retention", "_score", False),
    "when one policy's scores are observed": ("retention", "_score", True),
    "before what is observed is added up": ("entries", "owner", True),
    "when all is observed": ("retention", "observe", True),
    "when it is counted": ("manager", "advance", True),
    "in a round, when what goes is certified": ("retention", "_certify", True),
    "when one policy's round is held": ("retention", "_round", True),
    "when all rounds are held": ("retention", "evict", True),
    "before anybody is charged": ("tenants", "charge", False),
    "when siblings have forked": ("_roster", "fork_siblings", True),
}


class Interrupted(Run):
    """A run with five interrupts at one place; there is progress between them."""

    def __init__(self, place, config, requests):
        self.place, self.num_interrupts = place, 0
        super().__init__(config, requests)

    def step(self):
        if len(self.plans) % 7 < 6 or self.num_interrupts == 5:
            super().step()
            return
        owner, name, after = PLACES[self.place]
        scheduler = self.scheduler
        owner = getattr(scheduler.retention if owner == "entries" else scheduler, owner)
        call = getattr(owner, name)

        def interrupt(*args):
            if after:
                call(*args)
            raise KeyboardInterrupt

        plan = self.scheduler.schedule()
        self.plans.append(plan)
        setattr(owner, name, interrupt)
        try:
            output = self.scheduler.commit(plan, self.device.execute(plan))
        except KeyboardInterrupt:
            self.num_interrupts += 1
        else:
            self.end(output.finished)
        finally:
            delattr(owner, name)
        self.scheduler.audit()


@pytest.mark.parametrize("granularity", ["sequence", "head"])
@pytest.mark.parametrize("place", PLACES)
def test_a_step_that_is_interrupted_while_it_is_taken_in_counts_once(place, granularity):
    chosen = ["full", "h2o", "ema", "streaming", "token ema", "token lobo", "lift"]
    if granularity == "head":
        chosen = ["full", "ada", "token h2o", "token pyramid", "knorm"]
    requests = [
        make_request(
            i, 20 + 3 * i, (POLICIES | SPREAD)[name], n=1 + (name == "lift"), max_tokens=30
        )
        for i, name in enumerate(chosen)
    ]
    config = make_config(1000, granularity, max_num_batched_tokens=50, max_num_seqs=16)
    run = Interrupted(place, config, requests)
    assert run.num_interrupts > 1
    for request in requests:
        assert_same(run, request, granularity)
    plain = Run(config, requests)
    assert run.scheduler.tenants.served.tolist() == plain.scheduler.tenants.served.tolist()
