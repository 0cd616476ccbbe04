"""What every refusal must keep: a typed error with all its parts, and nothing changed."""

import pickle

import pytest

from tests.core.fakes import alone


def snapshot(driver):
    """Everything the scheduler can ever look at, down to the last array."""
    return pickle.dumps(driver.scheduler)


def unharmed(driver):
    """Whether all that was there before is still served exactly."""
    ended = {name for name, _ in driver.finished}
    driver.run(max_steps=500)
    for name, request in driver.requests.items():
        if name in ended:
            continue
        for index, answer in enumerate(alone(request, driver.scheduler.config)):
            end = driver.finished[name, index]
            assert (end.token_ids, end.finish_reason) == answer


def refused(driver, request, kind, *words):
    before = snapshot(driver)
    with pytest.raises(kind) as caught:
        driver.add(request)
    message = str(caught.value)
    for word in words:
        assert word in message
    assert caught.value.where
    assert caught.value.remedy
    assert snapshot(driver) == before
    unharmed(driver)
