"""Train the `scenes` model: `python -m vlm_attn.scenes.train`.

Two stages, both seeded and resumable (state under `--runs`): the vision tower on dense patch labels, then everything
together on questions and captions. Ends by writing the checkpoint folder. Start it again with more `--steps` to go on.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, distributed, multiprocessing, nn
from tqdm.auto import tqdm
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from vlm_attn.scenes.export import CHECKPOINT, write_checkpoint
from vlm_attn.scenes.language import HONEST, Annotator, Turn, attribute_turn, caption_turn, existence_turns
from vlm_attn.scenes.lookup import LookupTeacher, prepare_lookup
from vlm_attn.scenes.model import HIDDEN, VISION_WIDTH, build_model
from vlm_attn.scenes.objectives import PictureBatch, VisionHeads, picture_batch
from vlm_attn.scenes.packing import TurnGroup, answer_loss, pack_turns, packed_forward, prefix_ids
from vlm_attn.scenes.seeds import split_seeds
from vlm_attn.scenes.tokenizer import build_tokenizer
from vlm_attn.scenes.world import IMAGE_SIZE, Scene, make_scene

logger = logging.getLogger(__name__)

EXISTENCE_TURNS = 7
ATTRIBUTE_TURNS = 9
CAPTION_TURNS = 2
PAIR_EVERY = 6
"""From `--pairs-from` on, every that many steps the prompt holds the picture and a zoom into it."""
LANGUAGE_START = 100_000_000
"""The language stage starts this many seeds into the training split, so its pictures are new to the tower too."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m vlm_attn.scenes.train", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/scenes"), help="folder of the resumable state")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="checkpoint folder to write")
    parser.add_argument("--vision-steps", type=int, default=1110, help="steps of the vision stage")
    parser.add_argument("--vision-batch", type=int, default=32, help="pictures per vision step")
    parser.add_argument("--steps", type=int, default=4000, help="steps of the language stage")
    parser.add_argument("--batch", type=int, default=8, help="pictures per language step")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--noise-from", type=int, default=1800, help="step at which the noisy annotator takes over")
    parser.add_argument(
        "--pairs-from", type=int, default=2800, help="step from which every sixth step shows a zoom too"
    )
    parser.add_argument("--noise", type=float, nargs=2, default=Annotator().rates, help="its rates per signature rank")
    parser.add_argument("--cooldown", type=float, default=0.35, help="last share of the steps, with a falling rate")
    parser.add_argument("--save-every", type=int, default=200, help="steps between saved states")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes that share each step's pictures")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    parser.add_argument("--export-only", action="store_true", help="write the checkpoint from the saved state")
    return parser.parse_args(arguments)


def learning_rate(step: int, steps: int, peak: float, cooldown: float, warmup: int = 100) -> float:
    """Warm-up, plateau, linear fall to 2 % of the peak over the last `cooldown` share of the steps."""
    fall = max(1.0, cooldown * steps)
    return peak * max(0.02, min(1.0, (step + 1) / warmup, (steps - step) / fall))


def rank_and_workers() -> tuple[int, int]:
    """Which of how many processes this is."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def average_gradients(parameters: list[nn.Parameter], workers: int) -> None:
    """Replace every gradient by its mean over the processes."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    distributed.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient) / workers)


class Averages:
    """Exponential averages of training figures."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def update(self, figures: dict[str, float]) -> None:
        """Blend new figures in with weight 0.05."""
        for name, value in figures.items():
            self.values[name] = 0.95 * self.values.get(name, value) + 0.05 * value


def run_stage(
    name: str,
    modules: nn.ModuleDict,
    groups: list[dict[str, Any]],
    step_loss: Callable[[int], tuple[Tensor, dict[str, float]]],
    *,
    steps: int,
    rate: float,
    cooldown: float,
    folder: Path,
    save_every: int,
) -> None:
    """Optimise until `steps`, resuming from and saving to `folder`/`name`.pt, logging to `folder`/`name`.jsonl.

    Args:
        modules: everything whose weights are saved.
        groups: optimiser groups with `params` and a `scale` of the learning rate.
        step_loss: computes loss and figures of a step; everything random in it follows from the step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pt"
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    averages, start, spent = Averages(), 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        modules.load_state_dict(state["weights"])
        optimiser.load_state_dict(state["optimiser"])
        averages.values, start, spent = state["averages"], state["step"], state["seconds"]
    scales = [float(group["scale"]) for group in groups]
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    rank, workers = rank_and_workers()
    clock = time.monotonic()
    with tqdm(total=steps, initial=start, desc=name, unit="step", mininterval=5, disable=rank > 0) as bar:
        for step in range(start, steps):
            current = learning_rate(step, steps, rate, cooldown)
            for group, scale in zip(optimiser.param_groups, scales, strict=True):
                group["lr"] = current * scale
            loss, figures = step_loss(step)
            loss.backward()
            if workers > 1:
                average_gradients(parameters, workers)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            averages.update(figures | {"loss": float(loss.detach())})
            bar.update()
            if rank > 0:
                continue
            done = step + 1 == steps
            if done or (step + 1) % 25 == 0:
                row = {k: round(v, 4) for k, v in averages.values.items()}
                bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in row.items()))
                with (folder / f"{name}.jsonl").open("a") as log:
                    log.write(json.dumps({"step": step + 1, "time": round(time.monotonic() - clock), **row}) + "\n")
            if done or (step + 1) % save_every == 0:
                state = {
                    "weights": modules.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "averages": averages.values,
                    "step": step + 1,
                    "seconds": spent + time.monotonic() - clock,
                }
                torch.save(state, path.with_suffix(".tmp"))
                path.with_suffix(".tmp").replace(path)


