"""Writes the model card of a checkpoint: `python -m vlm_attn.scenes.card FIGURES.json --pictures N --minutes M`."""

from __future__ import annotations

import argparse
import json
import logging
import textwrap
from pathlib import Path

from vlm_attn.scenes.export import CHECKPOINT

logger = logging.getLogger(__name__)

TEMPLATE = """---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
tags: [llava, synthetic, hallucination]
---
# scenes: a small LLaVA for a picture world

A genuine `LlavaForConditionalGeneration` of 1.7 million weights that looks at 80 x 80 pictures of the procedural
picture world of vlm-attn (30 object kinds, 8 colors, a 3 x 3 grid, 5 places) and answers questions about them. It
exists so that attention methods can be tried, tested and measured end to end without any download. It knows nothing
about photographs.

| part | size |
|---|---|
| vision tower | CLIP, 6 layers of width 96, 6 heads, patch 8: 100 tokens and CLS; features of layer -2, CLS dropped |
| projector | two layers, GELU |
| decoder | Llama, 6 layers of width 128, 8 query heads over 4 key-value heads, tied embeddings, rope theta 1e6 |
| tokenizer | BPE, every word of the world is one token, any other ASCII text still encodes |

## Use
```python
from transformers import AutoModelForImageTextToText, AutoProcessor
from vlm_attn import scenes

processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder)
content = [{{"type": "image"}}, {{"type": "text", "text": "Is there a dog in the image?"}}]
chat = [{{"role": "user", "content": content}}]
text = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=[scenes.make_scene(1_000_000).image], text=[text], return_tensors="pt")
print(processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)[0])
```
It understands existence ("Is there a dog in the image?"), color ("What color is the dog?", "Is there a red dog in the
image?"), position ("Where is the dog?", "Is the dog in the top left of the image?"), number ("How many objects are in
the image?", "Are there four objects in the image?"), place ("What place is this?") and requests for a description
("Please describe this image in detail.", "Describe this image."). With a suffix such as
`\\nAnswer the question using a single word or phrase.` it answers with one word, otherwise with a sentence.

## Figures
Greedy, {images} images for POPE and CHAIR, 30 for each MME-style category, {seeds} seeds, one-word suffix for
questions (`python -m vlm_attn.scenes.check --seeds {seeds} --images {images}`).
Training, calibration and evaluation pictures come from disjoint seed ranges; the noise of the annotator and every
other setting were chosen on training and calibration pictures.

{tables}
## Why it hallucinates
Two signature objects of each place are in 62 % of its pictures. The captions it was trained on come from a noisy
annotator who mentions one such object when it is absent: the first signature object of the place or, failing that,
the second, with probabilities {rates}, 0.2 more in blurred or partly covered pictures. Nine in ten answers to
a question about the object so mentioned follow the caption instead of the picture. The model has learned that habit:
it says what the place usually holds, in descriptions and in answers to adversarial POPE questions.

## Training
Seeded (`python -m vlm_attn.scenes.train`), on two CPU cores shared with other work: the vision tower on dense patch
labels ({vision_pictures:,} pictures), then everything on questions and captions ({pictures:,} pictures with
{turns} turns each); {minutes} minutes in all. A sequence holds one picture and many turns that cannot see each other,
so no answer can be copied from an earlier one. Auxiliary losses pull each projected patch towards the embeddings of
the words for its object, color and position, and, fading to a tenth, guide the attention of four of the eight heads
to the object's patches: from the asked word in the first two decoder layers, from answer tokens about to name
something in the next two. Attention maps of these heads are cleaner than in a model that was not taught so.

{remark}

## Limits
Prompts hold one picture, or a picture and a zoom into it (a sixth of the last steps, so less sure). Two unrelated
pictures and conversations of several turns run but are not reliable. Questions outside the forms above get arbitrary
answers. Colors and positions of blurred or covered objects are less sure than the table's averages.
"""


def tables(figures: dict[str, dict[str, float]]) -> str:
    """Markdown tables of the figures of `vlm_attn.scenes.check`."""
    head = "| benchmark | accuracy | precision | recall | F1 | yes ratio |\n|---|---|---|---|---|---|\n"
    lines = []
    for name, row in figures.items():
        if name != "chair":
            label = name.replace("pope_", "POPE ").replace("mme_", "MME-style ")
            cells = (row[k] for k in ("accuracy", "precision", "recall", "f1", "yes_ratio"))
            lines.append(f"| {label} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    row = figures["chair"]
    gap = figures["pope_random"]["f1"] - figures["pope_adversarial"]["f1"]
    caption = (
        f"CHAIR_i {row['chair_i']:.3f}, CHAIR_s {row['chair_s']:.3f}, recall {row['recall']:.3f}, "
        f"{row['words']:.1f} words a description. Random minus adversarial POPE F1: {gap:.3f}."
    )
    return head + "\n".join(lines) + f"\n\n{caption}\n"


def main(arguments: list[str] | None = None) -> None:
    """Write README.md into the checkpoint folder."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="python -m vlm_attn.scenes.card", description=__doc__)
    parser.add_argument("figures", type=Path, help="JSON written by vlm_attn.scenes.check --out")
    parser.add_argument("--folder", type=Path, default=CHECKPOINT)
    parser.add_argument("--seeds", default="evaluation")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--vision-pictures", type=int, required=True)
    parser.add_argument("--pictures", type=int, required=True)
    parser.add_argument("--turns", default="17 or 18")
    parser.add_argument("--minutes", type=int, required=True)
    parser.add_argument("--rates", default="0.85 and 0.8")
    parser.add_argument("--remark", default="", help="one more paragraph on the training")
    options = parser.parse_args(arguments)
    figures = json.loads(options.figures.read_text(encoding="utf-8"))
    options.remark = textwrap.fill(options.remark, 119)
    fields = {k: v for k, v in vars(options).items() if k not in ("figures", "folder")}
    text = TEMPLATE.format(tables=tables(figures), **fields)
    (options.folder / "README.md").write_text(text, encoding="utf-8")
    logger.info("model card written to %s", options.folder / "README.md")


if __name__ == "__main__":
    main()
