"""Tokenizer of the `scenes` model: a BPE in which every word of the picture world is one token."""

from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vlm_attn.scenes import language
from vlm_attn.scenes.world import COLOUR_NAMES, COLUMNS, CONTEXTS, KINDS, ROWS

SYSTEM_PROMPT = "A chat about a picture."
UNKNOWN, BOS, EOS, PAD, IMAGE = "<unk>", "<s>", "</s>", "<pad>", "<image>"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages and messages[0]['role'] == 'system' %}{% set start = 1 %}"
    "{% set first = messages[0]['content'] %}"
    "{{ (first if first is string else first | map(attribute='text') | join(' ')) + ' ' }}"
    "{% else %}{% set start = 0 %}{{ '" + SYSTEM_PROMPT + " ' }}{% endif %}"
    "{% for message in messages[start:] %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}{% else %}{{ 'ASSISTANT: ' }}{% endif %}"
    "{% if message['content'] is string %}{% set text = message['content'] %}"
    "{% else %}{% for item in message['content'] if item['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') %}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}{{ text + ' ' }}"
    "{% else %}{% generation %}{{ text + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""LLaVA-1.5's turns behind a short system prompt; every conversation begins with one <s>."""


def world_words() -> list[str]:
    """Every word that questions, answers, captions and the chat template are made of, in a fixed order."""
    sentences = [
        *KINDS,
        *COLOUR_NAMES,
        *CONTEXTS,
        *ROWS,
        *COLUMNS,
        *language.NUMBERS,
        *language.SHORT_SUFFIXES,
        *language.DETAIL_PROMPTS,
        *language.BRIEF_PROMPTS,
        SYSTEM_PROMPT,
        "USER ASSISTANT yes no Yes No YES NO not a an A An The the There there is are Is Are are in of and with",
        "Is there a dog in the image? Is there an apple in this image? Do you see one in the picture? Can you see it",
        "Yes, there is. No, there is no dog. What color is the cup? The cup is red. Where is the boat? objects object",
        "How many objects are in the image? There are four objects in the image. What place is this? This is a park.",
        "Are there four objects in the image? The image shows a park with a tree. There is also a bird. picture shows",
        "I can it this that on at to left right above below under near next only also some other first second both",
        "which Which who Who what when why how does Does did has have photo scene show see look and or but if then",
        "Please please answer describe the sea",
    ]
    words = pre_tokenizers.Sequence(_pre_tokenizers()).pre_tokenize_str(" ".join(sentences).replace("\n", " "))
    return list(dict.fromkeys(word for word, _ in words))


def _pre_tokenizers() -> list[pre_tokenizers.PreTokenizer]:
    return [
        pre_tokenizers.Split(Regex(r"\n"), "isolated"),
        pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
        pre_tokenizers.Punctuation("isolated"),
    ]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer on the world's words; deterministic, takes well under a second."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_pre_tokenizers())
    tokenizer.decoder = decoders.Sequence(
        [decoders.Fuse(), decoders.Replace("▁\n▁", "\n"), decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]
    )
    alphabet = [c for c in string.printable if c.isprintable() and c != " "] + ["\n", "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        special_tokens=[UNKNOWN, BOS, EOS, PAD, IMAGE],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(w.lstrip("▁") for w in world_words()), "\n"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": IMAGE},
        chat_template=CHAT_TEMPLATE,
    )
