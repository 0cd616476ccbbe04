"""``pagedkv generate`` on a tiny model: what is printed, for whom and when."""

import json

import pytest

from pagedkv.cli.generate import _print_safely, _Printer
from pagedkv.cli.prompts import gather_prompts, read_prompts
from pagedkv.device.outputs import CompletionOutput, RequestOutput
from pagedkv.errors import InvalidRequest

TINY = ("--model", "tiny-random")
GREEDY = (*TINY, "--temperature", 0, "--max-tokens", 6)


def rows(outcome):
    assert outcome.code == 0, outcome.err
    return [json.loads(line) for line in outcome.lines]


@pytest.fixture
def asked(monkeypatch):
    """What `LLM.generate` is called with, without a model behind it."""
    calls = []

    class Stub:
        def stream(self, prompts, params, *, whole):
            calls.append((prompts, params))
            return []

        def chat_prompt(self, messages):
            return "".join(f"<{m['role']}>{m['content']}" for m in messages)

    monkeypatch.setattr("pagedkv.cli.generate.make_llm", lambda args, config: Stub())
    return calls


def test_one_prompt_prints_its_text_and_nothing_else(cli):
    code, out, _ = cli("generate", *GREEDY, "Hello")
    assert code == 0
    row = rows(cli("generate", *GREEDY, "--json", "Hello"))[0]
    assert out == row["outputs"][0]["text"] + "\n"


def test_many_prompts_are_told_apart(cli):
    out = cli("generate", *GREEDY, "Hello", "Good\nbye").out
    assert "[0] Hello\n" in out
    assert "[1] Good bye\n" in out


def test_json_has_a_line_for_each_prompt(cli):
    got = rows(cli("generate", *GREEDY, "--json", "--n", 2, "--logprobs", 1, "Hello", "Bye"))
    assert [row["index"] for row in got] == [0, 1]
    assert got[0]["prompt"] == "Hello"
    assert len(got[0]["outputs"]) == 2
    first = got[0]["outputs"][0]
    assert len(first["token_ids"]) == 6
    assert first["finish_reason"] == "length"
    assert len(first["logprobs"]) == 6
    assert first["cumulative_logprob"] < 0


def test_a_stream_says_the_same_as_text_and_as_json(cli):
    args = ("generate", *GREEDY, "--n", 2, "--stream", "Hello", "Bye")
    texts, reasons = {}, {}
    for row in rows(cli(*args, "--json")):
        place = row["index"], row["output"]
        texts[place] = texts.get(place, "") + row["delta"]
        if row["finish_reason"]:
            assert place not in reasons
            reasons[place] = row["finish_reason"]
    assert set(reasons.values()) == {"length"}
    heads = {(0, 0): "[0.0] Hello", (0, 1): "[0.1] Hello", (1, 0): "[1.0] Bye", (1, 1): "[1.1] Bye"}
    printed = "".join(f"{heads[place]}\n{texts[place]}\n" for place in sorted(heads))
    assert cli(*args).out == printed


def test_the_best_of_several_is_streamed_once_it_is_known(cli):
    args = ("generate", *TINY, "--best-of", 3, "--n", 1, "--max-tokens", 6, "--seed", 1)
    prompts = ("--temperature", 1, "Hello", "Bye")
    assert cli(*args, "--stream", *prompts).out == cli(*args, *prompts).out
    whole = {
        row["index"]: row["outputs"][0]["text"] for row in rows(cli(*args, "--json", *prompts))
    }
    news = rows(cli(*args, "--stream", "--json", *prompts))
    assert {row["index"]: row["delta"] for row in news} == whole


def test_a_seed_fixes_the_draws(cli):
    args = ("generate", *TINY, "--max-tokens", 8, "--temperature", 1, "--json", "Hello")
    drawn = [cli(*args, "--seed", seed).out for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_all_sampling_flags_reach_the_engine(cli, asked):
    cli(
        *("generate", "--temperature", "0.5", "--top-p", "0.9", "--top-k", "5", "--min-p", "0.1"),
        *("--seed", "3", "--max-tokens", "9", "--stop", "x", "--stop-token-ids", "4", "--n", "2"),
        *("--ignore-eos", "--logprobs", "1", "--repetition-penalty", "1.1"),
        *("--presence-penalty", "0.2", "--frequency-penalty", "0.3", "--min-tokens", "2"),
        *("--logit-bias", '{"7": -5, "8": 2.5}', "--allowed-token-ids", "7", "a prompt"),
    )
    ((prompts, params),) = asked
    assert prompts == ["a prompt"]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 5, 0.1)
    assert (params.seed, params.max_tokens, params.n, params.logprobs) == (3, 9, 2, 1)
    assert (params.stop, params.stop_token_ids, params.ignore_eos) == (("x",), (4,), True)
    penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
    assert penalties == (1.1, 0.2, 0.3)
    assert (params.min_tokens, params.allowed_token_ids) == (2, (7,))
    assert params.logit_bias == {7: -5, 8: 2.5}