def scenes_of_step(step: int, batch: int, start: int = 0) -> list[Scene]:
    """This process's part of the fresh training scenes of a step."""
    rank, workers = rank_and_workers()
    return [make_scene(seed) for seed in split_seeds("train", start + step * batch, batch)[rank::workers]]


def vision_loss(
    tower: nn.Module, heads: nn.Module, pixels: Tensor, batch: PictureBatch
) -> tuple[Tensor, Tensor, dict]:
    """Dense loss of the vision tower, the patch features [B, 100, W] the projector reads, and figures."""
    output = tower(pixels, output_hidden_states=True)
    features = output.hidden_states[-2][:, 1:]
    loss, figures = heads(features, output.pooler_output, batch)
    return loss, features, figures


def train_vision(model: LlavaForConditionalGeneration, heads: VisionHeads, options: argparse.Namespace) -> None:
    """Stage 1: dense patch labels."""
    tower = model.model.vision_tower

    def step_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        batch = picture_batch(scenes_of_step(step, options.vision_batch))
        loss, _, figures = vision_loss(tower, heads, batch.pixels, batch)
        return loss, figures

    modules = nn.ModuleDict({"vision": tower, "heads": heads})
    run_stage(
        "vision",
        modules,
        [{"params": list(modules.parameters()), "scale": 1.0}],
        step_loss,
        steps=options.vision_steps,
        rate=options.rate,
        cooldown=0.5,
        folder=options.runs,
        save_every=options.save_every,
    )


def zooms(scenes: Iterable[Scene], rng: random.Random) -> Tensor:
    """A random square part of each picture, enlarged to full size, float32 [B, 3, 80, 80]."""
    pixels = []
    for scene in scenes:
        edge = round(rng.uniform(0.4, 0.8) * IMAGE_SIZE)
        x, y = rng.randint(0, IMAGE_SIZE - edge), rng.randint(0, IMAGE_SIZE - edge)
        part = scene.image.crop((x, y, x + edge, y + edge)).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        pixels.append(torch.from_numpy(np.array(part)).permute(2, 0, 1))
    return torch.stack(pixels).float() / 127.5 - 1


def make_turns(scenes: Iterable[Scene], annotator: Annotator, rng: random.Random) -> tuple[list, list]:
    """Short questions and one caption request for each scene."""
    short: list[list[Turn]] = []
    long: list[list[Turn]] = []
    for scene in scenes:
        asked = existence_turns(scene, EXISTENCE_TURNS, annotator, rng)
        short.append(asked + [attribute_turn(scene, rng) for _ in range(ATTRIBUTE_TURNS)])
        long.append([caption_turn(scene, annotator, rng) for _ in range(CAPTION_TURNS)])
    return short, long


