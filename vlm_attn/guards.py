"""Generation modes that a pipeline cannot follow are refused by name, before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import BaseImageProcessor, DynamicCache, PreTrainedTokenizerBase, StaticCache

from .errors import AttachError, UnsupportedError

if TYPE_CHECKING:
    from .families import Family
    from .session import Session


def check_processor(family: Family, processor: Any) -> Any:
    """Checks that a processor belongs to the model and returns it unchanged (None is none).

    The model's image placeholder must be an id that the processor's tokenizer lists beside its words, as special or
    added token: for the tokenizer of another model the same id is a word, or nothing.

    Raises:
        AttachError: half a processor, or the processor of another model.
    """
    if isinstance(processor, PreTrainedTokenizerBase | BaseImageProcessor):
        half = "a tokenizer" if isinstance(processor, PreTrainedTokenizerBase) else "an image processor"
        raise AttachError(
            f"{type(processor).__name__} is {half} alone: pass the whole processor, "
            "AutoProcessor.from_pretrained(...) of the same checkpoint"
        )
    tokenizer = getattr(processor, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return processor
    image = family.placeholders["image"]
    claimed = {getattr(processor, "image_token_id", None), *getattr(processor, "image_token_ids", ())}
    if image not in claimed | set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids):
        raise AttachError(
            f"the processor ({type(processor).__name__}) does not belong to the model ({family.name}): token {image}, "
            "the model's image placeholder, is no special token of its tokenizer; load it with "
            "AutoProcessor.from_pretrained(...) of the same checkpoint"
        )
    return processor


def _check_presses(session: Session, names: str) -> None:
    """Refuses presses of kvpress on the model's attention: they shorten caches that the session counts on."""
    for _, attention in session.family.attentions():
        for hook in attention._forward_hooks.values():
            press = type(getattr(hook, "__self__", None))
            if press.__module__.partition(".")[0] == "kvpress":
                raise UnsupportedError(
                    f"{names}: a press of kvpress ({press.__name__}) is active on this model. No release of kvpress "
                    "supports the transformers that vlm-attn needs (0.5.5 asks for transformers < 5.3): leave the "
                    "press, and shorten the cache by pruning instead"
                )


def check_generate(session: Session, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Checks the arguments of ``generate`` against the attached pipeline and returns them unchanged.

    Raises:
        UnsupportedError: a mode in which a method would be silently wrong.
    """
    acting = [m.name for m in session.methods if m.stage in ("prune", "edit")]
    contrast = session.contrast if session.contrast is not None and session.contrast.active else None
    refine = session.refine if session.refine is not None and session.refine.active else None
    if refine is not None and not session.refined:
        raise UnsupportedError(
            f"{refine.name} changes the picture before the processor sees it: use vlm.ask(image, text), or "
            f"vlm.refine(image, text) and then the processor"
        )
    if not acting and contrast is None:
        return kwargs
    names = ", ".join([*acting, *([contrast.name] if contrast else [])])
    _check_presses(session, names)
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or session.model.generation_config

    def value(name: str, default: Any = None) -> Any:
        given = kwargs.get(name)
        return given if given is not None else getattr(config, name, default)

    ids = kwargs.get("input_ids", args[0] if args else None)
    new = value("max_new_tokens")
    if acting and session.window is not None and isinstance(ids, Tensor) and isinstance(new, int):
        session.fits_window(ids.shape[1] + new)
    if value("use_cache", True) is False:
        raise UnsupportedError(f"{names}: generate needs the key/value cache; leave use_cache at True")
    if value("prefill_chunk_size") is not None:
        raise UnsupportedError(f"{names}: chunked prefill is not supported; drop prefill_chunk_size")
    implementation = value("cache_implementation")
    cache = kwargs.get("past_key_values")
    if implementation not in (None, "dynamic", "dynamic_full") or isinstance(cache, StaticCache):
        raise UnsupportedError(
            f"{names}: the {implementation or 'static'} cache is not supported; use the dynamic cache"
        )
    if cache is not None and not isinstance(cache, DynamicCache):
        raise UnsupportedError(f"{names}: {type(cache).__name__} is not supported; pass a DynamicCache or none")
    assisted = kwargs.get("assistant_model") is not None or value("prompt_lookup_num_tokens") is not None
    if assisted:
        raise UnsupportedError(f"{names}: assisted decoding is not supported; drop the assistant model")
    if session.sites and value("output_hidden_states", False):
        raise UnsupportedError(f"{names}: hidden states have another length after pruning; drop output_hidden_states")
    if contrast is not None:
        beams = value("num_beams", 1)
        if beams is not None and beams > 1:
            raise UnsupportedError(
                f"{contrast.name} does not support beam search (its branch cannot follow the beams): set num_beams=1"
            )
        if cache is not None and cache.get_seq_length() > 0:
            raise UnsupportedError(f"{contrast.name} cannot continue a filled cache: send the whole prompt again")
    return kwargs