@pytest.mark.parametrize(("word", "value"), [("on", True), ("off", False), ("never", "never")])
def test_a_beam_search_may_be_asked_for(cli, asked, word, value):
    cli(
        *("generate", "--beam-width", "4", "--n", "3", "--length-penalty", "0.5"),
        *("--early-stopping", word, "a prompt"),
    )
    ((_, params),) = asked
    assert (params.beam_width, params.n, params.length_penalty) == (4, 3, 0.5)
    assert params.early_stopping is value or params.early_stopping == value == "never"


def test_chat_uses_the_template(cli, asked, tmp_path):
    path = tmp_path / "prompts.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    lines = [
        {"messages": turns, "id": 7},  # somebody's data says more than is for the engine
        {"prompt": "c", "cache_salt": "x", "id": 8},
        {"prompt_token_ids": [1, 2], "id": 9},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    cli("generate", "--chat", "--prompts-file", path, "d")
    prompts = asked[0][0]
    assert prompts[0] == "<user>d"
    assert prompts[1] == {"prompt": "<user>a<assistant>b"}
    assert prompts[2] == {"prompt": "<user>c", "cache_salt": "x"}
    assert prompts[3] == {"prompt_token_ids": [1, 2]}


def test_standard_input_is_one_prompt_and_a_file_is_many(cli, asked):
    cli("generate", stdin="two\nlines\n")
    cli("generate", "--prompts-file", "-", stdin='two\n\n{"prompt": "lines"}\n')
    assert asked[0][0] == ["two\nlines"]
    assert asked[1][0] == ["two", {"prompt": "lines"}]


def test_a_file_of_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("grüße\r\n\n  indented\n".encode())
    assert read_prompts(str(path)) == ["grüße", "  indented"]


@pytest.mark.parametrize("line", ['[{"conversations": []}]', "[1]", "half {", '"text"'])
@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
def test_a_json_file_holds_objects_alone(tmp_path, name, line):
    """What a data set of another shape holds is no prompt."""
    path = tmp_path / name
    path.write_text(f'{{"prompt": "a"}}\n\n{line}\n')
    with pytest.raises(InvalidRequest, match=rf"{name}:3: not a JSON object"):
        read_prompts(str(path))
    path.with_suffix(".txt").write_text(line)
    assert read_prompts(str(path.with_suffix(".txt"))) == [line]


def test_a_terminal_is_not_waited_for(tmp_path):
    class Terminal:
        def isatty(self):
            return True

    with pytest.raises(InvalidRequest, match="there is no prompt"):
        gather_prompts([], None, Terminal())


def test_a_request_that_fails_makes_the_exit_code_1(cli):
    args = ("generate", *TINY, "--ignore-eos", "--max-tokens", 200)
    code, out, err = cli(*args, "--num-blocks", 4, "--block-size", 4, "Hello")
    assert code == 1
    assert out
    assert "outgrown the pool" in err


def test_a_terminal_is_not_steered(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    _print_safely("a\x1b[31mb\tc\r\nd\x9b")
    assert capsys.readouterr().out == "a\ufffd[31mb\tc\ufffd\nd\ufffd"


def test_elsewhere_text_goes_out_as_it_is(capsys):
    _print_safely("a\x1b[31mb")
    assert capsys.readouterr().out == "a\x1b[31mb"


def test_steps_are_shown(cli):
    args = ("generate", *TINY, "--show-steps", "--max-tokens", 4, "--stop", "never", "Hi")
    code, out, err = cli(*args)
    assert code == 0, err
    assert "same token at every step" in out


def completion(index, text, reason=None):
    return CompletionOutput(index=index, text=text, token_ids=[], finish_reason=reason)


def request(number, *completions):
    finished = all(one.finish_reason for one in completions)
    return RequestOutput(
        request_id=str(number),
        prompt=f"prompt {number}",
        prompt_token_ids=[],
        outputs=list(completions),
        finished=finished,
    )


def test_streams_are_printed_in_turn_whatever_their_order(capsys):
    printer = _Printer(2, 1)
    printer.show(1, request(1, completion(0, "B")))
    assert capsys.readouterr().out == ""
    printer.show(0, request(0, completion(0, "A")))
    assert capsys.readouterr().out == "[0] prompt 0\nA"
    printer.show(1, request(1, completion(0, "BB", "length")))
    assert capsys.readouterr().out == ""
    printer.show(0, request(0, completion(0, "AA", "stop")))
    assert capsys.readouterr().out == "A\n[1] prompt 1\nBB\n"


def test_a_stream_without_text_still_has_its_heading(capsys):
    printer = _Printer(2, 1)
    printer.show(0, request(0, completion(0, "")))
    printer.show(0, request(0, completion(0, "", "stop")))
    assert capsys.readouterr().out == "[0] prompt 0\n\n"


def test_news_tells_an_end_once():
    printer = _Printer(1, 2)
    first = request(0, completion(0, "a", "stop"), completion(1, "b"))
    second = request(0, completion(0, "a", "stop"), completion(1, "b", "stop"))
    news = [*printer.news(0, first), *printer.news(0, second)]
    assert [(row["output"], row["delta"], row["finish_reason"]) for row in news] == [
        (0, "a", "stop"),
        (1, "b", None),
        (1, "", "stop"),
    ]
