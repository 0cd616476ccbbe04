"""What comes in any order is shown in one, and what is done when all else is given up is shown."""

import json

from hypothesis import given
from hypothesis import strategies as st

from pagedkv.cli.turns import InTurn

SWEEP = ("simulate", "--input-len", "60", "--output-len", "12", "--jobs", "2")


@given(st.permutations(range(6)), st.integers(0, 6))
def test_things_are_shown_in_their_order_as_soon_as_may_be(order, many):
    shown = []
    turns = InTurn(lambda number, thing: shown.append((number, thing)))
    come = []
    for number in order[:many]:
        turns.add(number, str(number))
        come.append(number)
        first_lacking = next(i for i in range(7) if i not in come)
        assert shown == [(i, str(i)) for i in range(first_lacking)]
    turns.show_rest()
    assert shown == [(i, str(i)) for i in sorted(come)]


def test_what_was_generated_before_an_interrupt_is_printed(cli, monkeypatch):
    """Of three prompts the first is not done."""
    from pagedkv.device.llm import LLM

    stream = LLM.stream

    def interrupted(self, prompts, params, **options):
        yield from [*stream(self, prompts, params, **options)][:0:-1]
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "stream", interrupted)
    prompts = ("A longer first prompt", "two", "three")
    found = cli("generate", "--model", "tiny-random", "--max-tokens", 3, "--json", *prompts)
    assert found.code == 130
    assert found.err == "\npagedkv: interrupted\n"
    done = [json.loads(line)["index"] for line in found.lines]
    assert done == [1, 2]


def test_runs_that_were_done_before_a_sweep_was_interrupted_are_printed(cli, monkeypatch):
    def interrupted(task, questions, most, done):
        for number in (3, 0, 1):
            done(number, task(*questions[number]))
        raise KeyboardInterrupt

    monkeypatch.setattr("pagedkv.cli.simulation.answers", interrupted)
    found = cli(*SWEEP, "--num-prompts", 5, "--seed", "0,1,2,3")
    assert found.code == 130
    assert [line.split(":")[0] for line in found.lines] == ["seed=0", "seed=1", "seed=3"]
