"""The demo end to end on a tiny model, its users, its progress and its picture."""

import io
import re
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from pagedkv import Engine, InvalidRequest, Scheduler, SchedulerStats, StepResult
from pagedkv.cli.dashboard import PlainDashboard, Progress, RichDashboard, dashboard
from pagedkv.cli.lessons import find_lessons, widest_spot
from pagedkv.cli.users import make_users
from pagedkv.timeline import CACHED, FREE, SHARED, TimelineRecorder
from tests.core.fakes import VOCAB, make_config, make_request

SMALL = ("demo", "--model", "tiny-random", "--users", "7", "--max-tokens", "16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


def number(out, word):
    """The number in a row of the summary."""
    return int(re.search(rf"^  {word} +([\d,]+)", out, re.MULTILINE)[1].replace(",", ""))


def test_the_demo_serves_everybody_from_too_few_blocks(cli, folder):
    outcome = cli(*SMALL, "--output", folder / "scarce", "--num-blocks", 46)
    assert outcome.code == 0, outcome.err
    assert number(outcome.out, "requests") == 7
    assert "8 answers" in outcome.out  # one of the seven wants two
    assert number(outcome.out, "peak blocks") == 46
    assert number(outcome.out, "preemptions") > 0
    assert number(outcome.out, "copies") == 1
    assert "done  7/7" in outcome.out
    assert str(folder / "scarce" / "blocks.png") in outcome.out
    assert max(map(len, outcome.lines)) <= 100 + len(str(folder))
    answers = (folder / "scarce" / "answers.txt").read_text(encoding="utf-8")
    assert answers.count("## user ") == 7


def test_the_picture_is_a_png_of_some_size(folder):
    head = (folder / "scarce" / "blocks.png").read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", head[16:24])
    assert width > 1200
    assert height > 800


def test_scarcity_changes_no_answer(cli, folder):
    outcome = cli(*SMALL, "--output", folder / "ample", "--num-blocks", 900)
    assert number(outcome.out, "preemptions") == 0
    scarce, ample = (folder / name / "answers.txt" for name in ("scarce", "ample"))
    assert scarce.read_bytes() == ample.read_bytes()


def test_without_matplotlib_there_is_a_hint_instead_of_a_picture(cli, folder, monkeypatch):
    for name in [n for n in sys.modules if n.startswith("matplotlib") or n.endswith("cli.picture")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = cli("demo", "--model", "tiny-random", "--users", 1, "--output", folder / "bare")
    assert outcome.code == 0
    assert "pagedkv[plot]" in outcome.out
    assert not (folder / "bare" / "blocks.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--users", "0"), "--users: 0 is too small"),
        (("--max-tokens", "1"), "--max-tokens: 1 is too small"),
        (("--num-blocks", "0"), "--num-blocks: 0 is too small"),
        (("--model", "tiny-randm"), "did you mean tiny-random"),
        (("--num-blocks", "3"), "raise cache.num_blocks"),
    ],
)
def test_a_mistake_is_one_line(cli, folder, arguments, words):
    outcome = cli(*SMALL, "--output", folder / "wrong", *arguments)
    assert outcome.code == 2
    assert words in outcome.err
    assert outcome.err.count("\n") == 1


def test_an_output_that_is_a_file_is_refused_before_the_model_is_loaded(cli, tmp_path):
    (tmp_path / "taken").write_text("here")
    outcome = cli(*SMALL, "--output", tmp_path / "taken")
    assert (outcome.code, "--output" in outcome.err, "Loading" in outcome.out) == (2, True, False)


def test_asking_for_help_loads_no_torch():
    code = "import sys, pagedkv.cli.demo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Words:
    """A tokenizer that is all templates."""

    def __init__(self, template):
        self.chat_template = template

    def apply_chat_template(self, messages, **options):
        if self.chat_template == "picky":
            raise ValueError("no system messages")
        return "templated"

    def __call__(self, text):
        return {"input_ids": [text]}


def test_prompts_work_without_a_template_or_with_a_picky_one():
    from pagedkv.cli.tour import encode

    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi?"}]
    texts = [
        encode(SimpleNamespace(tokenizer=Words(template)), messages)
        for template in ("any", "picky", None)
    ]
    assert texts == [["templated"], ["Be kind.\n\nHi?\n\nAnswer:"], ["Be kind.\n\nHi?\n\nAnswer:"]]
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        encode(SimpleNamespace(tokenizer=None, name="x"), messages)


# Users


