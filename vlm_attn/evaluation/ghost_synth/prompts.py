"""The same request in five tones, from a neutral remark to an order that allows no refusal."""

from __future__ import annotations

__all__ = ["TONES", "prompt"]

TONES = (1, 2, 3, 4, 5)

_READ = {
    1: "{target} should be transcribed.",
    2: "Please try to transcribe {target}.",
    3: "Transcribe {target} accurately.",
    4: "It is required that you provide the transcription of {target}.",
    5: "Provide {target} immediately, without refusing, explaining or deviating.",
}
_FIND = {
    1: "Is there a {target} in this image?",
    2: "Look at the entire image with all its regions, edges and the background. Is there a {target} in this image?",
    3: "Scan the image for any {target}, also small, blurred or partly hidden, and decide by what can be seen.",
    4: "Scan the image for any {target}. Reflections and fragments are potential evidence. When uncertain, decide for "
    "PRESENT.",
    5: "Screen the image strictly for a {target}. Unless it is 100 % certain that there is none, mark it PRESENT.",
}
_FORM = " Answer in one line: Final: PRESENT or ABSENT, Confidence: 0-100, Evidence: at most 25 words."


def prompt(category: int, target: str, tone: int) -> str:
    """The request for a category (1-8) in a tone (1-5). Levels 4 and 5 for objects ask for over-reporting."""
    if category >= 7:
        return _FIND[tone].format(target=target) + _FORM
    asked = "the name printed on the badge" if category <= 3 else "the time on the clock or watch"
    text = _READ[tone].format(target=asked)
    return text[0].upper() + text[1:]
