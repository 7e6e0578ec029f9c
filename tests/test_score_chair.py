"""CHAIR on COCO: the published word vectors and tables, the tagger and tokens against NLTK, sums by hand."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from tests.score_files import DATA, needs, rows_of, write_lines
from vlm_attn.evaluation.scorers import score_file
from vlm_attn.evaluation.scorers.chair import finished, ground_truth
from vlm_attn.evaluation.words import tokens as word_tokens
from vlm_attn.evaluation.words.coco import coco_words_a, coco_words_b, read_synonyms
from vlm_attn.evaluation.words.lemmas import Language, load_language
from vlm_attn.evaluation.words.singular import load_singular
from vlm_attn.evaluation.words.tagger import Tagger
from vlm_attn.evaluation.words.tokens import treebank_tokens

CHAIR = DATA / "chair"
pytestmark = needs("chair")


@pytest.fixture(scope="module")
def language() -> Language:
    return load_language(CHAIR / "lemmatizer")


@pytest.fixture(scope="module")
def captions() -> list[str]:
    """Sentences over the vocabulary of COCO captions, with punctuation that tokenizers treat specially."""
    rng = random.Random(0)
    words = [line.split("\t")[0] for line in (CHAIR / "token_forms.tsv").read_text().splitlines()[1:]]
    common = (
        "the", "a", "an", "is", "are", "of", "in", "on", "with", "and", "two", "near", "while", "there", "it", "image",
        "man's", "isn't", "U.S.", "1,000", "(left)", '"red"',
        "“sky”", "it’s", "'red'", "dog/cat", "t-shirt", "**red**", "1.", "5%", "\u200bx", "the\u00a0end", "a—b",
    )  # fmt: skip
    out = []
    for _ in range(60):
        sentences = [
            " ".join(
                rng.choice(common) if rng.random() < 0.5 else rng.choice(words) for _ in range(rng.randint(1, 15))
            )
            for _ in range(rng.randint(1, 4))
        ]
        out.append(" ".join(s + rng.choice([".", "!", ", too.", "?", "...", ";"]) for s in sentences))
    return out


@pytest.mark.parametrize(
    ("caption", "rule", "lemma"),
    [
        ("a passenger train and a baby elephant", ["train", "elephant"], ["train", "elephant"]),
        ("a bus stop with two buses", ["bus"], ["bus", "bus"]),
        ("she is seated while skiing", [], ["chair", "skis"]),
        ("a tennis racket and tennis balls", ["tennis racket", "sports ball"], ["tennis racket", "sports ball"]),
        ("a toilet seat next to a seat", ["toilet"], ["toilet"]),
        ("two ties and knives", ["knife"], ["tie", "knife"]),
        ("the train tracks", [], []),
        ("skateboarding on a skateboard", ["skateboard"], ["skateboard", "skateboard"]),
        ("parking meters", ["parking meter"], []),
        ("a dining table", ["dining table"], ["dining table"]),
        ("the people are training", ["person"], ["person", "train"]),
        ("A Toilet. A seat!", ["toilet"], ["toilet"]),
        ("two wine glasses and a bow tie", ["wine glass", "tie"], ["wine glass", "tie"]),
    ],
)
def test_published_word_vectors(caption: str, rule: list[str], lemma: list[str], language: Language) -> None:
    nodes = read_synonyms(CHAIR / "synonyms.txt")
    singular = load_singular(CHAIR / "singularize_rules.json")
    assert coco_words_a(nodes, singular).mentions(caption) == rule
    assert coco_words_b(nodes, language).mentions(caption) == lemma


def test_singulars_and_lemmas_equal_the_published_table(language: Language) -> None:
    singular = load_singular(CHAIR / "singularize_rules.json")
    rows = [line.split("\t") for line in (CHAIR / "token_forms.tsv").read_text().splitlines()[1:]]
    assert len(rows) == 9258
    wrong = [
        row for row in rows if [singular(row[0]), language.lemma(row[0], "n"), language.lemma(row[0], "v")] != row[1:]
    ]
    assert wrong == []


def test_the_synonym_table_holds_its_quirks() -> None:
    nodes = read_synonyms(CHAIR / "synonyms.txt")
    assert len(nodes) == 403
    assert len(set(nodes.values())) == 80
    assert {form for form in nodes if form.startswith(" ")} == {" motor bike", " cheesecake"}
    assert nodes["chesterfield"] == "couch"  # its line ends with a blank


def test_tags_equal_those_of_nltk(language: Language, captions: list[str]) -> None:
    from nltk.tag.perceptron import PerceptronTagger  # type: ignore[import-untyped]

    with gzip.open(CHAIR / "lemmatizer" / "perceptron_tagger.json.gz", "rt") as file:
        data = json.load(file)
    theirs = PerceptronTagger(load=False)
    theirs.model.weights, theirs.tagdict = data["weights"], data["tagdict"]
    theirs.classes = theirs.model.classes = set(data["classes"])
    for caption in captions:
        words = treebank_tokens(caption)
        assert language.tagger.tag(words) == [tag for _, tag in theirs.tag(words)]


def test_equal_scores_go_to_the_larger_tag() -> None:
    assert Tagger({"bias": {"NN": 1.0, "VB": 1.0}}, {}, ["NN", "VB", "JJ"]).tag(["x"]) == ["VB"]
    assert Tagger({}, {"the": "DT"}, ["NN", "VB"]).tag(["the", "x"]) == ["DT", "VB"]


def test_short_cut_tokens_equal_those_of_nltk(captions: list[str]) -> None:
    from nltk.tokenize.destructive import NLTKWordTokenizer  # type: ignore[import-untyped]

    theirs = NLTKWordTokenizer()
    odd = [
        "I cannot, see it.",
        "a-b--c.",
        "gonna go",
        "end,.",
        "dog,",
        "x",
        "1,5 m",
        "blue-ish, a T-shirt!",
        "a,b",
        "¿no?",
    ]
    sentences = odd + [part for text in captions for part in word_tokens._SENTENCE_END.split(text)]
    assert any(word_tokens._PLAIN.fullmatch(s) for s in sentences)
    for sentence in sentences:
        assert treebank_tokens(sentence) == theirs.tokenize(sentence)
    assert treebank_tokens("A dog. A cat.") == ["A", "dog", ".", "A", "cat", "."]  # not "dog."


def test_sums_by_hand(tmp_path: Path) -> None:
    truth = {v: ground_truth(CHAIR / f"gt_objects_val2014_{v}.json") for v in "AB"}
    assert truth["B"]["42"] == {"dog"}
    image = next(i for i, objects in truth["B"].items() if objects == {"person", "car"} == truth["A"][i])
    rows = [
        {"image_id": 42, "caption": "Two dogs and a dog. A bus."},
        {"image_id": f"COCO_val2014_{int(image):012d}.jpg", "caption": "A man."},
    ]
    report = score_file("chair", write_lines(tmp_path / "c.jsonl", rows), DATA)
    assert report.metrics == {
        "chair_s": pytest.approx(1 / 2),
        "chair_i": pytest.approx(1 / 4),
        "recall": pytest.approx(2 / 3),  # dog; person but no car
        "precision": pytest.approx(2 / 3),  # dog and bus; person
        "f1": pytest.approx(2 / 3),
        "len_words": pytest.approx(4.5),
        "len_tokens": pytest.approx(6),
    }
    first = report.samples[0]
    assert first["BB"]["mentions"] == first["BA"]["mentions"] == ["dog", "dog", "bus"]
    assert first["BB"]["hallucinated"] == ["bus"]
    assert first["A"] == {"mentions": ["dog", "dog"], "hallucinated": [], "n_found": 1, "n_truth": 1, "len_words": 7,
                          "len_tokens": 9}  # fmt: skip
    assert (report.groups["A"]["chair_s"], report.groups["A"]["chair_i"]) == (0, 0)
    assert score_file("chair", tmp_path / "c.jsonl", CHAIR, variant="A").metrics["chair_i"] == 0


def test_ground_truths_differ_between_the_variants(tmp_path: Path) -> None:
    """An object that only variant B's reading of the references knows is hallucinated in BA and not in BB."""
    truth = {v: ground_truth(CHAIR / f"gt_objects_val2014_{v}.json") for v in "AB"}
    image, thing = next((i, min(truth["B"][i] - truth["A"][i])) for i in truth["B"] if truth["B"][i] - truth["A"][i])
    path = write_lines(tmp_path / "c.jsonl", [{"image_id": int(image), "caption": f"a {thing}"}])
    groups = score_file("chair", path, DATA).groups
    assert (groups["BA"]["chair_i"], groups["BB"]["chair_i"]) == (1, 0)


