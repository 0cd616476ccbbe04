"""The demo's users: what they ask, when they come, how long an answer they want."""

from typing import Any

import numpy as np
from msgspec import Struct

__all__ = ["SYSTEM_PROMPT", "User", "make_users"]

SYSTEM_PROMPT = (
    "You are the assistant at the information desk of a small public library. People of every age "
    "come to you with every kind of question. Answer in plain words and short sentences. Give one "
    "example where it helps. Do not repeat the question. If you do not know something, say so and "
    "name a shelf where the visitor could look."
)

SHORT = (
    "Why is the sky blue?",
    "What is the capital of France?",
    "What is a river?",
    "How do bees make honey?",
    "What does a librarian do all day?",
    "What is a poem?",
    "What is the difference between a frog and a toad?",
    "What is the opposite of hot?",
    "Which planet is the largest?",
    "Where does rain come from?",
    "What is bread made of?",
    "Why do we have seasons?",
    "What is a noun?",
    "What is a library?",
)

MEDIUM = (
    "My daughter is seven and loves volcanoes. How would you explain to her, in three sentences, "
    "what makes a volcano erupt?",
    "I want to start running but I get out of breath after two minutes. Give me a simple plan for "
    "my first week.",
    "I have eggs, rice, an onion and a tin of tomatoes. Suggest one dinner that I can cook in half "
    "an hour, step by step.",
    "I planted tomatoes on my balcony in May, and now their leaves turn yellow. What could be the "
    "reason, and what should I do?",
    "I am reading about the water cycle. Explain the words evaporation, condensation and "
    "precipitation, one sentence each.",
    "My grandfather asks what the internet is. Explain it to him with something that he knows, for "
    "example the post office.",
    "I have to give a talk about recycling at school tomorrow. Give me three points that I could "
    "make, and one number that people remember.",
    "I cannot sleep well when the moon is full. Is that real or do I imagine it, and what could "
    "help me?",
)

LONG = (
    "Please sum this up in one sentence. The old mill at the end of the village stood empty for "
    "thirty years. Last spring a group of neighbours began to repair it in their free time. They "
    "mended the roof, cleaned the wheel and planted a garden. On Saturday the wheel turned again "
    "for the first time, and more than two hundred people came to watch. The mill will now grind "
    "flour for the bakery, and on Sundays there will be tours for children.",
    "Here are my notes from the meeting. The reading room opens at nine from May on. Two chairs "
    "are broken and Ms Alvarez will order new ones. The story hour moves from Tuesday to Thursday "
    "because the music school needs the hall. We still look for somebody who can fix the old "
    "projector. The next meeting is on the third of June. Which of these things need somebody to "
    "do something, and who?",
    "I found this in an old travel book. The road climbs slowly through pine woods until it comes "
    "to a small lake, so still that the mountains stand in it upside down. There is one inn, kept "
    "by two sisters, who cook whatever the lake and the garden give that day. Nobody is in a hurry "
    "there. The bus comes on Mondays and Fridays, if the snow allows. What could I take with me if "
    "I went there for a week in autumn?",
    "Explain to me what this recipe gets wrong. Put two cups of flour, a spoon of salt and a spoon "
    "of yeast in a bowl. Pour a cup of boiling water on the yeast and stir. Knead the dough for "
    "ten minutes. Bake it at once, for four hours, at the lowest heat. Eat the bread while it is "
    "hot, and keep what is left in a wet cloth by the window.",
)


class User(Struct, frozen=True, kw_only=True):
    """One who asks.

    Attributes:
        name: Unique; also the request's id.
        arrival: The engine's step before which the question comes in.
        n: How many answers are wanted.
        max_tokens: The longest answer that is wanted.
    """

    name: str
    question: str
    arrival: int
    n: int
    max_tokens: int

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation, beginning with the instructions that all users share."""
        return [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": self.question},
        ]


def make_users(count: int, *, seed: int, longest: int, mean_gap: float = 2.5) -> list[User]:
    """Return ``count`` users in order of arrival; equal arguments give equal users.

    Every sixth user asks what somebody before them asked, every sixteenth wants two answers.

    Args:
        longest: No answer is longer, in tokens; none is cut below half of it.
        mean_gap: Steps between two arrivals, on average.
    """
    rng = np.random.default_rng(seed)
    kinds = [list(rng.permutation(kind)) for kind in (SHORT, MEDIUM, LONG)]
    gaps = rng.geometric(1 / mean_gap, size=count)
    arrivals = np.cumsum(gaps) - gaps[:1]
    users: list[User] = []
    for i in range(count):
        kind = kinds[(0, 1, 0, 2)[i % 4]]
        question = str(kind[(i // 4) % len(kind)])
        if i % 6 == 5:
            question = users[i - 4].question
        user = User(
            name=f"user {i + 1}",
            question=question,
            arrival=int(arrivals[i]),
            n=2 if i % 16 == 3 else 1,
            max_tokens=int(rng.integers(-(-longest // 2), longest + 1)),
        )
        users.append(user)
    return users
