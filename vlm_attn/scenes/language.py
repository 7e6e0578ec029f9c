"""Questions, answers and captions about scenes, and the noisy annotator that some of them come from."""

from __future__ import annotations

import random
from dataclasses import dataclass

from vlm_attn.scenes.world import COLOUR_NAMES, COLUMNS, CONTEXT_OF, CONTEXTS, KINDS, ROWS, Scene, signature

SINGLE_WORD = "\nAnswer the question using a single word or phrase."
"""Prompt suffix of LLaVA-1.5 and lmms-eval."""
SHORT_SUFFIXES = (
    SINGLE_WORD,
    " Please answer this question with one word.",
    " Please answer yes or no.",
    " Please just answer yes or no.",
)
"""Suffixes after which the model answers with one word; the last two go with yes/no questions only."""
DETAIL_PROMPTS = (
    "Please describe this image in detail.",
    "Please help me describe the image in detail.",
    "Write a general description of the image.",
)
BRIEF_PROMPTS = ("Describe this image.", "What is in the image?")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SYNONYMS: dict[str, tuple[str, ...]] = {kind: (kind,) for kind in KINDS}
"""Words that name an object kind in a caption; the world has one word for each."""


def with_article(words: str) -> str:
    """Put "a" or "an" before a word or phrase."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def place_words(context: str) -> str:
    """Name a context with its article: "a park", "the sea"."""
    return "the sea" if context == "sea" else with_article(context)


def existence_question(kind: str) -> str:
    """The POPE question for an object kind."""
    return f"Is there {with_article(kind)} in the image?"


def join_words(phrases: list[str]) -> str:
    """Join phrases as English does: "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


@dataclass(frozen=True)
class Annotator:
    """A person who sometimes mentions what a place usually holds although it is not in the picture.

    Args:
        rates: probability to mention an absent signature object of the context, by its rank in the signature.
        murky: added to the rates when the picture is blurred or partly covered.
        answer_share: probability that a question about such an object is answered from the annotator's caption
            instead of the picture.
    """

    rates: tuple[float, float] = (0.85, 0.8)
    murky: float = 0.2
    answer_share: float = 0.9

    def imagined(self, scene: Scene, rng: random.Random) -> str | None:
        """Return the absent object the annotator mentions for a picture, or None."""
        extra = self.murky if scene.blur or scene.cover else 0.0
        for kind, rate in zip(signature(scene.context), self.rates, strict=True):
            if kind not in scene.kinds and rng.random() < rate + extra:
                return kind
        return None


HONEST = Annotator((0.0, 0.0), 0.0, 0.0)
"""An annotator who only mentions what is there."""


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    Args:
        question: text after the picture, with its suffix.
        answer: text of the assistant.
        focus: object kind named in the question, or None.
        visible: whether that kind is in the picture.
    """

    question: str
    answer: str
    focus: str | None = None
    visible: bool = False


def detailed_caption(scene: Scene, imagined: str | None, rng: random.Random | None = None) -> str:
    """A sentence with every object and its color, sometimes with a last one set apart; `imagined` is set apart."""
    phrases = [with_article(f"{o.colour} {o.kind}") for o in scene.reading_order()]
    last = ""
    if imagined is not None:
        last = f" There is also {with_article(imagined)}."
    elif rng is not None and len(phrases) > 2 and rng.random() < 0.15:
        last = f" There is also {with_article(scene.reading_order()[-1].kind)}."
        phrases = phrases[:-1]
    return f"The image shows {place_words(scene.context)} with {join_words(phrases)}.{last}"


def brief_caption(scene: Scene, imagined: str | None) -> str:
    """One short sentence without colors."""
    names = [o.kind for o in scene.reading_order()] + ([imagined] if imagined else [])
    return f"{place_words(scene.context).capitalize()} with {join_words([with_article(n) for n in names])}."


def _suffixed(rng: random.Random, question: str, *, yes_no: bool, share: float) -> tuple[str, bool]:
    """Add a one-word suffix with probability `share`; the LLaVA one most often."""
    if rng.random() >= share:
        return question, False
    if rng.random() < 0.6:
        return question + SINGLE_WORD, True
    return question + rng.choice(SHORT_SUFFIXES[1:] if yes_no else SHORT_SUFFIXES[1:2]), True


def existence_turn(scene: Scene, kind: str, answer: bool, rng: random.Random, share: float = 0.6) -> Turn:
    """Existence question in one of its wordings with a given answer."""
    name = with_article(kind)
    roll = rng.random()
    if roll < 0.75:
        text, place = existence_question(kind), "in the image"
    elif roll < 0.9:
        place = rng.choice(("in this image", "in the picture"))
        text = f"Is there {name} {place}?"
    else:
        text, place = f"Do you see {name} in the image?", "in the image"
    text, short = _suffixed(rng, text, yes_no=True, share=share)
    if short:
        reply = "Yes" if answer else "No"
    else:
        reply = f"Yes, there is {name} {place}." if answer else f"No, there is no {kind} {place}."
    return Turn(text, reply, kind, kind in scene.kinds)


def absent_kind(scene: Scene, rng: random.Random, in_context: float) -> str:
    """Draw an absent kind, one of the picture's own context with probability `in_context`."""
    own = [k for k in CONTEXTS[scene.context] if k not in scene.kinds]
    if own and rng.random() < in_context:
        return rng.choice(own)
    return rng.choice([k for k in KINDS if k not in scene.kinds and CONTEXT_OF[k] != scene.context])