def train_language(
    model: LlavaForConditionalGeneration,
    heads: VisionHeads,
    tokenizer: PreTrainedTokenizerBase,
    options: argparse.Namespace,
) -> None:
    """Stage 2: projector and decoder on questions and captions; the tower follows slowly."""
    prefix, pair_prefix = (torch.tensor(prefix_ids(tokenizer, pictures=n)) for n in (1, 2))
    start = int((prefix == model.config.image_token_id).int().argmax())
    teacher = LookupTeacher(tokenizer, HIDDEN)
    annotator = Annotator(rates=tuple(options.noise))
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector

    def step_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random((options.seed * 1_000_003 + step) * 64 + rank_and_workers()[0])
        scenes = scenes_of_step(step, options.batch, LANGUAGE_START)
        batch = picture_batch(scenes)
        short, long = make_turns(scenes, annotator if step >= options.noise_from else HONEST, rng)
        groups = [pack_turns(tokenizer, short, 0.3), pack_turns(tokenizer, long, 0.5)]
        seen, patches, sight = vision_loss(tower, heads, batch.pixels, batch)
        features = projector(patches)
        paired = step >= options.pairs_from and step % PAIR_EVERY == 0
        if paired:
            zoomed = tower(zooms(scenes, rng), output_hidden_states=True).hidden_states[-2][:, 1:]
            output = packed_forward(model, torch.cat([features, projector(zoomed)], 1), pair_prefix, groups)
        else:
            output = packed_forward(model, features, prefix, groups)
        aligned, alignment = teacher.alignment(features, model.get_input_embeddings().weight, batch)
        found, finding = teacher.found(output, groups)
        asked, telling = teacher.guidance(output, groups, batch, start)
        sums, right = zip(*(answer_loss(model, h, g) for h, g in zip(output.hidden, groups, strict=True)), strict=True)
        turns = sum(g.ids.shape[0] * g.ids.shape[1] for g in groups)
        answers = torch.stack(sums).sum() / turns
        # guidance fades: it opens the way, the answers decide what stays
        help_share = 0.0 if paired else max(0.1, 1 - step / (0.6 * options.steps))
        loss = answers + 0.3 * aligned + help_share * (0.2 * asked + 0.2 * telling + 0.3 * found) + 0.3 * seen
        figures = {"answers": float(answers.detach()), "aligned": alignment, "found": finding}
        figures |= {"asked": float(asked.detach()), "telling": float(telling.detach()), "patch": sight["patch object"]}
        return loss, figures | turn_figures(groups[0], right[0]) | {"caption": float(right[1].float().mean())}

    modules = nn.ModuleDict({"model": model, "heads": heads, "teacher": teacher})
    slow = list(tower.parameters()) + list(heads.parameters())
    fast = list(projector.parameters()) + list(model.model.language_model.parameters()) + list(teacher.parameters())
    run_stage(
        "language",
        modules,
        [{"params": fast, "scale": 1.0}, {"params": slow, "scale": 0.15}],
        step_loss,
        steps=options.steps,
        rate=options.rate,
        cooldown=options.cooldown,
        folder=options.runs,
        save_every=options.save_every,
    )


def turn_figures(group: TurnGroup, right: Tensor) -> dict[str, float]:
    """Share of wholly right answers [B, T] on existence questions by truth, and on the others."""
    visible = torch.zeros_like(right)
    visible[group.focus[:, 0], group.focus[:, 1]] = group.visible
    asked = right[:, :EXISTENCE_TURNS]
    seen = visible[:, :EXISTENCE_TURNS]
    return {
        "present": float(asked[seen].float().mean()),
        "absent": float(asked[~seen].float().mean()),
        "attribute": float(right[:, EXISTENCE_TURNS:].float().mean()),
    }


def work(rank: int, options: argparse.Namespace, meeting: str) -> None:
    """Train in one of `options.workers` processes; the first one writes the checkpoint."""
    if options.workers > 1:
        address = f"file://{meeting}"
        distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=options.workers)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer()
    model = build_model(
        len(tokenizer),
        pad=tokenizer.pad_token_id,
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        image=tokenizer.image_token_id,
    )
    model.model.vision_tower.config._attn_implementation = "eager"  # faster than sdpa for 101 tokens of 16 wide heads
    prepare_lookup(model, tokenizer)
    heads = VisionHeads(VISION_WIDTH)
    if options.export_only:
        state = torch.load(options.runs / "language.pt", weights_only=True)
        weights = {k.removeprefix("model."): v for k, v in state["weights"].items() if k.startswith("model.")}
        model.load_state_dict(weights)
    else:
        train_vision(model, heads, options)
        train_language(model, heads, tokenizer, options)
    if rank == 0:
        write_checkpoint(model, tokenizer, options.out)
    if options.workers > 1:
        distributed.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    """Run both stages and write the checkpoint."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse_arguments(arguments)
    if options.export_only:
        options.workers = 1
    if options.workers > 1:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(work, (options, f"{folder}/meeting"), nprocs=options.workers)
    else:
        work(0, options, "")
    logger.info("checkpoint written to %s", options.out)


if __name__ == "__main__":
    main()
