"""The procedural picture world and the small vision-language model that ships with it."""

from vlm_attn.scenes.benchmarks import chair, load_image, mme, pope, synonyms
from vlm_attn.scenes.data import coco_annotations, dataset, write_coco
from vlm_attn.scenes.seeds import CALIBRATION_SEEDS, EVALUATION_SEEDS, TRAIN_SEEDS, require_split, split_seeds
from vlm_attn.scenes.world import Scene, SceneObject, make_scene, render

__all__ = [
    "CALIBRATION_SEEDS",
    "EVALUATION_SEEDS",
    "TRAIN_SEEDS",
    "Scene",
    "SceneObject",
    "chair",
    "coco_annotations",
    "dataset",
    "load_image",
    "make_scene",
    "mme",
    "pope",
    "render",
    "require_split",
    "split_seeds",
    "synonyms",
    "write_coco",
]