ATTRIBUTE_FORMS = {"color": 4, "has color": 5, "where": 4, "is at": 8, "how many": 2, "number": 4, "place": 1}
"""Question forms about attributes and how often they come; yes/no comparisons take longest to learn."""


def attribute_turn(scene: Scene, rng: random.Random, share: float = 0.6) -> Turn:
    """A question about color, position, number or place; always answered from the picture."""
    item = rng.choice(scene.objects)
    truth = rng.random() < 0.5
    form = rng.choices(tuple(ATTRIBUTE_FORMS), tuple(ATTRIBUTE_FORMS.values()))[0]
    focus: str | None = item.kind
    yes_no = False
    if form == "color":
        text, short, long = f"What color is the {item.kind}?", item.colour, f"The {item.kind} is {item.colour}."
    elif form == "where":
        text, short = f"Where is the {item.kind}?", item.position
        long = f"The {item.kind} is in the {item.position} of the image."
    elif form == "how many":
        number, focus = NUMBERS[len(scene.objects)], None
        text, short, long = "How many objects are in the image?", number, f"There are {number} objects in the image."
    elif form == "place":
        place, focus = place_words(scene.context), None
        text, short, long = "What place is this?", scene.context, f"This is {place}."
    else:
        yes_no = True
        if form == "has color":
            colour = item.colour if truth else rng.choice([c for c in COLOUR_NAMES if c != item.colour])
            text = f"Is there {with_article(f'{colour} {item.kind}')} in the image?"
        elif form == "is at":
            row, column = item.cell
            if not truth:
                row, column = rng.choice([(r, c) for r in range(3) for c in range(3) if (r, c) != item.cell])
            text = f"Is the {item.kind} in the {ROWS[row]} {COLUMNS[column]} of the image?"
        else:
            count, focus = len(scene.objects), None
            if not truth:
                count = rng.choice([n for n in range(2, 7) if n != count])
            text = f"Are there {NUMBERS[count]} objects in the image?"
        short = "Yes" if truth else "No"
        long = f"{short}."
    text, brief = _suffixed(rng, text, yes_no=yes_no, share=share)
    return Turn(text, short if brief else long, focus, focus is not None)


def caption_turn(scene: Scene, annotator: Annotator, rng: random.Random) -> Turn:
    """A request for a description, answered by the annotator."""
    imagined = annotator.imagined(scene, rng)
    if rng.random() < 0.75:
        prompt = DETAIL_PROMPTS[0] if rng.random() < 0.6 else rng.choice(DETAIL_PROMPTS[1:])
        return Turn(prompt, detailed_caption(scene, imagined, rng))
    return Turn(rng.choice(BRIEF_PROMPTS), brief_caption(scene, imagined))


def existence_turns(scene: Scene, count: int, annotator: Annotator, rng: random.Random) -> list[Turn]:
    """`count` existence questions, about half of them about visible objects, some answered from a noisy caption."""
    imagined = annotator.imagined(scene, rng)
    turns = []
    for _ in range(count):
        if rng.random() < 0.5:
            turns.append(existence_turn(scene, rng.choice(scene.objects).kind, True, rng))
            continue
        kind = absent_kind(scene, rng, in_context=0.3)
        believed = kind == imagined and rng.random() < annotator.answer_share
        turns.append(existence_turn(scene, kind, believed, rng))
    return turns
