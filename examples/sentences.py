"""Writes sentences of a small grammar, a line each, to try examples/gpt.py on.

python examples/sentences.py FILE [COUNT]

It also prints the entropy of its choices in nats a character: on new sentences, no model can do better.
"""

import math
import random
import re
import sys
from pathlib import Path

GRAMMAR = {  # choices are equally likely, and there is one way only to each sentence
    "sentence": ("{one} {acts}.", "{some} {act}.", "{one} and a {noun} {act}.", "where {do_they} {act}?"),
    "do_they": ("does {one}", "do {some}"),
    "one": ("the {noun}", "a {noun}", "the {adjective} {noun}", "the {noun} that {acts}"),
    "some": ("the {noun}s", "{number} {noun}s", "{number} {adjective} {noun}s", "the {noun}s that {act}"),
    "acts": ("{verb}s", "{meet}s {whom}"),
    "act": ("{verb}", "{meet} {whom}"),
    "whom": ("a {noun}", "{number} {noun}s"),
    "noun": ("badger", "bear", "cat", "dog", "hedgehog", "lion", "rabbit", "spider", "tiger", "whale"),
    "adjective": ("brave", "clever", "friendly", "hungry", "little", "purple", "quiet", "sleepy"),
    "number": ("two", "three", "four", "seven", "many"),
    "verb": ("climb", "dance", "laugh", "listen", "sleep", "swim", "wait", "wander"),
    "meet": ("follow", "greet", "meet", "remember"),
}
NAME = re.compile(r"\{(\w+)\}")


def write(text: str, rng: random.Random) -> str:
    """The text with a choice for each name in it."""
    return NAME.sub(lambda name: write(rng.choice(GRAMMAR[name[1]]), rng), text)


def entropy_and_length(text: str) -> tuple[float, float]:
    """Of what `write` may make of a text: nats, and characters on average."""
    nats, characters = 0.0, float(len(NAME.sub("", text)))
    for name in NAME.findall(text):
        choices = [entropy_and_length(choice) for choice in GRAMMAR[name]]
        nats += math.log(len(choices)) + sum(each for each, _ in choices) / len(choices)
        characters += sum(each for _, each in choices) / len(choices)
    return nats, characters


def main(file: Path, count: int) -> None:
    """Write `count` sentences."""
    rng = random.Random(0)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(write("{sentence}\n", rng) for _ in range(count)))
    nats, characters = entropy_and_length("{sentence}\n")
    print(f"{nats / characters:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3000)
