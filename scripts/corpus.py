"""Text for training a tiny model: conversations in simple English, made by this file alone.

Every conversation is a function of (seed, number): the same on every Python version, with no text of anybody else, so
that it falls under this project's license. The kinds ask different things of a model: facts of an invented country
have to be learned by heart, stories and stocks have to be remembered over some hundred tokens, sums, lists and code
have to be worked out, and in prose words follow one another by habits that are only more or less likely.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache

Message = dict[str, str]
Conversation = list[Message]

HELD_OUT_PART = 32
"""One conversation in so many is held out."""


class Chance:
    """Random choices. Python promises the same `random()` in every version, and nothing of its other methods."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random

    def below(self, count: int) -> int:
        return int(self._random() * count)

    def between(self, least: int, most: int) -> int:
        return least + self.below(most - least + 1)

    def happens(self, probability: float) -> bool:
        return self._random() < probability

    def pick(self, items: Sequence[str]) -> str:
        return items[self.below(len(items))]

    def likely(self, items: Sequence[str]) -> str:
        """Early items more often than late ones: the first of ten comes up 32 times in 100, the last 5 times."""
        return items[int(len(items) * self._random() ** 2)]

    def several(self, items: Sequence[str], count: int) -> list[str]:
        """`count` different items."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def phrases(text: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for phrase in text.split(","))


NAMES = words("Ada Ben Clara David Emma Felix Greta Hugo Ida Jonas Karin Leo Mia Nora Oskar Paula Robin Sara Tom Vera")
ANIMALS = words("cat dog goat horse crow fox hedgehog donkey swan lynx hare")
COLOURS = words("red green blue yellow white black grey brown silver golden")
FRUITS = words("apples pears plums cherries figs lemons nuts grapes berries quinces")
NOUNS = words(
    "barrel basket bell boat book bottle box broom bucket candle carpet chair clock coat drum flute hammer jar "
    "kettle key kite knife ladder lamp letter map mirror needle pan pencil pillow plate ring rope saddle scarf "
    "shell shovel spoon stone sword table tent violin wheel whistle window"
)
PLACES = phrases(
    "the old harbour, the stone bridge, the water mill, the village school, the north gate, the market square, "
    "the winter garden, the bell tower, the ferry house, the salt cellar, the apple orchard, the town library, "
    "the clay pit, the mountain hut, the empty barn, the lighthouse, the railway station, the bakery"
)
WEATHER = phrases(
    "it rained all day, the wind blew from the sea, snow lay on the roofs, the sun was warm, fog hid the hills, "
    "the night was clear, a storm was coming, the air smelled of hay"
)
FEELINGS = words("glad sad tired proud afraid curious calm angry hungry surprised")
TRADES = words("baker smith weaver miller fisher painter carpenter teacher gardener sailor tailor shepherd")
MONTHS = words("January February March April May June July August September October November December")
VERBS = words(
    "carried painted broke found sold lost hid cleaned wanted opened followed washed turned kept moved watched "
    "repaired covered drew measured praised filled burned pulled pushed lifted named counted shook touched crossed held"
)
ADJECTIVES = words(
    "old new small large heavy light dark bright round long short thin thick cold warm dry wet quiet loud strange "
    "plain broken clean dirty soft hard rare cheap empty full sharp sweet slow narrow"
)
ADVERBS = words(
    "slowly quickly always never often early late gladly carefully silently again together alone twice badly well"
)
MATERIALS = {
    "wood": ("sand it along the grain", "rub linseed oil into it", "keep it away from the stove"),
    "iron": ("brush off the rust", "grease it with a thin film of wax", "heat it slowly until it glows"),
    "clay": ("wet it with a sponge", "smooth the cracks with slip", "let it dry in the shade for three days"),
    "glass": ("hold it with a dry cloth", "polish it with chalk and water", "never pour hot water into it"),
    "leather": ("warm it in the sun", "work fat into the seams", "stuff it with straw so that it keeps its form"),
    "wool": ("wash it in cold water", "press it between two towels", "lay it flat until it is dry"),
    "copper": ("scour it with salt and vinegar", "rinse it at once", "tin the inside before you cook in it"),
    "paper": ("flatten it under a heavy board", "close the tears with thin paste", "keep it out of the light"),
}
THING_OF = {
    "wood": words("ladder chair table broom barrel"),
    "iron": words("hammer shovel knife key pan"),
    "clay": words("jar plate bottle whistle"),
    "glass": words("mirror window lamp"),
    "leather": words("saddle drum coat"),
    "wool": words("scarf carpet pillow"),
    "copper": words("kettle bell bucket"),
    "paper": words("book letter map kite"),
}
SYSTEMS = (
    "You are a helpful assistant.", "Answer briefly.", "You know the country of Varland well.",
    "You are a patient teacher.", "You tell stories to children.",
)  # fmt: skip


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


# ------------------------------------------------------------------------------------------ facts learned by heart


@cache
def towns() -> dict[str, dict[str, str]]:
    """120 towns of an invented country and what there is to know of each."""
    chance = Chance("the towns of Varland")
    starts, ends = (
        words("Al Bre Cor Dun El Fas Gor Hol Ist Kar Lin Mor"),
        words("mar den wick burg stad ra lon vik holm ta"),
    )
    rivers, crafts = (
        words("Aro Belm Cind Drave Ess Ilse Morn Tarn"),
        words("cheese glass salt wool paper honey bells boats clocks"),
    )
    found: dict[str, dict[str, str]] = {}
    for name in (start + end for start in starts for end in ends):
        found[name] = {
            "river": chance.pick(rivers),
            "craft": chance.pick(crafts),
            "year": str(chance.between(1100, 1899)),
            "mayor": f"{chance.pick(NAMES)} {chance.pick(TRADES).capitalize()}",
            "month": chance.pick(MONTHS),
            "people": str(chance.between(2, 98)),
        }
    names = list(found)
    for name in names:
        found[name]["neighbour"] = chance.pick([other for other in names if other != name])
    return found


FACTS: dict[str, tuple[tuple[str, ...], str]] = {
    "river": (("Which river flows through {t}?", "What is the river of {t} called?"), "The {x} flows through {t}."),
    "craft": (("What is {t} known for?", "What do they make in {t}?"), "{t} is known for its {x}."),
    "year": (("When was {t} founded?", "How old is {t}?"), "{t} was founded in {x}."),
    "mayor": (("Who is the mayor of {t}?", "Who governs {t}?"), "The mayor of {t} is {x}."),
    "month": (("When is the festival of {t}?", "In which month does {t} celebrate?"), "{t} has its festival in {x}."),
    "people": (("How many people live in {t}?", "How large is {t}?"), "About {x} thousand people live in {t}."),
    "neighbour": (("Which town is next to {t}?", "Where leads the road of {t}?"), "The road from {t} leads to {x}."),
}  # fmt: skip


def town(chance: Chance) -> Iterator[Message]:
    """Questions about towns; a question about "it" or about the next town needs the one before."""
    known = towns()
    name = chance.pick(list(known))
    for turn, key in enumerate(chance.several(list(FACTS), chance.between(2, 5))):
        questions, answer = FACTS[key]
        yield user(chance.pick(questions).format(t=name if turn == 0 or chance.happens(0.5) else "it"))
        yield assistant(answer.format(t=name, x=known[name][key]))
        if key == "neighbour":
            name = known[name]["neighbour"]
            yield user("Tell me about that town.")
            yield assistant(" ".join(FACTS[k][1].format(t=name, x=known[name][k]) for k in ("craft", "river", "year")))


# ------------------------------------------------------------------------------------------ remembered


def story(chance: Chance) -> Iterator[Message]:
    """A story, then questions about it."""
    hero, friend = chance.several(NAMES, 2)
    trade, animal, colour = chance.pick(TRADES), chance.pick(ANIMALS), chance.pick(COLOURS)
    thing, gift = chance.several(NOUNS, 2)
    places = chance.several(PLACES, 3)
    feelings = chance.several(FEELINGS, 2)
    lines = [f"{hero} was a {trade} and lived near {places[0]} with a {animal}."]
    lines.append(f"One morning {chance.pick(WEATHER)}, and {hero} could not find the {colour} {thing}.")
    for _ in range(chance.between(1, 4)):
        lines.append(_scene(chance, hero, friend, animal))
    lines.append(f"At {places[1]} {hero} met {friend}, who was {feelings[0]} and carried a {gift}.")
    for _ in range(chance.between(0, 4)):
        lines.append(_scene(chance, hero, friend, animal))
    lines.append(f"In the evening they found the {thing} at {places[2]}, and {hero} was {feelings[1]} again.")
    yield user(chance.pick((f"Tell me a story about {hero}.", f"I want to hear of {hero} and the {thing}.")))
    yield assistant(" ".join(lines))
    asked = {
        f"Where was the {thing}?": f"The {thing} was at {places[2]}.",
        f"What did {friend} carry?": f"{friend} carried a {gift}.",
        f"Where did {hero} meet {friend}?": f"{hero} met {friend} at {places[1]}.",
        f"What was the trade of {hero}?": f"{hero} was a {trade}.",
        f"Which animal lived with {hero}?": f"A {animal} lived with {hero}.",
        f"What colour was the {thing}?": f"The {thing} was {colour}.",
        f"How did {friend} feel?": f"{friend} was {feelings[0]}.",
    }
    for question in chance.several(list(asked), chance.between(1, 4)):
        yield user(question)
        yield assistant(asked[question])


def _scene(chance: Chance, hero: str, friend: str, animal: str) -> str:
    noun, place, name = chance.pick(NOUNS), chance.pick(PLACES), chance.pick((hero, friend))
    if chance.happens(0.4):
        return sentence(chance, noun)[0]
    return chance.pick(
        (
            f"The {animal} looked behind the {noun}, but there was only a {chance.pick(ANIMALS)}.",
            f"{name} asked a {chance.pick(TRADES)} at {place}, who knew nothing of it.",
            f'"Perhaps it is near {place}," said {name}, and they went there because {chance.pick(WEATHER)}.',
            f"They bought {chance.between(2, 9)} {chance.pick(FRUITS)} and shared them with the {animal}.",
            f"{name} was {chance.pick(FEELINGS)} and sang a song about a {chance.pick(COLOURS)} {noun}.",
            f"Then {name} opened the door of {place} and saw a {noun} and a {chance.pick(NOUNS)}.",
        )
    )


@cache
def habits() -> dict[str, tuple[str, ...]]:
    """What goes with what, the likeliest first: "noun adjectives", "noun verbs", "verb objects" -> words.

    They are drawn once, like the towns, so a model has to learn them, and how likely each is.
    """
    chance, nouns = Chance("the habits of Varland"), NOUNS + ANIMALS
    found: dict[str, tuple[str, ...]] = {}
    for noun in nouns:
        found[f"{noun} adjectives"] = tuple(chance.several(ADJECTIVES, 8))
        found[f"{noun} verbs"] = tuple(chance.several(VERBS, 8))
    for verb in VERBS:
        found[f"{verb} objects"] = tuple(chance.several(nouns, 12))
        found[f"{verb} adverbs"] = tuple(chance.several(ADVERBS, 4))
    return found


def sentence(chance: Chance, subject: str) -> tuple[str, str]:
    """A sentence about a noun, and the noun that it ends up with."""
    known = habits()
    verb = chance.likely(known[f"{subject} verbs"])
    thing = chance.likely(known[f"{verb} objects"])
    adjective, other = chance.likely(known[f"{subject} adjectives"]), chance.likely(known[f"{thing} adjectives"])
    adverb, place, name = chance.likely(known[f"{verb} adverbs"]), chance.likely(PLACES), chance.likely(NAMES)
    after = chance.likely(known[f"{thing} verbs"])
    last = chance.likely(known[f"{after} objects"])
    forms = (
        (f"The {adjective} {subject} {verb} the {other} {thing}.", thing),
        (f"The {subject} of {name} {adverb} {verb} a {thing}, and the {thing} {after} the {last}.", last),
        (f"At {place} the {subject} {verb} the {thing} {adverb}.", thing),
        (f"{name} saw how the {subject} {verb} a {other} {thing} near {place}.", thing),
        (f"When the {subject} {verb} the {thing}, the {last} was {adjective} and {other}.", last),
        (f"No {subject} ever {verb} a {thing} so {adverb}.", subject),
    )
    return forms[chance.below(len(forms))]


def prose(chance: Chance) -> Iterator[Message]:
    """Sentences without a story: each goes on from the last one, words follow one another by habit."""
    subject = chance.pick(NOUNS + ANIMALS)
    yield user(chance.pick((f"Write about the {subject}.", f"What happened to the {subject}?", f"A text: {subject}.")))
    lines = []
    for _ in range(chance.between(4, 12)):
        line, following = sentence(chance, subject)
        lines.append(line)
        subject = following if chance.happens(0.7) else subject
    yield assistant(" ".join(lines))


def stock(chance: Chance) -> Iterator[Message]:
    """Somebody has things, gets and gives some, and is asked what is left."""
    owner, other = chance.several(NAMES, 2)
    kinds = chance.several(FRUITS, chance.between(2, 4))
    counts = {kind: chance.between(3, 12) for kind in kinds}
    lines = [f"{owner} has {listed([f'{count} {kind}' for kind, count in counts.items()])}."]
    for _ in range(chance.between(1, 5)):
        kind, number = chance.pick(kinds), chance.between(2, 4)
        if counts[kind] >= number and chance.happens(0.6):
            counts[kind] -= number
            lines.append(f"{owner} gives {number} {kind} to {other}.")
        else:
            counts[kind] += number
            lines.append(f"{owner} buys {number} more {kind}.")
    yield user(" ".join(lines) + f" How many {kinds[0]} does {owner} have?")
    yield assistant(f"{owner} has {counts[kinds[0]]} {kinds[0]}.")
    for kind in kinds[1:]:
        yield user(f"And how many {kind}?")
        yield assistant(f"{owner} has {counts[kind]} {kind}.")


# ------------------------------------------------------------------------------------------ worked out


def spaced(number: int) -> str:
    """Digits with spaces, so that each is a token."""
    return " ".join(str(number))


def sums(chance: Chance) -> Iterator[Message]:
    """Addition digit by digit, from the last to the first."""
    for _ in range(chance.between(1, 3)):
        a, b = chance.between(11, 999), chance.between(11, 999)
        yield user(f"Add {spaced(a)} and {spaced(b)}.")
        steps, carry, left, right = [], 0, a, b
        while left or right or carry:
            x, y = left % 10, right % 10
            total = x + y + carry
            steps.append(f"{x} + {y}{' + 1' if carry else ''} = {spaced(total)}")
            carry, left, right = total // 10, left // 10, right // 10
        yield assistant(f"{'; '.join(steps)}. The sum is {spaced(a + b)}.")


def tables(chance: Chance) -> Iterator[Message]:
    """Multiplication tables and comparisons."""
    for _ in range(chance.between(2, 5)):
        a, b = chance.between(2, 12), chance.between(2, 12)
        if chance.happens(0.6):
            yield user(chance.pick((f"What is {a} times {b}?", f"{a} * {b} = ?", f"How much are {a} boxes of {b}?")))
            yield assistant(f"{a} times {b} is {a * b}.")
        else:
            yield user(f"Which is larger, {a} or {b}?")
            yield assistant("They are equal." if a == b else f"{max(a, b)} is larger than {min(a, b)}.")


def lists(chance: Chance) -> Iterator[Message]:
    """The same words sorted, backwards, counted, without one."""
    items = chance.several(NOUNS, chance.between(3, 7))
    yield user(f"Here is a list: {', '.join(items)}. Sort it.")
    yield assistant(f"{', '.join(sorted(items))}.")
    gone = chance.pick(items)
    more = {
        "Say it backwards.": f"{', '.join(reversed(items))}.",
        f"Leave out the {gone}.": f"{', '.join(item for item in items if item != gone)}.",
        "How many words has it?": f"The list has {len(items)} words.",
        "What is the first word?": f"The first word is {items[0]}.",
        "What is the last word?": f"The last word is {items[-1]}.",
    }
    for question in chance.several(list(more), chance.between(1, 3)):
        yield user(question)
        yield assistant(more[question])


def code(chance: Chance) -> Iterator[Message]:
    """A small Python function, and what it returns."""
    name, a, b, n = chance.pick(NOUNS), chance.between(2, 5), chance.between(1, 9), chance.between(1, 9)
    yield user(f"Write a Python function {name} that multiplies by {a} and adds {b}.")
    yield assistant(f"def {name}(x):\n    y = {a} * x\n    return y + {b}\n")
    yield user(f"What is {name}({n})?")
    yield assistant(f"{a} * {n} = {a * n}, and {a * n} + {b} = {a * n + b}. So {name}({n}) is {a * n + b}.")
    if chance.happens(0.5):
        yield user("Write it as a loop over a list.")
        loop = f"    out = []\n    for x in items:\n        out.append({name}(x))\n    return out\n"
        yield assistant(f"def {name}_all(items):\n{loop}")


def advice(chance: Chance) -> Iterator[Message]:
    """How to repair a thing, which depends on what it is made of."""
    for _ in range(chance.between(1, 3)):
        material = chance.pick(list(MATERIALS))
        thing, colour = chance.pick(THING_OF[material]), chance.pick(COLOURS)
        yield user(chance.pick((f"How do I repair a {colour} {thing}?", f"My {colour} {thing} is broken. What now?")))
        steps = MATERIALS[material]
        order = chance.pick(("First", "To begin with"))
        text = f"A {thing} is made of {material}. {order}, {steps[0]}. Then {steps[1]}. And {steps[2]}."
        end = chance.pick(
            ("", f" After that the {colour} {thing} is as good as new.", f" A {chance.pick(TRADES)} can help.")
        )
        yield assistant(text + end)


KINDS: tuple[Callable[[Chance], Iterator[Message]], ...] = (
    story, story, story, story, prose, prose, prose, prose, town, town, town, stock, sums, tables, lists, code, advice,
)  # fmt: skip
"""Each as often as it stands here."""


def conversation(seed: int, number: int) -> Conversation:
    """Conversation `number` of a corpus."""
    chance = Chance(f"{seed}:{number}")
    kind = KINDS[chance.below(len(KINDS))]
    system = [{"role": "system", "content": chance.pick(SYSTEMS)}] if chance.happens(0.2) else []
    return [*system, *kind(chance)]


def is_held_out(messages: Conversation) -> bool:
    """By a hash of what is said, so that a conversation that occurs twice is on one side."""
    text = "\n".join(message["content"] for message in messages if message["role"] != "system")
    return hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_PART == 0


def split(seed: int, count: int) -> tuple[list[Conversation], list[Conversation]]:
    """`count` conversations as (training, held out)."""
    training: list[Conversation] = []
    held_out: list[Conversation] = []
    for number in range(count):
        messages = conversation(seed, number)
        (held_out if is_held_out(messages) else training).append(messages)
    return training, held_out
