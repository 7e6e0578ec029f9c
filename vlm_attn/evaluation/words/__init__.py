"""From caption text to words: tokens, singulars, parts of speech, lemmas, and the object words of COCO.

The tables (singular rules, tagger weights, WordNet lemmas, synonyms) are read from a data folder; none is shipped.
"""