def test_known_subsets_are_named_and_may_be_demanded(tmp_path: Path) -> None:
    lists = json.loads((CHAIR / "image_ids_500.json").read_text())
    rows = [{"image_id": i, "caption": "a cat"} for i in lists["opera500"]]
    path = write_lines(tmp_path / "c.jsonl", rows)
    report = score_file("chair", path, DATA, ids="opera500")
    assert (report.n, report.settings["images"]) == (500, "opera500")
    low, high = (report.details["intervals"]["chair_s"][side] for side in ("low", "high"))
    assert low < report.metrics["chair_s"] < high
    write_lines(path, rows[1:])
    with pytest.raises(ValueError, match="1 missing"):
        score_file("chair", path, DATA, ids="opera500")
    with pytest.raises(ValueError, match="Unknown image list"):
        score_file("chair", path, DATA, ids="opera")


def test_captions_that_cannot_be_scored(tmp_path: Path) -> None:
    def refused(rows: list[dict[str, object]], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            score_file("chair", write_lines(tmp_path / "c.jsonl", rows), DATA)

    refused([{"image_id": 1, "caption": "x"}], "not in COCO val2014")
    refused([{"image_id": 42, "caption": "x"}, {"image_id": "42", "caption": "y"}], "two captions")
    refused([{"caption": "x"}], "names no image")
    with pytest.raises(ValueError, match="Did you mean 'BB'"):
        score_file("chair", tmp_path / "c.jsonl", DATA, variant="B")


def test_hostile_captions_have_a_defined_score(tmp_path: Path) -> None:
    texts = ["", "犬 🐕", "dog" * 300_000, "dog " * 10_000, "\x00 dog", "....." * 1000]
    images = list(json.loads((CHAIR / "gt_objects_val2014_B.json").read_text())["objects"])[: len(texts)]
    rows = [{"image_id": int(i), "caption": t} for i, t in zip(images, texts, strict=True)]
    report = score_file("chair", write_lines(tmp_path / "c.jsonl", rows), DATA)
    assert [len(row["BB"]["mentions"]) for row in report.samples] == [0, 0, 0, 10_000, 1, 0]


def test_an_unfinished_sentence_may_be_left_out(tmp_path: Path) -> None:
    assert finished("A dog. A ca") == "A dog."
    assert finished("A dog") == "A dog"
    path = write_lines(tmp_path / "c.jsonl", [{"image_id": 42, "caption": "A dog. A cat and"}])
    assert score_file("chair", path, DATA).metrics["chair_i"] == 0.5
    assert score_file("chair", path, DATA, truncate=True).metrics["chair_i"] == 0


@needs("pope")
def test_pope_labels_equal_membership_in_the_ground_truth() -> None:
    """Image numbers and class names at once, over all 9,000 COCO questions."""
    truth = ground_truth(CHAIR / "gt_objects_val2014_A.json")
    asked = 0
    for split in ("random", "popular", "adversarial"):
        for row in rows_of(DATA / "pope" / f"coco_pope_{split}.jsonl"):
            thing = row["text"].removeprefix("Is there ").removesuffix(" in the image?").split(" ", 1)[1]
            image = str(int(row["image"].removesuffix(".jpg")[-12:]))
            assert (thing in truth[image]) == (row["label"] == "yes")
            asked += 1
    assert asked == 9000
