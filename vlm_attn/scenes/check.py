"""Figures of a checkpoint on the picture world's benchmarks: `python -m vlm_attn.scenes.check`.

A quick look through the real processor and `generate`, in batches with left padding; the tables that are published
come from `vlm-attn eval`.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from vlm_attn.scenes.benchmarks import MME_CATEGORIES, POPE_SPLITS, Row, chair, load_image, mme, pope
from vlm_attn.scenes.export import CHECKPOINT
from vlm_attn.scenes.language import SINGLE_WORD
from vlm_attn.scenes.world import KINDS

logger = logging.getLogger(__name__)


def answer(
    model: PreTrainedModel, processor: ProcessorMixin, rows: Sequence[Row], suffix: str, batch: int, new_tokens: int
) -> list[str]:
    """Greedy answers to the questions of benchmark rows, in their order."""
    texts: list[str] = []
    for start in tqdm(range(0, len(rows), batch), desc="answers", mininterval=5):
        part = rows[start : start + batch]
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"] + suffix}]}]
            for row in part
        ]
        prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        images = [[load_image(row)] for row in part]
        inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        texts += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def yes_no_figures(rows: Sequence[Row], texts: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and yes ratio (positive class yes, a "no" word anywhere in front means no)."""
    said = [not re.match(r"no\b", text.lower()) for text in texts]
    true = [row["label"] == "yes" for row in rows]
    hit = sum(s and t for s, t in zip(said, true, strict=True))
    precision, recall = hit / max(1, sum(said)), hit / max(1, sum(true))
    return {
        "accuracy": sum(s == t for s, t in zip(said, true, strict=True)) / len(rows),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(1e-9, precision + recall),
        "yes_ratio": sum(said) / len(rows),
    }


def caption_figures(rows: Sequence[Row], texts: Sequence[str]) -> dict[str, float]:
    """CHAIR over the world's one-word objects, recall and length in words."""
    mentions = [[w for w in re.findall(r"[a-z]+", text.lower()) if w in KINDS] for text in texts]
    truths = [set(row["objects"]) for row in rows]
    wrong = [sum(m not in t for m in ms) for ms, t in zip(mentions, truths, strict=True)]
    return {
        "chair_i": sum(wrong) / max(1, sum(map(len, mentions))),
        "chair_s": sum(w > 0 for w in wrong) / len(rows),
        "recall": sum(len(t & set(m)) for m, t in zip(mentions, truths, strict=True)) / sum(map(len, truths)),
        "words": sum(len(text.split()) for text in texts) / len(rows),
    }


def check(folder: Path, seeds: str, images: int, batch: int = 48) -> dict[str, dict[str, float]]:
    """Figures of every benchmark for the checkpoint in a folder."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    figures: dict[str, dict[str, float]] = {}
    for split in POPE_SPLITS:
        rows = pope(split, images, seeds=seeds)
        figures[f"pope_{split}"] = yes_no_figures(rows, answer(model, processor, rows, SINGLE_WORD, batch, 4))
    for category in MME_CATEGORIES:
        rows = mme(category, seeds=seeds)
        figures[f"mme_{category}"] = yes_no_figures(rows, answer(model, processor, rows, SINGLE_WORD, batch, 4))
    rows = chair(images, seeds=seeds)
    figures["chair"] = caption_figures(rows, answer(model, processor, rows, "", batch, 64))
    return figures


def main(arguments: list[str] | None = None) -> None:
    """Write the figures as JSON lines to the log and, with `--out`, to a file."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="python -m vlm_attn.scenes.check", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=CHECKPOINT)
    parser.add_argument("--seeds", choices=("calibration", "evaluation"), default="calibration")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    figures = check(options.folder, options.seeds, options.images)
    for name, values in figures.items():
        logger.info("%s %s", name, json.dumps({k: round(v, 4) for k, v in values.items()}))
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