def test_users_come_in_order_and_some_ask_the_same():
    users = make_users(40, seed=3, longest=50)
    assert users == make_users(40, seed=3, longest=50)
    assert users != make_users(40, seed=4, longest=50)
    assert [user.arrival for user in users] == sorted(user.arrival for user in users)
    assert users[0].arrival == 0
    assert len({user.name for user in users}) == 40
    assert len({user.question for user in users}) < 40
    assert [user.n for user in users].count(2) == 3
    assert all(25 <= user.max_tokens <= 50 for user in users)
    assert len({len(user.question) // 100 for user in users}) > 2, "all questions are alike long"


# Progress


def progress(num_steps=5, **changes):
    owner = np.array([SHARED] * 3 + [0, 0, 13] + [CACHED] * 2 + [FREE] * 152, np.int32)
    counts = dict.fromkeys(SchedulerStats.__struct_fields__, 4) | {"num_steps": num_steps}
    facts = {"num_done": 2, "num_users": 9, "elapsed": 1.0, "latest": "x" * 300}
    return Progress(stats=SchedulerStats(**counts), owner=owner, **(facts | changes))


def test_plain_lines_come_now_and_then_and_at_the_end():
    stream, now = io.StringIO(), [0.0]
    with PlainDashboard(stream, every=3.0, clock=lambda: now[0]) as board:
        for step in range(10):
            now[0] = float(step)
            board.update(progress(step))
    steps = [int(line.split()[1]) for line in stream.getvalue().splitlines()]
    assert steps == [0, 3, 6, 9]


def test_the_last_state_is_shown_even_if_it_comes_early():
    stream = io.StringIO()
    with PlainDashboard(stream, every=3.0, clock=lambda: 0.0) as board:
        board.update(progress(1))
        board.update(progress(2))
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1", "2"]


@pytest.mark.parametrize("width", [60, 100])
def test_the_panel_shows_every_block_and_fits(width):
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, color_system=None)
    with RichDashboard(console) as board:
        board.update(progress())
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", stream.getvalue())
    last = text[text.rindex("╭") :]
    assert max(map(len, last.splitlines())) <= width
    cells = re.sub(r"[^█▒·]", "", last)
    # The line that explains the cells has one of each kind.
    assert (cells.count("█"), cells.count("▒"), cells.count("·")) == (6 + 1, 2 + 1, 152 + 1)
    assert "6 held, 3 of them" in last


def test_lines_are_plain_where_nobody_looks(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert isinstance(dashboard(io.StringIO()), PlainDashboard)
    monkeypatch.setitem(sys.modules, "rich.live", None)
    assert isinstance(dashboard(Terminal()), PlainDashboard)


# The picture


def largest_area(mask):
    """The area of the largest rectangle, by trying them all."""
    steps, blocks = mask.shape
    return max(
        (
            (b - a) * (d - c)
            for a in range(steps)
            for b in range(a + 1, steps + 1)
            for c in range(blocks)
            for d in range(c + 1, blocks + 1)
            if mask[a:b, c:d].all()
        ),
        default=0,
    )


@pytest.mark.parametrize("seed", range(25))
def test_labels_lie_in_the_largest_rectangle(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((6, 7)) < rng.uniform(0.2, 0.95)
    area, spot = largest_area(mask), widest_spot(mask)
    if spot is None:
        assert area == 0
        return
    step, block = spot
    around = [
        (width, height)
        for width in range(1, 7)
        for height in range(1, 8)
        if width * height == area
        and step - width / 2 >= 0
        and block - height / 2 + 0.5 >= 0
        and float(step - width / 2).is_integer()
        and float(block - height / 2 + 0.5).is_integer()
    ]
    assert any(
        mask[
            int(step - width / 2) : int(step + width / 2),
            int(block - height / 2 + 0.5) : int(block + height / 2 + 0.5),
        ].sum()
        == area
        for width, height in around
    )


def test_a_label_needs_room():
    mask = np.zeros((6, 7), bool)
    mask[1:3, 2:6] = True
    assert widest_spot(mask, min_steps=2, min_blocks=4) == (2.0, 3.5)
    assert widest_spot(mask, min_steps=3) is None
    assert widest_spot(mask, min_blocks=5) is None


def crowded(users=9, **request):
    """The timeline of a pool that is too small, made without a model."""

    class Same:
        def execute(self, plan):
            return StepResult(token_ids=np.full(len(plan.sample_rows), 5, np.int32))

    scheduler = Scheduler(make_config(num_blocks=14))
    recorder = TimelineRecorder(scheduler)
    engine = Engine(scheduler, Same(), (recorder,))
    for i in range(users):
        n = 2 if i == 1 else 1
        asked = {"max_tokens": 9 + i % 9, "n": n} | request
        scheduler.add(
            make_request(
                f"user {i}", [*range(8), *((20 + i + k) % VOCAB for k in range(6))], **asked
            )
        )
    for _ in engine.run():
        pass
    return recorder.timeline(), scheduler.stats()


def lessons_of(timeline):
    users = {seq_id: int(name.split()[1]) for seq_id, name in timeline.request_of.items()}
    return {lesson.heading: lesson for lesson in find_lessons(timeline, users, users, 4)}


def test_lessons_tell_what_happened():
    timeline, stats = crowded()
    assert stats.num_preemptions
    lessons = lessons_of(timeline)
    assert len(lessons) == 7
    preempted = lessons["The pool is full: one steps back"]
    at, user, back = map(int, re.findall(r"(?:step|user) (\d+)", preempted.text))
    (span,) = [s for s in timeline.spans if s.end == at and s.preempted and s.seq_id == _id(user)]
    assert any(s.begin == back and s.seq_id == span.seq_id for s in timeline.spans)
    shared = lessons["One copy for all who begin alike"]
    assert timeline.owner[int(shared.step), round(shared.level)] == SHARED
    cached = lessons["Free, but not forgotten"]
    assert timeline.owner[int(cached.step), round(cached.level)] == CACHED
    saved = lessons["More than fits"]
    step, entries, held = map(int, re.findall(r"\d+", saved.text)[:3])
    assert (timeline.num_entries[step], timeline.num_held[step]) == (entries, held)
    waited = lessons["Nobody is turned away"]
    assert f"{timeline.num_waiting.max()} waited" in waited.text


def _id(user):
    """The first sequence of a user, counted from 1, in `crowded`: the second user has two."""
    return user - 1 if user <= 2 else user


def test_there_are_no_lessons_without_examples():
    timeline, _ = crowded(users=1, max_tokens=1)
    assert lessons_of(timeline) == {}


@pytest.mark.parametrize("users", [1, 9, 45])
def test_a_picture_can_be_drawn_of_anything(users, tmp_path):
    from pagedkv.cli.picture import draw_timeline

    timeline, _ = crowded(users=users, **({"max_tokens": 1} if users == 1 else {}))
    path = tmp_path / "blocks.png"
    draw_timeline(timeline, path, title="t", block_size=4, arrivals={"user 0": 0})
    assert path.stat().st_size > 20_000
